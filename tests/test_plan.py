"""The planner: predictions against measurement, the choice for a budget, and headers of the hub without weights."""

from __future__ import annotations

import json
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest
from hub_client import Client, refused
from hub_server import Hub, serve

from molmo_edge.checkpoints.bundle import default_bundle, open_bundle
from molmo_edge.checkpoints.hub_config import read_config
from molmo_edge.checkpoints.manifest import graph_names
from molmo_edge.modeling.weight_sizes import component_bytes, weight_bytes
from molmo_edge.presets import PRESETS
from molmo_edge.runtimes.memory_plan import (
    bundle_weights,
    bundle_weights_of,
    choose,
    largest_tiling,
    longest_context,
    predict,
    torch_weights,
)
from molmo_edge.sdk.peak_memory import Peaks
from molmo_edge.system.boards import USABLE, parse_bytes

# Peaks of full-size models with random weights that benchmarks/RESULTS.md records, for an image of 6 crops, in GB.
MEASURED = [
    ("molmoe-1b", "mixed", False, 60, 5.19),
    ("molmoe-1b", "mixed", False, 384, 5.28),
    ("molmoe-1b", "mixed", True, 384, 4.91),
    ("molmoe-1b", "q4_k_m", False, 60, 5.03),
]


@pytest.mark.parametrize(("model", "precision", "kernels", "answer", "peak"), MEASURED)
def test_predictions_are_within_a_tenth_of_recorded_peaks(
    model: str, precision: str, kernels: bool, answer: int, peak: float
) -> None:
    config = PRESETS[model]
    plan = predict(config, bundle_weights_of(config, precision, kernels=kernels), max_crops=6, answer=answer)
    assert plan.peak / 1e9 == pytest.approx(peak, rel=0.1)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peaks are measured on Linux")
def test_the_prediction_for_nano_is_within_a_tenth_of_its_measured_peak(cli: Any) -> None:
    runs = []
    for _ in range(3):  # a run differs from the next by up to 7 %, with the order in which the graphs are loaded
        status, out, _ = cli("plan", "nano", "--measure", "--json")
        assert status == 0
        runs.append(json.loads(out))
    measured = statistics.median(run["measured"]["peak"] for run in runs)
    assert runs[0]["plans"][0]["peak"] == pytest.approx(measured, rel=0.1)


def test_the_parts_add_up_and_grow_with_crops_and_answers() -> None:
    config = PRESETS["molmo2-4b"]
    weights = bundle_weights_of(config, "mixed")
    plan = predict(config, weights)
    assert plan.max_crops == config.image.max_crops
    assert sum(plan.parts.values()) == plan.answering
    assert plan.peak == max(plan.loading, plan.encoding, plan.answering)
    assert predict(config, weights, max_crops=2).peak < plan.peak < predict(config, weights, answer=4000).peak


def test_the_keys_and_values_are_those_of_the_cache() -> None:
    config = PRESETS["molmoe-1b"]
    plan = predict(config, bundle_weights_of(config, "q4_k_m"), max_crops=1, cache="f16", answer=100)
    assert plan.parts["keys and values (f16)"] == plan.positions * 128 * 1024  # 16 layers of 2 x 2048 values
    small = predict(config, bundle_weights_of(config, "q4_k_m"), max_crops=1, cache="q8_0", answer=100)
    assert small.parts["keys and values (q8_0)"] == plan.parts["keys and values (f16)"] * 17 // 32


def test_the_weights_of_a_bundle_are_those_of_its_files() -> None:
    bundle = open_bundle(default_bundle())
    weights = bundle_weights(bundle)
    assert weights.stored == sum(component.bytes for component in bundle.components.values())
    assert set(weights.parts) == set(graph_names(bundle.config))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "nf4"])
def test_the_weights_on_pytorch_are_those_of_its_components(precision: str) -> None:
    config = PRESETS["molmo-7b-d"]
    weights = torch_weights(config, precision)
    assert weights.resident == weight_bytes(config, precision, "cpu")
    assert weights.parts == component_bytes(config, precision, "cpu")


def test_the_choice_fits_and_takes_as_many_crops_as_possible() -> None:
    config = PRESETS["molmo2-4b"]
    for precision in ("mixed", "q4_k_m"):
        weights = bundle_weights_of(config, precision)
        full = predict(config, weights)
        assert choose(config, weights, full.peak) == full
        budget = (predict(config, weights, max_crops=0).peak + full.peak) // 2
        best = choose(config, weights, budget)
        assert best is not None
        assert best.peak <= budget
        smallest = {"cache": "q4_0"} if precision == "q4_k_m" else {}
        assert predict(config, weights, max_crops=best.max_crops + 1, **smallest).peak > budget
        assert choose(config, weights, 1_000_000_000) is None
        assert longest_context(config, best, budget) >= best.positions
        assert longest_context(config, best, 10**13) == config.decoder.max_position_embeddings


