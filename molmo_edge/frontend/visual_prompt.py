"""The beginning of every prompt: BOS, then one image, several images, or the frames of a video, as the family lays out.

The ids depend only on the sizes of the images and the times of the frames, so that their number is known before an
image is cut into crops. Source: `hf_model/processing_molmo2.py` and the chat template of allenai/molmo2; for one image
also Molmo v1's, see prompts.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from molmo_edge.errors import MolmoEdgeError
from molmo_edge.frontend.chatml import frame_ids
from molmo_edge.frontend.crops import ImageProcessor, select_tiling
from molmo_edge.frontend.tokenizer import Tokenizer
from molmo_edge.frontend.video import POOL

NO_VIDEOS = "this model takes no videos: Molmo v1 was trained with single images; use a Molmo2"


class UnsupportedInputError(MolmoEdgeError):
    """Images or a video that the model's prompt format has no place for."""


@dataclass(frozen=True, eq=False)
class VisualPrompt:
    """The ids of BOS and what the prompt shows."""

    ids: np.ndarray  # int32 [n], BOS first
    # Of each image int32 [n_crops, cells^2] (Molmo v1) or [n_cells]: positions of its features in `ids`, negative where
    # dropped. Of a video one array with the cells of all frames.
    positions: tuple[np.ndarray, ...]
    image: np.ndarray  # bool [n]: tokens of images, which attend to each other in both directions in Molmo2


def one_image_only(count: int) -> str:
    """The message for several images of a Molmo v1."""
    return (
        f"this model takes one image in a prompt, not {count}: Molmo v1 was trained with single images; ask about one "
        "after the other, or use a Molmo2"
    )


def images_prompt(process: ImageProcessor, tokenizer: Tokenizer, sizes: Sequence[tuple[int, int]]) -> VisualPrompt:
    """The prompt of images with these heights and widths, in this order: "Image 1", image, "Image 2", image.

    A single image has no number. Raises UnsupportedInputError for several images of a Molmo v1.
    """
    if len(sizes) > 1 and process.config.layout == "molmo":
        raise UnsupportedInputError(one_image_only(len(sizes)))
    ids: list[int] = [tokenizer.special.bos]
    positions = []
    for number, (height, width) in enumerate(sizes, 1):
        ids += tokenizer.encode(f"Image {number}") if len(sizes) > 1 else []
        tokens, index = process.layout(select_tiling(height, width, process.config))
        positions.append(np.where(index < 0, index, index + len(ids)).astype(np.int32))
        ids += tokens.tolist()
    return _prompt(tokenizer, ids, tuple(positions))


def video_prompt(process: ImageProcessor, tokenizer: Tokenizer, times: Sequence[float]) -> VisualPrompt:
    """The prompt of a video with frames at `times` (seconds). Raises UnsupportedInputError for a Molmo v1."""
    if process.config.layout == "molmo":
        raise UnsupportedInputError(NO_VIDEOS)
    special = tokenizer.special
    cells_per_frame = (-(-process.config.patches // POOL)) ** 2
    ids = [special.bos, *frame_ids(tokenizer, times, cells_per_frame)]
    cells = np.flatnonzero(np.array(ids) == special.im_patch).astype(np.int32)
    return _prompt(tokenizer, ids, (cells,))


def _prompt(tokenizer: Tokenizer, ids: Sequence[int], positions: tuple[np.ndarray, ...]) -> VisualPrompt:
    array = np.array(ids, np.int32)
    return VisualPrompt(array, positions, np.isin(array, tokenizer.special.image_block))
