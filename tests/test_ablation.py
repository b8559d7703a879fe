"""Precisions of parts of a decoder, the cost of each, and the search within a budget of size or loss."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exported import GOLDEN, bundle, case, prompt, relative, runtime

from molmo_edge.checkpoints.bundle import open_bundle
from molmo_edge.checkpoints.hub_config import read_config
from molmo_edge.checkpoints.tensor_names import hub_shapes
from molmo_edge.evaluation.ablation import PARTS, AblationResult, Bench, ablate, precisions_of, size_of
from molmo_edge.evaluation.fault_localization import tensor_part
from molmo_edge.evaluation.precision_search import Choice, greedy_path, search
from molmo_edge.evaluation.stats import Estimate
from molmo_edge.evaluation.suites import load_suite
from molmo_edge.export import ExportError, export_bundle

CROPS = 1


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    questions = [replace(question, max_new_tokens=8) for question in load_suite("nano-val", limit=2)]
    with Bench(bundle("molmoe"), questions, max_crops=CROPS) as made:
        yield made


@pytest.fixture(scope="module")
def parts(bench: Bench) -> list[AblationResult]:
    return list(ablate(bench, ["q8", "q4"]))


@pytest.mark.parametrize("part", ["attention", "experts", "router", "head"])
@pytest.mark.parametrize("word", ["int8", "q8", "q4"])
def test_only_the_named_part_is_quantized(part: str, word: str, tmp_path: Path) -> None:
    manifest = export_bundle(GOLDEN / "molmoe", tmp_path / "b", {part: word}, measure=True)
    decoder = manifest["components"]["decoder"]
    assert {tensor_part(f"{name}.weight") for name in decoder["weight_errors"]} == {part}
    assert decoder["precision"] == f"fp32,{part}={word}"
    assert decoder["file"] == "decoder_parts.onnx"
    assert 0 < decoder["relative_error"] < 0.3
    c = case("molmoe", "square")
    from molmo_edge.runtimes import open_runtime

    engine = open_runtime(tmp_path / "b")
    rows = prompt(runtime("molmoe"), c)
    exact, found = (each.forward(rows, each.new_cache(len(rows))) for each in (runtime("molmoe"), engine))
    engine.close()
    assert 0 < relative(found, exact) < 0.5


def test_parts_override_the_precision_of_the_decoder(tmp_path: Path) -> None:
    manifest = export_bundle(
        GOLDEN / "qwen", tmp_path / "b", {"decoder": "q4", "attention": "fp32", "head": "int8"}, measure=False
    )
    rounded = {tensor_part(f"{name}.weight") for name in manifest["components"]["decoder"]["weight_errors"]}
    assert rounded == {"experts", "head"}, "a dense decoder's feed-forward is its experts"
    assert open_bundle(tmp_path / "b").components["decoder"].precision == "q4,attention=fp32,head=int8"


@pytest.mark.parametrize(
    ("precision", "options", "message"),
    [
        ({"head": "fp16"}, {}, "'fp16' is not a supported precision for head"),
        ({"decoder": "q4f16", "head": "q8"}, {}, "and in float16: leave head out"),
        ({"head": "int8"}, {"plain": True}, "in standard ONNX operators"),
        ({"head": "q8"}, {"calibrate": GOLDEN}, "calibrate applies to a decoder in q4"),
    ],
)
def test_unsupported_precisions_of_parts_are_refused(
    precision: Any, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=message):
        export_bundle(GOLDEN / "molmoe", tmp_path / "b", precision, **options)


@pytest.mark.parametrize("architecture", ["molmoe", "qwen", "olmo"])
def test_every_tensor_belongs_to_one_part(architecture: str) -> None:
    config = read_config(GOLDEN / architecture)
    found = {tensor_part(name) for name in hub_shapes(config)}
    assert found == set(PARTS) - (set() if config.decoder.n_experts else {"router"})


def test_every_part_is_measured_in_every_precision_it_supports(bench: Bench, parts: list[AblationResult]) -> None:
    assert [(p.part, p.precision) for p in parts] == [
        (part, word) for part in PARTS for word in ("q8", "q4") if word in precisions_of(part, bench.config)
    ]
    by_name = {(p.part, p.precision): p for p in parts}
    for (part, word), found in by_name.items():
        assert found.kl > 0, (part, word)
        if word == "q4":
            assert found.kl > by_name[part, "q8"].kl
        sees = part in ("vision_encoder", "connector")
        assert ("image" in found.metrics) == sees, "only what sees is shown the image again"
    assert by_name["experts", "q4"].saved > by_name["experts", "q8"].saved > 0


def test_search_within_a_size_takes_the_cheapest_parts_first(bench: Bench, parts: list[AblationResult]) -> None:
    whole, all_of_it = sum(map(size_of, bench.files.values())), greedy_path(parts)[-1].saved
    some, less = whole - all_of_it // 3, whole - 9 * all_of_it // 10
    found = search(bench, parts, max_bytes=some)
    assert less < found.bytes <= some
    assert found.kl > 0
    assert found.kl < search(bench, parts, max_bytes=less).kl
    with pytest.raises(ExportError, match="no precisions fit into"):
        search(bench, parts, max_bytes=whole // 100)


def test_search_within_a_loss_uses_the_measured_loss(bench: Bench, parts: list[AblationResult]) -> None:
    dearest = max(part.kl for part in parts)
    found = search(bench, parts, max_kl=dearest / 4)
    assert 0 < found.kl <= dearest / 4
    assert found.choice.precisions
    all_of_it = search(bench, parts, max_kl=1e9)
    assert all_of_it.bytes < found.bytes
    assert dict(all_of_it.choice.precisions) == dict(greedy_path(parts)[-1].precisions)
    with pytest.raises(ExportError, match=r"alone loses .* more than 1e-30"):
        search(bench, parts, max_kl=1e-30)
    with pytest.raises(ExportError, match="makes the model smaller"):
        search(bench, [], max_kl=1.0)
    with pytest.raises(ExportError, match="only one of them"):
        search(bench, parts)


def ablated(part: str, word: str, saved: int, kl: float) -> AblationResult:
    return AblationResult(part, word, saved, {"kl_mean": Estimate(kl, kl, kl, 1)})


def test_steps_are_ordered_by_loss_per_byte_saved() -> None:
    found = greedy_path(
        [
            ablated("head", "q8", 100, 0.1),
            ablated("head", "q4", 150, 1.0),
            ablated("experts", "q8", 1000, 0.2),
            ablated("experts", "q4", 1500, 0.4),
            ablated("router", "q8", -5, 0.0),
        ]
    )
    assert [dict(choice.precisions) for choice in found] == [
        {},
        {"experts": "q8"},
        {"experts": "q4"},
        {"experts": "q4", "head": "q8"},
        {"experts": "q4", "head": "q4"},
    ]
    assert found[-1].saved == 1650
    assert found[-1].predicted == pytest.approx(1.4)
    assert Choice().to_precision() == {}


def test_scales_are_trained_in_q4(cli: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    options = ("--max-kl", 1, "--precisions", "int8,q8", "--train-scales", 1)
    status, _, err = cli("quantize", bundle("molmoe"), "--out", tmp_path / "x", "--calibrate", GOLDEN, *options)
    assert status == 2
    assert "add q4" in err


def test_the_commands(cli: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    status, out, _ = cli("ablate", bundle("molmoe"), bundle("molmoe", "q4"), "--limit", 1, "--max-crops", 0, "--json")
    assert status == 0
    found = json.loads(out)
    assert [part["part"] for part in found["parts"]] == ["noise", *PARTS]
    assert found["matrices"]
    assert cli("ablate", bundle("molmoe"), "--precisions", "q3")[0] == 2
    assert cli("quantize", bundle("molmoe"), "--out", tmp_path / "x")[0] == 2
    for command in (
        ("ablate", bundle("molmoe")),
        ("quantize", bundle("molmoe"), "--out", tmp_path / "x", "--max-kl", 1),
    ):
        status, _, err = cli(*command, "--limit", 1, "--kinds", "smell")
        assert status == 2
        assert "smell" in err
    status, _, err = cli("quantize", bundle("molmoe"), "--out", tmp_path, "--max-kl", 1)
    assert status == 1
    assert "exists already" in err
    assert np.isfinite(found["parts"][0]["figures"]["kl_mean"]["value"])
