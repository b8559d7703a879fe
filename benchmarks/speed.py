"""All ratios of time, memory and size in one run: old against new, beside llama.cpp and PyTorch.

    python benchmarks/speed.py                                     # the embedded nano
    python benchmarks/speed.py MIXED --gguf Q4_K_M --pairs 2       # and full-size bundles
    python benchmarks/speed.py --before OTHER_ENVIRONMENT/bin/python

"Old" is this version with its switches off (MOLMO_EDGE_KERNELS=0, all image tokens). For rows without a switch, it is
the version in the environment of --before, if one is given. Old and new take turns, each in a process of its own, so
that the peak memory and the start are those of one model; a ratio is the median over these pairs. Models in GGUF and
checkpoints are compared with the bundle of the same decoder. Prints a table in Markdown or JSON (--json), and lists
what did not run.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from first_token import resized

from molmo_edge.checkpoints.bundle import default_bundle, is_bundle, open_bundle
from molmo_edge.checkpoints.hub_config import read_config
from molmo_edge.config import DecoderConfig
from molmo_edge.runtimes.kernels import SWITCH, installed

FOLDER = Path(__file__).parent
PARTS = ("stages", "start", "prompt", "share", "llama.cpp", "pytorch", "image-tokens", "points")
NANO = "nano"
_LARGEST_IN_FLOAT = 1e9  # bytes of a bundle whose weights fit into memory in float32, for PyTorch
Figures = dict[str, Any]


class NotRunError(Exception):
    """Why a measurement did not run."""


@dataclass(frozen=True)
class Row:
    """A measurement. `ratio`: how many times better new is than old."""

    model: str
    what: str
    old: float | None
    new: float
    ratio: float | None
    beside: Mapping[str, tuple[float, float]] = field(default_factory=dict)  # engine -> value, how often new is better


@dataclass(frozen=True)
class Model:
    """A bundle, what it is compared with, and how its processes are started."""

    name: str
    bundle: Path
    args: argparse.Namespace
    photo: Path
    gguf: Path | None
    checkpoint: Path | None

    @property
    def olds(self) -> dict[str, Callable[..., Figures]]:
        """The process that measures "old", if there is one."""
        if self.args.before:
            return {"old": partial(self.run, python=self.args.before)}
        if self.kernels_missing() is None:
            return {"old": partial(self.run, switch="0")}
        return {}

    def kernels_missing(self) -> str | None:
        """Why the compiled kernels do not run; None if they do."""
        found = installed()
        if found is None:
            return "molmo-edge-kernels is not installed"
        if found.reason is not None:
            return found.reason
        return None if self.large else "the model is small: its weights are not in a file beside the graph"

    @property
    def large(self) -> bool:
        """Whether the decoder's weights are in a file beside its graph."""
        return "decoder_data" in open_bundle(self.bundle, hashes=False).components

    def run(self, *command: str, python: str = sys.executable, switch: str | None = None) -> Figures:
        """The last line of JSON that a script prints. Raises NotRunError."""
        return self.lines(*command, python=python, switch=switch)[-1]

    def lines(self, *command: str, python: str = sys.executable, switch: str | None = None) -> list[Figures]:
        """All lines of JSON that a script of this folder prints. Raises NotRunError."""
        print(f"{self.name}: {' '.join(Path(word).name for word in command)}", file=sys.stderr, flush=True)
        given = list(command) if command[0] == "-m" else [str(FOLDER / command[0]), *command[1:]]
        environment = {**os.environ, **({} if switch is None else {SWITCH: switch})}
        seconds = min(self.args.timeout, self.args.end - time.monotonic())
        if seconds <= 0:
            raise NotRunError("the time was over (--minutes)")
        options: dict[str, Any] = {"env": environment, "timeout": seconds}
        try:
            done = subprocess.run([python, *given], capture_output=True, text=True, check=False, **options)
        except subprocess.TimeoutExpired:
            raise NotRunError(f"{command[0]} took more than {seconds:.3g} s") from None
        except OSError as error:
            raise NotRunError(f"{python}: {error.strerror}") from None
        if done.returncode:
            said = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
            raise NotRunError(f"{command[0]}: {said[-1]}")
        found = [json.loads(line) for line in done.stdout.splitlines() if line[:1] in ("{", "[")]
        if not found:
            raise NotRunError(f"{command[0]} printed no figures")
        return found


