"""Options written as name=value,name=value."""

from __future__ import annotations

import pytest

from molmo_edge.system.key_values import parse_key_values


def test_pairs_are_read_in_order() -> None:
    assert list(parse_key_values(" a=1,b = x=y,, ").items()) == [("a", "1"), ("b", "x=y")]
    assert parse_key_values("") == {}


@pytest.mark.parametrize("item", ["a", "a=", "=1", "="])
def test_an_item_without_name_or_value_is_refused(item: str) -> None:
    with pytest.raises(ValueError, match=f'^"{item}"$'):
        parse_key_values(f"b=2,{item}")
