"""Random points folders in every format, and random damage to them."""

from __future__ import annotations

import copy
import json
import random
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

FORMS = ("csv", "percent csv", "coco", "labelme", "rows")
LABELS = ("cup", "Cup", "tea spoon", "löffel", "a cup, red", 'a 5" disk', "杯子")
# File name -> (stored size, EXIF orientation, displayed size).
PICTURES = {
    "a.png": ((100, 50), 1, (100, 50)),
    "turned.jpg": ((80, 40), 6, (40, 80)),
    "t.tif": ((60, 30), 8, (30, 60)),
    "caf\u00e9.webp": ((64, 64), 3, (64, 64)),
}


def make_pictures(folder: Path) -> None:
    for name, (stored, orientation, _) in PICTURES.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        more: dict[str, Any] = {"tiffinfo": {0x0112: orientation}} if name.endswith(".tif") else {"exif": exif}
        noise = random.Random(0).randbytes(stored[0] * stored[1] * 3)  # so that half of a file does not decode
        Image.frombytes("RGB", stored, noise).save(folder / name, **more)


@dataclass
class Folder:
    """A folder on disk, and which of its pictures are usable."""

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


def _rows(rng: random.Random, path: Path, things: list[Any], spelled: dict[str, str], _form: str) -> None:
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


def _coco(rng: random.Random, path: Path, things: list[Any], spelled: dict[str, str], _form: str) -> None:
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


def _labelme(rng: random.Random, path: Path, things: list[Any], spelled: dict[str, str], _form: str) -> None:
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
    """Apply a random change. Returns its description."""
    if rng.random() < 0.08:
        return _damage_picture(rng, folder)
    path = rng.choice(folder.files)
    data = path.read_bytes()
    if rng.random() < 0.04:
        at = rng.randrange(len(data) + 1)
        path.write_bytes(data[:at] + b"\xff" + data[at:])
        return f"a byte that is not UTF-8 at {at}"
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
    """A random place in a JSON value, at any depth."""
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
