"""Answers: the text, its points, its cost, and the image with the points drawn in."""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from molmo_edge.errors import MolmoEdgeError
from molmo_edge.frontend.points import Point
from molmo_edge.sdk.readable_text import readable
from molmo_edge.sdk.shown import Shown

if TYPE_CHECKING:
    import supervision

    from molmo_edge.sdk.annotation import DrawingError, DrawOptions
    from molmo_edge.sdk.drawing import draw_points
    from molmo_edge.sdk.keypoints import PointedPicture

# Loaded on first use: drawing takes a tenth of the time that importing Molmo does.
_DRAWING = {"DrawOptions": "annotation", "DrawingError": "annotation", "draw_points": "drawing"}

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


def __getattr__(name: str) -> Any:
    if name not in _DRAWING:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"molmo_edge.sdk.{_DRAWING[name]}"), name)


class DrawError(MolmoEdgeError):
    """An answer without its image cannot be drawn, nor an image that the prompt does not have."""


@dataclass(frozen=True)
class Tokens:
    """Positions in the model's context."""

    image: int = 0  # including BOS and the markers around the crops
    prompt: int = 0  # the question with its role words, and earlier turns
    generated: int = 0
    # Positions of image and prompt that ran for this answer; the others came from a Scene or an earlier turn.
    prefilled: int = field(default=0, compare=False)
    dropped: int = 0  # image tokens that `image_tokens` left out; not part of `image`
    # Of those generated: drafted by the grammar of points and accepted, each of which saved a run of the decoder.
    drafted: int = field(default=0, compare=False)


