"""Answers: the text, its points, its cost, and the image with the points drawn in."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from molmo_edge.errors import MolmoEdgeError
from molmo_edge.frontend.points import Point
from molmo_edge.sdk.annotation import DrawingError, DrawOptions
from molmo_edge.sdk.drawing import draw_points
from molmo_edge.sdk.keypoints import PointedPicture, coco_keypoints, supervision_keypoints
from molmo_edge.sdk.readable_text import readable

if TYPE_CHECKING:
    import supervision

__all__ = [
    "Answer",
    "DrawError",
    "DrawOptions",
    "DrawingError",
    "Point",
    "Seconds",
    "Tokens",
    "Usage",
    "draw_points",
    "to_coco",
]


class DrawError(MolmoEdgeError):
    """An answer without its image cannot be drawn."""


@dataclass(frozen=True)
class Tokens:
    """Positions in the model's context."""

    image: int = 0  # including BOS and the markers around the crops
    prompt: int = 0  # the question with its role words, and earlier turns
    generated: int = 0
    # Positions of image and prompt that ran for this answer; the others came from a Scene or an earlier turn.
    prefilled: int = field(default=0, compare=False)


@dataclass(frozen=True)
class Seconds:
    """Wall-clock seconds by stage."""

    # Opening the model, the same figure in all answers of a Molmo. An engine may continue to load in the background;
    # the stages of the first answer then include the wait.
    load: float = 0.0
    preprocess: float = 0.0  # image file to crops
    vision: float = 0.0  # crops to features
    prefill: float = 0.0  # image and question to the first token
    decode: float = 0.0  # the tokens after the first

    @property
    def total(self) -> float:
        """The sum of all stages except `load`."""
        return self.preprocess + self.vision + self.prefill + self.decode


@dataclass(frozen=True)
class Usage:
    """What an answer cost: positions of the context, crops and seconds."""

    tokens: Tokens = Tokens()
    crops: int = 0  # including the global view
    seconds: Seconds = field(default=Seconds(), compare=False)


