"""Merged adapters: every tensor keeps the dtype of its checkpoint, and what was frozen is not touched."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from small_checkpoints import a_batch, close, hidden
from test_lora import EVERYWHERE, filled, saved

from molmo_edge.checkpoints.hub_config import read_config, write_hub_config
from molmo_edge.checkpoints.safetensors_files import ShardWriter
from molmo_edge.checkpoints.tensor_names import hub_layout
from molmo_edge.checkpoints.tensor_sources import CheckpointError, TensorSource
from molmo_edge.checkpoints.weight_files import open_tensors
from molmo_edge.config import MolmoConfig
from molmo_edge.frontend.tokenizer import Tokenizer
from molmo_edge.modeling import load_checkpoint
from molmo_edge.training.adapters import ADAPTERS, merge
from molmo_edge.training.lora import LoraConfig, LoraError, adapted, adapter_name, trained_whole

pytestmark = pytest.mark.usefixtures("one_thread")

LORA = LoraConfig(rank=3, expert_rank=2)
WIDTHS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def stored_as(checkpoint: Path, out: Path, *, mixed: bool, file: str, dtype: torch.dtype = torch.float32) -> Path:
    """A copy of a checkpoint with its tensors in `dtype`, or in all that there are."""
    out.mkdir()
    source = open_tensors(checkpoint)
    tensors = {}
    for i, name in enumerate(source.names()):
        values = torch.tensor(source.get(name)).to(WIDTHS[i % 4] if mixed else dtype)
        tensors[name] = values.contiguous()
    if file == "pytorch_model.bin":
        torch.save(tensors, out / file)
    else:
        from safetensors.torch import save_file

        save_file(tensors, out / file, metadata={"format": "pt"})
    write_hub_config(read_config(checkpoint), out, Tokenizer.from_file(checkpoint / "tokenizer.json").special)
    (out / "tokenizer.json").write_bytes((checkpoint / "tokenizer.json").read_bytes())
    return out


def frozen(config: MolmoConfig, lora: LoraConfig) -> set[str]:
    trained = {*adapted(config, lora), *trained_whole(config, lora)}
    return {hub for name, slot in hub_layout(config).items() if name not in trained for hub in slot}


def dtypes(source: TensorSource) -> dict[str, str]:
    return {name: source.dtype(name) for name in source.names()}


@pytest.mark.parametrize("kind", ["experts", "dense"])
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, None], ids=str)
def test_every_tensor_keeps_its_dtype_and_frozen_ones_their_bytes(
    small_checkpoints: dict[str, Path], tmp_path: Path, kind: str, file: str, dtype: torch.dtype | None
) -> None:
    base = stored_as(
        small_checkpoints[kind], tmp_path / "base", mixed=dtype is None, file=file, dtype=dtype or torch.float32
    )
    molmo, _, config = load_checkpoint(base)
    filled(molmo, LORA)
    merge(base, saved(molmo, LORA, base, tmp_path / ADAPTERS), tmp_path / "out")
    before, after = open_tensors(base), open_tensors(tmp_path / "out")
    assert dtypes(after) == dtypes(before)
    assert len(set(dtypes(after).values())) == (4 if dtype is None else 1)
    kept = frozen(config, LORA)
    assert 10 < len(kept) < len(after.names())
    for name in after.names():
        same = before.raw(name).tobytes() == after.raw(name).tobytes()
        assert same == (name in kept), name
    merged, _, _ = load_checkpoint(tmp_path / "out")
    if dtype == torch.float32:  # rounded weights may choose other experts
        close(hidden(merged, a_batch(base)), hidden(molmo, a_batch(base)))
    for name, rank in adapted(config, LORA).items():
        a, b = (molmo.get_parameter(f"{adapter_name(name)}.{leaf}").detach() for leaf in "ab")
        expected = molmo.get_parameter(name).detach() + LORA.scale(rank) * b @ a
        assert molmo.get_parameter(name).shape == merged.get_parameter(name).shape
        close(merged.get_parameter(name), expected, 1e-6 if dtype == torch.float32 else 4e-3)
    from safetensors.torch import load_file

    for name, values in load_file(tmp_path / "out" / "model.safetensors").items():  # other tools read it
        assert np.array_equal(values.float().numpy(), after.get(name)), name


def test_the_dtype_can_be_chosen(small_checkpoints: dict[str, Path], tmp_path: Path) -> None:
    base = small_checkpoints["dense"]
    molmo, _, _ = load_checkpoint(base)
    filled(molmo, EVERYWHERE)
    path = saved(molmo, EVERYWHERE, base, tmp_path / ADAPTERS)
    for dtype, tolerance in (("BF16", 5e-2), ("F16", 1e-2), ("F32", 1e-5)):
        merge(base, path, tmp_path / "out", dtype)
        assert set(dtypes(open_tensors(tmp_path / "out")).values()) == {dtype}
        merged, _, _ = load_checkpoint(tmp_path / "out")
        close(hidden(merged, a_batch(base)), hidden(molmo, a_batch(base)), tolerance)
    with pytest.raises(LoraError, match=r'cannot be stored in "I8" \(known: F32, BF16, F16\)'):
        merge(base, path, tmp_path / "other", "I8")
    assert not (tmp_path / "other").exists()


def test_weights_that_float16_cannot_hold_are_refused(small_checkpoints: dict[str, Path], tmp_path: Path) -> None:
    base = small_checkpoints["dense"]
    molmo, _, _ = load_checkpoint(base)
    filled(molmo, EVERYWHERE)
    molmo.get_parameter("decoder.blocks.0.attn.att_proj.adapter.b").data.fill_(1e6)
    path = saved(molmo, EVERYWHERE, base, tmp_path / ADAPTERS)
    with pytest.raises(CheckpointError, match=r"overflow float16 \(65504\): choose bfloat16 or float32"):
        merge(base, path, tmp_path / "out", "F16")


def test_shards_of_several_dtypes(tmp_path: Path) -> None:
    shapes = {"wide": (3, 5), "other": (7,), "narrow": (3,), "last": (5,)}
    kinds = {"wide": "F64", "other": "F32", "narrow": "BF16", "last": "F16"}
    numpy = {"wide": "f8", "other": "f4", "narrow": "u2", "last": "f2"}
    values = {name: np.arange(np.prod(shape)).reshape(shape).astype(numpy[name]) for name, shape in shapes.items()}
    with ShardWriter(tmp_path, shapes, kinds, 140) as writer:
        for name in shapes:
            writer.write(name, values[name])
    assert sorted(p.name for p in tmp_path.glob("*.safetensors")) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    source = open_tensors(tmp_path)
    assert dtypes(source) == kinds
    for name in shapes:
        assert np.array_equal(source.raw(name), values[name])
    with pytest.raises(ValueError, match="wider dtypes must come first"):
        ShardWriter(tmp_path, shapes, kinds | {"wide": "F16"}, 1000)
