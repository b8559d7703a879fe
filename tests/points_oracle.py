"""Random points folders, random damage, and a second reader that says what a damaged folder still means.

The reader is written from the documentation of the formats, in another way than the package's: it knows the sizes of
the pictures because it has made them, parses CSV character by character and numbers with Decimal, and collects every
fault.
"""

from __future__ import annotations

import copy
import json
import math
import os
import random
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from PIL import Image

FORMS = ("csv", "percent csv", "coco", "labelme", "rows")
LABELS = ("cup", "Cup", "tea spoon", "löffel", "a cup, red", 'a 5" disk', "杯子")
# Name on disk -> (stored size, EXIF orientation, shown size).
PICTURES = {
    "a.png": ((100, 50), 1, (100, 50)),
    "turned.jpg": ((80, 40), 6, (40, 80)),
    "t.tif": ((60, 30), 8, (30, 60)),
    "caf\u00e9.webp": ((64, 64), 3, (64, 64)),
}
Points = dict[str, list[tuple[float, float]]]


class RefusedError(Exception):
    """What the oracle raises for the first fault of an entry."""


def make_pictures(folder: Path) -> None:
    for name, (stored, orientation, _) in PICTURES.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        more: dict[str, Any] = {"tiffinfo": {0x0112: orientation}} if name.endswith(".tif") else {"exif": exif}
        noise = random.Random(0).randbytes(stored[0] * stored[1] * 3)  # so that half of a file is not the picture
        Image.frombytes("RGB", stored, noise).save(folder / name, **more)


@dataclass
class Folder:
    """One on disk, and what is known of its pictures."""

    path: Path
    form: str
    useless: set[str] = field(default_factory=set)  # pictures that were removed or damaged

    @property
    def files(self) -> list[Path]:
        names = {"csv": "points.csv", "percent csv": "points.csv", "coco": "annotations.json", "rows": "rows.jsonl"}
        return [self.path / names[self.form]] if self.form in names else sorted(self.path.glob("*.json"))


# --- writing ----------------------------------------------------------------------------------------------------------


def write(rng: random.Random, path: Path, form: str, pictures: Path) -> Folder:
    for name in PICTURES:
        (path / name).write_bytes((pictures / name).read_bytes())
    things = []
    for _ in range(rng.randint(2, 8)):
        name = rng.choice(list(PICTURES))
        width, height = PICTURES[name][2]
        x0, x1 = sorted(rng.randint(0, width) for _ in range(2))
        y0, y1 = sorted(rng.randint(0, height) for _ in range(2))
        things.append((name, rng.choice(LABELS), (x0, y0, x1, y1)))
    spelled = {name: unicodedata.normalize(rng.choice(["NFC", "NFD"]), name) for name in PICTURES}
    {"csv": _csv, "percent csv": _csv, "coco": _coco, "labelme": _labelme, "rows": _rows}[form](
        rng, path, things, spelled, form
    )
    return Folder(path, form)


def _middle(box: tuple[int, ...], size: tuple[int, int] | None = None) -> tuple[float, float]:
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    return (x, y) if size is None else (100 * x / size[0], 100 * y / size[1])


def _csv(rng: random.Random, path: Path, things: list[Any], spelled: dict[str, str], form: str) -> None:
    percent, mark = form == "percent csv", rng.choice(",;")
    head = ["image", "label", *(("x_percent", "y_percent") if percent else ("x", "y"))]
    lines = [
        head,
        *([spelled[n], label, *_middle(box, PICTURES[n][2] if percent else None)] for n, label, box in things),
    ]
    if rng.random() < 0.3:
        lines.append([spelled["a.png"], "nowhere", "", ""])
    text = "\n".join(mark.join(_cell(str(cell), mark) for cell in line) for line in lines)
    (path / "points.csv").write_text(text + "\n", encoding=rng.choice(["utf-8", "utf-8-sig"]))


def _cell(text: str, mark: str) -> str:
    return '"' + text.replace('"', '""') + '"' if mark in text or '"' in text else text


def _rows(rng: random.Random, path: Path, things: list[Any], spelled: dict[str, str], form: str) -> None:
    grouped: dict[tuple[str, str], list[dict[str, float]]] = {}
    for name, label, box in things:
        x, y = _middle(box, PICTURES[name][2])
        grouped.setdefault((name, label), []).append({"x": x, "y": y})
    rows = [
        {"image": spelled[name], "label": label, "points": points}
        | ({"count": len(points)} if rng.random() < 0.5 else {})
        for (name, label), points in grouped.items()
    ]
    text = "\n".join(json.dumps(row, ensure_ascii=rng.random() < 0.5) for row in rows)
    (path / "rows.jsonl").write_text(text, encoding="utf-8")


