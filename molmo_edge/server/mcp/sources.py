"""Where a tool's image comes from: a file below an allowed folder, a data URI, or the screen."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from PIL import Image, ImageGrab

from molmo_edge.errors import MolmoEdgeError
from molmo_edge.server.pictures import check_picture, decode_data_uri

SCREEN = "screen"
MAX_BYTES = 50_000_000  # of a file
MAX_PIXELS = 50_000_000


class SourceError(MolmoEdgeError):
    """An image that may not be read, or that is not there."""


@dataclass(frozen=True)
class Sources:
    """What the tools may look at."""

    roots: Sequence[Path] = ()  # folders whose files may be read, with those in their subfolders
    screen: bool = True  # whether screenshots may be taken
    grab: Callable[[], Image.Image] = ImageGrab.grab

    def read(self, image: str) -> bytes:
        """The file of an image. Raises SourceError, and ApiError for one that the server does not accept."""
        image = image.strip()
        if image.lower() == SCREEN:
            return self._screenshot()
        data = decode_data_uri(image) if image[:5].lower() == "data:" else self._file(image)
        check_picture(data, MAX_PIXELS)
        return data

    def _file(self, name: str) -> bytes:
        if name[:5].lower() == "file:":
            name = url2pathname(urlsplit(name).path)
        elif "://" in name:
            raise SourceError(f'images are not fetched from the network: pass a file, a data URI or "{SCREEN}"')
        if not name or "\0" in name:
            raise SourceError(f'the image is empty: pass the path of a file, a data URI or "{SCREEN}"')
        path = self._allowed(name)
        try:
            if not path.is_file():
                raise SourceError(f"{path} is not a file" if path.exists() else f"there is no file {path}")
            if (size := path.stat().st_size) > MAX_BYTES:
                raise SourceError(f"{path} has {size} bytes, at most {MAX_BYTES} are accepted")
            return path.read_bytes()
        except OSError as error:
            raise SourceError(f"{path} cannot be read: {error.strerror or error}") from error

    def _allowed(self, name: str) -> Path:
        """The path that `name` leads to, links followed; relative names begin in the first root that has them."""
        roots = [root.resolve() for root in self.roots]
        try:
            given = Path(name).expanduser()
            paths = [(root / given).resolve() for root in roots]
        except (OSError, RuntimeError, ValueError) as error:
            raise SourceError(f"the path of the image is invalid: {error}") from error
        inside = [path for path in paths if any(path.is_relative_to(root) for root in roots)]
        if not inside:
            # Whether the file exists is not told.
            folders = ", ".join(map(str, roots)) or "none"
            raise SourceError(
                f"{name[:200]} is outside of the folders that may be read ({folders}): allow it with --root"
            )
        return next((path for path in inside if path.exists()), inside[0])

    def _screenshot(self) -> bytes:
        if not self.screen:
            raise SourceError("screenshots are switched off: start the server with --screen to allow them")
        try:
            picture = self.grab()
        except Exception as error:  # Pillow raises OSError; the desktop's own programs fail in other ways
            reason = str(error) or type(error).__name__
            raise SourceError(
                f"no screenshot could be taken ({reason}): this process has no display, or may not record it"
            ) from error
        file = io.BytesIO()
        picture.convert("RGB").save(file, "PNG", compress_level=1)
        return file.getvalue()
