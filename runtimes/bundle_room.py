"""Whether a bundle fits into this machine's memory, and whether its mapped weights will stay there."""

from __future__ import annotations

from molmo_edge.checkpoints.bundle import Bundle
from molmo_edge.config import MolmoConfig
from molmo_edge.errors import Unavailable
from molmo_edge.runtimes.kernels import ONNXRUNTIME, map_weights
from molmo_edge.runtimes.memory_plan import Weights, bundle_weights, predict
from molmo_edge.runtimes.onnx_sessions import onnxruntime_version
from molmo_edge.runtimes.providers import Placement
from molmo_edge.system.memory import available_memory, check_room


def check_bundle_room(bundle: Bundle, placement: Placement) -> Weights | None:
    """Return the bundle's weights, None on a GPU. What is read from a mapped file does not count.

    Raises RoomError if the others do not fit into memory.
    """
    if placement.device != "cpu":
        return None
    weights = weights_here(bundle)
    parts = ", ".join(f"{name} {count / 1e9:.1f} GB" for name, count in weights.parts.items() if count >= 5e7)
    what = f"{bundle.directory} ({parts})" if parts else str(bundle.directory)
    check_room(weights.resident + weights.largest, what)
    return weights


def memory_is_scarce(
    config: MolmoConfig,
    weights: Weights | None,
    *,
    max_crops: int | None = None,
    image_tokens: float | None = None,
    cache: str | None = None,
) -> bool:
    """Whether the mapped weights of `check_bundle_room` will not stay in memory, besides what has to.

    `max_crops`, `image_tokens`, `cache`: see molmo_edge.runtimes.memory_plan.predict.
    """
    if weights is None or not weights.mapped:
        return False
    free = available_memory()
    plan = predict(config, weights, max_crops=max_crops, cache=cache, image_tokens=image_tokens)
    return free is not None and plan.peak > free


def weights_here(bundle: Bundle) -> Weights:
    """The weights of a bundle on this machine's CPU, with its kernels. They are not loaded for small bundles."""
    large = bundle.components["decoder"].engine == "onnx" and "decoder_data" in bundle.components
    return bundle_weights(bundle, kernels=large and weights_are_mapped())


def weights_are_mapped() -> bool:
    """Whether four-bit weights of large graphs are read from the mapped file on the CPU."""
    if not map_weights():
        return False
    try:
        return onnxruntime_version() >= ONNXRUNTIME
    except Unavailable:  # a plan for another machine
        return False
