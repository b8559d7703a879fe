"""Diagrams of boxes and arrows: flow charts with decisions, organisation charts, and cycles of steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from molmo_edge.data.choices import pick, some, whole
from molmo_edge.data.drawn.colours import COLOURS, Colour, ink_on
from molmo_edge.data.drawn.fonts import Fonts, Lettering, Type
from molmo_edge.data.drawn.invented import company, goods, person
from molmo_edge.data.drawn.sheets import Drawing, Pair, Sheet

_STEPS = (
    "Open", "Read", "Check", "Sort", "Wash", "Pack", "Weigh", "Print", "Send", "Store", "Count", "Clean", "Paint",
    "Cut", "Test", "Repair", "Label", "Collect", "Order", "Return", "Measure", "Stack", "Dry", "Mix",
)  # fmt: skip
_ASKED = (
    "Is it complete?", "Is it heavy?", "In stock?", "Is it paid?", "Too large?", "Approved?", "Any damage?",
    "Is it new?",
)  # fmt: skip
_ROLES = (
    "Director", "Sales", "Finance", "Design", "Support", "Research", "Transport", "Kitchen", "Security", "Training",
    "Legal", "Repairs", "Archive", "Planning", "Purchasing", "Quality",
)  # fmt: skip


@dataclass
class _Node:
    text: str
    colour: str = "white"
    decision: bool = False
    x: float = 0.0  # middle, pixels
    y: float = 0.0


@dataclass
class _Graph:
    kind: str
    title: str
    nodes: list[_Node]
    arrows: list[tuple[int, int, str]]  # from, to, text next to it
    layers: list[list[int]]  # from the top or left; one for a circle


@dataclass(frozen=True)
class _Style(Lettering):
    ink: Colour
    paper: Colour
    round: float  # corner radius, pixels
    sideways: bool  # from left to right instead of top to bottom
    width: float  # of a box
    height: float


def draw_diagram(rng: np.random.Generator, fonts: Fonts) -> Drawing:
    """A flow chart, a tree or a circle of 3 to 13 boxes."""
    graph = pick(rng, (_flow, _tree, _circle))(rng)
    palette = some(rng, list(COLOURS), whole(rng, 1, 3))
    for node in graph.nodes:
        node.colour = pick(rng, palette) if rng.random() < 0.8 else "white"
    sheet, style = _arrange(rng, fonts, graph)
    if graph.title:
        sheet.text(sheet.width / 2, 14, graph.title, style.font(1.3, bold=True), style.ink, "ma")
    for start, end, text in graph.arrows:
        _arrow(sheet, style, graph.nodes[start], graph.nodes[end], text, straight=graph.kind == "circle")
    for node in graph.nodes:
        _box(sheet, style, node)
    data: dict[str, Any] = {
        "kind": graph.kind,
        "nodes": [[node.text, node.colour] for node in graph.nodes],
        "arrows": [list(arrow) for arrow in graph.arrows],
    }
    return sheet.drawing(rng, _ask(rng, graph), data)


# --- what it shows ------------------------------------------------------------------------------------------------


def _flow(rng: np.random.Generator) -> _Graph:
    """A sequence of steps; a decision splits it into two branches, which may join again."""
    things = goods(rng, 16, short=True)
    names = [f"{verb} the {thing.lower()}" for verb, thing in zip(some(rng, _STEPS, 16), things, strict=True)]
    layers, nodes, arrows = [[0]], [_Node("Start")], []
    ends = [(0, "")]  # open ends, and the text of their next arrow
    asked = some(rng, _ASKED, 3)
    steps = whole(rng, 2, 5)
    for step in range(steps):
        first = len(nodes)
        if len(ends) == 1 and asked and step + 1 < steps and rng.random() < 0.5:
            nodes.append(_Node(asked.pop(), decision=True))
            arrows.append((ends[0][0], first, ends[0][1]))
            answers = ["Yes", "No"] if rng.random() < 0.5 else ["No", "Yes"]
            ends = [(first, answer) for answer in answers]
        else:
            # Not directly after a decision: its two answers would label the same arrow.
            join = len(ends) > 1 and not ends[0][1] and rng.random() < 0.4
            for i, (end, text) in enumerate(ends):
                if not join or i == 0:
                    nodes.append(_Node(names.pop()))
                arrows.append((end, len(nodes) - 1, text))
            ends = [(i, "") for i in range(first, len(nodes))]
        layers.append(list(range(first, len(nodes))))
    nodes.append(_Node("End"))
    arrows += [(end, len(nodes) - 1, text) for end, text in ends]
    layers.append([len(nodes) - 1])
    title = f"How we {nodes[1].text.lower()}" if not nodes[1].decision and rng.random() < 0.5 else ""
    return _Graph("flow", title, nodes, arrows, layers)


def _tree(rng: np.random.Generator) -> _Graph:
    """A root, two to four children, and up to three children of each."""
    nodes, arrows = [_Node(person(rng) if rng.random() < 0.4 else _ROLES[0])], []
    names = some(rng, _ROLES[1:], 15)
    middle = list(range(1, 1 + whole(rng, 2, 4)))
    nodes += [_Node(names.pop()) for _ in middle]
    arrows += [(0, i, "") for i in middle]
    for i in middle:
        for _ in range(whole(rng, 0, 2 if len(middle) > 3 else 3)):
            arrows.append((i, len(nodes), ""))
            nodes.append(_Node(names.pop()))
    lowest = list(range(len(middle) + 1, len(nodes)))
    title = company(rng) if rng.random() < 0.6 else ""
    return _Graph("tree", title, nodes, arrows, [layer for layer in ([0], middle, lowest) if layer])


def _circle(rng: np.random.Generator) -> _Graph:
    amount = whole(rng, 3, 7)
    nodes = [_Node(text) for text in some(rng, _STEPS, amount)]
    title = f"The {pick(rng, ('daily', 'weekly', 'yearly'))} cycle" if rng.random() < 0.6 else ""
    return _Graph("circle", title, nodes, [(i, (i + 1) % amount, "") for i in range(amount)], [list(range(amount))])


# --- drawing ------------------------------------------------------------------------------------------------------


def _arrange(rng: np.random.Generator, fonts: Fonts, graph: _Graph) -> tuple[Sheet, _Style]:
    """Place the boxes. Returns a sheet that fits them, and the style."""
    face, size = pick(rng, fonts.faces), float(rng.uniform(14, 18))
    ruler = Sheet(1, 1, (255, 255, 255), scale=2)
    width = max(
        ruler.measure(node.text, Type(face.regular, size)) * (1.55 if node.decision else 1) for node in graph.nodes
    )
    width, height = width + size * 1.6, size * (3.4 if any(node.decision for node in graph.nodes) else 2.4)
    paper: Colour = pick(rng, ((255, 255, 255), (250, 248, 240), (240, 244, 248)))
    sideways = graph.kind == "flow" and len(graph.layers) <= 5 and rng.random() < 0.6
    style = _Style(face, size, (40, 40, 48), paper, pick(rng, (0.0, 6.0, 12.0)), sideways, width, height)
    head = size * 2.6 if graph.title else 0.0
    if graph.kind == "circle":
        radius = max(width, height) * len(graph.nodes) / math.pi * 0.62 + width * 0.35
        half_x, half_y = radius + width / 2 + 24, radius * 0.8 + height / 2 + 24
        for i, node in enumerate(graph.nodes):
            turn = 2 * math.pi * i / len(graph.nodes)
            node.x, node.y = half_x + radius * math.sin(turn), head + half_y - 0.8 * radius * math.cos(turn)
        return Sheet(round(2 * half_x), round(head + 2 * half_y), paper, scale=2), style
    along = (width if sideways else height) + size * (5 if sideways else 2.6)  # from layer to layer
    beside = (height if sideways else width) + size * 1.6  # from box to box
    across = beside * max(sum(_leaves(graph).values()), *map(len, graph.layers))
    slots = _slots(graph)
    for depth, layer in enumerate(graph.layers):
        for at in layer:
            place = (24 + across * slots[at], 24 + along * depth + (width if sideways else height) / 2)
            node = graph.nodes[at]
            node.x, node.y = (place[1], head + place[0]) if sideways else (place[0], head + place[1])
    extent = 48 + along * (len(graph.layers) - 1) + (width if sideways else height)
    wide, high = (extent, across + 48) if sideways else (across + 48, extent)
    wide = max(wide, ruler.measure(graph.title, Type(face.bold, size * 1.3)) + 48)
    return Sheet(round(wide), round(head + high), paper, scale=2), style


def _leaves(graph: _Graph) -> dict[int, int]:
    """The width of each branch of a tree's middle layer, in boxes."""
    below = [start for start, _, _ in graph.arrows]
    return {at: max(1, below.count(at)) for at in graph.layers[1]} if graph.kind == "tree" else {}


