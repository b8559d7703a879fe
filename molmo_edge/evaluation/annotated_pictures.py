"""Annotated pictures to evaluate on: photographs (see molmo_edge/data/annotated_photos.py) and drawn scenes."""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from molmo_edge.data.annotated_photos import ANNOTATIONS, Photo, PhotoError, load_photos
from molmo_edge.data.drawn.scenes import draw_scene
from molmo_edge.data.drawn.sprite_names import COCO_LABELS
from molmo_edge.data.drawn.sprites import Assets, load_assets
from molmo_edge.data.grounded_questions import absent_labels
from molmo_edge.frontend.crops import load_image
from molmo_edge.system.files import printable

MOST_INSTANCES = 12  # labels with more are not asked about, here and in training
RECEIPTS = "receipts"

# The sprites of sprites.webp, in order: Fluent Emoji (Microsoft, MIT).
_SHEET = Path(__file__).parent.parent / "data" / "drawn" / "sprites.webp"
_SIDE = 112  # cell size, pixels
_NAMES = (
    "dog", "cat", "horse", "elephant", "zebra", "giraffe", "lion", "tiger", "monkey", "panda", "rabbit", "pig", "frog",
    "turtle", "octopus", "crab", "butterfly", "bee", "duck", "owl", "penguin", "apple", "banana", "orange", "lemon",
    "strawberry", "grapes", "pineapple", "watermelon", "carrot", "broccoli", "mushroom", "pizza", "hamburger", "donut",
    "cake", "cup", "bottle", "car", "bus", "bicycle", "airplane", "rocket", "train", "boat", "truck", "umbrella",
    "clock", "book", "guitar", "scissors", "key", "hammer", "backpack", "chair", "laptop",
)  # fmt: skip


@dataclass(frozen=True)
class Picture:
    """A picture and its annotation."""

    group: str  # "scenes" or a photo source
    rgb: Callable[[], np.ndarray]  # uint8 [h, w, 3]
    annotation: Mapping[str, Any]  # coordinates are percent
    asked: tuple[str, ...] = ()  # questions about a picture without annotations

    @property
    def id(self) -> str:
        """An id that is equal in every run and for every copy of the folder."""
        return f"{self.group}/{zlib.crc32(json.dumps(self.annotation, sort_keys=True).encode()):08x}"

    def absent(self) -> str | None:
        """A label that is certainly not in the picture, equal in every run; None if there is none."""
        for item in self.annotation.get("objects", ()):
            if not item["boxes"] and not item.get("crowd"):
                return str(item["label"])
        if "source" not in self.annotation:
            return None
        labels = sorted(absent_labels(dict(self.annotation), COCO_LABELS))
        seed = zlib.crc32(json.dumps(self.annotation, sort_keys=True).encode())
        return str(labels[seed % len(labels)]) if labels else None

    def labels(self) -> list[tuple[str, list[list[float]]]]:
        """(label, boxes) of objects that can be pointed at and counted, without crowds."""
        objects = self.annotation.get("objects", ())
        return [
            (o["label"], o["boxes"]) for o in objects if not o.get("crowd") and 1 <= len(o["boxes"]) <= MOST_INSTANCES
        ]


def photo_pictures(root: Path, split: str = "val") -> Iterator[Picture]:
    """Photographs of `split` or without a split. Raises PhotoError."""
    for photo in load_photos(root, split):
        try:
            _check(photo)
        except (TypeError, AttributeError, KeyError) as error:
            raise PhotoError(f"{photo.where} is not an annotation: {error!r}") from None
        yield Picture(photo.annotation.get("source", "photos"), partial(load_image, photo.path), photo.annotation)


def plain_pictures(root: Path) -> list[Picture]:
    """Photographs without annotations: those of prompts.jsonl, or else all in the folder with common questions.

    The same folders work with `--calibrate`. Raises PhotoError if there are no photographs.
    """
    from molmo_edge.quantize.calibration_prompts import PROMPTS, QUESTIONS, photos_in, read_prompts

    asked: dict[Path, list[str]] = {}
    if (root / PROMPTS).is_file():
        for prompt in read_prompts(root / PROMPTS):
            asked.setdefault(prompt.image, []).append(prompt.question)
    else:
        asked = {path: list(QUESTIONS) for path in photos_in(root)}
    if not asked:
        raise PhotoError(f"{root} has neither {ANNOTATIONS} nor photographs: is it the right folder?")
    return [
        Picture("photos", partial(load_image, path), {"image": path.relative_to(root).as_posix()}, tuple(questions))
        for path, questions in asked.items()
    ]


