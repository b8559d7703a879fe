"""Several images and videos through the SDK and the command line: the reference's ids and points, limits, refusals."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from molmo2_golden import GOLDEN2, picture, read, synthetic, tokenizer_of
from once import once
from PIL import Image

from molmo_edge import Answer, Molmo, MolmoEdgeError, Point, Video
from molmo_edge.answer import DrawError
from molmo_edge.export import export_bundle
from molmo_edge.frontend.crops import ImageProcessor
from molmo_edge.frontend.prompts import text_ids
from molmo_edge.frontend.video import prepare_video
from molmo_edge.frontend.visual_prompt import UnsupportedInputError
from molmo_edge.runtimes.generate import GenerationError
from molmo_edge.runtimes.prompt_embeddings import prefill
from molmo_edge.sdk.engine import QuestionError
from molmo_edge.sdk.inputs import InputError
from molmo_edge.sdk.shown import Shown

pytest.importorskip("torch")

SMALL = synthetic(60, 40)


def bundle(model: str) -> Path:
    return once(f"{model}-fp32-visual", lambda out: export_bundle(GOLDEN2 / model, out, "fp32"))


@functools.cache
def opened(model: str, engine: str, max_crops: int | None = None) -> Molmo:
    return Molmo(GOLDEN2 / model if engine == "pytorch" else bundle(model), threads=1, max_crops=max_crops)


def case_of(model: str, name: str) -> tuple[dict[str, Any], Any, str]:
    """The case, its images or video, and its question."""
    case = read(f"{model}/expected.json")["cases"][name]
    if (video := case.get("video")) is None:
        return case, [picture(image) for image in case["images"]], case["question"]
    frames = [synthetic(video["width"], video["height"], number) for number in range(video["frames"])]
    return case, Video(frames, fps=video["fps"]), case.get("question") or video["question"]


MODELS = [("molmo2_qwen3", "pytorch"), ("molmo2_qwen3", "onnx"), ("molmo2_olmo3", "onnx"), ("molmo_point", "pytorch")]


@pytest.mark.parametrize("name", ["two_images", "video"])
@pytest.mark.parametrize(("model", "engine"), [*MODELS, ("molmo_point", "onnx")])
def test_answers_are_those_of_the_reference(model: str, engine: str, name: str) -> None:
    (case, image, question), molmo = case_of(model, name), opened(model, engine)
    ids = case["generated_ids"]
    answer = molmo.ask(image, question, max_new_tokens=len(ids))
    assert list(answer.token_ids) == ids
    assert answer.usage.tokens.image + answer.usage.tokens.prompt == case["n_tokens"]
    assert answer.usage.crops == case["n_crops"]
    assert len(answer.images) == (2 if name == "two_images" else case["n_crops"])
    if model == "molmo_point":
        where = [p.time if name == "video" else (p.image or 0) - 1 for p in answer.points]
        got = [[at, *pixel] for at, pixel in zip(where, answer.pixels(), strict=True)]
        np.testing.assert_allclose(got, [point[1:] for point in case["points"]], rtol=0, atol=1e-4)
        assert all((p.time is None) != (p.image is None) for p in answer.points)


@pytest.mark.parametrize("name", ["two_images", "video"])
def test_a_scene_is_encoded_once_for_threads_and_chats(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (_, image, question), molmo = case_of("molmo2_qwen3", name), opened("molmo2_qwen3", "onnx", 1)
    exact = molmo.ask(image, question, max_new_tokens=6)
    scene = molmo.encode(image)
    assert repr(scene) == (
        f"Scene(2 images 448x172, 512x512, 4 crops, {exact.usage.tokens.image} positions)"
        if name == "two_images"
        else f"Scene(video 200x150, 6 frames of 2.5 s, {exact.usage.tokens.image} positions)"
    )
    runs = molmo.engine.runtime
    with monkeypatch.context() as patched:
        patched.setattr(type(runs), "encode_image", lambda *_: pytest.fail("encoded again"), raising=False)
        with ThreadPoolExecutor(3) as threads:
            answers = list(threads.map(lambda _: molmo.ask(scene, question, max_new_tokens=6), range(3)))
        assert answers == [exact] * 3
        chat = molmo.chat(scene)
        assert chat.ask(question, max_new_tokens=6).token_ids == exact.token_ids
        second = chat.ask("And now?", max_new_tokens=4)
        assert chat.answers[0].usage.tokens.prefilled < 60, "the images stay in the cache"
    assert len(second.images) == len(exact.images)
    (batched,) = molmo.ask_batch([(image, question)], max_new_tokens=6)
    assert batched == exact


def greedy(molmo: Molmo, ids: list[int], crops: np.ndarray, pooling: np.ndarray, question: str, new: int) -> list[int]:
    """Greedy ids with all crops encoded at once, without the SDK."""
    special, runtime = molmo.engine.tokenizer.special, molmo.engine.runtime
    every = np.array([*ids, *text_ids(molmo.engine.tokenizer, [question])])
    rows = np.array(runtime.embed(every), np.float32)
    rows[np.flatnonzero(every == special.im_patch)] += runtime.encode_image(crops, np.empty(0), None, pooling)
    cache, found = runtime.new_cache(len(rows) + new), []
    logits = prefill(runtime, rows, np.isin(every, special.image_block), cache)
    for _ in range(new):
        found.append(int(logits.argmax()))
        logits = runtime.forward(runtime.embed(np.array(found[-1:])), cache)
    return found


def test_eight_images() -> None:
    molmo = opened("molmo2_qwen3", "onnx", 1)
    tokenizer = tokenizer_of("molmo2_qwen3")
    images = [synthetic(60 + 30 * n, 90, n) for n in range(8)]
    prepared = [ImageProcessor(molmo.engine.process.config, tokenizer.special)(rgb) for rgb in images]
    ids, pooling, before = [tokenizer.special.bos], [], 0
    for number, image in enumerate(prepared, 1):
        assert image.pooling is not None
        ids += [*tokenizer.encode(f"Image {number}"), *image.tokens]
        pooling.append(np.where(image.pooling < 0, -1, image.pooling + before))
        before += image.crops.shape[0] * image.crops.shape[1]
    crops = np.concatenate([image.crops for image in prepared])
    expected = greedy(molmo, ids, crops, np.concatenate(pooling), "Compare these images.", 8)
    answer = molmo.ask(images, "Compare these images.", max_new_tokens=8)
    assert list(answer.token_ids) == expected
    assert (answer.usage.crops, answer.usage.tokens.image) == (16, len(ids))


@pytest.mark.parametrize("n", [10, pytest.param(64, marks=pytest.mark.slow)])
def test_many_frames(n: int) -> None:
    molmo, tokenizer = opened("molmo2_qwen3", "onnx"), tokenizer_of("molmo2_qwen3")
    frames, times = [synthetic(40, 30, k) for k in range(n)], [k / 2 for k in range(n)]
    video, special = prepare_video(frames, times, molmo.config.image), tokenizer.special
    assert special.frame_start is not None
    assert special.frame_end is not None
    ids = [special.bos]
    for number, time in enumerate(times):
        ids += tokenizer.encode(f"{' ' if number else ''}{time:.1f} ")
        ids += [special.frame_start, *[special.im_patch] * 81, special.frame_end]
    answer = molmo.ask(Video(np.stack(frames), fps=2), "What happens?", max_new_tokens=4)
    assert list(answer.token_ids) == greedy(molmo, ids, video.crops, video.pooling, "What happens?", 4)
    assert (answer.usage.crops, answer.usage.tokens.image) == (n, len(ids))
    assert answer.times == tuple(times)


@pytest.mark.parametrize(
    ("image", "words"),
    [
        ([synthetic(900, 900)] * 12, r"the 12 images and the question need \d+ positions, but .* 8192: pass fewer"),
        (Video(np.zeros((120, 8, 8, 3), np.uint8), fps=2), r"120 frames of the video and the question .* max_frames"),
    ],
)
def test_a_prompt_past_the_context_is_refused_before_anything_is_encoded(
    image: Any, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    molmo = opened("molmo2_qwen3", "pytorch")
    monkeypatch.setattr("molmo_edge.sdk.engine.encode", lambda *_: pytest.fail("encoded"))
    with pytest.raises(QuestionError, match=words):
        molmo.ask(image, "What?")
    with pytest.raises(QuestionError, match=r"need \d+ positions"):
        molmo.chat(image)
    (problem,) = molmo.ask_batch([(image, "What?")])
    assert isinstance(problem, QuestionError)


def test_a_question_past_the_context_is_refused_before_the_image_is_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    molmo = opened("molmo2_qwen3", "pytorch")
    monkeypatch.setattr("molmo_edge.sdk.engine.encode", lambda *_: pytest.fail("encoded"))
    with pytest.raises(GenerationError, match=r"the image and the question need \d+ positions.* shorten the question"):
        molmo.ask(SMALL, "é?" * 9_000)


@pytest.mark.parametrize(
    ("image", "error", "words"),
    [
        ([], InputError, "the list of images is empty"),
        (([SMALL], SMALL), InputError, "image 1 of 2 is a list: pass one flat list"),
        ([SMALL, Video([SMALL], fps=1)], InputError, "images or one video, not both"),
        ([SMALL, "missing.png"], MolmoEdgeError, "image 2 of 2: there is no image missing.png"),
        ([SMALL, None], MolmoEdgeError, "image 2 of 2: an image must be a path"),
        (Video([SMALL, synthetic(61, 40)], fps=1), MolmoEdgeError, "frame 2 .* same size"),
    ],
)
def test_wrong_inputs_are_refused_in_a_sentence(image: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        opened("molmo2_qwen3", "pytorch").ask(image, "What?")


def test_without_crops_a_molmo_point_sees_the_global_view() -> None:
    answer = opened("molmo_point", "pytorch", 0).ask([SMALL, SMALL], "Point to the dots.", max_new_tokens=12)
    assert answer.usage.crops == 2
    assert not answer.points


def test_a_list_of_one_is_its_image() -> None:
    for molmo in (opened("molmo2_qwen3", "pytorch", 1), Molmo(max_crops=0, threads=1)):
        alone = molmo.ask(SMALL, "What?", max_new_tokens=3)
        assert molmo.ask([SMALL], "What?", max_new_tokens=3) == alone
    video = Video([SMALL], fps=1)
    molmo = opened("molmo2_qwen3", "pytorch", 1)
    assert molmo.ask([video], "What?", max_new_tokens=3) == molmo.ask(video, "What?", max_new_tokens=3)


def test_molmo_v1_takes_one_image() -> None:
    molmo = Molmo(threads=1)
    with pytest.raises(UnsupportedInputError, match="one image in a prompt, not 2"):
        molmo.ask([SMALL, "not read.png"], "What?")
    with pytest.raises(UnsupportedInputError, match="takes no videos"):
        molmo.encode(Video([SMALL], fps=1))
    refused, answered = molmo.ask_batch([([SMALL, SMALL], "What?"), (SMALL, "What?")], max_new_tokens=2)
    assert isinstance(refused, UnsupportedInputError)
    assert isinstance(answered, Answer)


def test_llama_cpp_refuses_several_images_before_they_are_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llama_cpp")
    out = once("molmo2_qwen3-gguf-visual", lambda to: export_bundle(GOLDEN2 / "molmo2_qwen3", to, "f32", engine="gguf"))
    with Molmo(out, threads=1, max_crops=1) as molmo:
        with monkeypatch.context() as patched:
            patched.setattr("molmo_edge.sdk.engine.encode", lambda *_: pytest.fail("encoded"))
            for image in ([SMALL, SMALL], Video([SMALL, SMALL], fps=1)):
                with pytest.raises(UnsupportedInputError, match="export the decoder to ONNX"):
                    molmo.ask(image, "What?")
        assert molmo.ask(Video([SMALL], fps=1), "What?", max_new_tokens=2).token_ids


def test_transparency_is_dropped_or_blended_with_white(tmp_path: Path) -> None:
    rgba = np.dstack([SMALL, np.linspace(0, 255, SMALL[:, :, 0].size).reshape(40, 60).astype(np.uint8)])
    Image.fromarray(rgba).save(tmp_path / "a.png")
    white = np.rint(SMALL * (rgba[:, :, 3:] / 255) + 255 - rgba[:, :, 3:])
    runtime, tokenizer = opened("molmo2_qwen3", "pytorch").engine.runtime, tokenizer_of("molmo2_qwen3")
    for image in (tmp_path / "a.png", rgba):
        dropped = Molmo.from_parts(runtime, tokenizer, max_crops=0).engine.scene(image)
        blended = Molmo.from_parts(runtime, tokenizer, max_crops=0, alpha="white").engine.scene(image)
        assert dropped.image is not None
        assert blended.image is not None
        np.testing.assert_array_equal(dropped.image, SMALL)
        assert np.abs(blended.image - white).max() <= 1
    with pytest.raises(MolmoEdgeError, match="alpha must be one of drop, white"):
        Molmo.from_parts(runtime, tokenizer, alpha="black")


def test_a_point_shows_only_what_the_model_names() -> None:
    assert repr(Point(1.0, 2.5, "a")) == "Point(x=1.0, y=2.5, label='a')"
    assert repr(Point(1.0, 2.5, "a", image=2)) == "Point(x=1.0, y=2.5, label='a', image=2)"
    assert repr(Point(1.0, 2.5, time=0.5)) == "Point(x=1.0, y=2.5, label='', time=0.5)"


def test_points_in_the_text_are_those_of_their_image_or_time(monkeypatch: pytest.MonkeyPatch) -> None:
    molmo = opened("molmo2_qwen3", "onnx", 1)
    ids = tokenizer_of("molmo2_qwen3").encode('<points coords="1 1 100 200;2 2 500 250">cups</points>')
    monkeypatch.setattr("molmo_edge.sdk.streaming.generate", lambda *_, **__: (token for token in ids))
    answer = molmo.ask([SMALL, synthetic(100, 80)], "Point to the cups.")
    assert answer.points == (Point(10, 20, "cups", image=1), Point(50, 25, "cups", image=2))
    assert answer.pixels() == [(6, 8), (50, 20)]
    answer = molmo.ask(Video([SMALL] * 3, fps=1), "Point to the cups.")
    assert answer.points == (Point(10, 20, "cups", time=1.0), Point(50, 25, "cups", time=2.0))


def test_drawings_of_several_images() -> None:
    images = (np.zeros((40, 60, 3), np.uint8), np.zeros((80, 100, 3), np.uint8))
    points = (Point(50, 50, "a", image=1), Point(50, 50, "b", image=2), Point(1, 1, "b", image=3))
    answer = Answer("x", points, image=images[0], shown=Shown(images))
    assert [drawn.size for drawn in answer.draw_all()] == [(60, 40), (100, 80)]
    assert answer.draw(image=2).size == (100, 80)
    assert np.asarray(answer.draw(image=1)).any()
    sheet = answer.draw()
    assert sheet.width > 160
    assert sheet.height > 80
    assert answer.pixels()[:2] == [(30, 20), (50, 40)]
    assert np.isnan(answer.pixels()[2]).all(), "there is no third image"
    shown = answer.to_dict()["points"]
    assert [point["image"] for point in shown] == [1, 2, 3]
    assert ["pixel" in point for point in shown] == [True, True, False]
    html = answer._repr_html_()
    assert "image 2" in html
    assert "nan" not in html
    for wrong in (0, 3, "1", 1.0):
        with pytest.raises(DrawError, match="2 images: image must be 1 to 2"):
            answer.draw(image=wrong)  # type: ignore[arg-type]
    for refused in (answer.to_svg, answer.to_coco, lambda: answer.picture_size):
        with pytest.raises(DrawError, match="2 images"):
            refused()
    assert "<svg" in answer.to_svg(image=2)


def test_drawings_of_a_video() -> None:
    frames = tuple(np.zeros((40, 60, 3), np.uint8) for _ in range(5))
    shown = Shown(frames, (0.0, 0.5, 1.0, 1.5, 2.0), (400, 600))
    answer = Answer("x", (Point(50, 50, "a", time=0.6), Point(10, 10, "a", time=2.0)), image=frames[0], shown=shown)
    assert answer.pixels() == [(300, 200), (60, 40)]
    assert len(answer.draw_all()) == 2
    assert np.asarray(answer.draw(image=2)).any(), "the nearest frame"
    assert not np.asarray(answer.draw(image=3)).any()
    assert len(Answer("x", image=frames[0], shown=shown).draw_all()) == 1


def test_commands(cli: Callable[..., Any], tmp_path: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    from importlib import resources

    schema = json.loads((resources.files("molmo_edge") / "answer.schema.json").read_text(encoding="utf-8"))
    photos = [tmp_path / "a.png", tmp_path / "b.png"]
    for number, photo in enumerate(photos):
        Image.fromarray(synthetic(60 + number, 40)).save(photo)
    options = ("--model", bundle("molmo2_qwen3"), "--max-new-tokens", 2, "--max-crops", 1, "--threads", 1, "--json")
    status, out, err = cli("ask", *photos, "Compare.", *options, "--together", "--save", tmp_path / "drawn")
    assert status == 0, err
    line = json.loads(out)
    jsonschema.validate(line, schema)
    assert line["images"] == [str(photo) for photo in photos]
    assert line["usage"]["crops"] == 4
    assert sorted(path.name for path in (tmp_path / "drawn").iterdir()) == ["a.annotated.png", "b.annotated.png"]
    status, out, _ = cli("ask", *photos, "What?", *options)
    assert [json.loads(one)["usage"]["crops"] for one in out.splitlines()] == [2, 2], "one after the other"
    status, out, err = cli("ask", *photos, "Compare.", *options[:-1], "--together", "--save", tmp_path / "sheet.jpg")
    assert status == 0, err
    with Image.open(tmp_path / "sheet.jpg") as sheet:
        assert sheet.width > 121
    status, out, err = cli("ask", photos[0], tmp_path / "no.png", "Compare.", *options, "--together")
    assert (status, out) == (1, "")
    assert "there is no image" in err
    status, _, err = cli("ask", *photos, "Compare.", "--together")
    assert status == 1
    assert "one image in a prompt, not 2" in err


def test_commands_about_a_video(cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    av = pytest.importorskip("av")
    clip, renamed = tmp_path / "clip.mp4", tmp_path / "renamed"
    with av.open(str(clip), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(20):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(synthetic(64, 48, number), format="rgb24")))
        container.mux(stream.encode())
    renamed.write_bytes(clip.read_bytes())
    options = ("--model", bundle("molmo2_qwen3"), "--max-new-tokens", 2, "--threads", 1)
    status, out, err = cli("ask", clip, "What?", *options, "--json", "--save", tmp_path / "frames")
    assert status == 0, err
    assert json.loads(out)["times"] == [0, 0.5, 1, 1.5, 2]
    assert [path.name for path in (tmp_path / "frames").iterdir()] == ["clip-000.0s.annotated.png"]
    more = ("--max-fps", 1, "--video-sampling", "transformers")
    assert json.loads(cli("ask", renamed, "What?", *options, "--json", *more)[1])["times"] == [0, 1]
    assert json.loads(cli("ask", clip, "What?", *options, "--json", "--max-frames", 3)[1])["times"] == [0, 1, 2]
    assert cli("ask", clip, "What?", *options, "--max-fps", -1)[0] == 2
    clip.write_bytes(b"nothing" * 100)
    status, out, err = cli("ask", clip, "What?", *options)
    assert (status, out) == (1, "")
    assert "cannot be read as a video" in err
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO("What?\n"))
    status, out, err = cli("chat", renamed, *options, "--max-frames", 2)
    assert status == 0, err
