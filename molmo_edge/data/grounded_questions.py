"""Questions and answers about an annotated image, drawn scene or photograph, in Molmo's grammar.

Only questions with unambiguous answers are asked: crowds are not counted, objects that a backdrop may show are not
called absent, and objects on the border of two regions are not located. As in Molmo, the answer uses the question's
name for an object.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np

from molmo_edge.data.annotated_photos import Annotation
from molmo_edge.data.annotation_prompts import COUNTING, POINTING
from molmo_edge.data.choices import pick
from molmo_edge.data.drawn.sprite_names import COCO_LABELS, OUT_OF_PLACE, SYNONYMS, UNLABELLED_IN_PHOTOS, overlapping
from molmo_edge.data.english import be, counted, listed, plural, with_article
from molmo_edge.frontend.points import NONE, format_absent, format_count, format_points
from molmo_edge.frontend.totals import format_total

Box = Sequence[float]  # x0, y0, x1, y1, percent

MOST_INSTANCES = 12  # labels with more are neither pointed at nor counted
SMALLEST = 3.0  # percent: a label is skipped if the longer side of an instance is smaller
BORDER = 4.0  # percent: objects nearer to the border of two regions are in neither

ABSENT = 2  # most questions about absent labels
# Relative frequency of each kind, among the kinds that the image allows.
KINDS = {
    "point": 3.0,
    "count": 2.5,
    "negative": 1.0,
    "where": 1.0,
    "what": 0.8,
    "yes_no": 0.8,
    "read": 3.0,
    "clock": 3.0,
    "caption": 1.2,
}

# {x}: the label. As in annotation_prompts.py, the first template of each list is the SDK's question. It is used half of
# the time.
_WHERE = ("Where is the {x}?", "In which part of the image is the {x}?", "Where do you see the {x}?")
_WHAT = ("What is at the {r}?", "What do you see at the {r}?", "Which object is at the {r}?")
_IS_THERE = ("Is there {a} in the image?", "Is there {a} in this picture?", "Can you see {a}?", "Do you see {a}?")
_READ = ("What does the text say?", "What does it say?", "Read the text.", "What is written here?")
_READ_AT = ("What is written at the {r}?", "What does the text at the {r} say?", "Read the text at the {r}.")
_CLOCK = ("What time is it?", "What time does the clock show?", "Read the clock.", "Tell me the time.")
_CAPTION = ("Describe this image.", "What is in this image?", "Caption this image.", "What do you see?")
_RECEIPT = {"total": "What is the total?", "date": "What is the date?", "company": "Which company is this from?"}
_GARMENT = ("What kind of clothing is this?", "Which garment is this?", "What is in this image?")
_GARMENTS = {"longsleeve": "long-sleeved shirt", "outwear": "jacket"}

# Labels whose instances a source annotates exhaustively, so that a label without a box is absent.
_CLOSED = {
    "cards": frozenset({"king", "ace", "nine", "ten", "jack", "queen"}),
    "road_signs": frozenset({"green traffic light", "yellow traffic light", "red traffic light", "parking sign"}),
}

_ROWS, _COLUMNS = ("top", "", "bottom"), ("left", "", "right")


@dataclass(frozen=True)
class QA:
    """A question about an annotated picture, with its answer."""

    question: str
    answer: str
    kind: str  # of KINDS
    target_boxes: np.ndarray | None = None  # float32 [k, 4], percent; in the order of the answer's points


def write_questions(
    annotation: Annotation,
    rng: np.random.Generator,
    *,
    max_questions: int,
    vocabulary: Collection[str],
    absent: int = ABSENT,
    empty_tags: bool = False,
) -> list[QA]:
    """Up to `max_questions` different questions with answers, in random order; fewer if the annotation allows no more.

    `vocabulary`: the labels used in training, from which absent ones are chosen. `absent`: the maximum number of
    questions about absent labels; they are weighted in proportion to it. `empty_tags`: their answers are tags without
    points, for a model with a grounding head, which then decides whether there is anything to point to.
    """
    frequency = KINDS | {"negative": KINDS["negative"] * absent / ABSENT}
    makers: dict[str, Callable[[], list[QA]]] = {
        "point": lambda: [_point(rng, o) for o in _countable(annotation)],
        "count": lambda: [_count(rng, o) for o in _countable(annotation)],
        "negative": lambda: _negatives(annotation, rng, vocabulary, absent, empty_tags),
        "where": lambda: _where(annotation, rng),
        "what": lambda: _what(annotation, rng),
        "yes_no": lambda: _yes_no(annotation, rng, vocabulary),
        "read": lambda: _read(annotation, rng),
        "clock": lambda: _clock(annotation, rng),
        "caption": lambda: _caption(annotation, rng),
    }
    candidates = {kind: found for kind, make in makers.items() if (found := make())}
    chosen: list[QA] = []
    while candidates and len(chosen) < max_questions:
        kinds = list(candidates)
        weights = np.array([frequency[k] for k in kinds])
        kind = kinds[int(rng.choice(len(kinds), p=weights / weights.sum()))]
        chosen.append(candidates[kind].pop(int(rng.integers(len(candidates[kind])))))
        if not candidates[kind]:
            del candidates[kind]
    return chosen


def grounded_names(annotation: Annotation) -> list[tuple[str, list[float]]]:
    """Every labelled instance as (label, percent box), including those of crowds."""
    return [(o["label"], list(box)) for o in annotation.get("objects", ()) for box in o["boxes"]]


def region_of(box: Box) -> str | None:
    """The ninth with the centre of the box: "top left", "top", ..., "center". None near a border of two."""
    ninth = []
    for low, high in ((box[0], box[2]), (box[1], box[3])):
        middle = (low + high) / 2
        if min(abs(middle - 100 / 3), abs(middle - 200 / 3)) < BORDER:
            return None
        ninth.append(int(middle * 3 // 100))
    return f"{_ROWS[min(ninth[1], 2)]} {_COLUMNS[min(ninth[0], 2)]}".strip() or "center"


# --- pointing and counting --------------------------------------------------------------------------------------


def _countable(annotation: Annotation) -> list[Annotation]:
    """Labels whose instances are all known, visible and few."""
    uncertain = set(annotation.get("maybe_present", ()))
    return [
        o
        for o in annotation.get("objects", ())
        if 0 < len(o["boxes"]) <= MOST_INSTANCES
        and not o.get("crowd")
        and o["label"] not in uncertain
        and min(max(b[2] - b[0], b[3] - b[1]) for b in o["boxes"]) >= SMALLEST
    ]


def asked_for(rng: np.random.Generator, label: str, templates: Sequence[str]) -> tuple[str, str]:
    """(question, its name for the label: singular or plural, sometimes a synonym)."""
    if label in SYNONYMS and rng.random() < 0.15:
        label = pick(rng, SYNONYMS[label])
    template = _phrase(rng, templates)
    if templates is COUNTING or (template in POINTING[1:] and rng.random() < 0.5):
        label = plural(label)
    return template.format(x=label), label.lower()


def _ordered(item: Annotation) -> tuple[list[tuple[float, float]], np.ndarray]:
    """(points sorted by x, then y; their boxes, float32 [k, 4]): the order of an answer."""
    order = sorted(range(len(item["points"])), key=lambda i: tuple(round(v, 1) for v in item["points"][i]))
    points = [(float(item["points"][i][0]), float(item["points"][i][1])) for i in order]
    return points, np.array([item["boxes"][i] for i in order], np.float32)


def _point(rng: np.random.Generator, item: Annotation) -> QA:
    question, words = asked_for(rng, item["label"], POINTING)
    points, boxes = _ordered(item)
    return QA(question, format_points(points, words), "point", boxes)


def _count(rng: np.random.Generator, item: Annotation) -> QA:
    question, words = asked_for(rng, item["label"], COUNTING)
    points, boxes = _ordered(item)
    return QA(question, format_count(points, words), "count", boxes)


def _negatives(
    annotation: Annotation, rng: np.random.Generator, vocabulary: Collection[str], most: int, empty_tags: bool
) -> list[QA]:
    """Questions about at most `most` absent labels, half as many if no present label can be asked for."""
    labels = sorted(absent_labels(annotation, vocabulary))
    if not labels:
        return []
    size = min(most if _countable(annotation) else -(-most // 2), len(labels))
    questions = []
    for label in rng.choice(labels, size=size, replace=False):
        counting = rng.random() >= 0.5
        question, words = asked_for(rng, str(label), COUNTING if counting else POINTING)
        tag = format_absent(words)
        with_tag = format_total(tag, 0) if counting else tag
        questions.append(QA(question, with_tag if empty_tags else NONE, "negative"))
    return questions


def _yes_no(annotation: Annotation, rng: np.random.Generator, vocabulary: Collection[str]) -> list[QA]:
    """A question about a label in the picture, and one about an absent label."""
    present = [o["label"] for o in _countable(annotation)]
    absent = sorted(absent_labels(annotation, vocabulary))
    asked = [(pick(rng, labels), answer) for labels, answer in ((present, "Yes."), (absent, "No.")) if labels]
    return [QA(_phrase(rng, _IS_THERE).format(a=with_article(label)), answer, "yes_no") for label, answer in asked]


def absent_labels(annotation: Annotation, vocabulary: Collection[str]) -> set[str]:
    """Names of `vocabulary` that are certainly not in the picture, given what its source annotates.

    An annotation can list the names known to be absent under "absent"; the rules for sources are then not used.
    """
    names = set(vocabulary)
    source = annotation["source"]
    if "absent" in annotation:
        names &= set(annotation["absent"])
    elif source == "coco":
        if "objects" not in annotation:
            return set()
        names = names - UNLABELLED_IN_PHOTOS | names & COCO_LABELS
    elif source != "scene":
        names &= OUT_OF_PLACE | _CLOSED.get(source, frozenset())
    for label in annotation.get("maybe_present", ()):
        names -= {label} | overlapping(label)
    for item in annotation.get("objects", ()):
        # A label without boxes (after a crop) is absent, unless a part of an instance may be left.
        if item["boxes"] or item.get("crowd"):
            names -= {item["label"]} | overlapping(item["label"])
    return names


# --- places -----------------------------------------------------------------------------------------------------


def _at(region: str) -> str:
    return "in the center" if region == "center" else f"at the {region}"


def _where(annotation: Annotation, rng: np.random.Generator) -> list[QA]:
    questions = []
    for item in _countable(annotation):
        region = region_of(item["boxes"][0]) if len(item["boxes"]) == 1 else None
        if region is not None:
            label = item["label"]
            question, words = asked_for(rng, label, _WHERE)
            answer = f"The {words} {be(words)} {_at(region)}."
            questions.append(QA(question.replace("is the", f"{be(words)} the"), answer, "where", _ordered(item)[1]))
    return questions


def _what(annotation: Annotation, rng: np.random.Generator) -> list[QA]:
    """The only object in a ninth. Scenes only, where everything is labelled."""
    if annotation["source"] != "scene" or annotation.get("backdrop") == "photo":
        return []
    found = grounded_names(annotation) + [("", t["box"]) for t in annotation["texts"]]
    questions = []
    for label, box in found:
        region = region_of(box)
        if label and region and not any(_reaches(other, region) for _, other in found if other is not box):
            question = _phrase(rng, _WHAT).format(r=region)
            if region == "center":
                question = question.replace("at the", "in the")
            answer = with_article(label)
            questions.append(QA(question, f"{answer[0].upper()}{answer[1:]}.", "what", np.array([box], np.float32)))
    return questions


def _reaches(box: Box, region: str) -> bool:
    """Whether the box reaches into the ninth."""
    x = 100 / 3 * (0 if "left" in region else 2 if "right" in region else 1)
    y = 100 / 3 * (0 if "top" in region else 2 if "bottom" in region else 1)
    return box[0] < x + 100 / 3 and box[2] > x and box[1] < y + 100 / 3 and box[3] > y


# --- text, clocks, captions -------------------------------------------------------------------------------------


def _read(annotation: Annotation, rng: np.random.Generator) -> list[QA]:
    if annotation["source"] == "receipts":
        fields = annotation.get("fields", {})
        return [QA(question, fields[key], "read") for key, question in _RECEIPT.items() if fields.get(key)]
    texts = annotation.get("texts", ())
    if not texts or annotation.get("texts_cut"):
        return []
    boxes = np.array([t["box"] for t in texts], np.float32)
    questions = [QA(_phrase(rng, _READ), "\n".join(t["text"] for t in texts), "read", boxes)]
    for i, text in enumerate(texts if len(texts) > 1 else ()):
        region = region_of(text["box"])
        if region and not any(_reaches(t["box"], region) for j, t in enumerate(texts) if j != i):
            question = _phrase(rng, _READ_AT).format(r=region)
            question = question.replace("at the center", "in the center")
            questions.append(QA(question, text["text"], "read", boxes[i : i + 1]))
    return questions


def _clock(annotation: Annotation, rng: np.random.Generator) -> list[QA]:
    clocks = annotation.get("clocks", ())
    if len(clocks) != 1 or annotation.get("clocks_cut"):
        return []
    return [QA(_phrase(rng, _CLOCK), clocks[0]["time"], "clock", np.array([clocks[0]["box"]], np.float32))]


def _caption(annotation: Annotation, rng: np.random.Generator) -> list[QA]:
    if annotation.get("captions"):
        return [QA(_phrase(rng, _CAPTION), pick(rng, annotation["captions"]).strip(), "caption")]
    garment = annotation.get("fields", {}).get("class")
    if garment and garment not in ("not sure", "other"):
        answer = with_article(_GARMENTS.get(garment, garment))
        return [QA(_phrase(rng, _GARMENT), f"{answer[0].upper()}{answer[1:]}.", "caption")]
    if annotation["source"] == "receipts":
        return [QA(_phrase(rng, _CAPTION), "A scanned receipt.", "caption")]
    answer = describe(annotation)
    return [QA(_phrase(rng, _CAPTION), answer, "caption")] if answer else []


def describe(annotation: Annotation) -> str:
    """A caption such as "A photo with two dogs, a cup and a clock.", largest first; "" if nothing is labelled."""
    named = [o for o in annotation.get("objects", ()) if o["boxes"]]
    named.sort(key=lambda o: -sum((b[2] - b[0]) * (b[3] - b[1]) for b in o["boxes"]))
    # A crowd has an unknown number of instances: "many".
    parts = [counted(o["label"], 99 if o.get("crowd") else len(o["boxes"])) for o in named[:6]]
    if not annotation.get("texts_cut") and annotation["source"] != "receipts":
        parts += [f'the text "{t["text"]}"' for t in annotation.get("texts", ())]
    return f"A photo with {listed(parts)}." if parts else ""


def _phrase(rng: np.random.Generator, options: Sequence[str]) -> str:
    """The first phrase half of the time, else any."""
    return options[0] if rng.random() < 0.5 else pick(rng, options)
