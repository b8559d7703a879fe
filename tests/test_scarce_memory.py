"""Memory that a bundle's mapped weights do not fit into: what is mapped, what is refused, and what is released."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from molmo_edge import Molmo
from molmo_edge.checkpoints.bundle import open_bundle
from molmo_edge.errors import EngineError
from molmo_edge.presets import PRESETS
from molmo_edge.runtimes import kernels
from molmo_edge.runtimes.memory_plan import bundle_weights, bundle_weights_of, predict
from molmo_edge.runtimes.onnx import OnnxRuntime, load_session

BLOCK = 128


def graph_with_experts(path: Path, computable: bool) -> Path:
    """A layer of 4 experts, 256 wide, with its weights in a file beside it, and a matrix that no kernel computes."""
    inner, hidden, experts = 256, 128, 4
    shapes = {"gate_up": (2 * hidden, inner), "down": (inner, hidden)}
    tensors = {}
    for name, (columns, rows) in shapes.items():
        tensors[f"{name}.codes"] = np.zeros((experts, columns, rows // 2), np.uint8)
        tensors[f"{name}.scales"] = np.zeros((experts, columns, rows // BLOCK), np.float16)
    tensors["router"] = np.zeros((inner, experts), np.float32)
    names = ["x", "p", "gate_up.codes", "gate_up.scales", "", "down.codes", "down.scales", *[""] * 7, "p"]
    attributes: dict[str, Any] = {
        "activation_type": "swiglu",
        "swiglu_fusion": 1,
        "activation_alpha": 1.0,
        "activation_beta": 0.0,
        "expert_weight_bits": 4,
        "normalize_routing_weights": 0,
        "accuracy_level": 4 if computable else 0,
        "k": 2,
        "block_size": BLOCK,
    }
    nodes = [
        onnx.helper.make_node("MatMul", ["x", "router"], ["p"]),
        onnx.helper.make_node("QMoE", names, ["y"], domain="com.microsoft", **attributes),
    ]
    value = onnx.helper.make_tensor_value_info
    given = [onnx.numpy_helper.from_array(array, name) for name, array in tensors.items()]
    types = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        nodes, "graph", [value("x", types, ["n", inner])], [value("y", types, ["n", inner])], given
    )
    onnx.save(
        onnx.helper.make_model(graph), path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=0
    )
    return path


def test_the_mapped_bytes_are_those_of_the_nodes_that_the_kernels_compute(tmp_path: Path) -> None:
    expected = 4 * (256 * 256 // 2 + 256 * 128 // 2 + 2 * (256 * 2 + 256 * 1))
    assert kernels.mapped_bytes(graph_with_experts(tmp_path / "a.onnx", computable=True)) == expected
    assert kernels.mapped_bytes(graph_with_experts(tmp_path / "b.onnx", computable=False)) == 0
    (tmp_path / "c.onnx").write_bytes(b"\xff\xff")
    assert kernels.mapped_bytes(tmp_path / "c.onnx") == 0


@pytest.mark.parametrize(("model", "precision"), [("molmoe-1b", "mixed"), ("molmo2-4b", "mixed"), ("molmo2-4b", "q4")])
def test_the_kernels_move_weights_from_resident_to_mapped(model: str, precision: str) -> None:
    without = bundle_weights_of(PRESETS[model], precision)
    with_kernels = bundle_weights_of(PRESETS[model], precision, kernels=True)
    assert not without.mapped
    assert with_kernels.stored == without.stored
    moved = without.resident - with_kernels.resident
    assert moved == pytest.approx(1.12 * sum(with_kernels.mapped.values()), rel=1e-6)
    plan = predict(PRESETS[model], with_kernels)
    assert plan.needed == plan.peak - sum(with_kernels.mapped.values())
    assert plan.loading < plan.peak


def test_a_precision_of_eight_bits_is_planned_alike() -> None:
    config = PRESETS["molmoe-1b"]
    assert bundle_weights_of(config, "q8", kernels=True) == bundle_weights_of(config, "q8")
    assert bundle_weights_of(config, "q4_k_m", kernels=True) == bundle_weights_of(config, "q4_k_m")


def test_what_the_kernels_read_is_not_refused(
    cli: Any, tiny_bundle: Path, golden: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mapped pages need not fit: a model is refused for what has to be in memory."""
    weights = bundle_weights(open_bundle(tiny_bundle))
    monkeypatch.setattr("molmo_edge.system.memory.meminfo", lambda: {"MemAvailable": weights.resident})
    assert cli("ask", golden / "astronaut.png", "What?", "-m", tiny_bundle, "--max-new-tokens", 1)[0] == 0
    smaller = bundle_weights(open_bundle(tiny_bundle), kernels=True)
    assert smaller.resident <= weights.resident
    monkeypatch.setattr("molmo_edge.system.memory.meminfo", lambda: {"MemAvailable": smaller.resident // 2})
    status, _, err = cli("ask", golden / "astronaut.png", "What?", "-m", tiny_bundle)
    assert status == 1
    assert re.search("needs at least .* are free", err)


def test_answers_are_equal_where_memory_is_scarce(
    tiny_bundle: Path, golden: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The vision tower is loaded again for each image."""
    loaded: list[str] = []

    def watch(path: Path, *arguments: Any, **options: Any) -> Any:
        loaded.append(path.stem)
        return load_session(path, *arguments, **options)

    monkeypatch.setattr("molmo_edge.runtimes.onnx.load_session", watch)
    bundle = open_bundle(tiny_bundle)
    files = {name: bundle.path(name) for name in ("vision_encoder", "connector", "embed_tokens", "decoder")}
    usual = Molmo(tiny_bundle)
    loaded.clear()
    scarce = Molmo.from_parts(OnnxRuntime(bundle.config, files, scarce=True), usual.engine.tokenizer)
    for question in ("What?", "Where?"):
        expected = usual.ask(golden / "astronaut.png", question, max_new_tokens=4)
        assert scarce.ask(golden / "astronaut.png", question, max_new_tokens=4).token_ids == expected.token_ids
    counts = {name: sum(one.startswith(name) for one in loaded) for name in ("vision_encoder", "decoder")}
    assert counts == {"vision_encoder": 2, "decoder": 1}
    scarce.close()
    with pytest.raises(EngineError, match="closed"):
        scarce.ask(golden / "astronaut.png", "What?")
