"""What MolmoPoint loses: distributions over grounding tokens, points as coordinates, the point head, and verify."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from molmo2_golden import GOLDEN2, picture, read
from PIL import Image

pytest.importorskip("torch")

from molmo_edge import Molmo, Point
from molmo_edge.evaluation.ablation import Bench, ablate, parts_of
from molmo_edge.evaluation.comparison import log_softmax
from molmo_edge.evaluation.loss import Loss, ModelSpec, measure_loss
from molmo_edge.evaluation.pointing import is_valid_point_answer
from molmo_edge.evaluation.questions import UNSCORED, Question
from molmo_edge.evaluation.sharded_run import ask_shard, count_answered, merge_shards
from molmo_edge.export import CheckPhoto, ExportError, export_bundle
from molmo_edge.frontend.grounding_tokens import TRIPLE, with_coordinates
from molmo_edge.frontend.image_files import load_image
from molmo_edge.frontend.points import parse_points
from molmo_edge.runtimes.generate import Sampling
from molmo_edge.sdk.streaming import stream_answer
from molmo_edge.selfcheck import check_bundle, logit_gaps

NAME = "molmo_point"
CASE = read(f"{NAME}/expected.json")["cases"]["one_image"]
TOKENS = 12  # of answers: two points


def _question(text: str = CASE["question"], tokens: int = TOKENS, **other: Any) -> Question:
    values: dict[str, Any] = {
        "id": "0", "group": "points", "kind": UNSCORED, "image_id": "0", "text": text, "max_new_tokens": tokens,
        "image": lambda: picture(CASE["images"][0]), "score": lambda text: {"points": float(len(parse_points(text)))},
    }  # fmt: skip
    return Question(**{**values, **other})


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("molmo-point")
    photo = folder / "photo.png"
    Image.fromarray(picture(CASE["images"][0])).save(photo)
    check = CheckPhoto(photo, CASE["question"], max_new_tokens=TOKENS)
    export_bundle(GOLDEN2 / NAME, folder / "fp32", "fp32", check=check)
    small = {"decoder": "q4", "point_head": "int8"}
    export_bundle(GOLDEN2 / NAME, folder / "small", small, measure=False)
    return {"photo": photo, "fp32": folder / "fp32", "small": folder / "small"}


@pytest.fixture(scope="module")
def loss(bundles: dict[str, Path]) -> Loss:
    reference = ModelSpec(GOLDEN2 / NAME, precision="fp32", threads=1)
    candidates = [ModelSpec(bundles[name], threads=1) for name in ("fp32", "small")]
    return measure_loss(reference, candidates, [_question()], noise="none")


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    with Bench(GOLDEN2 / NAME, [_question(tokens=6)]) as made:
        yield made


def test_the_same_weights_lose_nothing(loss: Loss) -> None:
    exact, small = (model.metrics for model in loss.candidates)
    assert exact["kl_mean"].value < 1e-7 < small["kl_mean"].value < 100
    assert exact["same_top"].value == exact["same_answer"].value == exact["same_points"].value == 1
    assert exact["drift"].value == 0
    assert exact["kl_grounding"].value < 1e-7 < small["kl_grounding"].value
    assert small["kl_grounding"].n == sum(token >= 458 for token in CASE["generated_ids"][:TOKENS])
    assert small["kl_mean"].n == exact["kl_mean"].n == TOKENS


def test_an_answer_is_that_of_the_reference_with_coordinates(loss: Loss) -> None:
    (answer,) = loss.candidates[0].comparison.answers
    width, height = CASE["image_sizes"][0]
    golden = sorted((100 * x / width, 100 * y / height) for *_, x, y in CASE["points"][:2])
    found = [(point.x, point.y) for point in answer.reference_points]
    assert found == [pytest.approx(point, abs=0.051) for point in golden]
    assert "POINT" not in answer.reference_text


def test_coordinates_take_the_place_of_grounding_tokens() -> None:
    places = {"1": Point(10, 20, image=1), "2": Point(30, 40, image=1)}

    def points_of(text: str) -> list[Point]:
        return [places[triple[1]] for triple in TRIPLE.finditer(text) if triple[1] in places]

    triples = "<POINT_1><POINT_9><POINT_13>1<POINT_2><POINT_9><POINT_13>2"
    tag = '<points coords="1 1 100 200;1 2 300 400">cup</points>'
    assert with_coordinates(f'I see <points coords="{triples}<POINT_8>">cup</points>.', points_of) == f"I see {tag}."
    padding = "<POINT_3><POINT_9><POINT_13>1"
    for skipped in (padding + triples, triples + padding, triples.replace("1<POINT_2>", f"1{padding}<POINT_2>")):
        assert with_coordinates(f'<points coords="{skipped}">cup</points> ;"', points_of) == f'{tag} ;"'
    for cut in (f'<points coords="{triples}', triples):
        found = with_coordinates(cut, points_of)
        assert [(p.x, p.y) for p in parse_points(found)] == [(10, 20), (30, 40)]
    assert with_coordinates("None.", points_of) == "None."
    assert with_coordinates(f"{padding} at (10.0, 20.0)", points_of) == " at (10.0, 20.0)"


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        ('<points coords="1 1 100 200;2 2 300 400">cups</points>', True),
        ('<points alt="x" coords="1 1 100 200">cups</points>', True),
        ('<tracks coords="0.5 1 100 200">a cup</tracks>', True),
        ('<points coords="1 1 100 200">cups</tracks>', False),
        ('<points coords="1 1 100 200"></points>', False),
        ('<points coords="1">cups</points>', False),
        ('There: <points coords="1 1 100 200">cups</points>', False),
        ('<points coords="1 1 100 200">cups</points> <points coords="1 2 100 200">cups</points>', False),
        ('<points coords="1 1 100 200">cups', False),
    ],
)
def test_formats_of_molmo2_are_valid(text: str, valid: bool) -> None:
    assert is_valid_point_answer(text) == valid


def test_the_probability_of_the_patch_token_is_shared(bundles: dict[str, Path]) -> None:
    with Molmo(bundles["fp32"], threads=1) as molmo:
        runtime, scene = molmo.engine.runtime, molmo.encode(picture(CASE["images"][0]))
        assert scene.grounding is not None
        assert scene.cache is not None
        cache: Any = scene.cache.copy()
        grounded, ids = scene.grounding.begin(cache.states), scene.grounding.token_ids
        text = runtime.forward(grounded.embed(CASE["generated_ids"][0]), cache)
        best, graded, shared = (
            grounded.logits(text, cache.states[-1], patches) for patches in ("best", "graded", "shared")
        )
    patches, marker = slice(ids.first, ids.slots), best[ids.first : ids.slots].max()
    assert marker == text[molmo.config.point_head.patch_token] if molmo.config.point_head else False
    assert np.log(np.exp(shared[patches].astype(np.float64)).sum()) == pytest.approx(marker, abs=1e-4)
    assert graded.argmax() == best.argmax()
    assert graded[patches].argmax() == best[patches].argmax() == shared[patches].argmax()
    assert (np.sort(graded[patches])[-2] < marker).all()
    for other in (graded, shared):
        np.testing.assert_array_equal(other[: ids.first], best[: ids.first])
        np.testing.assert_array_equal(np.isinf(other), np.isinf(best))
    assert np.isfinite(log_softmax(shared)[~np.isinf(shared)]).all()


def test_the_point_head_is_a_part_of_its_own(bench: Bench) -> None:
    assert parts_of(bench.config)[-1] == "point_head"
    found = {part.precision: part for part in ablate(bench, ["q8", "int8", "q4"], ["point_head"])}
    assert list(found) == ["q8", "int8"], "four bits are not offered"
    for part in found.values():
        assert 0 < part.kl < 0.5
        assert part.saved > 0


def test_a_point_head_that_no_answer_uses_is_not_measured() -> None:
    with Bench(GOLDEN2 / NAME, [_question(tokens=1)]) as bench:
        assert not bench.points
        assert list(ablate(bench, ["int8"], ["point_head"])) == []


@pytest.mark.parametrize(
    ("model", "precision", "message"),
    [
        (NAME, {"point_head": "q4"}, "'q4' is not a supported precision for point_head"),
        ("molmo2_qwen3", {"point_head": "int8"}, "this model has no point_head"),
    ],
)
def test_precisions_of_a_point_head(model: str, precision: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=message):
        export_bundle(GOLDEN2 / model, tmp_path / "b", precision)


def test_the_point_head_stays_float32_unless_it_is_named(bundles: dict[str, Path], tmp_path: Path) -> None:
    def precision(folder: Path) -> str:
        found = json.loads((folder / "molmo_edge.json").read_text())["components"]["point_head"]["precision"]
        return str(found)

    assert precision(bundles["small"]) == "int8"
    export_bundle(GOLDEN2 / NAME, tmp_path / "q4", "q4", measure=False)
    assert precision(tmp_path / "q4") == "fp32"


def test_a_bundle_verifies_its_recorded_points(bundles: dict[str, Path]) -> None:
    report = check_bundle(bundles["fp32"], threads=1)
    assert report.passed
    assert report.exact
    assert report.check is not None
    ids = list(report.token_ids)
    assert ids == CASE["generated_ids"][:TOKENS]
    with Molmo(bundles["fp32"], threads=1) as molmo:
        scene, question = molmo.encode(bundles["photo"]), CASE["question"]
        assert scene.grounding is not None
        tokens = scene.grounding.token_ids
        assert logit_gaps(molmo.engine, scene, question, ids, complete=False) == [0.0] * TOKENS
        at = next(i for i, token in enumerate(ids) if tokens.first <= token < tokens.slots)
        other = [*ids[:at], ids[at] + 1]
        *same, gap = logit_gaps(molmo.engine, scene, question, other, complete=False)
        assert same == [0.0] * at
        assert 0 < gap < 100, "a neighbouring patch is behind by its own logit, not by that of a closed id"
        out_of_order = [*ids[:at], tokens.locations]
        assert logit_gaps(molmo.engine, scene, question, out_of_order, complete=False)[-1] == np.inf


def test_eval_scores_and_stores_coordinates(bundles: dict[str, Path], tmp_path: Path) -> None:
    with Molmo(bundles["fp32"], threads=1) as molmo:
        ask_shard(molmo, [_question(tokens=30)], tmp_path, "s")
        answer = stream_answer(molmo.engine, bundles["photo"], CASE["question"], Sampling(30)).answer
    (line,) = merge_shards([_question(tokens=30)], tmp_path, "s") or []
    assert line["scores"]["points"] == len(parse_points(line["answer"])) == len(answer.points) > 0
    assert "POINT" in answer.text
    assert "POINT" not in line["answer"]


def test_unreadable_images_are_asked_again(bundles: dict[str, Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no photo")
    questions = [
        _question(tokens=1, id="good"),
        _question(tokens=1, id="bad", image_id="1", image=lambda: load_image(broken)),
    ]
    skipped: list[str] = []
    with Molmo(bundles["fp32"], threads=1) as molmo:
        for _ in range(2):
            ask_shard(molmo, questions, tmp_path, "s", on_skipped=skipped.append)
            assert count_answered(tmp_path, "s") == 1
            good, bad = merge_shards(questions, tmp_path, "s") or []
            assert "answer" in good
            assert "broken.png" in bad["error"]
            assert len((tmp_path / "s.jsonl").read_text().splitlines()) == 2
        assert len(skipped) == 2
        Image.fromarray(picture("synth_378x378")).save(broken)
        ask_shard(molmo, questions, tmp_path, "s", on_skipped=skipped.append)
    assert all("answer" in line for line in merge_shards(questions, tmp_path, "s") or [])
    assert len(skipped) == 2


@pytest.mark.parametrize("command", ["loss", "ablate", "quantize"])
def test_commands_skip_unreadable_photos(
    command: str, bundles: dict[str, Path], cli: Callable[..., Any], tmp_path: Path
) -> None:
    photos, bundle = tmp_path / "photos", bundles["fp32"]
    photos.mkdir()
    (photos / "broken.png").write_bytes(b"no photo")
    asked = photos / "prompts.jsonl"
    asked.write_text('{"image": "broken.png", "question": "?"}\n')
    arguments: dict[str, tuple[Any, ...]] = {
        "loss": (bundle, bundle, "--noise", "none"),
        "ablate": (bundle, "--precisions", "int8"),
        "quantize": (bundle, "--precisions", "int8", "--max-kl", 9, "--out", tmp_path / "out"),
    }
    status, _, err = cli(command, *arguments[command], "--suite", f"photos:{photos}", "--quiet")
    assert status == 1
    assert "no image can be read" in err
    if command == "loss":
        Image.fromarray(picture("synth_378x378")).save(photos / "good.png")
        asked.write_text(asked.read_text() + '{"image": "good.png", "question": "?"}\n')
        monkey = cli(command, *arguments[command], "--suite", f"photos:{photos}", "--quiet", "--json")
        assert monkey[0] == 1
        assert "1 image could not be read" in monkey[2]
        assert json.loads(monkey[1])["images"] == 1
