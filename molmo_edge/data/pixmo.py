"""The PixMo data sets: pictures with their annotations.

Columns are those of the hub's data set cards. Most sets refer to pictures by URL: download them first (`wanted_images`,
downloads.py). Rows whose picture is missing are left out and counted. Annotations follow olmo/data/pixmo_datasets.py,
except where a comment says otherwise.
"""

from __future__ import annotations

import hashlib
import itertools
import operator
import os
import re
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from molmo_edge.data.annotation_prompts import Points, caption, counting, pointing, without_points
from molmo_edge.data.choices import pick
from molmo_edge.data.downloads import Manifest
from molmo_edge.data.examples import Annotation, Example
from molmo_edge.data.rows import Row, Rows, RowsError, load_rows, number_in, text_in
from molmo_edge.frontend.image_files import load_image
from molmo_edge.frontend.points import format_points

IMAGE, URL, SHA = "image", "image_url", "image_sha256"
POINTING_EVAL = "allenai/pixmo-points-eval"
_MOST_HELD_BACK = 20  # validation takes at most one picture in this many


@dataclass(frozen=True)
class PixmoSet:
    """Where the rows of a set are, and how a row becomes annotations."""

    name: str
    hub_id: str
    style: str
    annotate: Callable[[Reading], Iterable[Annotation]]
    configs: tuple[str, ...] = ()
    splits: tuple[str, ...] = ("train",)  # on the hub
    held_back: int = 0  # pictures of "train" that form the split "validation", which the hub lacks
    grouped: bool = False  # an example has all rows of a picture
    halved: bool = False  # or half of them
    kept: tuple[str, Callable[[Any], bool]] | None = None  # (column, condition): the rows to use
    pixels: bool = False  # points are in pixels: pictures are decoded to convert them to percent
    checked: bool = False  # pictures whose hash differs are left out, as in the reference


@dataclass(frozen=True, eq=False)
class PixmoData:
    """A `DataSet`: examples of one split of one set."""

    name: str
    rows: Rows
    order: np.ndarray  # int64 [n used rows]: row indices, example by example
    starts: np.ndarray  # int64 [n examples + 1]: where each example begins in `order`
    images: Path
    files: Sequence[str]  # file of each example in `images`; empty: pictures are in the rows
    left_out: int  # rows of this split without a picture

    def __len__(self) -> int:
        return len(self.starts) - 1

    def example(self, index: int, rng: np.random.Generator) -> Example:
        """See DataSet. Raises RowsError, and ImageError if a picture must be decoded for its points."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        spec = PIXMO[self.name]
        rows = [self.rows[int(row)] for row in self.order[self.starts[index] : self.starts[index + 1]]]
        image = self.images / self.files[index] if self.files else rows[0].image(IMAGE)
        if image is None or (isinstance(image, Path) and not os.path.isfile(image)):
            raise RowsError(f"{rows[0].where} has no picture{'' if image is None else f' {image}'}: was it deleted?")
        if spec.pixels:
            image = load_image(image)
        made = [annotation for row in rows for annotation in _annotations(spec, row, image, rng)]
        if not made:
            raise RowsError(f"{rows[0].where} has neither question nor answer")
        return Example(image, tuple(made))


def open_pixmo(
    name: str,
    *,
    split: str = "train",
    local: Path | None,
    images: Path | Manifest,
    held_out: Container[str] = frozenset(),
) -> PixmoData:
    """Open one of PIXMO.

    `split`: "train" or "validation". `local`: a copy of the set (see `load_rows`); None: the hub. Pictures come from
    the column "image" (files, or paths relative to the folder) or from `images`, a folder filled by `fetch_images`, or
    its manifest (to read it once for several sets). `held_out`: URLs of pictures to leave out, see
    `pointing_eval_urls`. Raises RowsError, also if there are no examples.
    """
    spec = _known(name, split)
    rows = _load(spec, split, local)
    has_images = IMAGE in rows.columns
    if not has_images and URL not in rows.columns:
        raise RowsError(f'{rows.where} has no pictures: provide a copy of {spec.hub_id} with a column "image" of paths')
    codes, keys = _pictures(spec, rows, has_images)
    chosen = _side(spec, split, keys) if spec.held_back else np.ones(len(keys), bool)
    chosen &= np.fromiter((key not in held_out for key in keys), bool, len(keys))
    wanted = int(chosen[codes[codes >= 0]].sum())
    files: dict[int, str] = {}
    folder = images.folder if isinstance(images, Manifest) else images
    if not has_images:
        manifest = images if isinstance(images, Manifest) else Manifest.load(images)
        files = _files(spec, rows, codes, keys, chosen, manifest)
        chosen &= np.fromiter((code in files for code in range(len(keys))), bool, len(keys))
    order, starts = _groups(spec, codes, chosen)
    if len(starts) == 1:
        raise RowsError(
            f'{name} has no examples for "{split}": {wanted} of the {len(rows)} rows in {rows.where} belong to it, and '
            f"none of their pictures is in {folder}. Download the pictures first"
            if wanted
            else f'{name} has no examples for "{split}": none of the {len(rows)} rows in {rows.where} belongs to it'
        )
    names = [files[int(codes[order[start]])] for start in starts[:-1]] if not has_images else []
    return PixmoData(name, rows, order, starts, folder, names, wanted - len(order))


def wanted_images(name: str, *, split: str = "train", local: Path | None) -> Iterator[tuple[str, str | None]]:
    """(URL, sha256) of each row's picture, for `fetch_images`; "train" includes "validation".

    The hash is None if the set has no hashes, or if the reference accepts any file. Empty for a set or copy that
    includes its pictures. Raises RowsError.
    """
    spec = _known(name, split)
    rows = _load(spec, split, local)
    if IMAGE in rows.columns or URL not in rows.columns:
        return
    has_hash = spec.checked and SHA in rows.columns
    hashes: Iterable[Any] = rows.column(SHA) if has_hash else (None for _ in range(len(rows)))
    for url, sha256 in zip(rows.column(URL), hashes, strict=True):
        if url:
            yield url, sha256 or None


def pointing_eval_urls(local: Path | None) -> frozenset[str]:
    """URLs of pixmo-points-eval's pictures, which the reference leaves out of pixmo_points. `local`: see open_pixmo."""
    return frozenset(load_rows(POINTING_EVAL, (), "test", local).column(URL))