def take_turns(runs: Mapping[str, Callable[[], Figures]], times: int) -> dict[str, list[Figures]]:
    """The figures of each of `runs`, which run one after the other, `times` times."""
    found: dict[str, list[Figures]] = {name: [] for name in runs}
    for _ in range(times):
        for name, run in runs.items():
            found[name].append(run())
    return found


def pairs(
    model: Model, what: str, found: Mapping[str, list[Figures]], get: Callable[[Figures], float], *, more: bool = False
) -> Row:
    """A row of figures "new" and, if there are any, "old". `more`: larger is better."""
    new = [get(figures) for figures in found["new"]]
    old = [get(figures) for figures in found.get("old", [])]
    ratios = [y / x if more else x / y for x, y in zip(old, new, strict=False)]
    return Row(
        model.name,
        what,
        statistics.median(old) if old else None,
        statistics.median(new),
        statistics.median(ratios) if ratios else None,
    )


def start(model: Model) -> list[Row]:
    """From `import molmo_edge` to the first token in a new process, with the files in memory after the stages."""
    options = ("--model", "" if model.name == NANO else str(model.bundle), "--threads", str(model.args.threads))
    command = ("first_token.py", *options, "--photo", str(model.photo), "--runs", "0")
    runs = {name: partial(run, *command) for name, run in (model.olds | {"new": model.run}).items()}
    found = take_turns(runs, model.args.pairs)
    return [pairs(model, "import to first token, s", found, lambda f: f["runs"][0]["first_token"])]


def stages(model: Model) -> list[Row]:
    """The second answer of a process about the photo."""
    command = ("full_size.py", NANO if model.name == NANO else str(model.bundle), *_asking(model))
    runs = {name: partial(run, *command) for name, run in (model.olds | {"new": model.run}).items()}
    found = take_turns(runs, model.args.pairs)
    return [
        pairs(model, "vision, s per crop", found, lambda f: f["vision_s"] / f["crops"]),
        pairs(model, "prompt of a photo, tokens/s", found, _prompt_speed, more=True),
        pairs(model, "first token, s", found, _first_token),
        pairs(model, "a token, ms", found, lambda f: 1e3 / f["decode_tokens_per_s"]),
        pairs(model, "peak memory, GB", found, lambda f: f["peak_gb"]),
        pairs(model, "size, MB", found, lambda f: f.get("size_mb", 0.0)),
    ]


def _asking(model: Model) -> tuple[str, ...]:
    return "--image", str(model.photo), "--threads", str(model.args.threads)


def _first_token(figures: Figures) -> float:
    return float(figures["preprocess_s"] + figures["vision_s"] + figures["prefill_s"])


def _prompt_speed(figures: Figures) -> float:
    return float(figures["positions"] / figures["prefill_s"])


def prompt(model: Model) -> list[Row]:
    """A decoder with and without the compiled kernels, which take turns in one process."""
    if (reason := model.kernels_missing()) is not None:
        raise NotRunError(reason)
    options = ("--positions", str(model.args.positions), "--threads", str(model.args.threads))
    found = model.run("kernels.py", "bundle", str(model.bundle), *options, "--repeat", str(model.args.pairs))
    old, new = (model.args.positions / found["prompt"][name] for name in ("onnxruntime_s", "kernels_s"))
    before, after = (1e3 * found["token"][name] for name in ("onnxruntime_s", "kernels_s"))
    title = f"prompt of {model.args.positions}, tokens/s: compiled kernels"
    return [
        Row(model.name, title, old, new, new / old),
        Row(model.name, "a token, ms: compiled kernels", before, after, before / after),
    ]


def share(model: Model) -> list[Row]:
    """The time in which the memory delivers what a token reads, as a share of the time that it takes."""
    if not model.large:
        raise NotRunError("the model is small: its weights fit into the processor's caches")
    found = model.run("profile_bundle.py", str(model.bundle), "--tokens-only", "--threads", str(model.args.threads))
    title = "share of the memory's speed of a token, %"
    return [Row(model.name, title, None, 100 * found["share_of_bandwidth"], None)]


