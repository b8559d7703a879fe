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
            "as for x86; on an emulated processor token ids differ as rarely as between x86 processors; speed not "
            "measured",
        ),
        Target(
            "cuda",
            "cuda",
            _Q4F16,
            frozenset(),
            "float16 products, which the CUDA kernels of attention and experts require; 4-bit weights for the decoder, "
            "whose speed is limited by reading them for every token; not measured on a GPU",
        ),
        Target(
            "tensorrt",
            "tensorrt",
            _Q4F16,
            _ENCODERS,
            "TensorRT supports only standard ONNX operators: the vision tower and the connector use these, and the "
            "decoder runs on CUDA; not measured on a GPU",
        ),
        Target(
            "coreml",
            "coreml",
            dict(zip(GRAPHS, ("fp16", "fp16", "int8", "mixed"), strict=True)),
            _ENCODERS,
            "Core ML supports neither attention with a cache nor 4-bit products: it runs the vision tower and the "
            "connector in standard ONNX operators, and the CPU runs the decoder; not measured on a Mac",
        ),
    )
}
