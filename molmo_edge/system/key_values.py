"""Options written as `name=value,name=value`."""

from __future__ import annotations


def parse_key_values(text: str) -> dict[str, str]:
    """`{"a": "1", "b": "2"}` for "a=1, b=2". Empty items are ignored; the last of equal names counts.

    Raises:
        ValueError: for an item that is not NAME=VALUE. The message is the item, quoted.
    """
    values = {}
    for item in filter(None, (item.strip() for item in text.split(","))):
        name, _, value = (part.strip() for part in item.partition("="))
        if not name or not value:
            raise ValueError(f'"{item}"')
        values[name] = value
    return values
