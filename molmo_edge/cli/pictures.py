"""Find and open the images and videos on a command line: files, folders of files, or stdin."""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from molmo_edge.cli.output import is_file, print_json
from molmo_edge.cli.streams import print_error
from molmo_edge.errors import MolmoEdgeError

STDIN = Path("-")
# Images in a folder are found by their suffix; a file on the command line may have any name.
VIDEO_SUFFIXES = (
    ".mp4",
    ".m4v",
    ".mov",
    ".mkv",
    ".webm",
    ".avi",
    ".mpg",
    ".mpeg",
    ".ts",
    ".wmv",
    ".flv",
    ".3gp",
    ".ogv",
)
DRAWN = ".annotated.png"  # ends the names of the images that --save and --save-dir write into a folder
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")


class PictureError(MolmoEdgeError):
    """A folder without pictures, or an empty stdin."""


def open_picture(path: Path, video: Mapping[str, Any]) -> Any:
    """The `image` argument of `Molmo.ask` for a path on the command line.

    The path of a file, the bytes from stdin, or a Video with the keywords `video` for a file that is one. Raises
    PictureError for an empty stdin or folder, ImageError for a path that is not a file, and VideoError.
    """
    if path == STDIN:
        if sys.stdin.isatty():
            raise PictureError('"-" reads an image from stdin, but stdin is a terminal: pipe a file into it')
        data = sys.stdin.buffer.read()
        if not data:
            raise PictureError('"-" reads an image from stdin, but stdin is empty')
        return data
    if is_folder(path):
        raise PictureError(f"{path} contains no pictures ({', '.join(SUFFIXES)})")
    if is_file(path):
        return _open_video(path, video) if is_video(path) else path
    from molmo_edge.frontend.image_files import load_image

    return load_image(path)


def is_video(path: Path) -> bool:
    """Whether a file is a video, by its contents or its name."""
    from molmo_edge.frontend.unsupported_inputs import HEAD, kind_of_contents

    try:
        with path.open("rb") as file:
            kind = kind_of_contents(file.read(HEAD))
    except OSError:  # reported when the image is loaded
        return False
    return kind == "a video" or (kind is None and path.suffix.lower() in VIDEO_SUFFIXES)


def _open_video(path: Path, keywords: Mapping[str, Any]) -> Any:
    from molmo_edge.sdk.video import Video

    return Video.open(path, **keywords)


def report_problem(picture: Path, error: MolmoEdgeError, *, json: bool) -> str:
    """Print why there is no answer for one of several images. Returns the reason."""
    text = " ".join(str(error).split())
    if json:
        print_json({"image": str(picture), "error": text})
    print_error(text if str(picture) in text else f"{picture}: {text}")
    return text


def find_pictures(paths: Sequence[Path]) -> tuple[list[Path], bool]:
    """The images at `paths`, those of a folder or pattern sorted by name, and whether there may be more than one.

    Images that an earlier run drew are left out of folders, and of patterns that do not name them.
    Raises BadParameter for a question without quotes, and if stdin is named twice.
    """
    if sum(path == STDIN for path in paths) > 1:
        raise typer.BadParameter("stdin can be read only once", param_hint="IMAGE")
    words = [str(path) for path in paths[1:] if not path.suffix and not _exists(path) and path != STDIN]
    if words:
        raise typer.BadParameter(
            f'there is no file "{words[0]}": put a question or a label of several words in quotes', param_hint="IMAGE"
        )
    found: list[Path] = []
    for path in paths:
        inside = _list(path) if is_folder(path) else _match(path)
        found += [picture for picture in inside if is_file(picture)] or [path]
    return found, len(paths) > 1 or is_folder(paths[0]) or bool(_match(paths[0]))


def _list(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and not _is_drawn(path))


def _is_drawn(path: Path) -> bool:
    return path.name.lower().endswith(DRAWN)


def _exists(path: Path) -> bool:
    return path.exists() or bool(_match(path))


def _match(path: Path) -> list[Path]:
    """The files that a pattern matches, sorted; none for a path that exists. Shells on Windows pass patterns on."""
    if not glob.has_magic(str(path)) or is_file(path) or is_folder(path):
        return []
    found = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if os.path.isfile(name))
    return found if _is_drawn(path) else [match for match in found if not _is_drawn(match)]


def names_image(path: Path) -> bool:
    """Whether an argument looks like an image rather than like a question or a label."""
    known = path.suffix.lower() in (*SUFFIXES, *VIDEO_SUFFIXES)
    return path == STDIN or known or is_file(path) or is_folder(path) or bool(_match(path))


def is_folder(path: Path) -> bool:
    """Like `Path.is_dir`, but False for a name that is too long."""
    try:
        return path.is_dir()
    except OSError:
        return False
