"""The Python half of benchmarks/arm64.sh: export bundles, ask them on a machine, compare the answers of two machines.

Expected differences are measured too. Layers that round their input to eight bits turn a difference in the last bit
into a step, so every bundle except fp32 answers a photo whose pixels differ by a millionth as differently as another
processor does. The host therefore also asks such photos ("nudged"), and the other machine is compared with them.

`export` needs molmo-edge[export,torch]; `ask` runs on either machine with an app's installation; `compare` reads the
output of `ask`. All files are in one folder, WORK: bundles/, images/, answers/MACHINE/.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

ARCHITECTURES = ("molmoe", "qwen", "olmo")
PRECISIONS = ("fp32", "int8", "q4", "mixed")
NEW_TOKENS = 24
# (image, max_crops, questions): few crops, because an emulated processor is tens of times slower.
GOLDEN = (
    ("astronaut.png", 1, ("Point to the helmet.", "Describe this image.")),
    ("coffee.png", 2, ("How many cups are there?",)),
    ("text.png", 0, ("What does the text say?", "Point to the first word.")),
)
NANO = (
    ("coffee.jpg", 0, ("How many cups are there?", "Point to the spoon.", "Describe this image.")),
    ("astronaut.png", 1, ("Point to the helmet.", "How many people are there?")),
)
NUDGE = 1e-6  # relative noise on the pixels, about the precision of float32
# The gap in logits that rounding explains, as in molmo_edge/selfcheck.py.
NEAR = 0.5
# Limit on the median difference of logits, relative to nudged pixels; below the floor it is float32's rounding.
TYPICAL, FLOOR = 1.5, 1e-4
# Bits of AT_HWCAP and AT_HWCAP2 (Linux, arch/arm64/include/uapi/asm/hwcap.h) that select kernels.
HWCAP = {"asimd": 1, "fphp": 9, "asimddp": 20, "sve": 22}
HWCAP2 = {"i8mm": 13, "bf16": 14, "sme": 23}


class Recorder:
    """A wrapper around a runtime that keeps the logits of every call.

    `nudge`: the seed of noise on the pixels; None: no noise.
    """

    def __init__(self, runtime: Any, nudge: int | None) -> None:
        self._runtime = runtime
        self._nudge = nudge
        self.config = runtime.config
        self.embed, self.new_cache, self.close = runtime.embed, runtime.new_cache, runtime.close
        self.logits: list[np.ndarray] = []  # each [embedding_size]

    def encode_image(
        self, crops: np.ndarray, masks: np.ndarray, overview: Any = None, pooling: np.ndarray | None = None
    ) -> np.ndarray:
        if self._nudge is not None:
            noise = np.random.default_rng(self._nudge).uniform(-NUDGE, NUDGE, crops.shape)
            crops = (crops * (1 + noise)).astype(np.float32)
        return self._runtime.encode_image(crops, masks, overview, pooling)

    def forward(self, embeddings: np.ndarray, cache: Any) -> np.ndarray:
        self.logits.append(self._runtime.forward(embeddings, cache))
        return self.logits[-1]


def export(golden: Path, work: Path) -> None:
    from molmo_edge.export import CheckPhoto, export_bundle

    check = CheckPhoto(golden / "coffee.png", "How many cups are there?", max_new_tokens=8)
    for architecture in ARCHITECTURES:
        for precision in PRECISIONS:
            name = f"{architecture}-{precision}"
            # One check, for `molmo-edge verify`: it runs all crops, which takes long.
            asked = check if name == "molmoe-mixed" else None
            export_bundle(golden / architecture, work / "bundles" / name, precision, check=asked)


def ask(work: Path, machine: str, follow: str | None, threads: int, nudge: int | None) -> None:
    """Ask all questions to every bundle and the embedded nano.

    `follow`: the machine whose ids precede the recorded logits. If an answer differs from that machine's, its ids are
    run a second time: logits are comparable only after the same ids.
    """
    import onnxruntime

    out = work / "answers" / machine
    out.mkdir(parents=True)
    followed = json.loads((work / "answers" / follow / "answers.json").read_text())["answers"] if follow else {}
    answers_by_bundle: dict[str, list[dict[str, Any]]] = {}
    began = time.perf_counter()
    for name in (*(f"{a}-{p}" for a in ARCHITECTURES for p in PRECISIONS), "nano"):
        started = time.perf_counter()
        answers_by_bundle[name], logits = _asked(work, name, followed.get(name), threads, nudge)
        np.savez(out / f"{name}.npz", *logits)
        print(f"{name:14} {time.perf_counter() - started:7.1f} s", file=sys.stderr, flush=True)
    about = {
        "machine": platform.machine(),
        "python": platform.python_version(),
        "libc": " ".join(platform.libc_ver()),
        "onnxruntime": onnxruntime.__version__,
        "numpy": np.__version__,
        "features": _features(),
        "seconds": round(time.perf_counter() - began, 1),
    }
    (out / "answers.json").write_text(json.dumps({"about": about, "answers": answers_by_bundle}, indent=1) + "\n")
    print(json.dumps(about))


def _asked(
    work: Path, name: str, followed: list[dict[str, Any]] | None, threads: int, nudge: int | None
) -> tuple[list[dict[str, Any]], list[np.ndarray]]:
    from molmo_edge.checkpoints.bundle import default_bundle, load_tokenizer
    from molmo_edge.molmo import Molmo
    from molmo_edge.runtimes import open_runtime
    from molmo_edge.selfcheck import logit_gaps

    directory = default_bundle() if name == "nano" else work / "bundles" / name
    runtime = Recorder(open_runtime(directory, threads=threads), nudge)
    answers: list[dict[str, Any]] = []
    kept = []
    for image, max_crops, questions in NANO if name == "nano" else GOLDEN:
        molmo = Molmo.from_parts(runtime, load_tokenizer(directory), max_crops=max_crops)
        scene = molmo.encode(work / "images" / image)
        for question in questions:
            runtime.logits.clear()
            answer = molmo.ask(scene, question, max_new_tokens=NEW_TOKENS)
            entry: dict[str, Any] = {
                "image": image,
                "crops": scene.crops,
                "question": question,
                "token_ids": [int(i) for i in answer.token_ids],
                "complete": answer.complete,
                "text": answer.text,
            }
            if followed is not None and _ids_and_end(followed[len(answers)]) != _ids_and_end(entry):
                other = followed[len(answers)]
                runtime.logits.clear()
                entry["gaps"] = logit_gaps(
                    molmo.engine, scene, question, other["token_ids"], complete=other["complete"]
                )
            kept.append(np.stack(runtime.logits)[:, : molmo.config.decoder.vocab_size])  # [n, vocab_size]
            answers.append(entry)
    runtime.close()
    return answers, kept


def _ids_and_end(entry: dict[str, Any]) -> tuple[list[int], bool]:
    return entry["token_ids"], entry["complete"]


def _features() -> list[str]:
    """Return the processor features by which engines select kernels."""
    if platform.machine() != "aarch64":
        return []
    getauxval = ctypes.CDLL(None).getauxval
    getauxval.restype, getauxval.argtypes = ctypes.c_ulong, [ctypes.c_ulong]
    return [
        name for kind, bits in ((16, HWCAP), (26, HWCAP2)) for name, bit in bits.items() if getauxval(kind) >> bit & 1
    ]


class Answers:
    """The output of `ask` on one machine."""

    def __init__(self, folder: Path) -> None:
        read = json.loads((folder / "answers.json").read_text())
        self.name, self.about, self.bundles = folder.name, read["about"], read["answers"]
        self._folder = folder

    def logits(self, bundle: str) -> list[np.ndarray]:
        """Return [n, vocab_size] for each question, after the ids of the followed machine."""
        with np.load(self._folder / f"{bundle}.npz") as arrays:
            return [arrays[f"arr_{i}"] for i in range(len(self.bundles[bundle]))]

    def gaps(self, bundle: str) -> list[float]:
        """Return the gaps of the followed ids to the likeliest, at all positions of all answers."""
        pairs = zip(self.bundles[bundle], self.logits(bundle), strict=True)
        return [gap for entry, x in pairs for gap in entry.get("gaps", [0.0] * len(x))]

    def equal(self, bundle: str) -> int:
        return sum("gaps" not in entry for entry in self.bundles[bundle])


def compare(work: Path, here: str, there: str) -> bool:
    """Print how the answers of `there` differ from those of `here`; return whether rounding explains all of it."""
    folders = work / "answers"
    mine, theirs = Answers(folders / here), Answers(folders / there)
    nudged = [Answers(folder) for folder in sorted(folders.glob("nudged-*"))]
    for side in (mine, theirs):
        about = (f"{k} {'+'.join(v) if isinstance(v, list) else v}" for k, v in side.about.items() if v)
        print(f"{side.name}: {', '.join(about)}")
    if mine.about["onnxruntime"] != theirs.about["onnxruntime"]:
        raise SystemExit("the two sides ran different versions of onnxruntime")
    print(f"\nIn brackets: {len(nudged)} runs of {here} with pixels changed by {NUDGE:g}. Logits: after equal ids.")
    columns = ("answers equal", "ids equal", "logits, median", "logits, largest", "largest gap")
    print(f"{'':13}" + "".join(f"{column:>19}" for column in columns))
    wrong, notes = [], []
    for bundle in mine.bundles:
        exact = mine.logits(bundle)
        drift = _drift(exact, theirs.logits(bundle))  # [positions]
        usual = np.stack([_drift(exact, other.logits(bundle)) for other in nudged])  # [nudged, positions]
        gaps, others = np.array(theirs.gaps(bundle)), np.array([other.gaps(bundle) for other in nudged])
        asked = len(mine.bundles[bundle])
        cells = (
            f"{theirs.equal(bundle)}/{asked} ({sum(o.equal(bundle) for o in nudged)}/{asked * len(nudged)})",
            f"{(gaps == 0).sum()}/{gaps.size} ({(others == 0).mean():.1%})",
            f"{np.median(drift):.2g} ({np.median(usual):.2g})",
            f"{drift.max():.2g} ({usual.max():.2g})",
            f"{gaps.max():.2g} ({others.max():.2g})",
        )
        print(f"{bundle:13}" + "".join(f"{cell:>19}" for cell in cells))
        # If nudged pixels change two logits by x each, their order can change over a gap of 2 x.
        if (gaps > np.maximum(NEAR, 2 * usual.max(axis=0))).any():
            wrong.append(f"{bundle}: an id has a gap of {gaps.max():.2g} logits, more than rounding explains")
        if np.median(drift) > max(FLOOR, TYPICAL * np.median(usual)):
            wrong.append(f"{bundle}: the logits differ by more than {TYPICAL:g} times the effect of nudged pixels")
        notes += _differences(mine, theirs, bundle)
    print(*notes, *wrong, sep="\n")
    return not wrong


def _drift(exact: list[np.ndarray], other: list[np.ndarray]) -> np.ndarray:
    """Return the largest difference of any logit, at all positions of all answers."""
    return np.concatenate([np.abs(x - y).max(axis=1) for x, y in zip(exact, other, strict=True)])


def _differences(mine: Answers, theirs: Answers, bundle: str) -> list[str]:
    """Return a line for each different answer: where it diverges, and by which gap."""
    lines = []
    rows = zip(theirs.bundles[bundle], mine.logits(bundle), theirs.logits(bundle), strict=True)
    for entry, x, y in rows:
        if "gaps" in entry:
            at = int(np.flatnonzero(x.argmax(1) != y.argmax(1))[0])
            a, b = int(x[at].argmax()), int(y[at].argmax())
            lines.append(
                f"{bundle}, {entry['image']}, {entry['question']} Id {at} is {a}, there {b}: "
                f"gap {x[at, a] - x[at, b]:.2g}, there {y[at, b] - y[at, a]:.2g}"
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("export", help="export the golden checkpoints as bundles")
    one.add_argument("golden", type=Path)
    one.add_argument("work", type=Path)
    two = commands.add_parser("ask", help="ask all bundles on this machine")
    two.add_argument("work", type=Path)
    two.add_argument("machine", help="a name for this machine")
    two.add_argument("--follow", help="the machine whose ids to follow")
    two.add_argument("--threads", type=int, default=2)
    two.add_argument("--nudge", type=int, help="seed of noise on the pixels")
    three = commands.add_parser("compare", help="exit status 1: an id differs beyond rounding")
    three.add_argument("work", type=Path)
    three.add_argument("here")
    three.add_argument("there")
    args = parser.parse_args()
    if args.command == "export":
        export(args.golden, args.work)
    elif args.command == "ask":
        ask(args.work, args.machine, args.follow, args.threads, args.nudge)
    elif not compare(args.work, args.here, args.there):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
