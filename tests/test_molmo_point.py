"""MolmoPoint on every engine against golden values: the grounding head, its cache, and greedy answers that point."""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from molmo2_golden import GOLDEN, GOLDEN2, inputs_of, picture, read, tokenizer_of
from safetensors.numpy import load_file

pytest.importorskip("torch")

import torch

from molmo_edge import Molmo, Point
from molmo_edge.checkpoints.hub_config import read_config
from molmo_edge.checkpoints.weight_files import open_tensors
from molmo_edge.errors import EngineError
from molmo_edge.export import CheckPhoto, export_bundle
from molmo_edge.export.bundle_weights import BundleTensors
from molmo_edge.frontend.crops import stitched_patches
from molmo_edge.frontend.grounding_tokens import decode_grounding
from molmo_edge.frontend.points import parse_points
from molmo_edge.frontend.prompts import text_ids
from molmo_edge.modeling import load_checkpoint
from molmo_edge.runtimes import open_runtime
from molmo_edge.runtimes.grounding import GroundedParser, Grounding, GroundingInputs
from molmo_edge.runtimes.llama_options import LlamaOptions
from molmo_edge.runtimes.torch import TorchCache, TorchRuntime
from molmo_edge.selfcheck import check_bundle, logit_gaps

NAME = "molmo_point"
EXPECTED = read(f"{NAME}/expected.json")
TENSORS = load_file(GOLDEN2 / NAME / "expected.safetensors")
TOLERANCE = 5e-5
EXACT = LlamaOptions(cache="f32", flash_attention=False)


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


@functools.cache
def _model() -> Any:
    return load_checkpoint(GOLDEN2 / NAME)


@dataclass
class Run:
    """A prompt, prefilled, and what follows."""

    grounding: Grounding
    pooling: np.ndarray
    grids: list[np.ndarray]
    runtime: TorchRuntime
    cache: TorchCache

    @property
    def state(self) -> np.ndarray:
        """Of the last position, before the final norm."""
        assert self.cache.states is not None
        return self.cache.states[-1]


def _prefill(name: str) -> Run:
    model, tokenizer, config = _model()
    inputs, grids = inputs_of(NAME, name), []
    assert inputs.crops is not None
    assert inputs.pooling is not None
    if inputs.video:
        side = config.image.patches
        grids = [np.arange(side * side).reshape(side, side) + side * side * n for n in range(len(inputs.crops))]
    offset = 0
    for image in inputs.images:
        grids.append(stitched_patches(config.image, image.tiling) + offset)
        offset += image.crops.shape[0] * image.crops.shape[1]
    runtime = TorchRuntime.from_model(model, threads=1)
    patches = runtime.encode_crops(inputs.crops)
    features = runtime.connect(patches, np.empty(0), inputs.pooling)
    rows = runtime.embed(inputs.ids)
    rows[inputs.positions] += features
    cache = runtime.new_cache(len(inputs.ids) + 60)
    runtime.prefill_image(rows, inputs.block, cache)
    assert _relative(features[::23], TENSORS[f"{name}.image_features"]) < TOLERANCE
    assert cache.states is not None
    grounding = GroundingInputs(
        runtime,
        inputs.ids,
        inputs.positions,
        tokenizer.special.im_patch,
        patches.reshape(-1, patches.shape[-1]),
        inputs.pooling,
        features,
        tuple(grids),
    ).begin(cache.states)
    return Run(grounding, inputs.pooling, grids, runtime, cache)


def _relative(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(got - expected).max() / np.abs(expected).max())


def _text_logits(run: Run) -> np.ndarray:
    model = _model()[0]
    return model.decoder.logits(model.decoder.ln_f(torch.from_numpy(run.state))).numpy()


def _step(run: Run, token: int) -> None:
    run.runtime.forward(run.grounding.embed(token), run.cache)


CASES = list(EXPECTED["cases"])


