"""An independent reader of points folders, which determines what a damaged one means.

It is written from the documentation of the formats, in another way than the package's: it knows the sizes of the
pictures because it has made them, parses CSV character by character and numbers with Decimal, and collects every fault.
"""

from __future__ import annotations

import json
import math
import os
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from typing import Any

from points_damage import PICTURES, Folder

Points = dict[str, list[tuple[float, float]]]


class RefusedError(Exception):
    """An entry is invalid."""


@dataclass
class Meaning:
    """The contents of a folder, and the places of its faults; "": of the whole file or folder."""

    faults: list[str] = field(default_factory=list)
    marks: dict[str, dict[tuple[Any, ...], tuple[float, float]]] = field(default_factory=dict)  # by name, label + shape
    none: set[tuple[str, str]] = field(default_factory=set)
    unsure: set[tuple[str, str]] = field(default_factory=set)
    named: set[str] = field(default_factory=set)

    def entry(self, where: str, read: Callable[[], None]) -> None:
        try:
            read()
        except (RefusedError, KeyError, TypeError, ValueError, AttributeError):
            self.faults.append(where)

    def points(self) -> dict[str, Points]:
        found: dict[str, Points] = {}
        for name, marks in self.marks.items():
            for (label, *_), xy in marks.items():
                if (name, label) not in self.unsure:
                    found.setdefault(name, {}).setdefault(label, []).append(xy)
        for name, label in self.none:
            found.setdefault(name, {})[label] = []
        return {name: {label: sorted(xy) for label, xy in points.items()} for name, points in found.items()}


def meaning(folder: Folder) -> Meaning:
    said = Meaning()
    for path in folder.files:
        try:
            text = path.read_bytes().decode("utf-8").removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
        except UnicodeDecodeError:
            said.faults.append("")
            continue
        read = {"coco": _mean_coco, "labelme": _mean_labelme, "rows": _mean_rows}.get(folder.form, _mean_csv)
        said.entry("", lambda read=read, text=text: read(said, text))  # type: ignore[misc]
    contradicted = [(n, label) for n, label in said.none if any(k[0] == label for k in said.marks.get(n, ()))]
    if said.named & folder.useless or contradicted or not said.points():
        said.faults.append("")
    return said


def _refuse(wrong: Any) -> None:
    if wrong:
        raise RefusedError


def _number(value: Any) -> float:
    if isinstance(value, str):
        value = value.strip()
        _refuse(not value or set(value) - set("0123456789+-.eE"))
        try:
            value = Decimal(value)
        except InvalidOperation:
            raise RefusedError from None
    _refuse(isinstance(value, bool) or not isinstance(value, (int, float, Decimal)))
    try:
        found = float(value)
    except OverflowError:
        raise RefusedError from None
    _refuse(not math.isfinite(found))
    return found


def _label(value: Any) -> str:
    _refuse(not isinstance(value, str) or not value.strip())
    label = value.strip()
    for character in value:
        _refuse(character == "\0" or 0xD800 <= ord(character) <= 0xDFFF)
    for character in label:
        code = ord(character)
        _refuse(code < 32 or 127 <= code < 160 or character in "<>\u2028\u2029")
    return str(label.lower())


def _name(said: Meaning, value: Any) -> str:
    """The file name."""
    _refuse(not isinstance(value, str) or not value.strip())
    _refuse(any(character == "\0" or 0xD800 <= ord(character) <= 0xDFFF for character in value))
    plain = value.strip().replace("\\", "/")
    _refuse(plain.endswith("/"))
    asked = unicodedata.normalize("NFC", os.path.normpath(plain))
    found = [name for name in PICTURES if unicodedata.normalize("NFC", name) == asked]
    if not found:
        said.faults.append("")  # missing pictures are listed together, not by line
        raise RefusedError
    said.named.add(found[0])
    return found[0]


def _put(said: Meaning, name: str, label: str, shape: tuple[Any, ...], xy: tuple[float, float], size: Any) -> None:
    _refuse(not (0 <= xy[0] <= size[0] and 0 <= xy[1] <= size[1]))
    said.marks.setdefault(name, {})[(label, *shape)] = (100 * xy[0] / size[0], 100 * xy[1] / size[1])


def _mean_csv(said: Meaning, text: str) -> None:
    head = text.split("\n")[0]
    rows = _records(text, ";" if head.count(";") > head.count(",") else ",")
    (line, first), *rest = rows or [(1, [])]
    columns = [name.strip() for name in first]
    units = [unit for unit in (("x", "y"), ("x_percent", "y_percent")) if set(unit) <= set(columns)]
    _refuse(len(units) != 1)
    needed = ("image", "label", *units[0])
    _refuse(any(columns.count(name) != 1 for name in needed))
    percent = "x_percent" in needed

    def row(cells: list[str]) -> None:
        _refuse(cells is None or len(cells) > len(columns))
        _refuse(any(cell.strip() for column, cell in zip(columns, cells, strict=False) if not column))
        given = dict(zip(columns, (cell.strip() for cell in cells), strict=False))
        name, label = _name(said, given["image"]), _label(given["label"])
        x, y = (given[column] for column in units[0])
        if x == y == "":
            said.none.add((name, label))
            return
        xy = _number(x), _number(y)
        _put(said, name, label, xy, xy, (100, 100) if percent else PICTURES[name][2])

    for line, cells in rest:
        said.entry(f"line {line} ", lambda cells=cells: row(cells))  # type: ignore[misc]


