"""The tables of a points folder: points.csv, rows.jsonl and questions.jsonl, with one row per line."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from molmo_edge.data.json_files import json_lines, read_text
from molmo_edge.data.points_records import PERCENT, SHOWN, PointsError, Records, label_of, number, shown, text_of
from molmo_edge.sdk.readable_text import counted

_PIXELS, _PERCENTS = ("x", "y"), ("x_percent", "y_percent")


def read_csv(path: Path, records: Records) -> None:
    """image,label,x,y in pixels, or image,label,x_percent,y_percent. Other columns are ignored."""
    text = read_text(path, PointsError)
    head = text.partition("\n")[0]
    rows = _csv_rows(text, ";" if head.count(";") > head.count(",") else ",", path)
    _, columns = next(rows, ("", []))
    units = [unit for unit in (_PIXELS, _PERCENTS) if set(unit) <= set(columns)]
    if not units or not {"image", "label"} <= set(columns):
        begins = f"begins with {head.strip()!r}" if text.strip() else "is empty"
        raise PointsError(
            f"{path} {begins}: its first line must be image,label,x,y (pixels) or image,label,x_percent,y_percent"
        )
    if len(units) > 1:
        raise PointsError(f"{path} has both {','.join(_PIXELS)} and {','.join(_PERCENTS)}: keep one pair")
    unit, frame = units[0], PERCENT if units[0] == _PERCENTS else SHOWN
    needed = ("image", "label", *unit)
    if twice := [name for name in needed if columns.count(name) > 1]:
        raise PointsError(f'{path} has several columns "{twice[0]}": keep one of them')
    for where, cells in rows:
        if len(cells) > len(columns):
            raise PointsError(
                f"{where} has {len(cells)} cells and the first line {len(columns)}: put a text with a comma in quotes, "
                "and write decimals with a point"
            )
        row = dict(zip(columns, cells, strict=False))
        # Spreadsheets write empty columns, into which a decimal comma would shift values.
        if stray := [cell for name, cell in zip(columns, cells, strict=False) if cell and not name]:
            raise PointsError(f"{where} has {shown(stray[0])} in a column without a name: empty it, or name the column")
        picture, label = records.picture(row["image"], where), label_of(row.get("label"), where)
        if missing := [name for name in needed if name not in row]:
            raise PointsError(
                f"{where} ends before its {' and '.join(missing)}: leave these cells empty if the label is absent"
            )
        values = [row[name] for name in unit]
        if any(values) and not all(values):
            raise PointsError(
                f"{where} has only one of {unit[0]} and {unit[1]}: give both, or none if the label is absent"
            )
        if not any(values):
            records.add_none(picture, label, where)
            continue
        x, y = (number(value, where, name) for value, name in zip(values, unit, strict=True))
        records.add(picture, label, (x, y), frame, where, (x, y))


def _csv_rows(text: str, delimiter: str, path: Path) -> Iterator[tuple[str, list[str]]]:
    """(place, stripped cells) of each row that is not empty.

    Strict, because an unclosed quote would silently absorb the following lines.
    """
    rows = csv.reader(io.StringIO(text), delimiter=delimiter, strict=True, skipinitialspace=True)
    while True:
        where = f"line {rows.line_num + 1} of {path}"
        try:
            cells = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            raise PointsError(f"{where} is not CSV: {error}. Is a quote missing?") from None
        if cells:
            yield where, [cell.strip() for cell in cells]


def read_rows(path: Path, records: Records) -> None:
    """PixMo-Points' columns: image, label, points (x and y of each, percent), and optionally count."""
    for where, row in json_lines(path, PointsError):
        picture, points, label = records.picture(row.get("image"), where), row.get("points"), row.get("label")
        if not isinstance(points, list):
            raise PointsError(f'{where} has no list "points": use [] if the label is absent')
        _check_count(row.get("count"), points, where)
        if not points:
            records.add_none(picture, label, where)
        for each in points:
            if not isinstance(each, dict):
                raise PointsError(f'{where}: a point is {{"x": ..., "y": ...}} in percent, not {shown(each)}')
            x, y = (number(each.get(name), where, name) for name in _PIXELS)
            records.add(picture, label, (x, y), PERCENT, where, (x, y))


def _check_count(count: Any, points: Sequence[Any], where: str) -> None:
    if count is None:
        return
    if number(count, where, "count") != len(points):
        has = counted(len(points), "point") if points else "no points"
        raise PointsError(f"{where} has the count {shown(count)} and {has}: give all points, or omit the count")


def read_questions(path: Path, records: Records) -> None:
    """Add questions to `records` from JSON lines with an image, a question and an answer. Raises PointsError."""
    for where, row in json_lines(path, PointsError):
        picture = records.picture(row.get("image"), where)
        needs = 'a "question" and an "answer", both texts'
        question, answer = (text_of(row.get(name), where, needs) for name in ("question", "answer"))
        records.add_question(picture, question, answer, where)