@pytest.mark.parametrize(("crops", "tiling"), [(0, (0, 0)), (1, (1, 1)), (12, (3, 4)), (8, (2, 4))])
def test_the_largest_tiling(crops: int, tiling: tuple[int, int]) -> None:
    rows, cols = largest_tiling(PRESETS["molmoe-1b"], crops)
    assert sorted((rows, cols)) == sorted(tiling)


@pytest.mark.parametrize(
    ("text", "count"), [("8GB", 8 * 10**9), ("7.5 GiB", 8053063680), ("800mb", 8 * 10**8), ("12", 12)]
)
def test_sizes(text: str, count: int) -> None:
    assert parse_bytes(text) == count


def test_a_budget_chooses_and_a_small_one_is_refused(cli: Any) -> None:
    status, out, _ = cli("plan", "nano", "--memory", "8GB", "--json")
    assert (status, json.loads(out)["budget"]) == (0, 8 * 10**9)
    status, out, _ = cli("plan", "nano", "--memory", "50MB")
    assert status == 1
    assert "does not fit into 50 MB" in out
    for wrong in (("--memory", "much"), ("--device", "toaster"), ("--memory", "8GB", "--device", "rpi5")):
        status, _, _ = cli("plan", "nano", *wrong)
        assert status == 2, wrong
    assert min(USABLE.values()) > 2e9


def test_a_bundle_takes_no_precision(cli: Any) -> None:
    status, _, err = cli("plan", "nano", "--precision", "q4")
    assert status == 1
    assert "leave --precision out" in err


def test_a_checkpoint_on_the_hub_is_planned_from_its_headers(tmp_path: Path, golden: Path) -> None:
    """Without its weights: they are only read in ranges, and nothing stays in the cache."""
    pytest.importorskip("torch")
    from molmo_edge.export import export_checkpoint

    served = tmp_path / "served"
    export_checkpoint(golden / "qwen", served, shard_bytes=150_000)
    with serve(Hub("someone/a-model", served)) as hub:
        client = Client(hub, tmp_path / "home")
        done = client("plan", hub.name, "--memory", "8GB", "--json")
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        weights = {name: span for name, span in hub.downloads if name.endswith(".safetensors")}
        assert len(weights) > 1
        assert all(span is not None for span in weights.values())
        assert found["download"] == sum(path.stat().st_size for path in served.glob("*.safetensors"))
        fp32 = next(one for one in found["plans"] if one["precision"] == "fp32")
        assert fp32["peak"] == predict(read_config(served), torch_weights(read_config(served), "fp32")).peak
        assert not list((tmp_path / "home").rglob("snapshots"))
        assert "molmo-edge pull" in refused(client("plan", hub.name, "--measure"))


def test_a_bundle_on_the_hub_is_planned_from_its_manifest(tmp_path: Path, tiny_bundle: Path) -> None:
    served = shutil.copytree(tiny_bundle, tmp_path / "served")
    with serve(Hub("someone/a-bundle", served)) as hub:
        client = Client(hub, tmp_path / "home")
        done = client("plan", hub.name, "--json")
        assert done.returncode == 0, done.stderr
        assert [name for name, _ in hub.downloads] == ["molmo_edge.json"]
        (found,) = json.loads(done.stdout)["plans"]
        bundle = open_bundle(tiny_bundle)
        assert found["peak"] == predict(bundle.config, bundle_weights(bundle)).peak
        assert client.fetch().returncode == 0
    measure = ("--measure",) if sys.platform.startswith("linux") else ()
    done = client("plan", hub.name, "--json", *measure)  # from the cache: the hub is stopped
    assert done.returncode == 0, done.stderr
    downloaded = json.loads(done.stdout)
    assert (downloaded["model"], downloaded["download"]) == (hub.name, None)
    assert [one["peak"] for one in downloaded["plans"]] == [found["peak"]]
    assert not measure or downloaded["measured"]["peak"] > 0
    name = bundle.path("decoder").name
    next((tmp_path / "home").glob(f"**/snapshots/*/{name}")).unlink()  # as after an interrupted download
    assert "cannot be reached" in refused(client("plan", hub.name))


def test_a_checkpoint_is_measured_on_pytorch_only(cli: Any, golden: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[str] = []

    def measure(*_: Any, precision: str, **__: Any) -> Peaks:
        measured.append(precision)
        return Peaks(1, 2, 3, 4)

    monkeypatch.setattr("molmo_edge.sdk.peak_memory.measure_peaks", measure)
    command = ("plan", golden / "molmoe", "--measure", "--memory")
    for options in (("8GB", "--precision", "mixed"), ("8GB", "--precision", "q4_k_m"), ("200MB",)):
        status, _, err = cli(*command, *options)  # 200 MB are less than PyTorch takes: a bundle is recommended
        assert status == 1
        assert "cannot be measured from a checkpoint" in err
    assert measured == []
    status, out, _ = cli(*command, "8GB", "--precision", "bf16", "--json")
    assert (status, measured) == (0, ["bf16"])
    assert json.loads(out)["measured"]["precision"] == "bf16"
    status, out, _ = cli(*command, "8GB")
    assert f"{measured[-1]} on pytorch fits" in out
