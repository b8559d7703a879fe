"""Academic data sets from their authors' files, with the columns of the hub's copies.

Each function takes a folder and a split, and returns None if the folder has another layout or the set lacks the split.
A row is one question, or with the column "questions" a picture with all its questions. Layouts: the builders in
olmo/hf_datasets, and for ST-VQA olmo/data/academic_datasets.py. (AI2D: ai2d.py.)
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

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
_ST_QA_VALIDATION = 1024  # questions that the reference holds out of training


def st_qa_rows(folder: Path, split: str) -> Rows | None:
    """ST-VQA's third task: train_task_3.json and the folders of pictures beside it (rrc.cvc.uab.es, challenge 11).

    The authors have no validation split; this one equals the reference's.
    """
    questions = folder / "train_task_3.json"
    if not questions.is_file():
        return None
    listed = sorted(read_json(questions, RowsError)["data"], key=lambda each: each["question_id"])
    order = np.arange(len(listed))
    np.random.RandomState(63069).shuffle(order)
    kept = order[_ST_QA_VALIDATION:] if split == "train" else order[:_ST_QA_VALIDATION]
    columns = {"question_id": "question_id", "question": "question", "answers": "answers", "image": "file_path"}
    return rows_of(folder, [{column: listed[i][name] for column, name in columns.items()} for i in kept])


def tally_qa_rows(folder: Path, split: str) -> Rows | None:
    """TallyQA: train.json (tallyqa.zip of github.com/manoja328/tallyqa) beside train2014, val2014 and Visual Genome's
    VG_100K and VG_100K_2. The authors have no validation split.
    """
    questions = folder / "train.json"
    if split != "train" or not questions.is_file():
        return None
    asked = ((each["image"], each["question"], each["answer"]) for each in read_json(questions, RowsError))
    return rows_of(folder, _by_picture(asked))


def dv_qa_rows(folder: Path, split: str) -> Rows | None:
    """DVQA: train_qa.json and the folder images (github.com/kushalkafle/DVQA_dataset).

    The reference uses neither of its two validation splits (easy, hard).
    """
    questions = folder / "train_qa.json"
    if split != "train" or not questions.is_file():
        return None
    asked = ((f"images/{each['image']}", each["question"], each["answer"]) for each in read_json(questions, RowsError))
    return rows_of(folder, _by_picture(asked))


def figure_qa_rows(folder: Path, split: str) -> Rows | None:
    """FigureQA: qa_pairs.json and png, in `folder` or in its train1 or validation1 (as in Microsoft's archives)."""
    return _pairs(folder, f"{split}1")


def plot_qa_rows(folder: Path, split: str) -> Rows | None:
    """PlotQA: qa_pairs_V2.json and png, in `folder` or in its train or validation (github.com/NiteshMethani/PlotQA).

    Of several qa_pairs*.json, the last one by name is used. The 20 million training questions are held in memory; the
    hub's copy is read picture by picture.
    """
    return _pairs(folder, split)


def tabwmp_rows(folder: Path, split: str) -> Rows | None:
    """TabMWP: problems_train.json and tables, in `folder` or data/tabmwp (github.com/lupantech/PromptPG)."""
    name = {"train": "problems_train.json", "validation": "problems_dev.json"}[split]
    root = next((path for path in (folder, folder / "data" / "tabmwp") if (path / name).is_file()), None)
    if root is None:
        return None
    rows = [
        {"question": each["question"], "answer": each["answer"], "image": f"tables/{number}.png"}
        for number, each in read_json(root / name, RowsError).items()
    ]
    return rows_of(root, rows)


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


def _pairs(folder: Path, inside: str) -> Rows | None:
    found = ((root, sorted(root.glob("qa_pairs*.json"))) for root in (folder / inside, folder))
    root, files = next((each for each in found if each[1]), (folder, []))
    if not files:
        return None
    asked = (
        (f"png/{each['image_index']}.png", each["question_string"], each["answer"])
        for each in read_json(files[-1], RowsError)["qa_pairs"]
    )
    return rows_of(root, _by_picture(asked))


def _by_picture(asked: Iterable[tuple[str, str, Any]]) -> list[dict[str, Any]]:
    """A row for each picture, from (picture, question, answer)."""
    grouped: dict[str, list[dict[str, Any]]] = {}
    for image, question, answer in asked:
        grouped.setdefault(image, []).append({"question": question, "answer": answer})
    return [{"image": image, "questions": questions} for image, questions in grouped.items()]
