"""The loss of a quantised decoder with and without a calibration: divergence from fp32 on held-out photos.

    python benchmarks/calibration.py --photos PHOTOS                        # the embedded nano
    python benchmarks/calibration.py --photos PHOTOS --engine gguf          # the same on llama.cpp
    python benchmarks/calibration.py --photos PHOTOS --checkpoint DIR

PHOTOS is a directory in the format of `molmo_edge.data.annotated_photos`. The calibration uses prompts with annotated
answers from its `train` split. Questions are asked about photos of its `val` split, and the candidates' distributions
are compared with fp32's at each token of fp32's greedy answer. Vision, connector and embeddings are always fp32.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from molmo_edge import Molmo
from molmo_edge.checkpoints.bundle import default_bundle, load_tokenizer
from molmo_edge.checkpoints.manifest import TOKENIZER
from molmo_edge.data.annotated_photos import load_photos
from molmo_edge.export import export_bundle, load_bundle_weights
from molmo_edge.frontend.points import format_points
from molmo_edge.frontend.prompts import point_question, text_ids
from molmo_edge.modeling.weights import save_checkpoint
from molmo_edge.quantize.calibration_prompts import MAX_PROMPTS, PROMPTS
from molmo_edge.runtimes import open_runtime

ONNX: dict[str, dict[str, Any]] = {
    f"{name}{', zero points' if asymmetric else ''}, blocks of {block}{', calibrated' if calibrated else ''}": {
        "precision": {"decoder": name}, "block": block, "asymmetric": asymmetric, "calibrated": calibrated
    }
    for name, asymmetric in (("q4", False), ("q4", True), ("mixed", False))
    for block in (32, 64, 128)
    for calibrated in (False, True)
}  # fmt: skip
GGUF: dict[str, dict[str, Any]] = {
    f"{name}{', importance matrix' if calibrated else ''}": {
        "precision": {"decoder": name}, "engine": "gguf", "calibrated": calibrated
    }
    for name, both in (
        ("f32", False), ("f16", False), ("q8_0", False), ("q6_k", True), ("q5_k_m", True), ("q4_k_m", True),
        ("iq4_xs", True), ("q4_0", True), ("q3_k_m", True),
    )
    for calibrated in ((False, True) if both else (False,))
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, help="checkpoint in hub layout; default: the embedded nano")
    parser.add_argument("--engine", choices=("onnx", "gguf"), default="onnx")
    parser.add_argument("--limit", type=int, default=40, help="number of photos to ask about")
    parser.add_argument("--tokens", type=int, default=24, help="maximum length of an answer")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        checkpoint = args.checkpoint or _unpacked_nano(folder / "nano")
        write_prompts(args.photos, folder / "prompts")
        export_bundle(checkpoint, folder / "fp32", measure=False)
        asked = _ask(folder / "fp32", args.photos, args.limit, args.tokens)
        exact = _distributions(folder / "fp32", asked)
        rows = []
        for n, (name, options) in enumerate({"onnx": ONNX, "gguf": GGUF}[args.engine].items()):
            calibrate = folder / "prompts" if options["calibrated"] else None
            export_options = {key: value for key, value in options.items() if key != "calibrated"}
            out = folder / str(n)
            manifest = export_bundle(checkpoint, out, calibrate=calibrate, measure=False, **export_options)
            found = _distributions(out, asked)
            kl = np.concatenate([(np.exp(p) * (p - q)).sum(-1) for p, q in zip(exact, found, strict=True)])
            same = np.concatenate([p.argmax(-1) == q.argmax(-1) for p, q in zip(exact, found, strict=True)])
            answers = np.mean([(p.argmax(-1) == q.argmax(-1)).all() for p, q in zip(exact, found, strict=True)])
            parts = [c for part, c in manifest["components"].items() if part in ("decoder", "decoder_data")]
            size = sum(part["bytes"] for part in parts) / 1e6
            row = {"mean_kl": kl.mean(), "same_top": same.mean(), "n": kl.size, "same_answers": answers, "mb": size}
            rows.append({"decoder": name, **row})
            print(
                f"{name:40} mean KL {kl.mean():.2g}, same top token {same.mean():.1%} of {kl.size}, "
                f"same answer {answers:.1%} of {len(exact)}, {size:.1f} MB",
                flush=True,
            )
        print(json.dumps(rows))


def _unpacked_nano(out: Path) -> Path:
    save_checkpoint(load_bundle_weights(default_bundle()), default_bundle() / TOKENIZER, out)
    return out


def write_prompts(photos: Path, folder: Path) -> None:
    """Write one pointing question with its annotated answer for each of some training photos."""
    folder.mkdir()
    lines = []
    for photo in load_photos(photos, "train"):
        objects = [o for o in photo.annotation.get("objects", ()) if not o.get("crowd") and 1 <= len(o["points"]) <= 12]
        if objects:
            label, points = objects[0]["label"], objects[0]["points"]
            answer = format_points([tuple(point) for point in points], label)
            lines.append({"image": str(photo.path.resolve()), "question": point_question(label), "answer": answer})
    lines = lines[:: max(1, len(lines) // MAX_PROMPTS)][:MAX_PROMPTS]
    (folder / PROMPTS).write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")


Asked = tuple[np.ndarray, np.ndarray]  # the prompt's rows [n, d_model], and its answer's ids


def _ask(bundle: Path, photos: Path, limit: int, tokens: int) -> list[Asked]:
    tokenizer, asked = load_tokenizer(bundle), []
    cases = [photo for photo in load_photos(photos, "val") if photo.annotation.get("objects")]
    runtime = open_runtime(bundle)
    molmo = Molmo.from_parts(runtime, tokenizer)
    for photo in cases[:: max(1, len(cases) // limit)][:limit]:
        question = point_question(photo.annotation["objects"][0]["label"])
        scene = molmo.encode(photo.path)
        answer = np.array(molmo.ask(scene, question, max_new_tokens=tokens).token_ids, np.int64)
        rows = np.concatenate([scene.embeddings, runtime.embed(text_ids(tokenizer, [question]))])
        asked.append((rows, answer))
    runtime.close()
    return asked


def _distributions(bundle: Path, asked: list[Asked]) -> list[np.ndarray]:
    """Log probabilities at each token of the answers, float64 [tokens + 1, vocab_size]."""
    runtime = open_runtime(bundle)
    found = []
    for rows, answer in asked:
        cache = runtime.new_cache(len(rows) + len(answer))
        logits = [runtime.forward(rows, cache)]
        logits += [runtime.forward(row[None], cache) for row in runtime.embed(answer)]
        wide = np.stack(logits)[:, : runtime.config.decoder.vocab_size].astype(np.float64)
        wide -= wide.max(axis=-1, keepdims=True)
        found.append(wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True)))
    runtime.close()
    return found


if __name__ == "__main__":
    main()
