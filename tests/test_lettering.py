"""Labels on a picture are readable in any script; the box for a missing glyph is never drawn."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image, ImageDraw, ImageFont

from molmo_edge.answer import draw_points
from molmo_edge.frontend.points import Point
from molmo_edge.sdk import lettering


@pytest.fixture(params=["no fonts installed", "fonts of this machine"])
def fonts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With and without the machine's own fonts."""
    if request.param == "no fonts installed":
        monkeypatch.setattr(lettering, "font_folders", lambda: [tmp_path])


@pytest.fixture(autouse=True)
def _search_again() -> Iterator[None]:
    """Clear the cached fonts around each test."""
    for found in (lettering.system_fonts, lettering.font_with):
        found.cache_clear()
    yield
    for found in (lettering.system_fonts, lettering.font_with):
        found.cache_clear()


def drawn(label: str, size: tuple[int, int] = (400, 120)) -> bytes:
    return draw_points(Image.new("RGB", size), [Point(10, 50, label)]).tobytes()


@pytest.mark.parametrize(
    "letters",
    ["aäàáâãåāąæ", "oöøőœ", "cçćč", "sšśşß", "αβγδλσς", "бвгджяё", "ѓіљўј", "“”‘’–—…", "€£¥§°²½"],
)
def test_every_letter_has_a_shape_of_its_own(letters: str) -> None:
    shapes = {drawn(letter): letter for letter in letters}
    assert len(shapes) == len(letters), f"drawn alike: {set(letters) - set(shapes.values())}"


@pytest.mark.usefixtures("fonts")
@pytest.mark.parametrize(
    "labels",
    [
        ("猫", "犬", "两只猫"),
        ("고양이", "강아지"),
        ("แมว", "หมา"),
        ("बिल्ली", "कुत्ता"),
        ("🐶", "🐱", "two 🐶"),
        ("\ue000", "\ue001"),
        ("\ud83d", "\ud83e"),
    ],
)
def test_other_scripts_and_emoji_are_told_apart(labels: tuple[str, ...]) -> None:
    assert len({drawn(label) for label in labels}) == len(labels)


def test_a_character_without_a_font_is_spelled_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(lettering, "font_folders", lambda: [tmp_path])
    for label, written in {
        "猫と犬": "[U+732B, U+3068, U+72AC]",
        "🐶 in a basket": "[dog face] in a basket",
        "👍🏽": "[thumbs up sign]",  # without its skin tone
        "ａｂｃ": "abc",
        "ﾈｺ": "[U+FF88, U+FF7A]",
        "\ue000": "[U+E000]",
        "\ud83d": "[U+D83D]",
    }.items():
        assert drawn(label) == drawn(written), label


def test_one_letter_in_two_encodings_is_drawn_once_the_same() -> None:
    assert drawn("é") == drawn("e\u0301") != drawn("e")
    assert drawn("a\nb\tc") == drawn("a b c")


def test_a_system_font_that_has_the_character_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Install the embedded font under a system font's name, and replace the embedded font by Pillow's own."""
    installed = tmp_path / "deep" / "NotoSansCJK-Regular.ttf"
    installed.parent.mkdir()
    installed.write_bytes(lettering.EMBEDDED.read_bytes())
    (tmp_path / "NotoSansArabic-Regular.ttf").write_bytes(b"no font")  # damaged: the next font is used
    plain = ImageFont.load_default(24)
    assert isinstance(plain, ImageFont.FreeTypeFont)
    (tmp_path / "own.ttf").write_bytes(plain.path.getvalue())  # type: ignore[union-attr]
    monkeypatch.setattr(lettering, "EMBEDDED", tmp_path / "own.ttf")
    monkeypatch.setattr(lettering, "font_folders", lambda: [tmp_path])
    line = lettering.line("dog собака", 24)
    assert [(text, Path(font.path).name) for text, font in line.pieces] == [
        ("dog ", "own.ttf"),
        ("собака", "NotoSansCJK-Regular.ttf"),
    ]


@pytest.mark.parametrize("label", ["W" * 500, "猫" * 500, "🐶" * 500, "a label of many words " * 30])
def test_long_labels_stay_inside_the_picture(label: str) -> None:
    for size in ((60, 60), (400, 120)):
        draw_points(Image.new("RGB", size), [Point(50, 50, label)])
    line = lettering.line(label, 20, 300)
    left, _, right, _ = line.box
    assert 200 < right - left <= 300
    assert line.pieces[-1][0].endswith("…")


def test_the_ink_fills_its_box() -> None:
    line = lettering.line("Ägypten, größer", 40)
    left, top, right, bottom = line.box
    image = Image.new("L", (right - left + 40, bottom - top + 40))
    line.draw(ImageDraw.Draw(image), 20, 20, (255,))
    x0, y0, x1, y1 = image.getbbox() or (0, 0, 0, 0)
    assert max(abs(x0 - 20), abs(y0 - 20), abs(x1 - 20 - (right - left)), abs(y1 - 20 - (bottom - top))) <= 1
    assert lettering.line("", 20).box == (0, 0, 0, 0)