def _slots(graph: _Graph) -> dict[int, float]:
    """Position of each box across the sheet, 0 to 1. In a tree, children are below their parent."""
    slots = {at: (i + 0.5) / len(layer) for layer in graph.layers for i, at in enumerate(layer)}
    leaves, left = _leaves(graph), 0
    for at, wide in leaves.items():
        slots[at] = (left + wide / 2) / sum(leaves.values())
        for i, below in enumerate(end for start, end, _ in graph.arrows if start == at):
            slots[below] = (left + i + 0.5) / sum(leaves.values())
        left += wide
    return slots


def _box(sheet: Sheet, style: _Style, node: _Node) -> None:
    w, h = style.width / 2, style.height / 2
    fill: Colour = COLOURS.get(node.colour, (255, 255, 255))
    x, y = node.x, node.y
    if node.decision:
        sheet.polygon([(x - w, y), (x, y - h), (x + w, y), (x, y + h)], fill, style.ink)
    elif node.text in ("Start", "End"):
        sheet.box((x - w * 0.7, y - h * 0.7, x + w * 0.7, y + h * 0.7), fill, style.ink, 1.5, radius=h * 0.7)
    else:
        sheet.box((x - w, y - h * 0.75, x + w, y + h * 0.75), fill, style.ink, 1.5, radius=style.round)
    sheet.text(x, y, node.text, style.font(), ink_on(fill), "mm")


