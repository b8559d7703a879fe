"""Academic training sets from their authors' files, with the columns that academic_rows.py reads.

Layouts: the builders in olmo/hf_datasets, and for ST-VQA olmo/data/academic_datasets.py. Each function takes a folder
and a split, and returns None if the folder has another layout or the set lacks the split. A row is one question, or
with the column "questions" a picture with all its questions. VQAv2, OK-VQA, InfographicVQA: benchmark_files.py; AI2D:
ai2d.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from molmo_edge.data.json_files import read_json
from molmo_edge.data.rows import Rows, RowsError, rows_of

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
    rows = [
        {
            "question_id": each["question_id"],
            "question": each["question"],
            "answers": each["answers"],
            "image": each["file_path"],
        }
        for each in (listed[index] for index in kept)
    ]
    return rows_of(folder, rows)


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
