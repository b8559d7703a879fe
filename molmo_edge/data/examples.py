"""Training examples: an image with all its annotations as text.

annotation_prompts.py converts annotations to prompts (roles, style tags, lengths), molmo_edge/training/encoding.py
converts examples to tokens and crops.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from molmo_edge.data.regions import Box, Regions


@dataclass(frozen=True)
class Annotation:
    """One conversation about an image. Packed annotations of an image do not attend to each other."""

    style: str  # one of the reference's tags: "vqa2", "pointing", "long_caption", ...
    messages: tuple[str, ...]  # user, assistant, user, ...: plain text without roles, tags or leading spaces
    weight: float = 1.0  # of the answers' tokens in the loss
    boxes: tuple[Box, ...] = ()  # of the objects that the points of the last answer are for, in the points' order


@dataclass(frozen=True, eq=False)
class Example:
    """An image (anything that `load_image` accepts; None: text only) with annotations, regions, or both."""

    image: Any
    annotations: tuple[Annotation, ...] = ()
    regions: Regions | None = None


class DataSet(Protocol):
    """Examples by index. Instances are pickled for the worker processes of the data loader."""

    @property
    def name(self) -> str:
        """The name used in mixtures, such as "pixmo_points"."""
        ...

    def __len__(self) -> int: ...

    def example(self, index: int, rng: np.random.Generator) -> Example:
        """Example `index`. Random choices, such as of a template, use only `rng`.

        Raises MolmoEdgeError if the row is damaged or its picture is missing.
        """
        ...
