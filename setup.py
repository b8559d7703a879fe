"""What pyproject.toml cannot say: README.md as a package index shows it. The rest is there."""

import re
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent


def description(readme: str, source: str | None) -> str:
    """`readme` with relative links made absolute under `source`, or, without one, replaced by their text.

    An index resolves a relative link against its own address, where nothing of ours lies.
    """
    pattern = r"\[([^]]+)\]\((?!https?:|#)([^)]+)\)"
    return re.sub(pattern, rf"[\1]({source.rstrip('/')}/blob/main/\2)" if source else r"\1", readme)


def source_url(pyproject: str) -> str | None:
    """`Source` of [project.urls]. Python 3.10 has no TOML reader."""
    found = re.search(r'^Source = "(.+)"', pyproject, re.MULTILINE)
    return found and found[1]


if __name__ == "__main__":
    setup(
        long_description=description(
            (HERE / "README.md").read_text(encoding="utf-8"),
            source_url((HERE / "pyproject.toml").read_text(encoding="utf-8")),
        ),
        long_description_content_type="text/markdown",
    )
