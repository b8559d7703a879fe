"""The commands, and the exit status and message of a command that fails."""

from __future__ import annotations

import logging
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Annotated

import typer

from molmo_edge.cli import options
from molmo_edge.cli.ablate import ablate
from molmo_edge.cli.ask import ask
from molmo_edge.cli.bench import bench
from molmo_edge.cli.caption import caption
from molmo_edge.cli.chat import chat
from molmo_edge.cli.count import count
from molmo_edge.cli.distill import command as distill
from molmo_edge.cli.doctor import doctor
from molmo_edge.cli.eval import eval as evaluate
from molmo_edge.cli.export import export
from molmo_edge.cli.interrupts import Interrupts
from molmo_edge.cli.list import list_models
from molmo_edge.cli.loss import loss
from molmo_edge.cli.mcp import mcp
from molmo_edge.cli.plan import plan
from molmo_edge.cli.point import point
from molmo_edge.cli.pull import pull
from molmo_edge.cli.quantize import quantize
from molmo_edge.cli.rm import rm
from molmo_edge.cli.serve import serve
from molmo_edge.cli.show_crops import show_crops
from molmo_edge.cli.streams import flush_streams, open_streams, print_error
from molmo_edge.cli.train import app as train
from molmo_edge.cli.verify import verify
from molmo_edge.errors import MolmoEdgeError
from molmo_edge.system.extras import with_extra
from molmo_edge.system.log import shown
from molmo_edge.system.version import __version__

app = typer.Typer(
    name="molmo-edge",
    help="Run Molmo on your own machine: ask photos and get answers with points. No account, no cloud, no PyTorch.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help starts in half the time
)
# Commands in the order of --help, each with the extra that it needs.
_COMMANDS: tuple[tuple[str, Callable[..., None], str | None], ...] = (
    ("ask", ask, None),
    ("point", point, None),
    ("count", count, None),
    ("caption", caption, None),
    ("chat", chat, None),
    ("show-crops", show_crops, None),
    ("serve", serve, "serve"),
    ("mcp", mcp, "mcp"),
    ("plan", plan, None),
    ("pull", pull, None),
    ("list", list_models, None),
    ("rm", rm, None),
    ("verify", verify, None),
    ("doctor", doctor, None),
    ("bench", bench, None),
    ("export", export, "export"),
    ("eval", evaluate, "eval"),
    ("loss", loss, "eval"),
    ("ablate", ablate, "eval"),
    ("quantize", quantize, "eval"),
)
for _name, _command, _extra in _COMMANDS:
    _class = options.ImagesAndText if _command in (ask, point, count) else None
    app.command(_name, cls=_class)(with_extra(_command, _name, _extra))
app.add_typer(train, name="train")
app.command("distill")(with_extra(distill, "distill", "train"))

_tracebacks = False


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"molmo-edge {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and the library's debug log.")] = False,
    _version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    global _tracebacks
    _tracebacks = debug
    if debug:
        logging.getLogger("molmo_edge").setLevel(logging.DEBUG)


def run(arguments: Sequence[str] | None, interrupts: Interrupts) -> int:
    """Run one command and return its exit status. Errors that follow an interrupt are not printed."""
    open_streams()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _end)
    with shown():
        status = _run(arguments, interrupts)
    return flush_streams(status)


def _end(number: int, _frame: object) -> None:
    """Exit as on Ctrl-C, so that the command removes its temporary folders and ends its own processes."""
    sys.exit(128 + number)


# typer exports no public name for click's errors, and may contain a copy of click instead of depending on it.
_UsageError = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


def _run(arguments: Sequence[str] | None, interrupts: Interrupts) -> int:
    try:
        status = app(arguments, prog_name="molmo-edge", standalone_mode=False)
        return status if isinstance(status, int) else 0
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except Exception as error:
        if interrupts.pending:
            return 1  # `main` exits with the status of an interrupt
        if isinstance(error, _UsageError):
            if type(error).__name__ == "NoSuchOption":
                print_error('put "--" before a file name, a question or a label that begins with a dash')
            error.show()  # type: ignore[attr-defined]
            return int(error.exit_code)  # type: ignore[attr-defined]
        if isinstance(error, typer.Abort):
            print_error("unexpected end of input")
            return 1
        if _tracebacks or not isinstance(error, (MolmoEdgeError, MemoryError, OSError)):
            raise
        print_error(" ".join(_sentence(error).split()))
        return 1


def _sentence(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return "out of memory: try --max-crops 4, a smaller image or a smaller model"
    if isinstance(error, OSError) and error.strerror:  # a full disk, a directory without write permission
        name = str(error.filename or "")
        name = name if len(name) <= 200 else f"{name[:120]}... ({len(name)} characters)"
        return f"{error.strerror}: {name}" if name else error.strerror
    return str(error)
