"""The layers of the package and the imports of its modules, for test_import_rule.py and docs/draw_architecture.py."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

ROOT = Path(__file__).parent.parent

# From top to bottom: a module imports only from its own layer and from those below it. "molmo_edge" is the package
# itself, whose __init__.py looks the public names up; no module imports from it.
LAYERS = (
    "molmo_edge",
    "cli",
    "server",
    "training",
    "evaluation",
    "data",
    "export",
    "quantize",
    "sdk",
    "runtimes",
    "modeling",
    "checkpoints",
    "frontend",
    "base",
)
# The layer of what is directly in molmo_edge/ and is not a folder with the name of its layer.
LAYER_OF = {
    "molmo": "sdk",
    "answer": "sdk",
    "chat": "sdk",
    "selfcheck": "sdk",
    "images": "frontend",
    "points": "frontend",
    "config": "base",
    "presets": "base",
    "errors": "base",
    "model_names": "base",
    "system": "base",
    "__main__": "cli",
}
SIBLINGS = ("export", "quantize", "runtimes")  # folders beside molmo_edge/ that are installed as its subpackages


def layer(module: str) -> str:
    """The layer of a module. Raises ValueError for one that has none: add it to LAYER_OF."""
    name = module.split(".")[1] if "." in module else module
    found = LAYER_OF.get(name, name)
    if found not in LAYERS:
        raise ValueError(f"{module} belongs to no layer: add {name!r} to LAYER_OF in tests/import_graph.py")
    return found


def module_files(root: Path = ROOT) -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    files = {}
    for folder in ("molmo_edge", *SIBLINGS):
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            files[".".join(parts if folder == "molmo_edge" else ("molmo_edge", *parts))] = path
    return files


def imports(root: Path = ROOT) -> dict[str, set[str]]:
    """For each module, the modules of the package that it imports, in functions and for type checkers too."""
    files = module_files(root)
    graph: dict[str, set[str]] = {}
    for module, path in files.items():
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        graph[module] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                source = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
                names = [f"{source}.{alias.name}" for alias in node.names]
                names = [name if name in files else source for name in names]
            graph[module] |= {name for name in names if name in files and name != module}
    return graph
