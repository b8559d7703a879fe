"""Screenshots of an editor: invented code in several languages and colours, with and without line numbers."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from molmo_edge.data.choices import pick, some, whole
from molmo_edge.data.drawn.colours import Colour
from molmo_edge.data.drawn.fonts import Fonts, Type, text_width
from molmo_edge.data.drawn.invented import town
from molmo_edge.data.drawn.sheets import Drawing, Pair, Sheet

_VERBS = (
    "add", "build", "check", "clean", "count", "draw", "find", "load", "merge", "move", "parse", "read", "send", "sort",
)  # fmt: skip
_NOUNS = ("box", "cell", "file", "grid", "item", "key", "line", "list", "node", "page", "point", "row", "score", "word")
_VALUES = (
    "alpha", "base", "depth", "index", "left", "limit", "offset", "rate", "right", "size", "start", "step", "width",
)  # fmt: skip
_NOTES = (
    "keep the old order", "nothing to do", "slow but safe", "one more than needed", "see the manual", "works on copies",
)  # fmt: skip


@dataclass(frozen=True)
class _Language:
    """Templates of code: {f} a function, {a} {b} its arguments, {v} a variable, {n} {m} numbers, {s} a text."""

    name: str
    ending: str  # file name extension
    comment: str
    camel: bool  # addItem instead of add_item
    constant: str  # {c}: a name in upper case
    pieces: tuple[str, ...]  # functions; the first line has the name
    words: str  # keywords, separated by spaces


_LANGUAGES = (
    _Language(
        "Python", "py", "#", False, "{c} = {n}",
        (
            "def {f}({a}, {b}):\n    {v} = {a} * {n}\n    if {v} > {b}:\n        return {b}\n    return {v} + {m}",
            "def {f}({a}, {b}={n}):\n    for i in range({m}):\n        {a} += i * {b}\n"
            "    print(\"{s}\")\n    return {a}",
            "def {f}({a}):\n    {v} = []\n    for part in {a}:\n        if len(part) < {n}:\n"
            "            {v}.append(part)\n"
            "    return {v}",
        ),
        "def for if in return print range len import from class while else None True False",
    ),
    _Language(
        "JavaScript", "js", "//", True, "const {c} = {n};",
        (
            "function {f}({a}, {b}) {\n  const {v} = {a} * {n};\n  if ({v} > {b}) {\n    return {b};\n  }\n"
            "  return {v} + {m};\n}",
            "function {f}({a}) {\n  let {v} = {n};\n  for (const part of {a}) {\n    {v} += part.length;\n  }\n"
            "  console.log(\"{s}\");\n  return {v};\n}",
        ),
        "function const let if for of return else new",
    ),
    _Language(
        "Java", "java", "//", True, "static final int {c} = {n};",
        (
            "static int {f}(int {a}, int {b}) {\n    int {v} = {a} * {n};\n    if ({v} > {b}) {\n"
            "        return {b};\n    }\n"
            "    return {v} + {m};\n}",
            "static void {f}(int {a}) {\n    for (int i = 0; i < {n}; i++) {\n        System.out.println(\"{s}\");\n"
            "        {a} += {m};\n    }\n}",
        ),
        "static final int void return if for else new class public private",
    ),
    _Language(
        "Go", "go", "//", True, "const {c} = {n}",
        (
            "func {f}({a} int, {b} int) int {\n    {v} := {a} * {n}\n    if {v} > {b} {\n        return {b}\n    }\n"
            "    return {v} + {m}\n}",
            "func {f}({a} []int) {\n    for i := range {a} {\n        {a}[i] += {n}\n    }\n"
            "    fmt.Println(\"{s}\")\n}",
        ),
        "func int return if for range const var package import",
    ),
    _Language(
        "Rust", "rs", "//", False, "const {c}: i32 = {n};",
        (
            "fn {f}({a}: i32, {b}: i32) -> i32 {\n    let {v} = {a} * {n};\n    if {v} > {b} {\n"
            "        return {b};\n    }\n"
            "    {v} + {m}\n}",
            "fn {f}({a}: &[i32]) -> i32 {\n    let mut {v} = {n};\n    for part in {a} {\n        {v} += part;\n    }\n"
            "    println!(\"{s}\");\n    {v}\n}",
        ),
        "fn let mut if for in return i32 const use",
    ),
    _Language(
        "C", "c", "//", False, "#define {c} {n}",
        (
            "int {f}(int {a}, int {b}) {\n    int {v} = {a} * {n};\n    if ({v} > {b}) {\n        return {b};\n    }\n"
            "    return {v} + {m};\n}",
            "void {f}(int {a}) {\n    while ({a} > {n}) {\n        printf(\"{s}\");\n        {a} -= {m};\n    }\n}",
        ),
        "int void return if while for const char",
    ),
    _Language(
        "Ruby", "rb", "#", False, "{c} = {n}",
        (
            "def {f}({a}, {b})\n  {v} = {a} * {n}\n  return {b} if {v} > {b}\n  {v} + {m}\nend",
            "def {f}({a})\n  {n}.times do |i|\n    puts \"{s}\"\n    {a} += i + {m}\n  end\n  {a}\nend",
        ),
        "def end return if do puts times",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class _Theme:
    paper: Colour
    ink: Colour
    faint: Colour  # line numbers and comments
    keyword: Colour
    string: Colour
    digits: Colour
    function: Colour


def _theme(colours: str) -> _Theme:
    return _Theme(*((rgb[0], rgb[1], rgb[2]) for rgb in map(bytes.fromhex, colours.split())))


_THEMES = tuple(
    _theme(colours)
    for colours in (
        "1e1e22 dcdcdc 7d877d 5aa0e6 d79b7d b4d2a0 e1dca5",
        "262a36 f0f0eb 7382af ff7dc3 f0f58c be96fa 5afa82",
        "002a36 96a5a5 5f7880 8ca514 32aaa0 d74b82 3c91d7",
        "ffffff 1e1e1e 6e7d6e 0a1ed7 a51919 0a825a 785a23",
        "faf6e4 55646e 91968c 829100 239187 cd327d 2382c8",
        "f6f8fa 23282e 69737d cd233c 0a3269 055ac3 6e41be",
    )
)
_TOKEN = re.compile(r"\"[^\"]*\"|\d+|\w+|\s+|.")


def draw_code(rng: np.random.Generator, fonts: Fonts) -> Drawing:
    """An editor window with 8 to 30 lines of code."""
    language, theme = pick(rng, _LANGUAGES), pick(rng, _THEMES)
    lines, facts = _write(rng, language)
    numbered, framed = rng.random() < 0.7, rng.random() < 0.6
    file = f"{pick(rng, _NOUNS)}_{pick(rng, _VALUES)}.{language.ending}"
    font = Type(pick(rng, fonts.mono) if fonts.mono else None, whole(rng, 15, 20))
    advance, height = _advance(font), round(font.size * 1.45)
    gutter, bar = (advance * 4 if numbered else advance), (height * 1.5 if framed else 0)
    width = round(gutter + advance * (max(map(len, lines)) + whole(rng, 2, 10)))
    sheet = Sheet(max(width, 380), round(bar + height * (len(lines) + 1)), theme.paper)
    if framed:
        _title_bar(sheet, theme, file, font, bar)
    for i, line in enumerate(lines):
        y = bar + height * (i + 0.5)
        if numbered:
            _letters(sheet, advance * 3 - advance * len(str(i + 1)), y, str(i + 1), font, theme.faint, advance)
        _highlighted(sheet, gutter, y, line, language, theme, font, advance)
    asked = _ask(rng, language, lines, facts, numbered)
    if framed:
        asked.append(("What is the name of the open file?", file))
    data = {"language": language.name, "lines": lines, "numbered": numbered, **facts}
    return sheet.drawing(rng, asked, data)


def _write(rng: np.random.Generator, language: _Language) -> tuple[list[str], dict[str, dict[str, str]]]:
    """(lines, facts): arguments of "functions", values of "constants", "strings" and "comments" of functions."""
    lines: list[str] = []
    facts: dict[str, dict[str, str]] = {"functions": {}, "constants": {}, "strings": {}, "comments": {}}
    for name in some(rng, _VALUES, whole(rng, 0, 2)):
        facts["constants"][name.upper()] = str(whole(rng, 2, 999))
        lines.append(_fill(language.constant, {"c": name.upper(), "n": facts["constants"][name.upper()]}))
    texts = iter(some(rng, [f"{town(rng)} {noun}" for noun in _NOUNS], 4))
    notes = iter(some(rng, _NOTES, 4))
    for verb, noun in zip(some(rng, _VERBS, whole(rng, 1, 3)), some(rng, _NOUNS, 3), strict=False):
        function = f"{verb}{noun.capitalize()}" if language.camel else f"{verb}_{noun}"
        a, b, v = some(rng, _VALUES, 3)
        piece, text = pick(rng, language.pieces), next(texts)
        number, other = str(whole(rng, 2, 99)), str(whole(rng, 2, 99))
        lines += [""] if lines else []
        if rng.random() < 0.5:
            facts["comments"][function] = next(notes)
            lines.append(f"{language.comment} {facts['comments'][function]}")
        lines += _fill(piece, {"f": function, "a": a, "b": b, "v": v, "n": number, "m": other, "s": text}).split("\n")
        first = piece.split("\n")[0]
        facts["functions"][function] = ", ".join(name for key, name in (("{a}", a), ("{b}", b)) if key in first)
        if "{s}" in piece:
            facts["strings"][function] = text
    return lines, facts


def _fill(template: str, names: dict[str, str]) -> str:
    """str.format cannot be used: the languages use braces."""
    return re.sub(r"\{(\w)\}", lambda found: names[found[1]], template)


# --- drawing ------------------------------------------------------------------------------------------------------


def _title_bar(sheet: Sheet, theme: _Theme, file: str, font: Type, height: float) -> None:
    shade = tuple(round(p * 0.85 + i * 0.15) for p, i in zip(theme.paper, theme.ink, strict=True))
    sheet.box((0, 0, sheet.width, height - 3), (shade[0], shade[1], shade[2]))
    middle = (height - 3) / 2
    for i, colour in enumerate(((235, 95, 85), (240, 190, 60), (95, 200, 80))):
        sheet.ellipse((12 + i * 18, middle - 5, 22 + i * 18, middle + 5), colour)
    sheet.text(sheet.width / 2, middle, file, font, theme.ink, "mm")


def _advance(font: Type) -> float:
    """Width of a letter cell, pixels."""
    return text_width("M", font.path, round(font.size)) if font.path else font.size * 0.62


def _letters(sheet: Sheet, x: float, y: float, text: str, font: Type, ink: Colour, advance: float) -> None:
    """Draw text on a grid of letter cells. A proportional font is set letter by letter."""
    if font.path:
        if text.strip():
            sheet.text(x, y + font.size, text, font, ink, "ls")
        return
    for i, letter in enumerate(text):
        if letter != " ":
            sheet.text(x + advance * (i + 0.5), y + font.size, letter, font, ink, "ms")


def _highlighted(
    sheet: Sheet, x: float, y: float, line: str, language: _Language, theme: _Theme, font: Type, advance: float
) -> None:
    if line.lstrip().startswith(f"{language.comment} "):
        _letters(sheet, x, y, line, font, theme.faint, advance)
        return
    for token in _TOKEN.finditer(line):
        word = token[0]
        ink = theme.ink
        if word.startswith('"'):
            ink = theme.string
        elif word.isdigit():
            ink = theme.digits
        elif word in language.words.split():
            ink = theme.keyword
        elif line[token.end() : token.end() + 1] == "(":
            ink = theme.function
        _letters(sheet, x + advance * token.start(), y, word, font, ink, advance)


# --- questions ----------------------------------------------------------------------------------------------------


def _ask(
    rng: np.random.Generator, language: _Language, lines: list[str], facts: dict[str, dict[str, str]], numbered: bool
) -> list[Pair]:
    functions = facts["functions"]
    asked: list[Pair] = [
        (pick(rng, ("Which programming language is this?", "In which language is the code written?")), language.name),
        (
            pick(rng, ("How many functions are defined?", "How many functions does the code define?")),
            str(len(functions)),
        ),
        ("What does the first line say?", lines[0].strip()),
        ("What does the last line say?", lines[-1].strip()),
    ]
    names = list(functions)
    if len(names) == 1:
        asked.append((pick(rng, ("What is the name of the function?", "Which function is defined here?")), names[0]))
    else:
        asked += [("What is the first function called?", names[0]), ("What is the last function called?", names[-1])]
    for name, arguments in functions.items():
        asked.append((f"Which parameters does {name} take?", arguments))
        asked.append((f"How many parameters does {name} take?", str(arguments.count(",") + 1)))
    asked += [(f"What is the value of {name}?", value) for name, value in facts["constants"].items()]
    asked += [(f"Which text does {name} print?", text) for name, text in facts["strings"].items()]
    asked += [(f"What does the comment above {name} say?", text) for name, text in facts["comments"].items()]
    if numbered:
        asked.append((pick(rng, ("How many lines are there?", "What is the last line number?")), str(len(lines))))
        full = [i for i, line in enumerate(lines) if len(line.strip()) > 2]
        for i in some(rng, full, 4):
            asked.append(
                (pick(rng, (f"What does line {i + 1} say?", f"What is written on line {i + 1}?")), lines[i].strip())
            )
        for name in names:
            at = next(i for i, line in enumerate(lines) if f"{name}(" in line)
            asked.append((f"On which line does {name} begin?", str(at + 1)))
    return asked
