"""Annotated photographs as pictures with regions: which names are known in them, and augmentation.

The folders have the format of `molmo_edge.data.annotated_photos`, with one more key: `pseudo`, a detector's boxes with
scores. A name is known if its source labels all instances of it, or from the detector: boxes with a score of at least
0.42 are objects, boxes below are unsure, and a name without any box is absent.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from molmo_edge.data.annotated_photos import NEVER_FLIPPED, Photo, load_photos
from molmo_edge.data.examples import Example
from molmo_edge.data.regions import Box, Regions
from recipes.nano.detector import COCO_NAMES

CAPTIONED = 85  # percent of each side
SURE = 0.42  # minimum score of a detector's box that counts as an object; below it the area is unsure
# Sources whose photographs show little else: the names of other sources are absent in them.
NARROW = frozenset(
    ("bccd", "cards", "raccoon", "road_signs", "clothing", "receipts", "chess", "gym", "vehicles", "vehicles2", "cans")
)


@dataclass
class Picture:
    """A photograph and the names known in it. Boxes are in percent of width and height."""

    rgb: np.ndarray  # uint8 [h, w, 3]
    objects: list[tuple[str, Box]]
    unsure: list[tuple[str, Box]]
    known: set[str]
    captions: tuple[str, ...] = ()


class Vocabulary:
    """All names in the photographs of some folders, and which source labels which of them exhaustively.

    more: names that follow those of the photographs, such as those of sprites.
    """

    def __init__(self, photos: list[Photo], roots: list[Path], more: Iterable[str] = ()):
        self.exhaustive: dict[str, set[str]] = {}
        for root in roots:
            if (path := root / "classes.json").exists():
                for source, names in json.loads(path.read_text(encoding="utf-8")).items():
                    self.exhaustive.setdefault(source, set()).update(names)
        labels: dict[str, set[str]] = {}
        for photo in photos:
            a = photo.annotation
            labels.setdefault(a["source"], set()).update(o["label"] for o in a.get("objects", ()))
        for source in ("bccd", "cards", "raccoon", "road_signs"):
            self.exhaustive[source] = labels.get(source, set())
        self.exhaustive["coco"] = set(COCO_NAMES)
        others = set().union(*labels.values()) - set(COCO_NAMES)
        names = (*COCO_NAMES, *sorted(others))
        self.names = (*names, *sorted(set(more) - set(names)))
        self.numbers = dict(zip(self.names, range(len(self.names)), strict=True))
        self._others = others
        self._of = labels

    def picture(self, photo: Photo) -> Picture:
        """The photograph without augmentation."""
        a, source = photo.annotation, photo.annotation["source"]
        objects: list[tuple[str, Box]] = []
        unsure: list[tuple[str, Box]] = []
        known: set[str] = set()
        if "objects" in a:
            known |= self.exhaustive.get(source, set())
        if "pseudo" in a:
            known |= set(COCO_NAMES)
        if source in NARROW:
            known |= self._others - self._of.get(source, set())
        labelled = {o["label"] for o in a.get("objects", ())}
        for o in a.get("objects", ()):
            objects += [(o["label"], _box(box)) for box in o["boxes"]]
            if o.get("crowd") or o["label"] not in self.exhaustive.get(source, set()):
                known.discard(o["label"])
        for found in a.get("pseudo", ()):
            if found["label"] in labelled:
                continue
            for box, score in zip(found["boxes"], found["scores"], strict=True):
                (objects if score >= SURE else unsure).append((found["label"], _box(box)))
        return Picture(photo.rgb(), objects, unsure, known & self.numbers.keys(), tuple(a.get("captions", ())))

    def regions(self, picture: Picture) -> Regions:
        known = np.array([name in picture.known for name in self.names])
        numbers = self.numbers
        return Regions(
            tuple((numbers[name], box) for name, box in picture.objects),
            known,
            tuple((numbers[name], box) for name, box in picture.unsure),
        )


@dataclass(frozen=True)
class Augmentation:
    """How photographs are changed at random."""

    mosaic: float = 0.25  # share of pictures made of four photographs
    crop: float = 0.6  # share of photographs that are cropped
    least: float = 0.45  # minimum share of a side that a crop keeps
    kept: float = 0.5  # minimum share of a box within the crop for its object to remain

    def picture(self, photos: list[Photo], index: int, vocabulary: Vocabulary, rng: np.random.Generator) -> Picture:
        """Photograph `index`, changed, or a mosaic of it and three others."""
        if rng.random() < self.mosaic:
            others = [index, *(int(i) for i in rng.integers(len(photos), size=3))]
            return mosaic([self._changed(photos[i], vocabulary, rng) for i in others], rng)
        return self._changed(photos[index], vocabulary, rng)

    def _changed(self, photo: Photo, vocabulary: Vocabulary, rng: np.random.Generator) -> Picture:
        picture = vocabulary.picture(photo)
        if rng.random() < self.crop:
            sides = rng.uniform(self.least, 1.0, 2) * 100
            corner = rng.uniform(0, 1, 2) * (100 - sides)
            picture = cut(picture, (*corner, *(corner + sides)), self.kept)
        if photo.annotation["source"] not in NEVER_FLIPPED and rng.random() < 0.5:
            picture = flip(picture)
        return replace(picture, rgb=recolour(picture.rgb, rng))


class RegionPhotos:
    """A data set of photographs with regions, without questions."""

    def __init__(self, photos: list[Photo], vocabulary: Vocabulary, augmentation: Augmentation | None, name: str):
        self.photos, self.vocabulary, self.augmentation, self.name = photos, vocabulary, augmentation, name

    def __len__(self) -> int:
        return len(self.photos)

    def example(self, index: int, rng: np.random.Generator) -> Example:
        """Without augmentation, an example does not depend on `rng`."""
        picture = (
            self.vocabulary.picture(self.photos[index])
            if self.augmentation is None
            else self.augmentation.picture(self.photos, index, self.vocabulary, rng)
        )
        return Example(picture.rgb, regions=self.vocabulary.regions(picture))


def cut(picture: Picture, window: Box, kept: float) -> Picture:
    """The part `window` of a picture. Objects of which less than the share `kept` remains become unsure.

    Captions are kept if at least CAPTIONED of each side remains: a smaller part may contradict them.
    """
    h, w = picture.rgb.shape[:2]
    left, right = round(w * window[0] / 100), max(round(w * window[2] / 100), round(w * window[0] / 100) + 1)
    top, bottom = round(h * window[1] / 100), max(round(h * window[3] / 100), round(h * window[1] / 100) + 1)
    low = np.array([left / w, top / h]) * 100
    size = np.array([(right - left) / w, (bottom - top) / h]) * 100
    captions = picture.captions if size.min() >= CAPTIONED else ()
    cut_to = Picture(picture.rgb[top:bottom, left:right], [], [], picture.known, captions)
    for boxes, sure in ((picture.objects, True), (picture.unsure, False)):
        for name, box in boxes:
            inner, share = _clipped(box, low, low + size)
            if share > 0:
                moved = (np.array(inner).reshape(2, 2) - low) / size * 100
                target = cut_to.objects if sure and share >= kept else cut_to.unsure
                target.append((name, _box(moved)))
    return cut_to


def _box(values: object) -> Box:
    x0, y0, x1, y1 = (float(v) for v in np.asarray(values).reshape(-1))
    return x0, y0, x1, y1


def _clipped(box: Box, low: np.ndarray, high: np.ndarray) -> tuple[Box, float]:
    """The part of a box between two corners, and its share of the box's area."""
    a, b = np.maximum(box[:2], low), np.minimum(box[2:], high)
    whole = max((box[2] - box[0]) * (box[3] - box[1]), 1e-9)
    return (*a, *b), float(np.prod(np.maximum(b - a, 0))) / whole


