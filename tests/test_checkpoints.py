"""Reading and writing checkpoints in every public layout; damaged ones are refused by file and tensor."""

from __future__ import annotations

import json
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from pickled import copy_pickled_molmoe
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch_file

from molmo_edge import Molmo
from molmo_edge.checkpoints.hub_config import from_hub_config, read_config, to_hub_config
from molmo_edge.checkpoints.safetensors_files import ShardWriter
from molmo_edge.checkpoints.tensor_names import hub_layout, hub_shapes
from molmo_edge.checkpoints.tensor_sources import CheckpointError
from molmo_edge.checkpoints.weight_files import open_tensors
from molmo_edge.config import ConfigError, MolmoConfig
from molmo_edge.errors import MolmoEdgeError
from molmo_edge.export import ExportError, export_bundle, export_checkpoint
from molmo_edge.export.safetensors_checkpoint import round_to_bfloat16
from molmo_edge.frontend.tokenizer import TokenizerError
from molmo_edge.modeling import Molmo as Model
from molmo_edge.modeling import load_checkpoint
from molmo_edge.presets import PRESETS

GOLDEN = Path(__file__).parent / "golden"
ARCHITECTURES = ("molmoe", "qwen", "olmo")


def tensors_of(directory: Path) -> dict[str, np.ndarray]:
    source = open_tensors(directory)
    return {name: np.array(source.get(name)) for name in source.names()}


def as_reference(checkpoint: Path, out: Path) -> None:
    """Write the checkpoint in the layout of the reference's tarballs."""
    config, tensors = read_config(checkpoint), tensors_of(checkpoint)
    d, state = config.decoder, {}
    for name, values in tensors.items():
        if ".experts." in name:
            continue
        name = name.removeprefix("model.").replace("lm_head.", "transformer.ff_out.")
        for theirs, ours in ((".attn.", "."), (".mlp.gate.", ".ffn.router.layer."), (".mlp.ff_norm.", ".ff_norm.")):
            name = name.replace(theirs, ours) if name.startswith("transformer.blocks.") else name
        state[name] = torch.from_numpy(values).bfloat16()
    for n in range(d.n_layers if d.n_experts else 0):
        experts = f"model.transformer.blocks.{n}.mlp.experts"
        for part, fused in (("gate", "w1"), ("up", "v1"), ("down", "w2")):
            each = [tensors[f"{experts}.{e}.{part}_proj.weight"] for e in range(d.n_experts)]
            each = [w.T for w in each] if part == "down" else each
            state[f"transformer.blocks.{n}.ffn.experts.mlp.{fused}"] = torch.from_numpy(np.concatenate(each))
    out.mkdir()
    torch.save(state, out / "model.pt")
    raw = json.loads((checkpoint / "config.json").read_text())
    model = (raw if "d_model" in raw else _moe_dialect(config)) | {
        "image_pooling_2d": "attention_meanq",
        "tokenizer": {"identifier": "allenai/OLMoE-1B-7B-0924", "tokenizer_dir": None},
        "vision_backbone": to_hub_config(config)[0]["vision_backbone"],
    }
    model.pop("model_type", None)
    (out / "config.yaml").write_text(yaml.safe_dump({"run_name": "x", "load_path": "${path.choose:a}", "model": model}))
    shutil.copy(checkpoint / "tokenizer.json", out)


