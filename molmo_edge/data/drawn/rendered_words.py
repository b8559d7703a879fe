"""Words, numbers and short signs, rendered in readable fonts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from molmo_edge.data.drawn.colours import contrasting, random_colour
from molmo_edge.data.drawn.fonts import load_font, random_font
from molmo_edge.data.drawn.sprite_names import sprite_sources

_COMMON = """
about above across action after again age air all almost alone along always amount animal another answer any apart
area arm army around art ask atom autumn away back bad bag bake ball band bank bar base bath beach beautiful become
before begin behind believe below best better between big bill birthday bit black blood blue board body born both
bottom boy branch brave break breakfast bridge bright bring brother brown build building burn business busy buy call
calm camp capital captain care carry catch cause cell center central century certain change check child choose
circle city class clean clear climb clothes coast coat coffee cold collect college colour come common company
complete contain control cook cool copper copy corner correct cost cotton could count country course cover create
cross crowd cry culture current cut dance danger dark data day dead deal dear decide deep degree depend desert
design desk detail develop different dinner direct discover distance divide doctor dollar double down draw dream
drink drive drop dry during each early earth east easy eat edge effect eight either electric else end enemy energy
engine enjoy enough enter equal evening event ever every example exercise exit expect express extra face fact fair
fall family famous far farm fast father favourite fear feed feel feet fence few field fight figure fill film final
find fine finger finish first five floor follow food foot force forest forget form forward four free fresh friend
front fruit full fun future game garden gas gate general gentle girl give glad glass go gold good grand grass great
green grey ground group grow guess guide half hall happen happy hard harvest head health hear heat heavy hello help
here high hill history hold hole holiday home hope hospital hot hotel hour hundred hungry hurry ice idea inch
indoor industry insect inside iron island job join joke journey juice jump just keep kind king kitchen know lady
lake land language large last late laugh lead learn least leave left leg lemonade less lesson letter level library
life lift light like line liquid list listen little live local long look lost loud love low lucky lunch machine
magic main make many march mark market master match material maybe meal mean measure meat meet member metal method
middle mile million mind mine minute miss mix modern moment month more morning most mother motion motor move much
music must name narrow nation natural near neck need never new next nice night nine noise noon north note nothing
notice number object ocean offer office often oil old once one only open orbit order other outside over own oxygen
page paint pair palace paper parent park part party pass past path pay peace people perfect perhaps period phone
photo picture piece place plain plan planet plant play please pocket poem point police poor popular port position
possible post pound power practice prepare present press pretty price print private problem produce promise proud
public pull purple push put quarter queen question quick quiet quite race rain raise range reach read ready real
reason record red region remember repeat report rest result return rice rich ride right rise river road roll roof
room root rope round rule run safe sail salt same sand save school science score sea season seat second secret see
seed sell send sense sentence serve seven shade shape share sharp sheet shine shop short shoulder show side sign
silent silver simple sing single sister six size skill skin sky sleep slow small smell smile smooth snow soft soil
soldier solution some song soon sound south space speak special speed spell spend spring square stand start state
station stay steel step stone stop store storm story straight strange stream street strong student study sugar
summer supply support sure surface surprise sweet swim system table take talk tall taste teach team tell ten test
thank thick thin thing think third thousand three thunder ticket tiny today together tomorrow tool top total touch
toward town trade travel trip trouble true try turn twelve twenty two uncle under unit until upper use useful
valley value very view village visit voice wait walk wall want warm wash water wave way wear weather week weight
welcome well west wet white whole wide wild win wind winter wire wise wish woman wonder wood word work world write
yard year yellow yes yesterday young zero zone
"""
_SIGNS = (
    "NO PARKING", "KEEP OUT", "EXIT", "OPEN", "CLOSED", "PUSH", "PULL", "SALE", "FOR SALE", "FOR RENT", "STOP",
    "SLOW DOWN", "ONE WAY", "DO NOT ENTER", "WET FLOOR", "NO SMOKING", "FREE WIFI", "TAXI STAND", "BUS STOP",
    "MAIN STREET", "PARK AVENUE", "ROOM 12", "GATE 7", "EXIT 25", "PLATFORM 3", "WELCOME", "THANK YOU", "CAUTION",
    "DANGER", "HIGH VOLTAGE", "FIRE EXIT", "INFORMATION", "RECEPTION", "REST AREA", "TICKETS", "COFFEE SHOP",
    "FRESH BREAD", "ICE CREAM", "HAPPY BIRTHDAY", "GOOD MORNING", "HELLO WORLD", "SPEED LIMIT 50", "SCHOOL BUS",
    "POLICE", "AMBULANCE", "TOILETS", "EMERGENCY", "NO ENTRY", "WAY OUT", "MIND THE GAP", "CASH ONLY", "HOTEL", "BANK",
)  # fmt: skip
WORDS = tuple(sorted({*_COMMON.split(), *(n for n in sprite_sources() if n.isalpha())}))


def random_text(rng: np.random.Generator) -> str:
    """A common word (any capitalisation), a number from 0 to 999, a price, or a short sign."""
    kind = rng.random()
    if kind < 0.58:
        word = WORDS[int(rng.integers(len(WORDS)))]
        return str(rng.choice([word, word.upper(), word.capitalize()]))
    if kind < 0.78:
        return str(int(rng.integers(1000)))
    if kind < 0.84:
        return f"${int(rng.integers(1, 100))}.{int(rng.choice([0, 25, 49, 50, 75, 95, 99])):02d}"
    return _SIGNS[int(rng.integers(len(_SIGNS)))]


def draw_text(rng: np.random.Generator, fonts: Sequence[Path], text: str, height: int, max_width: int) -> Image.Image:
    """RGBA, cropped to the text or its panel.

    Capitals are `height` pixels tall, smaller if `max_width` requires it; the font has 8 pixels or more. Two of three
    texts are on a panel of contrasting colour, the others have an outline.
    """
    path = random_font(rng, fonts)
    padding, points = rng.uniform(0.2, 0.6), height * 1.4  # a capital is about 0.7 of its font's size
    while True:
        font = load_font(path, max(8, round(points)))
        left, top, right, bottom = font.getbbox(text)
        pad = int((bottom - top) * padding)
        width = right - left + 2 * pad
        if width <= max_width or points <= 8:
            break
        points *= min(0.95, max_width / width)
    paper = random_colour(rng)
    ink = contrasting(paper, rng)
    size = (int(right - left) + 2 * pad, int(bottom - top) + 2 * pad)
    image = Image.new("RGBA", size)
    draw = ImageDraw.Draw(image)
    stroke = 0
    if rng.random() < 2 / 3:
        corner = pad * rng.uniform(0, 1)
        outline = ink if rng.random() < 0.4 else None
        draw.rounded_rectangle((0, 0, size[0] - 1, size[1] - 1), corner, paper, outline, max(1, pad // 6))
    else:
        stroke = max(1, round((bottom - top) / 12))
    draw.text((pad - left, pad - top), text, fill=ink, font=font, stroke_width=stroke, stroke_fill=paper)
    return image