def flip(picture: Picture) -> Picture:
    """Mirror a picture left to right."""

    def mirrored(boxes: list[tuple[str, Box]]) -> list[tuple[str, Box]]:
        return [(name, (100 - x1, y0, 100 - x0, y1)) for name, (x0, y0, x1, y1) in boxes]

    objects, unsure = mirrored(picture.objects), mirrored(picture.unsure)
    return replace(picture, rgb=picture.rgb[:, ::-1], objects=objects, unsure=unsure)


def mosaic(pictures: list[Picture], rng: np.random.Generator, side: int = 512) -> Picture:
    """Four pictures as one. A name that is known in only some of them is unsure in the others."""
    middle = rng.uniform(0.35, 0.65, 2)
    x, y = (round(side * share) for share in middle)
    canvas = np.empty((side, side, 3), np.uint8)
    out = Picture(canvas, [], [], set().union(*(p.known for p in pictures)))
    tiles = ((0, 0, x, y), (x, 0, side, y), (0, y, x, side), (x, y, side, side))
    for picture, (x0, y0, x1, y1) in zip(pictures, tiles, strict=True):
        tile = Image.fromarray(np.ascontiguousarray(picture.rgb)).resize((x1 - x0, y1 - y0), Image.Resampling.BILINEAR)
        canvas[y0:y1, x0:x1] = np.asarray(tile)
        low, size = np.array([x0, y0]) / side, np.array([x1 - x0, y1 - y0]) / side
        for boxes, target in ((picture.objects, out.objects), (picture.unsure, out.unsure)):
            for name, box in boxes:
                moved = np.array(box).reshape(2, 2) * size + 100 * low
                target.append((name, _box(moved)))
        whole = _box(100 * np.concatenate([low, low + size]))
        out.unsure += [(name, whole) for name in sorted(out.known - picture.known)]
    return out


def recolour(rgb: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Change brightness, contrast and the gain of each channel; make some pictures grey."""
    if rng.random() < 0.05:
        rgb = np.repeat(rgb.mean(-1, keepdims=True).astype(np.uint8), 3, axis=-1)
    mean = rgb[::8, ::8].mean((0, 1))
    contrast, gains = rng.uniform(0.7, 1.3), rng.uniform(0.75, 1.25) * rng.uniform(0.93, 1.07, 3)
    levels = ((np.arange(256)[:, None] - mean) * contrast + mean) * gains
    table = np.clip(levels, 0, 255).astype(np.uint8)  # [256, 3]
    return np.stack([table[:, c][rgb[..., c]] for c in range(3)], axis=-1)


def read(roots: list[Path], split: str) -> list[Photo]:
    """The photographs of all folders that have annotated objects or boxes of a detector."""
    photos = [photo for root in roots for photo in load_photos(root, split)]
    return [p for p in photos if any(p.annotation.get(key) for key in ("objects", "pseudo"))]
