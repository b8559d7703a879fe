"""`molmo-edge eval`"""

from __future__ import annotations

import json as json_
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from molmo_edge.cli import options
from molmo_edge.cli.open_model import find_model
from molmo_edge.cli.output import note, print_json, print_table, progress
from molmo_edge.cli.question_options import Asked, bars, open_suite
from molmo_edge.errors import MolmoEdgeError
from molmo_edge.system.files import atomic_write
from molmo_edge.system.version import __version__

if TYPE_CHECKING:
    from molmo_edge.evaluation.questions import Question
    from molmo_edge.evaluation.stats import Estimate

_TASKS = "What to ask, with commas between: nano-val, photos:DIR, ai2d, chart_qa, ..., or academic for all of those."
_OUT = "The run's folder: started again, it goes on where it was. Without it: NAME-eval here."
_PARENT = "MOLMO_EDGE_EVAL_PARENT"  # in the environment of a process that shares a run: who started it
Results = dict[str, dict[str, dict[str, "Estimate"]]]  # by suite, group and score


class EvalError(MolmoEdgeError):
    """A process of a run that failed."""


def eval(
    bundle: Annotated[
        str | None,
        typer.Argument(help="Bundle or checkpoint directory, or hub id. Without it: nano.", show_default=False),
    ] = None,
    *,
    tasks: Annotated[str, typer.Option(help=_TASKS)] = "nano-val",
    limit: Asked.Limit = None,
    data: Asked.Data = None,
    out: Annotated[Path | None, typer.Option(help=_OUT, show_default=False)] = None,
    processes: Annotated[int, typer.Option(min=1, help="Processes side by side; with CUDA, one for each GPU.")] = 1,
    shard: Annotated[str | None, typer.Option(help='"2/4": this machine\'s part alone, for a cluster.')] = None,
    revision: options.Revision = None,
    device: options.Device = "auto",
    precision: options.Precision = "auto",
    max_crops: options.MaxCrops = None,
    threads: options.Threads = None,
    llama: options.Llama = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Ask a model benchmarks and score its answers."""
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
        raise typer.BadParameter("--shard is one process of several already", param_hint="--processes")
    names = expand([name.strip() for name in tasks.split(",") if name.strip()])
    if len({file_stem(name) for name in names}) < len(names):
        raise typer.BadParameter("two tasks would share a file: rename one of the folders", param_hint="--tasks")
    if not names:
        raise typer.BadParameter("it names nothing to ask", param_hint="--tasks")
    directory = find_model(bundle, revision=revision, quiet=quiet)
    folder = out or Path(f"{directory.resolve().name}-eval")
    if threads is None and not _on_gpu(device):  # rounding differs with their number: it belongs to the run
        threads = max(1, available_cores() // processes)
    settings = {"device": device, "precision": precision, "max_crops": max_crops, "llama": llama, "threads": threads}
    with progress("opening the tasks", quiet=quiet):
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
            f"{', '.join(names)} ask nothing that can be scored: photos need an annotations.jsonl with what is right "
            "(docs/quantization.md); molmo-edge loss compares two models without one"
        )
    _say_published_crops(names, max_crops, quiet=quiet)
    identity = model_fingerprint(directory)
    claim_folder(folder, {"model": identity, "tasks": names, "limit": limit, "version": __version__, **settings})
    left = sum(len(asked[name]) - count_answered(folder, name) for name in names)
    if processes > 1 and left:
        given = {**settings, "tasks": tasks, "limit": limit, "data": data, "out": folder}
        _share_out(processes, device, [str(directory), *_arguments(given)], asked, folder, quiet=quiet)
    elif left:
        with Molmo(
            directory,
            device=device,
            precision=precision,
            max_crops=max_crops,
            threads=threads,
            engine_options=options.llama_options(llama),
        ) as molmo:
            for name, questions in asked.items():
                with bars(quiet=quiet) as bar:
                    advance = bar(name, len(questions), count_answered(folder, name))
                    ask_shard(molmo, questions, folder, name, mine, _with_parent(advance))
    if shard:  # several of them at once would get into each other's way
        note(f"{shard} is done. When all are, the same command without --shard joins them", quiet=quiet)
        return
    results: Results = {}
    for name, questions in asked.items():
        lines = merge_shards(questions, folder, name)
        if lines is None:
            raise RunError(f"{name} is not whole although every question was asked: remove {folder} and start again")
        results[name] = average_scores(lines, questions)
    _report(results, folder, directory, json=json, quiet=quiet)


def _with_parent(advance: Callable[[], None]) -> Callable[[], None]:
    """Of a process that another has started: it ends when that is gone, or a second start would write beside it."""
    parent = os.environ.get(_PARENT)

    def on_answer() -> None:
        advance()
        if parent is not None and os.getppid() != int(parent):
            raise EvalError("the process that shared this run out is gone")

    return on_answer


def _say_published_crops(names: Sequence[str], max_crops: int | None, *, quiet: bool) -> None:
    from molmo_edge.evaluation.benchmarks import TASKS

    for most in sorted({TASKS[name].max_crops for name in names if name in TASKS} - {max_crops}):
        of = ", ".join(name for name in names if name in TASKS and TASKS[name].max_crops == most)
        note(f"published figures of {of} were made with --max-crops {most}", quiet=quiet)


def _arguments(given: dict[str, Any]) -> list[str]:
    return [
        part
        for name, value in given.items()
        if value is not None
        for part in (f"--{name.replace('_', '-')}", str(value))
    ]


def _share_out(
    processes: int,
    device: str,
    arguments: Sequence[str],
    asked: dict[str, list[Question]],
    folder: Path,
    *,
    quiet: bool,
) -> None:
    """This command once for each shard, and a bar over what they have written."""
    from molmo_edge.evaluation.sharded_run import count_answered

    command = [sys.executable, "-m", "molmo_edge.cli", "eval", *arguments, "--quiet", "--shard"]
    workers = [
        subprocess.Popen([*command, f"{i + 1}/{processes}"], env=_environment(device, i)) for i in range(processes)
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
        raise EvalError("a process of this run failed; what was asked is kept: start it again")


def _on_gpu(device: str) -> bool:
    return device in ("cuda", "tensorrt")


def _environment(device: str, number: int) -> dict[str, str]:
    """A process a GPU: the number-th of those that can be seen."""
    environment = {**os.environ, _PARENT: str(os.getpid())}
    if _on_gpu(device):
        seen = [name for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        environment["CUDA_VISIBLE_DEVICES"] = seen[number % len(seen)] if seen else str(number)
    return environment


def _report(results: Results, folder: Path, directory: Path, *, json: bool, quiet: bool) -> None:
    plain: dict[str, Any] = {
        name: {group: {score: figure.to_dict() for score, figure in scores.items()} for group, scores in groups.items()}
        for name, groups in results.items()
    }
    if json:
        print_json({"model": str(directory), "results": plain})
    else:
        print_scores(results)
    with atomic_write(folder / "results.json") as part:  # after the table, which a full disk must not cost
        part.write_text(json_.dumps(plain, indent=1) + "\n", encoding="utf-8")
    note(f"answers and results are in {folder}", quiet=quiet)


def print_scores(results: Results) -> None:
    rows = []
    for groups in results.values():
        for group, scores in groups.items():
            for score, f in scores.items():
                ends = "?" if math.isnan(f.low) else f"{100 * f.low:.1f} and {100 * f.high:.1f}"
                rows.append([group, score, f"{100 * f.value:.1f}", ends, str(f.n)])
    print_table(("what", "score", "%", "95 % between", "n"), rows, left=2)
