"""Benchmarks in the files that their authors publish, with the columns that they have on the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from molmo_edge.data.rows import Rows, RowsError, rows_of

_VQA2 = {  # split -> questions, images
    "train": ("train2014", "train2014"),
    "validation": ("val2014", "val2014"),
    "test": ("test2015", "test2015"),
    "testdev": ("test-dev2015", "test2015"),
}
_INFO_QA = {
    "train": "infographicsVQA_train_v1.0.json",
    "validation": "infographicsVQA_val_v1.0_withQT.json",
    "test": "infographicsVQA_test_v1.0.json",
}


def vqa2_rows(folder: Path, split: str, version: str = "v2_") -> Rows | None:
    """VQAv2 from v2_OpenEnded_mscoco_val2014_questions.json and v2_mscoco_val2014_annotations.json (visualqa.org).

    `version` "": OK-VQA, which has the same files (okvqa.allenai.org).

    COCO's pictures are in val2014 beside them, or in images/val2014. Questions about one picture stand side by side.
    Test splits have no annotations: their answers are None. None if the questions are not in `folder`.
    """
    names = _VQA2.get(split)
    questions = folder / f"{version}OpenEnded_mscoco_{names[0]}_questions.json" if names else None
    if names is None or questions is None or not questions.is_file():
        return None
    annotations = folder / f"{version}mscoco_{names[0]}_annotations.json"
    answers: dict[int, Any] = {}
    if annotations.is_file():
        answers = {each["question_id"]: each["answers"] for each in read_json(annotations)["annotations"]}
    elif not names[0].startswith("test"):
        raise RowsError(f"{questions} has no answers beside it: put {annotations.name} into {folder}")
    images = "images/" if (folder / "images" / names[1]).is_dir() else ""
    by_image: dict[int, list[dict[str, Any]]] = {}
    for each in read_json(questions)["questions"]:
        number = each["image_id"]
        row = {
            "question_id": each["question_id"],
            "question": each["question"],
            "answers": answers.get(each["question_id"]),
            "image_id": number,
            "image": f"{images}{names[1]}/COCO_{names[1]}_{number:012d}.jpg",
        }
        by_image.setdefault(number, []).append(row)
    return rows_of(folder, [row for rows in by_image.values() for row in rows])


def info_qa_rows(folder: Path, split: str) -> Rows | None:
    """InfographicVQA from infographicsVQA_val_v1.0_withQT.json (rrc.cvc.uab.es, challenge 17, task 3).

    The pictures are in images (as the reference has them) or in infographicsvqa_images (as the archive calls it).
    None if the questions are not in `folder`.
    """
    questions = folder / _INFO_QA.get(split, "")
    if not questions.is_file():
        return None
    images = "infographicsvqa_images" if (folder / "infographicsvqa_images").is_dir() else "images"
    rows = [
        {
            "questionId": each["questionId"],
            "question": each["question"],
            "answers": each.get("answers"),
            "image_url": each["image_local_name"],  # one for each picture, as the URL on the hub
            "image": f"{images}/{each['image_local_name']}",
        }
        for each in read_json(questions)["data"]
    ]
    return rows_of(folder, rows)


def read_json(path: Path) -> Any:
    """Raises RowsError for a file that is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RowsError(f"{path} is not JSON: {error}; copy or download it again") from None
