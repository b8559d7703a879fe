"""`molmo-edge plan`"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from molmo_edge.cli import options
from molmo_edge.cli.output import note, print_json, print_table, progress
from molmo_edge.errors import MolmoEdgeError
from molmo_edge.system.boards import USABLE, parse_bytes

if TYPE_CHECKING:
    from molmo_edge.config import MolmoConfig
    from molmo_edge.runtimes.memory_plan import Plan, Weights
    from molmo_edge.sdk.peak_memory import Peaks

_ON_TORCH = ("nf4", "int8", "bf16", "fp32")
_BUNDLES = ("mixed", "q4_k_m", "q8", "q8_0")


class PlanError(MolmoEdgeError):
    """A plan that cannot be made."""


@dataclass(frozen=True)
class _Target:
    """The model that is planned for."""

    name: str
    config: MolmoConfig
    candidates: list[Weights]
    directory: Path | None = None  # None: not on this machine
    download: int | None = None  # bytes on the hub
    checkpoint: bool = False  # a checkpoint on this machine, which opens on PyTorch


def _size(text: str | None) -> str | None:
    if text is not None:
        try:
            parse_bytes(text)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
    return text


def _board(name: str | None) -> str | None:
    if name is not None and name not in USABLE:
        raise typer.BadParameter(f'"{name}" is not a known board (known: {", ".join(USABLE)})')
    return name


def plan(
    model: Annotated[
        str, typer.Argument(help="Bundle directory, checkpoint directory, hub id or short name.", show_default=False)
    ] = "nano",
    *,
    memory: Annotated[
        str | None, typer.Option(help="Memory to plan for, 8GB. Default: what is free now.", callback=_size)
    ] = None,
    device: Annotated[
        str | None, typer.Option(help=f"Board to plan for: {', '.join(USABLE)}.", callback=_board)
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(help=f"Only this precision of a checkpoint: {', '.join((*_BUNDLES, 'q4', *_ON_TORCH))}."),
    ] = None,
    max_crops: options.MaxCrops = None,
    image_tokens: options.ImageTokens = None,
    max_new_tokens: options.MaxNewTokens = None,
    revision: options.Revision = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Also open the model, ask one question, and show the measured peaks.")
    ] = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Predict the memory that a model needs, and choose crops and cache for a budget.

    For a model on the hub, only its headers are read, not its weights.
    """
    from molmo_edge.runtimes.memory_plan import ANSWER, choose, longest_context, predict
    from molmo_edge.system.memory import available_memory

    if memory is not None and device is not None:
        raise typer.BadParameter("--memory and --device exclude each other")
    budget = parse_bytes(memory) if memory else USABLE[device] if device else available_memory()
    answer = max_new_tokens or ANSWER
    target = _find(model, revision, precision)
    if measure and target.directory is None:
        raise PlanError(f"--measure needs the model on this machine: molmo-edge pull {model}")
    if image_tokens is not None:
        target = _without_llama(target)
    plans, chosen, contexts = [], [], []
    for weights in target.candidates:
        plans.append(predict(target.config, weights, max_crops=max_crops, answer=answer, image_tokens=image_tokens))
        fit: Plan | None = plans[-1]
        if budget is not None:
            fit = choose(target.config, weights, budget, most=max_crops, answer=answer, image_tokens=image_tokens)
        chosen.append(fit)
        contexts.append(0 if fit is None or budget is None else longest_context(target.config, fit, budget))
    best = _recommended(chosen)
    shown, peaks = best or plans[0], None
    if measure:
        _check_measurable(target, shown)
        with progress("measuring", quiet=quiet):
            peaks = _measured(target, shown, answer, image_tokens)
    if json:
        data = {"model": target.name, "download": target.download, "budget": budget, "max_new_tokens": answer}
        rows = [
            {**_to_dict(one), "fits": fit is not None, "chosen": fit and _to_dict(fit), "longest_context": context}
            for one, fit, context in zip(plans, chosen, contexts, strict=True)
        ]
        of = {"engine": shown.weights.engine, "precision": shown.weights.precision}
        print_json(data | {"plans": rows, "measured": peaks and of | asdict(peaks) | {"peak": peaks.peak}})
    else:
        _print(target, budget, plans, chosen, contexts, shown, peaks)
        if budget is not None and best is None:
            _print_slower(target.config, plans, budget, answer)
    if budget is not None and best is None:
        raise typer.Exit(1)


def _recommended(chosen: list[Plan | None]) -> Plan | None:
    """The plan with the most crops, the first of several; None: nothing fits."""
    return max((plan for plan in chosen if plan is not None), key=lambda plan: plan.max_crops, default=None)


