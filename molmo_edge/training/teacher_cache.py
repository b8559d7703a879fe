"""A teacher's targets on disk: computed once, and read by any number of runs without the teacher.

One safetensors file per sequence, ROOT/FINGERPRINT/ab/abcdef....safetensors: log-probabilities in float16 and ids of
the most likely tokens, and the states that the losses need. The fingerprint is a hash of the teacher, of the student's
tokenizer and inputs, and of the settings; a file is named by a hash of the sequence's tokens, weights and pictures, and
contains both, so that a file of another teacher or sequence is refused. A sequence that the teacher cannot encode has a
file with the reason instead: the run replaces its example, as a run with the teacher in memory does.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from molmo_edge.config import MolmoConfig
from molmo_edge.data.examples import DataSet, Example
from molmo_edge.data.mixture import Order
from molmo_edge.errors import MolmoEdgeError, first_line
from molmo_edge.system.cores import available_cores
from molmo_edge.system.files import atomic_write
from molmo_edge.system.log import steps_log
from molmo_edge.training.distillation import DistillConfig, DistillError, TeacherTargets
from molmo_edge.training.encoding import Batch, Encoder, EncodingError, Sample, TeacherSample
from molmo_edge.training.features import FeatureError
from molmo_edge.training.loader import MicroBatch, Samples, Share, open_loader, start
from molmo_edge.training.parallel import World
from molmo_edge.training.recipe import Recipe
from molmo_edge.training.teacher import OnlineTeacher, SecondEncoding

LOG_EVERY = 30.0  # seconds
_FORMAT = 2
_STATES = ("hidden", "cells")
_NARROW = ("log_probs", *_STATES)  # stored in float16
_STORED = ("log_probs", "ids", "matched", "hidden", "cells")
_REFUSED = "refused"  # key of the metadata, with the reason


@dataclass(frozen=True)
class TargetCache:
    """The cached targets of one teacher for one student's inputs, a `teacher.TargetSource`."""

    directory: Path  # with the fingerprint as its name
    identity: str  # of the teacher
    validates: bool = False

    @property
    def second(self) -> TargetReader:
        """Reads the targets in the workers of the data loader."""
        return TargetReader(self)

    def validation_second(self) -> None:
        """Return None: validation sets are not in a cache."""

    def targets(self, micro: MicroBatch, device: torch.device) -> TeacherTargets:
        """The targets that the workers have read."""
        assert micro.teacher is not None
        assert micro.teacher.targets is not None
        return micro.teacher.targets.to(device)

    def path(self, sample: Sample) -> Path:
        """The file of a sequence."""
        digest = hashlib.blake2b(digest_size=20)
        packed = sample.packed
        arrays = (packed.input_ids, packed.targets, packed.loss_weights, packed.segments, packed.positions)
        pictures = sample.crops if sample.features is None else sample.features.float().numpy()
        for array in (*arrays, pictures):
            digest.update(np.ascontiguousarray(array).data)
        key = digest.hexdigest()
        return self.directory / key[:2] / f"{key}.safetensors"

    def read(self, sample: Sample) -> TeacherTargets:
        """The targets of a sequence, in float32, its states scaled to mean square 1.

        Raises DistillError, and EncodingError if the teacher cannot encode the example.
        """
        path = self.path(sample)
        try:
            with safe_open(path, "pt") as file:
                bound = file.metadata() or {}
                reason = bound.pop(_REFUSED, None)
                found = {name: file.get_tensor(name) for name in (_STORED if reason is None else ())}
        except FileNotFoundError:
            raise DistillError(
                f"{path} is missing: was it deleted during the run, or do the pictures of a data set change each time? "
                "Start the run again with its teacher"
            ) from None
        except (OSError, SafetensorError) as error:
            raise DistillError(
                f"{path} is damaged ({first_line(error)}): delete it, and start the run again with its teacher"
            ) from None
        if bound != _bound(self, path) or (reason is None and len(found["matched"]) != sample.answered):
            raise DistillError(f"{path} belongs to another teacher, setting or sequence: delete it")
        if reason is not None:
            raise EncodingError(reason)
        values = {name: tensor.float() if name in _NARROW else tensor for name, tensor in found.items()}
        empty = torch.zeros(0, 0)
        return TeacherTargets(**(values | {"ids": values["ids"].long()}), patches=empty, slots=empty, locations=empty)

    def write(self, path: Path, targets: TeacherTargets) -> None:
        """Write the targets of the sequence whose file is `path`."""
        stored = {name: getattr(targets, name).cpu().contiguous() for name in _STORED}
        stored |= {name: _scaled(stored[name]) for name in _STATES}
        stored |= {name: stored[name].half() for name in _NARROW} | {"ids": stored["ids"].int()}
        self._write(path, stored, {})

    def refuse(self, path: Path, reason: str) -> None:
        """Write that the teacher cannot encode the sequence whose file is `path`, and why."""
        self._write(path, {}, {_REFUSED: reason})

    def _write(self, path: Path, stored: dict[str, torch.Tensor], further: dict[str, str]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as part:
            part.write_bytes(save(stored, _bound(self, path) | further))


def _scaled(states: torch.Tensor) -> torch.Tensor:
    """States [..., d] with mean square 1: only their direction is used, and large ones do not fit into float16."""
    scaled: torch.Tensor = F.normalize(states.float(), dim=-1) * states.shape[-1] ** 0.5
    return scaled


def _bound(cache: TargetCache, path: Path) -> dict[str, str]:
    return {"teacher": cache.directory.name, "sequence": path.stem}


@dataclass(frozen=True)
class TargetReader:
    """A `loader.SecondSample` that reads targets."""

    cache: TargetCache

    def __call__(self, _example: Example, sample: Sample, _rng: np.random.Generator) -> TeacherSample:
        """Raises DistillError for a missing or damaged file, and EncodingError as `TargetCache.read`."""
        return TeacherSample(targets=self.cache.read(sample))


def check_cached(config: DistillConfig) -> None:
    """Raise DistillError for losses whose targets are not cached."""
    if config.grounding:
        raise DistillError("the choices of a grounding head are not cached: leave the cache or the grounding loss out")
    if config.divergence and not config.top_k:
        raise DistillError("all logits of a teacher are too large for a cache: set top_k, for example to 64")


def open_targets(
    root: Path,
    teacher: str,
    config: DistillConfig,
    student: MolmoConfig,
    student_tokenizer: str,
    second: SecondEncoding | None,
) -> TargetCache:
    """The cache below `root`. teacher: its `model_identity`. student_tokenizer: the text of its tokenizer.json.

    second: of `teacher.second_encoding`. Raises DistillError for losses whose targets are not cached.
    """
    check_cached(config)
    compared = [config.top_k, config.temperature, student.decoder.n_logits] if config.divergence else None
    kept = [compared, config.hidden > 0 and student.decoder.n_layers, config.image > 0]
    # If the teacher reads the student's sequence, the name of the file depends on how it was encoded.
    read = None if second is None else [asdict(second.encoder.image), asdict(second.encoder.encoding)]
    fingerprint = hashlib.sha256(json.dumps([_FORMAT, teacher, kept, read]).encode() + student_tokenizer.encode())
    return TargetCache(root / fingerprint.hexdigest()[:20], teacher)


@dataclass(frozen=True)
class _Located:
    """A `loader.SecondSample` that also names the file of each sequence."""

    cache: TargetCache
    second: SecondEncoding | None

    def __call__(self, example: Example, sample: Sample, rng: np.random.Generator) -> TeacherSample:
        found, path = TeacherSample(), self.cache.path(sample)
        if self.second is not None:
            try:
                found = self.second(example, sample, rng)
            except (FeatureError, DistillError):  # not a fault of the example
                raise
            except MolmoEdgeError as error:  # the loader replaces the example
                self.cache.refuse(path, str(error))
                raise
        return replace(found, path=path)


def cache_targets(
    cache: TargetCache,
    data: Sequence[DataSet],
    rates: Sequence[float],
    encoder: Encoder,
    recipe: Recipe,
    here: World,
    second: SecondEncoding | None,
    open_teacher: Callable[[], OnlineTeacher],
    step: int = 0,
) -> int:
    """Write the targets of all sequences of a run that `cache` does not hold yet; returns how many of this rank.

    encoder: of the student; second: of the teacher, see `teacher.second_encoding`. The teacher is opened if something
    is missing. step: completed steps of the run, whose sequences it does not read again. Collective over the ranks. An
    interrupted call is continued by the next one.
    """
    share = Share(recipe.batch, recipe.micro, here.rank, here.ranks)
    loader = open_loader(
        Samples(data, encoder, recipe.seed, _Located(cache, second)),
        Order([len(s) for s in data], rates, recipe.seed),
        share,
        step=min(step, recipe.steps),
        steps=recipe.steps,
        workers=min(recipe.workers, available_cores()),
    )
    teacher, written = None, 0
    began = logged = time.monotonic()
    for n, micro in enumerate(start(loader), start=1):
        assert micro.teacher is not None
        paths = micro.teacher.paths
        missing = torch.tensor(float(any(not path.exists() for path in paths)), device=here.device)
        if here.sum(missing):  # a sharded teacher runs on all ranks, or on none
            teacher = open_teacher() if teacher is None else teacher
            targets = teacher.targets(micro, here.device)
            for path, own in zip(paths, _by_sequence(targets, micro.batch), strict=True):
                cache.write(path, own)
            written += len(paths)
        if time.monotonic() - logged > LOG_EVERY:
            logged = time.monotonic()
            found, speed = n * share.micro - written, n * share.micro / (logged - began)
            steps_log.info(
                "teacher: %d of %d batches, %d sequences computed, %d found in the cache, %.1f a second",
                n, len(loader), written, found, speed,
            )  # fmt: skip
    return written


def _by_sequence(targets: TeacherTargets, batch: Batch) -> list[TeacherTargets]:
    rows, n = batch.ids.shape
    answers, cells = (torch.bincount(at // n, minlength=rows).tolist() for at in (batch.answered, batch.cells_at))
    parts = {}
    for name, tensor in targets._asdict().items():
        counts = cells if name == "cells" else answers
        parts[name] = torch.split(tensor, counts) if len(tensor) == sum(counts) else [tensor[:0]] * rows
    return [TeacherTargets(*tensors) for tensors in zip(*parts.values(), strict=True)]
