"""`molmo-edge chat`"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from molmo_edge.cli import options
from molmo_edge.cli.interrupts import settle_interrupt
from molmo_edge.cli.open_model import open_molmo
from molmo_edge.cli.output import note, note_cut_off, print_stream, progress
from molmo_edge.cli.pictures import STDIN, PictureError, is_folder, open_picture
from molmo_edge.cli.saving import check_save, save_image
from molmo_edge.errors import MolmoEdgeError

if TYPE_CHECKING:
    from molmo_edge.answer import Answer
    from molmo_edge.chat import Chat

_HELP = (
    "Type a question, or a command: /new starts a new conversation, /save FILE saves the photo with the points of the "
    "last answer, /quit or Ctrl-D exits. Ctrl-C cancels an answer."
)
_FULL = "the conversation is full: type /new to start a new one about the same photo"
_PROMPT = "> "
_KEPT_LINES = 1000  # of the history file


@options.expand_options
def chat(
    images: options.ChatImages,
    *,
    model: options.CachedModelOptions,
    sampling: options.SamplingOptions,
    video: options.VideoOptions,
    history: Annotated[
        bool,
        typer.Option(
            "--history/--no-history", help="Save the questions, so that arrow-up recalls them in later chats."
        ),
    ] = True,
    quiet: options.Quiet = False,
) -> None:
    """Have a conversation about a photo, or about several photos or a video. They are encoded once."""
    if STDIN in images:
        raise typer.BadParameter("chat reads questions from stdin, so the photo must be a file", param_hint="IMAGE")
    if (warning := sampling.warning) is not None:
        note(warning, quiet=quiet)
    with progress("opening the photo", quiet=quiet):
        for image in images:
            if is_folder(image):
                raise PictureError(f"{image} is a folder: name the photos")
        photos = [open_picture(image, video.keywords()) for image in images]
    with open_molmo(model, quiet=quiet) as molmo:
        with progress("encoding the photo", quiet=quiet):
            conversation = molmo.chat(photos if len(photos) > 1 else photos[0])
        note(_HELP, quiet=quiet)
        with _line_reader(history) as read_line:
            _converse(conversation, read_line, images, sampling.keywords(), quiet=quiet)


def _converse(
    chat: Chat, read_line: Callable[[], str | None], images: Sequence[Path], sampling: dict[str, Any], *, quiet: bool
) -> None:
    from molmo_edge.chat import ConversationFull

    last: Answer | None = None
    failed = False
    typed = sys.stdin.isatty()
    while True:
        try:
            if (line := read_line()) is None or line == "/quit":
                break
        except KeyboardInterrupt:  # drops the line that was being typed, as a shell does
            if not typed:  # ends a script
                raise
            settle_interrupt()
            note("\ntype /quit or press Ctrl-D to exit")
            continue
        try:
            if line == "/new":
                chat.reset()
            elif line.startswith("/save "):
                _save(last, Path(line[len("/save ") :].strip()), images)
            elif line.startswith("/"):
                note(_HELP)
            elif line:
                last = print_stream(chat.stream(line, **sampling))
                _note_turn(last, chat, quiet=quiet)
        except ConversationFull:
            failed = True
            note(f"molmo-edge: {_FULL}")
        except MolmoEdgeError as error:  # the conversation continues
            failed = True
            note(f"molmo-edge: {error}")
        except KeyboardInterrupt:
            if not typed:
                raise
            settle_interrupt()
            print(flush=True)  # ends the answer's line
            note("cancelled: the question and its answer are not part of the conversation")
    if failed and not typed:  # a script does not read the messages
        raise typer.Exit(1)


def _note_turn(answer: Answer, chat: Chat, *, quiet: bool) -> None:
    if chat.full:
        note(_FULL, quiet=quiet)
    else:
        note_cut_off(answer, quiet=quiet)
    tokens, seconds = answer.usage.tokens, answer.usage.seconds
    note(
        f"{tokens.prefilled} of {tokens.image + tokens.prompt} tokens read, {tokens.generated} out; "
        f"first token after {seconds.prefill:.2f} s, all after {seconds.prefill + seconds.decode:.2f} s",
        quiet=quiet,
    )


@contextlib.contextmanager
def _line_reader(keep: bool) -> Iterator[Callable[[], str | None]]:
    """Yield a function that reads the next line, None at the end; on a terminal with line editing and history.

    `keep`: store the history in `molmo_edge.system.cache.cache_directory`, readable only by its owner.
    """
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        yield _read_plain
        return
    try:
        import readline  # makes input() edit lines
    except ImportError:  # on Windows the console edits lines
        yield _read_edited
        return
    if not keep:
        readline.clear_history()
        yield _read_edited
        return
    from molmo_edge.system.cache import cache_directory

    file = cache_directory() / "chat_history"
    with contextlib.suppress(OSError):  # it may not exist yet
        readline.read_history_file(file)
    readline.set_history_length(_KEPT_LINES)
    try:
        yield _read_edited
    finally:
        with contextlib.suppress(OSError):  # a read-only home: the history ends with the chat
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
    """Read a line. The prompt is printed to stderr, if stdin is a terminal."""
    if sys.stdin.isatty():
        print(_PROMPT, end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    return line.strip() if line else None


def _save(answer: Answer | None, path: Path, images: Sequence[Path]) -> None:
    if answer is None:
        note("there is no answer yet: ask a question first")
        return
    for image in images:
        check_save(path, image)
    save_image(answer.draw(), path)
    note(f"wrote {path}")