def _check_measurable(target: _Target, plan: Plan) -> None:
    engine, precision = plan.weights.engine, plan.weights.precision
    if target.checkpoint and engine != "pytorch":
        raise PlanError(
            f"{precision} on {engine} cannot be measured from a checkpoint, which opens on PyTorch: export a bundle "
            f"and measure that, or choose --precision {' or '.join(_ON_TORCH)}"
        )


def _find(model: str, revision: str | None, precision: str | None) -> _Target:
    from molmo_edge.checkpoints.bundle import is_bundle, is_hub_id, open_bundle, resolve_model
    from molmo_edge.checkpoints.hub import cached_model
    from molmo_edge.checkpoints.hub_config import read_config
    from molmo_edge.model_names import full_name
    from molmo_edge.runtimes.bundle_room import weights_here

    name = str(full_name(model))
    if is_hub_id(name):
        downloaded = cached_model(name, revision)
        if downloaded is None:
            return _find_on_hub(model, name, revision, precision)
        directory = downloaded
    else:
        directory = resolve_model(None if model == "nano" else model, revision=revision)
        name = str(directory)
    if is_bundle(directory):
        _refuse_precision(precision, name)
        bundle = open_bundle(directory, hashes=False)
        return _Target(name, bundle.config, [weights_here(bundle)], directory)
    config = read_config(directory)
    return _Target(name, config, _candidates(config, precision, local=True), directory, checkpoint=True)


def _find_on_hub(model: str, hub_id: str, revision: str | None, precision: str | None) -> _Target:
    from molmo_edge.checkpoints.hub import HubError
    from molmo_edge.checkpoints.remote import read_remote
    from molmo_edge.presets import PRESETS
    from molmo_edge.runtimes.bundle_room import weights_here

    try:
        remote = read_remote(hub_id, revision)
    except HubError as error:
        if model not in PRESETS:
            raise
        note(f"{error}; planned from the configuration that molmo-edge knows")
        return _Target(hub_id, PRESETS[model], _candidates(PRESETS[model], precision))
    if remote.bundle is not None:
        _refuse_precision(precision, hub_id)
        return _Target(hub_id, remote.config, [weights_here(remote.bundle)], None, remote.weights)
    return _Target(hub_id, remote.config, _candidates(remote.config, precision), None, remote.weights)


def _refuse_precision(precision: str | None, name: str) -> None:
    if precision is not None:
        raise PlanError(f"{name} is a bundle, whose precision was chosen at its export: leave --precision out")


def _candidates(config: MolmoConfig, precision: str | None, *, local: bool = False) -> list[Weights]:
    from molmo_edge.runtimes.bundle_room import weights_are_mapped
    from molmo_edge.runtimes.memory_plan import BUNDLE_PRECISIONS, bundle_weights_of, torch_weights

    kernels = weights_are_mapped()
    if precision is None:
        bundles = [
            bundle_weights_of(config, name, kernels=kernels)
            for name in _BUNDLES
            if config.point_head is None or "_" not in name
        ]
        on_torch = [torch_weights(config, name) for name in _ON_TORCH]
        return on_torch + bundles if local else bundles + on_torch
    if precision in BUNDLE_PRECISIONS and precision != "fp32":
        return [bundle_weights_of(config, precision, kernels=kernels)]
    if precision in _ON_TORCH:
        return [torch_weights(config, precision)]
    raise PlanError(f'"{precision}" is not a precision (known: {", ".join((*BUNDLE_PRECISIONS, *_ON_TORCH[:3]))})')


def _without_llama(target: _Target) -> _Target:
    """The target without GGUF bundles, which do not support --image-tokens. Raises PlanError if nothing is left."""
    left = [weights for weights in target.candidates if weights.engine != "llama.cpp"]
    if not left:
        raise PlanError(f"{target.name}: --image-tokens does not apply to a GGUF decoder, leave it out")
    return replace(target, candidates=left)


def _measured(target: _Target, plan: Plan, answer: int, image_tokens: float | None) -> Peaks:
    from molmo_edge.runtimes.memory_plan import largest_tiling
    from molmo_edge.sdk.peak_memory import measure_peaks

    assert target.directory is not None
    image = target.config.image
    rows, columns = largest_tiling(target.config, plan.max_crops)
    margins = sum(image.overlap_margins)
    sides = [(max(count, 1) * image.window + margins) * image.patch_size for count in (columns, rows)]
    llama = plan.weights.engine == "llama.cpp"
    return measure_peaks(
        target.directory,
        *sides,
        max_crops=plan.max_crops,
        answer=answer,
        precision=plan.weights.precision if plan.weights.engine == "pytorch" else "auto",
        llama=f"cache={plan.cache}" if llama else None,
        image_tokens=image_tokens,
    )


