"""The SDK: golden answers from end to end, and its behaviour with any engine."""

from __future__ import annotations

import dataclasses
import json
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from molmo_edge import Answer, Molmo, Point
from molmo_edge.answer import DrawError, Seconds, draw_points
from molmo_edge.checkpoints.bundle import open_bundle
from molmo_edge.checkpoints.manifest import Check, Component
from molmo_edge.errors import MolmoEdgeError
from molmo_edge.molmo import MAX_QUESTION_CHARS, QuestionError
from molmo_edge.sdk.readable_text import TagStripper, readable
from molmo_edge.sdk.stage_checksums import Part
from molmo_edge.selfcheck import CheckReport, logit_gaps

CASES = ("square", "landscape", "wide_text")
TWO_DOGS = 'Look: <points x1="10.0" y1="20.0" x2="90.0" y2="50.0" alt="dogs">the dogs</points> here.'
PHOTO = np.zeros((60, 80, 3), np.uint8)

Saying = Callable[..., Molmo]


@pytest.fixture(scope="module")
def tiny(tiny_bundle: Path) -> Molmo:
    return Molmo(tiny_bundle, threads=2)


def case(golden: Path, name: str) -> tuple[Path, str, tuple[int, ...]]:
    expected = json.loads((golden / "molmoe" / "expected.json").read_text())[name]
    return golden / expected["image"], expected["question"], tuple(expected["generated_ids"])


@pytest.mark.parametrize("name", CASES)
def test_the_golden_answers_from_a_bundle(tiny: Molmo, golden: Path, name: str) -> None:
    image, question, ids = case(golden, name)
    answer = tiny.ask(image, question, max_new_tokens=len(ids))
    assert answer.token_ids == ids
    assert answer.usage.tokens.generated == len(ids)


@pytest.mark.parametrize("name", CASES)
def test_a_scene_answers_as_its_image_does_again_and_again(tiny: Molmo, golden: Path, name: str) -> None:
    image, question, ids = case(golden, name)
    scene = tiny.encode(image)
    other = tiny.ask(scene, "What else?", max_new_tokens=5)
    assert tiny.ask(scene, question, max_new_tokens=len(ids)).token_ids == ids
    assert tiny.ask(scene, "What else?", max_new_tokens=5).token_ids == other.token_ids


def test_a_question_past_the_room_of_a_scene_answers_the_same(tiny: Molmo, golden: Path) -> None:
    image, question, ids = case(golden, "square")
    assert tiny.ask(tiny.encode(image, room=1), question, max_new_tokens=len(ids)).token_ids == ids