def _known(name: str, split: str) -> PixmoSet:
    if name not in PIXMO:
        raise RowsError(f'"{name}" is not a PixMo set (known: {", ".join(PIXMO)})')
    spec = PIXMO[name]
    splits = (*spec.splits, *(("validation",) if spec.held_back else ()))
    if split in splits:
        return spec
    because = ""
    if spec.pixels:  # the other splits have counts but no points
        because = ": the others have no points. To evaluate on them: `molmo-edge eval --tasks pixmo_count`"
    raise RowsError(f'{name} has no split "{split}" to train on (splits: {", ".join(splits)}){because}')


def _load(spec: PixmoSet, split: str, local: Path | None) -> Rows:
    return load_rows(spec.hub_id, spec.configs, "train" if spec.held_back else split, local)


# --- grouping rows into examples ------------------------------------------------------------------------------------


def _pictures(spec: PixmoSet, rows: Rows, has_images: bool) -> tuple[np.ndarray, Sequence[str]]:
    """(the picture index of each row, -1 for unused rows; the keys of the pictures).

    Reads whole columns, and as few as possible: pixmo-points has 2.4 million rows.
    """
    if has_images and not spec.grouped and not spec.held_back:
        return np.arange(len(rows)), tuple(map(str, range(len(rows))))
    called = next((column for column in (URL, SHA, IMAGE) if column in rows.columns), URL)
    numbers: dict[str, int] = {}
    codes = np.full(len(rows), -1, np.int64)
    used = map(spec.kept[1], rows.column(spec.kept[0])) if spec.kept else itertools.repeat(True, len(rows))
    for row, (key, is_used) in enumerate(zip(rows.column(called), used, strict=True)):
        if not key or not is_used:
            continue
        if not isinstance(key, str):
            raise RowsError(f'{rows.where} needs a column "{URL}" or "{SHA}" to tell which rows share a picture')
        codes[row] = numbers.setdefault(key, len(numbers))
    return codes, tuple(numbers)


