"""A teacher: a frozen model whose forward pass gives targets for the student's batch.

If teacher and student have the same tokens, crops and features, the teacher reads the student's batch. Otherwise the
data loader's workers encode each example a second time, in the teacher's way, and align the two (alignment.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from molmo_edge.checkpoints.hub_config import read_config
from molmo_edge.checkpoints.identity import model_identity
from molmo_edge.checkpoints.weight_files import open_tensors
from molmo_edge.config import MolmoConfig
from molmo_edge.data.examples import Example
from molmo_edge.frontend.tokenizer import Tokenizer
from molmo_edge.modeling import Molmo
from molmo_edge.modeling.precision import storage_dtype
from molmo_edge.modeling.weights import fill
from molmo_edge.training.alignment import aligned, answer_runs, shared_tokens
from molmo_edge.training.distill_loss import teacher_classes
from molmo_edge.training.distillation import DistillConfig, DistillError, TeacherTargets, matching_layers
from molmo_edge.training.encoding import Batch, Encoder, Sample, TeacherSample
from molmo_edge.training.features import FeatureCache
from molmo_edge.training.forward import CHUNK, ForwardConfig, Trainable, head_logits
from molmo_edge.training.loader import MicroBatch, SecondSample
from molmo_edge.training.parallel import World
from molmo_edge.training.recipe import Recipe
from molmo_edge.training.sharding import Layout, shard

_TOWERS = ("vision.", "conv_tower.")


class TargetSource(Protocol):
    """What gives the trainer the targets of its batches."""

    @property
    def identity(self) -> str:
        """The `model_identity` of the teacher."""
        ...

    @property
    def second(self) -> SecondSample | None:
        """What the workers of the data loader do for it."""
        ...

    @property
    def validates(self) -> bool:
        """Whether it has targets for the validation sets, too."""
        ...

    def targets(self, micro: MicroBatch, device: torch.device) -> TeacherTargets:
        """The targets of a micro-batch, on `device`."""
        ...

    def validation_second(self) -> SecondSample | None:
        """As `second`, for validation sets, whose annotations are not shuffled."""
        ...


class Teacher(Trainable):
    """A frozen model whose forward pass returns `TeacherTargets`. It is sharded as a student is."""

    def __init__(
        self,
        molmo: Molmo,
        config: DistillConfig,
        student: MolmoConfig,
        shared: tuple[Tensor, Tensor] | None,
        forward: ForwardConfig,
    ):
        """shared: of `alignment.shared_tokens`. forward: of the student's run, for its kernels."""
        kernels = ForwardConfig(answer_dropout=0.0, recompute=False, attention=forward.attention)
        super().__init__(molmo, kernels)
        self.distill, self.shared = config, shared
        self.matched_layers = matching_layers(student.decoder.n_layers, molmo.config.decoder.n_layers)
        self.keeps_layers = config.hidden > 0
        self.requires_grad_(False)

    @torch.no_grad()
    def forward(self, batch: Batch, pairs: Tensor | None = None, count: int = 0) -> TeacherTargets:  # type: ignore[override]
        """The teacher's batch, on its device.

        pairs int64 [p, 2]: which of the student's `count` predictions are compared with which of the teacher's; None:
        the batch is the student's own.
        """
        run, at = self.run(batch), batch.answered
        if pairs is not None:
            at = at.index_select(0, pairs[:, 1])
        config, m = self.distill, len(at)
        log_probs, ids = torch.zeros(m, 0), torch.zeros(m, 0, dtype=torch.long)
        if config.divergence:  # also of no rows: the width says which classes are compared
            hidden = self.molmo.decoder.ln_f(run.states.index_select(0, at))
            shared = None if self.shared is None else (self.shared[0].to(at.device), self.shared[1].to(at.device))
            parts = [
                teacher_classes(head_logits(self.heads(), rows), config.top_k, config.temperature, shared)
                for rows in torch.split(hidden, CHUNK)
            ]
            log_probs, ids = torch.cat([p for p, _ in parts]), torch.cat([i for _, i in parts])
        states = torch.zeros(m, 0, 0)
        if config.hidden and not run.layers:  # no answers
            states = run.states.new_zeros(m, len(self.matched_layers), run.states.shape[-1])
        elif config.hidden:
            states = torch.stack([run.layers[layer] for layer in self.matched_layers], dim=1)
            states = states if pairs is None else states.index_select(0, pairs[:, 1])
        choices = [torch.zeros(0, 0)] * 3
        if config.grounding and run.points is not None:
            choices = [scores for scores, _, _ in run.points.kinds]
        found = TeacherTargets(
            log_probs, ids, torch.ones(m), states, run.tokens if config.image else torch.zeros(0, 0), *choices
        ).to(batch.ids.device)
        return found if pairs is None else _spread(found, pairs[:, 0], count)


def _spread(found: TeacherTargets, at: Tensor, count: int) -> TeacherTargets:
    """Put the rows of answer tokens at the positions `at` of `count`; the others are zeros, and not matched."""

    def spread(rows: Tensor) -> Tensor:
        return rows.new_zeros(count, *rows.shape[1:]).index_copy(0, at, rows)

    return found._replace(**{name: spread(getattr(found, name)) for name in ("log_probs", "ids", "matched", "hidden")})


