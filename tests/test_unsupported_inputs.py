"""Inputs that are not images, or not the image they seem to be: black 16-bit images, closed files, base64, URLs, ..."""

from __future__ import annotations

import base64
import io
import mmap
import os
import struct
import sys
import tempfile
import threading
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from molmo_edge.errors import MolmoEdgeError
from molmo_edge.frontend.crops import ImageError, load_image

GOLDEN = Path(__file__).parent / "golden"
RGB = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
DEEP = RGB.astype(np.uint16)  # 8-bit values in 16 bits


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png_16(values: np.ndarray, colour: int) -> bytes:
    """A PNG with 16 bits per channel, which Pillow cannot write in colour. colour: 2 RGB, 4 grey with alpha, 6 RGBA."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    height, width, _ = values.shape
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([16, colour, 0, 0, 0])
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )  # fmt: skip


def tiff_16(values: np.ndarray) -> bytes:
    """An uncompressed TIFF with 16 bits per channel."""
    height, width, _ = values.shape
    tags = ((256, 4, 1, width), (257, 4, 1, height), (258, 3, 3, 140), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 1, 146),
            (277, 3, 1, 3), (278, 4, 1, height), (279, 4, 1, values.nbytes))  # fmt: skip
    data = b"II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return data.ljust(140, b"\0") + struct.pack("<HHH", 16, 16, 16) + values.astype("<u2").tobytes()


def with_alpha(values: np.ndarray) -> np.ndarray:
    return np.dstack([values, np.full(values.shape[:2], 65535, np.uint16)])


@pytest.mark.parametrize(
    "image",
    [
        DEEP,
        DEEP[..., 0],
        np.ones((2, 2), np.uint16),
        encoded(Image.fromarray(DEEP[..., 0])),
        encoded(Image.fromarray(DEEP[..., 0]), "TIFF"),
        Image.fromarray(DEEP[..., 0]),
        Image.fromarray(DEEP[..., 0].astype(np.int32)),
        png_16(DEEP, 2),
        png_16(with_alpha(DEEP[..., :1]), 4),
        png_16(with_alpha(DEEP), 6),
        b"P6 30 20 65535\n" + DEEP.astype(">u2").tobytes(),
        b"P5 30 20 65535\n" + DEEP[..., 0].astype(">u2").tobytes(),
        tiff_16(DEEP),
    ],
    ids=[
        "array",
        "grey",
        "ones",
        "PNG",
        "TIFF",
        "I;16",
        "I",
        "PNG RGB",
        "PNG LA",
        "PNG RGBA",
        "PPM",
        "PGM",
        "TIFF RGB",
    ],
)
def test_8_bit_values_in_16_bits_are_refused_not_black(image: Any) -> None:
    with pytest.raises(ImageError, match=r"16 bits.*below 256.*as 8 bits.*scale them"):
        load_image(image)


def test_other_16_bit_images_are_read(tmp_path: Path) -> None:
    assert not load_image(np.zeros((2, 3), np.uint16)).any()  # black in either interpretation
    assert load_image(np.full((2, 3), 256, np.uint16)).tolist() == [[[1] * 3] * 3] * 2
    path = tmp_path / "deep.png"
    path.write_bytes(png_16(DEEP * 257, 2))
    for source in (path, path.read_bytes(), png_16(with_alpha(DEEP * 257), 6), tiff_16(DEEP * 257)):
        assert np.array_equal(load_image(source), RGB)
    assert np.array_equal(load_image(b"P6 30 20 65535\n" + (DEEP * 257).astype(">u2").tobytes()), RGB)
    assert np.array_equal(load_image(Image.fromarray(DEEP[..., 0] * 257))[..., 1], RGB[..., 0])


def test_black_with_16_bits_a_pixel_is_black() -> None:
    masks = struct.pack("<III", 0xF800, 0x7E0, 0x1F)
    header = struct.pack("<IiiHHIIiiII", 40, 4, 4, 1, 16, 3, 32, 0, 0, 0, 0)
    bmp = b"BM" + struct.pack("<IHHI", 98, 0, 0, 66) + header + masks + bytes(32)
    assert load_image(bmp).shape == (4, 4, 3)
    assert not load_image(bmp).any()


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_floats_that_were_divided_twice_are_refused(kind: type) -> None:
    with pytest.raises(ImageError, match="divided by its full scale twice"):
        load_image((RGB / 255 / 255).astype(kind))
    assert load_image((RGB / 255).astype(kind)).max() == 255
    assert not load_image(np.zeros((2, 2), kind)).any()


def test_closed_images_and_files_are_called_closed() -> None:
    path = GOLDEN / "coffee.png"
    with Image.open(path) as left:
        pass
    closed = Image.open(path)
    closed.close()
    loaded = Image.open(path)
    loaded.load()
    loaded.close()
    with path.open("rb") as file:
        lazy = Image.open(file)
    buffer = io.BytesIO(path.read_bytes())
    buffer.close()
    with path.open("rb") as mapped_file, mmap.mmap(mapped_file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert load_image(mapped).any()
    text = io.StringIO("text")
    text.close()
    for source in (left, closed, loaded, lazy, file, buffer, mapped, text):
        with pytest.raises(ImageError, match=r"is closed: open .* pass its path"):
            load_image(source)


class Odd:
    """A file object that can only read, such as an HTTP response."""

    def __init__(self, data: bytes, answer: Any = b"") -> None:
        self._data, self._answer = io.BytesIO(data), answer

    def read(self, size: int = -1) -> Any:
        if isinstance(self._answer, Exception):
            raise self._answer
        return self._data.read(size) if size else self._answer


def test_file_objects_that_cannot_seek_or_read(tmp_path: Path) -> None:
    data = encoded(Image.fromarray(RGB))
    assert np.array_equal(load_image(Odd(data)), RGB)
    read, write = os.pipe()
    threading.Thread(target=lambda: (os.write(write, data), os.close(write))).start()
    with open(read, "rb") as pipe:
        assert np.array_equal(load_image(pipe), RGB)
    with tempfile.SpooledTemporaryFile() as spooled:
        spooled.write(data)
        assert np.array_equal(load_image(spooled), RGB)
    released = memoryview(data)
    released.release()
    with (tmp_path / "out").open("wb") as writing:
        for source, says in (
            (Odd(b""), "is empty"),
            (Odd(b"no image"), "not an image"),
            (Odd(data, None), "yields NoneType"),
            (Odd(data, "text"), "yields text"),
            (Odd(data, RuntimeError("broken\nin two")), "cannot be read .broken"),
            (writing, "'rb'"),
            (released, "released"),
            (memoryview(data)[::2], "contiguous"),
        ):
            with pytest.raises(ImageError, match=says) as caught:
                load_image(source)
            assert "\n" not in str(caught.value)


JPEG = encoded(Image.fromarray(RGB), "JPEG")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"])
def test_base64_text_is_called_so(kind: str, tmp_path: Path) -> None:
    data = encoded(Image.fromarray(RGB), kind)
    text = base64.b64encode(data).decode()
    path = tmp_path / "saved.jpg"
    path.write_text(text)
    for source in (text, Path(text), text.encode(), base64.encodebytes(data).decode(), path, f"data:x;base64,{text}"):
        with pytest.raises(ImageError, match=r"base64.b64decode|data URL, and URLs are not fetched") as caught:
            load_image(source)
        assert len(str(caught.value)) < 400
        assert "\n" not in str(caught.value)
    assert np.array_equal(load_image(base64.b64decode(text)), load_image(data))


def test_paths_that_look_like_base64_are_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = base64.b64encode(JPEG).decode()[:32].replace("/", "_")
    Path(name).write_bytes(JPEG)
    assert load_image(name).shape == (20, 30, 3)
    for missing in ("photos/2024/summer", "/9j/photo.jpg", "A" * 40):
        with pytest.raises(ImageError, match="there is no image"):
            load_image(missing)


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("https://example.com/a.jpg", "download the image"),
        ("s3://bucket/a.jpg", "download the image"),
        ("file:///home/me/a.jpg", "without file://"),
        ("data:image/png;base64,iVBORw0KGgo", "decode the part after the comma"),
    ],
)
def test_urls_are_not_fetched(url: str, says: str) -> None:
    for source in (url, Path(url), os.fsencode(url)) if "data:" not in url else (url, Path(url)):
        with pytest.raises(ImageError, match=f"URLs? .*{says}"):
            load_image(source)


@pytest.mark.parametrize(
    ("contents", "says"),
    [
        (b"\n<!DOCTYPE html>\n<html><body>Not found", "web page"),
        (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', "an SVG drawing"),
        (b"%PDF-1.7\n%", "a PDF document"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "pillow-heif"),
        (b"\0\0\0\x18ftypmp42\0\0\0\0", "a video"),
        (b"PK\x03\x04\x14\0", "an? .*archive"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs pull"),
        (b"https://example.com/a.jpg\n", "a URL"),
        (b"\x00\x01 something else", "not an image that Pillow can read"),
    ],
)
def test_other_files_are_named(contents: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(contents)
    for source in (path, contents):
        with pytest.raises(ImageError, match=f"is .*{says}"):
            load_image(source)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 30\n%%EndComments\nshowpage\n%%EOF\n"


def test_eps_without_ghostscript(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", False)
    path = tmp_path / "a.eps"
    path.write_bytes(EPS)
    for source in (path, EPS, Image.open(path)):
        with pytest.raises(ImageError, match=r"EPS drawing, and Ghostscript, .* is not installed; convert it to PNG"):
            load_image(source)


def test_ask_says_it_too(saying: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", False)
    closed = io.BytesIO(JPEG)
    closed.close()
    molmo = saying("ok")
    for source, says in (
        (base64.b64encode(JPEG).decode(), "base64 text"),
        ("https://example.com/a.jpg", "is a URL"),
        (DEEP, "below 256"),
        (closed, "is closed"),
        (EPS, "Ghostscript"),
    ):
        with pytest.raises(MolmoEdgeError, match=says):
            molmo.ask(source, "What?")
    assert str(molmo.ask(JPEG, "What?")) == "ok"


def test_formats_that_pillow_only_recognises() -> None:
    wmf = b"\xd7\xcd\xc6\x9a\0\0" + bytes([0, 0, 0, 0, 100, 0, 100, 0]) + b"\x60\0" + bytes(4) + bytes(2)
    wmf += b"\x01\0\t\0" + bytes(40)
    if sys.platform != "win32":
        with pytest.raises(ImageError, match="a WMF file, which Pillow cannot decode here: convert it to PNG"):
            load_image(wmf)


def test_a_png_with_a_wrong_checksum_is_refused() -> None:
    data = bytearray(encoded(Image.fromarray(RGB), compress_level=0))
    data[data.index(b"IDAT") + 400] ^= 1  # a pixel
    with pytest.raises(ImageError, match=r"damaged .the checksum of its IDAT is wrong"):
        load_image(bytes(data))
    whole = encoded(Image.fromarray(RGB))
    for left_out in range(1, 40):
        with pytest.raises(ImageError, match="damaged"):
            load_image(whole[:100] + whole[100 + left_out :])
    assert np.array_equal(load_image(whole[:-12]), RGB), "all pixels and their checksum are there"
    commented = bytearray(whole)
    comment = b"\0\0\0\x05tEXta\0b c" + bytes(4)  # a wrong checksum that affects no pixel
    commented[commented.index(b"IEND") - 4 : commented.index(b"IEND") - 4] = comment
    assert np.array_equal(load_image(bytes(commented)), RGB)


def test_a_large_photo_is_read_without_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow warns above 89 million pixels; MAX_PIXELS, or a limit of the app, decides what is read."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    data = encoded(Image.fromarray(RGB))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert load_image(data).shape == (20, 30, 3)
        assert not caught
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with pytest.raises(ImageError, match="too large"):
            load_image(data)


def test_threads_leave_the_filters_of_warnings_alone() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.fromarray(RGB), "TIFF", exif=exif)
    before = list(warnings.filters)
    threads = [threading.Thread(target=lambda: [load_image(data) for _ in range(40)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert warnings.filters == before
