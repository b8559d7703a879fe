"""Loading images: every mode and dtype, EXIF, and a clear error for everything that is not an image."""

from __future__ import annotations

import contextlib
import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps

from molmo_edge.frontend.crops import MAX_PIXELS, ImageError, load_image

GOLDEN = Path(__file__).parent / "golden"
RGB = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_every_kind_of_source_gives_the_same(tmp_path):
    path = tmp_path / "photo é.png"
    data = encoded(Image.fromarray(RGB))
    path.write_bytes(data)
    with open(path, "rb") as file, Image.open(path) as image:
        file.read(10)  # loading starts at the beginning anyway
        sources = [path, str(path), data, bytearray(data), memoryview(data), io.BytesIO(data), file, image, RGB]
        for source in sources:
            loaded = load_image(source)
            assert loaded.dtype == np.uint8
            assert loaded.flags.c_contiguous
            assert np.array_equal(loaded, RGB)
        assert not file.closed
        assert np.array_equal(load_image(file), RGB)  # a second time


def test_arrays_are_copied():
    array = RGB.copy()
    loaded = load_image(array)
    array[:] = 0
    assert np.array_equal(loaded, RGB)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["RGB", "L", "I;16"])
def test_exif_orientation(orientation, mode):
    base = Image.fromarray(RGB).convert("L") if mode != "RGB" else Image.fromarray(RGB)
    if mode == "I;16":
        base = Image.fromarray(np.asarray(base).astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(base, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    expected = np.asarray(upright).astype(np.int64) // (257 if mode == "I;16" else 1)
    loaded = load_image(data)
    assert loaded.shape[:2] == ((30, 20) if orientation > 4 else (20, 30))
    assert np.array_equal(loaded, expected if mode == "RGB" else np.repeat(expected[:, :, None], 3, axis=2))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # Pillow's
@pytest.mark.parametrize("exif", [b"Exif\x00\x00garbage", b"Exif\x00\x00II*\x00\xff\xff\xff\xff", b"", b"MM"])
def test_damaged_exif_counts_as_upright(exif):
    assert np.array_equal(load_image(encoded(Image.fromarray(RGB), exif=exif)), RGB)


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "La", "CMYK", "YCbCr", "HSV"]
)
def test_modes_follow_convert(mode):
    grey_first = {"PA": "P", "RGBa": "RGBA", "La": "LA"}
    image = Image.fromarray(RGB)
    image = image.convert(grey_first.get(mode, mode)).convert(mode)
    via = {"RGBa": "RGBA", "La": "LA"}  # modes that Pillow cannot convert to RGB in one step
    expected = image.convert(via[mode]).convert("RGB") if mode in via else image.convert("RGB")
    assert np.array_equal(load_image(image), np.asarray(expected))


def test_transparency_is_dropped_as_in_the_reference():
    rgba = np.dstack([RGB, np.zeros((20, 30), np.uint8)])
    assert np.array_equal(load_image(rgba), RGB)
    assert np.array_equal(load_image(encoded(Image.fromarray(rgba))), RGB)


@pytest.mark.parametrize("transparency", [3, bytes(range(256))], ids=["index", "table"])
def test_transparent_palettes(transparency):
    palette = Image.fromarray(RGB).quantize(256)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load_image(encoded(palette, transparency=transparency))
    assert np.array_equal(loaded, np.asarray(palette.convert("RGB")))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bits_are_scaled_not_clipped(kind):
    values = np.array([[0, 128, 129, 256, 32768, 65407, 65535]], np.uint16)
    expected = np.rint(values / 257).astype(np.uint8)
    for source in (values, encoded(Image.fromarray(values), kind), Image.fromarray(values.astype(np.int32))):
        assert np.array_equal(load_image(source), np.repeat(expected[:, :, None], 3, axis=2))
    big_endian = Image.frombytes("I;16B", (7, 1), values.astype(">u2").tobytes())
    assert np.array_equal(load_image(big_endian)[..., 0], expected)


def test_modes_without_a_way_to_rgb_are_refused(monkeypatch):
    def convert(*_):  # as in older Pillows, which cannot convert LAB
        raise ValueError("conversion from LAB to RGB not supported")

    monkeypatch.setattr(Image.Image, "convert", convert)
    with pytest.raises(ImageError, match="mode LAB"):
        load_image(Image.new("LAB", (2, 2)))


