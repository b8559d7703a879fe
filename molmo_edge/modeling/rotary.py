"""The frequencies of rotary position embeddings, for every engine."""

from __future__ import annotations

import math

import numpy as np

from molmo_edge.config import DecoderConfig


def rotary_frequencies(config: DecoderConfig, *, stretched: bool) -> np.ndarray:
    """Angle in radians per position for each pair of dimensions, float32 [head_dim / 2].

    Reference: transformers, _compute_yarn_parameters.
    """
    dim, theta = config.head_dim, config.rope_theta
    half = np.arange(0, dim, 2, dtype=np.float32)
    plain: np.ndarray = np.float32(theta) ** (-half / np.float32(dim))
    if not stretched or config.yarn is None:
        return plain
    yarn = config.yarn

    def dimension(turns: float) -> float:
        """The (fractional) index of the pair of dimensions that makes `turns` turns in the original context."""
        return dim * math.log(yarn.original_positions / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(dimension(yarn.beta_fast)), 0)
    high = min(math.ceil(dimension(yarn.beta_slow)), dim - 1)
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - low) / max(high - low, 0.001), 0, 1)
    scaled: np.ndarray = (plain * (1 - ramp) + plain / yarn.factor * ramp).astype(np.float32)
    return scaled
