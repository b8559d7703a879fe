"""Switch off the usage reports of the libraries that molmo-edge loads.

Each library reads its environment variable once, when it is imported, so the variables are set when molmo_edge is
imported. Values that are already set are kept. docs/privacy.md lists what each library would send.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False  # `typing` and `dataclasses` take longer to import than this module
if TYPE_CHECKING:
    from collections.abc import MutableMapping

_TRUE = ("1", "ON", "TRUE", "YES")  # huggingface_hub converts values to upper case


class Switch:
    """An environment variable that stops a library's usage reports."""

    def __init__(self, library: str, variable: str, value: str, others: tuple[str, ...] = ()) -> None:
        self.library = library
        self.variable = variable
        self.value = value  # the value that switches reports off
        self.others = others  # other variables that the library reads for this purpose

    def set(self, environment: MutableMapping[str, str]) -> None:
        """Set the variable, unless it or one of `others` is set."""
        if self._decided_by(environment) is None:
            environment[self.variable] = self.value

    def state(self, environment: MutableMapping[str, str]) -> str:
        """A description for people: "off (ORT_DISABLE_TELEMETRY=1)"."""
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
    """Set the variable of each library in SWITCHES, unless the user has set it."""
    for switch in SWITCHES:
        switch.set(os.environ)


def reports() -> dict[str, str]:
    """Whether each library reports usage, with the variable that decides it, by library."""
    return {switch.library: switch.state(os.environ) for switch in SWITCHES}