def _check(photo: Photo) -> None:
    """Raise PhotoError before the evaluation starts. `load_photos` has already checked the coordinates."""
    annotation, where = photo.annotation, photo.where
    if not os.path.isfile(photo.path):  # also False for invalid names
        raise PhotoError(f"{where}: there is no {printable(photo.path)}")
    if not isinstance(annotation.get("source", ""), str):
        raise PhotoError(f'{where}: "source" must be a text')
    for item in annotation.get("objects", ()):
        if not isinstance(item["label"], str) or not item["label"].strip():
            raise PhotoError(f'{where}: each of "objects" needs a "label" and "boxes"')
        if item.get("crowd") not in (None, False, True):
            raise PhotoError(f'{where}: "crowd" of "{printable(item["label"])}" must be true or false')
        boxes = [tuple(box) for box in item["boxes"]]
        if twice := [box for box in boxes if boxes.count(box) > 1]:
            raise PhotoError(f'{where}: "{printable(item["label"])}" has the box {list(twice[0])} twice: remove one')
    labels = [item["label"] for item in annotation.get("objects", ())]
    if repeated := [label for label in labels if labels.count(label) > 1]:
        raise PhotoError(f'{where}: the label "{printable(repeated[0])}" occurs twice: merge its boxes')
    texts = [*(t.get("text") for t in annotation.get("texts", ())), *annotation.get("fields", {}).values()]
    if not all(isinstance(text, str) for text in texts):
        raise PhotoError(f"{where}: texts and fields must be strings: quote numbers")
    if any("\ud800" <= character <= "\udfff" for text in (*labels, *texts) for character in text):
        raise PhotoError(f"{where}: a text has an unpaired surrogate")
    if not all(
        re.fullmatch(r"([01]?\d|2[0-4]):[0-5]\d", str(clock.get("time")), re.ASCII)
        for clock in annotation.get("clocks", ())
    ):
        raise PhotoError(f'{where}: the time of a clock must be written as "3:25"')


def scene_pictures(sprites: Path, number: int, kind: str, seed: int = 2024) -> Iterator[Picture]:
    """Scenes from sprites of the validation split, which are not used in training."""
    yield from drawn_pictures(load_assets(sprites, split="val"), number, kind, seed)


def embedded_scenes(number: int, seed: int = 2025) -> list[Picture]:
    """Scenes from the included sprites and Pillow's font, equal on all machines with the same Pillow and numpy.

    60 % show sprites, 20 % words and 20 % clocks. nano was trained on other scenes with these sprites.
    """
    kinds = np.random.default_rng(seed).choice(["sprites", "words", "clocks"], number, p=[0.6, 0.2, 0.2])
    assets = embedded_sprites()
    return [picture for i, kind in enumerate(kinds) for picture in drawn_pictures(assets, 1, str(kind), seed, first=i)]


def embedded_sprites() -> Assets:
    """The sprites that the package includes."""
    sheet = Image.open(_SHEET).convert("RGBA")
    sprites: dict[str, tuple[Image.Image, ...]] = {}
    columns = sheet.width // _SIDE
    for i, name in enumerate(_NAMES):
        x, y = i % columns * _SIDE, i // columns * _SIDE
        cell = sheet.crop((x, y, x + _SIDE, y + _SIDE))
        sprites[name] = (cell.crop(cell.getchannel("A").getbbox()),)
    return Assets(sprites)


def drawn_pictures(assets: Assets, number: int, kind: str, seed: int, first: int = 0) -> Iterator[Picture]:
    """The scenes `first` to `first + number - 1` of those that `assets`, `kind` and `seed` determine."""
    for i in range(first, first + number):
        rgb, annotation = draw_scene(np.random.default_rng([seed, i]), assets, kind)
        yield Picture("scenes", partial(np.asarray, rgb), annotation)
