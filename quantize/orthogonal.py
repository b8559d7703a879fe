"""Orthogonal matrices that spread outliers over all channels: randomized Hadamard matrices of any size.

A vector with one large channel becomes one whose channels are about equal, so a scale that many channels share rounds
them better (QuIP#, arXiv 2402.04396; QuaRot, arXiv 2404.00456).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_LARGEST = 64  # order of a factor: a product with several small factors is many times faster than with one large one
_ROWS = 1024  # that are rotated at once, in float64


@dataclass(frozen=True)
class Rotation:
    """An orthogonal matrix Q [n, n] as a product of signs, a Kronecker product and, if any, a reflection.

    With `mirror`, Q leaves the vector of ones as it is: Q @ 1 = 1. A LayerNorm without gain and bias subtracts the mean
    over the channels, so it commutes with such a rotation.
    """

    signs: np.ndarray  # float64 [n]
    factors: tuple[np.ndarray, ...]  # orthogonal float64 matrices, whose orders multiply to n
    mirror: np.ndarray | None = None  # float64 [n], unit vector

    def apply(self, x: np.ndarray) -> np.ndarray:
        """x [..., n] -> x @ Q, float32 of the same shape, computed in float64."""
        rows = x.reshape(-1, len(self.signs))
        out = np.empty(rows.shape, np.float32)
        for start in range(0, len(rows), _ROWS):
            out[start : start + _ROWS] = _product(self, rows[start : start + _ROWS])
        return out.reshape(x.shape)

    def apply_heads(self, x: np.ndarray) -> np.ndarray:
        """x [..., heads * n] -> each head of n channels times Q, float32 of the same shape."""
        return self.apply(x.reshape(-1, len(self.signs))).reshape(x.shape)


def random_rotation(n: int, rng: np.random.Generator, *, keep_mean: bool = False) -> Rotation:
    """A Hadamard matrix of the largest power of two in n, times a random orthogonal matrix of the odd rest.

    `keep_mean`: Q leaves the vector of ones as it is.
    """
    signs = rng.choice((-1.0, 1.0), n)
    power = n & -n
    factors = [_random_orthogonal(n // power, rng)] if n > power else []
    while power > 1:
        order = min(power, _LARGEST)
        factors.append(_hadamard(order))
        power //= order
    rotation = Rotation(signs, tuple(factors))
    if not keep_mean:
        return rotation
    ones = np.full((1, n), n**-0.5)
    difference = _product(rotation, ones)[0] - ones[0]
    length = np.linalg.norm(difference)
    return rotation if length < 1e-12 else Rotation(signs, tuple(factors), difference / length)


def _product(rotation: Rotation, rows: np.ndarray) -> np.ndarray:
    """rows [m, n] -> rows @ Q, float64."""
    y: np.ndarray = rows * rotation.signs
    after = len(rotation.signs)  # channels that the factors not yet applied span
    for factor in rotation.factors:
        after //= len(factor)
        y = np.matmul(factor.T, y.reshape(-1, len(factor), after))
    y = y.reshape(rows.shape)
    if rotation.mirror is not None:
        y -= 2 * (y @ rotation.mirror)[:, None] * rotation.mirror
    return y


def _hadamard(order: int) -> np.ndarray:
    """Sylvester's Hadamard matrix of a power of two, scaled to be orthogonal."""
    matrix = np.ones((1, 1))
    while len(matrix) < order:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return np.asarray(matrix / np.sqrt(order))


def _random_orthogonal(n: int, rng: np.random.Generator) -> np.ndarray:
    q, r = np.linalg.qr(rng.standard_normal((n, n)))
    q *= np.sign(np.diagonal(r))  # uniformly distributed
    return q
