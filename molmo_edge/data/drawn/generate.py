"""Drawn training sets with exact answers, of any size: folders of rows.jsonl and pictures.

    molmo-edge train draw charts --count 1000 --out DATA/pixmo_docs_charts

Each kind has the columns of a PixMo set, so that the same loader reads both:
  clocks                                          allenai/pixmo-clocks, with the picture in "image"
  charts, tables, documents, diagrams, code       allenai/pixmo-docs, with what was drawn in "data" (JSON text)
  points                                          allenai/pixmo-points, with "image" instead of a URL; percent
  count                                           allenai/pixmo-count, with "image" instead of a URL; pixels
Picture i depends only on kind, seed, i, fonts and sprites. An interrupted run can be resumed.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from molmo_edge.data.drawn.charts import draw_chart
from molmo_edge.data.drawn.clocks import draw_clock
from molmo_edge.data.drawn.code import draw_code
from molmo_edge.data.drawn.diagrams import draw_diagram
from molmo_edge.data.drawn.documents import draw_document
from molmo_edge.data.drawn.fonts import Fonts, find_fonts
from molmo_edge.data.drawn.pointing import count_row, labelled_scene, point_rows
from molmo_edge.data.drawn.sheets import encode, photographed, softened
from molmo_edge.data.drawn.sprites import Assets, load_sprites
from molmo_edge.data.drawn.tables import draw_table
from molmo_edge.data.json_files import read_json
from molmo_edge.data.rows import ROWS
from molmo_edge.errors import MolmoEdgeError
from molmo_edge.system.files import atomic_write
from molmo_edge.system.log import logger

_DRAWINGS = {
    "charts": draw_chart,
    "tables": draw_table,
    "documents": draw_document,
    "diagrams": draw_diagram,
    "code": draw_code,
}
KINDS = ("clocks", *_DRAWINGS, "points", "count")
_PAPER = ("tables", "documents")  # half of these are photographed
_SETTINGS = "generated.json"
_LOG_EVERY = 1000  # pictures between two progress messages


class GenerateError(MolmoEdgeError):
    """A data set cannot be drawn with the given arguments."""


@dataclass(frozen=True)
class Materials:
    """Fonts and sprites."""

    fonts: Fonts
    sprites: Assets | None = None  # None: coloured shapes


@dataclass(frozen=True)
class Picture:
    """A file and its rows, without their column "image"."""

    file: bytes
    ending: str  # "jpg" or "png"
    rows: list[dict[str, Any]]


def draw_picture(kind: str, seed: int, index: int, materials: Materials) -> Picture:
    """Picture `index` of the data set `kind` (one of KINDS)."""
    rng = np.random.default_rng([seed, zlib.crc32(kind.encode()), index])
    name = f"{kind}_{seed}_{index}"
    if kind in _DRAWINGS:
        drawing = _DRAWINGS[kind](rng, materials.fonts)
        photo = kind in _PAPER and rng.random() < 0.5
        image = photographed(rng, drawing.image) if photo else softened(rng, drawing.image)
        questions = {"question": [q for q, _ in drawing.questions], "answer": [a for _, a in drawing.questions]}
        row = {"image_id": name, "questions": questions, "data": json.dumps(drawing.data)}
        return Picture(*encode(rng, image, photo), [row])
    if kind == "clocks":
        clock = draw_clock(rng, materials.fonts)
        row = {"example_id": name, "watchface_id": f"drawn_{clock.row['watchface_name']}", **clock.row}
        return Picture(*encode(rng, softened(rng, clock.image)), [row])
    scene = labelled_scene(rng, materials.sprites)
    rows = point_rows(scene) if kind == "points" else [count_row(rng, scene)]
    file, ending = encode(rng, scene.image)
    sha256 = hashlib.sha256(file).hexdigest()
    return Picture(file, ending, [{"image_sha256": sha256, **row} for row in rows])


def generate(
    kind: str,
    count: int,
    out: Path,
    *,
    seed: int = 0,
    fonts: Path | None = None,
    sprites: Path | None = None,
    jobs: int = 1,
) -> int:
    """Extend the folder `out` to `count` pictures. Returns how many were drawn by this call.

    `fonts`: a folder of additional fonts. `sprites`: a folder built by `molmo_edge.data.drawn.sprites`, for points and
    count. `jobs`: processes. Raises GenerateError if `out` was started with other settings, FontError, AssetError.
    """
    if kind not in KINDS:
        raise GenerateError(f'"{kind}" is not a kind of drawing (known: {", ".join(KINDS)})')
    if sprites is not None and kind not in ("points", "count"):
        raise GenerateError(f"{kind}: sprites are used for points and count only: omit --sprites")
    materials = Materials(find_fonts(fonts), None if sprites is None else Assets(load_sprites(sprites)))
    (out / "pictures").mkdir(parents=True, exist_ok=True)
    _check_settings(out, _settings(kind, seed, materials))
    done, begun = _resume(out)
    numbers = range(done, max(count, done + begun))  # a picture in progress is finished even if `count` is lower now
    store = partial(_store, kind, seed, out)
    with (out / ROWS).open("ab") as file:
        for index, rows in zip(numbers, _drawn(store, materials, numbers, jobs), strict=True):
            file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
            if (index + 1) % _LOG_EVERY == 0:
                file.flush()
                logger.info("%d of %d %s", index + 1, count, kind)
    return len(numbers)


def _settings(kind: str, seed: int, materials: Materials) -> dict[str, Any]:
    """What a picture depends on, besides its number."""
    fonts = {path.name for path in (*materials.fonts.files, *materials.fonts.mono)}
    pictures = materials.sprites.sprites if materials.sprites else {}
    sprites = {name: len(each) for name, each in pictures.items()}
    return {"kind": kind, "seed": seed, "fonts": sorted(fonts), "sprites": sprites}


def _check_settings(out: Path, settings: dict[str, Any]) -> None:
    path = out / _SETTINGS
    if not path.exists():
        if (out / ROWS).exists():
            raise GenerateError(f"{out} holds a data set that was not drawn by this command: choose another folder")
        _write(path, json.dumps(settings, indent=1).encode())
        return
    before = read_json(path, GenerateError)
    for name, value in settings.items():
        if before.get(name) != value:
            raise GenerateError(f"{out} was started with other {name}: use the same ones, or choose another folder")


def _resume(out: Path) -> tuple[int, bool]:
    """(number of finished pictures, whether another was started). Rows after the finished ones are cut off.

    The last picture is drawn again, because its rows may be incomplete, and so is everything after a missing picture.
    """
    path = out / ROWS
    if not path.exists():
        return 0, False
    last, begins, end = -1, 0, 0  # the last picture; where its rows begin and end, bytes
    with path.open("rb") as file:
        for line in file:
            name = _picture_of(line)
            if name is None:
                break
            index = int(Path(name).stem)
            if index != last:
                last, begins = last + 1, end
                if index != last or not (out / name).is_file():
                    break
            end += len(line)
    os.truncate(path, begins)
    return max(0, last), last >= 0


def _picture_of(line: bytes) -> str | None:
    """The picture of a row; None for an incomplete row."""
    try:
        name = json.loads(line)["image"] if line.endswith(b"\n") else None
    except (ValueError, KeyError):
        return None
    return name if isinstance(name, str) else None


def _store(kind: str, seed: int, out: Path, materials: Materials, index: int) -> list[dict[str, Any]]:
    """Draw a picture to its file. Returns its rows."""
    picture = draw_picture(kind, seed, index, materials)
    name = f"pictures/{index // 1000:04d}/{index:07d}.{picture.ending}"
    (out / name).parent.mkdir(exist_ok=True)
    _write(out / name, picture.file)
    return [{"image": name, **row} for row in picture.rows]


def _write(path: Path, data: bytes) -> None:
    with atomic_write(path) as part:
        part.write_bytes(data)


# --- processes ----------------------------------------------------------------------------------------------------

_task: Any = None  # of a worker process: a function of the number, so that sprites are sent once


def _begin(store: Any, materials: Materials) -> None:
    global _task
    _task = partial(store, materials)


def _work(index: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = _task(index)
    return rows


def _drawn(store: Any, materials: Materials, numbers: range, jobs: int) -> Iterator[list[dict[str, Any]]]:
    """The rows of each picture, in order."""
    if jobs <= 1 or len(numbers) < 2:
        yield from map(partial(store, materials), numbers)
        return
    with multiprocessing.get_context("spawn").Pool(jobs, _begin, (store, materials)) as pool:
        yield from pool.imap(_work, numbers, chunksize=8)