def test_32_bit_grey_beyond_16_bits_is_refused():
    with pytest.raises(ImageError, match="from 0 to 70000"):
        load_image(Image.fromarray(np.array([[0, 70000]], np.int32)))


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_animations_give_their_first_frame(kind):
    colours = [(250, 0, 0), (0, 0, 250)]
    frames = [Image.new("RGB", (8, 8), c) for c in colours]
    options = {"lossless": True} if kind == "WEBP" else {}
    loaded = load_image(encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options))
    assert np.array_equal(loaded, np.full((8, 8, 3), colours[0], np.uint8))


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (np.array([[True, False]]), [255, 0]),
        (np.array([[0.0, 1.0]]), [0, 255]),
        (np.array([[0.5, 1 + 1e-6]], np.float32), [128, 255]),
        (np.array([[0.25, 0.75]], np.float16), [64, 191]),
        (np.array([[[7], [9]]], np.uint8), [7, 9]),
    ],
    ids=["bool", "float64", "float32", "float16", "one channel"],
)
def test_dtypes(array, expected):
    assert load_image(array)[0, :, 1].tolist() == expected


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 2, 2), np.uint8), "2 x 2 x 2"),
        (np.zeros((2, 2, 5), np.uint8), "2 x 2 x 5"),
        (np.zeros((1, 2, 2, 3), np.uint8), "1 x 2 x 2 x 3"),
        (np.zeros(3, np.uint8), r"\[h, w\]"),
        (np.array(3, np.uint8), "a scalar"),
        (np.zeros((0, 5, 3), np.uint8), "empty: 5 x 0"),
        (np.array([[0.0, np.nan]]), "NaN"),
        (np.array([[0.0, np.inf]]), "infinite"),
        (np.array([[0.0, 255.0]]), "0 to 255"),
        (np.array([[-0.5, 0.5]]), "-0.5 to 0.5"),
        (np.zeros((2, 2, 3), np.int64), "int64"),
        (np.zeros((2, 2, 3), complex), "complex"),
        (np.array([["a"]]), "U1"),
    ],
)
def test_wrong_arrays_are_refused(array, message):
    with pytest.raises(ImageError, match=message):
        load_image(array)


def test_missing_and_wrong_files(tmp_path):
    text = tmp_path / "text.jpg"
    text.write_text("this is no image")
    empty = tmp_path / "empty.png"
    empty.touch()
    for source, message in (
        (tmp_path / "none.png", "there is no image .*none.png"),
        (tmp_path, "is a directory"),
        (text, "text.jpg is not an image"),
        (empty, "empty.png is empty"),
        (b"", "is empty"),
        (b"GIF89a", "not an image|cannot be read"),
        (io.BytesIO(b"no image"), "not an image"),
        (io.StringIO("text"), "'rb'"),
        ("https://example.com/dog.jpg", "URLs are not fetched"),
        ("data:image/png;base64,AAAA", "URLs are not fetched"),
        ("a\0b", "cannot be opened"),
        ("A" * 100_000, "is base64 text"),
        (None, "not NoneType"),
        (3, "not int"),
        ([[1, 2]], "not list"),
        (Image.new("RGB", (0, 5)), "empty: 0 x 5"),
    ):
        with pytest.raises(ImageError, match=message) as caught:
            load_image(source)
        assert len(str(caught.value)) < 600
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP"])
def test_truncated_files_are_refused(kind, tmp_path):
    photo = Image.open(GOLDEN / "coffee.png").convert("RGB")
    data = encoded(photo, kind)
    path = tmp_path / "cut"
    for part in (0.05, 0.5, 0.9):
        path.write_bytes(data[: int(len(data) * part)])
        with pytest.raises(ImageError, match=r"cut is damaged|cut cannot be read|cut is not an image"):
            load_image(path)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "TIFF"])
def test_corrupted_files_never_raise_anything_else(kind):
    data = encoded(Image.fromarray(RGB), kind)
    random = np.random.default_rng(1)
    for _ in range(150):
        broken = bytearray(data)
        for place in random.integers(0, len(data), 8):
            broken[place] = random.integers(256)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, about the damage
            with contextlib.suppress(ImageError):
                assert load_image(bytes(broken)).dtype == np.uint8


def png_header(width: int, height: int) -> bytes:
    """A PNG whose header claims a size, with few pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("warnings_are", ["ignore", "error"])
def test_bombs_are_refused_before_decoding(warnings_are, monkeypatch):
    def decoded(*_):
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", decoded)
    with warnings.catch_warnings():
        warnings.simplefilter(warnings_are)
        for width, height in ((30000, 30000), (12000, 12000)):
            with pytest.raises(ImageError, match=rf"too large.*{width * height}"):
                load_image(png_header(width, height))
            monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # as an app without Pillow's limit
            with pytest.raises(ImageError, match=f"{width} x {height} .* {MAX_PIXELS}"):
                load_image(png_header(width, height))
            monkeypatch.undo()
            monkeypatch.setattr(ImageFile.ImageFile, "load", decoded)


def test_pillows_globals_stay():
    before = (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters))
    load_image(encoded(Image.fromarray(RGB), "JPEG"))
    with pytest.raises(ImageError):
        load_image(encoded(Image.fromarray(RGB), "JPEG")[:300])
    assert before == (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters))
