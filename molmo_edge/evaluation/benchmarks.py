"""The eleven academic benchmarks of Molmo's paper, and its pointing evaluation.

Questions and scores are those of the reference (launch_scripts/eval_downstream.py; olmo/data/academic_datasets.py and
pixmo_datasets.py; prompts by olmo/data/data_formatter.py with the templates "uber_model" and the system prompt
"demo_or_style"), with two exceptions:
- For pointing and counting the reference draws one of 40 phrases per question, and a style tag in one of ten cases.
  Here it is always the SDK's own phrase, without a tag.
- MathVista's answers are extracted without GPT-4.

VQAv2, DocVQA and InfoVQA use the validation split by default, because the splits of the paper's table have no public
answers. A split without answers can be asked, but is not scored.
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
    on_skipped: Callable[[str], None],
) -> Iterator[Question]:
    """The questions of one of `TASKS`, in the order of its rows.

    PixMo's images are downloaded when the iterator reaches them, and cached.

    Args:
        local: A copy of the data set, see `load_rows`; for AI2D, VQAv2 and InfoVQA also the authors' own files.
        split: Name of the split; None: the benchmark's default.
        limit: The most rows, taken evenly from all of them.
        on_skipped: Called with the reason for each row that is left out.

    Raises:
        RowsError: There is no such benchmark, or its rows cannot be read.
    """
    if task not in TASKS:
        raise RowsError(f'"{task}" is not a known benchmark (known: {", ".join(TASKS)})')
    benchmark = TASKS[task]
    split = split or benchmark.split
    rows = benchmark.official(local, split) if benchmark.official and local else None
    if rows is None:
        rows = load_rows(benchmark.hub_id, benchmark.configs, split, local)
    return _ask(benchmark, rows, limit, on_skipped)


def _ask(benchmark: Benchmark, rows: Rows, limit: int | None, on_skipped: Callable[[str], None]) -> Iterator[Question]:
    number = len(rows) if limit is None else min(limit, len(rows))
    for i in range(number):
        row = rows[i * len(rows) // number]
        try:
            question = benchmark.question(benchmark, row)
        except FetchError as error:
            on_skipped(f"{benchmark.name}/{row.index:06d}: {error}")
            continue
        except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
            raise RowsError(
                f"row {row.index} of {rows.where} does not have the format of {benchmark.name}: {error!r}"
            ) from error
        if question is None:
            on_skipped(f"{benchmark.name}/{row.index:06d}: its image is missing or grey: the reference leaves it out")
        else:
            yield question


_ALL = (
    # The reference uses the authors' files, which `official` reads and which have both kinds of boxes. On the hub all
    # boxes are opaque. Columns: question, options, answer (an index, as text), image.
    Benchmark("ai2d", "lmms-lab/ai2d", "test", ask.ai2d, official=ai2d.official_rows),
    # Columns: image, query, label (a list), human_or_machine.
    Benchmark("chart_qa", "HuggingFaceM4/ChartQA", "test", ask.chart_qa, "chart_qa"),
    # HuggingFaceM4/VQAv2 and the reference's own loader are scripts. Paper: testdev, scored by a server.
    Benchmark("vqa2", "lmms-lab/VQAv2", "validation", ask.vqa2, "vqa2", official=official.vqa2_rows),
    # Paper: test, scored by a server; the same for InfoVQA.
    Benchmark("doc_qa", "HuggingFaceM4/DocumentVQA", "validation", ask.doc_qa, "doc_qa"),
    # The reference reads the authors' files, which require an account.
    Benchmark(
        *("info_qa", "lmms-lab/DocVQA", "validation", ask.doc_qa, "info_qa"),
        configs=("InfographicVQA",),
        official=official.info_qa_rows,
    ),
    # The reference uses facebook/textvqa, which is a script.
    Benchmark("text_vqa", "lmms-lab/textvqa", "validation", ask.text_vqa, "text_vqa"),
    Benchmark("real_world_qa", "xai-org/RealworldQA", "test", ask.real_world_qa),
    Benchmark("mmmu", "MMMU/MMMU", "validation", ask.mmmu, configs=_MMMU),
    Benchmark("math_vista", "AI4Math/MathVista", "testmini", ask.math_vista),
    # The reference joins nielsr/countbench with a file of questions; this is the result. number: the count.
    Benchmark("countbench_qa", "vikhyatk/CountBenchQA", "test", ask.countbench_qa, "", (), 12, 192),
    # After a renaming, the reference's code allows pixmo_count only 12 tokens: no answer would reach its count.
    Benchmark("pixmo_count", "allenai/pixmo-count", "test", ask.pixmo_count, "", (), 12, 192),
    Benchmark("pixmo_points", "allenai/pixmo-points-eval", "test", ask.pixmo_points, "", (), 12, 192),
)
TASKS: dict[str, Benchmark] = {benchmark.name: benchmark for benchmark in _ALL}
