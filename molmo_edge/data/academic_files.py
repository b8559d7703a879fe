"""Academic training sets in the files that their authors publish, with the columns that academic_rows.py reads.

Layouts: the builders in olmo/hf_datasets, and of scene-text olmo/data/academic_datasets.py. Every function takes a
folder and a split, and gives None where the folder has another layout or the authors no such split. A row is one
question, or with the column "questions" one picture and all that is asked about it. (VQAv2, OK-VQA, InfographicVQA and
AI2D: molmo_edge/evaluation.)
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from molmo_edge.data.benchmark_files import read_json
from molmo_edge.data.rows import Rows, rows_of

_ST_QA_VALIDATION = 1024  # questions that the reference holds out


def st_qa_rows(folder: Path, split: str) -> Rows | None:
    """ST-VQA's third task: train_task_3.json and the pictures' folders beside it (rrc.cvc.uab.es, challenge 11).

    The authors have no validation split. The reference's is made by the same draw here.
    """
    questions = folder / "train_task_3.json"
    if not questions.is_file():
        return None
    listed = sorted(read_json(questions)["data"], key=lambda each: each["question_id"])
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
    """TallyQA: train.json (tallyqa.zip of github.com/manoja328/tallyqa), beside train2014, val2014, VG_100K, VG_100K_2.

    The last two are Visual Genome's pictures. The authors have no validation split.
    """
    questions = folder / "train.json"
    if split != "train" or not questions.is_file():
        return None
    asked = ((each["image"], each["question"], each["answer"]) for each in read_json(questions))
    return rows_of(folder, _by_picture(asked))


def dv_qa_rows(folder: Path, split: str) -> Rows | None:
    """DVQA: train_qa.json and the folder images (github.com/kushalkafle/DVQA_dataset).

    Its two validation splits, an easy and a hard one, are left out: the reference's mixture takes neither.
    """
    questions = folder / "train_qa.json"
    if split != "train" or not questions.is_file():
        return None
    asked = ((f"images/{each['image']}", each["question"], each["answer"]) for each in read_json(questions))
    return rows_of(folder, _by_picture(asked))


def figure_qa_rows(folder: Path, split: str) -> Rows | None:
    """FigureQA: qa_pairs.json and png, in `folder` or in its train1 or validation1 (Microsoft's archives' names)."""
    return _pairs(folder, f"{split}1")


def plot_qa_rows(folder: Path, split: str) -> Rows | None:
    """PlotQA: qa_pairs_V2.json and png, in `folder` or in its train or validation (github.com/NiteshMethani/PlotQA).

    The newest of several qa_pairs*.json is taken. The training split has 20 million questions, and all are held in
    memory: the hub's copy is read picture by picture.
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
        for number, each in read_json(root / name).items()
    ]
    return rows_of(root, rows)


def _pairs(folder: Path, inside: str) -> Rows | None:
    found = ((root, sorted(root.glob("qa_pairs*.json"))) for root in (folder / inside, folder))
    root, files = next((each for each in found if each[1]), (folder, []))
    if not files:
        return None
    asked = (
        (f"png/{each['image_index']}.png", each["question_string"], each["answer"])
        for each in read_json(files[-1])["qa_pairs"]
    )
    return rows_of(root, _by_picture(asked))


def _by_picture(asked: Iterable[tuple[str, str, Any]]) -> list[dict[str, Any]]:
    """A row for each picture, out of (picture, question, answer)."""
    grouped: dict[str, list[dict[str, Any]]] = {}
    for image, question, answer in asked:
        grouped.setdefault(image, []).append({"question": question, "answer": answer})
    return [{"image": image, "questions": questions} for image, questions in grouped.items()]
