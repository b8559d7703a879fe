"""Annotated photographs: reading annotations, and augmentation that keeps boxes and counts correct."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from molmo_edge.data.json_files import json_lines
from molmo_edge.data.regions import area, shared_area
from molmo_edge.errors import MolmoEdgeError
from molmo_edge.frontend.image_files import load_image
from molmo_edge.system.files import FileNameError, find_file, printable

Annotation = dict[str, Any]

ANNOTATIONS = "annotations.jsonl"

# Mirroring would reverse writing, or turn "no left turn" into its opposite.
NEVER_FLIPPED = frozenset({"cards", "road_signs", "receipts", "scene"})
KEPT_AREA = 0.5  # cropped instances with a smaller share of their box are not counted


class PhotoError(MolmoEdgeError):
    """A folder of annotated photographs cannot be read. The message names the file and the line."""


@dataclass(frozen=True)
class Photo:
    """A photograph and its annotation."""

    path: Path
    annotation: Annotation  # one line of annotations.jsonl; all coordinates are percent
    where: str = ""  # the line, for errors

    def rgb(self) -> np.ndarray:
        """uint8 [h, w, 3] after EXIF rotation, to which the annotation refers. Raises ImageError."""
        return load_image(self.path)


def load_photos(root: str | Path, split: str) -> list[Photo]:
    """Photos in `root`/annotations.jsonl that belong to `split` ("train" or "val") or to no split, in order.

    Pictures are not opened. Raises PhotoError if the list is missing, a line is not JSON, or a coordinate is not within
    0 and 100 percent.
    """
    root = Path(root)
    path = root / ANNOTATIONS
    if not path.is_file():
        raise PhotoError(f"{path} is missing: is {root} the folder of annotated photographs?")
    photos = []
    for where, annotation in json_lines(path, PhotoError):
        try:
            if annotation.get("split", split) == split:
                name = annotation["image"]
                photos.append(Photo(find_file(root, name) or root / name, annotation, where))
        except (ValueError, KeyError, TypeError) as error:
            raise PhotoError(f"{where} is not an annotation: {error!r}") from None
        except FileNameError as error:
            raise PhotoError(f"{where}: {error}") from None
    for photo in photos:
        _check_coordinates(photo)
    return photos


def _check_coordinates(photo: Photo) -> None:
    """Raise PhotoError for coordinates that are not percent, such as pixels, x/y/width/height or NaN."""
    try:
        for item in photo.annotation.get("objects", ()):
            about = f'"{printable(item["label"])}"'
            for box in item["boxes"]:
                _check_box(box, about, photo.where)
            for point in item.get("points", ()):
                if not _within(point, 2):
                    raise PhotoError(
                        f"{photo.where}: the point {printable(repr(point))} of {about} is not [x, y] in percent of "
                        "width and height"
                    )
        for kind, box in _other_boxes(photo.annotation):
            _check_box(box, kind, photo.where)
    except (KeyError, TypeError, AttributeError):
        raise PhotoError(
            f'{photo.where}: each of "objects" needs a "label" and "boxes", lists of numbers in percent'
        ) from None


def _other_boxes(annotation: Annotation) -> Iterator[tuple[str, Any]]:
    for kind in ("texts", "clocks"):
        for item in annotation.get(kind, ()):
            if "box" in item:
                yield f"one of {kind}", item["box"]


def _check_box(box: Any, about: str, where: str) -> None:
    if _within(box, 4) and box[0] < box[2] and box[1] < box[3]:
        return
    hint = ""
    if isinstance(box, list) and all(map(_is_number, box)):
        if any(value > 100 for value in box):
            hint = ". Are these pixels? Divide by the width and height of the picture, and multiply by 100"
        elif len(box) == 4 and (box[2] <= box[0] or box[3] <= box[1]):
            hint = ". Is it x, y, width, height? Then x1 is x + width, and y1 is y + height"
    raise PhotoError(
        f"{where}: {printable(repr(box))} of {about} is not a box: a box is [x0, y0, x1, y1] in percent of width and "
        f"height, with 0 <= x0 < x1 <= 100 and 0 <= y0 < y1 <= 100{hint}"
    )


def _within(values: Any, length: int) -> bool:
    """Whether `values` is a list of `length` numbers from 0 to 100."""
    is_list = isinstance(values, list) and len(values) == length
    return is_list and all(_is_number(value) and 0 <= value <= 100 for value in values)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def augment(rgb: np.ndarray, annotation: Annotation, rng: np.random.Generator) -> tuple[np.ndarray, Annotation]:
    """A random crop (0.5 to 1 of each side), flip, brightness and contrast of uint8 [h, w, 3].

    Boxes are clipped. An instance with less than half of its box left is dropped, and its label gets `"crowd": true`:
    it may still be visible, so the label is not counted. Cut texts are dropped. Captions are kept if at least 0.85 of
    each side remains, fields of a receipt only with the whole receipt, because crops may contradict them.
    """
    height, width = rgb.shape[:2]
    # Half of the time the whole picture: counting needs complete scenes.
    scale_y, scale_x = rng.uniform(0.5, 1.0, 2) if rng.random() < 0.5 else (1.0, 1.0)
    crop_h, crop_w = max(1, round(height * scale_y)), max(1, round(width * scale_x))
    top, left = int(rng.integers(height - crop_h + 1)), int(rng.integers(width - crop_w + 1))
    flip = annotation["source"] not in NEVER_FLIPPED and rng.random() < 0.5
    rgb = rgb[top : top + crop_h, left : left + crop_w]
    window = (100 * left / width, 100 * top / height, 100 * (left + crop_w) / width, 100 * (top + crop_h) / height)
    return _jitter(rgb[:, ::-1] if flip else rgb, rng), crop_annotation(annotation, window, flip)


def crop_annotation(annotation: Annotation, window: tuple[float, float, float, float], flip: bool) -> Annotation:
    """The annotation of the crop `window` (x0, y0, x1, y1, percent), mirrored if `flip`."""
    x0, y0, x1, y1 = window
    out = dict(annotation)
    if "width" in annotation:
        out["width"] = round(annotation["width"] * (x1 - x0) / 100)
        out["height"] = round(annotation["height"] * (y1 - y0) / 100)
    if "objects" in annotation:
        out["objects"] = [_crop_object(o, window, flip) for o in annotation["objects"]]
    for key in ("texts", "clocks"):
        if key in annotation:
            whole = [t for t in annotation[key] if _kept(t["box"], window) > 0.99]
            out[key] = [{**t, "box": _move_box(t["box"], window, flip)} for t in whole]
            out[f"{key}_cut"] = len(whole) < len(annotation[key])
    smallest = min(x1 - x0, y1 - y0)
    if smallest < 85:
        out.pop("captions", None)
    # The total of a receipt may be on any line; a garment fills its photograph.
    if smallest < (100 if annotation["source"] == "receipts" else 70):
        out.pop("fields", None)
    return out


def _crop_object(item: Annotation, window: tuple[float, float, float, float], flip: bool) -> Annotation:
    kept = [_kept(box, window) for box in item["boxes"]]
    stays = [k >= KEPT_AREA for k in kept]
    boxes = [_move_box(b, window, flip) for b, s in zip(item["boxes"], stays, strict=True) if s]
    points = [_move_point(p, window, flip) for p, s in zip(item["points"], stays, strict=True) if s]
    # A mask's centroid may be cut off even if half of the box is left.
    points = [p if 0 <= p[0] <= 100 and 0 <= p[1] <= 100 else _centre(b) for p, b in zip(points, boxes, strict=True)]
    out = {**item, "boxes": boxes, "points": points}
    if any(0 < k < KEPT_AREA for k in kept):
        out["crowd"] = True
    return out


def _kept(box: list[float], window: tuple[float, float, float, float]) -> float:
    """Share of the box's area inside the window."""
    return shared_area(box, window) / area(box) if area(box) > 0 else 0.0


