"""Checkpoints of a run: sharded, written atomically in the background, and readable on any number of ranks.

A checkpoint is a directory `step-00001000` of torch.distributed.checkpoint with the model, the optimizer states and the
state of the run. It is written under another name and renamed when all ranks are done, so if the process is killed in
the meantime, the previous checkpoint remains the latest.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save

from molmo_edge.errors import MolmoEdgeError, first_line
from molmo_edge.system.scratch import free_bytes
from molmo_edge.training.optimizer import Optimizer
from molmo_edge.training.parallel import World, at_rest

CHECKPOINTS = "checkpoints"  # in the directory of a run
_NAME = re.compile(r"step-(\d{8})")
_PART = ".part"  # suffix of an incomplete checkpoint
_STATE = "run.json"
_FAILURES = (Exception, CheckpointException)  # CheckpointException is not an Exception


class ResumeError(MolmoEdgeError):
    """A checkpoint that cannot be resumed from."""


class SaveError(MolmoEdgeError):
    """A checkpoint that cannot be written. Previous checkpoints are unchanged."""


@dataclass
class Checkpoints:
    """The checkpoints of a run, in a directory that all ranks share."""

    directory: Path
    here: World
    keep: int = 2  # number of latest checkpoints that are not removed
    _pending: tuple[Future[Any], Path] | None = field(default=None, repr=False)
    _group: Any = field(default=None, repr=False)
    _bytes: int = field(default=0, repr=False)  # of the last checkpoint, over all ranks

    def __post_init__(self) -> None:
        if self.here.first:
            self.directory.mkdir(parents=True, exist_ok=True)
        self.here.wait()

    def remove_parts(self) -> None:
        """Remove what a killed run left. Only the run that writes to the directory may call it."""
        if self.here.first:
            for left in self.directory.glob(f"step-*{_PART}"):
                shutil.rmtree(left)
        self.here.wait()

    def latest(self) -> Path | None:
        """The newest complete checkpoint, or None."""
        found = sorted(p for p in self.directory.iterdir() if _NAME.fullmatch(p.name)) if self.here.first else []
        return cast("Path | None", self.here.agree(found[-1] if found else None))

    def save(self, step: int, model: nn.Module, optimizer: Optimizer, state: dict[str, Any]) -> None:
        """Copy the state and write it in the background, after the previous write has finished."""
        self.finish()
        target = self.directory / f"step-{step:08}"
        part = target.with_name(target.name + _PART)
        if self.here.first:
            part.mkdir()
            (part / _STATE).write_text(json.dumps(state | {"updates": optimizer.updates}), encoding="utf-8")
        self.here.wait()
        if self._group is None:
            self._group = dist.new_group(backend="gloo")
        tensors, stager = _tensors(model, optimizer), None
        self._bytes = sum(t.numel() * t.element_size() for group in tensors.values() for t in group.values())
        if self.here.ranks == 1:
            # PyTorch would also copy the copies: 57 GB for MolmoE's 8-bit states, which are returned as copies.
            tensors, stager = _copied(tensors, optimizer), _Copied()
        future = async_save(tensors, checkpoint_id=part, process_group=self._group, async_stager=stager)
        self._pending = (cast("Future[Any]", future), target)

    def poll(self) -> None:
        """Rename a checkpoint that is complete, without waiting for it. Called between steps."""
        if self._pending is not None and self._pending[0].done():
            self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written. If that fails, every rank raises SaveError."""
        if self._pending is None:
            return
        (future, target), self._pending = self._pending, None
        try:
            future.result()
        except _FAILURES as error:  # of the storage: a full disk, a lost mount
            room = f"it takes {self._bytes / 1e9:.3g} GB"
            with contextlib.suppress(OSError):  # the disk may be unavailable
                room += f", {free_bytes(self.directory) / 1e9:.3g} GB were free"
            if self.here.first:
                shutil.rmtree(target.with_name(target.name + _PART), ignore_errors=True)
            raise SaveError(f"the checkpoint {target} could not be written: {_because(error)}; {room}") from error
        if self.here.first:  # the metadata is written last, after all ranks have reported
            target.with_name(target.name + _PART).rename(target)
            for old in sorted(p for p in self.directory.iterdir() if _NAME.fullmatch(p.name))[: -self.keep]:
                shutil.rmtree(old)

    def state(self, path: Path) -> dict[str, Any]:
        """The `state` that was saved in `path`. Raises ResumeError."""
        try:
            return cast("dict[str, Any]", json.loads((path / _STATE).read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise ResumeError(f"cannot resume from the checkpoint {path}: {first_line(error)}") from error

    def load(self, path: Path, model: nn.Module, optimizer: Optimizer) -> None:
        """Load model and optimizer states from `path`. Raises ResumeError."""
        tensors = _tensors(model, optimizer)
        try:
            load(tensors, checkpoint_id=path)
        except _FAILURES as error:
            raise ResumeError(
                f"cannot resume from the checkpoint {path}: {_because(error)}. Is it of another model, or damaged?"
            ) from error
        optimizer.load_states(tensors["optimizer"], self.state(path)["updates"])


def completed_steps(run: Path, here: World) -> int:
    """How many steps of the run in the directory `run` its latest checkpoint has; 0 without one. Collective."""
    found = []
    if here.first and (run / CHECKPOINTS).is_dir():
        found = [int(name[1]) for p in (run / CHECKPOINTS).iterdir() if (name := _NAME.fullmatch(p.name))]
    return cast("int", here.agree(max(found, default=0)))


def _because(error: BaseException) -> str:
    failures = getattr(error, "failures", None)  # of a CheckpointException: by rank, each with its traceback
    cause = next(iter(failures.values()))[0] if failures else error
    return first_line(cause)


def _tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, dict[str, Tensor]]:
    """The trained tensors. Frozen parameters are read from the starting checkpoint at every start."""
    trained = {name: p.detach() for name, p in at_rest(model).items() if p.requires_grad}
    return {"model": trained, "optimizer": optimizer.states()}


def _copied(tensors: dict[str, dict[str, Tensor]], optimizer: Optimizer) -> dict[str, dict[str, Tensor]]:
    def aside(group: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.to("cpu", copy=True) for name, tensor in group.items()}

    states = tensors["optimizer"]
    return {"model": aside(tensors["model"]), "optimizer": states if optimizer.gives_copies else aside(states)}


class _Copied(BlockingAsyncStager):
    """A stager for tensors that are copies already."""

    def stage(self, state_dict: Any) -> Any:
        return state_dict
