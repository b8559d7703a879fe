"""Commands check free memory before they open a model, and show results before they open the next."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from molmo_edge.checkpoints.hub_config import read_config
from molmo_edge.checkpoints.manifest import content_sha256
from molmo_edge.config import MolmoConfig
from molmo_edge.errors import MolmoEdgeError

pytest.importorskip("torch")
pytest.importorskip("onnx")

BENCH = ("bench", "--repeat", 1, "--max-new-tokens", 2, "--max-crops", 1)


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Fake a number of free bytes of memory."""

    def make(count: int) -> None:
        monkeypatch.setattr("molmo_edge.system.memory.meminfo", lambda: {"MemAvailable": count})

    return make


@pytest.fixture(scope="module")
def config(golden: Path) -> MolmoConfig:
    return read_config(golden / "molmoe")


def needed(config: MolmoConfig, precision: str) -> int:
    from molmo_edge.modeling.precision import room, weight_bytes

    return weight_bytes(config, precision, "cpu") + room(config, precision)


@pytest.fixture
def photos(golden: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "astronaut.png").write_bytes((golden / "astronaut.png").read_bytes())
    row = {"image": "astronaut.png", "source": "receipts", "fields": {"total": "9"}, "objects": []}
    (folder / "annotations.jsonl").write_text(json.dumps(row))
    return folder


def test_bench_runs_pytorch_in_bfloat16_where_float32_does_not_fit(
    cli: Any, free: Callable[[int], None], tiny_bundle: Path, config: MolmoConfig
) -> None:
    free(needed(config, "bf16"))
    assert needed(config, "bf16") < needed(config, "fp32")
    status, out, _ = cli(*BENCH, "-m", tiny_bundle, "--json")
    assert status == 0
    assert [timing["engine"] for timing in json.loads(out)["timings"]] == ["onnxruntime", "pytorch bf16"]


def test_bench_leaves_pytorch_out_where_nothing_fits(cli: Any, free: Callable[[int], None], tiny_bundle: Path) -> None:
    free(500_000_000)
    status, out, err = cli(*BENCH, "-m", tiny_bundle)
    assert status == 0
    assert "onnxruntime" in out
    assert "pytorch" not in out
    assert "PyTorch was skipped: the weights need" in err
    assert "0.5 GB of memory are free" in err


def test_bench_shows_the_first_engine_before_the_second_opens(
    cli: Any, monkeypatch: pytest.MonkeyPatch, tiny_bundle: Path
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("molmo_edge.cli.bench._torch_runtime", killed)
    status, out, _ = cli(*BENCH, "-m", tiny_bundle)
    assert status != 0
    assert "preprocessing" in out
    assert "onnxruntime" in out


def test_weights_of_a_bundle_do_not_load_where_they_do_not_fit(
    free: Callable[[int], None], tiny_bundle: Path, config: MolmoConfig
) -> None:
    from molmo_edge.export import load_bundle_weights

    free(needed(config, "bf16"))
    with pytest.raises(MolmoEdgeError, match='use precision="bf16"'):
        load_bundle_weights(tiny_bundle)
    assert load_bundle_weights(tiny_bundle, precision="auto").precision == "bf16"


@pytest.mark.parametrize("command", ["ask", "verify", "bench"])
def test_a_bundle_larger_than_memory_is_refused(
    command: str, cli: Any, free: Callable[[int], None], tiny_bundle: Path, golden: Path
) -> None:
    free(100_000)
    arguments: dict[str, list[object]] = {
        "ask": [golden / "astronaut.png", "What?", "-m", tiny_bundle],
        "verify": [tiny_bundle],
        "bench": ["-m", tiny_bundle],
    }
    status, out, err = cli(command, *arguments[command])
    assert (status, out) == (1, "")
    assert "GB of memory, but only 0.0 GB are free" in err


def test_external_weights_count(
    cli: Any, free: Callable[[int], None], tmp_path: Path, golden: Path, tiny_bundle: Path
) -> None:
    """A decoder's graph of a megabyte may have gigabytes of weights in a file beside it."""
    bundle = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    data = bundle / "decoder.onnx.data"
    data.write_bytes(bytes(60_000_000))
    manifest = json.loads((bundle / "molmo_edge.json").read_text())
    sha256 = hashlib.sha256(data.read_bytes()).hexdigest()
    manifest["components"]["decoder_data"] = {"file": data.name, "bytes": 60_000_000, "sha256": sha256}
    manifest["sha256"] = content_sha256({key: value for key, value in manifest.items() if key != "sha256"})
    (bundle / "molmo_edge.json").write_text(json.dumps(manifest))
    free(50_000_000)
    status, out, err = cli("ask", golden / "astronaut.png", "What?", "-m", bundle)
    assert (status, out) == (1, "")
    assert "decoder 0.1 GB" in err
    assert "needs at least 0.1 GB" in err


@pytest.mark.parametrize("noise", ["threads", "bf16"])
def test_loss_refuses_before_the_reference_is_asked(
    noise: str, cli: Any, free: Callable[[int], None], tiny_bundle: Path, golden: Path, photos: Path, monkeypatch: Any
) -> None:
    """The candidate, or the noise model, does not fit."""

    def asked(*_: object, **__: object) -> None:
        raise AssertionError("the reference was asked")

    monkeypatch.setattr("molmo_edge.evaluation.loss.record_reference", asked)
    free(500_000_000)
    candidate = golden / "molmoe" if noise == "threads" else tiny_bundle
    status, _, err = cli("loss", tiny_bundle, candidate, "--suite", f"photos:{photos}", "--noise", noise)
    assert status == 1
    assert "0.5 GB of memory are free" in err


def test_loss_shows_what_is_measured_before_the_next_model_opens(
    cli: Any, tiny_bundle: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from molmo_edge.evaluation import loss as module

    open_runtime, opened = module.open_runtime, []

    def third_is_killed(directory: Path, **options: Any) -> Any:
        opened.append(directory)
        if len(opened) == 3:  # after the reference and the first candidate
            raise MolmoEdgeError("killed")
        return open_runtime(directory, **options)

    monkeypatch.setattr(module, "open_runtime", third_is_killed)
    arguments = [tiny_bundle, tiny_bundle, tiny_bundle, "--suite", f"photos:{photos}", "--max-crops", 0]
    status, _, err = cli("loss", *arguments, "--noise", "none")
    assert status == 1
    assert f"{tiny_bundle.name}: " in err
    assert "KL per token, mean" in err


def test_ablation_leaves_weights_in_their_files_where_they_do_not_fit(
    cli: Any, free: Callable[[int], None], tiny_bundle: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from molmo_edge.evaluation import ablation

    opened, open_files = [], ablation.open_files

    def watch(*arguments: Any, mapped: bool = False) -> Any:
        opened.append(mapped)
        return open_files(*arguments, mapped=mapped)

    monkeypatch.setattr(ablation, "open_files", watch)
    free(500_000_000)
    arguments = [tiny_bundle, "--suite", f"photos:{photos}", "--precisions", "int8", "--max-crops", 0]
    status, out, err = cli("ablate", *arguments, "--limit", 1)
    assert status == 0
    assert "answers about 1 image;" in out
    assert opened
    assert all(opened)
    assert "weights are read from disk" in err
    assert "embed_tokens int8: KL" in err, "each part is said when it is measured"
