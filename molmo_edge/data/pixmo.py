"""The PixMo data sets as a trainer wants them: a picture with all that is said about it.

Columns are those of the hub's data set cards. Most sets name their pictures by URL: fetch them first
(`wanted_images`, downloads.py); rows whose picture is not there are left out and counted. What becomes of a row
follows olmo/data/pixmo_datasets.py, except where a comment says otherwise.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from molmo_edge.data.annotation_prompts import Points, caption, counting, pointing, without_points
from molmo_edge.data.downloads import Manifest
from molmo_edge.data.examples import Annotation, Example
from molmo_edge.data.rows import Row, Rows, RowsError, load_rows, number_in, text_in
from molmo_edge.frontend.image_files import load_image
from molmo_edge.frontend.points import format_points

IMAGE, URL, SHA = "image", "image_url", "image_sha256"
POINTING_EVAL = "allenai/pixmo-points-eval"
_MOST_HELD_BACK = 20  # of a small copy no more than one picture in so many is for validation


@dataclass(frozen=True)
class PixmoSet:
    """One of PIXMO: where its rows are, and how a row becomes annotations."""

    name: str
    hub_id: str
    style: str
    annotate: Callable[[PixmoSet, Row, Any, np.random.Generator], Iterable[Annotation]]  # set, row, picture, rng
    configs: tuple[str, ...] = ()
    splits: tuple[str, ...] = ("train",)  # on the hub
    held_back: int = 0  # pictures of "train" that make a split "validation", where the hub has none
    grouped: bool = False  # all rows of a picture are one example
    halved: bool = False  # or two of them
    kept: tuple[str, Callable[[Any], bool]] | None = None  # rows, by what they have in a column
    pixels: bool = False  # its points are pixels, not percent: the picture is decoded to turn them into percent
    checked: bool = False  # pictures that are others than once are left out, as the reference does for these sets


@dataclass(frozen=True, eq=False)
class PixmoData:
    """A DataSet: examples of one split of one set."""

    name: str
    rows: Rows
    order: np.ndarray  # int64 [n rows that are used]: their numbers, example by example
    starts: np.ndarray  # int64 [n examples + 1]: where in `order` each example begins
    images: Path
    files: Sequence[str]  # the picture of each example, in `images`; empty: pictures are in the rows
    left_out: int  # rows of this split whose picture is not there

    def __len__(self) -> int:
        return len(self.starts) - 1

    def example(self, index: int, rng: np.random.Generator) -> Example:
        """See DataSet. Raises RowsError, and ImageError where a picture must be decoded for its points."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        info = PIXMO[self.name]
        rows = [self.rows[int(row)] for row in self.order[self.starts[index] : self.starts[index + 1]]]
        image = self.images / self.files[index] if self.files else rows[0].image(IMAGE)
        if image is None or (isinstance(image, Path) and not os.path.isfile(image)):
            raise RowsError(f"{_called(rows[0])} has no picture{'' if image is None else f' {image}'}: was it deleted?")
        if info.pixels:
            image = load_image(image)
        made = [annotation for row in rows for annotation in _annotations(info, row, image, rng)]
        if not made:
            raise RowsError(f"{_called(rows[0])} has neither question nor answer")
        return Example(image, tuple(made))


