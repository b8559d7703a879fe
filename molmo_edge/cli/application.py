"""The commands, and what a failed one ends with."""

from __future__ import annotations

import logging
import signal
import sys
import threading
from collections.abc import Sequence
from typing import Annotated

import typer

from molmo_edge.cli import (
    INTERRUPTED,
    ablate,
    ask,
    bench,
    caption,
    chat,
    count,
    doctor,
    eval,
    export,
    loss,
    options,
    point,
    quantize,
    train,
    verify,
)
from molmo_edge.cli.interrupts import Interrupts
from molmo_edge.cli.streams import complain, flush_streams, open_streams
from molmo_edge.errors import MolmoEdgeError
from molmo_edge.system.extras import with_extra
from molmo_edge.system.log import shown
from molmo_edge.system.version import __version__

app = typer.Typer(
    name="molmo-edge",
    help="Ask a photo on your own machine: Molmo without account, cloud or PyTorch.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: it opens in half the time
)
_EXTRAS = {ablate: "eval", eval: "eval", export: "export", loss: "eval", quantize: "eval"}  # made for the command
_COMMANDS = dict.fromkeys((ask, point, count), options.ImagesAndText)
for _command in (ask, point, count, caption, chat, verify, doctor, bench, export, eval, loss, ablate, quantize):
    _name = _command.__name__.rpartition(".")[2]
    app.command(cls=_COMMANDS.get(_command))(with_extra(getattr(_command, _name), _name, _EXTRAS.get(_command)))
app.add_typer(train.app, name="train")

_tracebacks = False


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"molmo-edge {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error, and what the library logs.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    global _tracebacks
    _tracebacks = debug
    if debug:
        logging.getLogger("molmo_edge").setLevel(logging.DEBUG)


def run(arguments: Sequence[str] | None, interrupts: Interrupts) -> int:
    """Run one command; returns the exit status. Nothing is printed about what follows an interrupt."""
    open_streams()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _end)
    with shown():
        status = _run(arguments, interrupts)
    return flush_streams(status)


def _end(number: int, frame: object) -> None:
    """As Ctrl-C does: what a command has begun is cleaned up, temporary folders and its own processes among it."""
    sys.exit(128 + number)


# typer gives click's errors no public name of their own, and either holds a copy of click or depends on it.
_WrongUse = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


def _run(arguments: Sequence[str] | None, interrupts: Interrupts) -> int:
    try:
        status = app(arguments, prog_name="molmo-edge", standalone_mode=False)
        return status if isinstance(status, int) else 0
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except Exception as error:
        if interrupts.pending:
            return INTERRUPTED
        if isinstance(error, _WrongUse):
            if type(error).__name__ == "NoSuchOption":
                complain('what follows "--" may begin with a dash: a file\'s name, a question, a label')
            error.show()  # type: ignore[attr-defined]
            return error.exit_code  # type: ignore[attr-defined]
        if isinstance(error, typer.Abort):
            complain("the input ended")
            return 1
        if _tracebacks or not isinstance(error, (MolmoEdgeError, MemoryError, OSError)):
            raise
        complain(" ".join(_sentence(error).split()))
        return 1


def _sentence(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return "out of memory: try --max-crops 4, or a smaller image or model"
    if isinstance(error, OSError) and error.strerror:  # a full disk, a directory that may not be written to
        name = str(error.filename or "")
        name = name if len(name) <= 200 else f"{name[:120]}... ({len(name)} characters)"
        return f"{error.strerror}: {name}" if name else error.strerror
    return str(error)