def _arrow(sheet: Sheet, style: _Style, start: _Node, end: _Node, text: str, straight: bool) -> None:
    """Draw an arrow from edge to edge: with two corners in a flow or tree, straight in a circle."""
    w, h = style.width / 2, style.height / 2
    if straight:
        points = [_edge(start, end, w, h * 0.75), _edge(end, start, w, h * 0.75)]
    elif style.sideways:
        a, b = start.x + _reach(start, w, 1), end.x - _reach(end, w, 1)
        middle = b - style.size * 1.6
        points = [(a, start.y), (middle, start.y), (middle, end.y), (b, end.y)]
    else:
        a, b = start.y + _reach(start, h, 0.75), end.y - _reach(end, h, 0.75)
        middle = b - style.size * 1.2
        points = [(start.x, a), (start.x, middle), (end.x, middle), (end.x, b)]
    sheet.line(points, style.ink, 1.6)
    _head(sheet, points[-2] if points[-2] != points[-1] else points[0], points[-1], style)
    if text:  # next to the arrow's end, where no other arrow runs
        x, y = points[-1]
        place = (x + 8, y - style.size * 0.2, "ld")
        if style.sideways:
            place = (x - style.size * 0.8, *((y - 5, "rd") if end.y <= start.y else (y + 5, "ra")))
        sheet.text(place[0], place[1], text, style.font(0.9, bold=True), style.ink, place[2])


