"""`molmo-edge eval`"""

from __future__ import annotations

import json as json_
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from molmo_edge.cli import options
from molmo_edge.cli.bars import bars
from molmo_edge.cli.open_model import find_model
from molmo_edge.cli.output import note, print_json, print_table, progress
from molmo_edge.cli.question_options import Asked, open_suite
from molmo_edge.cli.streams import print_error
from molmo_edge.errors import MolmoEdgeError
from molmo_edge.sdk.readable_text import counted
from molmo_edge.system.files import atomic_write
from molmo_edge.system.version import __version__

if TYPE_CHECKING:
    from molmo_edge.evaluation.questions import Question
    from molmo_edge.evaluation.stats import Estimate

_TASKS = "Tasks, separated by commas: nano-val, photos:DIR, ai2d, chart_qa, ..., or academic for all benchmarks."
_OUT = "The run's folder. Running the command again resumes it. Default: NAME-eval in the current directory."
_PARENT = "MOLMO_EDGE_EVAL_PARENT"  # environment variable: the id of the process that started this one
Results = dict[str, dict[str, dict[str, "Estimate"]]]  # {suite: {group: {score: ...}}}


class EvalError(MolmoEdgeError):
    """Nothing to score, or a failed process."""


def eval(
    bundle: Annotated[
        str | None,
        typer.Argument(help="Bundle or checkpoint directory, or hub id. Default: nano.", show_default=False),
    ] = None,
    *,
    tasks: Annotated[str, typer.Option(help=_TASKS)] = "nano-val",
    limit: Asked.Limit = None,
    data: Asked.Data = None,
    out: Annotated[Path | None, typer.Option(help=_OUT, show_default=False)] = None,
    processes: Annotated[int, typer.Option(min=1, help="Number of parallel processes; with CUDA, one per GPU.")] = 1,
    shard: Annotated[
        str | None, typer.Option(help='Answer only one part, such as "2/4", to use several machines.')
    ] = None,
    revision: options.Revision = None,
    device: options.Device = "auto",
    precision: options.Precision = "auto",
    max_crops: options.MaxCrops = None,
    image_tokens: options.ImageTokens = None,
    reuse_crops: options.ReuseCrops = False,
    threads: options.Threads = None,
    llama: options.Llama = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Ask a model the questions of benchmarks and score its answers.

    An image that cannot be read is reported and left out, and the exit status is 1.
    """
    from molmo_edge.evaluation.model_info import model_fingerprint
    from molmo_edge.evaluation.questions import UNSCORED
    from molmo_edge.evaluation.sharded_run import (
        RunError,
        Shard,
        ask_shard,
        average_scores,
        claim_folder,
        count_answered,
        file_stem,
        merge_shards,
    )
    from molmo_edge.evaluation.suites import expand
    from molmo_edge.molmo import Molmo
    from molmo_edge.system.cores import available_cores

    mine = Shard.parse(shard) if shard else Shard()
    if shard and processes > 1:
        raise typer.BadParameter("--shard and --processes cannot be used together", param_hint="--processes")
    names = expand([name.strip() for name in tasks.split(",") if name.strip()])
    if len({file_stem(name) for name in names}) < len(names):
        raise typer.BadParameter("two tasks would write the same file: rename one of the folders", param_hint="--tasks")
    if not names:
        raise typer.BadParameter("the list is empty: name at least one task", param_hint="--tasks")
    directory = find_model(bundle, revision=revision, quiet=quiet)
    folder = out or Path(f"{directory.resolve().name}-eval")
    if threads is None and not _on_gpu(device):  # rounding depends on it, so it is a setting of the run
        threads = max(1, available_cores() // processes)
    settings: dict[str, Any] = {
        "device": device,
        "precision": precision,
        "max_crops": max_crops,
        "llama": llama,
        "threads": threads,
    }
    if image_tokens is not None:  # a folder of an earlier version does not name it
        settings["image_tokens"] = image_tokens
    if reuse_crops:
        settings["reuse_crops"] = reuse_crops
    with progress("loading the tasks", quiet=quiet):
        asked = {
            name: [
                question
                for question in open_suite(name, limit, data, quiet=quiet)
                if question.kind not in ("caption", UNSCORED)
            ]
            for name in names
        }
    if not any(asked.values()):
        raise EvalError(
            f"{', '.join(names)}: nothing can be scored. Photos need an annotations.jsonl with the right answers "
            "(docs/quantization.md); molmo-edge loss compares two models without it"
        )
    _note_published_crops(names, max_crops, quiet=quiet)
    identity = model_fingerprint(directory)
    claim_folder(folder, {"model": identity, "tasks": names, "limit": limit, "version": __version__, **settings})
    left = sum(len(asked[name]) - count_answered(folder, name) for name in names)
    if processes > 1 and left:
        given = {**settings, "tasks": tasks, "limit": limit, "data": data, "out": folder}
        _run_shards(processes, device, [str(directory), *_arguments(given)], asked, folder, quiet=quiet)
    elif left:
        with Molmo(
            directory,
            device=device,
            precision=precision,
            max_crops=max_crops,
            image_tokens=image_tokens,
            reuse_crops=reuse_crops,
            threads=threads,
            engine_options=options.llama_options(llama),
        ) as molmo:
            for name, questions in asked.items():
                with bars(quiet=quiet) as bar:
                    advance = bar(name, len(questions), count_answered(folder, name))
                    ask_shard(molmo, questions, folder, name, mine, _with_parent(advance), print_error)
    if shard:  # shards that finish together would interfere
        note(
            f"finished shard {shard}. After all shards, run the same command without --shard to merge them", quiet=quiet
        )
        return
    results: Results = {}
    skipped = 0  # questions
    for name, questions in asked.items():
        lines = merge_shards(questions, folder, name)
        if lines is None:
            raise RunError(f"{name} is incomplete although every question was asked: remove {folder} and start again")
        results[name] = average_scores(lines, questions)
        skipped += sum("error" in line for line in lines)
    if skipped == sum(map(len, asked.values())):
        raise EvalError("nothing can be scored: no image can be read")
    _report(results, folder, directory, json=json, quiet=quiet)
    if skipped:
        print_error(
            f"{counted(skipped, 'question')} about images that could not be read: left out of the scores. "
            "The same command asks them again"
        )
        raise typer.Exit(1)


def _with_parent(advance: Callable[[], None]) -> Callable[[], None]:
    """`advance`, but a child process ends with its parent, so that it cannot interfere with a restart."""
    parent = os.environ.get(_PARENT)

    def on_answer() -> None:
        advance()
        if parent is not None and os.getppid() != int(parent):
            raise EvalError("the parent process has ended")

    return on_answer


def _note_published_crops(names: Sequence[str], max_crops: int | None, *, quiet: bool) -> None:
    from molmo_edge.evaluation.benchmarks import TASKS

    for most in sorted({TASKS[name].max_crops for name in names if name in TASKS} - {max_crops}):
        of = ", ".join(name for name in names if name in TASKS and TASKS[name].max_crops == most)
        note(f"the published figures of {of} use --max-crops {most}", quiet=quiet)


def _arguments(given: dict[str, Any]) -> list[str]:
    return [
        part
        for name, value in given.items()
        if value is not None
        for part in (f"--{name.replace('_', '-')}", str(value))
    ]


def _run_shards(
    processes: int,
    device: str,
    arguments: Sequence[str],
    asked: dict[str, list[Question]],
    folder: Path,
    *,
    quiet: bool,
) -> None:
    """Run this command once for each shard, with a progress bar over all answers."""
    from molmo_edge.evaluation.sharded_run import count_answered

    command = [sys.executable, "-m", "molmo_edge.cli", "eval", *arguments, "--quiet", "--shard"]
    workers = [
        subprocess.Popen([*command, f"{i + 1}/{processes}"], env=shard_environment(device, i)) for i in range(processes)
    ]
    try:
        before = sum(count_answered(folder, name) for name in asked)
        with bars(quiet=quiet) as bar:
            advance = bar(f"{processes} processes", sum(map(len, asked.values())), before)
            while any(worker.poll() is None for worker in workers):
                time.sleep(0.5)
                now = sum(count_answered(folder, name) for name in asked)
                for _ in range(now - before):
                    advance()
                before = now
                if any(worker.poll() for worker in workers):
                    break
    finally:
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.wait()
    if any(worker.returncode for worker in workers):
        raise EvalError("a process failed. Run the command again to resume: answers are kept")


def _on_gpu(device: str) -> bool:
    return device in ("cuda", "tensorrt")


def shard_environment(device: str, number: int) -> dict[str, str]:
    """The environment of child process `number`; on a GPU device it sees one GPU, the number-th visible one."""
    environment = {**os.environ, _PARENT: str(os.getpid())}
    if _on_gpu(device):
        visible = [name for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        environment["CUDA_VISIBLE_DEVICES"] = visible[number % len(visible)] if visible else str(number)
    return environment


def _report(results: Results, folder: Path, directory: Path, *, json: bool, quiet: bool) -> None:
    plain: dict[str, Any] = {
        name: {group: {score: e.to_dict() for score, e in scores.items()} for group, scores in groups.items()}
        for name, groups in results.items()
    }
    if json:
        print_json({"model": str(directory), "results": plain})
    else:
        print_scores(results)
    with atomic_write(folder / "results.json") as part:  # after the table, which must not be lost to a full disk
        part.write_text(json_.dumps(plain, indent=1) + "\n", encoding="utf-8")
    note(f"wrote answers and results to {folder}", quiet=quiet)


def print_scores(results: Results) -> None:
    """Print a table of the scores, in percent, with their 95 % intervals and sample sizes."""

    def percent(value: float) -> str:
        return f"{100 * value:.1f}"

    rows = [
        [group, score, percent(e.value), e.interval(percent), str(e.n)]
        for groups in results.values()
        for group, scores in groups.items()
        for score, e in scores.items()
    ]
    print_table(("task", "score", "%", "95 % interval", "n"), rows, left=2)
