"""300 damaged pictures of many formats and modes: refused in one sentence, or read as what the file now says.

Bytes are changed, cut off and left out, sizes in headers are changed. A picture that is read has to be what a plain
decoding of the same bytes with Pillow gives, turned as its EXIF says. Where the format has checksums (PNG), or where
the file was merely cut, it has to be the undamaged picture: no damage may pass for an image.
"""

from __future__ import annotations

import contextlib
import functools
import io
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps, features

from molmo_edge.errors import MolmoEdgeError
from molmo_edge.frontend.crops import load_image

_SMOOTH = np.linspace(0, 255, 37 * 23 * 3).reshape(37, 23, 3)
RGB = np.clip(_SMOOTH + np.random.default_rng(5).normal(0, 20, _SMOOTH.shape), 0, 255).astype(np.uint8)


def _picture(mode: str) -> Image.Image:
    if mode == "I;16":
        return Image.fromarray(RGB[..., 0].astype(np.uint16) * 257)
    if mode == "F":
        return Image.fromarray(RGB[..., 0].astype(np.float32) / 255)
    image = Image.fromarray(RGB)
    if mode == "LA":
        return Image.merge("LA", (image.convert("L"), image.getchannel("R")))
    if mode == "RGBA":
        return Image.merge("RGBA", (*image.split(), image.getchannel("G")))
    return image.convert(mode)


def _saved(kind: str, mode: str, orientation: int = 1, **options: Any) -> bytes:
    if orientation != 1:
        exif = Image.Exif()
        exif[0x0112] = orientation
        options["exif"] = exif
    if (kind, mode) == ("PPM", "I;16"):  # older Pillows cannot write it
        return b"P5 23 37 65535\n" + np.asarray(_picture(mode)).astype(">u2").tobytes()
    file = io.BytesIO()
    try:
        _picture(mode).save(file, kind, **options)
    except OSError as error:  # of 16 bits in a PPM, before Pillow 10.3
        pytest.skip(f"this Pillow does not write it: {error}")
    return file.getvalue()