def _reach(node: _Node, half: float, plain: float) -> float:
    """Distance from the middle of a box to its edge, along the flow."""
    return half if node.decision else half * (0.7 if node.text in ("Start", "End") else plain)


def _edge(node: _Node, other: _Node, w: float, h: float) -> tuple[float, float]:
    """Where the line between the middles of two boxes leaves the first."""
    dx, dy = other.x - node.x, other.y - node.y
    share = min(w / abs(dx) if dx else math.inf, h / abs(dy) if dy else math.inf)
    return node.x + dx * share, node.y + dy * share


def _head(sheet: Sheet, before: tuple[float, float], tip: tuple[float, float], style: _Style) -> None:
    turn = math.atan2(tip[1] - before[1], tip[0] - before[0])
    length = style.size * 0.7
    sides = [(tip[0] - length * math.cos(turn + d), tip[1] - length * math.sin(turn + d)) for d in (0.45, -0.45)]
    sheet.polygon([tip, *sides], style.ink)


# --- questions ----------------------------------------------------------------------------------------------------


def _ask(rng: np.random.Generator, graph: _Graph) -> list[Pair]:
    names = [node.text for node in graph.nodes]
    after: dict[int, list[int]] = {i: [end for start, end, _ in graph.arrows if start == i] for i in range(len(names))}
    before: dict[int, list[int]] = {i: [start for start, end, _ in graph.arrows if end == i] for i in range(len(names))}
    asked: list[Pair] = [
        (pick(rng, ("How many boxes are in the diagram?", "How many boxes does the diagram have?")), str(len(names))),
        ("How many arrows are in the diagram?", str(len(graph.arrows))),
    ]
    if graph.title:
        asked.append(("What is the title of the diagram?", graph.title))
    asked += [(f'What color is the box "{node.text}"?', node.colour) for node in graph.nodes]
    for colour in sorted({node.colour for node in graph.nodes}):
        asked.append((f"How many boxes are {colour}?", str(sum(node.colour == colour for node in graph.nodes))))
    if graph.kind == "tree":
        return asked + _about_tree(graph, names, after, before)
    for i, name in enumerate(names):
        if len(after[i]) == 1:
            asked.append((f'What comes directly after "{name}"?', names[after[i][0]]))
        if len(before[i]) == 1:
            asked.append((f'What comes directly before "{name}"?', names[before[i][0]]))
    for start, end, text in graph.arrows:
        if text:
            asked.append((f'Where does "{text}" lead to from "{names[start]}"?', names[end]))
            asked.append((f'Which answer to "{names[start]}" leads to "{names[end]}"?', text))
    if graph.kind == "flow":
        decisions = sum(node.decision for node in graph.nodes)
        asked.append((pick(rng, ("How many decisions are there?", "How many diamonds are there?")), str(decisions)))
    else:
        a = whole(rng, 0, len(names) - 1)
        asked.append((f'Starting at "{names[a]}", which step is two steps later?', names[(a + 2) % len(names)]))
    return asked


def _about_tree(
    graph: _Graph, names: list[str], after: dict[int, list[int]], before: dict[int, list[int]]
) -> list[Pair]:
    asked: list[Pair] = [
        ("What stands at the top of the diagram?", names[0]),
        ("How many levels does the diagram have?", str(len(graph.layers))),
        ("How many boxes have nothing below them?", str(sum(not below for below in after.values()))),
    ]
    for i, name in enumerate(names):
        if before[i]:
            asked.append((f"What is directly above {name}?", names[before[i][0]]))
        asked.append((f"How many boxes are directly below {name}?", str(len(after[i]))))
        if after[i]:
            asked.append((f"Which boxes are directly below {name}?", ", ".join(names[below] for below in after[i])))
    return asked
