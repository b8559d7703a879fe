"""Load any image as uint8 RGB, or raise an error that says why it cannot be loaded.

Follows the reference's `load_image` (olmo/data/model_preprocessor.py): EXIF orientation is applied, then Pillow's
`convert("RGB")`, which drops transparency without blending; transformers 5.24 blends it with white (`alpha`). Three
deliberate differences: 16-bit grey is scaled to 8 bits, where `convert` would clip it to white; a damaged or truncated
file is refused, where the reference fills the rest with grey; and Pillow's global settings are not changed.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from molmo_edge.config import ALPHA
from molmo_edge.errors import MolmoEdgeError, first_line
from molmo_edge.frontend.unsupported_inputs import HEAD, describe_contents, describe_name
from molmo_edge.system.forks import hold_at_fork

ImageLike = Any  # path, bytes, file object, PIL.Image.Image or numpy array; see `load_image`

MAX_PIXELS = 120_000_000  # larger images are refused before decoding: 120 MP are 360 MB of RGB
_MOST_BYTES = 1_000_000_000  # limit for a stream without seek; more than MAX_PIXELS of 16-bit RGBA
_QUIET = threading.RLock()  # all threads share Python's warning filters
hold_at_fork(_QUIET)
_ALL_BELOW_256 = (
    "all values are below 256 of 65535, which is black: if these are 8-bit values, save or pass them as 8 bits; "
    "otherwise scale them to 0..65535"
)

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


def load_image(image: ImageLike, *, alpha: str = "drop") -> np.ndarray:
    """Load `image` as uint8 RGB [h, w, 3], EXIF orientation applied.

    `image` is one of:
    - a path (str or PathLike), the bytes of a file, or a file object in binary mode (read from its start and left
      open); an animation gives its first frame;
    - a PIL.Image.Image; an animation gives its current frame. Modes "I;16" and "I" have 16 bits, "F" has values 0..1;
    - a numpy array [h, w] or [h, w, 1] (grey), [h, w, 3] (RGB) or [h, w, 4] (RGBA), of uint8, uint16 (0..65535),
      bool, or floats in 0..1.

    `alpha`: "drop" shows the colours that a transparent pixel hides, as in the reference's training; "white" blends
    them with white, as a viewer does.

    Raises ImageError. It refuses 16-bit images with all values below 256 and float images with all values below 1/255,
    which would be black: they contain 8-bit values. URLs are not fetched, and base64 text is not decoded. A truncated
    file is refused unless the app has set Pillow's `ImageFile.LOAD_TRUNCATED_IMAGES`. Pillow's warnings about a file
    are suppressed.
    """
    check_alpha(alpha)
    white = alpha == "white"
    if isinstance(image, np.ndarray):
        return _from_array(image, "the image array", white=white)
    if isinstance(image, Image.Image):
        return _from_pillow(image, "the image", white=white)
    if isinstance(image, (bytes, bytearray, memoryview)):
        return _from_bytes(image, white)
    if isinstance(image, (str, os.PathLike)):
        return _from_path(image, white)
    if hasattr(image, "read"):
        return _from_stream(image, white)
    raise ImageError(
        f"an image must be a path, bytes, a file object, a PIL image or a numpy array, not {type(image).__name__}"
    )


def check_alpha(alpha: str) -> None:
    """Raise ImageError for an unknown treatment of transparency."""
    if alpha not in ALPHA:
        raise ImageError(f"alpha must be one of {', '.join(ALPHA)}, not {alpha!r}")


def _from_path(path: str | os.PathLike[str], white: bool) -> np.ndarray:
    text = os.fsdecode(path)
    # Path() removes one slash of "https://".
    name = _shorten(re.sub(r"^([A-Za-z][A-Za-z0-9+.-]+):/(?=[^/])", r"\1://", text))
    try:
        file = open(path, "rb")  # noqa: SIM115 (closed below; errors of open are handled apart from those of read)
    except IsADirectoryError:
        raise ImageError(f"{name} is a directory, not an image: pass a file") from None
    except (OSError, ValueError) as error:  # missing, no permission, too long, contains NUL
        if instead := describe_name(text):
            raise ImageError(f"{name} {instead}") from None
        if isinstance(error, FileNotFoundError):
            raise ImageError(f"there is no image {name}: check the path") from None
        reason = getattr(error, "strerror", None) or error  # without the file name, which may be very long
        raise ImageError(f"the image {name} cannot be opened: {reason}") from error
    with file:
        return _from_file(file, name, white)


def _from_stream(stream: Any, white: bool) -> np.ndarray:
    try:
        empty = stream.read(0)
    except Exception as error:  # the object may be anything with a `read` method
        if getattr(stream, "closed", False):
            raise ImageError("the file object is closed: open the image again, or pass its path") from None
        raise ImageError(
            f"the file object cannot be read ({first_line(error)}): open the image in binary mode, open(path, 'rb')"
        ) from error
    if not isinstance(empty, bytes):
        kind = "text" if isinstance(empty, str) else type(empty).__name__
        raise ImageError(f"the file object yields {kind}; open the image in binary mode, open(path, 'rb')")
    return _from_file(stream, "the image", white)


def _from_bytes(data: bytes | bytearray | memoryview, white: bool) -> np.ndarray:
    try:
        return _from_file(io.BytesIO(data), "the image", white)
    except (ValueError, BufferError) as error:  # a memoryview that was released or is not contiguous
        raise ImageError(f"the bytes of the image cannot be read: {first_line(error)}") from error


def _from_file(file: Any, name: str, white: bool) -> np.ndarray:
    """Load an image from a binary file object."""
    file = _whole(file, name)
    try:
        with quiet_pillow():
            image = Image.open(file)
    except UnidentifiedImageError:
        raise ImageError(f"{name} {_what_instead(file)}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        # Pillow's own limit, which the app can set; a warning is raised if the app turned warnings into errors.
        raise ImageError(f"{name} is too large to be decoded, scale it down to {MAX_PIXELS} pixels: {error}") from error
    except Exception as error:  # Pillow's parsers raise nearly any exception for a hostile header
        raise ImageError(f"{name} cannot be read: {first_line(error)}") from error
    with image:
        if image.format == "PNG" and not ImageFile.LOAD_TRUNCATED_IMAGES:
            _check_png(file, name)
        if image.format == "PCX" and image.mode == "L":
            _check_pcx(file, name)
        return _from_pillow(image, name, white=white)


def _whole(file: Any, name: str) -> Any:
    """`file` itself if it can seek, else its contents, as of a pipe or an HTTP response."""
    try:
        file.seek(0)
        return file
    except Exception:  # no `seek`, or one that raises
        pass
    try:
        data = file.read(_MOST_BYTES + 1)
    except Exception as error:
        raise ImageError(f"{name} cannot be read: {first_line(error)}") from error
    if len(data) > _MOST_BYTES:
        raise ImageError(f"{name} has more than {_MOST_BYTES} bytes: scale it down, or save it compressed")
    return io.BytesIO(data)


def _what_instead(file: Any) -> str:
    """The predicate of an error message about contents that Pillow does not recognise."""
    try:
        file.seek(0)
        head = file.read(HEAD)
    except Exception:  # the file was readable before
        head = b"?"
    if not head:
        return "is empty (0 bytes): copy or download it again"
    return describe_contents(head) or "is not an image that Pillow can read: convert it to PNG or JPEG"


def _check_png(file: Any, name: str) -> None:
    """Verify the checksums of the chunks that determine the pixels. Pillow does not, and decodes damaged data."""
    position = file.tell()  # Pillow continues to read here
    try:
        file.seek(8)
        while len(header := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", header)
            if kind == b"IEND":
                break
            if kind[0] & 32 and kind not in (b"tRNS", b"eXIf"):  # ancillary: comments, colour profiles, ...
                file.seek(length + 4, os.SEEK_CUR)
                continue
            found = zlib.crc32(kind)
            while length and (data := file.read(min(length, 1 << 20))):
                found, length = zlib.crc32(data, found), length - len(data)
            expected = file.read(4)
            if length or len(expected) < 4:  # bytes are missing, which Pillow may not notice
                raise ImageError(f"{name} is damaged or truncated, copy or download it again: it ends too early")
            if found != int.from_bytes(expected, "big"):
                part = kind.decode("ascii", "replace")
                raise ImageError(f"{name} is damaged (the checksum of its {part} is wrong): copy or download it again")
    finally:
        file.seek(position)


def _check_pcx(file: Any, name: str) -> None:
    """Check that the palette at the end of a PCX file exists: without it Pillow reads its indices as grey values."""
    position = file.tell()
    file.seek(68)
    grey = file.read(1) == b"\2"
    file.seek(max(0, file.seek(0, os.SEEK_END) - 769))
    if not grey and file.read(1) != b"\x0c":
        raise ImageError(f"{name} is damaged or truncated, copy or download it again: its palette is missing")
    file.seek(position)


def _from_pillow(image: Image.Image, name: str, *, white: bool) -> np.ndarray:
    _check_size(image, name)
    black = _black_in_16_bits(image)
    _decode(image, name)
    _check_size(image, name)  # the header of an icon may have another size than the image
    turn = _TRANSPOSE.get(_orientation(image))
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image if turn is None else image.transpose(turn))
        return _from_array(_as_uint16(values, name) if image.mode.startswith("I") else values, name)
    try:
        # RGBA as an intermediate gives the same colours as convert("RGB"), but without Pillow's warning about
        # transparent palettes; premultiplied modes can only be converted this way.
        via = {"P": "RGBA", "PA": "RGBA", "RGBa": "RGBA", "La": "LA"}.get(image.mode)
        image = image.convert(via) if via else image
        rgb = _over_white(image) if white and image.has_transparency_data else image.convert("RGB")
    except ValueError as error:
        raise ImageError(f"{name} has colours of mode {image.mode}, which Pillow cannot convert to RGB") from error
    array = np.array(rgb if turn is None else rgb.transpose(turn))
    if black >= 0 and array.max() <= black:
        raise ImageError(f"{name} has 16 bits per channel, and {_ALL_BELOW_256}")
    return array


def _over_white(image: Image.Image) -> Image.Image:
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def _check_size(image: Image.Image, name: str) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageError(
            f"{name} is too large: {width} x {height} is {width * height} pixels, the maximum is {MAX_PIXELS}; "
            "scale it down"
        )
    if not width * height:
        raise ImageError(f"{name} is empty: {width} x {height} pixels")


def _black_in_16_bits(image: Image.Image) -> int:
    """The largest 8-bit value that 16-bit colours below 256 are decoded to; -1 for a file with 8 bits per channel.

    Pillow keeps the upper byte of 16-bit colours; in PPM files it rounds them. `image` is not decoded yet.
    """
    for tile in getattr(image, "tile", None) or ():  # None for some formats before Pillow 11
        if tile[0].startswith("ppm") and image.mode == "RGB" and tile[3][-1] == 65535:
            return 1
        if re.search(r"(L|A|X|a|B|K);16[BLN]", str(tile[3])):  # "BGR;16" has 16 bits per pixel
            return 0
    return -1


def _decode(image: Image.Image, name: str) -> None:
    quick = image.format in ("JPEG", "PNG", "WEBP", "BMP", "GIF")  # decoders without warnings need no lock
    try:
        with contextlib.nullcontext() if quick else quiet_pillow():
            image.load()
    except Exception as error:  # as in `_from_file`: decoders raise OSError, SyntaxError, struct.error, ...
        raise ImageError(f"{name} {_why_not_decoded(image, error)}") from error


def _why_not_decoded(image: Image.Image, error: Exception) -> str:
    reason = first_line(error)
    if isinstance(error, MemoryError):
        return "needs more memory to decode than there is: scale it down"
    unusable = isinstance(error, (ValueError, AttributeError, AssertionError))  # depends on the version of Pillow
    if unusable and ("closed" in reason or getattr(image, "fp", error) is None):
        return "is closed: open it again, or pass its path"
    if image.format == "EPS":
        missing = "is not installed" if "Ghostscript" in reason else f"failed on it: {reason}"
        return f"is an EPS drawing, and Ghostscript, which draws it, {missing}; convert it to PNG"
    if isinstance(image, ImageFile.StubImageFile):
        return f"is a {image.format} file, which Pillow cannot decode here: convert it to PNG"
    if isinstance(error, OSError) and "not available" in reason:  # built without libjpeg, libwebp, ...
        return f"cannot be decoded by this build of Pillow ({reason}): install another one, or convert it to PNG"
    return f"is damaged or truncated, copy or download it again: {reason}"


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 (upright) for damaged EXIF data, which does not affect the pixels."""
    try:
        with quiet_pillow():
            return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # parsers raise nearly any exception for hostile metadata
        return 1