def _moe_dialect(config: MolmoConfig) -> dict[str, Any]:
    """A dense decoder with the keys of the reference's ModelConfig, which the hub uses only for MolmoE."""
    d = config.decoder
    return {
        "d_model": d.d_model, "n_layers": d.n_layers, "n_heads": d.n_heads, "n_kv_heads": d.n_kv_heads,
        "mlp_ratio": 4, "mlp_hidden_size": 2 * d.ffn_dim, "block_type": "sequential", "activation_type": "swiglu",
        "vocab_size": d.vocab_size, "embedding_size": d.embedding_size, "qkv_bias": d.qkv_bias, "rope": True,
        "additional_vocab_size": d.additional_vocab_size, "attention_layer_norm": d.qk_norm, "layer_norm_type": "rms",
        "norm_after": d.norm_after, "layer_norm_eps": d.norm_eps, "rope_theta": d.rope_theta, "weight_tying": False,
        "max_position_embeddings": None, "max_sequence_length": d.max_position_embeddings, "max_crops": 12,
        "overlap_margins": [4, 4], "vit_layers": list(config.vision.layers), "image_projector": "mlp",
    }  # fmt: skip


@pytest.mark.parametrize("preset", PRESETS)
def test_the_layout_is_the_models(preset: str) -> None:
    config = PRESETS[preset]
    with torch.device("meta"):
        model = Model(config)
    shapes, layout = hub_shapes(config), hub_layout(config)
    parameters = {name: tuple(p.shape) for name, p in model.named_parameters() if p.numel()}
    assert set(parameters) == set(layout)
    for name, slot in layout.items():
        assert parameters[name] == (shapes[slot[0]] if len(slot) == 1 else (len(slot), *shapes[slot[0]])), name


@pytest.mark.parametrize(
    ("preset", "billions"), [("molmoe-1b", 7.222), ("molmo-7b-d", 8.021), ("molmo-7b-o", 7.665), ("molmo-72b", 73.308)]
)
def test_presets_have_the_published_number_of_parameters(preset: str, billions: float) -> None:
    total = sum(int(np.prod(shape)) for shape in hub_shapes(PRESETS[preset]).values())
    assert round(total / 1e9, 3) == billions


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_survive_their_dialect_of_config_json(preset: str) -> None:
    raw, preprocessor = to_hub_config(PRESETS[preset])
    assert ("d_model" in raw) == (PRESETS[preset].decoder.n_experts > 0)
    assert from_hub_config(json.loads(json.dumps(raw)), json.loads(json.dumps(preprocessor))) == PRESETS[preset]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_references_folders_are_the_same_model(name: str, tmp_path: Path) -> None:
    as_reference(GOLDEN / name, tmp_path / "reference")
    ours, _, config = load_checkpoint(tmp_path / "reference")
    golden, _, golden_config = load_checkpoint(GOLDEN / name)
    assert config.decoder == golden_config.decoder
    assert config.vision == golden_config.vision
    for (parameter, values), (_, expected) in zip(ours.named_parameters(), golden.named_parameters(), strict=True):
        assert torch.equal(values, expected), parameter
    export_checkpoint(tmp_path / "reference", tmp_path / "hub")
    assert tensors_of(tmp_path / "hub").keys() == tensors_of(GOLDEN / name).keys()


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_conversion_keeps_every_value(name: str, precision: str, tmp_path: Path) -> None:
    """The golden weights are exact in bfloat16, so neither precision changes them; both loaders read the result."""
    files = export_checkpoint(GOLDEN / name, tmp_path / "out", precision, shard_bytes=100_000)
    assert len(files) > 3
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    theirs = {k: v for file in files for k, v in load_torch_file(file).items()}
    assert {v.dtype for v in theirs.values()} == {torch.bfloat16 if precision == "bf16" else torch.float32}
    assert index["metadata"]["total_size"] == sum(v.nbytes for v in theirs.values())
    assert all(index["weight_map"][k] == file.name for file in files for k in load_torch_file(file))
    expected = tensors_of(GOLDEN / name)
    assert theirs.keys() == expected.keys()
    for tensor, values in expected.items():
        np.testing.assert_array_equal(theirs[tensor].float().numpy(), values, err_msg=tensor)
    assert read_config(tmp_path / "out") == read_config(GOLDEN / name)
    again, _, _ = load_checkpoint(tmp_path / "out")
    golden, _, _ = load_checkpoint(GOLDEN / name)
    for (parameter, values), (_, wanted) in zip(again.named_parameters(), golden.named_parameters(), strict=True):
        assert torch.equal(values, wanted), parameter


