"""Measure the peak memory of opening a model and asking one question, by phase, in a process of its own. Linux only."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from molmo_edge.errors import MolmoEdgeError, first_line

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_PROGRAM = "from molmo_edge.sdk.peak_memory import main; main()"
_QUESTION = "Describe this image."


class MeasurementError(MolmoEdgeError):
    """A peak that could not be measured."""


@dataclass(frozen=True)
class Peaks:
    """Resident bytes, mapped pages of files included."""

    loading: int  # peak
    loaded: int
    encoding: int  # peak
    answering: int  # peak, up to the first token

    @property
    def peak(self) -> int:
        """The largest of the phases."""
        return max(self.loading, self.encoding, self.answering)


def measure_peaks(
    model: Path,
    width: int,
    height: int,
    *,
    max_crops: int,
    answer: int,
    precision: str = "auto",
    llama: str | None = None,
    image_tokens: float | None = None,
) -> Peaks:
    """Open `model` in a new process and ask it about an image of `width` x `height` pixels, up to the first token.

    `answer`: max_new_tokens, for which the process reserves memory. `llama`: see LlamaOptions.parse. `image_tokens`:
    see Molmo. Raises MeasurementError.
    """
    if not _STATUS.exists():
        raise MeasurementError("peaks are measured on Linux only: other systems do not report them by phase")
    given = {"model": str(model), "size": [width, height], "max_crops": max_crops, "answer": answer}
    given["image_tokens"] = image_tokens
    command = [sys.executable, "-c", _PROGRAM, json.dumps({**given, "precision": precision, "llama": llama})]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode < 0:
        raise MeasurementError(f"the measured process was killed by signal {-done.returncode}, probably out of memory")
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise MeasurementError(f"the model could not be measured: {lines[-1].partition('Error: ')[2] or lines[-1]}")
    try:
        return Peaks(**json.loads(done.stdout.strip().splitlines()[-1]))
    except (IndexError, ValueError, TypeError) as error:
        raise MeasurementError(f"the measured process printed no result: {first_line(error)}") from None


def main() -> None:
    """The measured process: print the Peaks of the JSON in the first argument."""
    import numpy as np

    from molmo_edge.molmo import Molmo
    from molmo_edge.runtimes import LlamaOptions

    given = json.loads(sys.argv[1])
    width, height = given["size"]
    rows, columns = np.mgrid[:height, :width]
    image = np.stack([columns * 255 // width, rows * 255 // height, (columns // 16 + rows // 16) % 2 * 200], -1)
    image = image.astype(np.uint8)
    del rows, columns
    options = None if given["llama"] is None else LlamaOptions.parse(given["llama"])
    settings = {name: given[name] for name in ("precision", "max_crops", "image_tokens")}
    molmo = Molmo(given["model"], engine_options=options, **settings)
    runtime = molmo.engine.runtime
    runtime.new_cache(1)  # waits until the decoder is loaded
    loaded, loading = _take("VmRSS"), _take("VmHWM")
    scene = molmo.engine.scene(image)
    encoding = _take("VmHWM")
    next(iter(molmo.stream(scene, _QUESTION, max_new_tokens=given["answer"])), None)
    answering = _take("VmHWM")
    print(json.dumps(asdict(Peaks(loading, loaded, encoding, answering))))


def _take(field: str) -> int:
    """Read a field of /proc/self/status in bytes; after a peak, start a new one."""
    lines = _STATUS.read_text(encoding="ascii").splitlines()
    value = next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
    if field == "VmHWM":
        _RESET.write_text("5", encoding="ascii")
    return value
