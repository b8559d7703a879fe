"""The processes of a run, and tensors that are whole or shards on them.

Gradients are summed, not averaged: a step's loss is already divided by the weight of all ranks together.
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from molmo_edge.errors import MolmoEdgeError

DEVICES = ("auto", "cpu", "cuda")


class ParallelError(MolmoEdgeError):
    """Ranks that cannot be arranged as asked."""


@dataclass(frozen=True)
class World:
    """The processes of a run, as torchrun started them, or this one alone."""

    rank: int
    ranks: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this rank prints and writes what all have in common."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Over all ranks, in place."""
        if self.ranks > 1:
            dist.all_reduce(tensor)
        return tensor

    def agree(self, value: Any) -> Any:
        """What rank 0 says."""
        if self.ranks == 1:
            return value
        said = [value]
        dist.broadcast_object_list(said, src=0)
        return said[0]

    def wait(self) -> None:
        if self.ranks > 1:
            dist.barrier()


@contextlib.contextmanager
def world(device: str = "auto") -> Iterator[World]:
    """Join the run that torchrun started, or make one of this process. device: "auto", "cpu", "cuda".

    Raises ParallelError where a card is asked for and there is none.
    """
    if device not in DEVICES:
        raise ParallelError(f'training on "{device}" is not known; known are {", ".join(DEVICES)}')
    cuda = torch.cuda.is_available() if device == "auto" else device == "cuda"
    if cuda and not torch.cuda.is_available():
        raise ParallelError('there is no CUDA device here: use device="cpu"')
    rank, ranks, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    here = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(here)
    # gloo beside NCCL: asynchronous checkpoints are coordinated on the CPU.
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    alone: dict[str, Any] = {}
    if "RANK" not in os.environ:
        alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1}  # type: ignore[attr-defined]
    dist.init_process_group(backend, timeout=timedelta(minutes=20), **alone)
    try:
        yield World(rank, ranks, here)
    except BaseException:
        # Others may wait in a collective, and taking leave of them would wait, too. A launcher sees this rank go.
        if ranks == 1:
            _leave()
        raise
    _leave()


def _leave() -> None:
    """Destroy the process group now, with its threads.

    What `destroy_process_group` lets go of waits for the garbage collector. If that runs in a process that was forked
    since, a DataLoader's worker for one, `~ProcessGroupGloo` waits there for threads that do not exist.
    """
    dist.destroy_process_group()
    gc.collect()


def sum_gradients(unit: FSDPModule) -> None:
    """Instead of averaging them over the ranks."""
    unit.set_gradient_divide_factor(1.0)
    unit.set_force_sum_reduction_for_comms(True)  # a plain sum: gloo knows no other


def accumulate(model: nn.Module, last: bool) -> None:
    """Before the backward pass of one of a step's micro-batches.

    Gradients are summed and sharded each time: whole ones would be kept until the last, as large as the model. Copies
    of the model exchange theirs with the last alone.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_all_reduce(last)
        model.set_is_last_backward(last)


def at_rest(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by name, those of several ranks as shards.

    Behind a forward pass without a backward pass, what belongs to no block is still gathered.
    """
    if isinstance(model, FSDPModule):
        model.reshard()
        parameters = dict(model.named_parameters())
        assert all(isinstance(p, DTensor) for p in parameters.values()), "a parameter is not sharded"
        return parameters
    return dict(model.named_parameters())


# --- tensors that are whole, or shards ----------------------------------------------------------------------------


def is_sharded(tensor: Tensor) -> bool:
    return isinstance(tensor, DTensor)


def local_part(tensor: Tensor) -> Tensor:
    """What of `tensor` lies here, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of `tensor`; every rank has to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def squared_sum(groups: Sequence[Sequence[Tensor]]) -> Tensor:
    """Sum of squares of each group's tensors, float32 [groups], each element counted once over all ranks."""
    sums = []
    for group in groups:
        local = [local_part(tensor) for tensor in group]
        norms = torch._foreach_norm([t for t in local if t.numel()], dtype=torch.float32)
        sums.append(torch.stack(norms).square().sum() if norms else local[0].new_zeros((), dtype=torch.float32))
    total = torch.stack(sums)
    copies = {_copies(tensor) for group in groups for tensor in group}
    assert len(copies) == 1, "parameters lie on different numbers of ranks"
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(total)
    return total / copies.pop()


def _copies(tensor: Tensor) -> int:
    """How often a sum over all ranks counts what is in `tensor`."""
    if not isinstance(tensor, DTensor):
        return 1
    pieces = math.prod(tensor.device_mesh.size(i) for i, p in enumerate(tensor.placements) if p.is_shard())
    return dist.get_world_size() // pieces
