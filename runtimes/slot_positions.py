"""Caches whose first positions have gaps: some image tokens were left out, and the others keep their positions.

Keys and values lie in consecutive slots. The position of a slot determines its rotary embedding only, because the
order of positions is that of slots.
"""

from __future__ import annotations

import numpy as np

from molmo_edge.config import MolmoConfig
from molmo_edge.errors import EngineError


def check_positions(positions: np.ndarray | None, config: MolmoConfig) -> np.ndarray | None:
    """Return `positions` as int64 [n]; None: 0, 1, 2, ... Raises EngineError unless they rise within the context."""
    if positions is None:
        return None
    array = np.asarray(positions)
    if array.ndim != 1 or array.dtype.kind not in "iu" or not len(array):
        raise EngineError("the positions of a cache must be a list of integers")
    array = array.astype(np.int64)
    most = config.decoder.max_position_embeddings
    if array[0] < 0 or array[-1] >= most or (np.diff(array) < 1).any():
        raise EngineError(f"the positions of a cache must rise from 0 to at most {most - 1}")
    return array


def slot_positions(positions: np.ndarray | None, start: int, end: int) -> np.ndarray:
    """The positions of the slots from `start` to `end`, int64 [end - start].

    positions: of the first slots, int [n]; the slots after them continue from the last one. None: 0, 1, 2, ...
    """
    slots = np.arange(start, end)
    if positions is None:
        return slots
    n = len(positions)
    continued: np.ndarray = np.asarray(positions[-1] - (n - 1) + slots)
    return np.where(slots < n, positions[np.minimum(slots, n - 1)], continued)
