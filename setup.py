"""README.md as a package index shows it. Everything else is in pyproject.toml."""

import re
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent


def description(readme: str, source: str | None) -> str:
    """`readme` with relative links and pictures made absolute under `source`.

    A package index resolves a relative link against its own address. Without `source`, a link becomes its text, and a
    picture is left out.
    """

    def absolute(link: re.Match[str]) -> str:
        picture, text, path = link.groups()
        if source is None:
            return "" if picture else text
        return f"{picture}[{text}]({source.rstrip('/')}/{'raw' if picture else 'blob'}/main/{path})"

    return re.sub(r"(!?)\[([^]]+)\]\((?!https?:|#)([^)]+)\)", absolute, readme)


def source_url(pyproject: str) -> str | None:
    """`Source` of [project.urls]. Python 3.10 has no TOML parser."""
    match = re.search(r'^Source = "(.+)"', pyproject, re.MULTILINE)
    return match and match[1]


if __name__ == "__main__":
    setup(
        long_description=description(
            (HERE / "README.md").read_text(encoding="utf-8"),
            source_url((HERE / "pyproject.toml").read_text(encoding="utf-8")),
        ),
        long_description_content_type="text/markdown",
    )
