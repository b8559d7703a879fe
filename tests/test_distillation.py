"""Runs with a teacher: a lower divergence, equal losses after a restart, other tokenizers, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_checkpoints import GOLDEN, PLAIN, a_recipe, spelled, write_checkpoint
from training_run import Noise

from molmo_edge.checkpoints.hub_config import read_config
from molmo_edge.checkpoints.weight_files import open_tensors
from molmo_edge.data.examples import Annotation, Example
from molmo_edge.frontend.tokenizer import Tokenizer
from molmo_edge.modeling import load_checkpoint
from molmo_edge.training.alignment import aligned, answer_runs, shared_tokens
from molmo_edge.training.distillation import DistillConfig, DistillError, matching_layers
from molmo_edge.training.encoding import Encoder, Encoding, collate
from molmo_edge.training.fake_quantization import Qat
from molmo_edge.training.forward import ForwardConfig, Trainable
from molmo_edge.training.parallel import world
from molmo_edge.training.recipe import Recipe
from molmo_edge.training.teacher import build_teacher, shares_towers
from molmo_edge.training.trainer import Data, Trainer, build, cache_features

pytestmark = pytest.mark.usefixtures("one_thread")
NOISE = Noise("noise", 12, 2)


def recipe(config: DistillConfig, **changes: Any) -> Recipe:
    return a_recipe(forward=ForwardConfig(answer_dropout=0.0, recompute=False), **{"distill": config, **changes})


def distill(
    student: Path,
    teacher: Path,
    out: Path,
    used: Recipe,
    *,
    stop: int | None = None,
    features: Path | None = None,
    same_towers: bool | None = None,
) -> list[dict[str, Any]]:
    """The lines of the log of a run. stop: steps after which the process disappears.

    same_towers: sets the attribute of the trainer.
    """
    config, source = read_config(student), open_tensors(student)
    tokenizer = Tokenizer.from_file(student / "tokenizer.json")
    data = Data([NOISE], [1.0], [NOISE])
    with world("cpu") as here:
        theirs, caches = read_config(teacher), [None, None]
        if features is not None:
            parts = ((config, source), (theirs, open_tensors(teacher)))
            caches = [cache_features(features, *part, data, used, here) for part in parts]
        model = build(config, source, "student", used, here, teacher=theirs)
        online = build_teacher(
            teacher, config, tokenizer, used, here, torch.float32, features=caches[1], student_features=caches[0]
        )
        trainer = Trainer(model, tokenizer, data, used, out, here, caches[0], online)
        if same_towers is not None:
            trainer.same_towers = same_towers
        if stop is not None:
            update = trainer.update

            def once(*args: Any) -> Any:
                if trainer.step == stop:
                    raise KeyboardInterrupt
                return update(*args)

            trainer.update = once  # type: ignore[method-assign]
            with pytest.raises(KeyboardInterrupt):
                trainer.train()
        else:
            trainer.train()
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def losses(lines: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    return {line["step"]: line for line in lines if "loss" in line}


ALL = DistillConfig(reverse=0.3, temperature=1.5, top_k=8, hidden=0.5, image=0.5)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("teacher") / "dense", "dense", seed=1)


@pytest.fixture(scope="module")
def whole(small_molmoe: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return distill(small_molmoe, teacher, tmp_path_factory.mktemp("whole"), recipe(ALL))


def test_the_student_approaches_the_teacher(whole: list[dict[str, Any]]) -> None:
    log = losses(whole)
    for name in ("divergence", "hidden_loss", "image_loss"):
        assert log[8][name] < log[1][name], name
    measured = [line["validation_divergence"] for line in whole if "validation_divergence" in line]
    assert measured
    assert measured[-1] < log[1]["divergence"]


def test_a_run_that_was_killed_goes_on_as_if_it_had_not_been(
    small_molmoe: Path, teacher: Path, tmp_path: Path, whole: list[dict[str, Any]]
) -> None:
    distill(small_molmoe, teacher, tmp_path, recipe(ALL), stop=6)
    again = losses(distill(small_molmoe, teacher, tmp_path, recipe(ALL)))
    for step, line in losses(whole).items():
        for name in ("loss", "divergence", "hidden_loss", "image_loss", "norm_connector"):
            assert again[step][name] == pytest.approx(line[name], rel=1e-5), (step, name)


def test_a_teacher_of_the_same_weights_has_nothing_to_say(small_checkpoints: dict[str, Path], tmp_path: Path) -> None:
    config = DistillConfig(top_k=0, hidden=1.0, image=1.0)
    log = losses(distill(*[small_checkpoints["dense"]] * 2, tmp_path, recipe(config, steps=1)))
    assert log[1]["divergence"] == pytest.approx(0, abs=1e-5)
    assert log[1]["hidden_loss"] == pytest.approx(0, abs=1e-5)
    assert log[1]["image_loss"] == pytest.approx(0, abs=1e-5)


def test_cached_features_of_two_towers(small_molmoe: Path, teacher: Path, tmp_path: Path) -> None:
    used = recipe(ALL, frozen=("vision",), steps=3)
    crops = losses(distill(small_molmoe, teacher, tmp_path / "crops", used))
    cached = losses(distill(small_molmoe, teacher, tmp_path / "cached", used, features=tmp_path / "features"))
    for step, line in crops.items():
        for name in ("loss", "divergence", "hidden_loss", "image_loss"):
            assert cached[step][name] == pytest.approx(line[name], rel=1e-4), (step, name)


def test_features_of_the_same_frozen_towers_are_computed_once(
    small_checkpoints: dict[str, Path], small_molmoe: Path, teacher: Path, tmp_path: Path
) -> None:
    student = small_checkpoints["dense"]
    qat = Qat("int8", share=0.5)
    used = recipe(DistillConfig(image=1.0), frozen=("vision",), steps=4, qat=qat)
    runs = [losses(distill(student, student, tmp_path / str(s), used, same_towers=s)) for s in (True, False)]
    for step, line in runs[0].items():
        for name in ("loss", "divergence", "image_loss", "norm_connector"):
            assert runs[1][step][name] == pytest.approx(line[name], rel=1e-6, abs=1e-9), (step, name)
    with world("cpu") as here:
        models = {
            name: build(read_config(path), open_tensors(path), name, replaced, here).molmo
            for name, path, replaced in (
                ("frozen", student, used),
                ("trained", student, recipe(DistillConfig())),
                ("other", teacher, used),
                ("molmoe", small_molmoe, used),
            )
        }
    assert shares_towers(models["frozen"], models["trained"])
    assert not shares_towers(models["trained"], models["frozen"]), "the student's would change"
    assert not shares_towers(models["frozen"], models["other"])
    assert shares_towers(models["frozen"], models["molmoe"]), "another decoder, but the same towers"


def test_layers_are_matched_by_depth() -> None:
    assert matching_layers(2, 6) == [2, 5]
    assert matching_layers(3, 3) == [0, 1, 2]
    assert matching_layers(4, 3) == [0, 1, 2, 2]


# --- different tokenizers ---------------------------------------------------------------------------------------------


ASKED = (
    Annotation("demo", ("What is there?", "two dogs and a cup", "And this?", "Ein Löffel, 7 of them.")),
    Annotation("demo", ("Why?", "Because.")),
)


def test_predictions_are_paired_where_tokens_begin_at_the_same_byte() -> None:
    ours = Tokenizer.from_file(GOLDEN / "molmoe" / "tokenizer.json")
    theirs = spelled(ours)
    image = dataclasses.replace(read_config(GOLDEN / "molmoe").image, max_crops=1)
    example = Example(None, ASKED)
    samples = [Encoder(t, image, Encoding())(example, np.random.default_rng(3)) for t in (ours, theirs)]
    runs = [answer_runs(sample.packed, t) for sample, t in zip(samples, (ours, theirs), strict=True)]
    texts = {run.text.decode() for run in runs[0].values()}
    assert texts == {"two dogs and a cup", "Ein Löffel, 7 of them.", "Because."}
    pairs = aligned(*runs)
    counts = [sample.answered for sample in samples]
    assert counts[0] < counts[1], "more tokens for the same text"
    answers = []
    for sample, tokenizer in zip(samples, (ours, theirs), strict=True):
        at = np.flatnonzero(sample.packed.loss_weights)
        answers.append([(int(p), sample.packed, tokenizer) for p in at])
    for one, other in pairs:
        rest = []
        for position, packed, tokenizer in (answers[0][one], answers[1][other]):
            end = position + int(np.flatnonzero(packed.targets[position:] == tokenizer.special.eos)[0])
            rest.append(tokenizer.decode(packed.targets[position:end].tolist()))
        assert rest[0] == rest[1], "both continue the same text"
    assert len(pairs) == counts[0], "every token of the coarser tokenizer begins where one of the finer does"
    assert len(aligned(runs[0], runs[0])) == counts[0]


def test_answers_are_compared_up_to_their_first_difference() -> None:
    tokenizer = Tokenizer.from_file(GOLDEN / "molmoe" / "tokenizer.json")
    image = dataclasses.replace(read_config(GOLDEN / "molmoe").image, max_crops=1)
    runs = []
    for answer in ("a red cup", "a red dog"):
        example = Example(None, (Annotation("demo", ("What?", answer)),))
        sample = Encoder(tokenizer, image, Encoding())(example, np.random.default_rng(0))
        runs.append(answer_runs(sample.packed, tokenizer))
    pairs = aligned(*runs)
    (run,) = runs[0].values()
    same = [n for n, start in enumerate(run.starts) if start <= len(b"a red ")]
    assert pairs[:, 0].tolist() == same[: len(pairs)]
    assert 0 < len(pairs) < len(run.starts)


def test_tokens_are_identified_by_their_bytes() -> None:
    ours = Tokenizer.from_file(GOLDEN / "molmoe" / "tokenizer.json")
    theirs = spelled(ours)
    assert shared_tokens(ours, ours, 512, 512) is None
    shared = shared_tokens(ours, theirs, 512, 512)
    assert shared is not None
    assert (shared[0] != shared[1]).any()
    for a, b in zip(*map(torch.Tensor.tolist, shared), strict=True):
        assert ours.token_bytes(a) == theirs.token_bytes(b)
    assert (shared[0][-1], shared[1][-1]) == (ours.special.eos, theirs.special.eos)


def test_a_teacher_with_another_tokenizer(small_molmoe: Path, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "teacher", "dense", seed=1)
    own = spelled(Tokenizer.from_file(other / "tokenizer.json"))
    (other / "tokenizer.json").write_text(own.definition, encoding="utf-8")
    log = losses(distill(small_molmoe, other, tmp_path / "run", recipe(ALL)))
    assert log[8]["divergence"] < log[1]["divergence"]
    assert log[8]["hidden_loss"] < log[1]["hidden_loss"]


def test_a_run_is_finished_whatever_its_log_and_plot_are(
    small_molmoe: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_run: Path) -> None:
        assert (tmp_path / "model" / "config.json").exists(), "the model comes first"
        raise RuntimeError("no room")

    monkeypatch.setattr("molmo_edge.training.trainer.plot_experts", broken)
    lines = distill(small_molmoe, teacher, tmp_path, recipe(DistillConfig(divergence=0.0, hidden=1.0), steps=1))
    assert any("validation_loss" in line for line in lines)
    assert not any("validation_divergence" in line for line in lines), "it has no weight"


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reverse": 1.5}, "from 0 to 1"),
        ({"temperature": 0.0}, "must be positive"),
        ({"top_k": -1}, "top_k must be 0"),
        ({"hidden": -1.0}, "hidden is the weight of a loss"),
        ({"divergence": 0.0}, "all weights of the teacher's losses are 0"),
    ],
)
def test_impossible_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DistillError, match=message):
        DistillConfig(**changes)


def test_the_grounding_loss_needs_two_grounding_heads(small_checkpoints: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(DistillError, match="a grounding head in both"):
        distill(
            small_checkpoints["experts"],
            small_checkpoints["dense"],
            tmp_path,
            recipe(DistillConfig(grounding=1.0), steps=1),
        )


def test_without_a_teacher_the_sums_are_zero() -> None:
    molmo, tokenizer, config = load_checkpoint(GOLDEN / "molmoe")
    encode = Encoder(tokenizer, dataclasses.replace(config.image, max_crops=1), Encoding())
    batch = collate([encode(Example(None, ASKED), np.random.default_rng(0))])
    with torch.no_grad():
        sums = Trainable(molmo, PLAIN)(batch)
    assert float(sums.divergence) == float(sums.hidden_loss) == float(sums.image_loss) == 0
