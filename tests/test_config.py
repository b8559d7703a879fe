"""Configurations: both dialects of the public checkpoints, and a sentence for whatever does not fit."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from molmo_edge.checkpoints.hub_config import from_hub_config, read_config, to_hub_config
from molmo_edge.config import ConfigError, MolmoConfig, VisionConfig
from molmo_edge.presets import PRESETS

Raw = dict[str, Any]


def raw(golden: Path, checkpoint: str) -> Raw:
    return json.loads((golden / checkpoint / "config.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_both_forms(name: str) -> None:
    config = PRESETS[name]
    assert MolmoConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    if config.decoder.additional_vocab_size:
        assert from_hub_config(*to_hub_config(config)) == config


@pytest.mark.parametrize("checkpoint", ["qwen", "olmo"])
def test_a_dense_config_without_vision_has_clips(golden: Path, checkpoint: str) -> None:
    """Molmo-7B's config.json on the hub says nothing about vision: its own code has the sizes."""
    full = raw(golden, checkpoint)
    bare = {k: v for k, v in full.items() if k not in ("vision_backbone", "vit_layers", "additional_vocab_size")}
    config = from_hub_config(bare, {})
    assert config.vision == VisionConfig()
    assert config.image.crop_size == 336
    assert config.decoder == replace(from_hub_config(full, {}).decoder, additional_vocab_size=128)


def test_molmoe_says_its_vision_itself(golden: Path) -> None:
    bare = {k: v for k, v in raw(golden, "molmoe").items() if k != "vision_backbone"}
    with pytest.raises(ConfigError, match="no 'vision_backbone'"):
        from_hub_config(bare, {})


@pytest.mark.parametrize(
    ("checkpoint", "change", "says"),
    [
        ("qwen", lambda c: c.update(hidden_size="32"), "d_model must be int, it is '32'"),
        ("qwen", lambda c: c.update(hidden_size=True), "d_model must be int"),
        ("qwen", lambda c: c.update(intermediate_size="96"), "intermediate_size"),
        ("qwen", lambda c: c.update(layer_norm_eps=None), "norm_eps must be float, it is None"),
        ("qwen", lambda c: c.update(layer_norm_eps=0), "norm_eps must be positive"),
        ("qwen", lambda c: c.update(rope_theta=float("nan")), "rope_theta"),
        ("qwen", lambda c: c.update(qkv_bias="false"), "qkv_bias must be bool"),
        ("qwen", lambda c: c.update(num_attention_heads=0), "n_heads must be positive"),
        ("qwen", lambda c: c.update(num_key_value_heads=-2), "n_kv_heads must be positive"),
        ("qwen", lambda c: c.update(vision_backbone=None), "vision_backbone"),
        ("qwen", lambda c: c.update(vit_layers=[-2, -11]), "layers"),
        ("qwen", lambda c: c.update(vit_layers=[10]), "layers"),
        ("qwen", lambda c: c.update(vit_layers=[]), "layers"),
        ("qwen", lambda c: c.update(vit_layers=None), "layers must be"),
        ("molmoe", lambda c: c.update(mlp_ratio=None), "mlp_ratio"),
        ("molmoe", lambda c: c.update(d_model=None), "mlp_ratio"),
        ("molmoe", lambda c: c.update(overlap_margins=4), "overlap_margins must be"),
        ("molmoe", lambda c: c.update(overlap_margins=[4]), "overlap_margins must be"),
        ("molmoe", lambda c: c.update(max_crops="12"), "max_crops must be int"),
        ("molmoe", lambda c: c.update(max_crops=-1), "max_crops must be positive"),
        ("molmoe", lambda c: c["vision_backbone"].update(image_default_input_size=336), "square"),
        ("molmoe", lambda c: c["vision_backbone"].update(image_default_input_size=["336", "336"]), "crop_size"),
        ("molmoe", lambda c: c["vision_backbone"].update(image_patch_size=0), "patch_size must be positive"),
        ("molmoe", lambda c: c["vision_backbone"].update(image_num_heads=5), "n_heads 5"),
        ("molmoe", lambda c: c["vision_backbone"].pop("image_emb_dim"), "no 'image_emb_dim'"),
    ],
)
def test_a_config_json_that_does_not_add_up(
    golden: Path, checkpoint: str, change: Callable[[Raw], None], says: str
) -> None:
    config = raw(golden, checkpoint)
    change(config)
    with pytest.raises(ConfigError, match=says):
        from_hub_config(config, {})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("image_pooling_2d", "attention"),
        ("image_projector", "linear"),
        ("image_pooling_w", 3),
        ("clip_qkv", 8.0),
        ("rope_impl", "interleave"),
        ("layer_norm_type", "default"),
        ("activation_type", "gelu"),
    ],
)
def test_another_architecture_is_refused_by_name(golden: Path, key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"{key} {value!r}"):
        from_hub_config(raw(golden, "molmoe") | {key: value}, {})


@pytest.mark.parametrize(
    "preprocessor", [{"image_mean": None}, {"image_std": [0.5, 0.5, 0]}, {"image_std": [0.5]}, {"max_crops": 2.5}]
)
def test_a_preprocessor_config_that_does_not_add_up(golden: Path, preprocessor: Raw) -> None:
    with pytest.raises(ConfigError, match=r"ImageConfig|std"):
        from_hub_config(raw(golden, "molmoe"), preprocessor)


@pytest.mark.parametrize("section", [None, [], "x", {"image": []}])
def test_a_dict_that_is_no_configuration(section: Any) -> None:
    whole = copy.deepcopy(PRESETS["nano"].to_dict())
    with pytest.raises(ConfigError):
        MolmoConfig.from_dict(whole | section if isinstance(section, dict) else section)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is missing"):
        read_config(tmp_path)
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        read_config(tmp_path)
