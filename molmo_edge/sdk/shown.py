"""What a prompt shows, as answers and scenes keep it: images, or the frames of a video."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from molmo_edge.frontend.points import Point
from molmo_edge.sdk.readable_text import counted


@dataclass(frozen=True, eq=False)
class Shown:
    """The images of a prompt, or the frames of its video."""

    images: tuple[np.ndarray, ...]  # uint8 [h, w, 3], EXIF rotation applied; of frames, copies of at most 640 px
    times: tuple[float, ...] | None = None  # of the frames, seconds; None: images
    frame_size: tuple[int, int] | None = None  # height and width of the video's frames, pixels

    def index_of(self, point: Point) -> int | None:
        """The index in `images` of the image or frame that `point` is in; None if there is no such image.

        A point that names no image is in the first one. A time stands for the nearest frame.
        """
        if (times := self.times) is not None:
            wanted = point.time or 0.0
            return min(range(len(times)), key=lambda at: abs(times[at] - wanted), default=None)
        if len(self.images) == 1:
            return 0
        number = 1 if point.image is None else point.image
        return number - 1 if 0 < number <= len(self.images) else None

    def size_of(self, index: int) -> tuple[int, int]:
        """Height and width in pixels of the image, or of the video's frames before they were reduced."""
        return self.frame_size or (self.images[index].shape[0], self.images[index].shape[1])

    def points_in(self, index: int, points: Sequence[Point]) -> list[tuple[int, Point]]:
        """Those of an answer's points that are in the image `index`, with their numbers in the answer."""
        return [pair for pair in enumerate(points, 1) if self.index_of(pair[1]) == index]

    @property
    def what(self) -> str:
        """ "3 images", or "a video with 3 frames"."""
        if self.times is not None:
            return f"a video with {counted(len(self.images), 'frame')}"
        return counted(len(self.images), "image")

    def title(self, index: int) -> str:
        """ "image 2", or the time of a frame: "1.5 s"."""
        return f"image {index + 1}" if self.times is None else f"{self.times[index]:.1f} s"

    def to_draw(self, points: Sequence[Point]) -> list[int]:
        """Indices of the pictures that show an answer: all images; of a video the frames with points, or the first."""
        if self.times is None:
            return list(range(len(self.images)))
        return sorted({at for point in points if (at := self.index_of(point)) is not None}) or [0]