def _records(text: str, mark: str) -> list[tuple[int, list[str]]]:
    """(first line, cells) of each row that is not empty. A row that is not CSV has no cells and ends the iteration."""
    rows: list[tuple[int, list[str]]] = []
    line, at = 1, 0
    while at < len(text):
        start, cells = line, []
        while True:
            while text[at : at + 1] == " ":
                at += 1
            if text[at : at + 1] == '"':
                cell, at = "", at + 1
                while True:
                    end = text.find('"', at)
                    if end < 0:
                        return [*rows, (start, None)]  # type: ignore[list-item]
                    cell, at = cell + text[at:end], end + 1
                    if text[at : at + 1] != '"':
                        break
                    cell, at = cell + '"', at + 1
                line += cell.count("\n")
                if text[at : at + 1] not in ("", "\n", mark):
                    return [*rows, (start, None)]  # type: ignore[list-item]
            else:
                end = min(end for end in (text.find(mark, at), text.find("\n", at), len(text)) if end >= 0)
                cell, at = text[at:end], end
            cells.append(cell)
            if text[at : at + 1] != mark:
                break
            at += 1
        at, line = at + 1, line + 1
        if cells != [""] or text[at - 2 : at - 1] == " ":
            rows.append((start, cells))
    return rows


def _mean_rows(said: Meaning, text: str) -> None:
    def row(line: str) -> None:
        content = json.loads(line)
        name, points = _name(said, content.get("image")), content.get("points")
        _refuse(not isinstance(points, list))
        if content.get("count") is not None:
            _refuse(_number(content["count"]) != len(points))
        label = _label(content.get("label"))
        if not points:
            said.none.add((name, label))
        for point in points:
            xy = _number(point["x"]), _number(point["y"])
            _put(said, name, label, xy, xy, (100, 100))

    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            said.entry(f"line {number} ", lambda line=line: row(line))  # type: ignore[misc]


def _frame(name: str, width: Any, height: Any) -> tuple[float, float]:
    shown = PICTURES[name][2]
    given = [_number(side) if side else None for side in (width, height)]
    _refuse(any(side is not None and side <= 0 for side in given))
    if None not in given:
        w, h = given
        _refuse(not 0.98 <= (w * shown[1]) / (h * shown[0]) <= 1.02)  # type: ignore[operator]
        return w, h  # type: ignore[return-value]
    _refuse(any(side is not None and not 0.98 <= side / real <= 1.02 for side, real in zip(given, shown, strict=True)))
    return shown


def _mean_coco(said: Meaning, text: str) -> None:
    content = json.loads(text)
    labels: dict[Any, Any] = {}
    images: dict[Any, tuple[str, tuple[float, float]]] = {}
    for part in ("categories", "images", "annotations"):
        _refuse(not isinstance(content[part], list))
    for each in content["categories"]:
        _refuse(each["id"] in labels)
        labels[each["id"]] = each["name"]
    for each in content["images"]:
        _refuse(each["id"] in images)
        name = _name(said, each["file_name"])
        images[each["id"]] = name, _frame(name, each.get("width"), each.get("height"))
    for each in content["annotations"]:
        (name, size), label = images[each["image_id"]], _label(labels[each["category_id"]])
        _refuse(each.get("iscrowd") not in (None, 0, 1))
        if each.get("iscrowd"):
            said.unsure.add((name, label))
            continue
        corners = _coco_corners(each)
        _refuse(not corners)
        xs, ys = ([corner[axis] for corner in corners] for axis in (0, 1))
        _put(said, name, label, tuple(corners), ((min(xs) + max(xs)) / 2, (min(ys) + max(ys)) / 2), size)


def _coco_corners(each: dict[str, Any]) -> list[tuple[float, float]]:
    if each.get("bbox"):
        _refuse(not isinstance(each["bbox"], list))
        x, y, w, h = map(_number, each["bbox"])
        _refuse(w < 0 or h < 0)
        return [(x, y), (x + w, y + h)]
    outline = each.get("segmentation")
    if isinstance(outline, list) and outline:
        _refuse(any(not isinstance(part, list) or len(part) % 2 for part in outline))
        flat = [_number(value) for part in outline for value in part]
        return list(zip(flat[::2], flat[1::2], strict=True))
    keys = each.get("keypoints") or []
    _refuse(not isinstance(keys, list) or len(keys) % 3)
    flat = [_number(value) for value in keys]
    return [(flat[i], flat[i + 1]) for i in range(0, len(flat), 3) if flat[i + 2]]


def _mean_labelme(said: Meaning, text: str) -> None:
    content = json.loads(text)
    if not isinstance(content, dict) or not {"shapes", "imagePath"} & set(content):
        return  # of another program
    name = _name(said, content.get("imagePath"))
    size = _frame(name, content.get("imageWidth"), content.get("imageHeight"))
    _refuse(not isinstance(content.get("shapes"), list))
    least = {"point": 1, "circle": 2, "rectangle": 2, "mask": 2, "polygon": 3, "oriented_rectangle": 3}

    def read(shape: dict[str, Any]) -> None:
        _refuse(not isinstance(shape["points"], list))
        _refuse(any(not isinstance(point, list) or len(point) != 2 for point in shape["points"]))
        corners = [(_number(x), _number(y)) for x, y in shape["points"]]
        label, kind = _label(shape["label"]), shape.get("shape_type") or "polygon"
        if not isinstance(kind, str) or kind not in least:
            said.unsure.add((name, label))
            return
        _refuse(len(corners) < least[kind])
        xs, ys = ([x for x, _ in corners], [y for _, y in corners])
        middle = ((min(xs) + max(xs)) / 2, (min(ys) + max(ys)) / 2)
        _put(said, name, label, (kind, *corners), corners[0] if kind in ("point", "circle") else middle, size)

    for number, shape in enumerate(content["shapes"], 1):
        said.entry(f"shape {number} ", lambda shape=shape: read(shape))  # type: ignore[misc]
