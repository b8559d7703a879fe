"""From what an app passes as `image` to pixels and a prompt: one image, a list of images, or a Video.

Everything that takes images (`Molmo`, `Chat`, batches, the command line) goes through `read_inputs`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from molmo_edge.errors import MolmoEdgeError
from molmo_edge.frontend.image_files import ImageError, load_image
from molmo_edge.frontend.visual_prompt import (
    NO_VIDEOS,
    UnsupportedInputError,
    VisualPrompt,
    images_prompt,
    one_image_only,
    video_prompt,
)
from molmo_edge.sdk.readable_text import counted
from molmo_edge.sdk.video import SelectedFrames, Video

if TYPE_CHECKING:
    from molmo_edge.config import MolmoConfig
    from molmo_edge.frontend.crops import ImageProcessor
    from molmo_edge.frontend.tokenizer import Tokenizer


class InputError(MolmoEdgeError):
    """An empty or nested list of images, or images together with a video."""


@dataclass(frozen=True, eq=False)
class Inputs:
    """What a prompt shows: images, or the frames of a video that the model sees."""

    images: tuple[np.ndarray, ...] = ()  # uint8 [h, w, 3]
    frames: SelectedFrames | None = None

    def prompt(self, process: ImageProcessor, tokenizer: Tokenizer) -> VisualPrompt:
        """The ids of BOS and the images or frames. Raises UnsupportedInputError where the model has no such prompt."""
        if self.frames is not None:
            return video_prompt(process, tokenizer, self.frames.times)
        return images_prompt(process, tokenizer, [(rgb.shape[0], rgb.shape[1]) for rgb in self.images])

    def too_long(self, visible: int, text: int, context: int) -> str:
        """The message for a prompt that does not fit. `visible`, `text`: positions of the images, and of the text."""
        if self.frames is not None:
            what, advice = f"the {counted(len(self.frames.times), 'frame')} of the video", ["lower max_frames"]
        elif len(self.images) > 1:
            what, advice = f"the {len(self.images)} images", ["pass fewer images", "lower max_crops"]
        else:
            what, advice = "the image", ["lower max_crops"]
        shown = len(self.images) if self.frames is None else len(self.frames.times)
        if text:
            what, advice = f"{what} and the question", [*advice, "shorten the question"]
        needs = "need" if text or shown > 1 else "needs"
        return (
            f"{what} {needs} {visible + text} positions, but the model's context has {context}: {', or '.join(advice)}"
        )


def read_inputs(image: Any, config: MolmoConfig, *, alpha: str = "drop") -> Inputs:
    """Load `image`: what `load_image` takes, a list or tuple of these, or a Video.

    Raises ImageError, VideoError, and InputError for a list that is empty or holds anything else. A video is decoded
    later.
    """
    if isinstance(image, Video):
        if not config.several_images:
            raise UnsupportedInputError(NO_VIDEOS)
        return Inputs(frames=image.select(config.video, alpha=alpha))
    if not isinstance(image, (list, tuple)):
        return Inputs((load_image(image, alpha=alpha),))
    if not image:
        raise InputError("the list of images is empty: pass at least one image")
    videos = sum(isinstance(one, Video) for one in image)
    if videos and len(image) > 1:
        raise InputError("a prompt shows images or one video, not both: Molmo2 was not trained with more")
    if videos:
        return read_inputs(image[0], config, alpha=alpha)
    if len(image) > 1 and not config.several_images:  # before the images are read
        raise UnsupportedInputError(one_image_only(len(image)))
    return Inputs(tuple(_load(one, number, len(image), alpha) for number, one in enumerate(image, 1)))


def _load(image: Any, number: int, total: int, alpha: str) -> np.ndarray:
    if isinstance(image, (list, tuple)):
        raise InputError(f"image {number} of {total} is a {type(image).__name__}: pass one flat list of images")
    try:
        return load_image(image, alpha=alpha)
    except ImageError as error:
        raise ImageError(f"image {number} of {total}: {error}") from error
