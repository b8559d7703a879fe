"""Kinds of machines, and the precision of each component that suits them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from molmo_edge.checkpoints.manifest import GRAPHS
from molmo_edge.export.precisions import onnx_bundle


@dataclass(frozen=True)
class Target:
    """A kind of machine, with the defaults of a bundle for it."""

    name: str
    device: str  # of molmo_edge.runtimes
    precision: Mapping[str, str]  # by component
    plain: frozenset[str]  # components in standard ONNX operators, the only ones that this engine has
    reason: str  # written into the manifest


_MIXED, _Q4F16 = onnx_bundle("mixed"), onnx_bundle("q4f16")
_ENCODERS = frozenset(("vision_encoder", "connector"))
TARGETS = {
    target.name: target
    for target in (
        Target(
            "cpu-x86",
            "cpu",
            _MIXED,
            frozenset(),
            "measured at MolmoE's full size on AVX-512 with VNNI: an int8 ViT is about 3 times as fast as PyTorch's in "
            "fp32, a four-bit one slower than fp32; int8 attention has an eighth of q4's error and a faster prompt",
        ),
        Target(
            "cpu-arm64",
            "cpu",
            _MIXED,
            frozenset(),
            "as for x86: on an emulated processor ids differ as rarely as they do on x86 when rounding does; its speed "
            "was not measured",
        ),
        Target(
            "cuda",
            "cuda",
            _Q4F16,
            frozenset(),
            "float16 products, which CUDA's attention and experts ask for, four-bit weights for the decoder, which "
            "reads each of them for every token; not measured on a GPU",
        ),
        Target(
            "tensorrt",
            "tensorrt",
            _Q4F16,
            _ENCODERS,
            "TensorRT knows ONNX's own operators alone: the vision tower and the connector are made of them, the "
            "decoder runs through CUDA; not measured on a GPU",
        ),
        Target(
            "coreml",
            "coreml",
            dict(zip(GRAPHS, ("fp16", "fp16", "int8", "mixed"), strict=True)),
            _ENCODERS,
            "Core ML has no attention with a cache and no four-bit products: it gets the vision tower and the "
            "connector in ONNX's own operators, the CPU the decoder; not measured on a Mac",
        ),
    )
}