@dataclass(frozen=True)
class SecondEncoding:
    """Encodes each example for the teacher as well. Picklable, for the workers of the data loader."""

    encoder: Encoder  # of the teacher
    student: Tokenizer

    def __call__(self, example: Example, sample: Sample, rng: np.random.Generator) -> TeacherSample:
        """rng: in the state in which the student's encoder got it, so that questions and their order are the same."""
        own = self.encoder(example, rng)
        ours = answer_runs(sample.packed, self.student)
        return TeacherSample(own, aligned(ours, answer_runs(own.packed, self.encoder.tokenizer)))

    def validating(self) -> SecondEncoding:
        """As the trainer encodes validation sets: without shuffling."""
        encoding = replace(self.encoder.encoding, shuffle=False)
        return replace(self, encoder=replace(self.encoder, encoding=encoding))


@dataclass
class OnlineTeacher:
    """A `TargetSource` that runs the teacher on each batch."""

    model: Teacher
    identity: str
    second: SecondEncoding | None
    dtype: torch.dtype  # of matrix products
    validates: bool = True

    def targets(self, micro: MicroBatch, device: torch.device) -> TeacherTargets:
        """The teacher's targets for a micro-batch."""
        batch, pairs = micro.batch, None
        if self.second is not None:
            assert micro.teacher is not None
            batch, pairs = cast(Batch, micro.teacher.batch), micro.teacher.pairs
        pairs = None if pairs is None else pairs.to(device)
        with torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32, cache_enabled=False):
            found: TeacherTargets = self.model(batch.to(device), pairs, len(micro.batch.answered))
        if isinstance(self.model, FSDPModule):
            self.model.reshard()
        return found

    def validation_second(self) -> SecondEncoding | None:
        """As `second`, for validation sets."""
        return None if self.second is None else self.second.validating()


def shares_towers(student: Molmo, teacher: Molmo) -> bool:
    """Whether both have the same towers, and always will: equal weights, which are not trained."""
    ours, theirs = student.config, teacher.config
    if (ours.vision, ours.image, ours.conv_tower) != (theirs.vision, theirs.image, theirs.conv_tower):
        return False
    own = dict(student.named_parameters())
    towers = [(own[name], p) for name, p in teacher.named_parameters() if name.startswith(_TOWERS)]
    return all(not a.requires_grad and torch.equal(a.to(b.dtype), b) for a, b in towers)


def build_teacher(
    directory: Path,
    student: MolmoConfig,
    tokenizer: Tokenizer,
    recipe: Recipe,
    here: World,
    dtype: torch.dtype,
    *,
    features: FeatureCache | None = None,
    student_features: FeatureCache | None = None,
) -> OnlineTeacher:
    """Read the teacher in `directory`, or this rank's shards of it, for a student with `tokenizer`.

    features: of the teacher's towers, if the run has cached features; student_features: of the student's. dtype: of
    matrix products. Raises DistillError if teacher and student do not fit together.
    """
    assert recipe.distill is not None
    config, source = read_config(directory), open_tensors(directory)
    theirs = Tokenizer.from_file(directory / "tokenizer.json")
    second = second_encoding(config, theirs, student, tokenizer, recipe, features, student_features)
    check_inputs(recipe.distill, second)
    shared = shared_tokens(tokenizer, theirs, student.decoder.n_logits, config.decoder.n_logits)
    with torch.device("meta"):
        model = Teacher(Molmo(config), recipe.distill, student, shared, recipe.forward)
        if here.ranks == 1 and dtype == torch.bfloat16:  # half the memory; shards must have one dtype
            _narrow(model.molmo, here.device.type)
    shard(model, Layout(recipe.layout.replicas, 1, recipe.layout.gather), here, compute=dtype)
    model.to_empty(device=here.device)
    parameters = {name.removeprefix("molmo."): p for name, p in model.named_parameters()}
    fill(config, source, parameters, where=str(directory))
    return OnlineTeacher(model.eval(), model_identity(directory), second, dtype)


def _narrow(molmo: Molmo, device: str) -> None:
    for name, parameter in molmo.named_parameters():
        parameter.data = parameter.data.to(storage_dtype(name, parameter.ndim, "bf16", device))


def second_encoding(
    config: MolmoConfig,
    tokenizer: Tokenizer,
    student: MolmoConfig,
    student_tokenizer: Tokenizer,
    recipe: Recipe,
    features: FeatureCache | None = None,
    student_features: FeatureCache | None = None,
) -> SecondEncoding | None:
    """How examples are encoded for a teacher with `config` and `tokenizer`; None if as they are for the student."""
    same = tokenizer.definition == student_tokenizer.definition and features == student_features
    if same and _inputs(config, recipe) == _inputs(student, recipe):
        return None
    encoder = Encoder(tokenizer, recipe.image(config), recipe.encoding, features, config)
    return SecondEncoding(encoder, student_tokenizer)


def check_inputs(config: DistillConfig, second: SecondEncoding | None) -> None:
    """Raise DistillError for a loss that needs equal inputs, if `second` says that these differ."""
    if config.grounding and second is not None:
        raise DistillError(
            "the grounding loss needs a teacher with the student's tokens, crops and features: these two differ"
        )


def _inputs(config: MolmoConfig, recipe: Recipe) -> tuple[Any, ...]:
    """What the inputs of a model depend on, beside its tokenizer."""
    d, head = config.decoder, config.point_head
    tokens = None if head is None else (head.patch_token, head.subpatch_token, head.location_token, head.numbered)
    return recipe.image(config), d.bidirectional_images, d.embedding_size, config.conv_tower is None, tokens
