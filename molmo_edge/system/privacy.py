"""Switch off the usage reports of the libraries that molmo-edge loads.

Each of them reads its environment variable once, when it is first imported, so the variables are set when molmo_edge
is imported. A value that is already in the environment stays. docs/privacy.md says what each library would send.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False  # `typing`, as `dataclasses`, takes longer to import than all of this module
if TYPE_CHECKING:
    from collections.abc import MutableMapping

_TRUE = ("1", "ON", "TRUE", "YES")  # in capitals, as huggingface_hub reads them


class Switch:
    """An environment variable that stops a library's usage reports."""

    def __init__(self, library: str, variable: str, value: str, others: tuple[str, ...] = ()) -> None:
        self.library = library
        self.variable = variable
        self.value = value  # that switches the reports off
        self.others = others  # variables that the library reads for the same purpose

    def set(self, environment: MutableMapping[str, str]) -> None:
        """Set the variable, unless it or one of `others` has a value."""
        if self._decided_by(environment) is None:
            environment[self.variable] = self.value

    def state(self, environment: MutableMapping[str, str]) -> str:
        """For people to read: "off (ORT_DISABLE_TELEMETRY=1)"."""
        name = self._decided_by(environment)
        if name is None:
            return f"on ({self.variable} is not set)"
        given = environment[name]
        off = given == self.value if self.value not in _TRUE else given.upper() in _TRUE
        return f"{'off' if off else 'on'} ({name}={given})"

    def _decided_by(self, environment: MutableMapping[str, str]) -> str | None:
        return next((name for name in (self.variable, *self.others) if environment.get(name)), None)


SWITCHES = (
    Switch("onnxruntime", "ORT_DISABLE_TELEMETRY", "1"),
    # hf_xet, which transfers large files for huggingface_hub, reads the same three variables.
    Switch("huggingface_hub", "HF_HUB_DISABLE_TELEMETRY", "1", ("DISABLE_TELEMETRY", "DO_NOT_TRACK")),
    Switch("datasets", "HF_UPDATE_DOWNLOAD_COUNTS", "0"),
)


def switch_off_reports() -> None:
    """Set the variable of each library in SWITCHES that the user has not set."""
    for switch in SWITCHES:
        switch.set(os.environ)


def reports() -> dict[str, str]:
    """Whether each library reports usage, and the variable that decides it, by library."""
    return {switch.library: switch.state(os.environ) for switch in SWITCHES}
