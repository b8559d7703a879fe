"""Find and open the images on a command line: files, folders of files, or stdin."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from molmo_edge.cli.output import is_file
from molmo_edge.errors import MolmoEdgeError

STDIN = Path("-")
# Images in a folder are found by their suffix; a file on the command line may have any name.
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")


class PictureError(MolmoEdgeError):
    """A folder without pictures, or an empty stdin."""


def open_picture(path: Path) -> Any:
    """The `image` argument of `Molmo.ask` for a path on the command line: the path of a file, the bytes from stdin.

    Raises PictureError for an empty stdin or folder, and ImageError for a path that is not a file.
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
        return path
    from molmo_edge.frontend.image_files import load_image

    return load_image(path)


def find_pictures(paths: Sequence[Path]) -> tuple[list[Path], bool]:
    """The images at `paths`, those of a folder sorted by name, and whether there may be more than one.

    Raises BadParameter for a question without quotes, and if stdin is named twice.
    """
    if sum(path == STDIN for path in paths) > 1:
        raise typer.BadParameter("stdin can be read only once", param_hint="IMAGE")
    words = [str(path) for path in paths[1:] if not path.suffix and not path.exists() and path != STDIN]
    if words:
        raise typer.BadParameter(
            f'there is no file "{words[0]}": put a question or a label of several words in quotes', param_hint="IMAGE"
        )
    found: list[Path] = []
    for path in paths:
        inside = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES) if is_folder(path) else []
        found += [picture for picture in inside if is_file(picture)] or [path]
    return found, len(paths) > 1 or is_folder(paths[0])


def names_image(path: Path) -> bool:
    """Whether an argument looks like an image rather than like a question or a label."""
    return path == STDIN or path.suffix.lower() in SUFFIXES or is_file(path) or is_folder(path)


def is_folder(path: Path) -> bool:
    """Like `Path.is_dir`, but False for a name that is too long."""
    try:
        return path.is_dir()
    except OSError:
        return False
