"""The command line: `molmo-edge ask photo.jpg "Where is the dog?"`.

Answers are printed to stdout, as JSON with --json; everything else to stderr. Exit status: 0 (success), 1 (failure,
with a one-line message), 2 (wrong usage), 130 (interrupted).
"""

from __future__ import annotations

import sys

# Other imports are inside `main`: an interrupt during an import outside of it would print a traceback.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

INTERRUPTED = 130  # exit status of a shell command that was ended by Ctrl-C


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit. `arguments` default to those of the process."""
    try:
        from molmo_edge.cli.interrupts import Interrupts

        with Interrupts(whole_process=arguments is None) as interrupts:
            from molmo_edge.cli.application import run

            status = run(arguments, interrupts)
        if status and interrupts.pending:  # whichever error the interrupt became
            status = INTERRUPTED
    except BaseException as error:
        if not _is_interrupt(error):
            raise
        status = INTERRUPTED
    sys.exit(status)


def _is_interrupt(error: BaseException | None) -> bool:
    """Whether an interrupt caused `error`: Python wraps one in a RuntimeError in `__set_name__`."""
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