def open_pixmo(
    name: str,
    *,
    split: str = "train",
    local: Path | None,
    images: Path | Manifest,
    held_out: Container[str] = frozenset(),
) -> PixmoData:
    """One of PIXMO. `split`: "train" or "validation".

    `local`: a copy of the set, see `load_rows`, or None for the hub. Pictures come from its own column "image" (files,
    or paths relative to the folder), else from `images`, a folder that `fetch_images` has filled, or its manifest
    (to read it once for several sets). Pictures in `held_out`, by URL, are no part of it: see `pointing_eval_urls`.
    Raises RowsError, also where no example is left.
    """
    info = _known(name, split)
    rows = _load(info, split, local)
    own = IMAGE in rows.columns
    if not own and URL not in rows.columns:
        raise RowsError(
            f'{rows.where} has no pictures: a copy of {info.hub_id} with a column "image" is needed, a path in each row'
        )
    codes, keys = _pictures(info, rows, own)
    chosen = _side(info, split, keys) if info.held_back else np.ones(len(keys), bool)
    chosen &= np.fromiter((key not in held_out for key in keys), bool, len(keys))
    wanted = int(chosen[codes[codes >= 0]].sum())
    files: dict[int, str] = {}
    folder = images.folder if isinstance(images, Manifest) else images
    if not own:
        manifest = images if isinstance(images, Manifest) else Manifest.load(images)
        files = _files(info, rows, codes, keys, chosen, manifest)
        chosen &= np.fromiter((code in files for code in range(len(keys))), bool, len(keys))
    order, starts = _groups(info, codes, chosen)
    if len(starts) == 1:
        raise RowsError(
            f'{name} has no examples for "{split}": of {len(rows)} rows in {rows.where}, {wanted} belong to it, and '
            f"{wanted} have no picture in {folder}. Fetch the pictures first"
            if wanted
            else f'{name} has no examples for "{split}": none of the {len(rows)} rows in {rows.where} belongs to it'
        )
    names = [files[int(codes[order[start]])] for start in starts[:-1]] if not own else []
    return PixmoData(name, rows, order, starts, folder, names, wanted - len(order))


def wanted_images(name: str, *, split: str = "train", local: Path | None) -> Iterator[tuple[str, str | None]]:
    """(URL, sha256) of each row's picture, for `fetch_images`: of "validation" too, which is a part of "train".

    The hash is None where the set has none, or where the reference takes what the URL gives today. Nothing for a set
    or a copy that holds its own pictures. Raises RowsError.
    """
    info = _known(name, split)
    rows = _load(info, split, local)
    if IMAGE in rows.columns or URL not in rows.columns:
        return
    has_hash = info.checked and SHA in rows.columns
    hashes: Iterable[Any] = rows.column(SHA) if has_hash else (None for _ in range(len(rows)))
    for url, sha256 in zip(rows.column(URL), hashes, strict=True):
        if url:
            yield url, sha256 or None


def pointing_eval_urls(local: Path | None) -> frozenset[str]:
    """The pictures of pixmo-points-eval, which the reference keeps out of pixmo_points. `local`: as in open_pixmo."""
    return frozenset(load_rows(POINTING_EVAL, (), "test", local).column(URL))


def _known(name: str, split: str) -> PixmoSet:
    if name not in PIXMO:
        raise RowsError(f'there is no PixMo set "{name}", only {", ".join(PIXMO)}')
    info = PIXMO[name]
    splits = (*info.splits, *(("validation",) if info.held_back else ()))
    if split in splits:
        return info
    because = ""
    if info.pixels:  # counts alone, and answers are made of points
        because = ": the others have no points. `molmo-edge eval --tasks pixmo_count` asks about them"
    raise RowsError(f'{name} has no split "{split}" to train on, only {", ".join(splits)}{because}')


def _load(info: PixmoSet, split: str, local: Path | None) -> Rows:
    return load_rows(info.hub_id, info.configs, "train" if info.held_back else split, local)


# --- which rows are an example --------------------------------------------------------------------------------------


def _pictures(info: PixmoSet, rows: Rows, own: bool) -> tuple[np.ndarray, Sequence[str]]:
    """(for each row the number of its picture, -1 for a row that is not used; what the pictures are called).

    Whole columns are read, and no more of them than must be: pixmo-points has 2.4 million rows.
    """
    if own and not info.grouped and not info.held_back:
        return np.arange(len(rows)), tuple(map(str, range(len(rows))))
    called = next((column for column in (URL, SHA, IMAGE) if column in rows.columns), URL)
    numbers: dict[str, int] = {}
    codes = np.full(len(rows), -1, np.int64)
    used = map(info.kept[1], rows.column(info.kept[0])) if info.kept else itertools.repeat(True, len(rows))
    for row, (key, is_used) in enumerate(zip(rows.column(called), used, strict=True)):
        if not key or not is_used:
            continue
        if not isinstance(key, str):
            raise RowsError(f'{rows.where} needs a column "{URL}" or "{SHA}" that says which rows share a picture')
        codes[row] = numbers.setdefault(key, len(numbers))
    return codes, tuple(numbers)


