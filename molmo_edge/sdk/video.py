"""`Video`: a video as the input of a Molmo2, from a file or from frames in memory."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from numbers import Integral, Real
from typing import Any

import numpy as np

from molmo_edge.config import SAMPLINGS, VideoConfig
from molmo_edge.errors import MolmoEdgeError
from molmo_edge.frontend.image_files import load_image
from molmo_edge.frontend.video import sample_frames, sample_frames_evenly, sample_times
from molmo_edge.frontend.video_files import VideoError, VideoFile, open_video


@dataclass(frozen=True, eq=False)
class SelectedFrames:
    """The frames of a video that a model sees."""

    times: tuple[float, ...]  # seconds from the start of the video, as the prompt gives them
    read: Callable[[], Iterator[np.ndarray]]  # decodes them one by one: uint8 [h, w, 3]


class Video:
    """A video for `Molmo.ask` and the other methods that take an image. Models of the Molmo2 generation take videos.

    `frames`: a list of images (see `Molmo`) or an array [n, h, w, 3], all of one size. Give either `fps`, their rate,
    or `times`, seconds from the start of the video, ascending. `Video.open` reads a file.

    Which frames the model sees: with `sampling` "reference", as Ai2's processor selects them: `max_fps` per second and
    the last one, or `max_frames` at equal intervals if that is fewer. With "transformers", as the processor of
    transformers 5.24 does, which leaves out the last frame. Frames with `times` are all seen, or `max_frames` of them.
    `max_fps`, `max_frames`: None for the model's own (2 and 384). A frame takes about 90 positions of the context.

    Raises VideoError for invalid frames, rates and times.
    """

    def __init__(
        self,
        frames: Sequence[Any] | np.ndarray | VideoFile,
        *,
        fps: float | None = None,
        times: Sequence[float] | None = None,
        sampling: str = "reference",
        max_frames: int | None = None,
        max_fps: float | None = None,
    ) -> None:
        if isinstance(frames, VideoFile):  # see `open`
            self._file: VideoFile | None = frames
            self._frames: Sequence[Any] | np.ndarray = ()
        else:
            self._file, self._frames = None, _checked_frames(frames)
            if (fps is None) == (times is None):
                raise VideoError("give either fps, the rate of the frames, or times, the seconds of each frame")
        self._fps = None if fps is None else _positive("fps", fps)
        self._times = None if times is None else _checked_times(times, len(self._frames))
        if sampling not in SAMPLINGS:
            raise VideoError(f"sampling must be one of {', '.join(SAMPLINGS)}, not {sampling!r}")
        if max_frames is not None and (not isinstance(max_frames, Integral) or max_frames < 1):
            raise VideoError(f"max_frames must be an integer of 1 or more, not {max_frames!r}")
        self._sampling, self._max_frames = sampling, max_frames
        self._max_fps = None if max_fps is None else _positive("max_fps", max_fps)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str] | bytes,
        *,
        sampling: str = "reference",
        max_frames: int | None = None,
        max_fps: float | None = None,
    ) -> Video:
        """Open a video file, a path or its bytes, in any format that FFmpeg reads. Needs PyAV (the extra `video`).

        Its frames are listed here and decoded when a model is asked; only those that it sees, and the frames that they
        depend on, are decoded. The reference's rule for files takes the frames shown every 1/max_fps seconds and at the
        end. For the keywords see `Video`. Raises VideoError for a file that cannot be read, MissingExtra without PyAV.
        """
        return cls(open_video(path), sampling=sampling, max_frames=max_frames, max_fps=max_fps)

    @property
    def duration(self) -> float:
        """Seconds."""
        if self._file is not None:
            return self._file.duration
        return self._times[-1] if self._times is not None else len(self._frames) / (self._fps or 1)

    def __len__(self) -> int:
        """The number of all frames."""
        return len(self._frames) if self._file is None else len(self._file.times)

    def __repr__(self) -> str:
        name = "" if self._file is None else f"{self._file.name!r}, "
        return f"Video({name}{len(self)} frames, {self.duration:.1f} s)"

    def select(self, config: VideoConfig, *, alpha: str = "drop") -> SelectedFrames:
        """Select the frames that a model sees. `config`: of the model; `alpha`: see `load_image`."""
        most, rate = int(self._max_frames or config.max_frames), self._max_fps or config.max_fps
        evenly = self._sampling == "transformers"
        if self._file is not None:
            file = self._file
            if evenly:
                numbers = sample_frames_evenly(len(file.times), file.fps, max_frames=most, max_fps=rate)
                times = [number / file.fps for number in numbers]
            else:
                times = sample_times(file.duration, max_frames=most, max_fps=rate)
                numbers = file.shown_at(times)
            return SelectedFrames(tuple(times), partial(file.frames, numbers))
        if self._times is not None:
            total = len(self._times)
            numbers = [int(n) for n in np.linspace(0, total - 1, min(total, most))]
            times = [self._times[number] for number in numbers]
        else:
            assert self._fps is not None
            rule = sample_frames_evenly if evenly else sample_frames
            numbers = rule(len(self._frames), self._fps, max_frames=most, max_fps=rate)
            times = [number / self._fps for number in numbers]
        return SelectedFrames(tuple(times), partial(self._images, numbers, alpha))

    def _images(self, numbers: Sequence[int], alpha: str) -> Iterator[np.ndarray]:
        size: tuple[int, ...] | None = None
        for number in numbers:
            try:
                rgb = load_image(self._frames[number], alpha=alpha)
            except MolmoEdgeError as error:
                raise VideoError(f"frame {number + 1} of the video: {error}") from error
            size = size or rgb.shape
            if rgb.shape != size:
                raise VideoError(
                    f"frame {number + 1} of the video has {rgb.shape[1]} x {rgb.shape[0]} pixels, the frames before "
                    f"{size[1]} x {size[0]}: all frames must have the same size"
                )
            yield rgb


def _checked_frames(frames: Any) -> Sequence[Any] | np.ndarray:
    if isinstance(frames, np.ndarray):
        if frames.ndim != 4 or frames.shape[3] not in (1, 3, 4):
            raise VideoError(f"an array of frames must be [n, h, w, 3], not {list(frames.shape)}")
    elif not isinstance(frames, (list, tuple)):
        raise VideoError(
            f"frames must be a list of images or an array [n, h, w, 3], not {type(frames).__name__}; Video.open reads "
            "a file"
        )
    checked: Sequence[Any] | np.ndarray = frames
    if not len(checked):
        raise VideoError("the video has 0 frames: give at least one")
    return checked


def _positive(name: str, value: Any) -> float:
    if not isinstance(value, Real) or not 0 < float(value) < math.inf:
        raise VideoError(f"{name} must be a positive number of frames per second, not {value!r}")
    return float(value)


def _checked_times(times: Any, total: int) -> list[float]:
    try:
        values = [float(time) for time in times]
    except (TypeError, ValueError):
        raise VideoError("times must be a list of seconds, one of each frame") from None
    if len(values) != total:
        raise VideoError(f"the video has {total} frames, but {len(values)} times: give one time for each frame")
    if not all(0 <= time < math.inf for time in values) or any(a > b for a, b in pairwise(values)):
        raise VideoError("times must be seconds of 0 or more, in ascending order")
    return values