def _coco(rng: random.Random, path: Path, things: list[Any], spelled: dict[str, str], form: str) -> None:
    scale = {name: rng.choice([1, 1, 2]) for name in PICTURES}
    names, labels = list(PICTURES), list(LABELS)
    images = [
        {"id": i, "file_name": spelled[name], "width": scale[name] * PICTURES[name][2][0],
         "height": scale[name] * PICTURES[name][2][1]}
        for i, name in enumerate(names)
    ]  # fmt: skip
    annotations: list[dict[str, Any]] = []
    for i, (name, label, box) in enumerate(things):
        x0, y0, x1, y1 = (scale[name] * side for side in box)
        shape: dict[str, Any] = {"bbox": [x0, y0, x1 - x0, y1 - y0]}
        if rng.random() < 0.3:
            shape = {"segmentation": [[x0, y0, x1, y0, x1, y1]]}
        elif rng.random() < 0.2:
            shape = {"keypoints": [x0, y0, 2, x1, y1, 1, 0, 0, 0]}
        crowd = {"iscrowd": int(rng.random() < 0.2)} if rng.random() < 0.5 else {}
        annotations.append(
            {"id": i, "image_id": names.index(name), "category_id": labels.index(label), **shape, **crowd}
        )
    categories = [{"id": i, "name": label} for i, label in enumerate(labels)]
    content = {"categories": categories, "images": images, "annotations": annotations}
    (path / "annotations.json").write_text(json.dumps(content))


def _labelme(rng: random.Random, path: Path, things: list[Any], spelled: dict[str, str], form: str) -> None:
    for name in sorted({name for name, _, _ in things}):
        shapes = []
        for _, label, (x0, y0, x1, y1) in (thing for thing in things if thing[0] == name):
            square = [[x0, y0], [x1, y0], [x1, y1], [x0, y1]]
            kinds = {
                "rectangle": [[x1, y0], [x0, y1]], "polygon": square, "mask": [[x0, y0], [x1, y1]],
                "point": [[x0, y0]], "circle": [[x0, y0], [x1, y1]], "oriented_rectangle": square,
                "line": [[x0, y0], [x1, y1]], "linestrip": square, "points": square,
            }  # fmt: skip
            kind = rng.choice(list(kinds))
            shapes.append({"label": label, "shape_type": kind, "points": kinds[kind], "group_id": None})
        content: dict[str, Any] = {"imagePath": spelled[name], "shapes": shapes}
        if rng.random() < 0.7:
            content |= dict(zip(("imageWidth", "imageHeight"), PICTURES[name][2], strict=True))
        (path / name).with_suffix(".json").write_text(json.dumps(content))


# --- damage -----------------------------------------------------------------------------------------------------------

ODD: tuple[Any, ...] = (
    None, True, "", " ", "12,5", "12 px", "7", "1_0", -1, 0, 1, 3, 55.5, 101, 1e9, -0.0, float("nan"), float("inf"),
    10**400, [], {}, [[]], [1], "a.png", "b.png", "cup", "<b>", "nan", "\ud800", "a\0b", "line\nbreak", "A" * 300,
)  # fmt: skip
CHARACTERS = ',;"\n .-+exE0123456789<>[]{}:\\/\u2028\u0301\u00e9\t\r\0'


def damage(rng: random.Random, folder: Folder) -> str:
    """Changes something, and says what."""
    if rng.random() < 0.08:
        return _damage_picture(rng, folder)
    path = rng.choice(folder.files)
    data = path.read_bytes()
    if rng.random() < 0.04:
        at = rng.randrange(len(data) + 1)
        path.write_bytes(data[:at] + b"\xff" + data[at:])
        return f"a byte that is no UTF-8 at {at}"
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:  # damaged before
        return "nothing"
    if folder.form == "rows" and rng.random() < 0.7:
        lines = text.split("\n")
        at = rng.randrange(len(lines))
        return _write_json(rng, path, lines[at], lambda line: "\n".join([*lines[:at], line, *lines[at + 1 :]]))
    if folder.form in ("coco", "labelme") and rng.random() < 0.85:
        return _write_json(rng, path, text, lambda changed: changed)
    changed, how = _damage_text(rng, text)
    path.write_bytes(changed.encode("utf-8", "surrogatepass"))
    return how


