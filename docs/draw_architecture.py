"""Draws the pictures of architecture.md: `python docs/draw_architecture.py`, or with --check to only compare.

docs/images/layers.svg shows the imports between packages as they are in the source; data.svg shows the way of the data.
"""

from __future__ import annotations

import sys
from html import escape
from pathlib import Path

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent / "tests"))

from import_graph import LAYERS, imports, layer  # noqa: E402 (its folder is added above)

HOLDS = {
    "cli": "one file per command",
    "server": "HTTP and MCP",
    "training": "stages, optimizer, FSDP2, LoRA",
    "evaluation": "benchmarks, losses, reports",
    "data": "data sets, prompts, mixture",
    "export": "ONNX graphs, GGUF, safetensors",
    "quantize": "rounding, GPTQ, calibration",
    "sdk": "Molmo, Answer, Scene, Chat",
    "runtimes": "onnxruntime, llama.cpp, PyTorch",
    "modeling": "the models in PyTorch",
    "checkpoints": "hub, tensor files, bundles",
    "frontend": "crops, tokenizer, prompts, points",
    "base": "config, errors, system",
}
INK, LINE, FILL, ACCENT, GREY = "#1f2937", "#cbd5e1", "#eef2ff", "#4f46e5", "#6b7280"
WRONG = "#dc2626"  # an import that goes up


def text(
    x: float, y: float, content: str, size: int = 13, color: str = INK, anchor: str = "middle", **more: str
) -> str:
    style = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in more.items())
    place = f'x="{x:g}" y="{y:g}" font-size="{size}" fill="{color}" text-anchor="{anchor}"{style}'
    return f"<text {place}>{escape(content)}</text>"


def box(x: float, y: float, width: float, height: float, fill: str = FILL, stroke: str = ACCENT) -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6" fill="{fill}" stroke="{stroke}"/>'


def line(x1: float, y1: float, x2: float, y2: float, color: str = LINE, arrow: bool = False) -> str:
    end = ' marker-end="url(#arrow)"' if arrow else ""
    return f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="{color}" stroke-width="1.5"{end}/>'


def svg(width: float, height: float, title: str, parts: list[str]) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        f'height="{height:g}" font-family="Helvetica, Arial, sans-serif" role="img"><title>{escape(title)}</title>'
    )
    arrow = (
        '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0 8 4 0 8z" fill="{ACCENT}"/></marker></defs>'
    )
    background = f'<rect width="{width:g}" height="{height:g}" fill="#ffffff"/>'
    return "\n".join([head, arrow, background, *parts, "</svg>", ""])


def package_imports() -> dict[str, set[str]]:
    """For each layer, the other layers that its modules import."""
    found: dict[str, set[str]] = {}
    for module, targets in imports().items():
        found.setdefault(layer(module), set()).update(layer(target) for target in targets)
    return {name: targets - {name} for name, targets in found.items()}


def draw_layers() -> str:
    """Packages on the diagonal; a dot below one and left of another: the first imports the second."""
    graph = package_imports()
    names = [name for name in LAYERS if name in graph and name != "molmo_edge"]
    step, row, wide, tall, left, top = 62, 40, 96, 28, 14, 50
    x = {name: left + step * place for place, name in enumerate(names)}
    y = {name: top + row * place for place, name in enumerate(names)}
    lines, dots, boxes = [], [], []
    for source in names:
        targets = sorted((name for name in graph[source] if name in y), key=names.index)
        down = x[source] + wide / 2
        if targets:
            lines.append(line(down, y[source] + tall, down, y[targets[-1]] + tall / 2))
        boxes.append(box(x[source], y[source], wide, tall))
        boxes.append(text(x[source] + wide / 2, y[source] + 18.5, source, font_weight="bold"))
        boxes.append(text(x[source] + wide + 8, y[source] + 18.5, HOLDS[source], 12, GREY, "start"))
        for name in targets:
            color = ACCENT if y[name] > y[source] else WRONG
            dots.append(f'<circle cx="{down:g}" cy="{y[name] + tall / 2:g}" r="5" fill="{color}"/>')
    for target in names:
        sources = [name for name in names if target in graph[name]]
        if sources:
            lines.append(line(x[sources[0]] + wide / 2, y[target] + tall / 2, x[target], y[target] + tall / 2))
    caption = text(
        left, 24, "A dot below a package and left of another: the first imports the second.", 13, INK, "start"
    )
    width, height = x[names[-1]] + wide + 225, y[names[-1]] + tall + 16
    return svg(width, height, "Imports between the packages of molmo-edge", [caption, *lines, *boxes, *dots])


# Each step of an answer: what runs, its module, and what it hands to the next step.
STEPS = (
    ("Load the image", "frontend/image_files.py", "uint8 [height, width, 3]"),
    ("Cut overlapping crops", "frontend/crops.py", "crops, masks, image tokens"),
    ("Encode the image", "Runtime.encode_image", "features [crops, 144, d_model]"),
    ("Build the prompt", "frontend/prompts.py, Runtime.embed", "embeddings [positions, d_model]"),
    ("Prefill", "Runtime.forward", "logits, keys and values"),
    ("Sample tokens", "runtimes/generate.py", "token ids"),
    ("Decode text and points", "frontend/tokenizer.py, points.py", "text, points in percent"),
    ("Return the Answer", "answer.py", ""),
)


def draw_data() -> str:
    """The steps of an answer in two rows, read from left to right."""
    wide, tall, gap, left, top, per_row = 196, 62, 40, 14, 40, 4
    parts = []
    for place, (what, where, gives) in enumerate(STEPS):
        column, level = place % per_row, place // per_row
        x, y = left + column * (wide + gap), top + level * 150
        of_engine = where.startswith(("Runtime", "runtimes"))
        parts.append(box(x, y, wide, tall, *(("#ecfdf5", "#059669") if of_engine else ())))
        parts.append(text(x + wide / 2, y + 26, what, 14, font_weight="bold"))
        parts.append(text(x + wide / 2, y + 46, where, 11, GREY))
        parts.append(text(x + wide / 2, y + tall + 20, f"→ {gives}" if gives else "", 12, ACCENT))
        if column < per_row - 1:
            parts.append(line(x + wide, y + tall / 2, x + wide + gap - 2, y + tall / 2, ACCENT, arrow=True))
        elif place < len(STEPS) - 1:
            middle, end = y + tall + 54, left + wide / 2
            parts.append(line(x + wide / 2, y + tall + 28, x + wide / 2, middle, ACCENT))
            parts.append(line(x + wide / 2, middle, end, middle, ACCENT))
            parts.append(line(end, middle, end, y + 148, ACCENT, arrow=True))
    width = 2 * left + per_row * wide + (per_row - 1) * gap
    parts.append(
        text(
            left,
            24,
            "Blue: molmo_edge, numpy only.  Green: the runtime, the only part that sees an engine.",
            13,
            INK,
            "start",
        )
    )
    return svg(width, top + 150 + tall + 40, "The way of the data from an image to an answer", parts)


def main(arguments: list[str]) -> int:
    status = 0
    for name, content in (("layers.svg", draw_layers()), ("data.svg", draw_data())):
        path = DOCS / "images" / name
        if "--check" not in arguments:
            path.write_text(content, encoding="utf-8")
        elif not path.is_file() or path.read_text(encoding="utf-8") != content:
            print(f"docs/images/{name} is out of date: run python docs/draw_architecture.py", file=sys.stderr)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
