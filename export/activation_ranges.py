"""How large the numbers get that enter and leave each matrix: what float16 has to hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from molmo_edge.config import MolmoConfig
from molmo_edge.export.component_errors import sample_image
from molmo_edge.export.graph_builder import Graph, Precision, fp32_linear, fp32_table

_HIGHEST = 65504.0  # of float16
_ROOM = 4.0  # a photo may bring larger numbers than the probe did
_MARK = "/largest"


def _watched_linear(graph: Graph, x: str, name: str, weight: np.ndarray, bias: np.ndarray | None) -> str:
    y = fp32_linear(graph, x, name, weight, bias)
    sizes = [graph.node("ReduceMax", graph.node("Abs", value), keepdims=0) for value in (x, y)]
    graph.output(graph.node("Max", *sizes, name=f"{name}{_MARK}"), np.float32, [])
    return y


WATCHED = Precision("fp32", "", 4, _watched_linear, fp32_table)


def largest_values(config: MolmoConfig, files: dict[str, Path]) -> dict[str, dict[str, float]]:
    """Run graphs that were built as WATCHED, on the same probe as `component_errors`.

    `files`: components, as many of "vision_encoder", "connector", "embed_tokens" and "decoder", in this order, as there
    are to be looked at. Returns for each component the largest absolute value at each matrix, by hub name.
    """
    found: dict[str, dict[str, float]] = {}

    def run(component: str, feeds: dict[str, np.ndarray]) -> np.ndarray:
        session = _open(files[component])
        for value in session.get_inputs():
            if value.name.startswith("past_"):
                n = feeds["embeddings"].shape[1]
                feeds[value.name] = np.zeros([n if size == "capacity" else size for size in value.shape], np.float32)
        names = [value.name for value in session.get_outputs() if not value.name.startswith("present_")]
        values = dict(zip(names, session.run(names, feeds), strict=True))
        found[component] = {
            name.removesuffix(_MARK): float(value) for name, value in values.items() if name.endswith(_MARK)
        }
        return next(value for name, value in values.items() if not name.endswith(_MARK))

    crops, masks, overview = sample_image(config)
    whole = {} if overview is None else {"pixels": overview.pixels[None], "positions": overview.positions}
    features = run("vision_encoder", {"crops": crops, **whole})
    if "connector" in files:
        image = run("connector", {"features": features, "masks": masks})
    if "decoder" in files:
        ids = np.random.default_rng(0).integers(0, config.decoder.vocab_size, 32)
        rows = np.concatenate([*image, run("embed_tokens", {"ids": ids})])
        run("decoder", {"embeddings": rows[None], "total_length": np.array([len(rows)], np.int32)})
    return found


def too_large(largest: dict[str, float]) -> frozenset[str]:
    """The matrices that float16 has no room for."""
    return frozenset(name for name, value in largest.items() if not value * _ROOM < _HIGHEST)


def _open(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.disable_prepacking", "1")  # large weights stay in their file
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
