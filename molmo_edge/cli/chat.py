"""`molmo-edge chat`"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from molmo_edge.cli import options
from molmo_edge.cli.interrupts import settle_interrupt
from molmo_edge.cli.open_model import open_molmo
from molmo_edge.cli.output import check_save, note, print_stream, progress, save_image
from molmo_edge.cli.pictures import STDIN, PictureError, is_folder, open_picture
from molmo_edge.errors import MolmoEdgeError
from molmo_edge.sdk.readable_text import counted

if TYPE_CHECKING:
    from molmo_edge.answer import Answer
    from molmo_edge.chat import Chat

_HELP = (
    "a question, or: /new forgets the conversation, /save FILE draws the last answer's points, /quit or Ctrl-D ends; "
    "Ctrl-C cancels an answer"
)
_FULL = "the conversation is full: /new starts a new one about the same photo"
_PROMPT = "> "
_KEPT_LINES = 1000  # of the history file


@options.flat
def chat(
    image: options.Image,
    *,
    opening: options.Opening,
    sampling: options.Sampling,
    history: Annotated[
        bool, typer.Option("--history/--no-history", help="Keep the questions for arrow-up in later chats.")
    ] = True,
    quiet: options.Quiet = False,
) -> None:
    """Ask a photo one question after the other. The photo and each turn are read once."""
    if image == STDIN:
        raise typer.BadParameter("chat reads questions from stdin, so the photo must be a file", param_hint="IMAGE")
    if (advice := sampling.without_effect) is not None:
        note(advice, quiet=quiet)
    with progress("opening the photo", quiet=quiet):
        if is_folder(image):
            raise PictureError(f"{image} is a folder: a chat is about one photo")
        photo = open_picture(image)
    with open_molmo(opening, quiet=quiet) as molmo:
        with progress("looking at the photo", quiet=quiet):
            conversation = molmo.chat(photo)
        note(_HELP, quiet=quiet)
        with _line_reader(history) as read_line:
            _converse(conversation, read_line, image, sampling.keywords(), quiet=quiet)


def _converse(
    chat: Chat, read_line: Callable[[], str | None], image: Path, sampling: dict[str, Any], *, quiet: bool
) -> None:
    from molmo_edge.chat import ConversationFull

    last: Answer | None = None
    failed = False
    typed = sys.stdin.isatty()
    while True:
        try:
            if (line := read_line()) is None or line == "/quit":
                break
        except KeyboardInterrupt:  # the line that was being typed is dropped, as in a shell
            if not typed:  # a script: Ctrl-C ends it
                raise
            settle_interrupt()
            note("\n/quit or Ctrl-D ends the chat")
            continue
        try:
            if line == "/new":
                chat.reset()
            elif line.startswith("/save "):
                _save(last, Path(line[len("/save ") :].strip()), image)
            elif line.startswith("/"):
                note(_HELP)
            elif line:
                last = print_stream(chat.stream(line, **sampling))
                _note_turn(last, chat, quiet=quiet)
        except ConversationFull:
            failed = True
            note(f"molmo-edge: {_FULL}")
        except MolmoEdgeError as error:  # a bad question ends the question, not the conversation
            failed = True
            note(f"molmo-edge: {error}")
        except KeyboardInterrupt:
            if not typed:
                raise
            settle_interrupt()
            print(flush=True)  # ends the answer's line
            note("cancelled: this question and its answer are not part of the conversation")
    if failed and not typed:  # a script cannot see what a person has seen
        raise typer.Exit(1)


def _note_turn(answer: Answer, chat: Chat, *, quiet: bool) -> None:
    if chat.full:
        note(_FULL, quiet=quiet)
    elif not answer.complete:
        note(
            f"cut off after {counted(answer.usage.tokens.generated, 'token')}: --max-new-tokens allows more",
            quiet=quiet,
        )
    tokens, seconds = answer.usage.tokens, answer.usage.seconds
    note(
        f"{tokens.prefilled} of {tokens.image + tokens.prompt} tokens read, {tokens.generated} out; "
        f"first token after {seconds.prefill:.2f} s, all after {seconds.prefill + seconds.decode:.2f} s",
        quiet=quiet,
    )


@contextlib.contextmanager
def _line_reader(keep: bool) -> Iterator[Callable[[], str | None]]:
    """Yields what reads the next line, None at the end: with editing and history where somebody types.

    `keep`: the history outlives the chat, in the folder of molmo_edge.system.cache.cache_directory, readable
    by its owner
    alone. Without it the history is that of this chat.
    """
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        yield _read_plain
        return
    try:
        import readline  # from here on input() edits lines
    except ImportError:  # Windows, whose consoles edit lines themselves
        yield _read_edited
        return
    if not keep:
        readline.clear_history()
        yield _read_edited
        return
    from molmo_edge.system.cache import cache_directory

    file = cache_directory() / "chat_history"
    with contextlib.suppress(OSError):  # there is none yet
        readline.read_history_file(file)
    readline.set_history_length(_KEPT_LINES)
    try:
        yield _read_edited
    finally:
        with contextlib.suppress(OSError):  # a home that cannot be written to: the history ends with the chat
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch(mode=0o600)
            readline.write_history_file(file)


def _read_edited() -> str | None:
    try:
        return input(_PROMPT).strip()
    except EOFError:
        print(file=sys.stderr)
        return None


def _read_plain() -> str | None:
    """The prompt goes to stderr, where somebody is looking."""
    if sys.stdin.isatty():
        print(_PROMPT, end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    return line.strip() if line else None


def _save(answer: Answer | None, path: Path, image: Path) -> None:
    if answer is None:
        note("nothing was asked yet")
        return
    check_save(path, image)
    save_image(answer.draw(), path)
    note(f"wrote {path}")