def test_threads_share_a_scene(tiny: Molmo, golden: Path) -> None:
    image, question, ids = case(golden, "landscape")
    scene = tiny.encode(image)
    answers: list[tuple[int, ...]] = []

    def ask() -> None:
        answers.append(tiny.ask(scene, question, max_new_tokens=len(ids)).token_ids)

    workers = [threading.Thread(target=ask) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert answers == [ids] * 4


def test_the_golden_answers_from_a_checkpoint(golden: Path) -> None:
    pytest.importorskip("torch")
    image, question, ids = case(golden, "square")
    with Molmo(golden / "molmoe", threads=2) as molmo:
        assert molmo.ask(image, question, max_new_tokens=len(ids)).token_ids == ids


def test_image_features_are_added_at_the_patches_and_nowhere_else(saying: Saying, tokenizer: Any) -> None:
    scene = saying("ok").encode(PHOTO)
    ids, added = scene.embeddings[:, 0], scene.embeddings[:, 1]
    assert ids[0] == tokenizer.special.bos
    assert ((ids == tokenizer.special.im_patch) == (added > 0)).all()
    assert len(set(added[added > 0])) == (added > 0).sum()  # each cell went to its own position
    assert added[2] == 1  # BOS, im_start, then the global view's first cell


def test_an_answer_with_points(saying: Saying) -> None:
    answer = saying(TWO_DOGS).ask(PHOTO, "Where are the dogs?")
    assert answer.text == str(answer) == TWO_DOGS
    assert answer.readable == "Look: the dogs here."
    assert answer.points == (Point(10.0, 20.0, "the dogs"), Point(90.0, 50.0, "the dogs"))
    assert answer.pixels() == [(8.0, 12.0), (72.0, 30.0)]
    assert answer.count == 2
    assert answer.complete
    data = json.loads(json.dumps(answer.to_dict()))
    assert data["points"][1] == {"x": 90.0, "y": 50.0, "label": "the dogs", "pixel": [72.0, 30.0]}


def test_counts(saying: Saying) -> None:
    assert saying("There are none.").count(PHOTO, "cups").count == 0
    assert saying("Counting the cups shows a total of 12.").count(PHOTO, "cups").count == 12
    assert saying("A red house.").ask(PHOTO, "What is it?").count is None


def test_stream_pieces_are_the_text_and_points_come_before_their_tag_closes(saying: Saying) -> None:
    stream = saying(TWO_DOGS).stream(PHOTO, "Where?")
    pieces = list(stream)
    assert "".join(p for p in pieces if isinstance(p, str)) == stream.answer.text == TWO_DOGS
    points = [(i, p) for i, p in enumerate(pieces) if isinstance(p, Point)]
    assert [p for _, p in points] == [dataclasses.replace(p, label="") for p in stream.answer.points]
    for at, point in points:  # right after the quote that ends it
        assert "".join(p for p in pieces[:at] if isinstance(p, str)).endswith(f'="{point.y}"')


def test_a_stream_left_half_way_still_has_its_answer(saying: Saying) -> None:
    stream = saying(TWO_DOGS).stream(PHOTO, "Where?")
    assert next(stream) == "L"
    assert stream.answer.text == TWO_DOGS


def test_a_stream_that_failed_says_so_whenever_it_is_asked(saying: Saying, monkeypatch: pytest.MonkeyPatch) -> None:
    molmo = saying(TWO_DOGS)
    stream = molmo.stream(PHOTO, "Where?")
    next(stream)

    def fail(*_: object) -> None:
        raise MolmoEdgeError("the engine is gone")

    monkeypatch.setattr(molmo.fake, "forward", fail)  # type: ignore[attr-defined]
    with pytest.raises(MolmoEdgeError, match="the engine is gone"):
        list(stream)
    for _ in range(2):
        with pytest.raises(MolmoEdgeError, match="ask again"):
            stream.answer  # noqa: B018


def test_what_the_caller_does_between_pieces_is_not_the_models_time(saying: Saying) -> None:
    stream = saying(TWO_DOGS).stream(PHOTO, "Where?")
    next(stream)
    time.sleep(0.5)
    next(stream)
    time.sleep(0.5)
    assert 0 < stream.answer.usage.seconds.decode < 0.5
    assert 0 < stream.answer.usage.seconds.prefill < 0.5


def test_the_verbs_ask_in_molmos_own_words(saying: Saying, tokenizer: Any) -> None:
    molmo = saying("ok")
    for ask, words in (
        (lambda: molmo.point(PHOTO, "dog"), " User: Point to the dog. Assistant:"),
        (lambda: molmo.count(PHOTO, "the cups"), " User: How many cups are there? Assistant:"),
        (lambda: molmo.caption(PHOTO), " User: Describe this image. Assistant:"),
        (lambda: molmo.ask(PHOTO, "Why? <im_patch>"), " User: Why? <im_patch> Assistant:"),
    ):
        molmo.fake.fed.clear()  # type: ignore[attr-defined]
        answer = ask()  # type: ignore[no-untyped-call]
        prompt = molmo.fake.fed[0][-answer.usage.tokens.prompt :, 0]  # type: ignore[attr-defined]
        assert tokenizer.decode(int(i) for i in prompt) == words


def test_history_goes_in_front_of_the_question(saying: Saying, tokenizer: Any) -> None:
    molmo = saying("ok")
    scene = molmo.encode(PHOTO)
    molmo.ask(scene, "And now?", history=[("First?", "Yes.")])
    fed = [f for f in molmo.fake.fed if len(f) > 1][-1][:, 0]  # type: ignore[attr-defined]
    words = " User: First? Assistant: Yes.<|endoftext|> User: And now? Assistant:"
    assert tokenizer.decode(int(i) for i in fed) == words


@pytest.mark.parametrize(
    "history", [["First?"], ["ab", "cd"], ("ab", "cd"), [1], [("q", 2)], [("q", "a", "x")], 5, "ab"]
)
def test_a_history_that_is_none(saying: Saying, history: Any) -> None:
    molmo = saying("ok")
    with pytest.raises(QuestionError, match="history must be a list"):
        molmo.ask(PHOTO, "And now?", history=history)
    assert molmo.fake.images == 0  # type: ignore[attr-defined]


def test_a_scene_is_encoded_once(saying: Saying) -> None:
    molmo = saying("ok")
    scene = molmo.encode(PHOTO)
    answers = [molmo.ask(scene, "Why?") for _ in range(3)]
    assert molmo.fake.images == 1  # type: ignore[attr-defined]
    assert scene.seconds.vision > 0
    assert scene.seconds.prefill > 0
    assert answers[0].usage.seconds.vision == 0
    assert answers[0].usage.crops == scene.crops == 2
    assert answers[0].usage.tokens.image == len(scene.embeddings)
    assert molmo.encode(scene) is scene
    for use in (lambda: saying("ok").ask(scene, "Why?"), lambda: saying("ok").encode(scene)):
        with pytest.raises(QuestionError, match="another Molmo"):
            use()


def test_scenes_are_told_apart_by_identity(saying: Saying) -> None:
    molmo = saying("ok")
    one, other = molmo.encode(PHOTO), molmo.encode(PHOTO)
    assert one != other
    assert len({one, other, one}) == 2


@pytest.mark.parametrize("room", [-1, 2.5, "512", None])
def test_a_room_that_is_none(saying: Saying, room: Any) -> None:
    with pytest.raises(QuestionError, match="room"):
        saying("ok").encode(PHOTO, room=room)


def test_usage_adds_up(saying: Saying) -> None:
    usage = saying("ok").ask(PHOTO, "Why?").usage
    s = usage.seconds
    assert min(s.load, s.preprocess, s.vision, s.prefill, s.decode) > 0
    assert Seconds(1, 2, 3, 4, 5).total == 14


def test_max_crops(saying: Saying) -> None:
    big = np.zeros((600, 900, 3), np.uint8)
    assert saying("ok", max_crops=0).encode(big).crops == 1
    assert saying("ok", max_crops=None).encode(big).crops > 5
    for wrong in (-1, 2.5, "4"):
        with pytest.raises(MolmoEdgeError, match="max_crops"):
            saying("ok", max_crops=wrong)


def test_wrong_arguments_and_tokenizers_are_found_before_an_engine_opens(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("molmo_edge.runtimes.open_runtime", lambda *_, **__: pytest.fail("an engine was opened"))
    with pytest.raises(MolmoEdgeError, match="max_crops"):
        Molmo(tiny_bundle, max_crops=2.5)  # type: ignore[arg-type]
    bundle = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    (bundle / "tokenizer.json").write_text("{}")
    with pytest.raises(MolmoEdgeError, match="tokenizer"):
        Molmo(bundle)


def test_an_answer_cut_off_says_so(saying: Saying) -> None:
    answer = saying("a long story").ask(PHOTO, "Tell.", max_new_tokens=3)
    assert not answer.complete
    assert len(answer.token_ids) == 3


def test_the_end_of_the_context_cuts_off(saying: Saying) -> None:
    scene = saying("ok").encode(PHOTO)
    prompt = saying("ok").ask(PHOTO, "Tell.").usage.tokens.prompt
    context = len(scene.embeddings) + prompt + 1
    answer = saying("a long story", context=context).ask(PHOTO, "Tell.")
    assert len(answer.token_ids) == 2
    assert not answer.complete
    with pytest.raises(MolmoEdgeError, match="shorten the question"):
        saying("ok", context=context - 2).ask(PHOTO, "Tell.")
    with pytest.raises(MolmoEdgeError, match="lower max_crops"):
        saying("ok", context=100).ask(PHOTO, "Tell.")


@pytest.mark.parametrize(
    ("question", "says"),
    [
        ("", "empty"),
        (" \n\t", "empty"),
        ("x" * 100_000, f"100000 characters, the limit is {MAX_QUESTION_CHARS}"),
        ("\ud800", "Unicode"),
        (None, "must be a str"),
        (b"What?", "must be a str"),
    ],
)
def test_questions_that_cannot_be_asked(saying: Saying, question: Any, says: str) -> None:
    molmo = saying("ok")
    for ask in (molmo.ask, molmo.point, molmo.count, molmo.stream):
        with pytest.raises(MolmoEdgeError, match=says):
            ask(PHOTO, question)
    assert molmo.fake.images == 0  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "image",
    [
        np.full((8, 8, 3), np.nan, np.float32),
        np.zeros((8, 8, 3), np.int64),
        np.zeros((8, 8, 7), np.uint8),
        np.zeros((0, 8, 3), np.uint8),
        np.zeros((8, 8, 3), complex),
        b"",
        b"not an image",
        "/no/such/photo.jpg",
        None,
        42,
    ],
)
def test_images_that_cannot_be_seen(saying: Saying, image: Any) -> None:
    with pytest.raises(MolmoEdgeError):
        saying("ok").ask(image, "What?")


def test_sampling_is_checked_before_the_image_is_read(saying: Saying) -> None:
    with pytest.raises(MolmoEdgeError, match="temperature"):
        saying("ok").ask("/no/such/photo.jpg", "What?", temperature=-1)


def test_gaps_of_an_answer(saying: Saying, tokenizer: Any) -> None:
    """The fake gives its next id a logit of 1 and every other id 0; rows that only pad the head do not count."""
    molmo, ids = saying("two dogs"), tokenizer.encode(" two dogs")
    assert logit_gaps(molmo.engine, PHOTO, "What?", ids) == [0.0] * (len(ids) + 1)
    assert logit_gaps(molmo.engine, PHOTO, "What?", ids[:-1]) == [0.0] * (len(ids) - 1) + [1.0]
    assert logit_gaps(molmo.engine, PHOTO, "What?", ids[:-1], complete=False) == [0.0] * (len(ids) - 1)
    assert logit_gaps(molmo.engine, PHOTO, "What?", [7, *ids[1:]], complete=False)[0] == 1.0


def test_closing(saying: Saying) -> None:
    with saying("ok") as molmo:
        pass
    assert molmo.fake.closed  # type: ignore[attr-defined]


@pytest.mark.parametrize("size", [(1, 1), (40, 30), (640, 480), (1000, 50), (50, 1000)])
def test_drawing_marks_the_point_and_leaves_the_image_alone(size: tuple[int, int]) -> None:
    image = Image.new("RGB", size, (128, 128, 128))
    before = image.tobytes()
    drawn = draw_points(image, [Point(50, 50, "a rather long label"), Point(0, 0), Point(100, 100, "é")])
    assert drawn.size == image.size
    assert drawn.mode == "RGB"
    assert image.tobytes() == before
    x, y = (min(round(v / 2), v - 1) for v in size)
    if min(size) >= 30:
        near = np.asarray(drawn)[max(0, y - 12) : y + 13, max(0, x - 12) : x + 13].reshape(-1, 3).astype(int)
        assert (abs(near - (229, 37, 107)).max(axis=1) < 12).any()  # the disc
        assert (near.min(axis=1) > 230).any()  # its number and its ring


def test_drawing_many_points() -> None:
    answer = Answer("", tuple(Point(i, i, f"l{i % 9}") for i in range(100)), image=PHOTO)
    drawn = np.asarray(answer.draw())
    assert drawn.shape == PHOTO.shape
    assert drawn.any()
    assert not PHOTO.any()


def test_drawing_grey_and_palette_images() -> None:
    for mode in ("L", "P", "RGBA", "1"):
        assert draw_points(Image.new(mode, (50, 50)), [Point(50, 50)]).mode == "RGB"


def test_an_answer_without_image_cannot_be_drawn() -> None:
    with pytest.raises(DrawError, match="does not hold its image"):
        Answer("x").draw()
    assert Answer("x", (Point(1, 2),)).to_dict()["points"] == [{"x": 1, "y": 2, "label": ""}]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("no tags", "no tags"),
        (TWO_DOGS, "Look: the dogs here."),
        ('<point x="1.0" y="2.0" alt="a">a</point>', "a"),
        ("1 < 2 and <b>bold</b>", "1 < 2 and <b>bold</b>"),
        ('<point x="1.0" y="2', '<point x="1.0" y="2'),
        ("<points", "<points"),
        ('<<point x="1" >b</point>>', "<b>"),
        ('<point x="1" alt="a > b">a > b</point>', "a > b"),
        ("", ""),
    ],
)
def test_readable_whole_and_in_pieces(text: str, shown: str) -> None:
    assert readable(text) == shown
    for size in (1, 2, 3, 7):
        stripper = TagStripper()
        pieces = [stripper.feed(text[i : i + size]) for i in range(0, len(text), size)]
        assert "".join(pieces) + stripper.close() == shown