def llama(model: Model) -> list[Row]:
    """The prompt and a token of llama.cpp, with our options and with its own, in the same process."""
    if model.gguf is None:
        raise NotRunError("no GGUF bundle of this model was given (--gguf)")
    options = ["--onnx", str(model.bundle), "--gguf", str(model.gguf), "--positions", str(model.args.positions)]
    options += ["--threads", str(model.args.threads), "--runs", str(model.args.pairs)]
    found = {line["engine"]: line for line in model.lines("engines.py", *options)}
    own = found.pop("onnxruntime")
    rows = []
    for name, title in (("prefill tokens/s", f"prompt of {model.args.positions}"), ("decode tokens/s", "decoding")):
        beside = {engine: (line[name], own[name] / line[name]) for engine, line in found.items()}
        rows.append(Row(model.name, f"{title}, tokens/s: llama.cpp", None, own[name], None, beside))
    return rows


def pytorch(model: Model) -> list[Row]:
    """The first token and a token on PyTorch: a small bundle's own weights in float32, or the checkpoint."""
    if importlib.util.find_spec("torch") is None:
        raise NotRunError("PyTorch is not installed")
    titles = ("first token, s: PyTorch", "a token, ms: PyTorch")
    if model.checkpoint is not None:
        own = model.run("full_size.py", str(model.bundle), *_asking(model))
        theirs = model.run("full_size.py", str(model.checkpoint), *_asking(model))
        values = [(_first_token(f), 1e3 / f["decode_tokens_per_s"]) for f in (own, theirs)]
    elif sum(part.bytes for part in open_bundle(model.bundle, hashes=False).components.values()) < _LARGEST_IN_FLOAT:
        command = ("-m", "molmo_edge", "bench", str(model.photo), "--model", str(model.bundle), "--json", "--quiet")
        timings = model.run(*command, "--threads", str(model.args.threads), "--yes")["timings"]
        if len(timings) < 2:
            raise NotRunError("the weights cannot be read from the bundle")
        values = [(1e-3 * t["first_token"], t["decode"]) for t in timings]
    else:
        raise NotRunError("no checkpoint of this model was given (--checkpoint)")
    return [
        Row(model.name, title, None, own_value, None, {"PyTorch": (other, other / own_value)})
        for title, own_value, other in zip(titles, *values, strict=True)
    ]


def image_tokens(model: Model) -> list[Row]:
    """The time of the prompt with all of an image's tokens and with half of them."""
    command = ("full_size.py", NANO if model.name == NANO else str(model.bundle), *_asking(model))
    runs = {"old": partial(model.run, *command), "new": partial(model.run, *command, "--image-tokens", "0.5")}
    found = take_turns(runs, model.args.pairs)
    return [
        pairs(model, "prompt, s: image_tokens=0.5", found, lambda f: f["prefill_s"]),
        pairs(model, "first token, s: image_tokens=0.5", found, _first_token),
    ]


def points(model: Model) -> list[Row]:
    """F1 of points with all of an image's tokens and with half of them, of nano: it takes many answers."""
    if model.name != NANO:
        raise NotRunError("only nano's answers are scored")
    options = ["--images", str(model.args.images), "--shares", "0.5", "--scores", "distinct"]
    if model.args.photos:
        options += ["--photos", str(model.args.photos)]
    every, half, *_ = model.run("image_tokens.py", *options)
    old, new = (100 * line["f1"]["value"] for line in (every, half))
    low, high = (100 * half["difference"][end] for end in ("low", "high"))
    title = f"F1 of points, %, n={every['f1']['n']}, change [{low:.1f}, {high:.1f}]: image_tokens=0.5"
    return [Row(model.name, title, old, new, None)]


def measure(model: Model, parts: Sequence[str]) -> tuple[list[Row], list[str]]:
    """The rows of a model, and what did not run and why."""
    rows: list[Row] = []
    missing = []

    of_part: dict[str, Callable[[], list[Row]]] = {
        "start": lambda: start(model),
        "stages": lambda: stages(model),
        "prompt": lambda: prompt(model),
        "share": lambda: share(model),
        "llama.cpp": lambda: llama(model),
        "pytorch": lambda: pytorch(model),
        "image-tokens": lambda: image_tokens(model),
        "points": lambda: points(model),
    }
    for part in parts:
        try:
            rows += of_part[part]()
        except NotRunError as error:
            missing.append(f"{model.name}, {part}: {error}")
    return rows, missing


