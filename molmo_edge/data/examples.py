"""What a data set gives a trainer: an image with all its annotations, in words.

How the words become a prompt (roles, style tags, lengths) is a matter of the stage: see prompts.py. What becomes of the
image and the tokens: see encoding.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from molmo_edge.data.regions import Regions


@dataclass(frozen=True)
class Annotation:
    """One conversation about an image; packed, it sees the image and itself alone."""

    style: str  # of the reference's tags: "vqa2", "pointing", "long_caption", ...; prompts.py says what becomes of it
    messages: tuple[str, ...]  # user, assistant, user, ...: plain words, no roles, tags or leading spaces
    weight: float = 1.0  # of every answer's tokens in the loss


@dataclass(frozen=True, eq=False)
class Example:
    """An image, in anything that `load_image` takes (None: a text alone), with annotations, regions, or both."""

    image: Any
    annotations: tuple[Annotation, ...] = ()
    regions: Regions | None = None


class DataSet(Protocol):
    """Examples by number. Safe to copy to another process: a worker of the data loader."""

    @property
    def name(self) -> str:
        """As in a mixture: "pixmo_points"."""
        ...

    def __len__(self) -> int: ...

    def example(self, index: int, rng: np.random.Generator) -> Example:
        """Example `index`; whatever is left to chance, a template or a transcript, is drawn from `rng`.

        The same index and the same state of `rng` give the same example. Raises MolmoEdgeError where the row is
        damaged or its picture gone.
        """
        ...