def test_a_check_passes_where_rounding_alone_chose(tiny_bundle: Path) -> None:
    bundle = open_bundle(tiny_bundle)
    photo = Component("a.png", 1, "0" * 64)
    check = Check(photo, "q", (1, 2), True, ((10.0, 10.0),))
    assert CheckReport(bundle, check, (1, 2), 0.0).passed
    assert CheckReport(bundle, check, (1, 3), 3.0, gap=0.09).passed
    assert CheckReport(bundle, check, (1, 3), None, gap=0.09).passed
    assert CheckReport(bundle, check, (1, 3), 2.0, gap=0.4).passed
    assert not CheckReport(bundle, check, (1, 2), None).passed  # the same ids cannot give another number of points
    assert not CheckReport(bundle, check, (1, 2), 2.1).passed  # nor other points
    assert not CheckReport(bundle, check, (1, 3), None, gap=0.4).passed
    assert not CheckReport(bundle, check, (1, 3), 2.1, gap=0.4).passed
    assert not CheckReport(bundle, check, (1, 2), 0.0, parts=(Part("pixels", False),)).passed
    assert not CheckReport(bundle, check, (1, 3), 0.0, gap=0.6).passed
    assert not CheckReport(bundle, check, (1, 2), 0.0, stopped=False, gap=2.0).passed
    assert CheckReport(bundle, None).passed
