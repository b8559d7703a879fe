"""Run the command line in a separate process with the fake hub."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from hub_server import Hub
from pickled import copy_pickled_molmoe

GOLDEN = Path(__file__).parent / "golden"

_PROGRAM = """
import os, shutil, sys
if "FREE" in os.environ:
    usage = shutil.disk_usage
    shutil.disk_usage = lambda path: usage(path)._replace(free=int(os.environ["FREE"]))
if "NO_SYMLINKS" in os.environ:
    def refuse(*_, **__):
        raise OSError(22, "symbolic links are not supported here")
    os.symlink = refuse
if "NO_HARD_LINKS" in os.environ:
    def refuse_link(*_, **__):
        raise OSError(1, "hard links are not supported here")
    os.link = refuse_link
if sys.argv[1] == "fetch":
    from molmo_edge.errors import MolmoEdgeError
    from molmo_edge.checkpoints.hub import fetch_model
    try:
        print(fetch_model(sys.argv[2], sys.argv[3] or None))
    except MolmoEdgeError as error:
        sys.exit(f"molmo-edge: {error}")
else:
    from molmo_edge.cli import main
    main(sys.argv[1:])
"""


class Client:
    """The command line in a separate process with its own cache: huggingface_hub reads its settings once."""

    def __init__(self, hub: Hub, home: Path) -> None:
        self.hub, self.home = hub, home
        self.environment = os.environ | {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DOWNLOAD_TIMEOUT": "2",
            "HF_HUB_ETAG_TIMEOUT": "2",
        }
        for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_CACHE"):
            self.environment.pop(name, None)

    def __call__(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", _PROGRAM, *arguments]
        return subprocess.run(
            command, env=self.environment | environment, capture_output=True, text=True, timeout=120, check=False
        )

    def fetch(self, revision: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
        """Call only `fetch_model` and print its directory: opening a model takes seconds."""
        return self("fetch", self.hub.name, revision, **environment)

    def ask(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        photo = str(GOLDEN / "astronaut.png")
        return self(
            *("ask", photo, "Who?", "--model", self.hub.name, "--max-crops", "0", "--max-new-tokens", "2", "--json"),
            *arguments,
            **environment,
        )


def refused(process: subprocess.CompletedProcess[str]) -> str:
    """The one-line message of a failed command."""
    assert process.returncode == 1, process.stderr
    assert "Traceback" not in process.stderr
    *_, last = process.stderr.strip().splitlines()
    assert last.startswith("molmo-edge: ")
    return last


def with_large_weights(hub: Hub) -> bytes:
    """Make the golden MolmoE the hub's model, larger than one block of a download."""
    shutil.rmtree(hub.directory)
    copy_pickled_molmoe(hub.directory)
    weights = hub.directory / "pytorch_model.bin"
    torch.save(torch.load(weights, weights_only=True) | {"more": torch.rand(15_000_000)}, weights)
    return weights.read_bytes()
