"""The error of each component against its fp32 form, on synthetic inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from molmo_edge.checkpoints.tensor_sources import TensorSource
from molmo_edge.config import MolmoConfig
from molmo_edge.export.component_graphs import build_component, fits_float32
from molmo_edge.export.graph_builder import FP32
from molmo_edge.export.options import ExportPlan
from molmo_edge.frontend.crops import Overview, cell_patches
from molmo_edge.runtimes import Runtime, open_files
from molmo_edge.runtimes.prompt_embeddings import prefill

_TEXT_TOKENS = 32  # after the image
_COMPARED_TOKENS = 8  # the last ones of them


@dataclass(frozen=True)
class ComponentError:
    """The difference between the outputs of a quantised component and of the same component in fp32."""

    largest: float  # largest absolute difference
    relative: float  # norm of the difference / norm of the fp32 output


def measure_errors(
    scratch: Path, config: MolmoConfig, tensors: TensorSource, plan: ExportPlan, files: Mapping[str, Path]
) -> dict[str, ComponentError]:
    """The errors of the quantised components in `files`; fp32 graphs to compare with are built in `scratch`."""
    scratch.mkdir()
    exact = {}
    for component, precision in plan.precision.items():
        if not fits_float32(component, config, tensors):
            continue
        exact[component] = files[component]
        if precision != "fp32" or plan.is_quantized(component):
            exact[component] = scratch / f"{component}.onnx"
            build_component(component, exact[component], config, tensors, FP32)
    errors = _compare(config, exact, {name: files[name] for name in exact})
    return {component: error for component, error in errors.items() if plan.is_quantized(component)}


def _compare(config: MolmoConfig, exact: dict[str, Path], files: dict[str, Path]) -> dict[str, ComponentError]:
    """Compare `files` with `exact`, which map the same components, with or without the decoder.

    Every component gets the exact outputs of the one before it. The image is synthetic, the text random ids; the
    decoder's logits are compared after both.

    Memory holds all weights of `files`, but only those of `exact` that are not in sidecars.
    """
    a, b = open_files(config, exact, mapped=True), open_files(config, files)
    rng = np.random.default_rng(0)
    crops, masks, overview = sample_image(config)
    ids = rng.integers(0, config.decoder.vocab_size, _TEXT_TOKENS)
    pooling = cell_patches(config.image, (1, 1)) if config.image.pools_across_crops else None
    features = a.encode_crops(crops, overview)
    image = a.connect(features, masks, pooling)
    text = a.embed(ids)
    sequence = np.concatenate([image.reshape(-1, image.shape[-1]), text])
    errors = {
        "vision_encoder": _error(features, b.encode_crops(crops, overview)),
        "connector": _error(image, b.connect(features, masks, pooling)),
        "embed_tokens": _error(text, b.embed(ids)),
    }
    if "decoder" in exact:
        errors["decoder"] = _error(_logits(a, sequence), _logits(b, sequence))
    a.close()
    b.close()
    return errors


def sample_image(config: MolmoConfig) -> tuple[np.ndarray, np.ndarray, Overview | None]:
    """Inputs of the vision tower: `sample_crops`, and an overview if there is a convolutional tower."""
    crops, masks = sample_crops(config)
    if not config.image.overview:
        return crops, masks, None
    i, rng = config.image, np.random.default_rng(1)
    patches = crops[0].reshape(i.patches, i.patches, i.patch_size, i.patch_size, 3).transpose(4, 0, 2, 1, 3)
    pixels = patches.reshape(3, i.crop_size, i.crop_size)[:, : i.crop_size // 32 * 32, : i.crop_size // 32 * 32]
    positions = rng.uniform(0, pixels.shape[-1], (len(crops), i.patches**2, 4, 2)).astype(np.float32)
    return crops, masks, Overview(pixels, positions)


def sample_crops(config: MolmoConfig) -> tuple[np.ndarray, np.ndarray]:
    """Two crops [2, patches^2, patch_size^2 * 3] of soft shapes, edges and grain, normalised; masks [2, patches^2]."""
    i, rng = config.image, np.random.default_rng(0)
    y, x = np.mgrid[0 : i.crop_size, 0 : i.crop_size] / i.crop_size
    crops = []
    for _ in range(2):
        waves = [np.sin(rng.normal(0, 12) * x + rng.normal(0, 12) * y + rng.normal()) for _ in range(4)]
        shade = sum(waves)[..., None] * rng.normal(size=3) + 2.0 * ((x > 0.4) & (y < 0.6))[..., None]
        pixels = np.clip(0.5 + 0.15 * shade + rng.normal(0, 0.02, (i.crop_size, i.crop_size, 3)), 0, 1)
        pixels = (pixels - i.mean) / i.std
        patches = pixels.reshape(i.patches, i.patch_size, i.patches, i.patch_size, 3).transpose(0, 2, 1, 3, 4)
        crops.append(patches.reshape(i.patches**2, -1))
    return np.stack(crops).astype(np.float32), np.ones((2, i.patches**2), np.float32)


def _logits(runtime: Runtime, sequence: np.ndarray) -> np.ndarray:
    cache = runtime.new_cache(len(sequence))
    prompt = sequence[:-_COMPARED_TOKENS]
    prefill(runtime, prompt, np.arange(len(prompt)) < len(sequence) - _TEXT_TOKENS, cache)
    return np.stack([runtime.forward(row[None], cache) for row in sequence[-_COMPARED_TOKENS:]])


def _error(exact: np.ndarray, found: np.ndarray) -> ComponentError:
    difference = found - exact
    relative = float(np.linalg.norm(difference) / np.linalg.norm(exact))
    return ComponentError(float(np.abs(difference).max()), relative)