@pytest.mark.parametrize("name", CASES)
def test_greedy_answers_are_those_of_the_reference(name: str) -> None:
    case, run = EXPECTED["cases"][name], _prefill(name)
    ids: list[int] = []
    logits, patches, slots, locations = [], [], [], []
    for _ in case["generated_ids"]:
        text = _text_logits(run)
        logits.append(text)
        if ids:
            query, _, slot_query, location = (part[0] for part in run.grounding.head.project(run.state[None]))
            patches.append(run.grounding.patch_logits(query, run.state)[::43])
            token = ids[-1] - run.grounding.ids.first
            if 0 <= token < run.grounding.ids.n_patches:
                slots.append(run.grounding.slot_logits(slot_query, token))
            elif run.grounding.ids.slots <= ids[-1] < run.grounding.ids.locations:
                locations.append(location)
        ids.append(int(run.grounding.logits(text, run.state).argmax()))
        _step(run, ids[-1])
    assert ids == case["generated_ids"]
    assert _relative(np.stack(logits)[:, ::17], TENSORS[f"{name}.greedy.text_logits"]) < TOLERANCE
    for kind, found in (("patch", patches), ("subpatch", slots), ("location", locations)):
        expected = TENSORS.get(f"{name}.greedy.{kind}_logits", np.empty(0))
        assert len(found) == len(expected)
        if found:  # what cannot be chosen has a large negative value in both
            reachable = expected > -1e4
            np.testing.assert_array_equal(np.stack(found) > -1e4, reachable)
            assert _relative(np.stack(found)[reachable], expected[reachable]) < TOLERANCE


@pytest.mark.parametrize("name", [name for name in CASES if "forced" in EXPECTED["cases"][name]])
def test_logits_after_given_tokens_are_those_of_the_reference(name: str) -> None:
    forced, run = EXPECTED["cases"][name]["forced"], _prefill(name)
    ids, slots, locations = run.grounding.ids, [], []
    for number, token in enumerate(forced["ids"]):
        logits = run.grounding.logits(_text_logits(run), run.state)
        allowed = [(start, stop) for start, stop in forced["allowed_id_intervals_per_step"][number]]
        inside = np.zeros(len(logits), bool)
        for start, stop in allowed:
            inside[start:stop] = True
        assert (np.isfinite(logits) == inside).all(), number
        last = run.grounding.history[-1] if run.grounding.history else 0
        if ids.first <= last < ids.slots and last != ids.no_more:
            query = run.grounding.head.project(run.state[None])[2][0]
            slots.append(run.grounding.slot_logits(query, last - ids.first))
        elif ids.slots <= last < ids.locations:
            locations.append(logits[ids.locations :])
        _step(run, token)
    logits = run.grounding.logits(_text_logits(run), run.state)
    assert int(logits.argmax()) == forced["next_id_after"]
    open_slots = TENSORS[f"{name}.forced.subpatch_logits"] > -1e4
    np.testing.assert_array_equal(np.stack(slots) > -1e4, open_slots)
    got, expected = np.stack(slots)[open_slots], TENSORS[f"{name}.forced.subpatch_logits"][open_slots]
    assert _relative(got, expected) < TOLERANCE
    assert _relative(np.stack(locations), TENSORS[f"{name}.forced.location_logits"]) < TOLERANCE


@pytest.mark.parametrize("name", CASES)
def test_the_cache_of_the_head_is_that_of_the_reference(name: str) -> None:
    grounding = _prefill(name).grounding
    positions, keys = TENSORS[f"{name}.image_pos_ids"], TENSORS[f"{name}.patch_k"]
    np.testing.assert_array_equal(grounding.positions[::17], positions)
    assert _relative(grounding.patch_keys[::17][: len(keys)], keys) < TOLERANCE
    assert _relative(grounding.slot_features[::197], TENSORS[f"{name}.vit_features"]) < TOLERANCE


