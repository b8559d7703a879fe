"""Encode what a prompt shows: image after image, or a few frames at a time, so that memory stays bounded."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, cast

import numpy as np
from PIL import Image

from molmo_edge.config import ConfigError
from molmo_edge.frontend.crops import (
    ImageProcessor,
    Overview,
    PreparedImage,
    cell_patches,
    image_in_grid,
    pointable_cells,
    pointing_grid,
)
from molmo_edge.frontend.video import prepare_video
from molmo_edge.frontend.video_files import VideoError
from molmo_edge.runtimes.grounding import GroundingInputs
from molmo_edge.runtimes.prompt_embeddings import add_features
from molmo_edge.sdk.image_tokens import ImageTokens, kept_tokens
from molmo_edge.sdk.shown import Shown

if TYPE_CHECKING:
    from molmo_edge.config import ImageConfig
    from molmo_edge.frontend.visual_prompt import VisualPrompt
    from molmo_edge.runtimes.protocol import PartedRuntime, PointRuntime, Runtime
    from molmo_edge.sdk.inputs import Inputs
    from molmo_edge.sdk.video import SelectedFrames

_FRAMES = 8  # prepared and encoded at once
_KEPT_SIDE = 640  # pixels


@dataclass(frozen=True, eq=False)
class Encoded:
    """The embeddings of BOS and what a prompt shows, without image tokens that were left out."""

    embeddings: np.ndarray  # float32 [n, d_model]
    kept: np.ndarray | None  # int [n]: their positions in the prompt; None: all
    grounding: GroundingInputs | None  # of a model that points by grounding tokens
    shown: Shown
    crops: int
    vision: float  # seconds in vision tower and connector


def check_reuse_crops(given: object) -> bool:
    """Return the option of `Molmo`. Raises ConfigError unless it is True or False."""
    if not isinstance(given, bool):
        raise ConfigError(f"reuse_crops must be True or False, not {given!r}")
    return given


def encode(
    runtime: Runtime,
    process: ImageProcessor,
    inputs: Inputs,
    prompt: VisualPrompt,
    choice: ImageTokens | None = None,
    *,
    reuse_crops: bool = False,
) -> Encoded:
    """Cut images or frames into crops and run vision tower and connector.

    `prompt`: of `inputs`. `choice`: which image tokens stay; None: all of them. `reuse_crops`: see EncodedPart.
    """
    embeddings = np.array(runtime.embed(prompt.ids), np.float32)
    collected = CollectedParts() if runtime.config.point_head is not None else None
    video = None if inputs.frames is None else _KeptFrames(inputs.frames)
    if video is None:
        parts = _image_parts(process, inputs, prompt, grounded=collected is not None)
    else:
        parts = _frame_parts(process, video, prompt)
    vision, crops = 0.0, 0
    seen: list[tuple[np.ndarray, np.ndarray]] = []  # positions and features of image tokens
    for part in parts:
        began = time.perf_counter()
        if collected is None and not reuse_crops:
            features = runtime.encode_image(part.crops, part.masks, part.overview, part.pooling)
        else:
            patches, features = part.features(cast("PartedRuntime", runtime), reuse_crops=reuse_crops)
            if collected is not None:
                collected.add(part, patches, features)
        add_features(embeddings, part.positions, features)
        if choice is not None:
            seen.append((part.positions[part.positions >= 0], features[part.positions >= 0]))
        vision += time.perf_counter() - began
        crops += len(part.crops)
    shown = Shown(inputs.images) if video is None else video.shown()
    grounding = None
    if collected is not None:
        grounding = collected.inputs(cast("PointRuntime", runtime), prompt.ids, process.special.im_patch, shown.times)
    kept = None
    if choice is not None and seen:
        cells, found = (np.concatenate(arrays) for arrays in zip(*seen, strict=True))
        kept = np.flatnonzero(kept_tokens(prompt.ids, process.special, cells, found, choice))
        embeddings = embeddings[kept]
        if grounding is not None:
            rows = np.full(len(prompt.ids), -1)
            rows[kept] = np.arange(len(kept))
            grounding = replace(grounding, rows=rows[grounding.positions])
    return Encoded(embeddings, kept, grounding, shown, crops, vision)


@dataclass(frozen=True, eq=False)
class EncodedPart:
    """The inputs of vision tower and connector for an image, or some frames. Patches are numbered within it."""

    crops: np.ndarray  # float32 [n, patches^2, patch_size^2 * 3]
    masks: np.ndarray
    overview: Overview | None
    pooling: np.ndarray | None
    positions: np.ndarray  # of its features in the prompt, negative where dropped
    grids: tuple[np.ndarray, ...] = ()  # see GroundingInputs
    slots: np.ndarray | None = None  # `pooling` of the image tokens, of a model that points by grounding tokens
    frames: tuple[Sequence[float], ...] = ()
    pointable: np.ndarray | None = None

    def features(self, runtime: PartedRuntime, *, reuse_crops: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Run the vision tower and the connector.

        `reuse_crops`: run the tower once if the image's only crop has the pixels of the global view. The connector
        runs for both, because their masks differ.

        Returns patch features [n, patches^2, feature_dim], and image features [n, cells^2, d_model], or
        [n_cells, d_model] of a model that pools across crops.
        """
        crops, overview = self.crops, self.overview
        twice = reuse_crops and len(crops) == 2 and np.array_equal(crops[0], crops[1])
        if twice:
            crops, overview = crops[:1], overview and replace(overview, positions=overview.positions[:1])
        patches = runtime.encode_crops(crops, overview)
        if twice:
            patches = np.repeat(patches, 2, axis=0)
        return patches, runtime.connect(patches, self.masks, self.pooling)


