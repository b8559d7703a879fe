"""Any image an app may have -> uint8 RGB, or a sentence saying why not.

Follows the reference's `load_image` (olmo/data/model_preprocessor.py): EXIF orientation applied, then Pillow's
`convert("RGB")`, so transparency is dropped, not blended. Three deliberate differences: 16-bit grey is scaled
to 8 bits where `convert` would clip it to white, a truncated file is refused where the reference fills the rest
with grey, and Pillow's global settings are left alone.
"""

from __future__ import annotations

import os
import re
import struct
from typing import IO, Any, cast

import numpy as np
from PIL import Image

from molmo_edge.errors import MolmoEdgeError

ImageLike = Any  # path, bytes, file object, PIL.Image.Image or numpy array; written out in `load_image`

MAX_PIXELS = 120_000_000  # a larger file is refused before it is decoded: 120 MP are 360 MB of RGB

_ORIENTATION = 0x0112  # the EXIF tag
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(MolmoEdgeError):
    """An image that cannot be read, or an array that is not an image."""


def load_image(image: ImageLike) -> np.ndarray:
    """Load `image` as uint8 RGB [h, w, 3], EXIF orientation applied.

    `image` is one of:
    - a path (str or PathLike), the bytes of a file, or a file object opened in binary mode (read from its start,
      left open); of an animation the first frame is taken;
    - a PIL.Image.Image, at the frame it stands at. Modes "I;16" and "I" count as 16 bits deep, "F" as 0..1;
    - a numpy array [h, w] or [h, w, 1] (grey), [h, w, 3] (RGB) or [h, w, 4] (RGBA; the alpha is dropped), of
      uint8, uint16 (0..65535), bool, or floats within 0..1.

    Raises ImageError. A JPEG that is cut short raises too, unless the app itself has told Pillow to accept
    such files (`ImageFile.LOAD_TRUNCATED_IMAGES`).
    """
    if isinstance(image, np.ndarray):
        return _from_array(image)
    if isinstance(image, Image.Image):
        return _from_pillow(image, "the image")
    if isinstance(image, (bytes, bytearray, memoryview)):
        import io

        return _from_file(io.BytesIO(image), "the image")
    if isinstance(image, (str, os.PathLike)):
        return _from_path(image)
    if hasattr(image, "read"):
        return _from_stream(image)
    raise ImageError(
        f"an image is a path, bytes, a file object, a PIL image or a numpy array, not {type(image).__name__}"
    )


def _from_path(path: str | os.PathLike[str]) -> np.ndarray:
    name = _shorten(os.fspath(path))
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://|data:", name):
        raise ImageError(f"{name} is a URL, and URLs are not fetched: download the image and pass its path or bytes")
    try:
        file = open(path, "rb")  # noqa: SIM115 - closed below; failing to open is not failing to read
    except FileNotFoundError:
        raise ImageError(f"there is no image {name}: check the path") from None
    except IsADirectoryError:
        raise ImageError(f"{name} is a directory, not an image: name one file") from None
    except (OSError, ValueError) as error:  # no permission, a name too long, a NUL in it
        reason = getattr(error, "strerror", None) or error  # without the name, which may be very long
        raise ImageError(f"the image {name} cannot be opened: {reason}") from error
    with file:
        return _from_file(file, name)


def _from_stream(stream: Any) -> np.ndarray:
    if not isinstance(stream.read(0), bytes):
        raise ImageError("the file object yields text; open the image in binary mode, open(path, 'rb')")
    return _from_file(stream, "the image")


def _from_file(file: IO[bytes], name: str) -> np.ndarray:
    try:
        image = Image.open(file)
    except Image.UnidentifiedImageError:
        if file.seekable() and file.seek(0, os.SEEK_END) == 0:
            raise ImageError(f"{name} is empty (0 bytes): copy or download it again") from None
        raise ImageError(f"{name} is not an image of a kind that Pillow can read: convert it to PNG or JPEG") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        # Pillow's own limit, which is the app's to set; a warning arrives here where the app makes them errors.
        raise ImageError(f"{name} is too large to be decoded, scale it down to {MAX_PIXELS} pixels: {error}") from error
    except Exception as error:  # hostile headers make Pillow's parsers raise nearly anything
        raise ImageError(f"{name} cannot be read: {_reason(error)}") from error
    with image:
        return _from_pillow(image, name)


