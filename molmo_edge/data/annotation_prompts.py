"""Converts annotations to the texts that are tokenised: templates, style tags, lengths and roles.

The structure is the reference's (olmo/data/data_formatter.py::DataFormatter). The templates are original, in the same
registers: polite and curt, with and without punctuation.
"""

from __future__ import annotations

from collections.abc import Sequence
from string import ascii_uppercase

import numpy as np

from molmo_edge.data.choices import pick
from molmo_edge.data.examples import Annotation
from molmo_edge.frontend.chatml import styled_question
from molmo_edge.frontend.points import Point, format_count, format_points
from molmo_edge.frontend.prompts import build_caption_prompt, build_prompt

Points = Sequence[Point | tuple[float, float]]  # percent

# Styles that a model should also answer without a tag: most of their prompts have none.
CONVERSATIONAL = frozenset({"pointing", "point_count", "user_qa", "long_caption"})
UNTAGGED = frozenset({"android_control", "demo"})
TAGGED_SHARE = 0.1  # of conversational prompts
LENGTH_UNIT, LENGTH_NOISE, UNCONDITIONED = (
    15,
    25.0,
    0.1,
)  # characters, their standard deviation, share of prompts without a length

# {x} is the label. The first template of each list is the SDK's question (molmo_edge/frontend/prompts.py).
POINTING = (
    "Point to the {x}.", "Point to {x}.", "Point to {x}", "point to the {x}", "Point at {x}.", "Point at all {x}",
    "Point out the {x}.", "Point out every {x} in the picture.", "Please point to the {x}.", "Please point at {x}",
    "Can you point to the {x}?", "Could you point out the {x}?", "Would you point at {x} for me?", "pointing: {x}",
    "Point: {x}", "point {x}", "Show me the {x}.", "Show me where the {x} is.", "Show where to find {x}.",
    "Show {x} with points.", "Where is the {x}? Point to it.", "Where are the {x}? Answer with points.",
    "Where can I see {x}?", "Locate {x}.", "Locate all {x} in the image.", "Locate each {x} with a point.",
    "Find the {x}.", "Find {x}", "Find all {x} and point to them.", "Find every {x} in this photo, point at each.",
    "Mark the {x}.", "Mark each {x} with a point.", "Mark all the {x} you can see", "Put a point on the {x}.",
    "Put a dot on each {x}.", "Tag every {x} with a point", "Indicate the {x} by pointing.", "Indicate {x}.",
    "Give me the location of {x}.", "Give points for {x}.", "I am looking for {x}. Point to it.",
    "I'd like to see the {x}, can you point at it?", "Help me find the {x}.", "Do you see {x}? Point.",
    "If there are any {x} in the picture, point to them.", "Point to the {x}, or tell me if there are none.",
    "Pick out the {x}.", "Which spot in the image is {x}? Point.", "{x}: point to it", "Click on the {x}.",
)  # fmt: skip
COUNTING = (
    "How many {x} are there?", "How many {x} are there", "how many {x}?", "How many {x}", "How many {x} do you see?",
    "How many {x} can you see?", "How many {x} are in the image?", "How many {x} are in this picture?",
    "How many {x} are visible?", "How many {x} does this photo show?", "How many {x} can be seen here?",
    "How many {x} can you count in the image?", "Count the {x}.", "Count {x}.", "count {x}", "Count all {x}.",
    "Count all the {x} in the picture.", "Count every {x}", "Count each {x} you see.", "Please count the {x}.",
    "Can you count the {x}?", "Could you count the {x} for me?", "Would you count {x} in this image?", "counting: {x}",
    "Count the number of {x}.", "Count how many {x} there are.", "Count up the {x} in the photo.",
    "What is the number of {x}?", "What number of {x} are there?", "What is the total number of {x} in the image?",
    "What's the count of {x}?", "The number of {x}?", "Number of {x}", "Total {x}?", "total count of {x}",
    "Tell me how many {x} there are.", "Tell me the number of {x} in the picture.", "Tell me the count of {x}",
    "Give me the number of {x}.", "Give a count of {x}.", "Say how many {x} you see.", "I need the number of {x}.",
    "I want to know how many {x} there are.", "Do you know how many {x} are in here?", "Find out how many {x} exist.",
    "Determine the number of {x}.", "Look at the picture and count {x}.", "In this image, how many {x} are there?",
    "Point to each {x} and count them.", "How many {x}? Point while you count.", "Are there any {x}? How many?",
    "{x}: how many?",
)  # fmt: skip
CAPTIONING = (
    "Describe this image.", "Describe this image", "describe this picture", "Describe the photo in detail.",
    "Describe everything you see here.", "Please describe this image.", "Please describe the image in detail.",
    "Can you describe this image?", "Could you tell me what this picture shows?", "What is in this image?",
    "What do you see in this picture?", "What does the image show?", "What is this a picture of?",
    "What's going on in this photo?", "Tell me about this image.", "Tell me what you see.",
    "Write a long description of this image.", "Write a detailed caption.", "Write a caption for this picture.",
    "Give a detailed description of the picture.", "Give me a caption for this image.", "Caption this image.",
    "caption", "Explain what this picture shows to someone who cannot see it.", "Look at the image and describe it.",
    "I cannot see the picture. What is in it?", "Provide a thorough caption of this photo.",
)  # fmt: skip
# Prefixes of "how many" questions whose answer has no points.
_NO_POINTS = (
    "No points: ", "no points: ", "No points:\n", "No points please. ", "No pointing: ", "no pointing\n",
    "Without points: ", "Without pointing, ", "Do not point. ", "Don't point. ", "Please don't point.\n",
    "Please do not use points. ", "Don't use points: ", "Answer without points. ", "Answer without pointing:\n",
    "Do not give points for this one. ", "Leave out the points. ", "Words only. ", "In words, not points: ",
)  # fmt: skip


