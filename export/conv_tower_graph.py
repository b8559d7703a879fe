"""The convolutional tower as part of the vision graph: one pass over the overview, sampled by every patch."""

from __future__ import annotations

import numpy as np

from molmo_edge.checkpoints.tensor_names import BACKBONE
from molmo_edge.checkpoints.tensor_sources import TensorSource
from molmo_edge.config import MolmoConfig
from molmo_edge.export.graph_builder import Graph

HUB = f"{BACKBONE}.conv_tower"
_SLOPE = 0.1  # of the leaky ReLUs


def conv_features(graph: Graph, config: MolmoConfig, tensors: TensorSource) -> str:
    """Add the inputs pixels float32 [1, 3, h, w] and positions float32 [n, patches^2, 4, 2], see `crops.Overview`.

    Returns [n, patches^2, conv_tower.feature_dim]. Convolutions are float32; weights that float16 holds exactly, such
    as those of a detector published in float16, are stored in float16.
    """
    tower = config.conv_tower
    assert tower is not None
    pixels = graph.input("pixels", np.float32, [1, 3, "height", "width"])
    positions = graph.input("positions", np.float32, ["n", config.image.patches**2, 4, 2])

    def conv(x: str, name: str, *, stride: int = 1, act: bool = True) -> str:
        weight, bias = (_weight(graph, f"{HUB}.{name}.{leaf}", tensors) for leaf in ("weight", "bias"))
        side = tensors.shape(f"{HUB}.{name}.weight")[-1]
        y = graph.node("Conv", x, weight, bias, strides=[stride] * 2, pads=[side // 2] * 4, kernel_shape=[side] * 2)
        return graph.node("LeakyRelu", y, alpha=_SLOPE) if act else y

    x = conv(pixels, "stem", stride=2)
    x = graph.node("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    maps = []
    for n, steps in enumerate(tower.steps):
        x = y = conv(x, f"stages.{n}.first", stride=2 if n else 1)
        for step in range(steps):
            narrow = conv(y, f"stages.{n}.steps.{step}.0")
            y = graph.node("Concat", conv(narrow, f"stages.{n}.steps.{step}.1"), narrow, axis=1)
        x = graph.node("Concat", conv(y, f"stages.{n}.last"), x, axis=1)
        maps.append(x)

    def add_resized(to: str, x: str) -> str:
        shapes = graph.node("Shape", x, start=0, end=2), graph.node("Shape", to, start=2, end=4)
        sizes = graph.node("Concat", *shapes, axis=0)
        how = {"mode": "linear", "coordinate_transformation_mode": "half_pixel"}
        return graph.node("Add", to, graph.node("Resize", x, "", "", sizes, **how))

    fine, middle, coarse = (conv(x, f"lateral.{level}", act=False) for level, x in enumerate(maps[-3:]))
    middle = add_resized(middle, coarse)
    fine = add_resized(fine, middle)
    middle = add_resized(middle, fine)
    coarse = add_resized(coarse, middle)
    fine, middle, coarse = (conv(x, f"output.{level}") for level, x in enumerate((fine, middle, coarse)))

    size = graph.node("Gather", graph.node("Shape", pixels), graph.ints(3, 2))  # width, height
    at = graph.node("Div", positions, graph.node("Cast", size, to=1))
    at = graph.node("Sub", graph.node("Mul", at, graph.constant(2.0)), graph.constant(1.0))
    centres = graph.node("ReduceMean", at, graph.ints(2), keepdims=0)  # [n, patches^2, 2]
    patches = config.image.patches**2

    def sample(level: str, where: str, width: int) -> str:
        """[n, patches^2, width], sampled at one place per patch or at four."""
        grid = graph.node("Reshape", where, graph.ints(1, -1, 1, 2))
        y = graph.node("GridSample", level, grid, mode="linear", padding_mode="zeros", align_corners=0)
        y = graph.node("Transpose", y, perm=[0, 2, 3, 1])  # [1, places, 1, pyramid_dim]
        return graph.node("Reshape", y, graph.ints(-1, patches, width))

    dim = tower.pyramid_dim
    parts = sample(fine, at, 4 * dim), sample(middle, centres, dim), sample(coarse, centres, dim)
    return graph.node("Concat", *parts, axis=-1)


def _weight(graph: Graph, name: str, tensors: TensorSource) -> str:
    exact = np.asarray(tensors.get(name), np.float32)
    narrow = exact.astype(np.float16)
    if not np.array_equal(narrow.astype(np.float32), exact):
        return graph.weight(name, exact)
    return graph.node("Cast", graph.weight(name, narrow), to=1)
