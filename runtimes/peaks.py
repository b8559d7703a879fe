"""Lists of points that are chosen at once: the local maxima of the scores of all subpatches.

A grounding head with votes decides at the first point of a list where all of its points are. MolmoPoint chooses one
patch after the other instead. Source of the votes' scores: the classes of a convolutional detector, which are linear in
its pyramid; of the local maxima: CenterNet (arXiv 1904.07850).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_CLOSED = np.float32(-1e8)


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
        closed = np.isnan(self.places[..., 0]) | (own <= _CLOSED / 2)[:, None]
        return np.asarray(np.where(closed, _CLOSED, found), np.float32)


def local_maxima(scores: np.ndarray, places: np.ndarray, distance: float, drop: float = 0.0) -> np.ndarray:
    """The subpatches that are chosen, int [k, 2]: patch and slot, ascending.

    Their scores are above 0, above those of all others within `distance` along both axes of the same image, and at most
    `drop` below the best (0: any). Of equal scores, that of the first subpatch counts as above the others.

    `scores`: float32 [n_patches, n_slots]; `places`: float32 [n_patches, n_slots, 3].
    """
    above = np.argwhere(scores > 0)
    own, radius = scores[tuple(above.T)], int(distance)
    image, row, column = places[tuple(above.T)].astype(np.int64).T
    ranks = np.empty(len(own), np.int64)
    ranks[np.argsort(-own, kind="stable")] = np.arange(len(own))  # 0: the best
    chosen = own >= own.max(initial=0) - drop if drop else np.ones(len(own), bool)
    for number in np.unique(image):
        here = image == number
        y, x = row[here], column[here]
        grid = np.full((y.max() + 1 + 2 * radius, x.max() + 1 + 2 * radius), len(own))
        np.minimum.at(grid, (y + radius, x + radius), ranks[here])
        windows = np.lib.stride_tricks.sliding_window_view(grid, (2 * radius + 1, 2 * radius + 1))[y, x]
        chosen[here] &= windows.min((1, 2)) == ranks[here]
    return np.asarray(above[chosen])
