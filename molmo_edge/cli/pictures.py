"""The images that a command names: files, folders of them, or stdin."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from molmo_edge.cli.output import is_file
from molmo_edge.errors import MolmoEdgeError

STDIN = Path("-")
# Of the files in a folder, those that are pictures; a file that is named itself may have any name.
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")


class PictureError(MolmoEdgeError):
    """A folder without pictures, or nothing on stdin."""


def open_picture(path: Path) -> Any:
    """What `Molmo.ask` takes as the image: a file is read there, what is no file is read, or refused, here.

    Raises ImageError and PictureError.
    """
    if path == STDIN:
        if sys.stdin.isatty():
            raise PictureError('"-" reads an image from stdin, which is a terminal: pipe a file into it')
        data = sys.stdin.buffer.read()
        if not data:
            raise PictureError('"-" reads an image from stdin, but nothing came')
        return data
    if is_folder(path):
        raise PictureError(f"{path} is a folder without pictures ({', '.join(SUFFIXES)})")
    if is_file(path):
        return path
    from molmo_edge.frontend.image_files import load_image

    return load_image(path)


def find_pictures(paths: Sequence[Path]) -> tuple[list[Path], bool]:
    """The pictures, those of a folder in the order of their names, and whether there can be several.

    Raises BadParameter for what is a question without its quotes, and for stdin named twice.
    """
    if sum(path == STDIN for path in paths) > 1:
        raise typer.BadParameter("stdin can be read once", param_hint="IMAGE")
    words = [str(path) for path in paths[1:] if not path.suffix and not path.exists() and path != STDIN]
    if words:
        raise typer.BadParameter(
            f'there is no file "{words[0]}": a question or a label of several words needs quotes', param_hint="IMAGE"
        )
    found: list[Path] = []
    for path in paths:
        inside = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES) if is_folder(path) else []
        found += [picture for picture in inside if is_file(picture)] or [path]
    return found, len(paths) > 1 or is_folder(paths[0])


def names_image(path: Path) -> bool:
    """Whether an argument is meant as an image rather than as a question or a label."""
    return path == STDIN or path.suffix.lower() in SUFFIXES or is_file(path) or is_folder(path)


def is_folder(path: Path) -> bool:
    """As `Path.is_dir`, for anything that came from a command line."""
    try:
        return path.is_dir()
    except OSError:
        return False
