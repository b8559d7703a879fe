"""Save the drawn pictures of answers."""

from __future__ import annotations

import itertools
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from molmo_edge.cli.output import OutputError, is_file
from molmo_edge.cli.pictures import DRAWN, is_video
from molmo_edge.system.files import atomic_write

if TYPE_CHECKING:
    from PIL import Image

    from molmo_edge.answer import Answer

_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


def check_save(path: Path | None, image: Path) -> None:
    """Raise OutputError for a file that could not be written, before any work is done. An existing file is allowed."""
    if path is None:
        return
    if path.suffix.lower() not in _FORMATS:
        raise OutputError(f"--save {path}: the name must end in one of {', '.join(_FORMATS)}")
    if path.is_dir():
        raise OutputError(f"--save {path} is a directory: name a file in it")
    if not path.parent.is_dir():
        raise OutputError(f"--save {path}: there is no directory {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise OutputError(f"--save {path}: the directory {path.parent} is not writable")
    if is_file(path) and is_file(image) and path.samefile(image):
        raise OutputError(f"--save {path} would overwrite the photo itself: choose another name")


def save_paths(folder: Path | None, images: Sequence[Path], *, option: str = "--save") -> list[Path | None]:
    """The files for the drawn pictures of several images, FOLDER/NAME.annotated.png; None without a folder.

    Creates the folder, with --save-dir also those above it. Raises OutputError if it is not writable, before any work
    is done.
    """
    if folder is None:
        return [None] * len(images)
    always = option == "--save-dir"
    if is_file(folder) or (not always and folder.suffix.lower() in _FORMATS and not folder.is_dir()):
        raise OutputError(f"{option} {folder}: {'it' if always else 'with several images it'} must name a folder")
    try:
        folder.mkdir(parents=always, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{option} {folder}: the folder cannot be created: {error.strerror}") from None
    taken: set[str] = set()  # in lower case: some file systems ignore case
    numbers: defaultdict[str, Iterator[int]] = defaultdict(lambda: itertools.count(2))
    paths: list[Path | None] = []
    for image in images:
        stem = name = "stdin" if str(image) == "-" else image.stem
        while name.casefold() in taken:
            name = f"{stem}-{next(numbers[stem.casefold()])}"
        taken.add(name.casefold())
        path = folder / f"{name}{DRAWN}"
        check_save(path, image)
        paths.append(path)
    return paths


def check_save_together(path: Path | None, images: Sequence[Path]) -> None:
    """`check_save` for the answer to one question: a file, or a folder if there are several images, or frames."""
    if path is None:
        return
    if _is_folder_name(path) and (len(images) > 1 or is_video(images[0])):
        save_paths(path, images)
        return
    for image in images:
        check_save(path, image)


def save_answer(answer: Answer, path: Path, images: Sequence[Path]) -> list[Path]:
    """Save the pictures of an answer as one file; in a folder `path`, each image or each frame with points alone.

    Raises OutputError. Returns the files.
    """
    if not _is_folder_name(path) or answer.shown is None:
        save_image(answer.draw(), path)
        return [path]
    indices = answer.shown.to_draw(answer.points)
    if answer.times is None:
        files = [file for file in save_paths(path, images) if file is not None]
    else:
        names = frame_names(answer.times)
        files = [path / f"{images[0].stem}-{names[index]}{DRAWN}" for index in indices]
    for index, file in zip(indices, files, strict=True):
        save_image(answer.draw(index + 1), file)
    return files


def frame_names(times: Sequence[float]) -> list[str]:
    """A name for each frame of a video, "004.5s" for 4.5 seconds. Frames that are close get more decimals."""
    for decimals in range(1, 7):
        names = [f"{time:0{4 + decimals}.{decimals}f}s" for time in times]
        if len(set(names)) == len(names):
            return names
    return [f"{name}-{number}" for number, name in enumerate(names, 1)]


def _is_folder_name(path: Path) -> bool:
    return path.is_dir() or (path.suffix.lower() not in _FORMATS and not is_file(path))


def save_image(image: Image.Image, path: Path) -> None:
    """Save `image` atomically, in the format of the suffix. Raises OutputError."""
    options = {"quality": 92} if path.suffix.lower() != ".png" else {}
    try:
        with atomic_write(path) as part, part.open("xb") as file:
            image.save(file, _FORMATS[path.suffix.lower()], **options)
    except (OSError, ValueError) as error:  # ValueError: the image is larger than the format allows
        raise OutputError(f"--save {path} could not be written: {getattr(error, 'strerror', None) or error}") from error
