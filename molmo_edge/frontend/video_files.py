"""Read selected frames of a video file with PyAV (FFmpeg), the extra `video`.

The packets of the file are listed first, without decoding. Their times determine which frames are selected, and which
parts of the file have to be decoded for them.
"""

from __future__ import annotations

import contextlib
import io
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from molmo_edge.errors import MolmoEdgeError, first_line
from molmo_edge.frontend.image_files import MAX_PIXELS
from molmo_edge.frontend.unsupported_inputs import HEAD, describe_name, kind_of_contents
from molmo_edge.system.extras import with_extra

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

# FFmpeg opens no other file or URL that a playlist names: the file itself is read through Python.
_OPTIONS = {"protocol_whitelist": "none"}
_MISSING = 1.0  # seconds that a file may end before the end that its header declares


class VideoError(MolmoEdgeError):
    """A video that cannot be read, or invalid frames or settings of a video."""


@dataclass(frozen=True)
class VideoFile:
    """The times of the frames in a video file. `open_video` makes it."""

    source: Path | bytes = field(repr=False)
    name: str  # for messages
    fps: float  # on average
    size: tuple[int, int]  # height and width of the stored frames, pixels
    times: tuple[float, ...]  # of all frames, seconds from the first
    duration: float  # to the end of the last frame, seconds
    stamps: tuple[int, ...] | None = field(repr=False)  # of all frames, in units of the file; None: it has none
    keys: tuple[int, ...] = field(repr=False)  # the frames that can be decoded without earlier ones

    def shown_at(self, times: Sequence[float]) -> list[int]:
        """The numbers of the frames that are shown at `times`; the last frame for later times."""
        return [max(0, min(bisect_right(self.times, time), len(self.times)) - 1) for time in times]

    def frames(self, numbers: Sequence[int]) -> Iterator[np.ndarray]:
        """Decode frames, uint8 [h, w, 3] each, turned upright. `numbers` ascend and may repeat. Raises VideoError."""
        last: tuple[int, np.ndarray] | None = None
        with _opened(self.source, self.name) as (container, stream):
            decoded = self._decode(container, stream, 0)
            position = 0  # number of the next frame that `decoded` yields
            for number in numbers:
                if last is None or number != last[0]:
                    key = self.keys[bisect_right(self.keys, number) - 1] if self.stamps and self.keys else 0
                    if key > position:
                        assert self.stamps is not None
                        container.seek(self.stamps[key], stream=stream)
                        decoded = self._decode(container, stream, key)
                    found, frame = next((pair for pair in decoded if pair[0] >= number), (-1, None))
                    if frame is None:
                        raise VideoError(f"{self.name} is damaged or truncated: {self._lost(number)} cannot be decoded")
                    position, last = found + 1, (number, _upright(frame))
                yield last[1]

    def _decode(self, container: InputContainer, stream: VideoStream, start: int) -> Iterator[tuple[int, VideoFrame]]:
        """The frames from a position of the file on, with their numbers."""
        for count, frame in enumerate(container.decode(stream), start):
            if self.stamps is None or frame.pts is None:
                yield count, frame
            else:
                yield bisect_right(self.stamps, frame.pts) - 1, frame

    def _lost(self, number: int) -> str:
        return f"the frame at {self.times[number]:.1f} s"


def open_video(source: str | os.PathLike[str] | bytes) -> VideoFile:
    """List the frames of a video: the path or the bytes of a file. Raises VideoError, and MissingExtra without PyAV."""
    if isinstance(source, bytes):
        return _list_frames(source, "the video")
    if isinstance(source, (str, os.PathLike)):
        return _list_frames(Path(os.fsdecode(source)), os.fsdecode(source))
    raise VideoError(f"a video must be a path or the bytes of a file, not {type(source).__name__}")


