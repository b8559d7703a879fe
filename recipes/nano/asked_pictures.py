"""Pictures with questions and regions: augmented photographs, and drawn scenes.

Questions follow the detector as the regions do (see `photos`): boxes it is sure of are objects, and a name is absent
only where its source, or the detector, has no box of it at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from molmo_edge.data.annotated_photos import Photo
from molmo_edge.data.drawn.scenes import draw_scene
from molmo_edge.data.drawn.sprite_names import overlapping
from molmo_edge.data.drawn.sprites import Assets, load_assets
from molmo_edge.data.examples import Annotation, Example
from molmo_edge.data.grounded_questions import QA, write_questions
from molmo_edge.data.regions import Regions
from recipes.nano.photos import Augmentation, Picture, Vocabulary, read

SCENES = 0.5  # drawn scenes for each photograph
QUESTIONS, ABSENT = 15, 6  # most questions about a picture, and most of them about absent names
FOLLOW_UPS = 0.2  # share of the questions that are asked after another one about the picture


@dataclass(frozen=True, eq=False)
class AskedPictures:
    """A data set of photographs, then scenes. Photographs, scenes and questions differ from epoch to epoch."""

    photos: list[Photo]
    vocabulary: Vocabulary
    augmentation: Augmentation | None  # None: photographs unchanged, and each scene always the same
    assets: Assets | None  # of the scenes; None: no scenes
    scenes: int
    questions: int = QUESTIONS
    name: str = "answers"
    empty_tags: bool = True  # see `write_questions`; False for a model without a grounding head

    def __len__(self) -> int:
        return len(self.photos) + self.scenes

    def example(self, index: int, rng: np.random.Generator) -> Example:
        """Questions about picture `index`, and its regions."""
        if index >= len(self.photos):
            assert self.assets is not None
            own = np.random.default_rng([1, index]) if self.augmentation is None else rng
            rgb, annotation = draw_scene(own, self.assets)
            names, regions = list(self.vocabulary.names), scene_regions(annotation, self.vocabulary)
        else:
            if self.augmentation is None:
                picture = self.vocabulary.picture(self.photos[index])
            else:
                picture = self.augmentation.picture(self.photos, index, self.vocabulary, rng)
            rgb, annotation, regions = picture.rgb, photo_annotation(picture), self.vocabulary.regions(picture)
            names = annotation["absent"]
        asked = write_questions(
            annotation,
            rng,
            max_questions=self.questions,
            vocabulary=names,
            absent=ABSENT,
            empty_tags=self.empty_tags,
        )
        return Example(rgb, tuple(follow_ups(list(map(_annotation, asked)), rng)), regions)


def photo_annotation(picture: Picture) -> dict[str, Any]:
    """The annotation of a photograph, in the format of `annotated_photos`. Points are the centres of boxes.

    Labels of which not all instances are known are not asked about.
    """
    boxes: dict[str, list[list[float]]] = {}
    for label, box in picture.objects:
        boxes.setdefault(label, []).append([round(v, 1) for v in box])
    objects = [
        {"label": label, "boxes": own, "points": [[(b[0] + b[2]) / 2, (b[1] + b[3]) / 2] for b in own]}
        for label, own in boxes.items()
    ]
    unsure = {label for label, _ in picture.unsure}
    return {
        "source": "photo",
        "objects": objects,
        "maybe_present": sorted(unsure - boxes.keys() | boxes.keys() - picture.known),
        "absent": sorted(picture.known - boxes.keys() - unsure),
        **({"captions": list(picture.captions)} if picture.captions else {}),
    }


def scene_regions(annotation: dict[str, Any], vocabulary: Vocabulary) -> Regions:
    """The regions of a scene. All names are known, except those that its backdrop or a similar object may show."""
    numbers, objects, open_names = vocabulary.numbers, [], set(annotation.get("maybe_present", ()))
    for item in annotation.get("objects", ()):
        open_names |= overlapping(item["label"])
        if item["label"] in numbers:
            objects += [(numbers[item["label"]], tuple(box)) for box in item["boxes"]]
    return Regions(tuple(objects), np.array([name not in open_names for name in vocabulary.names]))


def _annotation(asked: QA) -> Annotation:
    boxes = () if asked.target_boxes is None else tuple(tuple(map(float, box)) for box in asked.target_boxes)
    return Annotation("demo", (asked.question, asked.answer), boxes=boxes)  # type: ignore[arg-type]


def follow_ups(asked: Sequence[Annotation], rng: np.random.Generator) -> list[Annotation]:
    """The annotations, some of them after the turn of another one."""
    after = []
    for number, annotation in enumerate(asked):
        before = int(rng.integers(len(asked)))
        if before != number and rng.random() < FOLLOW_UPS:
            annotation = replace(annotation, messages=(*asked[before].messages, *annotation.messages))
        after.append(annotation)
    return after


def asked_pictures(roots: Sequence[Path], sprites: Path | None) -> tuple[AskedPictures, AskedPictures]:
    """The sets for training and validation. sprites: the folder of `molmo_edge.data.drawn.sprites`; None: no scenes."""
    photos = {split: read(list(roots), split) for split in ("train", "val")}
    assets = {
        split: load_assets(sprites, split=split, photos=own) if sprites else None for split, own in photos.items()
    }
    drawn = {name for one in assets.values() if one is not None for name in one.names}
    vocabulary = Vocabulary([*photos["train"], *photos["val"]], list(roots), drawn)

    def one(split: str, augmentation: Augmentation | None, share: float) -> AskedPictures:
        own, scenes = photos[split], assets[split]
        return AskedPictures(
            own, vocabulary, augmentation, scenes, round(share * len(own)) if scenes else 0, name=f"answers_{split}"
        )

    return one("train", Augmentation(), SCENES), one("val", None, SCENES)
