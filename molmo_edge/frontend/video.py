"""Frames of a video for Molmo2: selection, and conversion to crops and tokens.

Source: `hf_model/video_processing_molmo2.py` of allenai/molmo2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from molmo_edge.config import ImageConfig
from molmo_edge.frontend.crops import cut_crop, fill_canvas, group_patches

POOL = 3  # side, in patches, of the pooling window of one token


@dataclass(frozen=True, eq=False)
class PreparedVideo:
    """A video as input of a runtime and of a prompt."""

    crops: np.ndarray  # float32 [n_frames, patches^2, patch_size^2 * 3], normalised
    pooling: np.ndarray  # int64 [n_frames * cells, POOL^2]: indices into the patches of all frames, -1 for none
    grid: tuple[int, int]  # rows and columns of tokens of one frame
    times: tuple[float, ...]  # seconds from the start of the video
    size: tuple[int, int]  # height and width of a frame in pixels


def prepare_video(frames: Sequence[np.ndarray], times: Sequence[float], config: ImageConfig) -> PreparedVideo:
    """Prepare frames, uint8 [h, w, 3] each, shown at `times` (seconds)."""
    side, n = config.crop_size, config.patches
    crops = np.empty((len(frames), n * n, config.patch_size**2 * 3), np.float32)
    for frame, out in zip(frames, crops, strict=True):
        cut_crop(fill_canvas(frame, side, side, config)[0], 0, 0, config, out=out)
    cells = group_patches(np.arange(n * n).reshape(n, n), POOL)
    slots = cells.reshape(-1, POOL * POOL)
    offsets = n * n * np.arange(len(frames))[:, None, None]
    pooling = np.where(slots < 0, -1, slots + offsets).reshape(-1, POOL * POOL)
    return PreparedVideo(crops, pooling, cells.shape[:2], tuple(times), frames[0].shape[:2])


def sample_frames(total: int, fps: float, *, max_frames: int, max_fps: float = 2.0) -> list[int]:
    """The frames that the reference selects: `max_fps` per second and the last one, at most `max_frames`.

    Source: `sample_frames` of `video_processing_molmo2.py` in allenai/molmo2, mode "uniform_last_frame". As in the
    reference, frames of a video with fewer than `max_fps` frames per second are repeated.
    """
    last = total - 1
    if total <= min(2, max_frames):
        return list(range(total))
    if total / fps > (max_frames - 1) / max_fps:
        return [int(frame) for frame in np.linspace(0, last, min(max_frames, total))]
    frames = [round(frame) for frame in np.arange(0.0, last, fps / max_fps).tolist()]
    return frames if frames[-1] == last else [*frames, last]


def sample_times(duration: float, *, max_frames: int, max_fps: float = 2.0) -> list[float]:
    """The times, in seconds, that the reference selects in a file: `max_fps` per second and the end of the video.

    If that is more than `max_frames`, they are `max_frames` times at equal intervals. Source: `sample_times`, as in
    `sample_frames`.
    """
    if duration > (max_frames - 1) / max_fps:
        return [float(time) for time in np.linspace(0, duration, max_frames)]
    return [*np.arange(0.0, duration, 1 / max_fps).tolist(), duration]


def sample_frames_evenly(total: int, fps: float, *, max_frames: int, max_fps: float = 2.0) -> list[int]:
    """The frames that transformers selects, which ignores the checkpoint's mode: equal steps, without the last frame.

    Source: `video_processing_molmo2.py` of transformers 5.24.
    """
    count = max(1, min(int(total / fps * max_fps), max_frames, total))
    return [frame * total // count for frame in range(count)]
