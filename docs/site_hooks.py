"""Hooks of mkdocs.yml: pages from outside of docs/, and the package as it is installed for the API reference.

README.md is the home page. A link to a file that has no page of its own (a script, the license) becomes its name.
"""

from __future__ import annotations

import os
import posixpath
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
PAGES = {  # file of the repository: page of the site
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/RESULTS.md": "results.md",
    "examples/README.md": "examples.md",
    "molmo_edge/nano/MODEL_CARD.md": "model-card.md",
}
PICTURES = {"examples/answer.jpg": "images/answer.jpg"}
LINK = re.compile(r"(!?)\[([^]]+)\]\((?!https?:|#)([^)#]+)(#[^)]*)?\)")


@event_priority(100)  # before mkdocstrings reads its configuration
def on_config(config: Any) -> Any:
    """Give mkdocstrings the package with export/, quantize/ and runtimes/ in their places."""
    folder = Path(tempfile.mkdtemp(prefix="molmo-edge-docs-"))
    ignore = shutil.ignore_patterns("__pycache__", "*.onnx")
    shutil.copytree(ROOT / "molmo_edge", folder / "molmo_edge", ignore=ignore)
    for name in ("export", "quantize", "runtimes"):
        shutil.copytree(ROOT / name, folder / "molmo_edge" / name, ignore=ignore)
    config["plugins"]["mkdocstrings"].config["handlers"]["python"]["paths"] = [str(folder)]
    config["extra"]["package_copy"] = str(folder)
    return config


def on_post_build(config: Any) -> None:
    shutil.rmtree(config["extra"]["package_copy"])


def on_files(files: Any, config: Any) -> Any:
    for source, target in PAGES.items():
        files.append(File.generated(config, target, content=(ROOT / source).read_text(encoding="utf-8")))
    for source, target in PICTURES.items():
        files.append(File.generated(config, target, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point links between files of the repository at pages of the site."""
    place = page.file.src_uri
    source = next((file for file, target in PAGES.items() if target == place), f"docs/{place}")

    def replace(link: re.Match[str]) -> str:
        image, text, target, anchor = link.groups(default="")
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if not os.path.exists(ROOT / path):
            return link[0]  # mkdocs reports it
        shown = {**PAGES, **PICTURES}.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else None)
        if shown is None:
            return f"`{text}`" if "`" not in text else text
        return f"{image}[{text}]({posixpath.relpath(shown, posixpath.dirname(place) or '.')}{anchor})"

    return LINK.sub(replace, markdown)
