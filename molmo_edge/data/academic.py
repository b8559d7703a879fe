"""The academic training sets of Molmo's second stage (about 20).

Questions, answers and grouping into examples follow the reference (olmo/data/academic_datasets.py, names of
olmo/data/__init__.py::get_dataset_by_name; the list is AUX of launch_scripts/train_multitask_model.py). Rows come from
parquet files on the hub, from the authors' files, or from a rows.jsonl in the columns of either.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from molmo_edge.data import academic_rows as ask
from molmo_edge.data import ai2d, android
from molmo_edge.data import authors_files as files
from molmo_edge.data.examples import DataSet, Example
from molmo_edge.data.rows import Row, Rows, RowsError, load_rows

_SPLITS = ("train", "validation")


@dataclass(frozen=True)
class Source:
    """A repository of parquet files on the hub."""

    hub_id: str
    configs: tuple[str, ...] = ()
    train: str = "train"  # its name of the split; "": it has none
    validation: str = "validation"

    def split(self, name: str) -> str:
        """The repository's name of the split "train" or "validation"; "" if it has none."""
        return self.train if name == "train" else self.validation


@dataclass(frozen=True)
class Academic:
    """Where the rows of a set are, and how they become examples."""

    name: str
    ask_row: Callable[[Row], list[ask.Asked]]  # for a row with one question
    authors: str  # where to get the authors' files, for messages
    sources: tuple[Source, ...] = ()  # the first one with the split is used
    files: Callable[[Path, str], Rows | None] | None = None  # reads the authors' files; None if the folder has none
    style: str = ""  # the tag of questions without a tag of their own; "": the name
    ask_picture: Callable[[Row], list[ask.Asked]] = ask.listed  # for a row with all questions about a picture
    by_picture: bool = False  # an example has all questions about a picture; otherwise one question
    plain: Callable[[str], str] = str  # restores the authors' wording of The Cauldron's answers
    steps: Callable[[Rows, Path | None, str], Rows] | None = None  # splits rows into rows with one question
    kept: Callable[[Rows, str], list[int]] | None = None  # the rows to use


@dataclass(frozen=True, eq=False)
class AcademicSet:
    """A `DataSet`; see `open_academic`."""

    spec: Academic
    rows: Rows
    places: Sequence[Sequence[int]] | None  # rows of each example; None: each row is an example

    @property
    def name(self) -> str:
        """Implement `DataSet.name`."""
        return self.spec.name

    def __len__(self) -> int:
        return len(self.rows if self.places is None else self.places)

    def example(self, index: int, rng: np.random.Generator) -> Example:
        """See DataSet. Raises RowsError if a picture, an answer, or a column is missing."""
        rows = [self.rows[row] for row in ([index] if self.places is None else self.places[index])]
        where = rows[0].where
        try:
            image = rows[0].image("image")
            if image is None:
                raise RowsError(f"{where} has no picture: remove the row, or copy it again")
            asked = [each for row in rows for each in self._asked(row)]
            made = [ask.annotate(each, self.spec.style or self.name, rng) for each in asked]
        except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
            raise RowsError(f"{where} does not have the layout of {self.name}: {error!r}") from error
        said = tuple(annotation for annotation in made if all(message.strip() for message in annotation.messages))
        if not said:
            raise RowsError(f"{where} has no question about its picture")
        return Example(image, said)

    def _asked(self, row: Row) -> list[ask.Asked]:
        return self.spec.ask_picture(row) if "questions" in row else self.spec.ask_row(row)


def open_academic(name: str, *, split: str = "train", local: Path | None = None) -> DataSet:
    """Open one of `ACADEMIC`.

    `split`: "train" or "validation". `local`: a folder with the authors' files (see authors_files.py), with a copy of
    the hub's files, or with a rows.jsonl (see `load_rows`); None: download from the hub. Raises RowsError.
    """
    if name not in ACADEMIC:
        raise RowsError(f'"{name}" is not an academic training set (known: {", ".join(ACADEMIC)})')
    if split not in _SPLITS:
        raise RowsError(f'"{split}" is not a split of the academic training sets (splits: {", ".join(_SPLITS)})')
    spec = ACADEMIC[name]
    rows = _rows(spec, split, local)
    if "texts" in rows.columns:
        rows = ask.cauldron_rows(rows, single=not spec.by_picture, plain=spec.plain)
    elif spec.steps is not None:
        rows = spec.steps(rows, local, split)
    return AcademicSet(spec, rows, _places(spec, rows, split))


def _rows(spec: Academic, split: str, local: Path | None) -> Rows:
    rows = spec.files(local, split) if spec.files and local is not None else None
    if rows is not None:
        return rows
    source = next((source for source in spec.sources if source.split(split)), None)
    if source is not None:
        return load_rows(source.hub_id, source.configs, source.split(split), local)
    if local is not None:
        return load_rows(spec.name, (), split, local)
    raise RowsError(
        f'the hub has no parquet files of the split "{split}" of {spec.name}: download the files from {spec.authors} '
        "and pass their folder"
    )


def _places(spec: Academic, rows: Rows, split: str) -> Sequence[Sequence[int]] | None:
    if spec.kept is not None:
        return [(row,) for row in spec.kept(rows, split)]
    if not spec.by_picture or "questions" in rows.columns:
        return None
    column = "id_image" if "id_image" in rows.columns else "image_id"  # column names of two copies of VQAv2
    grouped: dict[object, list[int]] = {}
    for row, picture in enumerate(rows.column(column)):
        grouped.setdefault(picture, []).append(row)
    return list(grouped.values())


