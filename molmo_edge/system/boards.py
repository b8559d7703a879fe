"""Boards that models are planned for, and the memory that a program can use on them."""

from __future__ import annotations

import re

GB = 1_000_000_000
# What the system, a desktop and the GPU's reserved memory leave of the nominal size. The Orin Nano's value is what its
# users report; the others assume that the system takes 1.5 GB.
USABLE = {
    "orin-nano": 5_200_000_000,
    "orin-nx": 14_500_000_000,
    "orin-nx-8gb": 6_500_000_000,
    "agx-orin": 62_500_000_000,
    "agx-orin-32gb": 30_500_000_000,
    "agx-thor": 126_500_000_000,
    "rpi5": 6_500_000_000,
    "rpi5-4gb": 2_500_000_000,
    "rpi5-16gb": 14_500_000_000,
}
_UNITS = {"": 1, "b": 1, "mb": 10**6, "m": 10**6, "gb": 10**9, "g": 10**9, "mib": 2**20, "gib": 2**30}


def parse_bytes(text: str) -> int:
    """ "8GB", "7.5 GiB", "800 MB" or a number of bytes. Raises ValueError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if match is None or match[2].lower() not in _UNITS:
        raise ValueError(f'"{text}" is not a size such as 8GB, 7.5GiB or 800MB')
    return int(float(match[1]) * _UNITS[match[2].lower()])