def _from_pillow(image: Image.Image, name: str) -> np.ndarray:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageError(
            f"{name} is too large: {width} x {height} is {width * height} pixels, the most are {MAX_PIXELS}; "
            "scale it down"
        )
    if not width * height:
        raise ImageError(f"{name} is empty: {width} x {height} pixels")
    try:
        image.load()
    except Exception as error:  # as above: decoders raise OSError, SyntaxError, struct.error, ...
        raise ImageError(f"{name} is damaged or cut short, copy or download it again: {_reason(error)}") from error
    turn = _TRANSPOSE.get(_orientation(image))
    if image.mode.startswith("I") or image.mode == "F":
        deep = np.asarray(image if turn is None else image.transpose(turn))
        return _from_array(_as_uint16(deep, name) if image.mode.startswith("I") else deep)
    try:
        # By way of RGBA the palette's colours are those of convert("RGB"), without Pillow's warning about
        # transparent palettes; and premultiplied modes have no other way.
        via = {"P": "RGBA", "PA": "RGBA", "RGBa": "RGBA", "La": "LA"}.get(image.mode)
        rgb = (image.convert(via) if via else image).convert("RGB")
    except ValueError as error:
        raise ImageError(f"{name} has colours of mode {image.mode}, which Pillow cannot turn into RGB") from error
    return np.array(rgb if turn is None else rgb.transpose(turn))


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1..8. Damaged EXIF says nothing about the pixels: it counts as upright."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except (SyntaxError, ValueError, TypeError, KeyError, IndexError, OverflowError, OSError, struct.error):
        return 1


def _as_uint16(values: np.ndarray, name: str) -> np.ndarray:
    """Pillow's integer modes, [h, w]; files with 16-bit grey come as "I" or "I;16", whatever the byte order."""
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise ImageError(f"{name} has grey values from {low} to {high}; 16-bit images reach from 0 to 65535")
    return values.astype(np.uint16)


def _from_array(array: np.ndarray) -> np.ndarray:
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4):
        shape = " x ".join(map(str, array.shape)) or "a scalar"
        raise ImageError(f"an image array is [h, w], [h, w, 3] or [h, w, 4], not {shape}")
    if not array.size:
        raise ImageError(f"the image array is empty: {array.shape[1]} x {array.shape[0]} pixels")
    rgb = _as_uint8(array[:, :, :3])  # [h, w, 1 or 3]
    if rgb.shape[2] == 1:
        rgb = np.repeat(rgb, 3, axis=2)
    return np.array(rgb, order="C")  # a copy: what the app does to its array later is none of our business


def _as_uint8(array: np.ndarray) -> np.ndarray:
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * np.uint8(255)
    if array.dtype == np.uint16:
        return ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)  # 65535 = 255 * 257, rounded to nearest
    if array.dtype.kind == "f":
        if not np.isfinite(array).all():
            raise ImageError("the image array holds NaN or infinite values: replace them first")
        low, high = float(array.min()), float(array.max())
        if low < -1e-3 or high > 1 + 1e-3:  # a resize may overshoot by a rounding error, not by more
            raise ImageError(
                f"float images must lie within 0 to 1, this array reaches from {low:g} to {high:g}; "
                "divide by its full scale, or pass uint8"
            )
        return cast(np.ndarray, np.rint(np.clip(array, 0, 1) * 255)).astype(np.uint8)
    raise ImageError(
        f"an image array is uint8, uint16, bool or float, not {array.dtype}; convert it with .astype(np.uint8)"
    )


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__


def _shorten(name: str | bytes) -> str:
    """A path as it can stand in a sentence; apps pass base64 by mistake, and that is long."""
    text = os.fsdecode(name)
    return text if len(text) <= 200 else f"{text[:120]}... ({len(text)} characters)"
