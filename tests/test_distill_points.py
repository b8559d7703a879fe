"""The grounding loss of distillation: a student's choices of patches, subpatches and locations, and its teacher's."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from small_checkpoints import a_recipe
from test_grounded_molmo import CONFIG as WITH_VOTES
from test_grounded_molmo import TOKENIZER, D, Discs

from molmo_edge.checkpoints.hub_config import read_config
from molmo_edge.config import PointHeadConfig
from molmo_edge.frontend.tokenizer import Tokenizer
from molmo_edge.modeling import Molmo, load_checkpoint, save_checkpoint
from molmo_edge.training.distillation import Distillation, DistillConfig, DistillError
from molmo_edge.training.encoding import Batch, Encoder, Encoding, collate
from molmo_edge.training.forward import ForwardConfig, Trainable
from molmo_edge.training.parallel import world
from molmo_edge.training.taught_run import check_teacher
from molmo_edge.training.teacher import Teacher, build_teacher

pytestmark = pytest.mark.usefixtures("one_thread")
DISTILL = DistillConfig(divergence=0.0, grounding=2.0, reverse=0.25, temperature=1.5)
PLAIN = ForwardConfig(answer_dropout=0.0)
CONFIG = dataclasses.replace(WITH_VOTES, point_head=PointHeadConfig(505, 506, 507, dim=32, numbered=False))
TEACHER = dataclasses.replace(
    CONFIG,
    decoder=dataclasses.replace(CONFIG.decoder, d_model=D // 2),
    point_head=PointHeadConfig(505, 506, 507, dim=16, numbered=False),
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folders = []
    for seed, config in enumerate((CONFIG, TEACHER)):
        folder = tmp_path_factory.mktemp("model")
        model = Molmo(config).init_weights(std=D**-0.5, generator=torch.Generator().manual_seed(seed))
        save_checkpoint(model, TOKENIZER, folder)
        folders.append(folder)
    return folders[0], folders[1]


@pytest.fixture(scope="module")
def batch() -> Batch:
    encode = Encoder(Tokenizer.from_file(TOKENIZER), CONFIG.image, Encoding(sequence=512), config=CONFIG)
    data, rng = Discs(2), np.random.default_rng(0)
    return collate([encode(data.example(index, rng), rng) for index in range(2)])


def test_it_is_the_divergence_of_every_choice(models: tuple[Path, Path], batch: Batch) -> None:
    student, teacher = (load_checkpoint(path)[0] for path in models)
    taught = Trainable(student, PLAIN, distillation=Distillation(DISTILL, CONFIG, TEACHER))
    targets = Teacher(teacher, DISTILL, CONFIG, None, PLAIN).eval()(batch)
    loss = taught(batch, targets).point_divergence
    with torch.no_grad():
        runs = [Trainable(molmo, PLAIN).eval().run(batch).points for molmo in (student, teacher)]
    assert runs[0] is not None
    assert runs[1] is not None
    expected = torch.zeros(())
    weights = batch.weights.flatten()
    for (ours, _, at), (theirs, _, same) in zip(runs[0].kinds, runs[1].kinds, strict=True):
        assert len(at)
        assert torch.equal(at, same)
        q, p = ((scores.double() / 1.5).log_softmax(-1) for scores in (ours, theirs))
        each = 0.75 * (p.exp() * (p - q)).sum(-1) + 0.25 * (q.exp() * (q - p)).sum(-1)
        expected = expected + 2.0 * 1.5**2 * (each * weights[at]).sum()
    torch.testing.assert_close(loss.double(), expected.double(), rtol=1e-3, atol=1e-5)
    loss.backward()
    assert student.point_head is not None
    assert student.point_head.patch_q.weight.grad is not None
    assert torch.count_nonzero(student.point_head.patch_q.weight.grad)
    assert all(p.grad is None for p in teacher.parameters())


def test_gradients_lead_to_the_choices_of_the_teacher(models: tuple[Path, Path], batch: Batch) -> None:
    student, teacher = (load_checkpoint(path)[0] for path in models)
    taught = Trainable(student, PLAIN, distillation=Distillation(DISTILL, CONFIG, TEACHER))
    targets = Teacher(teacher, DISTILL, CONFIG, None, PLAIN).eval()(batch)
    optimizer = torch.optim.Adam(student.point_head.parameters(), lr=0.002)  # type: ignore[union-attr]
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = taught(batch, targets).point_divergence
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


def test_choices_need_the_same_tokens(models: tuple[Path, Path]) -> None:
    other = dataclasses.replace(TEACHER, point_head=dataclasses.replace(TEACHER.point_head, n_locations=4))  # type: ignore[type-var]
    with pytest.raises(DistillError, match="choose among different things"):
        Distillation(DISTILL, CONFIG, other)
    with pytest.raises(DistillError, match="only one of teacher and student"):
        Distillation(DISTILL, WITH_VOTES, TEACHER)
    changed = dataclasses.replace(read_config(models[0]), image=dataclasses.replace(CONFIG.image, mean=(0.5, 0.5, 0.5)))
    recipe, tokenizer = a_recipe(distill=DISTILL, max_crops=None), Tokenizer.from_file(TOKENIZER)
    with world("cpu") as here, pytest.raises(DistillError, match="these two differ"):
        build_teacher(models[1], changed, tokenizer, recipe, here, torch.float32)
    check_teacher(models[1], read_config(models[0]), tokenizer, recipe)
    with pytest.raises(DistillError, match="these two differ"):
        check_teacher(models[1], changed, tokenizer, recipe)
    with pytest.raises(DistillError, match="the choices of a grounding head are not cached"):
        check_teacher(models[1], read_config(models[0]), tokenizer, recipe, cached=True)
