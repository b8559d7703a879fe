"""Process groups of a run, and conversion between whole tensors and shards.

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
from torch.nn.utils import get_total_norm

from molmo_edge.errors import MolmoEdgeError

DEVICES = ("auto", "cpu", "cuda")


class ParallelError(MolmoEdgeError):
    """An impossible arrangement of ranks."""


@dataclass(frozen=True)
class World:
    """The processes of a run: those that torchrun started, or only this one."""

    rank: int
    ranks: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this rank writes files and logs for all ranks."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all ranks, in place."""
        if self.ranks > 1:
            dist.all_reduce(tensor)
        return tensor

    def agree(self, value: Any) -> Any:
        """The value of rank 0, on every rank."""
        if self.ranks == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def wait(self) -> None:
        """Wait until all ranks have called it."""
        if self.ranks > 1:
            dist.barrier()


@contextlib.contextmanager
def world(device: str = "auto") -> Iterator[World]:
    """Join the run that torchrun started, or create one of only this process. device: "auto", "cpu" or "cuda".

    Raises ParallelError for an unknown device, or for "cuda" without a CUDA device.
    """
    if device not in DEVICES:
        raise ParallelError(f'"{device}" is not a device for training (known: {", ".join(DEVICES)})')
    cuda = torch.cuda.is_available() if device == "auto" else device == "cuda"
    if cuda and not torch.cuda.is_available():
        raise ParallelError('no CUDA device was found: use the device "cpu"')
    rank, ranks, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    here = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(here)
    # gloo in addition to NCCL: asynchronous checkpoints are coordinated on the CPU.
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    alone: dict[str, Any] = {}
    if "RANK" not in os.environ:
        alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group(backend, timeout=timedelta(minutes=20), **alone)
    try:
        yield World(rank, ranks, here)
    except BaseException:
        # Other ranks may wait in a collective, and leaving would wait for them. The launcher sees this rank exit.
        if ranks == 1:
            _leave()
        raise
    _leave()


def _leave() -> None:
    """Destroy the process group and its threads immediately.

    The objects that `destroy_process_group` releases wait for the garbage collector. If it runs in a process forked in
    the meantime, such as a worker of a DataLoader, `~ProcessGroupGloo` waits there for threads that do not exist.
    """
    dist.destroy_process_group()
    gc.collect()


def sum_gradients(unit: FSDPModule) -> None:
    """Sum gradients over the ranks instead of averaging them."""
    unit.set_gradient_divide_factor(1.0)
    unit.set_force_sum_reduction_for_comms(True)  # a plain sum: gloo supports nothing else


def accumulate(model: nn.Module, last: bool) -> None:
    """Prepare the backward pass of one of a step's micro-batches.

    Gradients are summed and sharded after each of them: unsharded gradients, as large as the model, would be kept until
    the last. Copies of the model exchange their gradients only after the last.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_all_reduce(last)
        model.set_is_last_backward(last)


def at_rest(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by name, as shards on several ranks.

    After a forward pass without a backward pass, parameters outside the blocks are still gathered; they are sharded.
    """
    if isinstance(model, FSDPModule):
        model.reshard()
        parameters = dict(model.named_parameters())
        assert all(isinstance(p, DTensor) for p in parameters.values()), "a parameter is not sharded"
        return parameters
    return dict(model.named_parameters())


# --- whole tensors and shards ----------------------------------------------------------------------------


def is_sharded(tensor: Tensor) -> bool:
    """Whether `tensor` is a DTensor: a part of it on each rank."""
    return isinstance(tensor, DTensor)


def local_part(tensor: Tensor) -> Tensor:
    """The part of `tensor` on this rank, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The whole `tensor`. Collective: all ranks must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def squared_sum(groups: Sequence[Sequence[Tensor]]) -> Tensor:
    """Sum of squares of each group's tensors, float32 [groups], each element counted once over all ranks."""
    sums = []
    for group in groups:
        local = [local_part(tensor) for tensor in group]
        sums.append(get_total_norm([t for t in local if t.numel()]).float().square().to(local[0].device))
    total = torch.stack(sums)
    copies = {_copies(tensor) for group in groups for tensor in group}
    assert len(copies) == 1, "parameters are on different numbers of ranks"
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(total)
    return total / copies.pop()


def _copies(tensor: Tensor) -> int:
    """How many times a sum over all ranks counts an element of `tensor`."""
    if not isinstance(tensor, DTensor):
        return 1
    pieces = math.prod(tensor.device_mesh.size(i) for i, p in enumerate(tensor.placements) if p.is_shard())
    return dist.get_world_size() // pieces