def _damage_picture(rng: random.Random, folder: Folder) -> str:
    name = rng.choice(list(PICTURES))
    folder.useless.add(name)
    path = folder.path / name
    if rng.random() < 0.3 or not path.exists():
        path.unlink(missing_ok=True)
        return f"{name} removed"
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] if rng.random() < 0.5 else b"no picture")
    return f"{name} damaged"


def _damage_text(rng: random.Random, text: str) -> tuple[str, str]:
    lines = text.split("\n")
    line, at = rng.randrange(len(lines)), rng.randrange(len(text) + 1)
    how = rng.choice(["replace", "insert", "delete", "cut", "twice", "lost", "more", "comma", "unit", "swap"])
    if how in ("replace", "insert", "delete"):
        new = "" if how == "delete" else rng.choice(CHARACTERS)
        return text[:at] + new + text[at + (how != "insert") :], f"{how} {new!r} at {at}"
    if how == "cut":
        return text[:at], f"cut at {at}"
    cells = lines[line].split(",")
    changed = {
        "twice": [lines[line], lines[line]],
        "lost": [],
        "more": [lines[line] + rng.choice([",", ",7", ",,", ";x"])],
        "comma": [lines[line].replace(".", ",")],
        "unit": [lines[line] + " px"],
        "swap": [",".join(rng.sample(cells, len(cells)))],
    }[how]
    return "\n".join([*lines[:line], *changed, *lines[line + 1 :]]), f"{how} in line {line + 1}"


def _write_json(rng: random.Random, path: Path, text: str, whole: Callable[[str], str]) -> str:
    try:
        value = json.loads(text)
    except ValueError:  # damaged before
        return "nothing"
    value, how = damage_value(rng, value)
    path.write_bytes(whole(json.dumps(value)).encode("utf-8"))
    return how


def damage_value(rng: random.Random, value: Any) -> tuple[Any, str]:
    """One place in a JSON value, any depth."""
    places: list[tuple[Any, Any]] = []

    def walk(inside: Any) -> None:
        for key in inside if isinstance(inside, dict) else range(len(inside)):
            places.append((inside, key))
            if isinstance(inside[key], (dict, list)):
                walk(inside[key])

    if not isinstance(value, (dict, list)) or not value:
        return rng.choice(ODD), "the whole"
    walk(value)
    inside, key = rng.choice(places)
    how = rng.choice(["other", "other", "other", "lost", "twice", "renamed", "moved"])
    if how == "lost":
        del inside[key]
    elif how == "twice" and isinstance(inside, list):
        inside.append(copy.deepcopy(inside[key]))
    elif how == "renamed" and isinstance(inside, dict):
        inside[f"{key}_"] = inside.pop(key)
    elif how == "moved" and isinstance(inside[key], (int, float)):
        inside[key] = inside[key] + rng.choice([-200, -3, 0.25, 3, 200])
    else:
        inside[key] = rng.choice(ODD)
    return value, f"{how} {key!r}"


# --- what it means ----------------------------------------------------------------------------------------------------


@dataclass
class Meaning:
    """What a folder says, and the places of what is wrong with it; "": a fault of the whole."""

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
        said.entry("", lambda read=read, path=path, text=text: read(said, folder, path, text))  # type: ignore[misc]
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


def _name(said: Meaning, folder: Folder, value: Any) -> str:
    """The name on disk."""
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


def _mean_csv(said: Meaning, folder: Folder, path: Path, text: str) -> None:
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
        name, label = _name(said, folder, given["image"]), _label(given["label"])
        x, y = (given[column] for column in units[0])
        if x == y == "":
            said.none.add((name, label))
            return
        xy = _number(x), _number(y)
        _put(said, name, label, xy, xy, (100, 100) if percent else PICTURES[name][2])

    for line, cells in rest:
        said.entry(f"line {line} ", lambda cells=cells: row(cells))  # type: ignore[misc]


def _records(text: str, mark: str) -> list[tuple[int, list[str]]]:
    """(first line, cells) of each row that is not empty. A row that is not CSV has no cells, and ends the reading."""
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


def _mean_rows(said: Meaning, folder: Folder, path: Path, text: str) -> None:
    def row(line: str) -> None:
        content = json.loads(line)
        name, points = _name(said, folder, content.get("image")), content.get("points")
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


def _mean_coco(said: Meaning, folder: Folder, path: Path, text: str) -> None:
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
        name = _name(said, folder, each["file_name"])
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


def _mean_labelme(said: Meaning, folder: Folder, path: Path, text: str) -> None:
    content = json.loads(text)
    if not isinstance(content, dict) or not {"shapes", "imagePath"} & set(content):
        return  # of somebody else
    name = _name(said, folder, content.get("imagePath"))
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
