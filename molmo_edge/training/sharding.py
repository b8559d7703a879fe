"""Sharding of a model over ranks (FSDP2, PyTorch's `fully_shard`).

Each block of the decoder and of the ViT is a unit: its parameters are gathered for its forward and its backward pass
and are shards in between. The whole model is a unit too, for embeddings, connector and head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from molmo_edge.modeling.decoder import SparseFFN
from molmo_edge.training.expert_parallel import spread_experts
from molmo_edge.training.forward import Trainable
from molmo_edge.training.parallel import ParallelError, World, sum_gradients


@dataclass(frozen=True)
class Layout:
    """How ranks are arranged."""

    replicas: int = 1  # copies of the sharded model (HSDP), which only exchange gradients
    experts: int = 1  # ranks that share the experts of a layer: tokens are sent instead of weights
    gather: str = "bf16"  # dtype in which weights of blocks are gathered and norms are computed; "fp32": as on one rank


def shard(model: Trainable, layout: Layout, here: World, *, compute: torch.dtype) -> Trainable:
    """Shard `model` over the ranks, in place; a no-op on one rank. Raises ParallelError."""
    per_copy = here.ranks // layout.replicas
    if here.ranks % layout.replicas or per_copy % layout.experts:
        raise ParallelError(
            f"{here.ranks} ranks cannot form {layout.replicas} copies of a model whose experts are on {layout.experts}"
        )
    if here.ranks == 1:
        return model
    kind = here.device.type
    dtype = torch.bfloat16 if layout.gather == "bf16" and compute == torch.bfloat16 else torch.float32
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    mesh = _mesh(kind, layout.replicas, per_copy)

    def split(unit: nn.Module, policy: MixedPrecisionPolicy = policy) -> None:
        sum_gradients(fully_shard(unit, mesh=mesh, mp_policy=policy))

    if layout.experts > 1:
        if layout.replicas > 1:
            raise ParallelError("experts on several ranks cannot be combined with several copies of the model")
        layers = sparse_layers(model)
        for ffn in layers:
            split(ffn.router)
        spread_experts(layers, kind, layout.experts, here.ranks, policy)
    for unit in (*model.molmo.vision.blocks, *model.molmo.decoder.blocks):
        split(unit)
    # Embeddings, connector, last norm: few parameters, whose outputs enter the residual stream.
    split(model, MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False))
    return model


def _mesh(kind: str, replicas: int, per_copy: int) -> DeviceMesh:
    if replicas == 1:
        return init_device_mesh(kind, (per_copy,), mesh_dim_names=("shard",))
    return init_device_mesh(kind, (replicas, per_copy), mesh_dim_names=("replicate", "shard"))


def sparse_layers(model: Trainable) -> list[SparseFFN]:
    """The mixture-of-experts FFNs of the decoder, in the order of its blocks."""
    return [block.ffn for block in model.molmo.decoder.blocks if isinstance(block.ffn, SparseFFN)]