@dataclass(frozen=True)
class Seconds:
    """Wall-clock seconds by stage."""

    # Opening the model, the same figure in all answers of a Molmo. An engine may continue to load in the background;
    # the stages of the first answer then include the wait.
    load: float = 0.0
    preprocess: float = 0.0  # image or video file to crops
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
    crops: int = 0  # of all images, including their global views; of a video, frames
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
    image: np.ndarray | None = field(default=None, repr=False, compare=False)  # uint8 [h, w, 3]; the first of several
    model: str | None = field(default=None, compare=False)  # the model's name
    shown: Shown | None = field(default=None, repr=False, compare=False)  # all images or frames; None: `image` alone
    # With a schema, the object of its Pydantic model, or the parsed JSON; with a regex or choices, the text. None for
    # free text and for an answer that is not complete.
    parsed: Any = field(default=None, compare=False)

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
        """Width and height of the image in pixels, after EXIF rotation.

        Raises DrawError without an image, and with several.
        """
        shown = self._require_images()
        if len(shown.images) > 1:
            raise DrawError(f"this answer is about {shown.what}, each with its own points: this needs a single image")
        height, width = shown.size_of(0)
        return width, height

    @property
    def images(self) -> tuple[np.ndarray, ...]:
        """The images of the prompt, uint8 [h, w, 3] each; of a video its frames, reduced to 640 px. Empty: not kept."""
        return () if self._kept is None else self._kept.images

    @property
    def times(self) -> tuple[float, ...] | None:
        """The times of `images` if they are the frames of a video, in seconds."""
        return None if self._kept is None else self._kept.times

    def pixels(self) -> list[tuple[float, float]]:
        """Return the points as (x, y) in pixels of their image after EXIF rotation, or of the video's frames.

        NaN for a point in an image that the prompt does not have. Raises DrawError without an image.
        """
        shown, pixels = self._require_images(), []
        for point in self.points:
            index = shown.index_of(point)
            height, width = (math.nan, math.nan) if index is None else shown.size_of(index)
            pixels.append(point.pixel(width, height))
        return pixels

    def draw(
        self, image: int | None = None, *, labels: str = "once", numbers: bool | None = None, size: float = 1.0
    ) -> Image.Image:
        """Return a copy of the image with a marker on each point, numbered if there are several, and their labels.

        Args:
            image: The number of one of several images, or frames of a video, from 1. None: a sheet with all images, or
                with the frames that have points.
            labels: "once" writes each label beside one of its points, "each" beside every point, "none" nowhere.
            numbers: Whether to number the markers. None: if there are several points, and room for readable numbers.
            size: Factor on the sizes of markers and letters, 0.1 to 10; sizes follow the image's.

        Raises DrawError without an image and for a number that there is not, DrawingError for an unknown option.
        """
        from molmo_edge.sdk.annotation import DrawOptions
        from molmo_edge.sdk.contact_sheet import draw_one, draw_sheet

        shown, options = self._require_images(), DrawOptions(labels, numbers, size)
        if image is None and len(shown.images) > 1:
            return draw_sheet(shown, self.points, options)
        return draw_one(shown, self._index(image), self.points, options)

    def draw_all(self) -> list[Image.Image]:
        """Return `draw` of each image, or of each frame of a video that has points. Raises DrawError without images."""
        from molmo_edge.sdk.contact_sheet import draw_one

        shown = self._require_images()
        return [draw_one(shown, index, self.points) for index in shown.to_draw(self.points)]

    def to_svg(
        self,
        image: int | None = None,
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
            image: As for `draw`; needed if there are several.
            href: URL of the image to link to, or its path relative to the SVG. None: embed the image as JPEG.
            embed: With False and without `href`, the document has no image, to be laid over one.
            labels: As for `draw`.
            numbers: As for `draw`.
            size: As for `draw`.

        Raises DrawError without an image, and DrawingError for an unknown option.
        """
        from molmo_edge.sdk.annotation import DrawOptions
        from molmo_edge.sdk.svg import to_svg

        shown, index, options = self._require_images(), self._index(image), DrawOptions(labels, numbers, size)
        picture, numbered = Image.fromarray(shown.images[index]), shown.points_in(index, self.points)
        return to_svg(picture, numbered, self.points, href=href, embed=embed, options=options)

    def to_coco(self, file_name: str | Sequence[str] = "image.jpg") -> dict[str, Any]:
        """Return the points as a COCO keypoints data set, ready for JSON. See `molmo_edge.answer.to_coco`.

        `file_name`: of the image; of several images, or frames of a video, one name for each.
        """
        return to_coco([self], [file_name])

    def to_supervision(self, image: int | None = None) -> supervision.KeyPoints:
        """Return the points as `supervision.KeyPoints`: n objects of one keypoint each, xy in pixels.

        `class_id` numbers the labels in order of appearance, and `data["class_name"]` has the labels. `image`: as for
        `draw`; needed if there are several. Raises DrawError without an image, and MissingExtra if supervision is not
        installed.
        """
        from molmo_edge.sdk.keypoints import supervision_keypoints

        return supervision_keypoints(_pointed(self, self._index(image), ""))

    def to_dict(self) -> dict[str, Any]:
        """Return everything except the image, ready for JSON (schema: molmo_edge/answer.schema.json).

        Points are in percent and, if the answer holds its image, also in pixels.
        """
        points: list[dict[str, Any]] = [
            {name: value for name, value in dataclasses.asdict(p).items() if value is not None} for p in self.points
        ]
        if self._kept is not None:
            for point, (x, y) in zip(points, self.pixels(), strict=True):
                if math.isfinite(x):
                    point["pixel"] = [round(x, 1), round(y, 1)]
        return {
            "text": self.text,
            "points": points,
            "count": self.count,
            "complete": self.complete,
            "token_ids": list(self.token_ids),
            "usage": self._usage(),
            "model": self.model,
            "tokens_per_second": None if (speed := self.tokens_per_second) is None else round(speed, 2),
            **({} if self.parsed is None else {"parsed": _plain(self.parsed)}),
        }

    def _usage(self) -> dict[str, Any]:
        usage = dataclasses.asdict(self.usage)
        if not self.usage.tokens.dropped:  # there only with `image_tokens`
            del usage["tokens"]["dropped"]
        return usage

    def _repr_png_(self) -> bytes | None:
        """For notebooks."""
        from molmo_edge.sdk.notebook import to_png

        return to_png(self._kept, self.points)

    def _repr_html_(self) -> str:
        """For notebooks."""
        from molmo_edge.sdk.notebook import to_html

        return to_html(self.readable, self.points, self._kept, complete=self.complete)

    @property
    def _kept(self) -> Shown | None:
        if self.shown is not None and self.shown.images:
            return self.shown
        return None if self.image is None else Shown((self.image,))

    def _require_images(self) -> Shown:
        if (shown := self._kept) is None:
            raise DrawError("this answer does not hold its image, so there is nothing to draw on")
        return shown

    def _index(self, image: int | None) -> int:
        """The index of the image with the number `image`; None: the only one. Raises DrawError."""
        shown = self._require_images()
        if image is None and len(shown.images) == 1:
            return 0
        if not isinstance(image, Integral) or not 1 <= image <= len(shown.images):
            raise DrawError(f"this answer is about {shown.what}: image must be 1 to {len(shown.images)}, not {image!r}")
        return int(image) - 1


def to_coco(answers: Sequence[Answer], file_names: Sequence[str | Sequence[str]]) -> dict[str, Any]:
    """Return the points of several answers as a COCO keypoints data set, ready for JSON.

    Each point is an annotation with one keypoint, [x, y, 2] in pixels from the top left; each label is a category. A
    point has no extent: its `bbox` is [x, y, 0, 0], and its `area` 0. `file_names`: for each answer the name of its
    image, or the names of its images or frames. Raises DrawError for an answer without an image, and for a single name
    for several images; ValueError if the numbers of names and of answers or images differ.
    """
    from molmo_edge.sdk.keypoints import coco_keypoints

    pictures: list[PointedPicture] = []
    for answer, names in zip(answers, file_names, strict=True):
        if isinstance(names, str):
            _ = answer.picture_size  # raises DrawError unless there is one image
            names = [names]
        shown = range(max(1, len(answer.images)))
        pictures += [_pointed(answer, index, name) for index, name in zip(shown, names, strict=True)]
    return coco_keypoints(pictures)


def _plain(parsed: Any) -> Any:
    """The value of `Answer.parsed` for JSON."""
    return parsed.model_dump(mode="json") if hasattr(parsed, "model_dump") else parsed


def _pointed(answer: Answer, index: int, file_name: str) -> PointedPicture:
    """The image `index` of an answer, with the points in it."""
    from molmo_edge.sdk.keypoints import PointedPicture

    shown = answer.shown
    if shown is None:
        return PointedPicture(file_name, *answer.picture_size, answer.points)
    height, width = shown.size_of(index)
    return PointedPicture(file_name, width, height, tuple(point for _, point in shown.points_in(index, answer.points)))