@contextlib.contextmanager
def quiet_pillow() -> Iterator[None]:
    """Suppress Pillow's warnings about a file: they concern metadata, or sizes, for which `MAX_PIXELS` is decisive."""
    bombs = Image.DecompressionBombWarning
    with _QUIET, warnings.catch_warnings():
        action = next((f[0] for f in warnings.filters if f[1] is None and issubclass(bombs, f[2])), "")
        warnings.simplefilter("ignore")
        if action == "error":  # the app refuses such images
            warnings.simplefilter("error", bombs)
        yield


def _as_uint16(values: np.ndarray, name: str) -> np.ndarray:
    """Convert the values of Pillow's integer modes, [h, w]; 16-bit grey files have mode "I" or "I;16"."""
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise ImageError(f"{name} has grey values from {low} to {high}; 16-bit values must be within 0 to 65535")
    return values.astype(np.uint16)


def _from_array(array: np.ndarray, name: str, *, white: bool = False) -> np.ndarray:
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4):
        shape = " x ".join(map(str, array.shape)) or "a scalar"
        raise ImageError(f"an image array must be [h, w], [h, w, 3] or [h, w, 4], not {shape}")
    if not array.size:
        raise ImageError(f"{name} is empty: {array.shape[1]} x {array.shape[0]} pixels")
    rgb = _as_uint8(array[:, :, :3], name)  # [h, w, 1 or 3]
    if white and array.shape[2] == 4:
        opacity = _as_uint8(array[:, :, 3:], name)
        return np.array(_over_white(Image.fromarray(np.concatenate([rgb, opacity], axis=2))))
    if rgb.shape[2] == 1:
        rgb = np.repeat(rgb, 3, axis=2)
    return np.array(rgb, order="C")  # a copy: the app may change its array later


