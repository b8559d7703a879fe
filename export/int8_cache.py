"""Keys and values in eight bits: a decoder's graph whose cache has a quarter of the size.

GroupQueryAttention rounds keys (after the rotation) and values when it writes them into the cache, with one scale for
each channel. The scales are constants of the graph, from the largest values on calibration prompts; what is larger on
another photo is cut off. Only the graph is changed: the weights beside it stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from molmo_edge.config import MolmoConfig
from molmo_edge.quantize.calibration_prompts import DecoderInput
from molmo_edge.runtimes.onnx import OnnxRuntime
from molmo_edge.runtimes.prompt_embeddings import prefill

ONNXRUNTIME = "1.32"  # the version with which this was tested
_MARGIN = 1.1
_PAST, _SCALES, _INPUTS = (3, 4), (12, 13), 14  # inputs of GroupQueryAttention: keys and values
_SMALLEST = 1e-6  # of a channel that is always 0


def round_cache(config: MolmoConfig, files: dict[str, Path], prompts: Sequence[DecoderInput]) -> None:
    """Change the graph files["decoder"] so that its cache is int8. `prompts`: to measure the range of each channel."""
    path = files["decoder"]
    model = onnx.load(path, load_external_data=False)
    _use(model.graph, _largest(config, path, prompts))
    onnx.save(model, path)


def _largest(config: MolmoConfig, decoder: Path, prompts: Sequence[DecoderInput]) -> dict[str, np.ndarray]:
    """The largest absolute value of each channel: float32 [n_kv_heads * head_dim] by the name of the cache."""
    runtime = OnnxRuntime(config, {"decoder": decoder})
    largest: dict[str, np.ndarray] = {}
    try:
        for prompt in prompts:
            cache = runtime.new_cache(len(prompt.embeddings))
            prefill(runtime, prompt.embeddings, prompt.image, cache)
            for name, values in cache.arrays().items():  # [1, n_kv_heads, n, head_dim]
                found = np.abs(values).max(axis=(0, 2)).ravel()
                largest[name] = np.maximum(largest.get(name, _SMALLEST), found)
    finally:
        runtime.close()
    return largest


def _use(graph: onnx.GraphProto, largest: dict[str, np.ndarray]) -> None:
    for node in graph.node:
        if node.op_type != "GroupQueryAttention":
            continue
        inputs = [*node.input, *[""] * (_INPUTS - len(node.input))]
        for past, scale in zip(_PAST, _SCALES, strict=True):
            name = inputs[past].removeprefix("past_")
            inputs[scale] = f"{name}.scale"
            scales = (largest[name] * (_MARGIN / 127)).astype(np.float32)
            graph.initializer.append(numpy_helper.from_array(scales, inputs[scale]))
        del node.input[:]
        node.input.extend(inputs)
        kinds = {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
        node.attribute.extend(helper.make_attribute(name, value) for name, value in kinds.items())
    for value in (*graph.input, *graph.output):
        if value.name.startswith(("past_", "present_")):
            value.type.tensor_type.elem_type = TensorProto.INT8
