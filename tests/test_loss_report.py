"""A loss report starts with what users ask: same points, drift, the part that causes the loss; tokens come later."""

from __future__ import annotations

import html
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from exported import GOLDEN, bundle

from molmo_edge.evaluation.loss import Loss, ModelLoss, ModelSpec, measure_loss
from molmo_edge.evaluation.metrics import compute_metrics
from molmo_edge.evaluation.report import write_report
from molmo_edge.evaluation.suites import load_suite
from molmo_edge.export import export_bundle
from molmo_edge.frontend.points import format_points

Cli = Callable[..., tuple[int, str, str]]
QUESTIONS = ("Same points?", "How far do points drift?", "Same answers, word for word?", "Which part causes the loss?")


@pytest.fixture(scope="module")
def loss(tmp_path_factory: pytest.TempPathFactory) -> Loss:
    """The loss of a copy, and of bundles with one component in four bits each."""
    folder = tmp_path_factory.mktemp("candidates")
    candidates = {"copy": bundle("molmoe")}
    for part in ("vision_encoder", "connector", "decoder"):
        candidates[part] = folder / part
        export_bundle(GOLDEN / "molmoe", folder / part, {part: "q4"}, measure=False)
    models = [ModelSpec(path, threads=2, name=name) for name, path in candidates.items()]
    questions = [replace(question, max_new_tokens=6) for question in load_suite("nano-val", limit=2)]
    return measure_loss(ModelSpec(bundle("molmoe"), threads=2), models, questions, max_crops=0)


def pointed(measured: ModelLoss) -> ModelLoss:
    """With points in two answers, one of which moved: random weights give none."""
    answers = list(measured.comparison.answers)
    for i, drift in enumerate(((12.5,), (0.0,))):
        text = format_points([(20.0, 30.0)], "dog")
        answers[i] = replace(answers[i], reference_text=text, text=text, drift=drift)
    comparison = replace(measured.comparison, answers=answers)
    return replace(measured, comparison=comparison, metrics=compute_metrics(comparison))


def page_of(loss: Loss, folder: Path) -> str:
    write_report(loss, folder)
    return (folder / "report.html").read_text()


def rows_of(page: str) -> dict[str, list[str]]:
    """{title: cells} of the page's first table."""
    table = page[page.index("<table") : page.index("</table>")]
    rows = [re.findall(r"<t[dh]>(.*?)</t[dh]>", row) for row in table.split("<tr>")[1:]]
    return {row[0]: [html.unescape(cell) for cell in row[1:]] for row in rows}


def test_the_page_starts_with_points_and_ends_with_tokens(loss: Loss, tmp_path: Path) -> None:
    page = page_of(replace(loss, candidates=tuple(map(pointed, loss.candidates))), tmp_path / "report")
    places = [page.index(word) for word in (*QUESTIONS, "Rings are", "drift of a point", "KL per token, mean")]
    assert places == sorted(places)
    assert "KL" not in page[: page.index("Which part causes the loss?")]
    assert "nats" not in page[: page.index("Rings are")]


def test_the_summary_gives_same_points_and_drift(loss: Loss, tmp_path: Path) -> None:
    one = replace(loss, noise=None, candidates=(pointed(loss.candidates[3]),))
    said = rows_of(page_of(one, tmp_path / "report"))
    assert said["Same points?"][0].startswith("1 of 2 answers with points")
    assert said["How far do points drift?"][0].startswith("6.2 % of the diagonal")


def test_the_summary_names_the_part_that_causes_the_loss(loss: Loss, tmp_path: Path) -> None:
    noise, copy, vision, connector, decoder = rows_of(page_of(loss, tmp_path / "report"))["Which part causes the loss?"]
    assert (noise, copy) == ("", "nothing is lost")
    assert vision.startswith("the vision tower and connector")
    assert connector.startswith("the connector")
    assert decoder.startswith("the decoder")
    found = {m.info.name: m.breakdown for m in loss.candidates}
    assert found["decoder"] is not None
    assert found["decoder"].decoder is None, "its image features are the reference's"
    assert found["vision_encoder"] is not None
    assert found["vision_encoder"].decoder is not None
    assert found["vision_encoder"].decoder["kl_mean"].value == 0 < found["vision_encoder"].whole["kl_mean"].value


