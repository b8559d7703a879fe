"""Where a tool's image comes from: a file below an allowed folder, a data URI, or the screen."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from urllib.parse import urlsplit
from urllib.request import url2pathname

from PIL import Image, ImageGrab

from molmo_edge.errors import MolmoEdgeError
from molmo_edge.server.pictures import check_picture, decode_data_uri

SCREEN = "screen"
MAX_BYTES = 50_000_000  # of a file
MAX_PIXELS = 50_000_000
_SHOWN = 200  # characters of a name in an error


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
            name = _path_of(name)
        elif "://" in name:
            raise SourceError(f'images are not fetched from the network: pass a file, a data URI or "{SCREEN}"')
        if not name or "\0" in name:
            raise SourceError(f'the image is empty: pass the path of a file, a data URI or "{SCREEN}"')
        if sys.platform == "win32" and _elsewhere(name, self.roots):
            raise SourceError(
                f"{_short(name)} is on another machine or a device, and outside of the folders that may be read"
            )
        try:
            path = self._allowed(name)
            if not path.is_file():
                raise SourceError(
                    f"{_short(path)} is not a file" if path.exists() else f"there is no file {_short(path)}"
                )
            if (size := path.stat().st_size) > MAX_BYTES:
                raise SourceError(f"{_short(path)} has {size} bytes, at most {MAX_BYTES} are accepted")
            return path.read_bytes()
        except OSError as error:
            raise SourceError(f"{_short(name)} cannot be read: {error.strerror or type(error).__name__}") from error

    def _allowed(self, name: str) -> Path:
        """The path that `name` leads to, links followed; relative names begin in the first root that has them."""
        roots = [root.resolve() for root in self.roots]
        try:
            given = Path(name).expanduser()
            paths = [(root / given).resolve() for root in roots]
        except (OSError, RuntimeError, ValueError) as error:
            raise SourceError(f"the path of the image is invalid: {_short(error)}") from error
        inside = [path for path in paths if any(path.is_relative_to(root) for root in roots)]
        if not inside:
            # Whether the file exists is not told.
            folders = ", ".join(map(str, roots)) or "none"
            raise SourceError(
                f"{_short(name)} is outside of the folders that may be read ({folders}): allow it with --root"
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


def _elsewhere(name: str, roots: Sequence[Path]) -> bool:
    """Whether Windows would look on another machine, or at a device, for `name`: "//host/share", "//./COM1".

    Even the question whether the file exists sends the user's credentials to that machine.
    """
    if not name.replace("/", "\\").startswith("\\\\"):
        return False
    share = PureWindowsPath(name).drive.lower()
    return not share or share not in {PureWindowsPath(root).drive.lower() for root in roots}


def _path_of(url: str) -> str:
    try:
        return url2pathname(urlsplit(url).path)
    except (OSError, ValueError) as error:
        raise SourceError(f"{_short(url)} is not a valid file URL") from error


def _short(name: object) -> str:
    """`name` for an error: a client may send a whole image in its place."""
    text = str(name)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
