"""Charts: columns, bars, lines, pies and scatter plots, with questions whose answers are computed.

Every value can be read exactly: it is written next to its mark, or is on a grid line or midway between two.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from molmo_edge.data.choices import pick, some, whole
from molmo_edge.data.drawn.colours import COLOURS, Colour, ink_on
from molmo_edge.data.drawn.fonts import Fonts, Lettering
from molmo_edge.data.drawn.invented import MONTHS, first_names, goods, town, towns
from molmo_edge.data.drawn.sheets import Box, Drawing, Pair, Sheet, about_numbers, number

_SHAPES = {"columns": 0.34, "bars": 0.18, "lines": 0.22, "pie": 0.14, "points": 0.12}
_STEPS = (2, 4, 10, 20, 40, 50, 100, 200, 500, 1000)  # between grid lines; half of each is an integer
_TOPICS = (
    ("Visitors", "people"), ("Rainfall", "mm"), ("Sales", "units"), ("Revenue", "thousand $"), ("Books lent", "books"),
    ("Energy used", "kWh"), ("New members", "members"), ("Harvest", "tonnes"), ("Passengers", "people"),
    ("Exports", "containers"), ("Points scored", "points"), ("Waste collected", "kg"), ("Calls answered", "calls"),
    ("Water used", "litres"), ("Trees planted", "trees"), ("Tickets sold", "tickets"), ("Meals served", "meals"),
    ("Parcels sent", "parcels"), ("Nights booked", "nights"), ("Bicycles counted", "bicycles"),
)  # fmt: skip


@dataclass(frozen=True)
class Chart:
    """What a chart shows."""

    shape: str  # of _SHAPES
    title: str
    what: str
    unit: str
    categories: list[str]
    series: dict[str, list[float]]  # name -> a value for each category; scatter plots: y
    step: float  # between two grid lines
    colours: dict[str, str]  # series (or categories, if there is one series) -> name in COLOURS
    labelled: bool  # values are written next to the marks
    across: dict[str, list[float]]  # scatter plots: group -> x

    def colour(self, series: str, category: str) -> Colour:
        """The colour of a mark: that of its series if it has one, otherwise that of its category."""
        return COLOURS[self.colours[series] if series in self.colours else self.colours[category]]

    @property
    def top(self) -> float:
        """Where the axis ends."""
        highest = max(v for values in self.series.values() for v in values)
        return self.step * max(2, math.ceil(highest / self.step))


@dataclass(frozen=True)
class _Style(Lettering):
    paper: Colour
    ink: Colour
    grid: Colour


def draw_chart(rng: np.random.Generator, fonts: Fonts, chart: Chart | None = None) -> Drawing:
    """A chart, 560 to 960 pixels wide. `chart`: what it shows; None: random."""
    chart = chart or _invent(rng)
    dark = rng.random() < 0.15
    paper: Colour = (28, 32, 40) if dark else pick(rng, ((255, 255, 255), (250, 248, 242), (242, 245, 250)))
    ink: Colour = (232, 232, 232) if dark else pick(rng, ((0, 0, 0), (40, 44, 52), (60, 30, 30)))
    grid: Colour = (70, 76, 88) if dark else (214, 214, 214)
    style = _Style(pick(rng, fonts.faces), float(rng.uniform(14, 20)), paper, ink, grid)
    sheet = Sheet(whole(rng, 560, 960), whole(rng, 400, 680), paper, scale=2)
    plot = _frame(rng, sheet, style, chart)
    draw = {"pie": _pie, "points": _points, "lines": _lines, "bars": _bars}.get(chart.shape, _columns)
    draw(sheet, style, chart, plot)
    return sheet.drawing(rng, _ask(rng, chart), asdict(chart))


# --- what it shows ------------------------------------------------------------------------------------------------


def _invent(rng: np.random.Generator) -> Chart:
    shape = str(rng.choice(list(_SHAPES), p=list(_SHAPES.values())))
    what, unit = pick(rng, _TOPICS)
    if shape == "points":
        return _invent_points(rng)
    by, categories = _categories(rng, shape)
    several = shape != "pie" and rng.random() < 0.45
    names = (goods(rng, 3, short=True) if by == "town" else towns(rng, 3))[: whole(rng, 2, 3)] if several else [what]
    step = pick(rng, _STEPS)
    values = {name: _values(rng, len(categories), step) for name in names}
    keys = categories if shape == "pie" or (not several and rng.random() < 0.4 and shape != "lines") else names
    colours = dict(zip(keys, some(rng, list(COLOURS), len(keys)), strict=False))
    labelled = not several and (shape == "pie" or rng.random() < 0.5)
    if shape == "pie":
        values = {what: _shares(rng, len(categories))}
    elif labelled:
        values = {name: [max(1, v + whole(rng, -step // 2, 0)) for v in row] for name, row in values.items()}
    title = f"{what} by {by}" if shape == "pie" or several or rng.random() < 0.5 else f"{what} in {town(rng)}"
    return Chart(shape, title, what, "%" if shape == "pie" else unit, categories, values, step, colours, labelled, {})


def _categories(rng: np.random.Generator, shape: str) -> tuple[str, list[str]]:
    """(kind, 3 to 8 names). Line charts have times as categories."""
    amount = whole(rng, 3, 6 if shape == "pie" else 8)
    kind = pick(rng, ("month", "year", "day") if shape == "lines" else ("month", "year", "town", "article", "name"))
    if kind == "month":
        first = whole(rng, 0, 12 - amount)
        return kind, [month[:3] for month in MONTHS[first : first + amount]]
    if kind == "year":
        first = whole(rng, 1990, 2024 - amount)
        return kind, [str(first + i) for i in range(amount)]
    if kind == "day":
        return kind, ["Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun"][:amount]
    if kind == "town":
        return kind, towns(rng, amount)
    return kind, goods(rng, amount, short=True) if kind == "article" else first_names(rng, amount)


def _values(rng: np.random.Generator, amount: int, step: int) -> list[float]:
    """Multiples of half a step, as different as possible."""
    levels = 2 * whole(rng, 4, 6)
    chosen = rng.permutation(np.arange(1, levels + 1))[:amount]
    return [int(level) * step // 2 for level in chosen]


def _shares(rng: np.random.Generator, amount: int) -> list[float]:
    """Integer percentages of at least 5 that sum to 100."""
    cuts = rng.multinomial(100 - 5 * amount, rng.dirichlet(np.full(amount, 1.5)))
    return [5 + int(cut) for cut in cuts]


def _invent_points(rng: np.random.Generator) -> Chart:
    groups = some(rng, ("Group A", "Group B", "Group C"), whole(rng, 1, 3))
    step = pick(rng, (2, 4, 10, 20))
    taken: set[tuple[int, int]] = set()  # so that no point hides another
    across: dict[str, list[float]] = {}
    up: dict[str, list[float]] = {}
    for group in groups:
        spots: list[tuple[int, int]] = []
        for _ in range(whole(rng, 3, 9)):
            spot = (whole(rng, 1, 12), whole(rng, 1, 10))
            if spot not in taken:
                taken.add(spot)
                spots.append(spot)
        across[group] = [x * step // 2 for x, _ in spots]
        up[group] = [y * step // 2 for _, y in spots]
    colours = dict(zip(groups, some(rng, list(COLOURS), len(groups)), strict=True))
    first, second = some(rng, ("Width", "Height", "Age", "Weight", "Speed", "Price", "Depth", "Score"), 2)
    return Chart("points", f"{second} against {first}", second, first, [], up, step, colours, False, across)


# --- drawing ------------------------------------------------------------------------------------------------------


def _frame(rng: np.random.Generator, sheet: Sheet, style: _Style, chart: Chart) -> Box:
    """Draw title and legend. Returns the remaining box."""
    pad, y, title = style.size, style.size * 0.8, style.font(1.35, bold=True)
    for line in sheet.wrap(chart.title, title, sheet.width - 2 * pad):
        sheet.text(sheet.width / 2, y, line, title, style.ink, "ma")
        y += title.line
    right = float(sheet.width - pad)
    if len(chart.series) > 1 or chart.shape in ("pie", "points"):
        width = max(sheet.measure(name, style.font()) for name in chart.colours) + style.size * 1.6
        left, middle = right - width, (y + sheet.height - len(chart.colours) * style.font().line) / 2
        start = middle if rng.random() < 0.5 else y + style.size
        for i, (name, colour) in enumerate(chart.colours.items()):
            top = start + i * style.font().line
            sheet.box((left, top, left + style.size, top + style.size), COLOURS[colour])
            sheet.text(left + style.size * 1.5, top + style.size / 2, name, style.font(), style.ink, "lm")
        right = left - pad
    return (pad, y + style.size, right, sheet.height - pad)


def _ticks(limit: float, step: float) -> list[float]:
    return [step * i for i in range(round(limit / step) + 1)]


def _plot(sheet: Sheet, style: _Style, chart: Chart, box: Box, below: float) -> Box:
    """Draw the grid, numbers and name of the vertical axis. Returns the box between the axes."""
    numbers = max(sheet.measure(number(t), style.font()) for t in _ticks(chart.top, chart.step))
    name = chart.what if chart.shape == "points" else f"{chart.what} ({chart.unit})"
    left = box[0] + style.font().line + numbers + 6
    plot = (left, box[1], box[2], box[3] - below)
    for tick in _ticks(chart.top, chart.step):
        y = _level(chart, plot, tick)
        sheet.line([(plot[0], y), (plot[2], y)], style.grid)
        sheet.text(plot[0] - 6, y, number(tick), style.font(), style.ink, "rm")
    fit = min(1.0, 0.95 * (plot[3] - plot[1]) / sheet.measure(name, style.font()))
    font = style.font(fit)
    sheet.text(box[0] + style.size / 2, (plot[1] + plot[3]) / 2, name, font, style.ink, turn=90)
    sheet.line([(plot[0], plot[1]), (plot[0], plot[3]), (plot[2], plot[3])], style.ink, 1.5)
    return plot


def _lower_axis(sheet: Sheet, style: _Style, plot: Box, most: float, step: float, name: str) -> float:
    """Draw the grid, numbers and name of the horizontal axis. Returns the pixels of one unit."""
    scale = (plot[2] - plot[0]) / most
    for tick in _ticks(most, step):
        x = plot[0] + tick * scale
        sheet.line([(x, plot[1]), (x, plot[3])], style.grid)
        sheet.text(x, plot[3] + 5, number(tick), style.font(), style.ink, "ma")
    sheet.text((plot[0] + plot[2]) / 2, plot[3] + style.size * 3, name, style.font(), style.ink, "md")
    return scale


def _level(chart: Chart, plot: Box, value: float) -> float:
    return plot[3] - value / chart.top * (plot[3] - plot[1])


def _categories_below(sheet: Sheet, style: _Style, chart: Chart, box: Box) -> tuple[Box, list[float]]:
    """Draw axes with the categories below, vertically if they are long. Returns the plot and the middle of each."""
    longest = max(sheet.measure(name, style.font()) for name in chart.categories)
    upward = longest > (box[2] - box[0] - 4 * style.size) / len(chart.categories) - 8
    plot = _plot(sheet, style, chart, box, (longest if upward else style.size) + style.size * 0.7)
    slot = (plot[2] - plot[0]) / len(chart.categories)
    middles = [plot[0] + slot * (i + 0.5) for i in range(len(chart.categories))]
    for x, name in zip(middles, chart.categories, strict=True):
        if upward:
            sheet.text(x, plot[3] + 6 + sheet.measure(name, style.font()) / 2, name, style.font(), style.ink, turn=90)
        else:
            sheet.text(x, plot[3] + 6, name, style.font(), style.ink, "ma")
    return plot, middles


def _columns(sheet: Sheet, style: _Style, chart: Chart, box: Box) -> None:
    plot, middles = _categories_below(sheet, style, chart, box)
    width = (plot[2] - plot[0]) / len(middles) * 0.72 / len(chart.series)
    for i, (name, values) in enumerate(chart.series.items()):
        for middle, category, value in zip(middles, chart.categories, values, strict=True):
            left, y = middle + (i - len(chart.series) / 2) * width, _level(chart, plot, value)
            sheet.box((left, y, left + width * 0.94, plot[3]), chart.colour(name, category))
            if chart.labelled:
                sheet.text(middle, y - 3, number(value), style.font(), style.ink, "mb")


def _bars(sheet: Sheet, style: _Style, chart: Chart, box: Box) -> None:
    """Horizontal bars: categories on the left, numbers below."""
    names = max(sheet.measure(name, style.font()) for name in chart.categories)
    plot = (box[0] + names + 8, box[1], box[2] - style.size * 2, box[3] - style.size * 3)
    scale = _lower_axis(sheet, style, plot, chart.top, chart.step, f"{chart.what} ({chart.unit})")
    slot = (plot[3] - plot[1]) / len(chart.categories)
    height = slot * 0.72 / len(chart.series)
    for row, category in enumerate(chart.categories):
        middle = plot[1] + slot * (row + 0.5)
        sheet.text(plot[0] - 6, middle, category, style.font(), style.ink, "rm")
        for i, (name, values) in enumerate(chart.series.items()):
            top, right = middle + (i - len(chart.series) / 2) * height, plot[0] + values[row] * scale
            sheet.box((plot[0], top, right, top + height * 0.94), chart.colour(name, category))
            if chart.labelled:
                sheet.text(right + 4, middle, number(values[row]), style.font(), style.ink, "lm")
    sheet.line([(plot[0], plot[1]), (plot[0], plot[3]), (plot[2], plot[3])], style.ink, 1.5)


def _lines(sheet: Sheet, style: _Style, chart: Chart, box: Box) -> None:
    plot, middles = _categories_below(sheet, style, chart, box)
    for name, values in chart.series.items():
        points = [(x, _level(chart, plot, value)) for x, value in zip(middles, values, strict=True)]
        sheet.line(points, COLOURS[chart.colours[name]], 2.5)
        for i, (x, y) in enumerate(points):
            sheet.ellipse((x - 4, y - 4, x + 4, y + 4), COLOURS[chart.colours[name]])
            if chart.labelled:  # on the outer side of a bend, clear of the line
                valley = values[i] <= min(values[max(0, i - 1) : i + 2])
                side = (y + 7, "ma") if valley and y + 7 + style.size < plot[3] else (y - 7, "mb")
                sheet.text(x, side[0], number(values[i]), style.font(), style.ink, side[1])


def _points(sheet: Sheet, style: _Style, chart: Chart, box: Box) -> None:
    plot = _plot(sheet, style, chart, box, style.size * 3)
    most = chart.step * math.ceil(max(x for xs in chart.across.values() for x in xs) / chart.step)
    scale = _lower_axis(sheet, style, plot, most, chart.step, chart.unit)
    for group, xs in chart.across.items():
        for x, y in zip(xs, chart.series[group], strict=True):
            cx, cy = plot[0] + x * scale, _level(chart, plot, y)
            sheet.ellipse((cx - 5, cy - 5, cx + 5, cy + 5), COLOURS[chart.colours[group]], style.paper, 0.5)


def _pie(sheet: Sheet, style: _Style, chart: Chart, box: Box) -> None:
    radius = min(box[2] - box[0], box[3] - box[1]) / 2 - 4
    cx, cy, s = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2, sheet.scale
    outer = [(cx - radius) * s, (cy - radius) * s, (cx + radius) * s, (cy + radius) * s]
    turn = -90.0  # twelve o'clock
    for category, share in zip(chart.categories, next(iter(chart.series.values())), strict=True):
        fill = COLOURS[chart.colours[category]]
        sheet.draw.pieslice(outer, turn, turn + share * 3.6, fill, style.paper, 2 * s)
        middle = math.radians(turn + share * 1.8)
        x, y = cx + 0.72 * radius * math.cos(middle), cy + 0.72 * radius * math.sin(middle)
        sheet.text(x, y, f"{number(share)}%", style.font(), ink_on(fill), "mm")
        turn += share * 3.6


# --- questions ----------------------------------------------------------------------------------------------------


def _ask(rng: np.random.Generator, chart: Chart) -> list[Pair]:
    kind = {"pie": "pie chart", "lines": "line chart", "points": "scatter plot"}.get(chart.shape, "bar chart")
    asked = [
        (pick(rng, ("What is the title of the chart?", "What is this chart called?")), chart.title),
        (pick(rng, ("What kind of chart is this?", "Which type of chart is shown?")), kind),
    ]
    if chart.shape == "points":
        return asked + _about_points(rng, chart)
    asked.append(("In which unit are the values?", chart.unit.replace("%", "percent")))
    if len(chart.series) > 1:
        for name in chart.series:
            asked += _about_values(rng, chart, chart.series[name], f" for {name}")
        return asked + _about_series(rng, chart)
    asked += _about_values(rng, chart, next(iter(chart.series.values())), "")
    for category, colour in chart.colours.items():
        if category in chart.categories:
            asked.append((f"What color is {category}?", colour))
    return asked


def _about_values(rng: np.random.Generator, chart: Chart, values: Sequence[float], of: str) -> list[Pair]:
    """`of`: " for NAME" if there are several series."""
    sign = "%" if chart.shape == "pie" else ""
    found = dict(zip(chart.categories, values, strict=True))
    asked: list[Pair] = [("How many categories are there?", str(len(found)))]
    for name in some(rng, chart.categories, 3):
        asked.append((f"What is the value of {name}{of}?", number(found[name]) + sign))
    asked += about_numbers(rng, found, "category", of, sign)
    ranked = sorted(found, key=lambda name: found[name])
    if len(set(values)) == len(values):
        asked.append((f"Which category has the second highest value{of}?", ranked[-2]))
    if not sign:
        asked.append((f"What is the total of all values{of}?", number(sum(values))))
        limit = chart.step * whole(rng, 1, max(1, round(chart.top / chart.step) - 1))
        asked.append((f"How many categories are above {number(limit)}{of}?", str(sum(v > limit for v in values))))
    if chart.shape == "lines":
        at = whole(rng, 1, len(values) - 1)
        change = "It rises." if values[at] > values[at - 1] else "It falls."
        if values[at] != values[at - 1]:
            times = f"from {chart.categories[at - 1]} to {chart.categories[at]}"
            asked.append((f"Does the line rise or fall {times}{of}?", change))
    return asked


def _about_series(rng: np.random.Generator, chart: Chart) -> list[Pair]:
    asked: list[Pair] = [("How many series does the legend name?", str(len(chart.series)))]
    asked += [(f"Which color stands for {name}?", chart.colours[name]) for name in chart.series]
    at = whole(rng, 0, len(chart.categories) - 1)
    here = {name: values[at] for name, values in chart.series.items()}
    best = max(here, key=lambda name: here[name])
    if list(here.values()).count(here[best]) == 1:
        asked.append((f"Which series is highest in {chart.categories[at]}?", best))
    asked.append((f"What do all series make together in {chart.categories[at]}?", number(sum(here.values()))))
    return asked


def _about_points(rng: np.random.Generator, chart: Chart) -> list[Pair]:
    asked: list[Pair] = [("How many points are there in all?", str(sum(map(len, chart.series.values()))))]
    asked += [("What does the horizontal axis show?", chart.unit), ("What does the vertical axis show?", chart.what)]
    for group, ys in chart.series.items():
        xs = chart.across[group]
        asked.append((f"How many points belong to {group}?", str(len(ys))))
        asked.append((f"What color are the points of {group}?", chart.colours[group]))
        asked.append((f"What is the highest {chart.what.lower()} of {group}?", number(max(ys))))
        asked.append((f"What is the lowest {chart.unit.lower()} of {group}?", number(min(xs))))
        if ys.count(max(ys)) == 1:
            at = number(xs[ys.index(max(ys))])
            asked.append((f"What is the {chart.unit.lower()} of the highest point of {group}?", at))
        limit = chart.step * whole(rng, 1, 4)
        asked.append((f"How many points of {group} are above {number(limit)}?", str(sum(y > limit for y in ys))))
    return asked