def _kinds() -> list[tuple[str, str, int, dict[str, Any]]]:
    """Format, mode, orientation, options of the writer."""
    kinds: list[tuple[str, str, int, dict[str, Any]]] = []
    kinds += [("PNG", mode, 1, {}) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")]
    kinds += [("PNG", "RGB", turn, {}) for turn in (3, 6)]
    kinds += [("JPEG", mode, turn, {"progressive": turn == 8}) for mode in ("L", "RGB", "CMYK") for turn in (1, 5, 8)]
    kinds += [("GIF", "P", 1, {}), ("GIF", "L", 1, {})]
    kinds += [("WEBP", mode, turn, {"lossless": turn == 6}) for mode in ("RGB", "RGBA") for turn in (1, 6)]
    kinds += [("BMP", mode, 1, {}) for mode in ("1", "L", "P", "RGB", "RGBA")]
    kinds += [("TIFF", mode, 7, {}) for mode in ("1", "L", "P", "RGB", "CMYK", "I;16", "F")]
    if features.check("libtiff"):
        packed = ("tiff_lzw", "tiff_adobe_deflate", "packbits")
        kinds += [("TIFF", "RGB", turn, {"compression": name}) for name in packed for turn in (1, 2)]
    kinds += [("PPM", mode, 1, {}) for mode in ("1", "L", "RGB", "I;16")]
    kinds += [("TGA", "RGB", 1, {"compression": "tga_rle"}), ("PCX", "P", 1, {}), ("SGI", "RGB", 1, {})]
    kinds += [("ICO", "RGBA", 1, {"sizes": [(16, 16)]}), ("ICNS", "RGBA", 1, {}), ("DDS", "RGB", 1, {})]
    kinds += [("MPO", "RGB", 6, {"save_all": True, "append_images": [Image.new("RGB", (8, 8))]})]
    if features.check("jpg_2000"):
        kinds += [("JPEG2000", mode, 1, {}) for mode in ("L", "RGB")]
    if features.check("avif"):
        kinds += [("AVIF", "RGB", turn, {"speed": 10}) for turn in (1, 6)]
    return kinds


KINDS = _kinds()


def _flip(data: bytearray, random: np.random.Generator) -> str:
    for place in random.integers(0, len(data), random.integers(1, 9)):
        data[place] ^= random.integers(1, 256)
    return "bytes"


def _header(data: bytearray, random: np.random.Generator) -> str:
    """Extreme values in place of sizes, counts, offsets and types."""
    place = int(random.integers(2, min(len(data), 120) - 4))
    value = [0, 1, 0x7F, 0x80, 0xFFFF, 0x10000, 0x7FFFFFFF, 0xFFFFFFFF, 40000][random.integers(9)]
    width = [1, 2, 4][random.integers(3)]
    data[place : place + width] = (value & (256**width - 1)).to_bytes(width, ["little", "big"][random.integers(2)])
    return "bytes"


def _cut(data: bytearray, random: np.random.Generator) -> str:
    del data[int(len(data) * random.random()) if random.random() < 0.7 else -int(random.integers(1, 20)) :]
    return "cut"


def _leave_out(data: bytearray, random: np.random.Generator) -> str:
    place = int(random.integers(0, len(data)))
    del data[place : place + int(random.integers(1, 64))]
    return "bytes"


DAMAGES: list[Callable[[bytearray, np.random.Generator], str]] = [_flip, _header, _cut, _leave_out]


def plainly(data: bytes) -> np.ndarray | None:
    """Decode the bytes with Pillow alone; None if it refuses them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = Image.open(io.BytesIO(data))
            image.load()
        except Exception:
            return None
        with contextlib.suppress(Exception):  # damaged EXIF counts as upright
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):
            grey = np.rint(np.clip(np.asarray(image).astype(np.float64), 0, 65535) / 257)
        elif image.mode == "F":
            grey = np.rint(np.asarray(image).astype(np.float64) * 255)
        else:
            return np.asarray(image.convert("RGBA" if image.mode in ("P", "PA") else image.mode).convert("RGB"))
        return np.repeat(grey[:, :, None], 3, axis=2)


def loaded_or_refused(data: bytes) -> np.ndarray | str:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a warning would become an unexpected error
        warnings.filterwarnings("default", category=Image.DecompressionBombWarning)
        try:
            return load_image(data)
        except MolmoEdgeError as error:
            said = str(error)
    assert "\n" not in said
    assert 20 < len(said) < 500
    assert "Traceback" not in said
    return said


@pytest.mark.timeout(120)
@pytest.mark.parametrize("kind", range(len(KINDS)), ids=["-".join(map(str, kind[:3])) for kind in KINDS])
def test_damage_is_refused_or_decoded_as_the_file_says(kind: int) -> None:
    name, mode, orientation, options = KINDS[kind]
    data = _saved(name, mode, orientation, **options)
    whole = load_image(data)
    expected = plainly(data)
    assert expected is not None
    assert np.array_equal(whole, expected)
    if name not in ("ICO", "ICNS"):  # which resize images
        assert whole.shape == ((23, 37, 3) if orientation > 4 else (37, 23, 3))
    random = np.random.default_rng(kind)
    for round_ in range(8):
        damaged = bytearray(data)
        damage = DAMAGES[round_ % 4](damaged, random)
        result = loaded_or_refused(bytes(damaged))
        if isinstance(result, str):
            continue
        assert result.dtype == np.uint8
        assert result.ndim == 3
        assert result.shape[2] == 3
        assert result.flags.c_contiguous
        if damage == "cut" or name == "PNG":
            assert np.array_equal(result, whole), "damage passed for an image"
        else:
            expected = plainly(bytes(damaged))
            assert expected is not None
            assert np.array_equal(result, expected)


def test_there_are_300() -> None:
    assert len(KINDS) * 8 >= 300


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@functools.cache
def bombs() -> dict[str, bytes]:
    """Small files that would need gigabytes, for pixels or other data."""
    zeros = zlib.compressobj(1)
    packed = b"".join(zeros.compress(bytes(1 << 20)) for _ in range(256)) + zeros.flush()  # 256 MB in 1 MB

    def png(width: int, height: int, *more: bytes) -> bytes:
        header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        return b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + _chunk(b"IDAT", packed) + _chunk(b"IEND", b"")

    sides = struct.pack("<II", 65535, 65535)
    icon = png(30000, 30000)
    gif = b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0x80, 0, 0) + bytes(6) + b","
    tiff = b"II*\0\x08\0\0\0" + struct.pack("<H", 8)
    for tag, value in ((256, 60000), (257, 60000), (258, 8), (259, 1), (262, 1), (273, 200), (278, 60000), (279, 9)):
        tiff += struct.pack("<HHII", tag, 4, 1, value)
    return {
        "png": png(30000, 30000),
        "almost": png(13000, 13000),  # Pillow only warns
        "png text": png(8, 8, _chunk(b"zTXt", b"comment\0\0" + packed)),
        "png profile": png(8, 8, _chunk(b"iCCP", b"profile\0\0" + packed)),
        "ico": struct.pack("<HHH", 0, 1, 1) + struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(icon), 22) + icon,
        "bmp": b"BM" + struct.pack("<IHHI", 100, 0, 0, 54) + struct.pack("<I", 40) + sides + struct.pack("<HH", 1, 24)
        + bytes(24),
        "gif": gif + struct.pack("<HHHHB", 0, 0, 65535, 65535, 0) + b"\x08" + bytes(50),
        "tiff": tiff + bytes(200),
        "ppm": b"P6 60000 60000 255\n" + bytes(100),
    }  # fmt: skip


_MEMORY = """
import resource, sys, warnings
from molmo_edge.errors import MolmoEdgeError
from molmo_edge.frontend.crops import load_image
warnings.simplefilter("error")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    print(load_image(sys.stdin.buffer.read()).shape)
except MolmoEdgeError as error:
    print("refused:", error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is counted in other units elsewhere")
@pytest.mark.parametrize("name", ["png", "almost", "png text", "png profile", "ico", "bmp", "gif", "tiff", "ppm"])
def test_bombs_take_no_memory(name: str) -> None:
    run = subprocess.run(
        [sys.executable, "-c", _MEMORY], input=bombs()[name], capture_output=True, timeout=120, check=False
    )
    assert run.returncode == 0, run.stderr.decode()
    said, megabytes = run.stdout.decode().splitlines()
    assert said.startswith("refused: ") or said == "(8, 8, 3)"
    assert int(megabytes) < 150