# --- annotations of each kind ---------------------------------------------------------------------------------------


def pointing(label: str, points: Points, rng: np.random.Generator) -> Annotation:
    """Points at every instance, or that there are none. `points`: percent. Reference: `format_points`."""
    words = label.lower()
    return Annotation("pointing", (pick(rng, POINTING).format(x=words), format_points(points, words)))


def counting(label: str, points: Points, rng: np.random.Generator) -> Annotation:
    """The number of instances, with a point at each. `points`: percent."""
    words = label.lower()
    return Annotation("point_count", (pick(rng, COUNTING).format(x=words), format_count(points, words)))


def caption(text: str, rng: np.random.Generator, style: str = "long_caption") -> Annotation:
    """A caption, or with `style` "transcript" an annotator's speech. Stage 1 replaces the question: `captioning`."""
    return Annotation(style, (pick(rng, CAPTIONING), text))


def multiple_choice(question: str, options: Sequence[str], answer: int, style: str) -> Annotation:
    """A question with a line "A: ..." for each option; the answer is a letter. Reference: `format_options`."""
    lines = [f"{letter}: {option}" for letter, option in zip(ascii_uppercase, options, strict=False)]
    return Annotation(style, ("\n".join([question, *lines, ""]), ascii_uppercase[answer]))


def without_points(question: str, rng: np.random.Generator) -> str:
    """Add a request for an answer without points to a "how many" question. Other questions are unchanged."""
    asks = question.lower().startswith("how many")
    return pick(rng, _NO_POINTS) + question if asks else question


# --- texts ------------------------------------------------------------------------------------------------------------


def conversation(annotation: Annotation, rng: np.random.Generator) -> list[str]:
    """Stage 2 and later: " User: vqa2: {question} Assistant:", " {answer}", ...

    The tag precedes the first question. Reference: "demo_or_style" and message format "role".
    """
    style = annotation.style
    tagged = style not in UNTAGGED and (style not in CONVERSATIONAL or rng.random() < TAGGED_SHARE)
    texts = []
    for turn, message in enumerate(annotation.messages):
        if turn % 2:
            texts.append(f" {message}")
        else:
            texts.append(build_prompt(message, style=style if tagged and not turn else None))
    return texts


def chat(annotation: Annotation) -> list[str]:
    """Molmo2: the texts alone, a tag before the first question where one is written.

    Reference: "demo_or_style_v2" and message format "qwen3"; the markup is that of molmo_edge/frontend/chatml.py.
    """
    first, *rest = annotation.messages
    return [first if annotation.style in UNTAGGED else styled_question(first, annotation.style), *rest]


def captioning(annotation: Annotation, rng: np.random.Generator) -> list[str]:
    """Stage 1: " long_caption 83:", " {caption}", without roles.

    The number is the length of the answer in units of 15 characters, with noise; one prompt in ten has none.
    Reference: "style_and_length".
    """
    text = annotation.messages[-1]
    length = None
    if rng.random() > UNCONDITIONED:
        length = (len(text) + int(rng.normal(scale=LENGTH_NOISE))) // LENGTH_UNIT
    return [build_caption_prompt(annotation.style, length), f" {text}"]