def _list_frames(source: Path | bytes, name: str) -> VideoFile:
    packets: list[tuple[int | None, int | None, int, bool]] = []  # pts, dts, duration, is a key frame
    end = 0.0  # of all streams, seconds
    with _opened(source, name) as (container, stream):
        for packet in container.demux():
            if not packet.size:
                continue
            stamp, tick = packet.pts if packet.pts is not None else packet.dts, packet.time_base
            if stamp is not None and tick is not None:
                end = max(end, float((stamp + (packet.duration or 0)) * tick))
            if packet.stream is stream and not packet.is_discard:
                packets.append((packet.pts, packet.dts, packet.duration or 0, packet.is_keyframe))
        rate = stream.average_rate or stream.guessed_rate
        unit = stream.time_base
        declared = (container.duration or 0) / 1_000_000 + (container.start_time or 0) / 1_000_000
        fewer = stream.frames > len(packets) + 1
        size = (stream.height, stream.width)
    if not packets or not size[0] or not size[1]:
        raise VideoError(f"{name} has no frames: is it damaged, or not a video?")
    if size[0] * size[1] > MAX_PIXELS:
        raise VideoError(f"{name} has frames of {size[1]} x {size[0]} pixels, the maximum is {MAX_PIXELS} pixels")
    if declared - end > _MISSING or (fewer and declared - end > 0.5 * _MISSING):
        raise VideoError(
            f"{name} is damaged or truncated, copy or download it again: it ends after {end:.1f} of {declared:.1f} s"
        )
    fps = float(rate) if rate else 0.0
    if unit is None or any(packet[0] is None for packet in packets):
        if not fps:
            raise VideoError(f"{name} has neither times nor a frame rate: convert it to MP4")
        times = tuple(number / fps for number in range(len(packets)))
        return VideoFile(source, name, fps, size, times, len(packets) / fps, None, ())
    packets.sort(key=lambda packet: packet[0] or 0)
    stamps = tuple(packet[0] or 0 for packet in packets)
    times = tuple(float((stamp - stamps[0]) * unit) for stamp in stamps)
    fps = fps or (len(times) - 1) / max(times[-1], 1e-3) or 1.0
    duration = times[-1] + (float(packets[-1][2] * unit) or 1 / fps)
    keys = tuple(number for number, packet in enumerate(packets) if packet[3])
    return VideoFile(source, name, fps, size, times, duration, stamps, keys)


def _av() -> Any:
    import av

    return av


@contextlib.contextmanager
def _opened(source: Path | bytes, name: str) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open the file and its first video stream; errors of FFmpeg inside become VideoError."""
    av = with_extra(_av, "a video file", "video")()
    try:
        file = io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb")  # noqa: SIM115 (closed below)
    except IsADirectoryError:
        raise VideoError(f"{name} is a directory, not a video: pass a file") from None
    except (OSError, ValueError) as error:
        if instead := describe_name(name):
            raise VideoError(f"{name} {instead}") from None
        if isinstance(error, FileNotFoundError):
            raise VideoError(f"there is no video {name}: check the path") from None
        raise VideoError(f"the video {name} cannot be opened: {getattr(error, 'strerror', None) or error}") from error
    with file:
        kind = kind_of_contents(head := file.read(HEAD))
        if not head:
            raise VideoError(f"{name} is empty (0 bytes): copy or download it again")
        file.seek(0)
        try:
            with av.open(file, options=_OPTIONS) as container:
                if not container.streams.video:
                    raise VideoError(f"{name} has no video stream: it is a sound file, or it is truncated")
                if container.format.name.endswith("_pipe") or container.format.name in ("image2", "tty"):
                    raise VideoError(f"{name} is not a video: pass an image without Video")
                yield container, container.streams.video[0]
        except (av.error.FFmpegError, OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or first_line(error)
            what = (
                f"is {kind}, not a video" if kind and "video" not in kind else f"cannot be read as a video ({reason})"
            )
            raise VideoError(f"{name} {what}: if it is a video, it is damaged or truncated") from error


def _upright(frame: VideoFrame) -> np.ndarray:
    """The frame as RGB, turned as the file says: phones store videos as the sensor sees them."""
    rgb = frame.to_ndarray(format="rgb24")
    return np.ascontiguousarray(np.rot90(rgb, round(frame.rotation / 90)))
