"""Loss on the golden MolmoE: a copy loses nothing, four bits lose something, and a damaged expert is found by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from exported import GOLDEN, bundle

from molmo_edge.evaluation.ablation import Bench
from molmo_edge.evaluation.fault_localization import open_candidate, swap_parts, weight_differences
from molmo_edge.evaluation.loss import Loss, LossError, ModelSpec, check_comparable, measure_loss
from molmo_edge.evaluation.metrics import METRICS
from molmo_edge.evaluation.questions import Question
from molmo_edge.evaluation.reference_outputs import NoQuestionsError
from molmo_edge.evaluation.report import write_report
from molmo_edge.evaluation.suites import load_suite
from molmo_edge.export import export_bundle
from molmo_edge.export.bundle_weights import BundleTensors
from molmo_edge.frontend.points import format_points
from molmo_edge.modeling import load_checkpoint
from molmo_edge.modeling.decoder import SparseFFN
from molmo_edge.modeling.weights import save_checkpoint

CROPS = 1


@pytest.fixture(scope="module")
def questions() -> list[Question]:
    """About three scenes. Answers are cut: random weights do not generate the end token."""
    return [replace(question, max_new_tokens=16) for question in load_suite("nano-val", limit=3)]


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden MolmoE as a bundle, with one matrix of one expert flipped."""
    folder = tmp_path_factory.mktemp("damaged")
    model = load_checkpoint(GOLDEN / "molmoe")[0]
    ffn = model.decoder.blocks[1].ffn
    assert isinstance(ffn, SparseFFN)
    with torch.no_grad():
        ffn.down[5] = -20 * ffn.down[5].flip(0)
    save_checkpoint(model, GOLDEN / "molmoe" / "tokenizer.json", folder / "checkpoint")
    export_bundle(folder / "checkpoint", folder / "bundle")
    return folder / "bundle"


@pytest.fixture(scope="module")
def loss(questions: list[Question], damaged: Path) -> Loss:
    candidates = [bundle("molmoe"), bundle("molmoe", "q4"), damaged]
    return measure_loss(
        ModelSpec(bundle("molmoe"), threads=2),
        [ModelSpec(c, threads=2) for c in candidates],
        questions,
        max_crops=CROPS,
    )


def test_a_copy_loses_exactly_nothing(loss: Loss) -> None:
    copy = loss.candidates[0]
    for name, figure in copy.metrics.items():
        none = METRICS[name].lossless
        assert figure.value == none, name
        assert figure.n > 0, name
        if name not in ("same_answer", "same_points"):  # Wilson's interval has a width
            assert figure.low == figure.high == none, name
    assert "first_divergence" not in copy.metrics
    for group, by_name in copy.scores.items():
        for name, score in by_name.items():
            d = score.difference
            assert d.value == d.low == d.high == 0, (group, name)
    assert {"point/scenes", "count/scenes", "absent/scenes", "caption/scenes"} <= set(copy.scores)


def test_four_bits_lose_something_and_say_how_much(loss: Loss) -> None:
    q4 = loss.candidates[1].metrics
    assert q4["kl_mean"].low > 0
    assert q4["kl_median"].value < q4["kl_mean"].value < q4["kl_p99"].value
    assert 0 < q4["vision"].value < q4["vision_worst"].value
    assert 0 < q4["image"].value < q4["image_worst"].value
    assert 0.8 < q4["router"].value < 1
    assert abs(q4["perplexity_ratio"].value - 1) > 1e-3
    assert loss.candidates[1].info.bytes < loss.reference.bytes
    assert q4["kl_mean"].n == loss.tokens
    assert q4["same_answer"].n == loss.questions


def test_noise_is_far_below_the_loss(loss: Loss) -> None:
    assert loss.noise is not None
    assert 0 < loss.noise.metrics["kl_mean"].value < 1e-3 * loss.candidates[1].metrics["kl_mean"].value
    assert 0 < loss.noise.metrics["vision"].value < 1e-6


def test_a_damaged_expert_changes_at_least_three_metrics(loss: Loss) -> None:
    damaged, noise = loss.candidates[2].metrics, loss.noise
    assert noise is not None
    assert damaged["vision"].value == damaged["image"].value == 0, "the image's part is sound"
    shown = [
        name
        for name in ("kl_mean", "kl_median", "kl_p99", "same_top", "perplexity_ratio", "same_answer", "router")
        if name in damaged
        and abs(damaged[name].value - METRICS[name].lossless)
        > 10 * abs(noise.metrics[name].value - METRICS[name].lossless)
        and abs(damaged[name].value - METRICS[name].lossless) > 1e-3
    ]
    assert len(shown) >= 3, shown


