"""English plurals, articles, numbers and lists for questions and captions."""

from __future__ import annotations

from collections.abc import Sequence

_IRREGULAR = {
    "person": "people", "mouse": "mice", "knife": "knives", "leaf": "leaves", "wolf": "wolves", "tooth": "teeth",
    "scarf": "scarves", "tomato": "tomatoes", "potato": "potatoes", "mango": "mangoes", "volcano": "volcanoes",
    "loaf": "loaves", "shelf": "shelves", "child": "children", "man": "men", "woman": "women", "foot": "feet",
}  # fmt: skip
_UNCHANGED = frozenset(
    (
        "sheep", "fish", "deer", "shrimp", "dice", "broccoli", "corn", "lettuce", "garlic", "bread", "cheese",
        "spaghetti", "sushi", "popcorn", "milk", "paper", "lightning",
    )
)  # fmt: skip
# Words that are always plural: no article, no added s.
_PLURAL_ONLY = frozenset(
    (
        "scissors", "skis", "glasses", "sunglasses", "pants", "shorts", "grapes", "binoculars", "headphones", "fries",
        "chopsticks", "shoes",
    )
)  # fmt: skip
_MASS = (_UNCHANGED - {"sheep", "fish", "deer", "shrimp", "dice"}) | {"soap", "fire", "candy", "chocolate", "ice cream"}
_NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")


def plural(noun: str) -> str:
    """As in "dog" -> "dogs", "wine glass" -> "wine glasses", "person" -> "people", "scissors" -> "scissors"."""
    first, _, last = noun.rpartition(" ")
    if last in _IRREGULAR:
        last = _IRREGULAR[last]
    elif last in _UNCHANGED or last in _PLURAL_ONLY:
        pass
    elif last.endswith(("s", "x", "z", "ch", "sh")):
        last += "es"
    elif last.endswith("y") and last[-2:-1] not in "aeiou":
        last = last[:-1] + "ies"
    else:
        last += "s"
    return f"{first} {last}" if first else last


def with_article(noun: str) -> str:
    """As in "a dog", "an apple", "some bread", "scissors"."""
    last = noun.rpartition(" ")[2]
    if last in _PLURAL_ONLY:
        return noun
    if last in _MASS or noun in _MASS:
        return f"some {noun}"
    return f"an {noun}" if noun[0] in "aeiou" and not noun.startswith(("uni", "ufo")) else f"a {noun}"


def counted(noun: str, count: int) -> str:
    """As in "a dog", "three dogs", "many dogs" from 13 on."""
    if count == 1:
        return with_article(noun)
    return f"{_NUMBERS[count] if count < len(_NUMBERS) else 'many'} {plural(noun)}"


def listed(parts: Sequence[str]) -> str:
    """As in "a", "a and b", "a, b and c"."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def be(noun: str) -> str:
    """The verb of one `noun`: "is" as in "the dog is", "are" as in "the scissors are"."""
    return "are" if noun.rpartition(" ")[2] in _PLURAL_ONLY else "is"
