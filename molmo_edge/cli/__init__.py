"""The command line: `molmo-edge ask photo.jpg "Where is the dog?"`.

An answer goes to stdout, as JSON with --json; everything else goes to stderr. Exit status: 0, 1 (it failed, one
line says why), 2 (wrong use), 130 (interrupted).
"""

from __future__ import annotations

import sys

# Nothing else is imported here: an interrupt that arrives during an import outside `main` shows a traceback.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

INTERRUPTED = 130  # the exit status of a shell's command that Ctrl-C ended


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit; `arguments` are those of the process unless given."""
    try:
        from molmo_edge.cli.interrupts import Interrupts

        with Interrupts(whole_process=arguments is None) as interrupts:
            from molmo_edge.cli.application import run

            status = run(arguments, interrupts)
        if status and interrupts.pending:  # whatever the command made of it
            status = INTERRUPTED
    except BaseException as error:
        if not _is_interrupt(error):
            raise
        status = INTERRUPTED
    sys.exit(status)


def _is_interrupt(error: BaseException | None) -> bool:
    """Whether an interrupt is among an error's causes: Python wraps one in a RuntimeError in `__set_name__`."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        if isinstance(error, KeyboardInterrupt):
            return True
        seen.append(error)
        error = error.__cause__ or error.__context__
    return False


def __getattr__(name: str) -> Any:
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from molmo_edge.cli.application import app

    return app
