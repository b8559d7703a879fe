"""Annotated pictures: photographs in the format of `molmo_edge.data.annotated_photos`, and scenes drawn here."""

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

MOST_INSTANCES = 12  # labels with more are not asked about, in training as here
RECEIPTS = "receipts"

# Of Fluent Emoji (Microsoft, MIT), in the order of sprites.webp.
_SHEET = Path(__file__).parent.parent / "data" / "drawn" / "sprites.webp"
_SIDE = 112  # pixels of a cell
_NAMES = (
    "dog", "cat", "horse", "elephant", "zebra", "giraffe", "lion", "tiger", "monkey", "panda", "rabbit", "pig", "frog",
    "turtle", "octopus", "crab", "butterfly", "bee", "duck", "owl", "penguin", "apple", "banana", "orange", "lemon",
    "strawberry", "grapes", "pineapple", "watermelon", "carrot", "broccoli", "mushroom", "pizza", "hamburger", "donut",
    "cake", "cup", "bottle", "car", "bus", "bicycle", "airplane", "rocket", "train", "boat", "truck", "umbrella",
    "clock", "book", "guitar", "scissors", "key", "hammer", "backpack", "chair", "laptop",
)  # fmt: skip


@dataclass(frozen=True)
class Picture:
    """One picture and what is known of it."""

    group: str  # "scenes" or a photo source
    rgb: Callable[[], np.ndarray]  # uint8 [h, w, 3]
    annotation: Mapping[str, Any]  # coordinates are percent
    asked: tuple[str, ...] = ()  # what is asked about a picture that nothing is known of

    @property
    def id(self) -> str:
        """The same at every run, and for every copy of the picture's folder."""
        return f"{self.group}/{zlib.crc32(json.dumps(self.annotation, sort_keys=True).encode()):08x}"

    def absent(self) -> str | None:
        """A label that is certainly not in the picture, the same one at every run."""
        if said := [o["label"] for o in self.annotation.get("objects", ()) if not o["boxes"] and not o.get("crowd")]:
            return said[0]
        if "source" not in self.annotation:
            return None
        labels = sorted(absent_labels(dict(self.annotation), COCO_LABELS))
        seed = zlib.crc32(json.dumps(self.annotation, sort_keys=True).encode())
        return labels[seed % len(labels)] if labels else None

    def labels(self) -> list[tuple[str, list[list[float]]]]:
        """(label, boxes) of what can be pointed at and counted: no crowds."""
        objects = self.annotation.get("objects", ())
        return [
            (o["label"], o["boxes"]) for o in objects if not o.get("crowd") and 1 <= len(o["boxes"]) <= MOST_INSTANCES
        ]


def photo_pictures(root: Path, split: str = "val") -> Iterator[Picture]:
    """Those of `split`, and those that belong to none. Raises PhotoError."""
    for photo in load_photos(root, split):
        try:
            _check(photo)
        except (TypeError, AttributeError, KeyError) as error:
            raise PhotoError(f"{photo.where} is not an annotation: {error!r}") from None
        yield Picture(photo.annotation.get("source", "photos"), partial(load_image, photo.path), photo.annotation)


def plain_pictures(root: Path) -> list[Picture]:
    """Photos without annotations, as `--calibrate` takes them: those of prompts.jsonl, else all with common questions.

    Raises PhotoError where there are none.
    """
    from molmo_edge.quantize.calibration_prompts import PROMPTS, QUESTIONS, photos_in, read_prompts

    asked: dict[Path, list[str]] = {}
    if (root / PROMPTS).is_file():
        for prompt in read_prompts(root / PROMPTS):
            asked.setdefault(prompt.image, []).append(prompt.question)
    else:
        asked = {path: list(QUESTIONS) for path in photos_in(root)}
    if not asked:
        raise PhotoError(
            f"{root / ANNOTATIONS} is missing, and {root} holds no photos either: is it the folder of photographs?"
        )
    return [
        Picture("photos", partial(load_image, path), {"image": path.relative_to(root).as_posix()}, tuple(questions))
        for path, questions in asked.items()
    ]


def _check(photo: Photo) -> None:
    """Raises PhotoError, now rather than after an hour of questions. `load_photos` has checked the coordinates."""
    annotation, where = photo.annotation, photo.where
    if not os.path.isfile(photo.path):  # False for names that no file can have, too
        raise PhotoError(f"{where}: there is no {printable(photo.path)}")
    if not isinstance(annotation.get("source", ""), str):
        raise PhotoError(f'{where}: "source" is the name of where photos are from, a text')
    for item in annotation.get("objects", ()):
        if not isinstance(item["label"], str) or not item["label"].strip():
            raise PhotoError(f'{where}: each of "objects" needs a "label" and its "boxes"')
        if item.get("crowd") not in (None, False, True):
            raise PhotoError(f'{where}: "crowd" of "{printable(item["label"])}" is true or false')
        boxes = [tuple(box) for box in item["boxes"]]
        if twice := [box for box in boxes if boxes.count(box) > 1]:
            raise PhotoError(
                f'{where}: "{printable(item["label"])}" has the box {list(twice[0])} twice: leave out one of them'
            )
    labels = [item["label"] for item in annotation.get("objects", ())]
    if twice_said := [label for label in labels if labels.count(label) > 1]:
        raise PhotoError(f'{where}: "{printable(twice_said[0])}" stands there twice, put its boxes together')
    said = [*(t.get("text") for t in annotation.get("texts", ())), *annotation.get("fields", {}).values()]
    if not all(isinstance(text, str) for text in said):
        raise PhotoError(f"{where}: texts and fields are texts, numbers in quotes too")
    if any("\ud800" <= character <= "\udfff" for text in (*labels, *said) for character in text):
        raise PhotoError(f"{where}: a text has half of a surrogate pair, which is no character")
    if not all(
        re.fullmatch(r"([01]?\d|2[0-4]):[0-5]\d", str(clock.get("time")), re.ASCII)
        for clock in annotation.get("clocks", ())
    ):
        raise PhotoError(f'{where}: the time of a clock is written as "3:25"')


def scene_pictures(sprites: Path, number: int, kind: str, seed: int = 2024) -> Iterator[Picture]:
    """Scenes from sprites of the validation split, so that no picture in them was trained on."""
    yield from _drawn(load_assets(sprites, split="val"), number, kind, seed)


def embedded_scenes(number: int, seed: int = 2025) -> list[Picture]:
    """Scenes from the pictures and the font that come along, the same on every machine with this Pillow and numpy.

    About three in five of sprites, one of words, one of clocks. nano has seen these sprites in other scenes.
    """
    sheet = Image.open(_SHEET).convert("RGBA")
    sprites: dict[str, tuple[Image.Image, ...]] = {}
    columns = sheet.width // _SIDE
    for i, name in enumerate(_NAMES):
        x, y = i % columns * _SIDE, i // columns * _SIDE
        cell = sheet.crop((x, y, x + _SIDE, y + _SIDE))
        sprites[name] = (cell.crop(cell.getchannel("A").getbbox()),)
    kinds = np.random.default_rng(seed).choice(["sprites", "words", "clocks"], number, p=[0.6, 0.2, 0.2])
    assets = Assets(sprites)
    return [picture for i, kind in enumerate(kinds) for picture in _drawn(assets, 1, str(kind), seed, first=i)]


def _drawn(assets: Assets, number: int, kind: str, seed: int, first: int = 0) -> Iterator[Picture]:
    for i in range(first, first + number):
        rgb, annotation = draw_scene(np.random.default_rng([seed, i]), assets, kind)
        yield Picture("scenes", partial(np.asarray, rgb), annotation)
