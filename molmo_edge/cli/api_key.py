"""The key of a server, from an option, a file or the environment."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from molmo_edge.errors import MolmoEdgeError

KEY_VARIABLE = "MOLMO_EDGE_API_KEY"
_KEY = f"Key that clients must send. The option is visible to other users of the machine: prefer {KEY_VARIABLE}."

ApiKey = Annotated[str | None, typer.Option(help=_KEY, show_default=False)]
ApiKeyFile = Annotated[Path | None, typer.Option(help="File with the key in its first line.")]


def read_api_key(given: str | None, file: Path | None) -> str | None:
    """The key from the option, the file or the environment."""
    if given is not None and file is not None:
        raise typer.BadParameter("give --api-key or --api-key-file, not both")
    if file is not None:
        try:
            given = next(iter(file.read_text(encoding="utf-8").splitlines()), "").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise MolmoEdgeError(f"the key file {file} cannot be read: {error}") from None
        if not given:
            raise MolmoEdgeError(f"the key file {file} is empty: write the key in its first line")
    return given if given is not None else os.environ.get(KEY_VARIABLE) or None
