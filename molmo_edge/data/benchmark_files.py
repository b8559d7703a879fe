"""Benchmarks from their authors' files, with the columns of the hub's copies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from molmo_edge.data.json_files import read_json
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

    `version` "": OK-VQA, which has the same files (okvqa.allenai.org). Pictures are in val2014 or images/val2014. Rows
    are grouped by picture. Answers of test splits are None. Returns None if the questions are not in `folder`.
    """
    names = _VQA2.get(split)
    questions = folder / f"{version}OpenEnded_mscoco_{names[0]}_questions.json" if names else None
    if names is None or questions is None or not questions.is_file():
        return None
    annotations = folder / f"{version}mscoco_{names[0]}_annotations.json"
    answers: dict[int, Any] = {}
    if annotations.is_file():
        answers = {each["question_id"]: each["answers"] for each in read_json(annotations, RowsError)["annotations"]}
    elif not names[0].startswith("test"):
        raise RowsError(f"the answers to {questions} are missing: put {annotations.name} into {folder}")
    images = "images/" if (folder / "images" / names[1]).is_dir() else ""
    by_image: dict[int, list[dict[str, Any]]] = {}
    for each in read_json(questions, RowsError)["questions"]:
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

    The pictures are in images (as in the reference) or infographicsvqa_images (as in the archive). Returns None if the
    questions are not in `folder`.
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
            "image_url": each["image_local_name"],  # identifies the picture, like the URL on the hub
            "image": f"{images}/{each['image_local_name']}",
        }
        for each in read_json(questions, RowsError)["data"]
    ]
    return rows_of(folder, rows)
