"""Tables of named rows and columns of numbers, with questions whose answers are computed."""

from __future__ import annotations

import numpy as np

from molmo_edge.data.choices import pick, some, whole
from molmo_edge.data.drawn.documents import INK, MARGIN, new_page
from molmo_edge.data.drawn.fonts import Fonts
from molmo_edge.data.drawn.invented import MONTHS, first_names, goods, towns
from molmo_edge.data.drawn.sheets import Drawing, Pair, about_numbers


def draw_table(rng: np.random.Generator, fonts: Fonts) -> Drawing:
    """A ruled, striped or plain table, 640 to 860 pixels wide."""
    rows = whole(rng, 3, 10)
    by, names = pick(rng, (("Town", towns), ("Article", goods), ("Name", first_names)))
    labels = names(rng, rows)
    heads = some(rng, ("Sold", "Returned", "Stock", "Points", "Visits", "Hours", "Weight", "Orders"), whole(rng, 2, 4))
    if rng.random() < 0.3:
        heads = [month[:3] for month in MONTHS[: len(heads)]]
    most = pick(rng, (20, 100, 1000, 10000))
    columns = {head: [whole(rng, 0, most) for _ in labels] for head in heads}
    page = new_page(rng, fonts)
    title = f"{pick(rng, ('Report', 'Overview', 'Results', 'Figures'))} {whole(rng, 1998, 2029)}"
    page.say(title, 1.3, bold=True, align=pick(rng, ("l", "m")))
    page.skip(0.6)
    width = page.sheet.width - 2 * MARGIN
    narrowest = max(page.sheet.measure(text, page.font(bold=True)) for text in (*heads, str(most))) + 14
    share = min(float(rng.uniform(0.3, 0.4)), 1 - len(heads) * narrowest / width)
    steps = [0.0, *(share + (1 - share) * i / len(heads) for i in range(len(heads) + 1))]
    edges = [MARGIN + width * step for step in steps]
    striped, ruled = rng.random() < 0.5, rng.random() < 0.5
    shade = pick(rng, ((226, 234, 245), (232, 240, 228), (238, 238, 238)))
    top, height = page.y, page.size * 1.6
    lines = [[name, *(str(columns[head][row]) for head in heads)] for row, name in enumerate(labels)]
    for i, texts in enumerate([[by, *heads], *lines]):
        if striped and i % 2 == 0:
            page.sheet.box((edges[0], page.y - 4, edges[-1], page.y - 4 + height), shade)
        page.cells(edges, texts, bold=i == 0)
    for i in range(rows + 2) if ruled else (0, 1, rows + 1):
        page.sheet.line([(edges[0], top - 4 + i * height), (edges[-1], top - 4 + i * height)], INK)
    for x in edges if ruled else ():
        page.sheet.line([(x, top - 4), (x, page.y - 4)], INK)
    data = {"kind": "table", "by": by, "labels": labels, "columns": columns}
    asked = [("What is the title of the table?", title), *_about_table(rng, by, labels, columns)]
    return page.finished(rng, asked, data)


def _about_table(rng: np.random.Generator, by: str, labels: list[str], columns: dict[str, list[int]]) -> list[Pair]:
    asked: list[Pair] = [
        ("How many rows does the table have, without the header?", str(len(labels))),
        ("How many columns does the table have?", str(len(columns) + 1)),
        ("What is the header of the first column?", by),
    ]
    for head, values in columns.items():
        found = dict(zip(labels, values, strict=True))
        for name in some(rng, labels, 2):
            asks = pick(rng, (f'What is "{head}" of {name}?', f"What stands at {name} under {head}?"))
            asked.append((asks, str(found[name])))
        asked += about_numbers(rng, found, by.lower(), f' under "{head}"')
        asked.append((f'What is the sum of the column "{head}"?', str(sum(values))))
        limit = sorted(values)[len(values) // 2]
        asked.append((f'How many rows have more than {limit} under "{head}"?', str(sum(v > limit for v in values))))
    row = whole(rng, 0, len(labels) - 1)
    asked.append((f"What is the sum of the numbers of {labels[row]}?", str(sum(v[row] for v in columns.values()))))
    return asked
