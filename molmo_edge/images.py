"""Public import path for loading images and cutting them into overlapping crops."""

from molmo_edge.config import ImageConfig
from molmo_edge.frontend.crops import (
    DROPPED,
    ImageProcessor,
    Overview,
    PreparedImage,
    image_token_count,
    patch_grid,
    select_tiling,
)
from molmo_edge.frontend.image_files import MAX_PIXELS, ImageError, load_image

__all__ = [
    "DROPPED",
    "MAX_PIXELS",
    "ImageConfig",
    "ImageError",
    "ImageProcessor",
    "Overview",
    "PreparedImage",
    "image_token_count",
    "load_image",
    "patch_grid",
    "select_tiling",
]
