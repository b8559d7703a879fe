"""Which of an image's tokens the decoder sees: a share of them, chosen before the decoder runs, without training.

Scores read the connector's output, which every engine returns. Pruned tokens leave gaps: the others keep their
positions, because pointing depends on them (arXiv 2506.21873, 2602.03060). The tokens that begin, end and break rows
of a view are always kept: they are few, and without them the rest would have no layout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING

import numpy as np

from molmo_edge.config import ConfigError
from molmo_edge.frontend.crops import kept_cells

if TYPE_CHECKING:
    from molmo_edge.frontend.tokenizer import SpecialIds

DEFAULT_SCORE = "distinct"


@dataclass(frozen=True)
class ImageTokens:
    """How many image tokens are kept, and which. Raises ConfigError for an invalid share or score."""

    share: float  # of the tokens of each view of an image, and of each frame of a video; 0 to 1
    score: str = DEFAULT_SCORE  # one of SCORES
    original_positions: bool = True  # False, for measurements: count the kept tokens anew, without gaps

    def __post_init__(self) -> None:
        if isinstance(self.share, bool) or not isinstance(self.share, Real) or not 0 < self.share <= 1:
            raise ConfigError(
                f"image_tokens must be a share of the image's tokens, greater than 0 and at most 1, not {self.share!r}"
            )
        if self.score not in SCORES:
            raise ConfigError(f'"{self.score}" is not a score of image tokens (known: {", ".join(SCORES)})')


def image_tokens(given: float | ImageTokens | None) -> ImageTokens | None:
    """The option of `Molmo`; None: keep all tokens, as for None and 1. Raises ConfigError."""
    if given is None or isinstance(given, ImageTokens):
        return given
    choice = ImageTokens(given)
    return None if choice.share == 1 else choice


def kept_tokens(
    ids: np.ndarray, special: SpecialIds, cells: np.ndarray, features: np.ndarray, choice: ImageTokens
) -> np.ndarray:
    """Which tokens of a prompt stay, bool [n].

    ids: int [n], of BOS and what the prompt shows. cells: int [m], the positions of the image features in `ids`.
    features: float32 [m, d_model], the connector's output. Each view of an image (the global one, and all crops
    together) and each frame of a video keeps `choice.share` of its cells, at least one.
    """
    ends = [token for token in (special.im_end, special.frame_end) if token is not None]
    view = np.cumsum(np.isin(ids, ends))[cells]
    kept = np.ones(len(ids), bool)
    for number in np.unique(view):
        members = np.flatnonzero(view == number)
        members = members[np.argsort(cells[members], kind="stable")]
        count = kept_cells(len(members), choice.share)
        order = SCORES[choice.score](features[members], count)
        kept[cells[members]] = False
        kept[cells[members[order]]] = True
    return kept


def _largest(values: np.ndarray, count: int) -> np.ndarray:
    return np.argsort(-values, kind="stable")[:count]


def _norm(features: np.ndarray, count: int) -> np.ndarray:
    return _largest(np.linalg.norm(features, axis=1), count)


def _distinct(features: np.ndarray, count: int) -> np.ndarray:
    unit = _unit(features)
    return _largest(-(unit @ _unit(unit.mean(0, keepdims=True))[0]), count)


def _spread(features: np.ndarray, count: int) -> np.ndarray:
    """Each next one is the farthest from those chosen so far, as in DivPrune (arXiv 2503.02175)."""
    unit = _unit(features)
    chosen = [int(_distinct(features, 1)[0])]
    nearest = unit @ unit[chosen[0]]  # similarity to the most similar chosen one
    while len(chosen) < count:
        nearest[chosen[-1]] = np.inf
        chosen.append(int(nearest.argmin()))
        nearest = np.maximum(nearest, unit @ unit[chosen[-1]])
    return np.array(chosen)


def _even(features: np.ndarray, count: int) -> np.ndarray:
    places: np.ndarray = (np.arange(count) + 0.5) * len(features) / count
    return places.astype(np.int64)


def _random(features: np.ndarray, count: int) -> np.ndarray:
    return np.random.default_rng(len(features)).permutation(len(features))[:count]


def _unit(rows: np.ndarray) -> np.ndarray:
    normed: np.ndarray = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    return normed


# From the features of a view's cells in their order, float32 [m, d_model], to the indices of those that stay.
SCORES: dict[str, Callable[[np.ndarray, int], np.ndarray | Sequence[int]]] = {
    "norm": _norm,  # the largest features
    "distinct": _distinct,  # least similar to the view's mean
    "spread": _spread,  # least similar to each other
    "even": _even,  # at even distances, whatever they show
    "random": _random,  # for comparison; the same in every run
}