def test_float32_is_rounded_to_nearest_even(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "qwen", tmp_path / "in")
    weights = load_torch_file(tmp_path / "in" / "model.safetensors")
    fine = {name: torch.randn(w.shape, generator=torch.Generator().manual_seed(0)) for name, w in weights.items()}
    save_file({name: w.numpy() for name, w in fine.items()}, tmp_path / "in" / "model.safetensors")
    export_checkpoint(tmp_path / "in", tmp_path / "out", "bf16")
    for name, values in load_torch_file(tmp_path / "out" / "model.safetensors").items():
        assert torch.equal(values, fine[name].to(torch.bfloat16)), name


def test_rounding_is_pytorchs_and_needs_none_of_it() -> None:
    values = (
        np.random.default_rng(0).normal(size=200_000).astype(np.float32)
        * 10.0 ** np.arange(-100, 100).repeat(1000)
        % 1e38
    )
    edge = [0.0, -0.0, np.inf, -np.inf, 3.4028235e38, 1e-45, 1.00390625, 1.01171875, -1.00390625]
    values = np.concatenate([values, np.array(edge, np.float32)])
    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.uint16).numpy()
    np.testing.assert_array_equal(round_to_bfloat16(values), expected)
    nans = np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00000, 0x7F800001], np.uint32).view(np.float32)
    assert torch.from_numpy(round_to_bfloat16(nans)).view(torch.bfloat16).isnan().all()


def test_conversion_says_how_far_it_is(tmp_path: Path) -> None:
    progress: list[tuple[int, int]] = []
    export_checkpoint(GOLDEN / "qwen", tmp_path / "out", on_progress=lambda done, total: progress.append((done, total)))
    assert progress == sorted(progress)
    assert progress[-1][0] == progress[-1][1] == sum(v.size for v in tensors_of(GOLDEN / "qwen").values())


# Damages of a checkpoint, and the errors before or during its conversion.


def _edit_index(directory: Path, change: Callable[[dict[str, str]], None]) -> None:
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def _truncate_shard(directory: Path) -> None:
    shard = directory / "model-00002-of-00004.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1000])


def _lose_shard(directory: Path) -> None:
    (directory / "model-00003-of-00004.safetensors").unlink()


def _lose_tensor(directory: Path) -> None:
    _edit_index(directory, lambda where: where.pop("model.transformer.ln_f.weight"))


def _misplace_tensor(directory: Path) -> None:
    _edit_index(
        directory, lambda where: where.update({"model.transformer.ln_f.weight": "model-00001-of-00004.safetensors"})
    )


def _outside(directory: Path) -> None:
    _edit_index(directory, lambda where: where.update({"model.transformer.ln_f.weight": ".."}))


def _other_shape(directory: Path) -> None:
    raw = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(raw | {"image_projector_dim": 20}))


def _other_architecture(directory: Path) -> None:
    raw = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(raw | {"model_type": "llava"}))


def _integers(directory: Path) -> None:
    shard = directory / "model-00004-of-00004.safetensors"
    save_file({name: values.astype(np.int32) for name, values in load_file(shard).items()}, shard)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_truncate_shard, r"model-00002-of-00004.safetensors is truncated: \"model\.\S+\" ends \d+ bytes after"),
        (_lose_shard, r"model-00003-of-00004.safetensors is missing"),
        (_lose_tensor, r"in has no tensor model\.transformer\.ln_f\.weight"),
        (_misplace_tensor, r"model-00001-of-00004.safetensors has no tensor \"model\.transformer\.ln_f\.weight\""),
        (_other_shape, r"model-0000\d-of-00004.safetensors: tensor model\.\S+image_projector\.w1\.weight has shape"),
        (_other_architecture, r"model_type is 'llava'"),
        (_outside, r"refers to a file outside of its directory: '\.\.'"),
        (_integers, r"model-00004-of-00004.safetensors: \"\S+\" has the unsupported dtype I32"),
    ],
)
def test_damage_is_refused_by_name(damage: Callable[[Path], None], says: str, tmp_path: Path) -> None:
    export_checkpoint(GOLDEN / "qwen", tmp_path / "in", "fp32", shard_bytes=220_000)
    assert (tmp_path / "in" / "model-00004-of-00004.safetensors").exists()
    damage(tmp_path / "in")
    with pytest.raises(MolmoEdgeError, match=says):
        export_checkpoint(tmp_path / "in", tmp_path / "out")
    with pytest.raises(MolmoEdgeError, match=says):
        load_checkpoint(tmp_path / "in")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