def _with_picture(rows: Rows, _split: str) -> list[int]:
    # Row by row: reading the whole column would load all pictures at once.
    return [row.index for row in rows if row.image("image") is not None]


def _not_difficult(rows: Rows, split: str) -> list[int]:
    """Some of A-OKVQA's questions have no scored direct answers; they are used for training only."""
    if split == "train":
        return list(range(len(rows)))
    return [row for row, difficult in enumerate(rows.column("difficult_direct_answer")) if not difficult]


def _cauldron(config: str) -> Source:
    """A collection of training sets by the authors of Idefics2, with all questions about a picture in one row.

    Columns: images, texts (user, assistant, source). Each question has one, capitalised answer. Pictures of some test
    sets are left out.
    """
    return Source("HuggingFaceM4/the_cauldron", (config,), validation="")


_CHART_QA = (Source("HuggingFaceM4/ChartQA", validation="val"),)  # image, query, label (a list), human_or_machine
_A_OKVQA = (Source("HuggingFaceM4/A-OKVQA"),)  # image, question, choices, correct_choice_idx, direct_answers
_ALL = (
    # lmms-lab/VQAv2, like Multimodal-Fatima/VQAv2_train, has all ten answers but repeats the picture for each question.
    # The authors' answers are in lower case.
    Academic("coco_2014_vqa_multi", ask.short, "visualqa.org and COCO's train2014",
             (_cauldron("vqav2"), Source("lmms-lab/VQAv2", train="")), files.vqa2_rows,
             style="vqa2", by_picture=True, plain=str.lower),
    # The reference's facebook/textvqa is a script. image, question, answers.
    Academic("text_vqa", ask.short, "textvqa.org", (Source("lmms-lab/textvqa"),)),
    # The reference's HuggingFaceM4/OK-VQA is a script. image, question, answers, answers_original.
    Academic("okvqa", ask.okvqa, "okvqa.allenai.org and COCO's train2014",
             (Source("Multimodal-Fatima/OK-VQA_train", validation=""),
              Source("lmms-lab/OK-VQA", train="", validation="val2014")), partial(files.vqa2_rows, version="")),
    Academic("chart_qa_weighted", ask.chart_qa_weighted, "github.com/vis-nlp/ChartQA", _CHART_QA, style="chart_qa"),
    Academic("chart_qa", ask.chart_qa, "github.com/vis-nlp/ChartQA", _CHART_QA),
    # image, question, answers
    Academic("doc_qa", ask.short, "docvqa.org", (Source("HuggingFaceM4/DocumentVQA"),)),
    # lmms-lab/DocVQA has no training split. The authors' files require an account and have all original answers.
    Academic("info_qa", ask.short, "docvqa.org (rrc.cvc.uab.es, challenge 17, task 3)",
             (_cauldron("infographic_vqa"), Source("lmms-lab/DocVQA", ("InfographicVQA",), train="")),
             files.info_qa_rows),
    # Despite its name, it has both kinds of boxes with the authors' files, as in the reference.
    Academic("ai2_diagram_v2_mix_transparent", ask.ai2d, "ai2-website.s3.amazonaws.com/data/ai2d-all.zip",
             (_cauldron("ai2d"),), ai2d.official_rows, style="ai2_diagram", ask_picture=ask.listed_diagrams),
    Academic("a_okvqa_mc", ask.a_okvqa_mc, "github.com/allenai/aokvqa", _A_OKVQA),
    Academic("a_okvqa_da", ask.a_okvqa_da, "github.com/allenai/aokvqa", _A_OKVQA, kept=_not_difficult),
    Academic("android_control", android.android_control,
             "github.com/google-research/google-research/tree/master/android_control",
             (Source("smolagents/android-control", validation=""),), steps=android.step_rows),
    # image (missing in half of the rows), question, hint, choices, answer (an index)
    Academic("science_qa_img", ask.science_qa, "scienceqa.github.io", (Source("derek-thomas/ScienceQA"),),
             style="science_qa", kept=_with_picture),
    # The Cauldron's copy has whole solutions as answers.
    Academic("tabwmp_da", ask.tabwmp, "github.com/lupantech/PromptPG (data/tabmwp)", files=files.tabwmp_rows),
    Academic("st_qa", ask.short, "rrc.cvc.uab.es, challenge 11, task 3", (_cauldron("st_vqa"),), files.st_qa_rows),
    Academic("tally_qa", ask.short, "github.com/manoja328/tallyqa, COCO 2014 and Visual Genome",
             (_cauldron("tallyqa"),), files.tally_qa_rows, by_picture=True),
    # Answers are from a fixed list in lower case.
    Academic("dv_qa", ask.short, "github.com/kushalkafle/DVQA_dataset", (_cauldron("dvqa"),), files.dv_qa_rows,
             by_picture=True, plain=str.lower),
    Academic("figure_qa", ask.short, "microsoft.com/research, FigureQA", (_cauldron("figureqa"),), files.figure_qa_rows,
             by_picture=True, plain=ask.yes_is_one),
    Academic("plot_qa", ask.short, "github.com/NiteshMethani/PlotQA", (_cauldron("plotqa"),), files.plot_qa_rows,
             by_picture=True),
)  # fmt: skip
ACADEMIC: dict[str, Academic] = {spec.name: spec for spec in _ALL}