@dataclass(frozen=True)
class Answer:
    """An answer. `str(answer)` is the text as generated, with its point tags.

    Equality covers what the answer says and its number of tokens and crops, not its times, nor whether the image was
    prefilled before.
    """

    text: str
    points: tuple[Point, ...] = ()
    count: int | None = None  # as stated in the text, else the number of points; None if it has neither
    token_ids: tuple[int, ...] = ()  # as generated, before the stop token
    complete: bool = True  # False: cut off by max_new_tokens or by the end of the context
    usage: Usage = Usage()
    image: np.ndarray | None = field(default=None, repr=False, compare=False)  # uint8 [h, w, 3]
    model: str | None = field(default=None, compare=False)  # the model's name

    def __str__(self) -> str:
        return self.text

    @property
    def readable(self) -> str:
        """The text with its point tags replaced by their labels."""
        return readable(self.text).strip()

    @property
    def tokens_per_second(self) -> float | None:
        """Decoding speed from the second token on; None without such tokens or without times."""
        # The last step of a complete answer generated the stop token.
        steps = self.usage.tokens.generated - 1 + self.complete
        seconds = self.usage.seconds.decode
        return steps / seconds if steps > 0 and seconds > 0 else None

    @property
    def picture_size(self) -> tuple[int, int]:
        """Width and height of the image in pixels, after EXIF rotation. Raises DrawError without an image."""
        height, width = self._rgb().shape[:2]
        return width, height

    def pixels(self) -> list[tuple[float, float]]:
        """Return the points as (x, y) in pixels of the image after EXIF rotation. Raises DrawError without an image."""
        return [point.pixel(*self.picture_size) for point in self.points]

    def draw(self, *, labels: str = "once", numbers: bool | None = None, size: float = 1.0) -> Image.Image:
        """Return a copy of the image with a marker on each point, numbered if there are several, and their labels.

        Args:
            labels: "once" writes each label beside one of its points, "each" beside every point, "none" nowhere.
            numbers: Whether to number the markers. None: if there are several points, and room for readable numbers.
            size: Factor on the sizes of markers and letters, 0.1 to 10; sizes follow the image's.

        Raises DrawError without an image, and DrawingError for an unknown option.
        """
        return draw_points(Image.fromarray(self._rgb()), self.points, DrawOptions(labels, numbers, size))

    def to_svg(
        self,
        *,
        href: str | None = None,
        embed: bool = True,
        labels: str = "once",
        numbers: bool | None = None,
        size: float = 1.0,
    ) -> str:
        """Return an SVG document of the image with the markers and labels that `draw` draws.

        It has a title and a description for screen readers, and each point is a group with a title.

        Args:
            href: URL of the image to link to, or its path relative to the SVG. None: embed the image as JPEG.
            embed: With False and without `href`, the document has no image, to be laid over one.
            labels: As for `draw`.
            numbers: As for `draw`.
            size: As for `draw`.

        Raises DrawError without an image, and DrawingError for an unknown option.
        """
        from molmo_edge.sdk.svg import to_svg

        options = DrawOptions(labels, numbers, size)
        image, numbered = Image.fromarray(self._rgb()), list(enumerate(self.points, 1))
        return to_svg(image, numbered, self.points, href=href, embed=embed, options=options)

    def to_coco(self, file_name: str = "image.jpg") -> dict[str, Any]:
        """Return the points as a COCO keypoints data set of one image, ready for JSON. See `molmo_edge.answer.to_coco`.

        Raises DrawError without an image, whose size it needs.
        """
        return to_coco([self], [file_name])

    def to_supervision(self) -> supervision.KeyPoints:
        """Return the points as `supervision.KeyPoints`: n objects of one keypoint each, xy in pixels.

        `class_id` numbers the labels in order of appearance, and `data["class_name"]` has the labels. Raises DrawError
        without an image, and MissingExtra if supervision is not installed.
        """
        return supervision_keypoints(_pointed(self, ""))

    def to_dict(self) -> dict[str, Any]:
        """Return everything except the image, ready for JSON (schema: molmo_edge/answer.schema.json).

        Points are in percent and, if the answer holds its image, also in pixels.
        """
        points: list[dict[str, Any]] = [
            {name: value for name, value in dataclasses.asdict(p).items() if value is not None} for p in self.points
        ]
        if self.image is not None:
            for point, (x, y) in zip(points, self.pixels(), strict=True):
                point["pixel"] = [round(x, 1), round(y, 1)]
        return {
            "text": self.text,
            "points": points,
            "count": self.count,
            "complete": self.complete,
            "token_ids": list(self.token_ids),
            "usage": dataclasses.asdict(self.usage),
            "model": self.model,
            "tokens_per_second": None if (speed := self.tokens_per_second) is None else round(speed, 2),
        }

    def _repr_png_(self) -> bytes | None:
        """For notebooks."""
        from molmo_edge.sdk.notebook import to_png

        return to_png(self.image, self.points)

    def _repr_html_(self) -> str:
        """For notebooks."""
        from molmo_edge.sdk.notebook import to_html

        return to_html(self.readable, self.points, self.image, complete=self.complete)

    def _rgb(self) -> np.ndarray:
        if self.image is None:
            raise DrawError("this answer does not hold its image, so there is nothing to draw on")
        return self.image


def to_coco(answers: Sequence[Answer], file_names: Sequence[str]) -> dict[str, Any]:
    """Return the points of several answers, each about one image, as a COCO keypoints data set, ready for JSON.

    Each point is an annotation with one keypoint, [x, y, 2] in pixels from the top left; each label is a category. A
    point has no extent: its `bbox` is [x, y, 0, 0], and its `area` 0. Raises DrawError for an answer without an image,
    and ValueError unless there is one file name for each answer.
    """
    return coco_keypoints([_pointed(a, name) for a, name in zip(answers, file_names, strict=True)])


def _pointed(answer: Answer, file_name: str) -> PointedPicture:
    return PointedPicture(file_name, *answer.picture_size, answer.points)
