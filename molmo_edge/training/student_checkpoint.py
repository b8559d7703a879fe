"""A student from a larger model: fewer decoder layers, fewer ViT layers, and experts instead of a dense FFN.

The student is a checkpoint to start a run from. Kept tensors are copied byte for byte, one at a time.

Experts are slices of the dense FFN, as in nano: the router is zero, so that with all experts active each has the weight
1 / n_experts; the down projections are multiplied by n_experts, and the layer computes exactly what the dense FFN
computed. `recipe.ExpertSchedule` then reduces the number of active experts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from molmo_edge.checkpoints.hub_config import read_config
from molmo_edge.checkpoints.tensor_names import hub_layout, hub_shapes
from molmo_edge.checkpoints.tensor_sources import DTYPES, check_tensors
from molmo_edge.checkpoints.weight_files import open_tensors
from molmo_edge.config import MolmoConfig
from molmo_edge.modeling.weights import stored, write_tensors
from molmo_edge.training.distillation import DistillError

SHARD_BYTES = 5_000_000_000
_BLOCK = re.compile(r"(decoder|vision)\.blocks\.(\d+)\.(.+)")


def split_ffn(
    gate: np.ndarray, up: np.ndarray, down: np.ndarray, n_experts: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A dense SwiGLU as experts that compute it together if each has the weight 1 / n_experts.

    gate and up [ffn, d], down [d, ffn] -> gate and up [n_experts, ffn / n_experts, d], down [n_experts, d, ffn /
    n_experts], multiplied by n_experts.
    """
    d = len(down)
    gates, ups = (matrix.reshape(n_experts, -1, d) for matrix in (gate, up))
    return gates, ups, n_experts * down.reshape(d, n_experts, -1).swapaxes(0, 1)


def student_config(
    config: MolmoConfig,
    layers: Sequence[int] | None = None,
    vit_layers: Sequence[int] | None = None,
    n_experts: int = 0,
) -> MolmoConfig:
    """The configuration of a student that keeps `layers` of the decoder and `vit_layers` of the ViT (None: all).

    n_experts: experts that the dense FFN is split into, all of them active; 0: the FFN stays. The ViT's outputs must
    come from kept layers. Raises DistillError.
    """
    decoder, vision = config.decoder, config.vision
    if layers is not None:
        _check_layers("decoder", layers, decoder.n_layers)
        yarn = decoder.yarn
        if yarn is not None:
            yarn = replace(yarn, layers=tuple(new for new, old in enumerate(layers) if old in yarn.layers))
        decoder = replace(decoder, n_layers=len(layers), yarn=yarn)
    if vit_layers is not None:
        _check_layers("ViT", vit_layers, vision.n_layers)
        used = [layer % vision.n_layers for layer in vision.layers]
        if missing := sorted(set(used) - set(vit_layers)):
            raise DistillError(f"the ViT's layers {missing} are its outputs: they must be kept")
        places = tuple(list(vit_layers).index(layer) - len(vit_layers) for layer in used)
        vision = replace(vision, n_layers=len(vit_layers), layers=places)
    if n_experts:
        if config.image.layout != "molmo":
            raise DistillError("only a Molmo v1 can have experts: this checkpoint is a Molmo2")
        if decoder.n_experts:
            raise DistillError(f"the decoder has {decoder.n_experts} experts already: leave the number of experts out")
        if n_experts < 2 or decoder.ffn_dim % n_experts:
            raise DistillError(f"an FFN of width {decoder.ffn_dim} cannot be split into {n_experts} equal experts")
        decoder = replace(decoder, n_experts=n_experts, top_k=n_experts, ffn_dim=decoder.ffn_dim // n_experts)
    return replace(config, decoder=decoder, vision=vision)


def _check_layers(what: str, layers: Sequence[int], n_layers: int) -> None:
    if not layers or list(layers) != sorted(set(layers)) or not 0 <= layers[0] <= layers[-1] < n_layers:
        raise DistillError(
            f"the kept layers of the {what} must be rising numbers from 0 to {n_layers - 1}, not {list(layers)}"
        )


def write_student(
    checkpoint: Path,
    out: Path,
    *,
    layers: Sequence[int] | None = None,
    vit_layers: Sequence[int] | None = None,
    n_experts: int = 0,
) -> MolmoConfig:
    """Write the student of `checkpoint` to the directory `out`, in hub layout; see `student_config`.

    Raises DistillError and CheckpointError.
    """
    config, source = read_config(checkpoint), open_tensors(checkpoint)
    if out.resolve() == checkpoint.resolve():
        raise DistillError(f"{out} is the checkpoint itself: choose another directory")
    check_tensors(config, source, where=str(checkpoint))
    student = student_config(config, layers, vit_layers, n_experts)
    kept = {"decoder": layers, "vision": vit_layers}
    before, after, shapes = hub_layout(config), hub_layout(student), hub_shapes(student)
    places = {hub: (name, i) for name, slot in after.items() for i, hub in enumerate(slot)}

    def origin(hub: str) -> str:
        """The tensor of the larger model that a tensor of the student, or a slice of it, comes from."""
        name, i = places[hub]
        if (found := _BLOCK.fullmatch(name)) is not None:
            part, number, leaf = found.groups()
            chosen = kept[part]
            if n_experts and leaf.startswith("ffn."):
                leaf = "ffn.ff_out.weight" if leaf == "ffn.down" else "ffn.ff_proj.weight"
            name = f"{part}.blocks.{number if chosen is None else chosen[int(number)]}.{leaf}"
        slot = before[name]
        return slot[i if len(slot) > 1 else 0]

    origins = {hub: origin(hub) for hub in shapes}
    dtypes = {hub: source.dtype(origins[hub]) for hub in shapes}

    @lru_cache(maxsize=1)
    def experts(block: str) -> dict[str, np.ndarray]:
        """The experts of a block of the student."""
        fused, down = (origins[after[f"{block}.ffn.{leaf}"][0]] for leaf in ("gate", "down"))
        up, gate = np.split(source.get(fused), 2)
        return dict(zip(("gate", "up", "down"), split_ffn(gate, up, source.get(down), n_experts), strict=True))

    def values(hub: str) -> np.ndarray:
        name, i = places[hub]
        block, is_ffn, leaf = name.rpartition(".ffn.")
        if not n_experts or not is_ffn:
            return source.raw(origins[hub])
        if leaf == "router.weight":
            return stored(torch.zeros(shapes[hub]), dtypes[hub])
        return stored(torch.tensor(experts(block)[leaf][i]), dtypes[hub])

    # Wider ones first, as `ShardWriter` requires.
    order = sorted(shapes, key=lambda hub: -DTYPES[dtypes[hub]].itemsize)
    write_tensors(
        student,
        checkpoint / "tokenizer.json",
        out,
        {hub: shapes[hub] for hub in order},
        dtypes,
        map(values, order),
        SHARD_BYTES,
    )
    return student