def image_part(
    config: ImageConfig, image: PreparedImage, size: tuple[int, int], positions: np.ndarray, *, grounded: bool
) -> EncodedPart:
    """The inputs for one image of `size` (height and width, pixels), with its features at `positions` of the prompt.

    `grounded`: whether the model points by grounding tokens.
    """
    part = EncodedPart(image.crops, image.masks, image.overview, image.pooling, positions)
    if not grounded:
        return part
    pointable = pointable_cells(config, image.tiling)
    # In MolmoPoint nothing can be pointed at without crops.
    grid = pointing_grid(config, image.tiling) if pointable.any() else np.empty((0, 0), np.int64)
    return replace(
        part,
        grids=(grid,),
        slots=cell_patches(config, image.tiling) if image.pooling is None else image.pooling,
        frames=(image_in_grid(config, image.tiling, *size),),
        pointable=pointable,
    )


def _image_parts(
    process: ImageProcessor, inputs: Inputs, prompt: VisualPrompt, *, grounded: bool
) -> Iterator[EncodedPart]:
    for rgb, positions in zip(inputs.images, prompt.positions, strict=True):
        size = rgb.shape[0], rgb.shape[1]
        yield image_part(process.config, process(rgb), size, positions, grounded=grounded)


def _frame_parts(process: ImageProcessor, video: _KeptFrames, prompt: VisualPrompt) -> Iterator[EncodedPart]:
    (positions,) = prompt.positions
    side, done = process.config.patches, 0
    while frames := list(islice(video, _FRAMES)):
        part = prepare_video(frames, video.selected.times[done : done + len(frames)], process.config)
        cells = len(part.pooling) // len(frames)
        grids = np.arange(len(frames) * side * side).reshape(-1, side, side)
        where = positions[done * cells : (done + len(frames)) * cells]
        yield EncodedPart(part.crops, np.empty(0, np.float32), None, part.pooling, where, tuple(grids), part.pooling)
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
class CollectedParts:
    """What grounding tokens need of all parts together, the image tokens in their order in the prompt."""

    patches: list[np.ndarray] = field(default_factory=list)  # float32 [n * patches^2, feature_dim]
    pooling: list[np.ndarray] = field(default_factory=list)
    features: list[np.ndarray] = field(default_factory=list)
    grids: list[np.ndarray] = field(default_factory=list)
    positions: list[np.ndarray] = field(default_factory=list)
    frames: list[Sequence[float]] = field(default_factory=list)  # of images
    pointable: list[np.ndarray] = field(default_factory=list)

    def add(self, part: EncodedPart, patches: np.ndarray, features: np.ndarray) -> None:
        """Add a part; `patches` of its vision tower [n, patches^2, feature_dim], `features` of its connector."""
        assert part.slots is not None
        before = sum(len(added) for added in self.patches)
        self.patches.append(patches.reshape(-1, patches.shape[-1]))
        self.pooling.append(np.where(part.slots < 0, -1, part.slots + before))
        kept = part.positions >= 0
        order = part.positions[kept].argsort()
        self.positions.append(part.positions[kept][order])
        self.features.append(features[kept][order])
        self.grids += [grid + before for grid in part.grids]
        self.frames += part.frames
        self.pointable += [] if part.pointable is None else [part.pointable]

    def inputs(
        self, runtime: PointRuntime, ids: np.ndarray, indexable: int, times: tuple[float, ...] | None = None
    ) -> GroundingInputs:
        """The inputs of the prompt `ids`; `indexable` and `times` as in GroundingInputs."""
        return GroundingInputs(
            head=runtime,
            ids=ids,
            positions=np.concatenate(self.positions),
            indexable=indexable,
            patch_features=np.concatenate(self.patches),
            pooling=np.concatenate(self.pooling),
            features=np.concatenate(self.features),
            grids=tuple(self.grids),
            times=times,
            frames=tuple(self.frames),
            pointable=np.concatenate(self.pointable) if self.pointable else None,
        )
