"""Griffe extension of mkdocs.yml: the comment at the end of a field's line is the field's docstring."""

from __future__ import annotations

import io
import tokenize
from typing import Any

import griffe


class FieldComments(griffe.Extension):
    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        if attr.docstring or attr.lineno is None or attr.lines_collection is None:
            return
        line = attr.lines_collection[attr.filepath][attr.lineno - 1].strip()
        try:
            comments = [
                t.string for t in tokenize.generate_tokens(io.StringIO(line).readline) if t.type == tokenize.COMMENT
            ]
        except (tokenize.TokenError, IndentationError):  # the first line of a longer value
            return
        if comments and not comments[0].startswith(("# noqa", "# type:")):
            attr.docstring = griffe.Docstring(comments[0].lstrip("# "), lineno=attr.lineno, parent=attr)