def _side(spec: PixmoSet, split: str, keys: Sequence[str]) -> np.ndarray:
    """Which pictures belong to the split, bool [n keys]. The smallest hashes are the validation split.

    The reference draws it at random for each set. Hashes depend neither on the order of the rows nor on the success
    of downloads, and hold back the same pictures in a smaller set.
    """
    hashes = np.array([int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") for key in keys], np.uint64)
    count = min(spec.held_back, len(keys) // _MOST_HELD_BACK)
    held_back = np.zeros(len(keys), bool)
    if count:
        held_back = hashes <= np.partition(hashes, count - 1)[count - 1]
    return held_back if split == "validation" else ~held_back


def _files(
    spec: PixmoSet, rows: Rows, codes: np.ndarray, keys: Sequence[str], chosen: np.ndarray, manifest: Manifest
) -> dict[int, str]:
    """The files of chosen pictures that exist, by picture index."""
    hashes: dict[int, str] = {}
    if spec.checked and SHA in rows.columns:
        for code, sha256 in zip(codes, rows.column(SHA), strict=True):
            hashes.setdefault(int(code), sha256)
    found = ((code, manifest.path(keys[code], hashes.get(code))) for code in map(int, np.flatnonzero(chosen)))
    return {code: path.name for code, path in found if path is not None}


def _groups(spec: PixmoSet, codes: np.ndarray, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(row indices, example by example; where each example begins, and the end)."""
    rows = np.flatnonzero(codes >= 0)
    rows = rows[chosen[codes[rows]]]
    if not spec.grouped:
        return rows, np.arange(len(rows) + 1)
    rows = rows[np.argsort(codes[rows], kind="stable")]  # keeps the order in which pictures first appear
    starts = np.flatnonzero(np.diff(codes[rows], prepend=-1, append=len(chosen)))
    if spec.halved:  # explanations are long: as in the reference, several are split into two examples
        sizes = np.diff(starts)
        starts = np.union1d(starts, (starts[:-1] + (sizes + 1) // 2)[sizes > 1])
    return rows, starts


# --- annotations of a row ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reading:
    """A row to annotate."""

    row: Row
    style: str
    rng: np.random.Generator
    unit: tuple[float, float]  # one percent of the picture's width and height, in the unit of the row's points

    def text(self, column: str) -> str:
        """A cell that must be a text. If it is blank, its annotation is left out."""
        return self.row.text(column, blank=True)


def _annotations(spec: PixmoSet, row: Row, image: Any, rng: np.random.Generator) -> list[Annotation]:
    """Annotations without blank messages. Raises RowsError for a row of another layout."""
    unit = (image.shape[1] / 100, image.shape[0] / 100) if spec.pixels else (1.0, 1.0)
    try:
        made = list(spec.annotate(Reading(row, spec.style, rng, unit)))
        return [annotation for annotation in made if all(message.strip() for message in annotation.messages)]
    except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
        raise RowsError(f"{row.where} does not have the layout of {spec.hub_id}: {error!r}") from error


def _caption(read: Reading) -> Iterator[Annotation]:
    yield caption(read.text("caption"), read.rng)


def _caption_and_transcript(read: Reading) -> Iterator[Annotation]:
    yield from _caption(read)
    transcripts = read.row["transcripts"] or ()
    if len(transcripts):
        transcript = text_in(read.row, pick(read.rng, transcripts), "transcript", blank=True)
        yield caption(transcript, read.rng, "transcript")


def _question(read: Reading) -> Iterator[Annotation]:
    yield Annotation(read.style, (without_points(read.text("question"), read.rng), read.text("answer")))


def _conversation(read: Reading) -> Iterator[Annotation]:
    """Questions and answers in turn.

    For any question that asks "how many", the reference puts the request for no points before the first question, and
    the later question is lost. Here the request precedes the question that it belongs to.
    """
    messages = read.row.get("messages")
    if not messages:  # the first version of the set: "[USER] ... [ASSISTANT] ... [USER] ... [ASSISTANT]" and the answer
        parts = re.split(r"\[(?:USER|ASSISTANT)\]", read.text("question"))
        messages = [part.strip() for part in (parts[1:-1] if len(parts) > 1 else parts)] + [read.text("answer")]
    if len(messages) % 2:
        raise RowsError(f"{read.row.where} has {len(messages)} messages: a question has no answer")
    texts = [text_in(read.row, message, "message", blank=True) for message in messages]
    turns = (without_points(text, read.rng) if turn % 2 == 0 else text for turn, text in enumerate(texts))
    yield Annotation(read.style, tuple(turns))


def _pointing(read: Reading) -> Iterator[Annotation]:
    row = read.row
    if row["points"] is None and row.get("count") is None:  # an empty list means that there are none
        raise RowsError(f"{row.where} has neither points nor a count")
    points = _points(row, row["points"], read.unit)
    if not points and row.get("count"):  # "There are none." would be wrong
        raise RowsError(f"{row.where} has the count {row['count']} without points: is it of an evaluation split?")
    annotate = counting if read.style == "point_count" else pointing
    yield annotate(row.text("label"), points, read.rng)


def _explanation(read: Reading) -> Iterator[Annotation]:
    """The answer has a mark in the place of points: "The <|POINT|> is open." """
    row, parts = read.row, read.text("parsed_response").split("<|POINT|>")
    tags = [_tag(row, *mark) for mark in zip(row["points"], row["inline_text"], row["alt_text"], strict=True)]
    answer = parts[0] + "".join(tag + part for tag, part in zip(tags, parts[1:], strict=True))
    yield Annotation(read.style, (read.text("question"), answer))


def _tag(row: Row, points: Any, inline: Any, alt: Any) -> str:
    """The points of a mark, or its inline text if it has none."""
    if not points:
        return text_in(row, inline, "inline text", blank=True)
    label = text_in(row, inline, "inline text of points")
    return format_points(_points(row, points), label, alt=text_in(row, alt, "alt text of points"))


def _document(read: Reading) -> Iterator[Annotation]:
    asked = read.row["questions"]
    if isinstance(asked, dict):  # how `datasets` stores a sequence of structs
        pairs = list(zip(asked["question"], asked["answer"], strict=True))
    else:
        pairs = [(each["question"], each["answer"]) for each in asked]
    for pair in pairs:
        question, answer = (
            text_in(read.row, *each, blank=True) for each in zip(pair, ("question", "answer"), strict=True)
        )
        yield Annotation(read.style, (question, answer))


def _clock(read: Reading) -> Iterator[Annotation]:
    # `text` is the time alone, "8:15:30", or a sentence that no time is shown.
    time = read.text("text")
    answer = f"The time shown is {time}" if time[:1].isdigit() else time
    yield Annotation(read.style, ("What time is being shown?", answer))


def _points(row: Row, value: Any, unit: tuple[float, float] = (1.0, 1.0)) -> Points:
    """Points in percent, from dicts with x and y, from a dict of two lists, or from pairs.

    Points outside the picture are moved to its edge, as in Molmo 2. Raises RowsError for coordinates that are not
    finite numbers.
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


def _is_present(value: Any) -> bool:
    return value is not None


def _point_set(name: str, style: str, method: str) -> PixmoSet:
    # The reference swaps point_count and pointing for these sets. It trains on both, so this makes no difference.
    kept = ("collection_method", partial(operator.eq, method))
    return PixmoSet(
        name, "allenai/pixmo-points", style, _pointing, held_back=2048, grouped=True, kept=kept, checked=True
    )


def _document_set(kind: str) -> PixmoSet:
    # Molmo 1's own runs named the styles scifi_charts, scifi_table, scifi_diagram and scifi_document.
    name = f"pixmo_docs_{kind}"
    return PixmoSet(name, "allenai/pixmo-docs", name, _document, configs=(kind,), splits=("train", "validation"))


_ALL = (
    # Columns: image_url, caption, transcripts (texts).
    PixmoSet("pixmo_cap", "allenai/pixmo-cap", "long_caption", _caption, held_back=2048),
    PixmoSet("pixmo_cap_with_transcripts", "allenai/pixmo-cap", "long_caption", _caption_and_transcript,
             held_back=2048),
    # Columns: image_url, question, answer; since December 2024 messages (texts), according to the reference's code.
    PixmoSet("pixmo_cap_qa", "allenai/pixmo-cap-qa", "synthetic_qa", _conversation, held_back=2048, grouped=True),
    # Columns: image_url, image_sha256, question, answer.
    PixmoSet("pixmo_ask_model_anything", "allenai/pixmo-ask-model-anything", "user_qa", _question,
             held_back=2048, grouped=True, checked=True),
    # Columns: image_url, image_sha256, points (dicts x and y, percent, although the card says pixels), count, label,
    # collection_method ("pointing", or "counting" for pictures with many of something).
    _point_set("pixmo_points", "pointing", "pointing"),
    _point_set("pixmo_points_counting", "point_count", "pointing"),
    _point_set("pixmo_points_high_freq", "pointing", "counting"),
    _point_set("pixmo_points_high_freq_counting", "point_count", "counting"),
    # Columns: image_url, image_sha256, question, response, parsed_response (none if it could not be parsed),
    # alt_text, inline_text, points (each a list, one entry for each mark in parsed_response; points as pairs, percent).
    # Columns according to code that uses them; the card was not available.
    PixmoSet("pixmo_point_explanations", "allenai/pixmo-point-explanations", "point_qa", _explanation,
             held_back=1024, grouped=True, halved=True, kept=("parsed_response", _is_present), checked=True),
    # Columns: image_url, image_sha256, count, points (lists x and y, pixels; only in "train"), label.
    PixmoSet("pixmo_count", "allenai/pixmo-count", "pointing", _pointing, pixels=True),
    PixmoSet("pixmo_count_counting", "allenai/pixmo-count", "point_count", _pointing, pixels=True),
    # Columns: example_id, watchface_id, watchface_name, watch_time, time_format, shows_seconds, hour_visible,
    # minute_visible, second_visible, text; no pictures (made with facer.io): a copy needs a column "image".
    # The answer is that of Molmo 2's code, which also rotates, scales and recolours the watches.
    PixmoSet("pixmo_clocks", "allenai/pixmo-clocks", "clocks", _clock, splits=("train", "validation")),
    # Columns: image, image_id, questions (question and answer of each).
    *map(_document_set, ("charts", "tables", "diagrams", "other")),
)  # fmt: skip
PIXMO: dict[str, PixmoSet] = {each.name: each for each in _ALL}