def _to_dict(plan: Plan) -> dict[str, Any]:
    weights = plan.weights
    return {
        "engine": weights.engine,
        "precision": weights.precision,
        "disk": weights.stored,
        "max_crops": plan.max_crops,
        **({} if plan.image_tokens is None else {"image_tokens": plan.image_tokens}),
        "cache": plan.cache,
        "positions": plan.positions,
        "parts": dict(plan.parts),
        "loading": plan.loading,
        "encoding": plan.encoding,
        "answering": plan.answering,
        "peak": plan.peak,
    }


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.0f} MB"


def _print(
    target: _Target,
    budget: int | None,
    plans: list[Plan],
    chosen: list[Plan | None],
    contexts: list[int],
    shown: Plan,
    peaks: Peaks | None,
) -> None:
    download = "" if target.download is None else f", {_gb(target.download)} to download"
    print(f"{target.name}{download}" + ("" if budget is None else f"; planned for {_gb(budget)}"))
    if len(plans) == 1:
        _print_one(shown, peaks)
    else:
        rows = []
        for one, best in zip(plans, chosen, strict=True):
            fits = "no" if best is None else f"{best.max_crops} crops, {best.cache}"
            weights = one.weights
            rows.append((weights.engine, weights.precision, _gb(weights.stored), _gb(one.peak), fits))
        print_table(("engine", "precision", "on disk", "peak, all crops", "what fits"), rows, left=2)
        if peaks is not None:
            _print_one(shown, peaks)
    if budget is None:
        return
    best = _recommended(chosen)
    if best is None:
        print(f"does not fit into {_gb(budget)}, even with only the global view: use a smaller precision or model")
        return
    context = contexts[chosen.index(best)]
    flags = f"--max-crops {best.max_crops}"
    flags += "" if best.image_tokens is None else f" --image-tokens {best.image_tokens:g}"
    flags += f" --llama cache={best.cache}" if best.weights.engine == "llama.cpp" else ""
    print(
        f"{best.weights.precision} on {best.weights.engine} fits with {flags}: peak {_gb(best.peak)}, "
        f"a conversation of up to {context} positions"
    )


def _print_slower(config: MolmoConfig, plans: list[Plan], budget: int, answer: int) -> None:
    """Say what runs in `budget` although its mapped weights do not stay in memory."""
    from molmo_edge.runtimes.memory_plan import CHUNK, SCARCE_CHUNK, predict

    slow = []
    for plan in plans:
        if plan.weights.mapped:
            # As molmo_edge.runtimes.onnx, which runs longer parts of a prompt then.
            chunk = SCARCE_CHUNK if plan.weights.engine == "onnxruntime" else CHUNK
            slow.append(
                predict(
                    config,
                    plan.weights,
                    max_crops=plan.max_crops,
                    cache=plan.cache,
                    answer=answer,
                    image_tokens=plan.image_tokens,
                    chunk=chunk,
                )
            )
    if fitting := [plan for plan in slow if plan.needed <= budget]:
        one = min(fitting, key=lambda plan: plan.peak)
        print(
            f"{one.weights.precision} on {one.weights.engine} runs in it, but slower: {_gb(one.peak - budget)} of "
            "its weights do not stay in memory and are read from the file whenever they are needed"
        )


def _print_one(plan: Plan, peaks: Peaks | None) -> None:
    rows = [(name, _gb(count)) for name, count in plan.parts.items()]
    print_table((f"part ({plan.max_crops} crops, {plan.positions} positions)", "predicted"), rows)
    loaded = plan.weights.loaded + plan.parts["process"]
    phases = [
        ("model loaded", loaded, peaks and peaks.loaded),
        ("peak while loading", plan.loading, peaks and peaks.loading),
        ("peak while encoding the image", plan.encoding, peaks and peaks.encoding),
        ("peak while answering", plan.answering, peaks and peaks.answering),
        ("peak", plan.peak, peaks and peaks.peak),
    ]
    if peaks is None:
        print_table(("phase", "predicted"), [(name, _gb(count)) for name, count, _ in phases[1:]])
    else:
        cells = [(n, _gb(p), _gb(m), f"{100 * (p / m - 1):+.0f} %") for n, p, m in phases if m]
        print_table(("phase", "predicted", "measured", "difference"), cells)