class _Code:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_a_pickle_with_code_in_it_is_refused_and_not_run(tmp_path: Path) -> None:
    copy_pickled_molmoe(tmp_path / "in")
    weights = tmp_path / "in" / "pytorch_model.bin"
    torch.save(
        {"model.transformer.ln_f.weight": torch.ones(32), "x": _Code(tmp_path / "ran")}, weights, pickle_protocol=2
    )
    for attempt in (
        lambda: load_checkpoint(tmp_path / "in"),
        lambda: export_checkpoint(tmp_path / "in", tmp_path / "o"),
    ):
        with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is not a complete PyTorch state dict"):
            attempt()
    weights.write_bytes(pickle.dumps(_Code(tmp_path / "ran"), protocol=2))
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is not a complete"):
        load_checkpoint(tmp_path / "in")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_pickle_holds_what_safetensors_hold(tmp_path: Path) -> None:
    pickled, safe = open_tensors(copy_pickled_molmoe(tmp_path / "in")), open_tensors(GOLDEN / "molmoe")
    for name in load_torch_file(GOLDEN / "molmoe" / "model.safetensors"):
        np.testing.assert_array_equal(pickled.get(name), safe.get(name), err_msg=name)


def test_pickles_that_are_cut_or_hold_other_things(tmp_path: Path) -> None:
    copy_pickled_molmoe(tmp_path / "in")
    weights = tmp_path / "in" / "pytorch_model.bin"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is not a complete"):
        load_checkpoint(tmp_path / "in")
    torch.save([torch.ones(2)], weights)
    with pytest.raises(CheckpointError, match="is not a state dict"):
        load_checkpoint(tmp_path / "in")
    torch.save({"a": torch.ones(2, dtype=torch.int64)}, weights)
    with pytest.raises(CheckpointError, match=r'"a" has the dtype torch\.int64'):
        load_checkpoint(tmp_path / "in")
    torch.save({"a": torch.ones(2)}, weights, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"does not report the offsets|not a complete"):
        load_checkpoint(tmp_path / "in")


