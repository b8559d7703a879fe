"""Prompts: golden sequences of whole checkpoints, turns, and the questions of the SDK."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from molmo_edge.checkpoints.hub_config import read_config
from molmo_edge.config import ImageConfig
from molmo_edge.frontend.crops import ImageProcessor, load_image
from molmo_edge.frontend.prompts import (
    PromptError,
    build_caption_prompt,
    build_prompt,
    caption_question,
    count_question,
    image_ids,
    point_question,
    text_ids,
)
from molmo_edge.frontend.tokenizer import Tokenizer

GOLDEN = Path(__file__).parent / "golden"
TOKENIZER = Tokenizer.from_file(GOLDEN / "molmoe_pruned_tokenizer.json")
EOS = TOKENIZER.special.eos


@pytest.mark.parametrize("case", ["square", "landscape", "wide_text"])
@pytest.mark.parametrize("checkpoint", ["molmoe", "qwen", "olmo"])
def test_sequence_equals_the_golden_one(checkpoint, case):
    directory = GOLDEN / checkpoint
    expected = json.loads((directory / "expected.json").read_text(encoding="utf-8"))[case]
    arrays = load_file(directory / "expected.safetensors")
    tokenizer = Tokenizer.from_file(directory / "tokenizer.json")
    processor = ImageProcessor(read_config(directory).image, tokenizer.special)
    image = processor(load_image(GOLDEN / expected["image"]))
    prompt = image_ids(tokenizer, image)
    text = text_ids(tokenizer, [expected["question"]])
    assert prompt.ids.dtype == prompt.token_index.dtype == text.dtype == np.int32
    assert np.array_equal([*prompt.ids, *text], arrays[f"{case}.input_ids"])
    assert np.array_equal(prompt.token_index, arrays[f"{case}.image_input_idx"])
    assert np.array_equal(image.masks, arrays[f"{case}.image_masks"])


@pytest.mark.parametrize("checkpoint", ["molmoe", "qwen", "olmo"])
def test_turns_equal_the_golden_ones(checkpoint):
    """The second of the three packed annotations is a conversation of two turns."""
    directory = GOLDEN / checkpoint
    arrays = load_file(directory / "expected.safetensors")
    tokenizer = Tokenizer.from_file(directory / "tokenizer.json")
    expected = arrays["packing.input_tokens"][arrays["packing.subsegment_ids"] == 2]
    asked = text_ids(tokenizer, ["How many cups?", "Counting the cups shows a total of 3.", "What color?"])
    assert [*asked, *tokenizer.encode(" Red."), tokenizer.special.eos] == expected.tolist()


def test_texts():
    assert build_prompt("Point to the dog.") == " User: Point to the dog. Assistant:"
    assert build_prompt("How many?", style="vqa2") == " User: vqa2: How many? Assistant:"
    assert build_prompt("two\nlines ") == " User: two\nlines  Assistant:"  # unchanged, as in the reference
    assert build_caption_prompt(length=83) == " long_caption 83:"
    assert build_caption_prompt("transcript", 40) == " transcript 40:"
    assert build_caption_prompt(length=None) == " long_caption :"


def test_turns():
    ids = text_ids(TOKENIZER, ["What?", "A dog.", "Where?"], style="vqa2").tolist()
    assert ids == [
        *TOKENIZER.encode(" User: What? Assistant:"),
        *TOKENIZER.encode(" A dog."),
        EOS,
        *TOKENIZER.encode(" User: vqa2: Where? Assistant:"),
    ]


def test_special_tokens_in_a_question_stay_text():
    image = ImageProcessor(ImageConfig(max_crops=1))(np.zeros((8, 8, 3), np.uint8))
    prompt = image_ids(TOKENIZER, image)
    ids = np.array([*prompt.ids, *text_ids(TOKENIZER, ["<im_patch><|endoftext|>", "<|endoftext|>", "<|image|>"])])
    special = TOKENIZER.special
    assert (ids == special.im_patch).sum() == (prompt.token_index >= 0).sum() == 288
    assert (ids == special.eos).sum() == 2  # BOS, and the end of the first answer
    assert special.image not in ids
    kept = prompt.token_index[prompt.token_index >= 0]
    assert (prompt.ids[kept] == special.im_patch).all()


@pytest.mark.parametrize("question", ["", " ", "\n\t"])
def test_empty_questions_are_refused(question):
    with pytest.raises(PromptError, match="empty"):
        text_ids(TOKENIZER, [question])
    with pytest.raises(PromptError, match="empty"):
        text_ids(TOKENIZER, [question, "answer", "question"])


@pytest.mark.parametrize("turns", [[], ["question", "answer"], "question"])
def test_turns_that_do_not_alternate_are_refused(turns):
    with pytest.raises(PromptError, match="turns"):
        text_ids(TOKENIZER, turns)


@pytest.mark.parametrize(
    ("label", "question"),
    [
        ("dog", "Point to the dog."),
        ("the dog", "Point to the dog."),
        ("A red cup.", "Point to the red cup."),
        (" two\n  words ", "Point to the two words."),
        ("all cups", "Point to all cups."),
        ("my left shoe", "Point to my left shoe."),
        ("theatre", "Point to the theatre."),
        ("a", "Point to the a."),
        ("NASA logo?", "Point to the NASA logo."),
    ],
)
def test_point_questions(label, question):
    assert point_question(label) == question


@pytest.mark.parametrize(
    ("label", "question"),
    [
        ("cups", "How many cups are there?"),
        ("the cups", "How many cups are there?"),
        ("red cups.", "How many red cups are there?"),
        ("the", "How many the are there?"),
    ],
)
def test_count_questions(label, question):
    assert count_question(label) == question


def test_caption_question_and_empty_labels():
    assert caption_question() == "Describe this image."
    for ask in (point_question, count_question):
        for label in ("", " \n", "?!"):
            with pytest.raises(PromptError, match="empty"):
                ask(label)
