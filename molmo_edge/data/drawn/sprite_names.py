"""The pictures of each name: emoji (drawn in several styles) and photo stamps, by everyday English noun.

COCO's classes keep COCO's names, so that drawn scenes and photographs train the same word. Left out on purpose: names
that look alike at 40 pixels, people in poses, flags, faces, and the animal mouse (COCO's mouse is a computer mouse).
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

# A line is "NAME: emoji and paths of Tux Paint stamps (folder/stem, long enough to be unique), separated by blanks".
_TABLE = Path(__file__).with_name("sprite_names.txt")

# Broad names and the narrower names whose pictures they also describe. A scene with one of a pair neither shows the
# other nor calls it absent.
BROADER: dict[str, tuple[str, ...]] = {
    "traffic light": ("green traffic light", "yellow traffic light", "red traffic light"),
    "stop sign": ("bus stop sign",),
    "bird": (
        "chicken", "chick", "duck", "swan", "owl", "eagle", "parrot", "peacock", "penguin", "flamingo",
        "toucan", "pigeon",
    ),
    "fish": ("shark", "whale", "dolphin"),
    "car": ("taxi", "police car", "race car", "ambulance", "truck"),
    "truck": ("fire truck", "ambulance", "tractor", "car"),
    "motorcycle": ("scooter",),
    "tree": ("pine tree", "palm tree", "christmas tree"),
    "flower": ("rose", "tulip", "sunflower", "potted plant"),
    "potted plant": ("cactus", "flower"),
    "clock": ("alarm clock", "watch"),
    "person": ("baby", "santa"),
    "bear": ("panda", "koala", "teddy bear"),
    "teddy bear": ("bear", "panda"),
    "dog": ("wolf", "fox"),
    "monkey": ("gorilla",),
    "hat": ("cap",),
    "shoe": ("boot", "high heel", "roller skate"),
    "cup": ("beer", "milk", "teapot"),
    "bowl": ("salad",),
    "bread": ("baguette", "sandwich"),
    "cake": ("cupcake", "pie"),
    "camera": ("video camera",),
    "book": ("notebook",),
    "envelope": ("mailbox",),
    "handbag": ("backpack", "briefcase"),
    "suitcase": ("briefcase",),
    "keyboard": ("laptop", "piano"),
    "tv": ("laptop",),
    "knife": ("plate", "sword"),
    "spoon": ("bowl",),
    "star": ("sun",),
    "house": ("castle", "church"),
    "mountain": ("volcano",),
    "door": ("house", "castle", "church"),
    "tie": ("t-shirt",),
    "t-shirt": ("tie",),
    "glove": ("boxing glove",),
    "candy": ("lollipop", "candy cane"),
    "pumpkin": ("santa",),
    "glasses": ("sunglasses",),
}  # fmt: skip


def _names(text: str) -> frozenset[str]:
    return frozenset(name.strip() for name in text.replace("\n", " ").split(","))


@cache
def sprite_sources() -> dict[str, tuple[list[str], list[str]]]:
    """{name: (emoji code points as lower-case hex, stamp paths)}, in the table's order.

    The variation selector U+FE0F is dropped: all emoji sets name their pictures without it.
    """
    sources: dict[str, tuple[list[str], list[str]]] = {}
    for line in _TABLE.read_text(encoding="utf-8").splitlines():
        name, _, rest = line.partition(": ")
        tokens = rest.split()
        emoji = [f"{ord(t[0]):x}" for t in tokens if not t.isascii()]
        sources[name] = (emoji, [t for t in tokens if t.isascii()])
    return sources


def overlapping(name: str) -> frozenset[str]:
    """Names that a picture of `name` might also be called, or whose pictures might be called `name`."""
    narrow = BROADER.get(name, ())
    return frozenset(narrow) | {broad for broad, names in BROADER.items() if name in names}


# Everyday objects that photographs show without a label.
UNLABELLED_IN_PHOTOS = _names("""
    alarm clock, anchor, baby, basket, bathtub, battery, beer, bell, bell pepper, boot, box, bread, broom,
    bucket, calendar, camera, candle, candy, cap, cheese, chocolate, chopsticks, church, cloud, cocktail, coin,
    cookie, corn, cucumber, cupcake, doll, door, dress, egg, envelope, eye, fire, flag, flower, fountain, french
    fries, game controller, garlic, gear, glasses, glove, grapes, hamburger, hand, hat, headphones, heart,
    helicopter, high heel, house, ice cream, jacket, kettle, key, ladder, leaf, lemon, lettuce, light bulb,
    lock, mailbox, microphone, milk, mountain, mushroom, newspaper, notebook, onion, palm tree, pancake, pants,
    pen, pencil, pie, pigeon, pine tree, plate, police car, potato, printer, radio, ribbon, ring, rose, salad,
    salt shaker, scarf, scooter, shoe, shopping cart, shorts, soap, sock, spaghetti, star, strawberry, sun,
    sunglasses, t-shirt, taco, taxi, teapot, telephone, tent, toilet paper, tomato, toothbrush, traffic cone,
    trash can, tree, trophy, watch
""")

# What a photograph of one garment may also show.
CLOTHES = _names("""
    bed, book, boot, cap, cell phone, chair, couch, dress, handbag, hat, high heel, jacket, pants, person,
    potted plant, shoe, shorts, t-shirt, teddy bear, tie
""")

# What photographs of playing cards, blood, road signs, receipts, clothes or raccoons do not show by chance.
OUT_OF_PLACE = _names("""
    elephant, zebra, giraffe, lion, tiger, panda, koala, kangaroo, penguin, flamingo, shark, whale, dolphin, octopus,
    crab, lobster, crocodile, unicorn, dragon, dinosaur, rocket, ufo, violin, guitar, trumpet, saxophone, drum, pizza,
    donut, watermelon, pineapple, skis, snowboard, surfboard, robot, ghost, snowman, volcano, train, tractor, camel,
    kite, hot air balloon, igloo, castle, ferris wheel, microscope, telescope, peacock, gorilla, hippo, rhino
""")

# Other common words for a label, used in some questions.
SYNONYMS = {
    "airplane": ("plane",),
    "bicycle": ("bike",),
    "cell phone": ("phone", "mobile phone"),
    "couch": ("sofa",),
    "donut": ("doughnut",),
    "game controller": ("controller",),
    "gift": ("present",),
    "hamburger": ("burger",),
    "laptop": ("computer",),
    "motorcycle": ("motorbike",),
    "mouse": ("computer mouse",),
    "potted plant": ("plant",),
    "rabbit": ("bunny",),
    "refrigerator": ("fridge",),
    "sports ball": ("ball",),
    "trash can": ("bin",),
    "tv": ("television",),
}

COCO_LABELS = _names("""
    person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign,
    parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella,
    handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard,
    surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange,
    broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop,
    mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors,
    teddy bear, hair drier, toothbrush
""")
