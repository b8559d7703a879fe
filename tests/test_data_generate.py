"""Drawn data sets: answers match the pixels, and an interrupted run ends like an uninterrupted one."""

from __future__ import annotations

import io
import json
import math
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from molmo_edge.data.drawn import generate
from molmo_edge.data.drawn.charts import Chart, draw_chart
from molmo_edge.data.drawn.clocks import NOT_SHOWN, WITH_AM, WITHOUT_AM, describe, draw_clock
from molmo_edge.data.drawn.code import draw_code
from molmo_edge.data.drawn.colours import COLOURS
from molmo_edge.data.drawn.diagrams import draw_diagram
from molmo_edge.data.drawn.documents import draw_document
from molmo_edge.data.drawn.fonts import Face, FontError, Fonts, find_fonts
from molmo_edge.data.drawn.generate import KINDS, GenerateError, Materials, draw_picture
from molmo_edge.data.drawn.invented import money
from molmo_edge.data.drawn.pointing import SHAPES, count_row, labelled_scene, point_rows
from molmo_edge.data.drawn.sheets import Drawing
from molmo_edge.data.drawn.sprites import Assets
from molmo_edge.data.drawn.tables import draw_table
from molmo_edge.data.rows import load_rows

PAGES = {
    "charts": draw_chart,
    "tables": draw_table,
    "documents": draw_document,
    "diagrams": draw_diagram,
    "code": draw_code,
}
DOCS = ("image_id", "questions", "data")
COLUMNS = {
    "clocks": (
        "example_id", "watchface_id", "watchface_name", "watch_time", "time_format", "shows_seconds", "hour_visible",
        "minute_visible", "second_visible", "text",
    ),
    **dict.fromkeys(PAGES, DOCS),
    "points": ("image_sha256", "points", "count", "label", "collection_method"),
    "count": ("image_sha256", "count", "points", "label"),
}  # fmt: skip


@pytest.fixture(scope="module")
def fonts() -> Fonts:
    return find_fonts()


