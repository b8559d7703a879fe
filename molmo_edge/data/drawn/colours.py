"""Colours that drawings share: named ones, random ones, and ones that contrast."""

from __future__ import annotations

import numpy as np

Colour = tuple[int, int, int]

# Ten colours that a person distinguishes and names easily.
COLOURS: dict[str, Colour] = {
    "red": (211, 47, 47), "orange": (245, 133, 24), "yellow": (250, 208, 44), "green": (56, 142, 60),
    "teal": (0, 150, 145), "blue": (33, 102, 200), "purple": (123, 50, 165), "pink": (240, 110, 170),
    "brown": (121, 78, 46), "gray": (128, 128, 128),
}  # fmt: skip
BLACK: Colour = (0, 0, 0)
WHITE: Colour = (255, 255, 255)


def luminance(colour: Colour) -> float:
    """0 to 255."""
    return 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]


def ink_on(colour: Colour) -> Colour:
    """Black or white, whichever is easier to read on `colour`."""
    return BLACK if luminance(colour) > 140 else WHITE


def contrasting(colour: Colour, rng: np.random.Generator) -> Colour:
    """A colour whose luminance differs from that of `colour` by at least 110; often black or white."""
    plain = BLACK if luminance(colour) > 127 else WHITE
    if rng.random() < 0.6:
        return plain
    for _ in range(20):
        red, green, blue = (int(c) for c in rng.integers(0, 256, 3))
        if abs(luminance((red, green, blue)) - luminance(colour)) >= 110:
            return red, green, blue
    return plain


def random_colour(rng: np.random.Generator) -> Colour:
    """Half of the time a pale or dark grey, as walls, paper and tables are; otherwise any colour."""
    if rng.random() < 0.5:
        grey = rng.choice([rng.uniform(200, 255), rng.uniform(20, 90), rng.uniform(90, 200)], p=[0.6, 0.2, 0.2])
        rgb = np.clip(grey + rng.uniform(-18, 18, 3), 0, 255)
    else:
        rgb = rng.uniform(0, 255, 3)
    return int(rgb[0]), int(rgb[1]), int(rgb[2])
