"""Invented names, goods, dates and amounts for drawn pages."""

from __future__ import annotations

import numpy as np

from molmo_edge.data.choices import pick, some, whole


def _words(text: str, by: str | None = None) -> tuple[str, ...]:
    return tuple(text.split(by))


_FIRST = _words(
    "Ada Amir Anneke Bela Boris Carla Chidi Clara Dana Derek Elif Emil Esra Farid Freya Gita Goran Hana Hugo Ines Ivan "
    "Jonas Joyce Kofi Lara Leon Lucia Malik Marta Mei Milan Nadia Noah Olga Omar Paula Petra Quinn Rafael Rosa Samir "
    "Sofia Tariq Theo Uma Vera Viktor Wanda Yara Zeno"
)
_BEGIN = _words("Al Bar Bran Cal Dor El Far Gar Hal Kel Lan Mar Nor Or Pel Ran Sel Tor Ul Var Wel Yar")
_MIDDLE = _words("a e i o an en is or un ar")
_END = _words("berg dale den by ford mann ney ridge sen son stone ton tov well wick yama")
_TOWN = _words("bridge burgh bury field ford ham haven mouth port stead ton ville wick worth")
_TRADES = _words(
    "Supplies,Logistics,Foods,Tools,Print Works,Textiles,Energy,Garden Centre,Systems,Motors,Bakery,Books,Interiors,"
    "Sports,Optics,Travel,Pharmacy,Instruments,Paper,Hardware",
    ",",
)
_QUALITIES = _words("Basic Blue Classic Compact Deluxe Double Green Heavy Large Light Mini Plain Pro Red Small Soft")
_GOODS = _words(
    "Anchor,Apron,Basket,Bench,Blanket,Bottle,Bracket,Brush,Bucket,Cable,Candle,Chair,Clamp,Cushion,Desk,Drill,Filter,"
    "Folder,Frame,Gloves,Hammer,Handle,Helmet,Hinge,Hose,Kettle,Ladder,Lamp,Mirror,Mug,Notebook,Paint,Pan,Pen,Plate,"
    "Pump,Rope,Scarf,Shelf,Stapler,Stool,Tape,Teapot,Tent,Towel,Tray,Valve,Vase,Wheel,Wrench",
    ",",
)
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)  # fmt: skip


def surname(rng: np.random.Generator) -> str:
    """Return an invented surname, composed of syllables."""
    return pick(rng, _BEGIN) + (pick(rng, _MIDDLE) if rng.random() < 0.4 else "") + pick(rng, _END)


def person(rng: np.random.Generator) -> str:
    """Return a first name and an invented surname."""
    return f"{pick(rng, _FIRST)} {surname(rng)}"


def first_names(rng: np.random.Generator, amount: int) -> list[str]:
    """Return `amount` different first names."""
    return some(rng, _FIRST, amount)


def town(rng: np.random.Generator) -> str:
    """Return an invented name of a town."""
    return pick(rng, _BEGIN) + pick(rng, _MIDDLE) + pick(rng, _TOWN)


def towns(rng: np.random.Generator, amount: int) -> list[str]:
    """`amount` different towns."""
    found: dict[str, None] = {}
    while len(found) < amount:
        found[town(rng)] = None
    return list(found)


def company(rng: np.random.Generator) -> str:
    """Return an invented company, named after a person and a trade."""
    return f"{surname(rng)} {pick(rng, _TRADES)}"


def goods(rng: np.random.Generator, amount: int, short: bool = False) -> list[str]:
    """Different articles: "Soft Tray", or if `short`, "Tray"."""
    names = some(rng, _GOODS, amount)
    return names if short else [f"{pick(rng, _QUALITIES)} {name}" for name in names]


def street(rng: np.random.Generator) -> str:
    """Return a house number and an invented street."""
    return f"{whole(rng, 1, 199)} {surname(rng)} {pick(rng, ('Street', 'Road', 'Lane', 'Avenue', 'Square'))}"


def phone(rng: np.random.Generator) -> str:
    """Return a telephone number of the range that is reserved for fiction."""
    return f"({whole(rng, 201, 989)}) 555-01{whole(rng, 0, 99):02d}"  # reserved for fiction


def date(rng: np.random.Generator, style: int, year: int | None = None, months: tuple[int, int] = (1, 12)) -> str:
    """A date within `months` of `year` (None: 2010 to 2029), in one of four formats."""
    day, month = whole(rng, 1, 28), whole(rng, *months)
    year, name = year or whole(rng, 2010, 2029), MONTHS[month - 1]
    ways = (
        f"{day} {name} {year}",
        f"{name} {day}, {year}",
        f"{year}-{month:02d}-{day:02d}",
        f"{name[:3]} {day} {year}",
    )
    return ways[style % 4]


def money(cents: int) -> str:
    """Format a number of cents as in "$1,234.50"."""
    return f"${cents // 100:,}.{cents % 100:02d}"
