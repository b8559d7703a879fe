"""Recognise inputs that are not images (URLs, base64, other file formats), to suggest the right fix."""

from __future__ import annotations

import re

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:[/\\]")  # pathlib turns "https://" into "https:/"
_DATA_URL = re.compile(r"data:[\w/+.-]*[;,]", re.IGNORECASE)
_BASE64 = re.compile(r"[A-Za-z0-9+/_\s-]+={0,2}\s*")
# The first characters of JPEG (also in the URL-safe alphabet), PNG, GIF, WebP and TIFF files in base64.
_BASE64_STARTS = ("/9j/", "_9j_", "iVBORw0KGg", "R0lGOD", "UklGR", "SUkqA", "TU0AK")
_LONGEST_NAME = 255  # characters; the limit of file systems for one part of a path

HEAD = 512  # number of bytes at the start of a file that `describe_contents` needs

_CONTENTS: tuple[tuple[re.Pattern[bytes], str], ...] = tuple(
    (re.compile(start, re.IGNORECASE | re.DOTALL), says)
    for start, says in (
        (rb"\s*(<\?xml.*)?(<!--.*-->\s*)?<svg", "an SVG drawing: render it as PNG first"),
        (
            rb"\s*(<!--.*-->\s*)?<(!doctype html|html|head|body|script)\b",
            "a web page (HTML): download the image itself",
        ),
        (rb"%PDF-", "a PDF document: export the page as PNG first"),
        (
            rb".{4}ftyp(heic|heix|heim|heis|hevc|hevx|mif1|msf1)",
            "a HEIC photo: export it as JPEG, or `pip install pillow-heif` and call pillow_heif.register_heif_opener()",
        ),
        (rb".{4}ftypavi[fs]", "an AVIF image, which this Pillow cannot read: update Pillow, or convert it to PNG"),
        (
            rb".{4}ftyp|\x1aE\xdf\xa3|RIFF.{4}AVI ",
            "a video: extract a frame as PNG or JPEG, or pass molmo_edge.Video.open(path) to a Molmo2",
        ),
        (rb"PK\x03\x04|\x1f\x8b", "a compressed archive: unpack it first"),
        (rb'\s*\{\s*"', "JSON text: download the image itself"),
        (rb"version https://git-lfs", "a Git LFS pointer, not the file itself: run `git lfs pull`"),
    )
)


def describe_name(text: str) -> str | None:
    """Describe a `text` that is not the path of a file, and what to do about it; None if it looks like a path."""
    start = text.lstrip()
    if _DATA_URL.match(start):
        return "is a data URL, and URLs are not fetched: decode the part after the comma, and pass the bytes"
    if start[:5].lower() == "file:" and _URL.match(start):
        return "is a URL, and URLs are not fetched: pass the path without file://"
    if _URL.match(start):
        return "is a URL, and URLs are not fetched: download the image and pass its path or bytes"
    if _is_base64(text):
        return "is base64 text: decode it first (base64.b64decode), and pass the bytes or save them to a file"
    return None


def kind_of_contents(head: bytes) -> str | None:
    """The kind of a file that starts with `head`, if it is known and not an image: "a web page (HTML)"."""
    return next((says.partition(":")[0] for start, says in _CONTENTS if start.match(head)), None)


def describe_contents(head: bytes) -> str | None:
    """Describe a file that starts with `head`, and what to do about it; None if its kind is unknown."""
    for start, says in _CONTENTS:
        if start.match(head):
            return f"is {says}"
    try:
        text = head.decode("ascii")
    except UnicodeDecodeError:
        return None
    # One line of text, or base64 with line breaks.
    return None if "\n" in text.strip() and not _is_base64(text) else describe_name(text)


def _is_base64(text: str) -> bool:
    text = text.strip()
    if len(text) < 24 or not _BASE64.fullmatch(text):
        return False
    if text.startswith(_BASE64_STARTS):
        return True
    # The two letters of a BMP file are weak evidence, and so is no prefix: the text must also exceed a file name.
    longest = max(map(len, re.split(r"[/\s]", text)))
    return longest > _LONGEST_NAME or (text.startswith("Qk") and len(text) > _LONGEST_NAME)
