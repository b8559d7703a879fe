"""The eleven academic benchmarks of Molmo's paper and its pointing evaluation, as questions.

They are asked and scored as the reference does it (launch_scripts/eval_downstream.py; olmo/data/academic_datasets.py
and pixmo_datasets.py; prompts by olmo/data/data_formatter.py with the templates "uber_model" and the system prompt
"demo_or_style"), with two exceptions. For pointing and counting it draws one of 40 phrases for each question, and in
one of ten cases a tag before it: here it is always the SDK's own phrase, without a tag. And MathVista's answers are
found without GPT-4. The splits of the paper's table have no public answers for three benchmarks, VQAv2, DocVQA and
InfoVQA: the validation split is asked instead. A split without answers can be asked too; nothing is scored then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from molmo_edge.data import ai2d
from molmo_edge.data import authors_files as official
from molmo_edge.data.rows import FetchError, Rows, RowsError, load_rows
from molmo_edge.evaluation import benchmark_formatters as ask
from molmo_edge.evaluation.benchmark_formatters import Benchmark
from molmo_edge.evaluation.questions import Question

# fmt: off
_MMMU = (
    "Accounting", "Agriculture", "Architecture_and_Engineering", "Art", "Art_Theory", "Basic_Medical_Science",
    "Biology", "Chemistry", "Clinical_Medicine", "Computer_Science", "Design",
    "Diagnostics_and_Laboratory_Medicine", "Economics", "Electronics", "Energy_and_Power", "Finance", "Geography",
    "History", "Literature", "Manage", "Marketing", "Materials", "Math", "Mechanical_Engineering", "Music", "Pharmacy",
    "Physics", "Psychology", "Public_Health", "Sociology",
)
# fmt: on


def benchmark_questions(
    task: str,
    *,
    local: Path | None = None,
    split: str | None = None,
    limit: int | None = None,
    skipped: Callable[[str], None],
) -> Iterator[Question]:
    """The questions of one of `TASKS`, in the order of its rows.

    `local`: a copy of the data set, see `load_rows`; of AI2D, VQAv2 and InfoVQA also the authors' own files. `split`:
    another than the benchmark's own, by its name there. `limit`: most rows, taken evenly from all of them. `skipped`
    hears why a row is left out. PixMo's pictures are fetched from the web as the iterator comes to them, and kept.
    Raises RowsError, mostly before the first question.
    """
    if task not in TASKS:
        raise RowsError(f'there is no benchmark "{task}", only {", ".join(TASKS)}')
    benchmark = TASKS[task]
    split = split or benchmark.split
    rows = benchmark.official(local, split) if benchmark.official and local else None
    if rows is None:
        rows = load_rows(benchmark.hub_id, benchmark.configs, split, local)
    return _ask(benchmark, rows, limit, skipped)


def _ask(benchmark: Benchmark, rows: Rows, limit: int | None, skipped: Callable[[str], None]) -> Iterator[Question]:
    number = len(rows) if limit is None else min(limit, len(rows))
    for i in range(number):
        row = rows[i * len(rows) // number]
        try:
            question = benchmark.question(benchmark, row)
        except FetchError as error:
            skipped(f"{benchmark.name}/{row.index:06d}: {error}")
            continue
        except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
            raise RowsError(f"row {row.index} of {rows.where} is not as {benchmark.name} has it: {error!r}") from error
        if question is None:
            skipped(
                f"{benchmark.name}/{row.index:06d}: its picture is missing or grey, and the reference leaves it out"
            )
        else:
            yield question


_ALL = (
    # The reference builds it from the authors' files, which give both kinds of boxes here too. On the hub the letters
    # hide the labels, as opaque boxes do. Columns: question, options, answer (an index, as text), image.
    Benchmark("ai2d", "lmms-lab/ai2d", "test", ask.ai2d, official=ai2d.official_rows),
    # Columns: image, query, label (a list), human_or_machine.
    Benchmark("chart_qa", "HuggingFaceM4/ChartQA", "test", ask.chart_qa, "chart_qa"),
    # HuggingFaceM4/VQAv2 is a script, and so is the reference's own. Paper: testdev, scored by a server.
    Benchmark("vqa2", "lmms-lab/VQAv2", "validation", ask.vqa2, "vqa2", official=official.vqa2_rows),
    # Paper: test, scored by a server; InfoVQA too.
    Benchmark("doc_qa", "HuggingFaceM4/DocumentVQA", "validation", ask.doc_qa, "doc_qa"),
    # The reference reads the authors' files, for which one needs an account.
    Benchmark(
        *("info_qa", "lmms-lab/DocVQA", "validation", ask.doc_qa, "info_qa"),
        configs=("InfographicVQA",),
        official=official.info_qa_rows,
    ),
    # facebook/textvqa, which the reference has, is a script.
    Benchmark("text_vqa", "lmms-lab/textvqa", "validation", ask.text_vqa, "text_vqa"),
    Benchmark("real_world_qa", "xai-org/RealworldQA", "test", ask.real_world_qa),
    Benchmark("mmmu", "MMMU/MMMU", "validation", ask.mmmu, configs=_MMMU),
    Benchmark("math_vista", "AI4Math/MathVista", "testmini", ask.math_vista),
    # The reference joins nielsr/countbench with a file of questions; this is the same, joined. number: the count.
    Benchmark("countbench_qa", "vikhyatk/CountBenchQA", "test", ask.countbench_qa, "", (), 12, 192),
    # The reference's code allows pixmo_count 12 tokens, as it was renamed: no answer would reach its count.
    Benchmark("pixmo_count", "allenai/pixmo-count", "test", ask.pixmo_count, "", (), 12, 192),
    Benchmark("pixmo_points", "allenai/pixmo-points-eval", "test", ask.pixmo_points, "", (), 12, 192),
)
TASKS: dict[str, Benchmark] = {benchmark.name: benchmark for benchmark in _ALL}