def _as_uint8(array: np.ndarray, name: str) -> np.ndarray:
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * np.uint8(255)
    if array.dtype == np.uint16:
        if 0 < array.max() < 256:  # most likely 8-bit values; zeros are black either way
            raise ImageError(f"{name} has 16 bits, and {_ALL_BELOW_256}")
        return ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)  # 65535 = 255 * 257, rounded to nearest
    if array.dtype.kind == "f":
        return _from_floats(array, name)
    raise ImageError(
        f"an image array must be uint8, uint16, bool or float, not {array.dtype}; convert it with .astype(np.uint8)"
    )


def _from_floats(array: np.ndarray, name: str) -> np.ndarray:
    if not np.isfinite(array).all():
        raise ImageError(f"{name} contains NaN or infinite values: replace them first")
    low, high = float(array.min()), float(array.max())
    if low < -1e-3 or high > 1 + 1e-3:  # a resize may overshoot by a rounding error
        raise ImageError(
            f"float images must be within 0 to 1, {name} has values from {low:g} to {high:g}; "
            "divide by its full scale, or pass uint8"
        )
    if 0 < high <= 1.001 / 255:  # 8-bit values that were divided by 255 twice, or 1.0 on a scale of 255
        raise ImageError(
            f"float images have values from 0 to 1, but the largest value of {name} is {high:g}, which is black: was "
            "it divided by its full scale twice? Divide once, or pass uint8"
        )
    return cast(np.ndarray, np.rint(np.clip(array, 0, 1) * 255)).astype(np.uint8)


def _shorten(text: str) -> str:
    """A path for use in a message: on one line and shortened, because apps pass base64 by mistake."""
    text = re.sub(r"[\s\x00-\x1f]+", " ", text)
    return text if len(text) <= 200 else f"{text[:120]}... ({len(text)} characters)"