def _move_point(point: list[float], window: tuple[float, float, float, float], flip: bool) -> list[float]:
    x = 100 * (point[0] - window[0]) / (window[2] - window[0])
    y = 100 * (point[1] - window[1]) / (window[3] - window[1])
    return [round(100 - x if flip else x, 1), round(y, 1)]


def _move_box(box: list[float], window: tuple[float, float, float, float], flip: bool) -> list[float]:
    a, b = _move_point(box[:2], window, flip), _move_point(box[2:], window, flip)
    box = [min(a[0], b[0]), a[1], max(a[0], b[0]), b[1]]
    return [min(max(v, 0.0), 100.0) for v in box]


def _centre(box: list[float]) -> list[float]:
    return [round((box[0] + box[2]) / 2, 1), round((box[1] + box[3]) / 2, 1)]


def _jitter(rgb: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Change contrast (0.75 to 1.25, about the mean), then brightness (0.8 to 1.2), with a lookup table."""
    contrast, brightness = rng.uniform(0.75, 1.25), rng.uniform(0.8, 1.2)
    mean = float(rgb[::8, ::8].mean())
    levels = ((np.arange(256) - mean) * contrast + mean) * brightness
    table = np.clip(levels, 0, 255).astype(np.uint8)
    return np.asarray(table[rgb])
