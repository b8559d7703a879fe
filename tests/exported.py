"""Bundles of the golden checkpoints, exported once a test run, and their cases as tensors."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from once import once
from safetensors.numpy import load_file

from molmo_edge.export import export_bundle
from molmo_edge.frontend.crops import ImageProcessor, load_image
from molmo_edge.frontend.tokenizer import Tokenizer
from molmo_edge.runtimes import Runtime, open_runtime
from molmo_edge.runtimes.llama import LlamaRuntime
from molmo_edge.runtimes.llama_options import LlamaOptions
from molmo_edge.runtimes.onnx import OnnxRuntime

GOLDEN = Path(__file__).parent / "golden"
ARCHITECTURES = ("molmoe", "qwen", "olmo")
CASES = ("square", "landscape", "wide_text")
REAL_IDS = 500  # of the golden tokenizers; the reference took its argmax over these


def bundle(architecture: str, precision: str | None = "fp32", **options: Any) -> Path:
    """`options`: as of `export_bundle`; a calibration is with the golden photos."""
    return _bundle(architecture, precision, **options)


def runtime(architecture: str, precision: str | None = "fp32", **options: Any) -> OnnxRuntime:
    return _runtime(architecture, precision, **options)


@functools.cache
def _bundle(architecture: str, precision: str | None, **options: Any) -> Path:
    words = [architecture, precision, *(f"{key}-{Path(str(value)).name}" for key, value in options.items())]
    return once("-".join(map(str, words)), lambda out: export_bundle(GOLDEN / architecture, out, precision, **options))


@functools.cache
def _runtime(architecture: str, precision: str | None, **options: Any) -> OnnxRuntime:
    opened = open_runtime(bundle(architecture, precision, **options), threads=2)
    assert isinstance(opened, OnnxRuntime)
    return opened


EXACT = LlamaOptions(cache="f32", flash_attention=False)


def gguf_bundle(architecture: str, precision: str, **options: Any) -> Path:
    return _bundle(architecture, precision, engine="gguf", **options)


@functools.cache
def gguf_runtime(architecture: str, precision: str, options: LlamaOptions = EXACT) -> LlamaRuntime:
    opened = open_runtime(gguf_bundle(architecture, precision), threads=2, engine_options=options)
    assert isinstance(opened, LlamaRuntime)
    return opened


@functools.cache
def expected(architecture: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    directory = GOLDEN / architecture
    return load_file(directory / "expected.safetensors"), json.loads((directory / "expected.json").read_text())


@dataclass(frozen=True)
class Case:
    crops: np.ndarray  # float32 [n, 576, 588], by our own image processor
    masks: np.ndarray  # the reference's own from here on
    ids: np.ndarray  # int [n]
    index: np.ndarray  # int [n_crops, 144], negative where dropped


@functools.cache
def case(architecture: str, name: str) -> Case:
    tensors, cases = expected(architecture)
    engine = runtime(architecture)
    special = Tokenizer.from_file(GOLDEN / architecture / "tokenizer.json").special
    image = ImageProcessor(engine.config.image, special)(load_image(GOLDEN / cases[name]["image"]))
    return Case(
        image.crops,
        tensors[f"{name}.image_masks"],
        tensors[f"{name}.input_ids"],
        tensors[f"{name}.image_input_idx"],
    )


def prompt(engine: Runtime, c: Case) -> np.ndarray:
    """The embeddings [n, d_model] of a case, image features added."""
    embeddings = engine.embed(c.ids)
    features = engine.encode_image(c.crops, c.masks)
    embeddings[c.index[c.index >= 0]] += features[c.index >= 0]
    return embeddings


def greedy(engine: Runtime, embeddings: np.ndarray, n: int) -> list[int]:
    cache = engine.new_cache(len(embeddings) + n)
    logits, ids = engine.forward(embeddings, cache), []
    for _ in range(n):
        ids.append(int(logits[:REAL_IDS].argmax()))
        logits = engine.forward(engine.embed(np.array(ids[-1:])), cache)
    return ids


def relative(found: np.ndarray, exact: np.ndarray) -> float:
    """Largest difference over the largest value."""
    assert found.shape == exact.shape
    return float(np.abs(found - exact).max() / np.abs(exact).max())


def costs(architecture: str, engine: Runtime) -> tuple[float, float]:
    """Mean KL divergence from fp32, and the share of positions with the same top token.

    At the last 32 positions of the three golden cases, each image encoded by the same bundle.
    """
    divergences, same = [], []
    for name in CASES:
        logits = []
        for each in (runtime(architecture), engine):
            rows = prompt(each, case(architecture, name))
            cache = each.new_cache(len(rows))
            each.forward(rows[:-32], cache)
            logits.append(np.stack([each.forward(row[None], cache)[:REAL_IDS] for row in rows[-32:]]))
        exact, found = (_log_softmax(part.astype(np.float64)) for part in logits)
        divergences += (np.exp(exact) * (exact - found)).sum(-1).tolist()
        same += (exact.argmax(-1) == found.argmax(-1)).tolist()
    return float(np.mean(divergences)), float(np.mean(same))


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
