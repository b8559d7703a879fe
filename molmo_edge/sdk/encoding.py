"""Encode what a prompt shows: image after image, or a few frames at a time, so that memory stays bounded."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, cast

import numpy as np
from PIL import Image

from molmo_edge.frontend.crops import ImageProcessor, Overview, stitched_patches
from molmo_edge.frontend.video import prepare_video
from molmo_edge.frontend.video_files import VideoError
from molmo_edge.runtimes.grounding import GroundingInputs
from molmo_edge.runtimes.prompt_embeddings import add_features
from molmo_edge.sdk.shown import Shown

if TYPE_CHECKING:
    from molmo_edge.frontend.visual_prompt import VisualPrompt
    from molmo_edge.runtimes.protocol import PointRuntime, Runtime
    from molmo_edge.sdk.inputs import Inputs
    from molmo_edge.sdk.video import SelectedFrames

_FRAMES = 8  # prepared and encoded at once
_KEPT_SIDE = 640  # pixels


@dataclass(frozen=True, eq=False)
class Encoded:
    """The embeddings of BOS and what a prompt shows."""

    embeddings: np.ndarray  # float32 [n, d_model]
    grounding: GroundingInputs | None  # of a model that points by grounding tokens
    shown: Shown
    crops: int
    vision: float  # seconds in vision tower and connector


def encode(runtime: Runtime, process: ImageProcessor, inputs: Inputs, prompt: VisualPrompt) -> Encoded:
    """Cut images or frames into crops and run vision tower and connector. `prompt`: of `inputs`."""
    embeddings = np.array(runtime.embed(prompt.ids), np.float32)
    collected = _Collected([], [], [], []) if runtime.config.point_head is not None else None
    video = None if inputs.frames is None else _KeptFrames(inputs.frames)
    parts = _image_parts(process, inputs, prompt) if video is None else _frame_parts(process, video, prompt)
    vision, crops = 0.0, 0
    for part in parts:
        began = time.perf_counter()
        if collected is None:
            features = runtime.encode_image(part.crops, part.masks, part.overview, part.pooling)
        else:
            features = collected.add(cast("PointRuntime", runtime), part)
        add_features(embeddings, part.positions, features)
        vision += time.perf_counter() - began
        crops += len(part.crops)
    shown = Shown(inputs.images) if video is None else video.shown()
    grounding = None
    if collected is not None:
        grounding = collected.inputs(cast("PointRuntime", runtime), process, prompt, shown.times)
    return Encoded(embeddings, grounding, shown, crops, vision)


@dataclass(frozen=True, eq=False)
class _Part:
    """An image, or some frames. Patches are numbered within it."""

    crops: np.ndarray  # float32 [n, patches^2, patch_size^2 * 3]
    masks: np.ndarray
    overview: Overview | None
    pooling: np.ndarray | None
    positions: np.ndarray  # of its features in the prompt
    grids: tuple[np.ndarray, ...]  # see GroundingInputs


def _image_parts(process: ImageProcessor, inputs: Inputs, prompt: VisualPrompt) -> Iterator[_Part]:
    for rgb, positions in zip(inputs.images, prompt.positions, strict=True):
        image = process(rgb)
        # Without crops there is only the global view, in which nothing can be pointed at.
        there = image.tiling[0] and image.pooling is not None
        grid = stitched_patches(process.config, image.tiling) if there else np.empty((0, 0), np.int64)
        yield _Part(image.crops, image.masks, image.overview, image.pooling, positions, (grid,))


def _frame_parts(process: ImageProcessor, video: _KeptFrames, prompt: VisualPrompt) -> Iterator[_Part]:
    (positions,) = prompt.positions
    side, done = process.config.patches, 0
    while frames := list(islice(video, _FRAMES)):
        part = prepare_video(frames, video.selected.times[done : done + len(frames)], process.config)
        cells = len(part.pooling) // len(frames)
        grids = np.arange(len(frames) * side * side).reshape(-1, side, side)
        where = positions[done * cells : (done + len(frames)) * cells]
        yield _Part(part.crops, np.empty(0, np.float32), None, part.pooling, where, tuple(grids))
        done += len(frames)
    if done != len(video.selected.times):
        raise VideoError(f"the video ended after {done} of {len(video.selected.times)} frames: is it truncated?")


class _KeptFrames(Iterator[np.ndarray]):
    """The frames of a video, of which reduced copies are kept for drawing."""

    def __init__(self, selected: SelectedFrames) -> None:
        self.selected = selected
        self._frames = selected.read()
        self._kept: list[np.ndarray] = []
        self._size: tuple[int, int] | None = None

    def __next__(self) -> np.ndarray:
        frame = next(self._frames)
        self._size = (frame.shape[0], frame.shape[1])
        reduced = Image.fromarray(frame)
        reduced.thumbnail((_KEPT_SIDE, _KEPT_SIDE))
        self._kept.append(np.array(reduced))
        return frame

    def shown(self) -> Shown:
        return Shown(tuple(self._kept), self.selected.times, self._size)


@dataclass
class _Collected:
    """What MolmoPoint's grounding tokens need of all parts together."""

    patches: list[np.ndarray]  # float32 [n * patches^2, feature_dim]
    pooling: list[np.ndarray]
    features: list[np.ndarray]
    grids: list[np.ndarray]

    def add(self, runtime: PointRuntime, part: _Part) -> np.ndarray:
        """Encode a part; returns its image features."""
        assert part.pooling is not None
        before = sum(len(patches) for patches in self.patches)
        patches = runtime.encode_crops(part.crops)
        features = runtime.connect(patches, part.masks, part.pooling)
        self.patches.append(patches.reshape(-1, patches.shape[-1]))
        self.pooling.append(np.where(part.pooling < 0, -1, part.pooling + before))
        self.features.append(features)
        self.grids += [grid + before for grid in part.grids]
        return features

    def inputs(
        self, runtime: PointRuntime, process: ImageProcessor, prompt: VisualPrompt, times: tuple[float, ...] | None
    ) -> GroundingInputs:
        return GroundingInputs(
            head=runtime,
            ids=prompt.ids,
            positions=np.concatenate(prompt.positions),
            indexable=process.special.im_patch,
            patch_features=np.concatenate(self.patches),
            pooling=np.concatenate(self.pooling),
            features=np.concatenate(self.features),
            grids=tuple(self.grids),
            times=times,
        )