def machine(threads: int) -> dict[str, str]:
    """The processor and the versions."""
    name, cpuinfo = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
        name = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), name)
    kernels = installed()
    packages = ("molmo-edge", "onnxruntime", "torch", "llama-cpp-python")
    found = {package: _version(package) for package in packages}
    return {
        "processor": f"{name}, {os.cpu_count()} cores",
        "threads": str(threads),
        "kernels": "not installed" if kernels is None else kernels.kernel,
        **{package: version for package, version in found.items() if version},
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def table(rows: Sequence[Row]) -> list[str]:
    """The lines of a table in Markdown."""
    engines = list(dict.fromkeys(engine for row in rows for engine in row.beside))
    heads = ["model", "measurement", "old", "new", "times better", *(f"{e} (new is times better)" for e in engines)]
    lines = [f"| {' | '.join(heads)} |", "|---" * 2 + "|--:" * (len(heads) - 2) + "|"]
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        cells = [row.model, row.what, "" if row.old is None else f"{row.old:.4g}", f"{row.new:.4g}", ratio]
        cells += [f"{row.beside[e][0]:.4g} ({row.beside[e][1]:.2f})" if e in row.beside else "" for e in engines]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _decoder(directory: Path) -> DecoderConfig:
    return (open_bundle(directory, hashes=False).config if is_bundle(directory) else read_config(directory)).decoder


def _like(bundle: Path, others: Sequence[Path]) -> Path | None:
    """The one of `others` that is the same model as `bundle`."""
    return next((other for other in others if _decoder(other) == _decoder(bundle)), None)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", type=Path, nargs="*", help="bundles to measure beside nano")
    parser.add_argument("--gguf", type=Path, action="append", default=[], help="a GGUF bundle of one of the models")
    parser.add_argument(
        "--checkpoint", type=Path, action="append", default=[], help="for PyTorch, of one of the models"
    )
    parser.add_argument("--before", help="Python of an environment with an earlier version of molmo-edge")
    parser.add_argument("--photo", type=Path, default=FOLDER.parent / "examples" / "coffee.jpg")
    parser.add_argument("--photos", type=Path, help="annotated photos for points; default: drawn scenes")
    parser.add_argument("--images", type=int, default=20, help="number of them")
    parser.add_argument("--positions", type=int, default=740, help="length of the prompt; a photo of 640x480 takes 740")
    parser.add_argument("--pairs", type=int, default=3, help="how often old and new take turns")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=1800, help="seconds for each process")
    parser.add_argument("--minutes", type=float, default=600, help="for everything; what is left then does not run")
    parser.add_argument("--parts", default=",".join(PARTS), help="what to measure")
    parser.add_argument("--without-nano", action="store_true")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(arguments)
    args.end = time.monotonic() + 60 * args.minutes
    parts = args.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"unknown parts: {', '.join(unknown)} (known: {', '.join(PARTS)})")
    if args.pairs < 1:
        parser.error("--pairs must be at least 1")
    for bundle in (*args.bundles, *args.gguf):
        if not is_bundle(bundle):
            parser.error(f"{bundle} is not a bundle")
    named = {} if args.without_nano else {NANO: default_bundle()}
    named |= {bundle.resolve().name: bundle for bundle in args.bundles}
    rows: list[Row] = []
    missing: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        photo = resized(args.photo, Path(scratch))
        for name, bundle in named.items():
            gguf, checkpoint = _like(bundle, args.gguf), _like(bundle, args.checkpoint)
            found, not_run = measure(Model(name, bundle, args, photo, gguf, checkpoint), parts)
            rows += found
            missing += not_run
    about = machine(args.threads)
    if args.json:
        print(json.dumps({"machine": about, "rows": [asdict(row) for row in rows], "not_run": missing}))
        return
    print(", ".join(f"{name} {value}" for name, value in about.items()), *table(rows), sep="\n")
    if missing:
        print("\nNot run:\n", *(f"- {line}" for line in missing), sep="\n")


if __name__ == "__main__":
    main()