def test_a_loss_no_larger_than_noise_is_called_noise(loss: Loss, tmp_path: Path) -> None:
    again = replace(loss, noise=replace(loss.candidates[3], breakdown=None))
    assert rows_of(page_of(again, tmp_path / "report"))["Which part causes the loss?"][4] == "no more than noise"


def test_features_of_rotated_channels_are_not_compared(tmp_path: Path) -> None:
    export_bundle(GOLDEN / "molmoe", tmp_path / "rotated", {"decoder": "q8"}, rotate=True, measure=False)
    models = [ModelSpec(path, threads=1, name=path.name) for path in (tmp_path / "rotated", bundle("molmoe"))]
    questions = [replace(question, max_new_tokens=6) for question in load_suite("nano-val", limit=1)]
    for reference in models:
        loss = measure_loss(reference, models, questions, noise="none", max_crops=0)
        rotated, plain = loss.candidates
        same, other = (rotated, plain) if reference is models[0] else (plain, rotated)
        assert same.rotation_differs == ()
        assert same.metrics["image"].value < 1e-6
        assert other.rotation_differs == ("decoder",)
        assert "image" not in other.metrics
        assert other.metrics["vision"].value < 1e-6, "the tower of MolmoE has no rotated channels"
        assert 0 < other.metrics["kl_mean"].value < 0.1
        said = rows_of(page_of(loss, tmp_path / reference.name))["Which part causes the loss?"]
        assert said[loss.candidates.index(other)].startswith("not measured: the channels of only one")
        assert loss.to_dict()["candidates"][loss.candidates.index(other)]["rotation_differs"] == ["decoder"]


def test_a_single_candidate_has_no_size_plot(loss: Loss, tmp_path: Path) -> None:
    alone = replace(loss, candidates=loss.candidates[3:])
    page = page_of(alone, tmp_path / "report")
    assert "MB of weights" not in page
    assert "Size and loss" not in page
    assert "drift of a point" not in page, "nothing moved: an empty plot shows nothing"
    assert "MB of weights" in page_of(loss, tmp_path / "report")


def test_the_command_prints_in_the_same_order(cli: Cli) -> None:
    arguments = ["loss", bundle("molmoe"), bundle("molmoe", "q4"), "--max-crops", 0, "--limit", 1, "--noise", "none"]
    status, stdout, _ = cli(*arguments)
    assert status == 0
    words = ("Same answers, word for word?", "Which part causes the loss?", "identical answers", "KL per token, mean")
    places = [stdout.index(word) for word in (*words, "vision features")]
    assert places == sorted(places)


def test_parts_are_ranked_with_points_first(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # a heading on one line
    status, stdout, _ = cli("ablate", bundle("molmoe"), "--precisions", "q4", "--limit", 1, "--max-crops", 0)
    assert status == 0
    assert stdout.index("same points %") < stdout.index("drift %") < stdout.index("KL per token")


def test_an_export_refers_to_loss_instead_of_printing_output_errors(cli: Cli, tmp_path: Path) -> None:
    """In four bits the decoder's output on random ids differs by more than half, but its answers hardly differ."""
    status, _, stderr = cli("export", bundle("molmoe"), "--precision", "q4", "--out", tmp_path / "q4")
    assert status == 0
    assert "decoder_q4.onnx" in stderr
    assert "relative error" not in stderr
    assert f"molmo-edge loss {bundle('molmoe')} {tmp_path / 'q4'}" in stderr.replace("\n", " ")
    status, _, stderr = cli("export", bundle("molmoe"), "--precision", "fp32", "--out", tmp_path / "fp32")
    assert status == 0
    assert "molmo-edge loss" not in stderr, "nothing is quantized"