def test_a_pickles_tensors_may_share_and_turn_their_storage(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    torch.save(
        {"turned": base.T, "part": base[1:3, 2:5], "whole": base, "one": base[2, 3]}, tmp_path / "pytorch_model.bin"
    )
    source = open_tensors(tmp_path)
    assert zipfile.is_zipfile(tmp_path / "pytorch_model.bin")
    for name, wanted in {"turned": base.T, "part": base[1:3, 2:5], "whole": base, "one": base[2, 3]}.items():
        np.testing.assert_array_equal(source.get(name), wanted.numpy())
        assert source.get(name).flags.c_contiguous


def test_a_reference_folder_that_does_not_fit_its_config(tmp_path: Path) -> None:
    as_reference(GOLDEN / "molmoe", tmp_path / "in")
    text = (tmp_path / "in" / "config.yaml").read_text()
    (tmp_path / "in" / "config.yaml").write_text(text.replace("moe_num_experts: 8", "moe_num_experts: 4"))
    with pytest.raises(CheckpointError, match=r"model\.pt: tensor \S+mlp\.w1 has shape \[128, 32\].* 4 experts of 16"):
        load_checkpoint(tmp_path / "in")
    (tmp_path / "in" / "config.yaml").write_text(text.replace("n_layers: 2", "n_layers: 3"))
    with pytest.raises(CheckpointError, match=r"model\.pt has no tensor transformer\.blocks\.2\."):
        load_checkpoint(tmp_path / "in")
    for broken, says in (("a: [", "not valid YAML"), ("a: 1", "no section `model`"), ("model: {}", "vision_backbone")):
        (tmp_path / "in" / "config.yaml").write_text(broken)
        with pytest.raises(ConfigError, match=says):
            load_checkpoint(tmp_path / "in")


def test_a_reference_folder_becomes_a_bundle(tmp_path: Path) -> None:
    as_reference(GOLDEN / "qwen", tmp_path / "in")
    manifest = export_bundle(tmp_path / "in", tmp_path / "bundle")
    assert set(manifest["source"]["files"]) == {"config.yaml", "model.pt"}
    with Molmo(tmp_path / "bundle") as ours, Molmo(GOLDEN / "qwen", device="cpu", precision="fp32") as theirs:
        answers = [m.ask(GOLDEN / "coffee.png", "What?", max_new_tokens=6).token_ids for m in (ours, theirs)]
    assert answers[0] == answers[1]
    (tmp_path / "in" / "tokenizer.json").unlink()
    with pytest.raises(TokenizerError, match=r"copy the tokenizer\.json of the same model from the hub to this path"):
        load_checkpoint(tmp_path / "in")


def test_an_interrupted_conversion_leaves_nothing(tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_checkpoint(GOLDEN / "qwen", tmp_path / "out", on_progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_seen_before_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=200_100_000))
    with pytest.raises(ExportError, match=r"needs about \d+ MB, .* has only 200 MB free"):
        export_checkpoint(GOLDEN / "qwen", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_wrong_options_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ExportError, match=r"'q4' is not a supported precision for safetensors \(supported: bf16, fp32\)"
    ):
        export_checkpoint(GOLDEN / "qwen", tmp_path / "out", "q4")
    with pytest.raises(ExportError, match="exists already"):
        export_checkpoint(GOLDEN / "qwen", tmp_path)
    with pytest.raises(ExportError, match="shard_bytes must be positive, not 0"):
        export_checkpoint(GOLDEN / "qwen", tmp_path / "out", shard_bytes=0)


def test_a_writer_takes_what_was_announced_and_all_of_it(tmp_path: Path) -> None:
    shapes = {"a": (2, 3), "b": (4,)}
    with pytest.raises(ValueError, match="expected a, got b"), ShardWriter(tmp_path, shapes, "F32", 100) as writer:
        writer.write("b", np.zeros(4, np.float32))
    with (
        pytest.raises(ValueError, match="expected a, got a float64"),
        ShardWriter(tmp_path, shapes, "F32", 100) as writer,
    ):
        writer.write("a", np.zeros((2, 3)))
    with pytest.raises(ValueError, match="b was never written"), ShardWriter(tmp_path, shapes, "F32", 100) as writer:
        writer.write("a", np.zeros((2, 3), np.float32))


@pytest.mark.parametrize("name", ["molmo2_qwen3", "molmo2_olmo3", "molmo_point"])
def test_the_config_of_an_exported_molmo2_names_its_image_tokens(name: str, tmp_path: Path) -> None:
    golden = Path(__file__).parent / "golden2" / name
    export_checkpoint(golden, tmp_path / "out")
    given, written = (json.loads((folder / "config.json").read_text()) for folder in (golden, tmp_path / "out"))
    names = {
        key for key in given if key.endswith("_id") and (key.startswith("image") or "start" in key or "end" in key)
    }
    assert len(names) == 9
    assert {key: written.get(key) for key in names} == {key: given[key] for key in names}