def _side(info: PixmoSet, split: str, keys: Sequence[str]) -> np.ndarray:
    """Which pictures belong to the split: those with the smallest hashes to validation. bool [n keys].

    The reference draws them at random for each set. By hash they do not depend on the rows' order, nor on what could
    be downloaded, and what a large set holds back, a smaller one does too.
    """
    hashes = np.array([int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") for key in keys], np.uint64)
    count = min(info.held_back, len(keys) // _MOST_HELD_BACK)
    held_back = np.zeros(len(keys), bool)
    if count:
        held_back = hashes <= np.partition(hashes, count - 1)[count - 1]
    return held_back if split == "validation" else ~held_back


def _files(
    info: PixmoSet, rows: Rows, codes: np.ndarray, keys: Sequence[str], chosen: np.ndarray, manifest: Manifest
) -> dict[int, str]:
    """The files, by number, of those pictures that are chosen and there."""
    hashes: dict[int, str] = {}
    if info.checked and SHA in rows.columns:
        for code, sha256 in zip(codes, rows.column(SHA), strict=True):
            hashes.setdefault(int(code), sha256)
    found = ((code, manifest.path(keys[code], hashes.get(code))) for code in map(int, np.flatnonzero(chosen)))
    return {code: path.name for code, path in found if path is not None}


def _groups(info: PixmoSet, codes: np.ndarray, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(rows, example by example; where each example begins, and the end)."""
    rows = np.flatnonzero(codes >= 0)
    rows = rows[chosen[codes[rows]]]
    if not info.grouped:
        return rows, np.arange(len(rows) + 1)
    rows = rows[np.argsort(codes[rows], kind="stable")]  # numbers are in the order of the rows, and so are examples
    starts = np.flatnonzero(np.diff(codes[rows], prepend=-1, append=len(chosen)))
    if info.halved:  # explanations are long: the reference makes two examples of a picture that has several
        sizes = np.diff(starts)
        starts = np.union1d(starts, (starts[:-1] + (sizes + 1) // 2)[sizes > 1])
    return rows, starts


def _is_there(value: Any) -> bool:
    return value is not None


# --- what a row says --------------------------------------------------------------------------------------------------


def _called(row: Row) -> str:
    return f"row {row.index} of {row.rows.where}"


def _annotations(info: PixmoSet, row: Row, image: Any, rng: np.random.Generator) -> list[Annotation]:
    """Without those that ask or answer nothing. Raises RowsError for a row of another shape."""
    try:
        made = list(info.annotate(info, row, image, rng))
        return [annotation for annotation in made if all(message.strip() for message in annotation.messages)]
    except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
        raise RowsError(f"{_called(row)} is not as {info.hub_id} has it: {error!r}") from error


def _caption(info: PixmoSet, row: Row, image: Any, rng: np.random.Generator) -> Iterator[Annotation]:
    yield caption(_text(row, "caption"), rng)


def _caption_and_transcript(info: PixmoSet, row: Row, image: Any, rng: np.random.Generator) -> Iterator[Annotation]:
    yield caption(_text(row, "caption"), rng)
    transcripts = row["transcripts"] or ()
    if len(transcripts):
        said = text_in(row, transcripts[int(rng.integers(len(transcripts)))], "transcript", blank=True)
        yield caption(said, rng, "transcript")


def _question(info: PixmoSet, row: Row, image: Any, rng: np.random.Generator) -> Iterator[Annotation]:
    yield Annotation(info.style, (without_points(_text(row, "question"), rng), _text(row, "answer")))


def _conversation(info: PixmoSet, row: Row, image: Any, rng: np.random.Generator) -> Iterator[Annotation]:
    """Questions and answers in turn. The reference puts the request for no points before the first question, whichever
    asks how many, and the later question is lost: here it stands where it belongs."""
    messages = row.get("messages")
    if not messages:  # the set's first version: "[USER] ... [ASSISTANT] ... [USER] ... [ASSISTANT]" and the answer
        parts = re.split(r"\[(?:USER|ASSISTANT)\]", _text(row, "question"))
        messages = [part.strip() for part in (parts[1:-1] if len(parts) > 1 else parts)] + [_text(row, "answer")]
    if len(messages) % 2:
        raise RowsError(f"{_called(row)} has {len(messages)} messages: one is a question without an answer")
    texts = [text_in(row, message, "message", blank=True) for message in messages]
    asked = (without_points(text, rng) if turn % 2 == 0 else text for turn, text in enumerate(texts))
    yield Annotation(info.style, tuple(asked))


def _pointing(info: PixmoSet, row: Row, image: Any, rng: np.random.Generator) -> Iterator[Annotation]:
    ask = counting if info.style == "point_count" else pointing
    unit = (image.shape[1] / 100, image.shape[0] / 100) if info.pixels else (1.0, 1.0)
    if row["points"] is None and row.get("count") is None:  # an empty list says that there are none
        raise RowsError(f"{_called(row)} has neither points nor a count")
    points = _points(row, row["points"], unit)
    if not points and row.get("count"):  # "There are none." would be a lie
        raise RowsError(f"{_called(row)} counts {row['count']} without a point: is it of a split to evaluate with?")
    yield ask(text_in(row, row["label"], "label"), points, rng)


def _explanation(info: PixmoSet, row: Row, image: Any, rng: np.random.Generator) -> Iterator[Annotation]:
    """The answer has a mark wherever points belong: "The <|POINT|> is open." """
    parts = _text(row, "parsed_response").split("<|POINT|>")
    tags = [
        _tag(row, points, shown, alt)
        for points, shown, alt in zip(row["points"], row["inline_text"], row["alt_text"], strict=True)
    ]
    answer = parts[0] + "".join(tag + part for tag, part in zip(tags, parts[1:], strict=True))
    yield Annotation(info.style, (_text(row, "question"), answer))


def _tag(row: Row, points: Any, shown: Any, alt: Any) -> str:
    """The points of a mark; of one without points only what it shows."""
    if not points:
        return text_in(row, shown, "inline text", blank=True)
    label = text_in(row, shown, "inline text of points")
    return format_points(_points(row, points), label, alt=text_in(row, alt, "alt text of points"))


def _document(info: PixmoSet, row: Row, image: Any, rng: np.random.Generator) -> Iterator[Annotation]:
    asked = row["questions"]
    if isinstance(asked, dict):  # how `datasets` stores a sequence of structs
        pairs = list(zip(asked["question"], asked["answer"], strict=True))
    else:
        pairs = [(each["question"], each["answer"]) for each in asked]
    for question, answer in pairs:
        texts = (text_in(row, question, "question", blank=True), text_in(row, answer, "answer", blank=True))
        yield Annotation(info.style, texts)


def _clock(info: PixmoSet, row: Row, image: Any, rng: np.random.Generator) -> Iterator[Annotation]:
    # `text` is the time alone, "8:15:30", or a sentence that there is none to be seen.
    shown = _text(row, "text")
    answer = f"The time shown is {shown}" if shown[:1].isdigit() else shown
    yield Annotation(info.style, ("What time is being shown?", answer))


def _text(row: Row, column: str) -> str:
    """A cell that has to be a text; where it is blank, the annotation is left out."""
    return text_in(row, row[column], column, blank=True)


def _points(row: Row, value: Any, unit: tuple[float, float] = (1.0, 1.0)) -> Points:
    """Percent, of dicts with x and y, of a dict with a list of each, or of pairs; `unit`: one percent, as they count.

    Annotators click beside a picture too: such points are put on its edge, as Molmo 2 does. Raises RowsError for
    coordinates that are no finite numbers.
    """
    if isinstance(value, dict):
        pairs = list(zip(value["x"], value["y"], strict=True))
    else:
        pairs = [(each["x"], each["y"]) if isinstance(each, dict) else (each[0], each[1]) for each in value or ()]
    numbers = [(number_in(row, x, "x of a point"), number_in(row, y, "y of a point")) for x, y in pairs]
    return [(_clip(x / unit[0]), _clip(y / unit[1])) for x, y in numbers]


def _clip(percent: float) -> float:
    return min(max(percent, 0.0), 100.0)


# --- the sets ---------------------------------------------------------------------------------------------------------


def _many(method: Any) -> bool:
    return bool(method == "counting")


def _few(method: Any) -> bool:
    return bool(method == "pointing")


# The reference has point_count and pointing the wrong way round for these, which changes nothing as it trains on both.
def _point_set(name: str, style: str, kept: Callable[[Any], bool]) -> PixmoSet:
    return PixmoSet(
        *(name, "allenai/pixmo-points", style, _pointing),
        held_back=2048,
        grouped=True,
        kept=("collection_method", kept),
        checked=True,
    )


def _document_set(kind: str) -> PixmoSet:
    # Molmo 1's own runs called the styles scifi_charts, scifi_table, scifi_diagram and scifi_document.
    name = f"pixmo_docs_{kind}"
    return PixmoSet(name, "allenai/pixmo-docs", name, _document, configs=(kind,), splits=("train", "validation"))


_ALL = (
    # Columns: image_url, caption, transcripts (texts).
    PixmoSet("pixmo_cap", "allenai/pixmo-cap", "long_caption", _caption, held_back=2048),
    PixmoSet(
        *("pixmo_cap_with_transcripts", "allenai/pixmo-cap", "long_caption", _caption_and_transcript), held_back=2048
    ),
    # Columns: image_url, question, answer, and since December 2024 messages (texts). Of these the reference's code
    # alone tells: the card that was read is older.
    PixmoSet(*("pixmo_cap_qa", "allenai/pixmo-cap-qa", "synthetic_qa", _conversation), held_back=2048, grouped=True),
    # Columns: image_url, image_sha256, question, answer.
    PixmoSet(
        *("pixmo_ask_model_anything", "allenai/pixmo-ask-model-anything", "user_qa", _question),
        held_back=2048,
        grouped=True,
        checked=True,
    ),
    # Columns: image_url, image_sha256, points (dicts x and y, percent, although the card says pixels), count, label,
    # collection_method ("pointing", or "counting" for pictures with many of something).
    _point_set("pixmo_points", "pointing", _few),
    _point_set("pixmo_points_counting", "point_count", _few),
    _point_set("pixmo_points_high_freq", "pointing", _many),
    _point_set("pixmo_points_high_freq_counting", "point_count", _many),
    # Columns: image_url, image_sha256, question, response, parsed_response (none where it could not be parsed),
    # alt_text, inline_text, points (each a list, one entry for each mark in parsed_response; points as pairs, percent).
    # They are read off code that uses them; the card was not to be had.
    PixmoSet(
        *("pixmo_point_explanations", "allenai/pixmo-point-explanations", "point_qa", _explanation),
        held_back=1024,
        grouped=True,
        halved=True,
        kept=("parsed_response", _is_there),
        checked=True,
    ),
    # Columns: image_url, image_sha256, count, points (lists x and y, pixels; none outside of "train"), label.
    PixmoSet("pixmo_count", "allenai/pixmo-count", "pointing", _pointing, pixels=True),
    PixmoSet("pixmo_count_counting", "allenai/pixmo-count", "point_count", _pointing, pixels=True),
    # Columns: example_id, watchface_id, watchface_name, watch_time, time_format, shows_seconds, hour_visible,
    # minute_visible, second_visible, text; no pictures, which were made with facer.io: a copy needs a column "image".
    # The answer is that of Molmo 2's code, which also turns, scales and recolours the watches: here they stay as is.
    PixmoSet("pixmo_clocks", "allenai/pixmo-clocks", "clocks", _clock, splits=("train", "validation")),
    # Columns: image, image_id, questions (question and answer of each).
    *map(_document_set, ("charts", "tables", "diagrams", "other")),
)
PIXMO: dict[str, PixmoSet] = {each.name: each for each in _ALL}
