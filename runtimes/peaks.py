"""Lists of points that are chosen at once: the local maxima of the scores of all subpatches.

A grounding head with votes decides at the first point of a list where all of its points are. MolmoPoint chooses one
patch after the other instead. Source of the votes' scores: the classes of a convolutional detector, which are linear in
its pyramid; of the local maxima: CenterNet (arXiv 1904.07850).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from molmo_edge.system.lazy import cached_property

CLOSED = np.float32(-1e8)  # a patch that cannot be chosen, as in the reference


@dataclass(frozen=True, eq=False)
class Votes:
    """The subpatches of a prompt's images, for all questions about them."""

    keys: np.ndarray  # float32 [n_patches, n_slots, votes, vote_dim]
    places: np.ndarray  # float32 [n_patches, n_slots, 3] of `grounding_tokens.slot_places`

    def scores(self, queries: np.ndarray, own: np.ndarray) -> np.ndarray:
        """The scores of all subpatches, float32 [n_patches, n_slots]: above 0 there is an object.

        `queries`: float32 [votes * vote_dim + 1], the last value is an offset of `own`, float32 [n_patches]: the scores
        of the patches themselves, less that of "no more points". The score is the logarithm of the summed exponentials
        of votes and own score: one of them is enough. A convolutional tower sees an object at one level of its pyramid,
        and a decoder knows names that the tower does not.
        """
        query = queries[:-1].reshape(self.keys.shape[2:])
        votes = np.logaddexp.reduce(np.einsum("psvd,vd->psv", self.keys, query, optimize=True), axis=-1)
        found = np.logaddexp(votes, (own + queries[-1])[:, None])
        closed = np.isnan(self.places[..., 0]) | (own <= CLOSED / 2)[:, None]
        return np.asarray(np.where(closed, CLOSED, found), np.float32)


@dataclass(frozen=True, eq=False)
class Plan:
    """The points of a list, all of which are chosen at the first one."""

    scores: np.ndarray  # float32 [n_patches, n_slots] of `Votes.scores`
    places: np.ndarray  # float32 [n_patches, n_slots, 3]
    distance: float
    drop: float

    @cached_property
    def peaks(self) -> np.ndarray:
        """Patch and slot of each point, int [k, 2], ascending."""
        return local_maxima(self.scores, self.places, self.distance, self.drop)

    def left(self, earlier: Sequence[int]) -> np.ndarray:
        """The patches that follow the ones in `earlier`, in order: int [.]. A patch with several points repeats."""
        patches, last = self.peaks[:, 0], earlier[-1] if earlier else -1
        again = patches[patches == last][earlier.count(last) :]
        return np.concatenate([again, patches[patches > last]])

    def slot(self, earlier: Sequence[int]) -> int | None:
        """The slot of the last patch of `earlier`, if that patch has several points and they are not used up."""
        slots = self.peaks[self.peaks[:, 0] == earlier[-1], 1]
        number = earlier.count(earlier[-1]) - 1
        return int(slots[number]) if 1 < len(slots) > number else None

    @cached_property
    def margins(self) -> np.ndarray:
        """How much lower the best score of each patch may be until it is not chosen; negative: how much is missing.

        float32 [n_patches]; the scores of all other patches stay as they are.
        """
        n, slots = self.scores.shape
        at = self.scores.argmax(1)
        best, place = self.scores[np.arange(n), at], self.places[np.arange(n), at]
        apart = np.abs(place[:, None] - self.places.reshape(-1, 3))  # [n, n * slots, 3]
        near = (apart[..., 0] == 0) & (apart[..., 1:] <= self.distance).all(-1)
        near &= np.arange(n)[:, None] != np.arange(n * slots) // slots
        least = np.where(near, self.scores.reshape(-1), CLOSED).max(1, initial=CLOSED)
        if self.drop:
            image = np.nan_to_num(place[:, 0], nan=-1)
            others = (image[:, None] == image) & ~np.eye(n, dtype=bool)
            top = np.where(others, best, CLOSED).max(1, initial=CLOSED)
            least = np.maximum(least, top - np.float32(self.drop))
        return np.asarray(best - np.maximum(least, 0), np.float32)

    def gaps(self, earlier: Sequence[int]) -> np.ndarray:
        """How much scores would have to differ for each patch, and last for none, to be the next: float32 [n + 1]."""
        left, margins = self.left(earlier), self.margins
        missing = np.append(np.maximum(-margins, 0), np.float32(0))
        missing[left] = 0
        # Those that come first would have to be left out.
        surplus = np.zeros(len(missing), np.float32)
        surplus[left + 1] = np.maximum(margins[left], 0)
        gaps = np.maximum(missing, np.maximum.accumulate(surplus))
        gaps[:-1][~self._is_open(earlier, left)] = -CLOSED
        gaps[left[:1] if len(left) else -1] = 0
        return np.asarray(gaps)

    def _is_open(self, earlier: Sequence[int], left: np.ndarray) -> np.ndarray:
        """Which patches can be next, bool [n]: those after the last one, and it as well if it has another point."""
        patches = np.arange(len(self.scores))
        again = left[0] if len(left) else len(patches)
        return np.asarray((patches > (earlier[-1] if earlier else -1)) | (patches == again))

    def log_probabilities(self, earlier: Sequence[int]) -> np.ndarray:
        """Of each patch, and last of none, to be the next, float32 [n + 1].

        Each open patch is accepted with the probability sigmoid(margin), in ascending order: above one half for those
        that are chosen.
        """
        left = self.left(earlier)
        is_open = self._is_open(earlier, left)
        accepted = np.where(is_open, -np.logaddexp(0, -self.margins), CLOSED)
        refused = np.cumsum(np.where(is_open, -np.logaddexp(0, self.margins), 0), dtype=np.float64)
        before = np.concatenate([[0], refused])
        return np.append(accepted + before[:-1], before[-1]).astype(np.float32)


def local_maxima(scores: np.ndarray, places: np.ndarray, distance: float, drop: float = 0.0) -> np.ndarray:
    """The subpatches that are chosen, int [k, 2]: patch and slot, ascending.

    Their scores are above 0, above those of all others of the same image within `distance` along both axes, and at most
    `drop` below the best of the image (0: any). Of equal scores, that of the first subpatch counts as above the others.

    `scores`: float32 [n_patches, n_slots]; `places`: float32 [n_patches, n_slots, 3].
    """
    above = np.argwhere(scores > 0)
    own, radius = scores[tuple(above.T)], int(distance)
    image, row, column = places[tuple(above.T)].astype(np.int64).T
    ranks = np.empty(len(own), np.int64)
    ranks[np.argsort(-own, kind="stable")] = np.arange(len(own))  # 0: the best
    chosen = np.zeros(len(own), bool)
    for number in np.unique(image):
        here = image == number
        y, x = row[here], column[here]
        grid = np.full((y.max() + 1 + 2 * radius, x.max() + 1 + 2 * radius), len(own))
        np.minimum.at(grid, (y + radius, x + radius), ranks[here])
        windows = np.lib.stride_tricks.sliding_window_view(grid, (2 * radius + 1, 2 * radius + 1))[y, x]
        least = own[here].max() - drop if drop else 0
        chosen[here] = (windows.min((1, 2)) == ranks[here]) & (own[here] >= least)
    return np.asarray(above[chosen])
