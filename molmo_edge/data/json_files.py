"""Text and JSON files of users. Errors name the file and the line, in the exception class of the caller."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from molmo_edge.errors import MolmoEdgeError


def read_text(path: Path, error: type[MolmoEdgeError]) -> str:
    """The text of a UTF-8 file, without a byte order mark. Raises `error`."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as cause:
        raise error(f"{path} cannot be read as UTF-8: {cause}") from None


def read_json(path: Path, error: type[MolmoEdgeError]) -> Any:
    """The value of a JSON file. Raises `error`."""
    return parse_json(read_text(path, error), path, error)


def json_lines(path: Path, error: type[MolmoEdgeError]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place for messages, JSON object) of each line that is not empty. Raises `error`."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                where = f"line {number} of {path}"
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as cause:
                    raise error(f"{where} cannot be read as UTF-8: {cause}") from None
                if text.strip():
                    row = parse_json(text, where, error)
                    if not isinstance(row, dict):
                        raise error(f"{where} is not a JSON object")
                    yield where, row
    except OSError as cause:
        raise error(f"{path} cannot be read: {cause}") from None


def parse_json(text: str, where: str | Path, error: type[MolmoEdgeError]) -> Any:
    """The value of a JSON text. Raises `error` with the place `where`."""
    try:
        return json.loads(text)
    except ValueError as cause:
        raise error(f"{where} is not JSON: {cause}") from None
    except RecursionError:
        raise error(f"{where} cannot be read as JSON: it is nested too deeply") from None
