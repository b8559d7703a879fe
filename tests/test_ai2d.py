"""AI2D from its authors' files: both kinds of boxes are drawn and scored as in the reference."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from molmo_edge.data.ai2d import draw_letters
from molmo_edge.data.rows import RowsError
from molmo_edge.evaluation.benchmarks import benchmark_questions
from molmo_edge.evaluation.questions import Question
from molmo_edge.frontend.crops import load_image


def asked(folder: Path, split: str | None = None) -> list[Question]:
    return list(benchmark_questions("ai2d", local=folder, split=split, on_skipped=pytest.fail))


def official(folder: Path) -> Path:
    """Two test images and one training image; one has a letter drawn on it."""
    root = folder / "ai2d"
    for name in ("questions", "annotations", "images"):
        (root / name).mkdir(parents=True)
    for number in (7, 30, 2):
        Image.new("RGB", (120, 100), (200, 100, 40)).save(root / "images" / f"{number}.png")

    def ask(number: int, *asked: tuple[str, list[str], int, bool]) -> None:
        listed = {
            text: {
                "abcLabel": letters,
                "answerTexts": options,
                "correctAnswer": answer,
                "questionId": f"{number}.png-{i}",
            }
            for i, (text, options, answer, letters) in enumerate(asked)
        }
        whole = {"imageName": f"{number}.png", "questions": listed}
        (root / "questions" / f"{number}.png.json").write_text(json.dumps(whole))

    ask(30, ("Which is the eye?", ["a", "c", "{}", "none"], 1, True), ("What is it?", ["cat", "dog"], 1, False))
    ask(7, ("What is C?", ["eye", "ear", "nose"], 0, True))
    ask(2, ("What is shown?", ["cat", "dog"], 0, False))
    boxes = {
        "T0": {"rectangle": [[40, 30], [80, 50]], "replacementText": "C", "value": "eye"},
        "T1": {"rectangle": [[10, 70], [50, 90]], "replacementText": "A", "value": "ear"},
        "T2": {"rectangle": [[90, 5], [110, 5]], "replacementText": "B", "value": "flat, not drawn"},
    }
    for number in (30, 7):
        (root / "annotations" / f"{number}.png.json").write_text(json.dumps({"text": boxes}))
    (folder / "ai2d_test_ids.csv").write_text("30\n7\n")
    return folder


def test_official_ai2d_asks_with_both_kinds_of_boxes(tmp_path: Path) -> None:
    folder = official(tmp_path)
    found = asked(folder)
    ids = ["7.png-0", "7.png-0_transparent", "30.png-1", "30.png-0", "30.png-0_transparent"]
    assert [question.id for question in found] == [f"ai2d/{id}" for id in ids]
    assert len({question.image_id for question in found}) == 5
    named, _, plain, opaque, transparent = found
    assert named.text == "ai2_diagram: What is C?\nA: eye\nB: ear\nC: nose\n"
    assert opaque.text == transparent.text == "ai2_diagram_no_letter: Which is the eye?\nA\nC\nnone\n"
    assert (opaque.truth, plain.text) == ("C", "ai2_diagram: What is it?\nA: cat\nB: dog\n")
    assert plain.score("B") == {"mc": 1.0, "mc_opaque": 1.0, "mc_transparent": 1.0}
    assert opaque.score("C") == {"mc": 1.0, "mc_opaque": 1.0}
    assert [transparent.score(text) for text in ("c", "A", "no")] == [
        {"mc": score, "mc_transparent": score} for score in (1.0, 0.0, 0.0)
    ]
    assert [question.id for question in asked(folder / "ai2d", split="validation")] == ["ai2d/2.png-0"]
    assert asked(folder, split="train") == []  # up to 384 images are held out
    with pytest.raises(RowsError, match=r'"dev" is not a split of AI2D \(splits: train, validation, test\)'):
        asked(folder, split="dev")
    (folder / "ai2d_test_ids.csv").unlink()
    with pytest.raises(RowsError, match=r"no ai2d_test_ids\.csv"):
        asked(folder)


def test_letters_are_drawn_as_the_reference_draws_them(tmp_path: Path) -> None:
    _, _, plain, opaque, transparent = asked(official(tmp_path))
    ground = np.array([200, 100, 40])
    original, hidden, shown = (load_image(q.image()).astype(int) for q in (plain, opaque, transparent))
    assert (original == ground).all()

    # Opaque: the colour of the box at its edge, black letter pixels near its middle, nothing outside.
    assert (hidden[30, 40:81] == (25, 249, 255)).all()
    assert (hidden[50, 40:81] == (25, 249, 255)).all()
    dark = np.argwhere(hidden[28:53, 38:83].sum(-1) < 100) + np.array((28, 38))
    assert len(dark) > 20
    assert np.abs(dark.mean(0) - (40, 60)).max() < 3
    assert 9 <= np.ptp(dark[:, 0]) <= 20  # as large as its box allows, up to 22 pixels
    assert (hidden[29] == ground).all()
    assert (hidden[:, 81:] == ground).all()

    # Transparent: a mix of ground and box colours; a white tag with the letter at the top left corner.
    half = np.round(ground + (np.array([25, 249, 255]) - ground) * 127 / 255)
    assert np.abs(shown[40:51, 60:81] - half).max() <= 1
    tag = np.argwhere((shown[15:60, 20:90] == 255).all(-1)) + np.array((15, 20))
    assert tag[:, 1].min() >= 28
    assert tag[:, 0].min() >= 20
    assert tag[:, 0].max() <= 45
    assert tag[:, 1].max() <= 60
    assert (shown[tag[:, 0].min() : tag[:, 0].max(), 28 : tag[:, 1].max()].sum(-1) < 100).any()


def test_a_low_box_keeps_the_letters_size() -> None:
    image = Image.new("RGB", (60, 60), "white")
    low = {"rectangle": [[10, 20], [50, 24]], "replacementText": "A"}
    drawn = np.asarray(draw_letters(image, [low], transparent=False)).astype(int)
    dark = np.argwhere(drawn.sum(-1) < 100)
    assert np.ptp(dark[:, 0]) >= 12  # a box of four pixels is too small: the letter is larger than its box
