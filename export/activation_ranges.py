"""The largest absolute input or output of each matrix product, to find those that exceed float16's range."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from molmo_edge.checkpoints.manifest import GRAPHS
from molmo_edge.checkpoints.tensor_sources import TensorSource
from molmo_edge.config import MolmoConfig
from molmo_edge.errors import first_line
from molmo_edge.export.component_errors import sample_image
from molmo_edge.export.component_graphs import build_component, fits_float32
from molmo_edge.export.errors import ExportError, GraphError
from molmo_edge.export.graph_builder import Graph, Precision, fp32_linear, fp32_table
from molmo_edge.export.options import ExportPlan
from molmo_edge.frontend.crops import cell_patches

_FLOAT16_MAX = 65504.0
_MARGIN = 4.0  # a photo may give larger values than the sample image
_SUFFIX = "/largest"


def _watched_linear(graph: Graph, x: str, name: str, weight: np.ndarray, bias: np.ndarray | None) -> str:
    y = fp32_linear(graph, x, name, weight, bias)
    sizes = [graph.node("ReduceMax", graph.node("Abs", value), keepdims=0) for value in (x, y)]
    graph.output(graph.node("Max", *sizes, name=f"{name}{_SUFFIX}"), np.float32, [])
    return y


_WATCHED = Precision("fp32", "", 4, _watched_linear, fp32_table)


def measure_ranges(
    scratch: Path, config: MolmoConfig, tensors: TensorSource, plan: ExportPlan
) -> dict[str, dict[str, float]]:
    """For each component with float16 products: matrix (hub name without ".weight") -> its largest value.

    A decoder that is too large to be run in float32 is left out. Raises ExportError if that decoder has no norms before
    its matrices, because nothing then bounds their inputs.
    """
    half = [name for name in plan.graphs if name != "embed_tokens" and plan.graph_precision(name).half]
    if "decoder" in half and not fits_float32("decoder", config, tensors):
        if config.decoder.norm_after:
            raise ExportError(
                "this decoder has no norms before its matrices, so its values may exceed float16's range, and it is "
                "too large to be tested here: choose decoder=q4, int8 or fp32"
            )
        half.remove("decoder")
    if not half:
        return {}
    needed = GRAPHS[: GRAPHS.index(half[-1]) + 1]  # each component needs the outputs of those before it
    scratch.mkdir()
    files = {component: scratch / f"{component}.onnx" for component in needed}
    for component, path in files.items():
        build_component(component, path, config, tensors, _WATCHED)
    try:
        ranges = _run_watched(config, files)
    except Exception as error:  # onnxruntime's exception classes share no public base class
        raise GraphError(first_line(error)) from error
    shutil.rmtree(scratch)
    return {component: ranges[component] for component in half if ranges.get(component)}


def overflows(ranges: dict[str, float]) -> frozenset[str]:
    """The matrices whose values float16 may not hold."""
    return frozenset(name for name, value in ranges.items() if not value * _MARGIN < _FLOAT16_MAX)


def _run_watched(config: MolmoConfig, files: dict[str, Path]) -> dict[str, dict[str, float]]:
    """Run graphs that were built as _WATCHED on the sample image of molmo_edge.export.component_errors."""
    ranges: dict[str, dict[str, float]] = {}

    def run(component: str, feeds: dict[str, Any]) -> np.ndarray:
        session = _open(files[component])
        inputs = {value.name: value for value in session.get_inputs()}
        feeds = {name: value for name, value in feeds.items() if name in inputs}
        for name in inputs.keys() - feeds.keys():  # past_key.i and past_value.i
            n = feeds["embeddings"].shape[1]
            feeds[name] = np.zeros([n if size == "capacity" else size for size in inputs[name].shape], np.float32)
        names = [value.name for value in session.get_outputs() if not value.name.startswith("present_")]
        values = dict(zip(names, session.run(names, feeds), strict=True))
        ranges[component] = {
            name.removesuffix(_SUFFIX): float(value) for name, value in values.items() if name.endswith(_SUFFIX)
        }
        return next(value for name, value in values.items() if not name.endswith(_SUFFIX))

    crops, masks, overview = sample_image(config)
    whole = {} if overview is None else {"pixels": overview.pixels[None], "positions": overview.positions}
    features = run("vision_encoder", {"crops": crops, **whole})
    if "connector" in files:
        pooling = cell_patches(config.image, (1, 1)) if config.image.pools_across_crops else None
        image = run("connector", {"features": features, "masks": masks, "pooling": pooling})
        image = image.reshape(-1, image.shape[-1])
    if "decoder" in files:
        ids = np.random.default_rng(0).integers(0, config.decoder.vocab_size, 32)
        rows = np.concatenate([image, run("embed_tokens", {"ids": ids})])
        is_image, length = np.arange(len(rows)) < len(image), np.array([len(rows)], np.int32)
        run("decoder", {"embeddings": rows[None], "total_length": length, "image": is_image})
    return ranges


def _open(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.disable_prepacking", "1")  # large weights stay in their file
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