def rng(*seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def drawings(kind: str, fonts: Fonts, number: int) -> list[Drawing]:
    return [PAGES[kind](rng(9, i), fonts) for i in range(number)]


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# --- pictures -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_number_gives_the_same_bytes_soon(kind: str, fonts: Fonts) -> None:
    materials = Materials(fonts)
    began = time.process_time()
    first, second = draw_picture(kind, 3, 5, materials), draw_picture(kind, 3, 5, materials)
    assert time.process_time() - began < 4, "a picture takes seconds"
    assert first == second
    assert first.file != draw_picture(kind, 3, 6, materials).file
    assert first.file != draw_picture(kind, 4, 5, materials).file
    image = Image.open(io.BytesIO(first.file))
    assert image.format == {"jpg": "JPEG", "png": "PNG"}[first.ending]
    assert min(image.size) >= 150
    assert max(image.size) <= 2500
    assert all(tuple(row) == COLUMNS[kind] for row in first.rows)


@pytest.mark.parametrize("kind", PAGES)
@pytest.mark.parametrize("own", [False, True], ids=["all fonts", "Pillow's own"])
def test_pages_ask_and_answer_and_cut_no_word(kind: str, own: bool, fonts: Fonts) -> None:
    for drawing in drawings(kind, Fonts() if own else fonts, 8):
        assert len(drawing.questions) >= 4
        assert len({question for question, _ in drawing.questions}) == len(drawing.questions)
        for question, answer in drawing.questions:
            assert question.strip()
            assert answer.strip() == answer
            assert answer
        for box in drawing.texts:
            assert min(box[:2]) >= -1, (drawing.data, box)
            assert box[2] <= drawing.image.width + 1, (drawing.data, box)
            assert box[3] <= drawing.image.height + 1, (drawing.data, box)
        json.dumps(drawing.data)


def test_a_folder_without_a_usable_font_is_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.ttf").write_bytes(b"not a font")
    with pytest.raises(FontError, match=r"holds no \.ttf"):
        find_fonts(tmp_path)


def test_further_fonts_are_found_with_their_bold(tmp_path: Path, fonts: Fonts) -> None:
    given = next((face for face in fonts.faces if face.regular != face.bold), None)
    if given is None or given.regular is None or given.bold is None:
        pytest.skip("no font with a bold one is installed")
    for path, name in ((given.regular, "Own-Regular.ttf"), (given.bold, "Own-Bold.ttf")):
        (tmp_path / name).write_bytes(path.read_bytes())
    assert Face(tmp_path / "Own-Regular.ttf", tmp_path / "Own-Bold.ttf") in find_fonts(tmp_path).faces


# --- answers ------------------------------------------------------------------------------------------------------


def test_chart_answers_follow_from_what_is_drawn(fonts: Fonts) -> None:
    checked = set()
    for drawing in drawings("charts", fonts, 60):
        chart = Chart(**drawing.data)
        for question, answer in drawing.questions:
            found = re.fullmatch(
                r"(Which category has the|What is the) (highest|lowest)( value)?( for .+)?\?", question
            )
            if found and chart.categories:
                name = (found[4] or "").removeprefix(" for ")
                values = chart.series[name] if name else next(iter(chart.series.values()))
                best = (max if found[2] == "highest" else min)(values)
                wanted = chart.categories[values.index(best)] if found[1].startswith("Which") else f"{best:g}"
                assert answer.rstrip("%") == wanted, question
                checked.add(found[1])
            found = re.fullmatch(r"What is the sum of (\S+) and (\S+?)( for .+)?\?", question)
            if found:
                name = (found[3] or "").removeprefix(" for ")
                row = chart.series[name] if name else next(iter(chart.series.values()))
                both = sum(row[chart.categories.index(found[i])] for i in (1, 2))
                assert float(answer.rstrip("%")) == both
                checked.add("sum")
        if chart.shape == "pie":
            assert sum(next(iter(chart.series.values()))) == 100
        elif not chart.labelled:
            assert all(v * 2 % chart.step == 0 for values in chart.series.values() for v in values), "off the grid"
    assert checked == {"Which category has the", "What is the", "sum"}


def test_a_column_ends_where_its_value_is() -> None:
    """The heights of two columns in pixels have the ratio of their values."""
    values, colours = {"Sales": [40.0, 10.0]}, {"Ada": "red", "Ben": "blue"}
    chart = Chart("columns", "Sales by name", "Sales", "units", ["Ada", "Ben"], values, 10, colours, False, {})
    pixels = np.asarray(draw_chart(rng(1), Fonts(), chart).image, np.int16)
    high, low = (int((np.abs(pixels - COLOURS[name]).sum(-1) < 30).any(1).sum()) for name in ("red", "blue"))
    assert high / low == pytest.approx(4, rel=0.05)


def test_table_answers_follow_from_the_cells(fonts: Fonts) -> None:
    checked = 0
    for drawing in drawings("tables", fonts, 30):
        labels, columns = drawing.data["labels"], drawing.data["columns"]
        for question, answer in drawing.questions:
            if found := re.fullmatch(r'What is the sum of the column "(.+)"\?', question):
                assert answer == str(sum(columns[found[1]]))
            elif found := re.fullmatch(r'What is "(.+)" of (.+)\?', question):
                assert answer == str(columns[found[1]][labels.index(found[2])])
            elif found := re.fullmatch(r'Which \w+ has the highest value under "(.+)"\?', question):
                assert columns[found[1]][labels.index(answer)] == max(columns[found[1]])
            else:
                continue
            checked += 1
    assert checked > 60


def test_bills_add_up(fonts: Fonts) -> None:
    kinds = set()
    for drawing in drawings("documents", fonts, 60):
        kinds.add(drawing.data["kind"])
        if "bill" not in drawing.data:
            continue
        net = sum(pieces * price for _, pieces, price in drawing.data["bill"])
        tax = (net * drawing.data.get("tax", 0) + 50) // 100
        answers = dict(drawing.questions)
        for question in ("What is the total?", "What is the total amount to pay?", "How much was paid in total?"):
            assert answers.get(question, money(net + tax)) == money(net + tax)
        assert answers.get("What is the subtotal?", money(net)) == money(net)
        for name, pieces, price in drawing.data["bill"]:
            whole = answers.get(f"What is the total amount for {name}?", money(pieces * price))
            assert whole == money(pieces * price)
    assert kinds == {"letter", "invoice", "form", "receipt"}


def test_code_answers_quote_the_lines(fonts: Fonts) -> None:
    checked = 0
    for drawing in drawings("code", fonts, 40):
        lines = drawing.data["lines"]
        for question, answer in drawing.questions:
            if found := re.fullmatch(r"What (?:does|is written on) line (\d+)(?: say)?\?", question):
                assert answer == lines[int(found[1]) - 1].strip()
            elif found := re.fullmatch(r"On which line does (\w+) begin\?", question):
                assert found[1] in lines[int(answer) - 1]
            else:
                continue
            checked += 1
    assert checked > 40


def test_diagram_answers_follow_the_arrows(fonts: Fonts) -> None:
    kinds = set()
    for drawing in drawings("diagrams", fonts, 40):
        names = [text for text, _ in drawing.data["nodes"]]
        arrows = drawing.data["arrows"]
        kinds.add(drawing.data["kind"])
        assert len({tuple(arrow[:2]) for arrow in arrows}) == len(arrows), "two arrows in one place"
        for question, answer in drawing.questions:
            if found := re.fullmatch(r'What comes directly after "(.+)"\?', question):
                assert [names[end] for start, end, _ in arrows if names[start] == found[1]] == [answer]
            elif found := re.fullmatch(r'Where does "(.+)" lead to from "(.+)"\?', question):
                assert [names.index(found[2]), names.index(answer), found[1]] in arrows
            elif found := re.fullmatch(r'What color is the box "(.+)"\?', question):
                assert [found[1], answer] in drawing.data["nodes"]
    assert kinds == {"flow", "tree", "circle"}


# --- clocks -------------------------------------------------------------------------------------------------------


def test_the_hands_stand_where_the_text_says(fonts: Fonts) -> None:
    checked = 0
    for i in range(40):
        clock = draw_clock(rng(2, i), fonts)
        if not clock.hands:
            continue
        hour, minute, second = (clock.row[f"{name}_visible"] for name in ("hour", "minute", "second"))
        seconds = max(second, 0)
        wanted = {
            "hour": hour * 30 + minute / 2 + seconds / 120,
            "minute": minute * 6 + seconds / 10,
            "second": second * 6,
        }
        assert clock.row["text"].split(":")[1] == f"{minute:02d}"
        assert ("second" in clock.hands) == (second >= 0)
        for name, hand in clock.hands.items():
            assert math.isclose(math.cos(math.radians(hand.angle - clock.turn - wanted[name])), 1, abs_tol=1e-9)
            others = [other.angle for key, other in clock.hands.items() if key != name]
            if any(math.cos(math.radians(hand.angle - angle)) > 0.9 for angle in others):
                continue  # one hand hides the other
            turn = math.radians(hand.angle)
            # Hands are thin and their edges mixed: take the nearest colour within a pixel of the line.
            ahead = [hand.length * share for share in (0.5, 0.6, 0.7)]
            spots = [(clock.middle[0] + a * math.sin(turn), clock.middle[1] - a * math.cos(turn)) for a in ahead]
            pixels = np.asarray(clock.image, np.int16)
            off = [
                min(
                    np.abs(pixels[int(y) + dy, int(x) + dx] - hand.colour).sum()
                    for dy in (-1, 0, 1)
                    for dx in (-1, 0, 1)
                )
                for x, y in spots
            ]
            limit = 250 if name == "second" else 90
            assert min(off) < limit, (i, name, off)
            checked += 1
    assert checked > 40


def test_the_time_is_written_as_in_pixmo_clocks() -> None:
    assert describe(15, 4, None, WITHOUT_AM)["text"] == "3:04"
    assert describe(0, 0, 9, WITHOUT_AM)["text"] == "12:00:09"
    noon = describe(12, 30, 5, WITH_AM)
    assert noon["text"] == "12:30:05 PM"
    assert noon["hour_visible"] == 12
    assert noon["watch_time"] == "12:30:05"
    hidden = describe(1, 2, 3, NOT_SHOWN)
    assert hidden["text"] == "The time is not shown in the image."
    assert not hidden["shows_seconds"]
    assert {hidden[f"{name}_visible"] for name in ("hour", "minute", "second")} == {-1}


# --- points -------------------------------------------------------------------------------------------------------


def test_points_lie_on_the_colour_of_their_shape() -> None:
    absent = 0
    for i in range(30):
        scene = labelled_scene(rng(4, i))
        pixels = np.asarray(scene.image, np.int16)
        for label, points in scene.points.items():
            absent += not points
            colour = label.split(" ")[0]
            for x, y in points:
                assert 0 <= x <= 100
                assert 0 <= y <= 100
                pixel = pixels[int(y / 100 * scene.image.height), int(x / 100 * scene.image.width)]
                colours = [COLOURS[colour]] if colour in COLOURS else list(COLOURS.values())
                assert min(np.abs(pixel - c).max() for c in colours) <= 2, (i, label, pixel)
    assert absent >= 30
    assert len(SHAPES) * len(COLOURS) > 30


def test_count_rows_are_pixels_and_point_rows_percent() -> None:
    for i in range(10):
        scene = labelled_scene(rng(5, i))
        row = count_row(rng(i), scene)
        percent = next(r for r in point_rows(scene) if r["label"] == row["label"])
        assert row["count"] == percent["count"] == len(row["points"]["x"]) == len(row["points"]["y"])
        for x, y, point in zip(row["points"]["x"], row["points"]["y"], percent["points"], strict=True):
            assert x == pytest.approx(point["x"] * scene.image.width / 100, abs=0.01)
            assert y == pytest.approx(point["y"] * scene.image.height / 100, abs=0.01)


def test_sprites_are_drawn_where_they_are_given() -> None:
    square = Image.new("RGBA", (40, 40), (250, 250, 0, 255))
    sprites = {"owl": (square,), "bird": (square,), "cup": (square,), "key": (square,)}
    for i in range(12):
        scene = labelled_scene(rng(6, i), Assets(sprites))
        assert set(scene.points) <= set(sprites) | {f"{name}s" for name in sprites}
        asked = {label.rstrip("s") for label in scene.points}
        if {"owl", "bird"} <= asked:  # an owl is a bird: if one is present, the other is neither present nor absent
            assert not any(points for label, points in scene.points.items() if label.rstrip("s") in ("owl", "bird"))
        pixels = np.asarray(scene.image)
        for points in scene.points.values():
            for x, y in points:
                pixel = pixels[int(y / 100 * scene.image.height), int(x / 100 * scene.image.width)]
                assert tuple(pixel) == (250, 250, 0)


# --- folders ------------------------------------------------------------------------------------------------------


def test_the_rows_are_read_by_the_loader_and_name_their_pictures(tmp_path: Path) -> None:
    generate.generate("points", 3, tmp_path)
    rows = load_rows("allenai/pixmo-points", (), "train", tmp_path)
    assert set(rows.columns) == {"image", *COLUMNS["points"]}
    assert len({row["image"] for row in rows}) == 3 < len(rows)
    assert all(row.image("image").is_file() for row in rows)


@pytest.mark.parametrize("cut", ["in a row", "between rows", "before a picture"])
def test_a_run_that_was_cut_off_ends_like_one_that_was_not(cut: str, tmp_path: Path) -> None:
    for folder in ("whole", "cut"):
        generate.generate("points", 6, tmp_path / folder, seed=1)
    rows, whole = tmp_path / "cut" / "rows.jsonl", contents(tmp_path / "whole")
    lines = rows.read_bytes().splitlines(keepends=True)
    if cut == "in a row":
        rows.write_bytes(b"".join(lines)[:-30])
    elif cut == "between rows":  # of one picture
        rows.write_bytes(b"".join(lines[:-1]))
    else:
        for path in (tmp_path / "cut" / "pictures").rglob("0000003.*"):
            path.unlink()
    assert contents(tmp_path / "cut") != whole
    generate.generate("points", 6, tmp_path / "cut", seed=1)
    assert contents(tmp_path / "cut") == whole


def test_going_on_adds_and_never_takes_away(tmp_path: Path) -> None:
    generate.generate("clocks", 3, tmp_path / "a")
    generate.generate("clocks", 2, tmp_path / "a")
    assert len(rows_of(tmp_path / "a")) == 3
    generate.generate("clocks", 5, tmp_path / "a", jobs=2)
    generate.generate("clocks", 5, tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_another_seed_or_folder_is_refused(tmp_path: Path) -> None:
    generate.generate("clocks", 1, tmp_path / "drawn")
    with pytest.raises(GenerateError, match="other seed"):
        generate.generate("clocks", 2, tmp_path / "drawn", seed=1)
    with pytest.raises(GenerateError, match="other kind"):
        generate.generate("charts", 2, tmp_path / "drawn")
    with pytest.raises(GenerateError, match="not a kind of drawing"):
        generate.generate("poems", 2, tmp_path / "drawn")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "rows.jsonl").write_text("{}\n")
    with pytest.raises(GenerateError, match="not drawn by this command"):
        generate.generate("clocks", 2, tmp_path / "mine")
    assert (tmp_path / "mine" / "rows.jsonl").read_text() == "{}\n"