def test_a_damaged_expert_is_named(questions: list[Question], damaged: Path) -> None:
    with Bench(bundle("molmoe"), questions[:6], max_crops=CROPS) as bench:
        parts = list(swap_parts(bench, damaged))
        found = weight_differences(bench, open_candidate(bench.reference, damaged))
        assert weight_differences(bench, open_candidate(bench.reference, bundle("molmoe"))) == []
    by_kl = sorted(parts, key=lambda part: -part.kl)
    assert by_kl[0].part == "experts"
    assert by_kl[0].kl > 0
    assert {part.part: part.kl for part in by_kl[1:]} == dict.fromkeys((part.part for part in by_kl[1:]), 0.0)
    assert [(m.name, m.part, m.is_outlier) for m in found] == [
        ("model.transformer.blocks.1.mlp.experts.5.down_proj.weight", "experts", True)
    ]


def test_gains_moved_by_a_calibration_are_not_a_fault(questions: list[Question], tmp_path: Path) -> None:
    """The router is float32 in both models; only the split of a scale between its norm and its matrix differs."""
    export_bundle(GOLDEN / "molmoe", tmp_path / "b", {"decoder": "int8"}, calibrate=GOLDEN, measure=False)
    with Bench(bundle("molmoe"), questions[:6], max_crops=CROPS) as bench:
        kl = {part.part: part.kl for part in swap_parts(bench, tmp_path / "b")}
        found = weight_differences(bench, open_candidate(bench.reference, tmp_path / "b"))
    assert max(kl["router"], kl["vision_encoder"], kl["embed_tokens"]) < 1e-9 < 1e-6 < kl["experts"]
    assert not [m.name for m in found if m.is_outlier]
    assert not [m for m in found if m.part == "router" and m.error > 1e-5]


@pytest.mark.parametrize("name", ["lm_head.weight", "model.transformer.blocks.1.attn.att_proj.weight"])
@pytest.mark.parametrize("factor", [-20.0, float("nan")])
def test_a_damaged_matrix_without_similar_ones_is_named(
    name: str, factor: float, questions: list[Question], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = BundleTensors.get
    with Bench(bundle("molmoe"), questions[:2], max_crops=CROPS) as bench:
        broken = BundleTensors(bundle("molmoe"))
        monkeypatch.setattr(broken, "get", lambda n: plain(broken, n) * (factor if n == name else 1))
        found = weight_differences(bench, broken)
    assert [(m.name, m.is_outlier) for m in found] == [(name, True)]


def test_the_report_is_self_contained(loss: Loss, tmp_path: Path) -> None:
    measured = loss.candidates[1]  # random weights give no points, so the test adds some
    answers = measured.comparison.answers
    answers[0] = replace(
        answers[0],
        reference_text=format_points([(20.0, 30.0)], "dog <b>"),
        text=format_points([(50.0, 70.0)], "dog <b>"),
        drift=(12.5,),
    )
    write_report(loss, tmp_path / "report")
    page = (tmp_path / "report" / "report.html").read_text()
    assert [name for name in loss.candidates[1].metrics if METRICS[name].title not in page] == []
    assert page.count("<svg") == 2
    assert page.count("data:image/jpeg;base64,") == 1
    assert "dog &lt;b&gt;" in page
    assert "dog <b>" not in page
    assert not [
        word for word in ("http://", "https://", "src='/", "<script") if word in page.replace("http://www.w3.org", "")
    ]
    data = json.loads((tmp_path / "report" / "loss.json").read_text())
    assert data["questions"] == loss.questions
    assert data["noise"]["kind"] == "threads"
    assert data["candidates"][0]["figures"]["kl_mean"] == {"value": 0.0, "low": 0.0, "high": 0.0, "n": loss.tokens}


def test_a_checkpoint_on_pytorch_equals_its_bundle(questions: list[Question]) -> None:
    found = measure_loss(
        ModelSpec(GOLDEN / "molmoe", precision="fp32"),
        [ModelSpec(bundle("molmoe"))],
        questions[:4],
        noise="bf16",
        max_crops=CROPS,
    )
    figures = found.candidates[0].metrics
    assert figures["kl_mean"].value < 1e-8
    assert figures["same_top"].value == 1
    assert figures["vision_worst"].value < 1e-6
    assert figures["router"].value > 0.999
    assert found.noise is not None
    assert found.noise.engine == "pytorch bf16"
    assert found.noise.metrics["kl_mean"].value > 1e3 * figures["kl_mean"].value


def test_questions_without_images_are_refused(questions: list[Question]) -> None:
    for asked in ([], [replace(questions[0], words_alone=True)]):
        with pytest.raises(NoQuestionsError, match="nothing to compare"):
            measure_loss(ModelSpec(bundle("molmoe")), [], asked)


def test_models_with_different_prompts_are_refused() -> None:
    with pytest.raises(LossError, match="have different tokenizers"):
        check_comparable(bundle("molmoe"), bundle("qwen"))
    with pytest.raises(LossError, match="noise"):
        measure_loss(ModelSpec(bundle("molmoe")), [], [], noise="luck")