@pytest.mark.parametrize("name", CASES)
def test_points_are_those_of_the_reference(name: str) -> None:
    case, run = EXPECTED["cases"][name], _prefill(name)
    tokenizer, ids = _model()[1], run.grounding.ids
    text = "".join(ids.token(i) if i >= ids.first else tokenizer.decode([i]) for i in case["generated_ids"])
    points = list(decode_grounding(text, run.pooling, run.grids))
    if "video" in case:
        width, height, fps = (case["video"][key] for key in ("width", "height", "fps"))
        got = [[p.id, p.frame / fps, p.x * width, p.y * height] for p in points]
    else:
        sizes = case["image_sizes"]
        got = [[p.id, p.frame, p.x * sizes[p.frame][0], p.y * sizes[p.frame][1]] for p in points]
    np.testing.assert_allclose(np.reshape(got, (-1, 4)), np.reshape(case["points"], (-1, 4)), rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("onnx")
    directory = tmp_path_factory.mktemp("molmo_point") / "bundle"
    export_bundle(GOLDEN2 / NAME, directory, "fp32")
    return directory


@pytest.fixture(scope="module")
def gguf_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("llama_cpp")
    pytest.importorskip("gguf")
    directory = tmp_path_factory.mktemp("molmo_point") / "gguf"
    check = CheckPhoto(GOLDEN / "coffee.png", EXPECTED["cases"]["one_image"]["question"], max_new_tokens=8)
    export_bundle(GOLDEN2 / NAME, directory, "f32", engine="gguf", check=check)
    return directory


@pytest.fixture(scope="module", params=["pytorch", "onnx", "llama.cpp"])
def molmo(request: pytest.FixtureRequest) -> Molmo:
    if request.param == "llama.cpp":
        return Molmo(request.getfixturevalue("gguf_bundle"), threads=1, engine_options=EXACT)
    checkpoint = request.param == "pytorch"
    return Molmo(GOLDEN2 / NAME if checkpoint else request.getfixturevalue("bundle"), threads=1)


def test_weights_come_back_from_a_bundle(bundle: Path) -> None:
    source, copy = open_tensors(GOLDEN2 / NAME), BundleTensors(bundle)
    assert sorted(copy.names()) == sorted(source.names())
    for name in copy.names():
        np.testing.assert_array_equal(copy.get(name), source.get(name), err_msg=name)


@pytest.mark.parametrize(("precision", "bound"), [("fp16", 1e-3), ("int8", 0.03), ("mixed", 0.08), ("q4", 0.16)])
def test_a_rounded_bundle_is_near_the_checkpoint(tmp_path: Path, precision: str, bound: float) -> None:
    """Compares the logits after the question and, where rounding is fine enough for a random model, the first point."""
    export_bundle(GOLDEN2 / NAME, tmp_path / "bundle", precision)
    question = EXPECTED["cases"]["one_image"]["question"]
    with Molmo(tmp_path / "bundle", threads=1) as rounded, Molmo(GOLDEN2 / NAME, threads=1) as exact:
        logits = []
        for model in (rounded, exact):
            runtime, scene = model.engine.runtime, model.encode(picture("coffee.png"))
            assert scene.cache is not None
            ids = text_ids(model.engine.tokenizer, [question])
            logits.append(runtime.forward(runtime.embed(ids), scene.cache.copy()))
        assert np.abs(logits[0] - logits[1]).max() < bound * np.abs(logits[1]).max()
        if precision in ("fp16", "int8"):
            points = [
                model.ask(picture("coffee.png"), question, max_new_tokens=12).points for model in (rounded, exact)
            ]
            assert points[0]
            assert points[0][0] == points[1][0]


@pytest.mark.parametrize("name", ["one_image", "square"])
def test_the_sdk_answers_as_the_reference(molmo: Molmo, name: str) -> None:
    case = EXPECTED["cases"][name]
    photo, question, ids = picture(case["images"][0]), case["question"], case["generated_ids"]
    answer = molmo.ask(photo, question, max_new_tokens=len(ids))
    assert list(answer.token_ids) == ids
    text = case["generated_text"]
    assert answer.text == text.lstrip()
    (size,) = case["image_sizes"]
    got = [[*point.pixel(*size)] for point in answer.points]
    np.testing.assert_allclose(got, [[x, y] for _, _, x, y in case["points"]], rtol=0, atol=1e-4)
    scene = molmo.encode(photo)
    assert molmo.ask(scene, question, max_new_tokens=len(ids)) == answer
    assert molmo.ask(scene, question, max_new_tokens=len(ids)) == answer, "a question leaves the scene as it was"


def test_a_chat_gives_earlier_points_as_numbers(molmo: Molmo) -> None:
    case = EXPECTED["cases"]["one_image"]
    chat = molmo.chat(picture(case["images"][0]))
    first = chat.ask(case["question"], max_new_tokens=20)
    assert first.points
    second = chat.ask("And now?", max_new_tokens=8)
    assert not first.complete
    assert chat.scene.grounding is not None
    text = chat.scene.grounding.with_coordinates(first.text)
    assert [(p.x, p.y) for p in parse_points(text)] == sorted((round(p.x, 1), round(p.y, 1)) for p in first.points)
    history = [(case["question"], text)]
    again = molmo.ask(chat.scene, "And now?", history=history, max_new_tokens=8)
    assert second.token_ids == again.token_ids
    assert second.usage.tokens.prompt == again.usage.tokens.prompt


def test_grounding_tokens_in_a_prompt_are_text_or_coordinates(molmo: Molmo) -> None:
    """As ids they have no embeddings."""
    case = EXPECTED["cases"]["one_image"]
    photo = picture(case["images"][0])
    first = molmo.ask(photo, case["question"], max_new_tokens=20)
    assert first.points
    assert "<POINT_" in first.text
    scene = molmo.encode(photo)
    assert scene.grounding is not None
    expected = [(case["question"], scene.grounding.with_coordinates(first.text))]
    exact = molmo.ask(scene, "And now?", history=expected, max_new_tokens=2)
    history = [(case["question"], first.text)]
    for image in (photo, scene):
        again = molmo.ask(image, "And now?", history=history, max_new_tokens=2)
        assert (again.token_ids, again.usage.tokens.prompt) == (exact.token_ids, exact.usage.tokens.prompt)
    chat = molmo.chat(scene, history=history)
    assert chat.ask("And now?", max_new_tokens=2).token_ids == exact.token_ids
    assert chat.history[0] == history[0]
    assert molmo.ask(scene, "What is <POINT_5>?", max_new_tokens=2).usage.tokens.generated == 2


def test_no_text_has_an_id_without_an_embedding() -> None:
    tokenizer = tokenizer_of(NAME)
    text = "".join(f"<POINT_{number}> " for number in range(0, 1269, 97)) + "<POINT_1269><POINT_99999>"
    ids = tokenizer.encode(text)
    assert max(ids) < read_config(GOLDEN2 / NAME).decoder.n_logits
    assert tokenizer.decode(ids) == text


TRIPLES = "<POINT_300><POINT_727><POINT_734>1<POINT_500><POINT_728><POINT_738>2<POINT_725>"


@pytest.fixture(scope="module")
def inputs() -> GroundingInputs:
    scene = Molmo(GOLDEN2 / NAME, threads=1).encode(picture("coffee.png"))
    assert scene.grounding is not None
    return scene.grounding


def _streamed(inputs: GroundingInputs, pieces: Iterable[str]) -> list[Point]:
    parser = GroundedParser(inputs)
    return [point for piece in pieces for point in parser.feed(piece)]


def _unlabelled(points: Iterable[Point]) -> list[Point]:
    return [replace(point, label="") for point in points]


def test_a_point_comes_with_the_first_digit_of_its_number(inputs: GroundingInputs) -> None:
    parser = GroundedParser(inputs)
    pieces = ['Two: <points coords="', *re.findall("<[^>]*>|.", TRIPLES), '">a &amp; b', "</poi", "nts>", " and text"]
    found = [parser.feed(piece) for piece in pieces]
    assert [pieces[i] for i, points in enumerate(found) if points] == ["1", "2"]
    whole = inputs.points("".join(pieces))
    assert [point for points in found for point in points] == _unlabelled(whole)
    assert {point.label for point in whole} == {"a & b"}
    coordinates = ";".join(_numbers(n, p) for n, p in enumerate(whole, 1))
    for tokens in (TRIPLES, f"<POINT_300><POINT_9999><POINT_734>1{TRIPLES}"):  # the first slot does not exist
        assert inputs.with_coordinates(f'<points coords="{tokens}">x</points>') == (
            f'<points coords="{coordinates}">x</points>'
        )


def test_points_outside_of_closed_tags_have_no_label(inputs: GroundingInputs) -> None:
    text = f'{TRIPLES} <points coords="{TRIPLES}"> a</points> <tracks {TRIPLES}'
    labels = [point.label for point in inputs.points(text)]
    assert labels == ["", "", "a", "a", "", ""]
    assert _streamed(inputs, [text]) == _unlabelled(inputs.points(text))


TOKENS = (TRIPLES, "<POINT_300>", "<POINT_727>", "<POINT_734>", "<POINT_9", ">", "1", "23", " ", "<", "<POI")
TAGS = ("<points", "<tracks", ' coords="', '">', "cup", "</points>", "</tracks>")
GROUNDED = st.lists(st.sampled_from((*TOKENS, *TAGS)), max_size=25).map("".join)


@given(GROUNDED, st.randoms(use_true_random=False))
def test_streamed_grounding_tokens_equal_the_whole(inputs: GroundingInputs, text: str, rng: random.Random) -> None:
    whole = _unlabelled(inputs.points(text))
    assert _streamed(inputs, text) == whole
    cuts = sorted(rng.choices(range(len(text) + 1), k=4))
    assert _streamed(inputs, [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]) == whole


@pytest.mark.parametrize(
    "text",
    [
        "<POINT_1" * 60_000,
        f"<POINT_{'1' * 300_000}",
        "<" + ">1" * 150_000,
        "<points" * 60_000,
        '<points">' * 60_000,
        '<points "' + ">" * 300_000,
        "<points></points>" * 30_000,
    ],
    ids=["tokens", "digits", "numbers", "tags", "ends", "label", "closed"],
)
def test_hostile_grounding_tokens_take_linear_time(inputs: GroundingInputs, text: str) -> None:
    """In quadratic time each would take many minutes, and pytest's timeout fails the test."""
    assert _streamed(inputs, text) == inputs.points(text) == []


def _numbers(number: int, point: Point) -> str:
    return f"1 {number} {round(10 * point.x):03d} {round(10 * point.y):03d}"


@pytest.mark.parametrize("name", ["one_image", "square"])
def test_llama_cpp_gives_the_states_before_the_final_norm(gguf_bundle: Path, name: str) -> None:
    inputs, run = inputs_of(NAME, name), _prefill(name)
    runtime = cast(Any, open_runtime(gguf_bundle, threads=1, engine_options=EXACT))
    rows = runtime.embed(inputs.ids)
    rows[inputs.positions] += run.grounding.features
    cache = runtime.new_cache(len(rows) + 1)
    assert _relative(runtime.prefill_image(rows, inputs.block, cache), _text_logits(run)) < TOLERANCE
    assert cache.states.shape == (len(rows), runtime.config.decoder.d_model)
    assert run.cache.states is not None
    assert _relative(cache.states, run.cache.states) < TOLERANCE
    for engine, its_cache in ((runtime, cache), (run.runtime, run.cache)):
        engine.forward(rows[:1], its_cache)
    assert cache.states.shape == (1, runtime.config.decoder.d_model)
    assert _relative(cache.states, run.cache.states) < TOLERANCE
    runtime.close()


def test_llama_cpp_refuses_several_images(gguf_bundle: Path) -> None:
    runtime = cast(Any, open_runtime(gguf_bundle, threads=1))
    inputs = inputs_of(NAME, "two_images")
    rows = np.zeros((len(inputs.ids), runtime.config.decoder.d_model), np.float32)
    with pytest.raises(EngineError, match="export the decoder to ONNX"):
        runtime.prefill_image(rows, inputs.block, runtime.new_cache(len(rows)))
    runtime.close()


def test_a_check_passes_on_the_engine_that_recorded_it(gguf_bundle: Path) -> None:
    report = check_bundle(gguf_bundle, threads=1)
    assert report.exact
    assert report.same_points
    assert report.check is not None
    assert report.check.points
    with Molmo(gguf_bundle, threads=1) as molmo:
        photo, question, ids = picture("coffee.png"), report.check.question, list(report.token_ids)
        assert logit_gaps(molmo.engine, photo, question, ids, complete=False) == [0.0] * len(ids)
        other = [*ids[:-1], (ids[-1] + 1) % molmo.config.decoder.n_logits]
        assert logit_gaps(molmo.engine, photo, question, other, complete=False)[-1] > 0


@pytest.mark.parametrize("precision", ["q8_0", "q4_k_m"])
def test_a_quantized_gguf_still_points(tmp_path: Path, precision: str) -> None:
    pytest.importorskip("llama_cpp")
    export_bundle(GOLDEN2 / NAME, tmp_path / "bundle", precision, engine="gguf")
    case = EXPECTED["cases"]["one_image"]
    answer = Molmo(tmp_path / "bundle", threads=1).ask(picture("coffee.png"), case["question"], max_new_tokens=12)
    assert answer.points
    if precision == "q8_0":
        assert list(answer.token_ids)[:4] == case["generated_ids"][:4], "the first point"
