"""The loss of every engine and precision on nano: the table of docs/quantization.md.

    python benchmarks/quantization.py --photos PHOTOS --out DIR [--limit 45] [--only onnx-int8,...]

PHOTOS is a directory in the format of `molmo_edge.data.annotated_photos`. Its `train` split is the calibration;
questions are asked about its `val` split and the scenes of nano-val. The reference is nano in float32. Nano is stored
in eight bits, and rounding those values again would have no error, so each weight of the reference is drawn from the
values that round to the stored one (`dither` of molmo_edge.export.bundle_weights.BundleTensors).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from calibration import write_prompts

from molmo_edge.checkpoints.bundle import default_bundle
from molmo_edge.checkpoints.manifest import TOKENIZER
from molmo_edge.evaluation.loss import ModelSpec, measure_loss
from molmo_edge.evaluation.report import write_data, write_report
from molmo_edge.evaluation.suites import load_suite
from molmo_edge.export import export_bundle, load_bundle_weights
from molmo_edge.modeling.weights import save_checkpoint

SEED = 6
_ROWS = ("vision_encoder", "connector", "embed_tokens", "attention", "experts", "head")
BUNDLES: dict[str, dict[str, Any]] = {
    "onnx-q8": {"precision": "q8"},
    "onnx-int8": {"precision": "int8"},
    "onnx-int8-calibrated": {"precision": "int8", "calibrate": True},
    "onnx-int8-rotated": {"precision": "int8", "rotate": True},
    "onnx-q4-rotated-calibrated": {"precision": "q4", "rotate": True, "calibrate": True},
    "onnx-q4-trained": {"precision": "q4", "calibrate": True, "train_scales": 8},
    # int8 for the connector and the head, too, which "int8" stores as q8.
    "onnx-int8-rows": {"precision": dict.fromkeys(_ROWS, "int8")},
    "onnx-mixed": {"precision": "mixed"},
    "onnx-mixed-calibrated": {"precision": "mixed", "calibrate": True},
    "onnx-q4": {"precision": "q4"},
    "onnx-q4-calibrated": {"precision": "q4", "calibrate": True},
    "gguf-f16": {"precision": "f16", "engine": "gguf"},
    "gguf-q8_0": {"precision": "q8_0", "engine": "gguf"},
    "gguf-q6_k": {"precision": "q6_k", "engine": "gguf"},
    "gguf-q4_k_m": {"precision": "q4_k_m", "engine": "gguf"},
    "gguf-q4_0-calibrated": {"precision": "q4_0", "engine": "gguf", "calibrate": True},
    "gguf-iq4_xs-calibrated": {"precision": "iq4_xs", "engine": "gguf", "calibrate": True},
}
CHECKPOINTS = {"pytorch-bf16": "bf16", "pytorch-int8": "int8", "pytorch-nf4": "nf4"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="directory for the models and the report; may exist")
    parser.add_argument("--limit", type=int, default=45, help="number of images")
    parser.add_argument("--only", help="comma-separated names; default: all")
    args = parser.parse_args()
    names = args.only.split(",") if args.only else [*BUNDLES, *CHECKPOINTS]
    args.out.mkdir(parents=True, exist_ok=True)
    checkpoint, reference = args.out / "checkpoint", args.out / "reference"
    if not checkpoint.exists():
        save_checkpoint(load_bundle_weights(default_bundle(), dither=SEED), default_bundle() / TOKENIZER, checkpoint)
    if not reference.exists():
        export_bundle(checkpoint, reference, measure=False)
    prompts = args.out / "prompts"
    if not prompts.exists():
        write_prompts(args.photos, prompts)
    models = [_model(name, args.out, checkpoint, prompts) for name in names]
    questions = load_suite(f"nano-val:{args.photos}", limit=args.limit)
    loss = measure_loss(
        ModelSpec(reference),
        models,
        questions,
        suites=["nano-val:PHOTOS"],
        on_model=_say,
        on_measured=lambda so_far: write_data(so_far, args.out / "report"),
    )
    write_report(loss, args.out / "report")
    for measured in loss.candidates:
        figures = {name: f"{f.value:.3g} [{f.low:.2g}, {f.high:.2g}]" for name, f in measured.metrics.items()}
        changes = {
            f"{group} {name}": [round(100 * s.reference.value, 1), round(100 * s.difference.value, 2),
                                round(100 * s.difference.low, 2), round(100 * s.difference.high, 2)]
            for group, by_name in measured.scores.items() if group in ("point/all", "count/all", "absent/all")
            for name, s in by_name.items() if name in ("f1", "exact", "refused", "format")
        }  # fmt: skip
        print(measured.info.name, round(measured.info.bytes / 1e6, 1), json.dumps(figures), json.dumps(changes))


def _model(name: str, out: Path, checkpoint: Path, prompts: Path) -> ModelSpec:
    if name in CHECKPOINTS:
        linked = out / name  # gives it its own name in the report
        if not linked.exists():
            linked.symlink_to(checkpoint.resolve(), target_is_directory=True)
        return ModelSpec(linked, precision=CHECKPOINTS[name])
    if not (out / name).exists():
        options = dict(BUNDLES[name])
        options["calibrate"] = prompts if options.get("calibrate") else None
        export_bundle(checkpoint, out / name, measure=False, **options)
    return ModelSpec(out / name)


def _say(name: str, questions: int) -> Callable[[], None]:
    print(f"{name}: {questions} questions", flush=True)
    return lambda: None


if __name__ == "__main__":
    main()
