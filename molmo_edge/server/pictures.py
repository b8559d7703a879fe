"""From the image URLs of a request to the bytes of images that the server accepts."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import io
import re
from dataclasses import dataclass, field
from urllib.parse import unquote_to_bytes

from PIL import Image, UnidentifiedImageError

from molmo_edge.frontend.image_files import quiet_pillow
from molmo_edge.server.errors import ApiError, bad_request
from molmo_edge.server.remote_images import RemoteImages
from molmo_edge.server.settings import Settings

# Formats of photos and screenshots. Pillow reads more, but some with other programs (EPS with Ghostscript).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF")
_DATA = re.compile(r"data:(?P<type>[^,;]*)(?P<options>(?:;[^,;]*)*),", re.IGNORECASE)
_FETCHES = 4  # remote images at a time
_URLS_PER_IMAGE = 8  # different URLs that a request may have for each image that it may have


@dataclass(frozen=True)
class Picture:
    """The file of an image that was checked, but not decoded."""

    data: bytes = field(repr=False)
    digest: str  # SHA-256 of `data`


class PictureReader:
    """Reads data URIs, and URLs of allowed hosts."""

    def __init__(self, settings: Settings, remote: RemoteImages | None = None) -> None:
        self._settings = settings
        self._remote = remote or RemoteImages(settings.image_hosts, settings.max_body, settings.upload_timeout)
        self._fetching = asyncio.Semaphore(_FETCHES)

    async def read(self, urls: list[str], param: str) -> tuple[Picture, ...]:
        """The pictures at `urls`, each only once. Raises ApiError. `param`: the name of the field, for errors."""
        different = dict.fromkeys(urls)  # a client may repeat the image at every turn
        most = self._settings.max_images
        if len(different) > most * _URLS_PER_IMAGE:
            raise bad_request(f"the request has {len(different)} image URLs, this server accepts {most} images", param)
        found: dict[str, Picture] = {}
        for url in different:
            try:
                picture = await self._one(url)
            except ApiError as error:
                error.param = error.param or param
                raise
            found.setdefault(picture.digest, picture)
            if len(found) > most:
                raise bad_request(
                    f"the request has more than {most} different images, this server accepts {most}", param
                )
        return tuple(found.values())

    async def _one(self, url: str) -> Picture:
        if url[:5].lower() == "data:":
            return await asyncio.to_thread(lambda: self._checked(decode_data_uri(url)))
        async with self._fetching:
            return await asyncio.to_thread(lambda: self._checked(self._remote.fetch(url)))

    def _checked(self, data: bytes) -> Picture:
        check_picture(data, self._settings.max_pixels)
        return Picture(data, hashlib.sha256(data).hexdigest())


def decode_data_uri(uri: str) -> bytes:
    """The contents of "data:image/jpeg;base64,...". Raises ApiError."""
    match = _DATA.match(uri)
    if match is None:
        raise bad_request("the data URI is invalid: it must begin with data:image/jpeg;base64, for example")
    if not match["type"].lower().startswith("image/"):
        raise bad_request(f'the data URI must be of type image/..., not "{match["type"][:40]}"')
    contents = uri[match.end() :]
    if ";base64" not in match["options"].lower():
        return unquote_to_bytes(contents)
    try:
        return base64.b64decode("".join(contents.split()), validate=True)
    except (binascii.Error, ValueError):
        raise bad_request("the data URI is not valid base64") from None


def check_picture(data: bytes, max_pixels: int) -> None:
    """Read the header of an image. Raises ApiError for another kind of file, and for one with too many pixels."""
    if not data:
        raise bad_request("the image is empty")
    try:
        with quiet_pillow(), Image.open(io.BytesIO(data), formats=[f for f in FORMATS if f in _known()]) as image:
            width, height = image.size
    except UnidentifiedImageError:
        raise bad_request("the image is not a JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF file") from None
    except Exception as error:  # Pillow's parsers raise nearly any exception for a hostile header
        raise bad_request(f"the image cannot be read ({type(error).__name__})") from error
    if width * height > max_pixels:
        raise ApiError(413, f"the image has {width} x {height} pixels, this server accepts {max_pixels} in total")


def _known() -> set[str]:
    Image.init()
    return set(Image.OPEN)
