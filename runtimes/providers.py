"""The ONNX Runtime execution providers for each component of a bundle.

Options follow ONNX Runtime's documentation. CUDA, TensorRT and Core ML are not tested on their hardware: the tests
cover the placement of components and the errors for missing providers.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from molmo_edge.checkpoints.manifest import GRAPHS
from molmo_edge.config import MolmoConfig
from molmo_edge.errors import Unavailable
from molmo_edge.system.cache import cache_directory

_INSTALL = {
    "cuda": ("CUDAExecutionProvider", "onnxruntime-gpu; on a Jetson, the wheel of your JetPack"),
    "tensorrt": ("TensorrtExecutionProvider", "onnxruntime-gpu and TensorRT"),
    "coreml": ("CoreMLExecutionProvider", "onnxruntime on a Mac"),
}
_MOST_CROPS = 37  # of one image, for the shapes of TensorRT: the global view and six by six crops

Provider = tuple[str, dict[str, Any]]  # name, options
CPU: Provider = ("CPUExecutionProvider", {})


@dataclass(frozen=True)
class Placement:
    """Where the components of a bundle run."""

    device: str = "cpu"
    providers: Mapping[str, tuple[Provider, ...]] = field(default_factory=dict)  # by component; default: the CPU
    cache: str = "cpu"  # memory of keys and values: "cpu" or "cuda"
    crops_at_once: int = 1

    def of(self, component: str) -> list[Provider]:
        """Return the providers of `component`, the CPU last."""
        return [*self.providers.get(component, ()), CPU]


def place(device: str, made_for: str, available: Collection[str], config: MolmoConfig, identity: str = "") -> Placement:
    """Choose providers for `device`. Raises Unavailable if this onnxruntime does not have them.

    `made_for`: the device of the bundle's target, which "auto" selects if it is available. `available`: providers of
    this onnxruntime. `identity`: a hash of the weights. Providers cache compiled engines by file name, and must not use
    those of another bundle.
    """
    if device == "auto":
        likely = (made_for, "cuda") if made_for == "tensorrt" else (made_for,)
        device = next((name for name in likely if name in _INSTALL and _INSTALL[name][0] in available), "cpu")
    if device == "cpu":
        return Placement()
    if device not in _INSTALL:
        raise Unavailable(
            f'graphs do not run on "{device}": use device="coreml" on a Mac, or "cpu"; GGUF decoders do '
            "(molmo-edge export --engine gguf)"
        )
    provider, install = _INSTALL[device]
    if provider not in available:
        raise Unavailable(f'this onnxruntime has no {provider} for device="{device}": install {install}')
    # The embedding table stays on the CPU: looking up rows needs no GPU.
    if device == "coreml":
        options = {
            "ModelFormat": "MLProgram",
            "MLComputeUnits": "ALL",
            "ModelCacheDirectory": str(cache_directory() / "coreml" / identity),
        }
        parts = dict.fromkeys(("vision_encoder", "connector"), ((provider, options),))
        return Placement(device, parts)
    # Grow the arena by the requested size, not in powers of two: a Jetson's GPU shares the system's memory.
    cuda: Provider = ("CUDAExecutionProvider", {"arena_extend_strategy": "kSameAsRequested"})
    on_gpu: dict[str, tuple[Provider, ...]] = {name: (cuda,) for name in GRAPHS if name != "embed_tokens"}
    if device == "tensorrt":
        for name, shapes in _shapes(config).items():
            on_gpu[name] = ((provider, _tensorrt(shapes, identity)), cuda)
    return Placement(device, on_gpu, cache="cuda", crops_at_once=4)


def _shapes(config: MolmoConfig) -> dict[str, dict[str, str]]:
    """Return, by component and input, the shape without the dimension of crops."""
    patches = config.image.patches**2
    features = f"{patches}x{config.feature_dim}"
    shapes = {"vision_encoder": {"crops": f"{patches}x{3 * config.image.patch_size**2}"}}
    if not config.image.pools_across_crops:  # else the number of cells depends on the image
        shapes["connector"] = {"features": features, **({"masks": str(patches)} if config.pad_embed else {})}
    return shapes


def _tensorrt(shapes: dict[str, str], identity: str) -> dict[str, Any]:
    directory = str(cache_directory() / "tensorrt" / identity)
    # Building an engine takes minutes: cache it.
    options: dict[str, Any] = {
        "trt_fp16_enable": True,
        "trt_layer_norm_fp32_fallback": True,
        "trt_engine_cache_enable": True,
        "trt_engine_cache_path": directory,
        "trt_timing_cache_enable": True,
        "trt_timing_cache_path": directory,
    }
    for key, crops in (("min", 1), ("opt", 4), ("max", _MOST_CROPS)):
        options[f"trt_profile_{key}_shapes"] = ",".join(f"{name}:{crops}x{rest}" for name, rest in shapes.items())
    return options
