"""Expert parallelism: the experts of a layer are on several ranks, and tokens are sent to them instead of weights.

Each rank holds experts / n of each layer, sharded further by FSDP over the ranks that hold the same experts. Two
exchanges per layer (all_to_all) send each token's activations to its experts and back. No token is dropped, so the
result is that of one rank (GShard, arXiv 2006.16668; dropless as in MegaBlocks, arXiv 2211.15841).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor, all_to_all_single_autograd
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from molmo_edge.modeling.decoder import SparseFFN, mix_experts
from molmo_edge.modeling.linear import working_dtype
from molmo_edge.training.parallel import ParallelError, local_part, sum_gradients


def spread_experts(layers: Sequence[SparseFFN], kind: str, ways: int, ranks: int, policy: MixedPrecisionPolicy) -> None:
    """Give each of `ways` neighbouring ranks its share of the experts of every layer, in place; routers are not split.

    The routers must already be FSDP units. Raises ParallelError if the experts cannot be divided evenly.
    """
    shape = layers[0].gate.shape if layers else torch.Size((0, 0, 0))  # experts, ffn, d
    pieces = (ways, ranks // ways, ranks // ways)
    if not layers or any(size % count for size, count in zip(shape, pieces, strict=True)):
        raise ParallelError(
            f"{shape[0]} experts of {shape[1]} x {shape[2]} cannot be divided evenly: {ranks} ranks, {ways} per layer"
        )
    mesh = init_device_mesh(kind, (ranks // ways, ways), mesh_dim_names=("expert_shard", "expert"))
    for ffn in layers:
        for name in ("gate", "up", "down"):
            matrix = getattr(ffn, name)
            spread = distribute_tensor(matrix.detach(), mesh["expert"], [Shard(0)])
            setattr(ffn, name, nn.Parameter(spread, requires_grad=matrix.requires_grad))
        # Along another dimension than the experts, so that checkpoints contain plain shards.
        unit = fully_shard(ffn, mesh=mesh["expert_shard"], mp_policy=policy, shard_placement_fn=lambda _: Shard(1))
        sum_gradients(unit)
        ffn.mix = partial(_travel, ffn, mesh["expert"].get_group())  # type: ignore[method-assign]


def _travel(ffn: SparseFFN, group: dist.ProcessGroup, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    """Like `SparseFFN.mix`, for an `ffn` that holds a share of the experts."""
    matrices = (local_part(ffn.gate), local_part(ffn.up), local_part(ffn.down))
    ways, mine = group.size(), len(matrices[0])
    flat = experts.flatten()
    order = flat.argsort(stable=True)
    counts = flat.bincount(minlength=ways * mine)
    arriving = _exchange_counts(counts, group)  # [ways, mine]: from each rank, for each expert of this rank
    sent, received = counts.view(ways, mine).sum(1).tolist(), arriving.sum(1).tolist()
    token = order // experts.shape[1]
    travelling = x.to(working_dtype(matrices[0])).index_select(0, token)
    rows = _exchange(travelling, received, sent, group)  # by rank, then by expert
    here = torch.arange(mine, device=x.device).repeat(ways)
    owner = here.repeat_interleave(arriving.flatten(), output_size=len(rows))
    once = torch.ones(len(rows), 1, device=x.device)
    out = mix_experts(rows, once, owner[:, None], matrices, "loop" if ffn.kernel == "wide" else ffn.kernel)
    back = _exchange(out.to(travelling.dtype), sent, received, group)
    weighted = back.float() * weights.flatten()[order, None]
    return weighted.new_zeros(x.shape).index_add(0, token, weighted)


def _exchange_counts(counts: Tensor, group: dist.ProcessGroup) -> Tensor:
    arriving = torch.empty_like(counts)
    dist.all_to_all_single(arriving, counts, group=group)
    return arriving.view(group.size(), -1)


def _exchange(rows: Tensor, received: list[int], sent: list[int], group: dist.ProcessGroup) -> Tensor:
    """rows [sum(sent), d], those for rank 0 first -> [sum(received), d]; differentiable."""
    out = all_to_all_single_autograd(rows.contiguous(), received, sent, group)
    return out.wait() if isinstance(out, AsyncCollectiveTensor) else out
