"""Base weights to the checkpoint of stage 1: the same function as the bases compute, and nothing lost on the way.

The bases are tiny and random, written with the names of transformers; what they compute is written down here once
more, from those names and tensors alone.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from base_layouts import (
    DINO,
    GOLDEN,
    KINDS,
    as_patches,
    base_tokenizer,
    clip_shapes,
    clip_states,
    decoder_logits,
    decoder_shapes,
    dino_states,
    golden,
    randomly,
    resampled,
    stored,
    write_clip,
    write_decoder,
    write_dino,
)
from safetensors import safe_open
from safetensors.torch import save_file

from molmo_edge.checkpoints.hub_config import read_config
from molmo_edge.checkpoints.tensor_names import hub_shapes
from molmo_edge.checkpoints.tensor_sources import CheckpointError, FileSource
from molmo_edge.cli import main
from molmo_edge.config import CLIP_MEAN, IMAGENET_MEAN, ConfigError, ImageConfig, VisionConfig
from molmo_edge.errors import MolmoEdgeError
from molmo_edge.export import ExportError
from molmo_edge.frontend.crops import ImageProcessor
from molmo_edge.frontend.tokenizer import MOLMOE_SPECIAL_IDS as MOLMOE
from molmo_edge.frontend.tokenizer import TokenizerError
from molmo_edge.modeling.weights import load_checkpoint
from molmo_edge.presets import PRESETS
from molmo_edge.training.pretrained_layouts import BaseError, base_recipes
from molmo_edge.training.starting_checkpoint import build_base, molmo_tokenizer, window_variant


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> tuple[Path, dict[str, torch.Tensor]]:
    directory = tmp_path_factory.mktemp("towers") / "clip"
    return directory, write_clip(directory)


# ---- what the bases compute ----


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_decoder_computes_what_its_base_computes(kind, tmp_path, clip):
    tensors = write_decoder(tmp_path / "lm", kind)
    config = build_base(tmp_path / "lm", clip[0], tmp_path / "out", preset=golden(kind), precision="fp32")
    assert config == golden(kind)
    model, _, loaded = load_checkpoint(tmp_path / "out")
    assert loaded == config
    ids = torch.arange(3, 500, 31)
    expected = decoder_logits(ids, tensors, config.decoder, kind)
    logits = model.decoder.logits(model.decoder(model.decoder.embed(ids[None])))[0]
    assert expected.std() > 0.5
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_clip_gives_the_features_of_its_third_and_tenth_layer_from_the_end(tmp_path, clip):
    write_decoder(tmp_path / "lm", "qwen2")
    build_base(tmp_path / "lm", clip[0], tmp_path / "out", preset=golden("qwen2"), precision="fp32")
    model, _, config = load_checkpoint(tmp_path / "out")
    image = torch.randn(3, 336, 336, generator=torch.Generator().manual_seed(3))
    states = clip_states(image, clip[1], 11)
    expected = torch.cat([states[-3], states[-10]], dim=-1)
    torch.testing.assert_close(model.vision(as_patches(image))[0], expected, atol=1e-4, rtol=1e-4)
    assert config.vision.n_layers == 10


@torch.no_grad()
def test_dino_on_another_grid(tmp_path):
    write_decoder(tmp_path / "lm", "qwen2")
    tensors = write_dino(tmp_path / "dino", side=37)
    small = golden("qwen2")
    small = replace(small, image=replace(small.image, resize="dino", mean=IMAGENET_MEAN), vision=DINO)
    build_base(tmp_path / "lm", tmp_path / "dino", tmp_path / "out", preset=small, precision="fp32")
    model, _, _ = load_checkpoint(tmp_path / "out")
    image = torch.randn(3, 336, 336, generator=torch.Generator().manual_seed(4))
    states = dino_states(image, tensors, resampled(tensors["embeddings.position_embeddings"][0], 24))
    expected = torch.cat([states[-3], states[-9]], dim=-1)
    torch.testing.assert_close(model.vision(as_patches(image))[0], expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_another_window(tmp_path, clip):
    write_decoder(tmp_path / "lm", "qwen2")
    wish = {"preset": golden("qwen2"), "precision": "fp32", "crop_size": 252, "overlap": 0.3}
    build_base(tmp_path / "lm", clip[0], tmp_path / "out", **wish)
    model, _, config = load_checkpoint(tmp_path / "out")
    assert config.image.patches == 18
    assert config.image.overlap_margins == (2, 4)  # 5.4 patches would be 30 %
    image = torch.randn(3, 252, 252, generator=torch.Generator().manual_seed(5))
    grid = resampled(clip[1]["vision_model.embeddings.position_embedding.weight"], 18)
    states = clip_states(image, clip[1], 11, grid)
    expected = torch.cat([states[-3], states[-10]], dim=-1)
    torch.testing.assert_close(model.vision(as_patches(image))[0], expected, atol=1e-4, rtol=1e-4)


def test_windows_of_504_pixels_tile_the_canvas():
    config = window_variant(PRESETS["molmoe-1b"])
    assert config.image.overlap_margins == (4, 6)
    assert config.vision.n_pos == 36**2 + 1
    assert replace(config, image=ImageConfig(), vision=VisionConfig()) == PRESETS["molmoe-1b"]
    prepared = ImageProcessor(config.image)(np.zeros((700, 1100, 3), np.uint8))
    placed = prepared.token_index[prepared.token_index >= 0]
    assert len(set(placed.tolist())) == len(placed) == (prepared.tokens == MOLMOE.im_patch).sum()
    assert window_variant(PRESETS["molmoe-1b"], 336, 1 / 3) == PRESETS["molmoe-1b"]
    assert window_variant(config, 504, 0).image.overlap_margins == (0, 0)
    for size, overlap in ((500, 0.3), (0, 0.3), (504, 1.0), (504, -0.1)):
        with pytest.raises(ConfigError, match=r"crop_size must be a multiple of 28|overlap is a share"):
            window_variant(config, size, overlap)


# ---- what is random, and what is kept ----


def test_the_rest_is_random_as_in_the_reference(tmp_path, clip):
    write_decoder(tmp_path / "lm", "olmoe", rows=505)
    base_rows = randomly(decoder_shapes(golden("olmoe").decoder, "olmoe", 505))
    outs = []
    for k, seed in enumerate((0, 0, 1)):
        out = tmp_path / f"out{k}"
        build_base(tmp_path / "lm", clip[0], out, preset=golden("olmoe"), precision="fp32", seed=seed)
        outs.append(stored(out))
    one, again, other = outs
    assert one.keys() == hub_shapes(golden("olmoe")).keys()
    assert all(torch.equal(one[name], again[name]) for name in one)
    differ = {name for name in one if not torch.equal(one[name], other[name])}
    connector = "model.vision_backbone.image_"
    matrices = {name for name in one if name.startswith(f"{connector}p") and name.endswith("weight")}
    tables = {"model.transformer.wte.embedding", "lm_head.weight"}
    assert differ == matrices | tables | {"model.transformer.wte.new_embedding"}
    for name in differ - tables:
        assert float(one[name].std()) == pytest.approx(0.02, rel=0.15), name
        assert abs(float(one[name].mean())) < 0.002, name
    zeros = [
        name for name in one if name.endswith("pad_embed") or (name.startswith(f"{connector}p") and "bias" in name)
    ]
    assert len(zeros) == 5
    assert not any(one[name].any() for name in zeros)
    for name, theirs in (("model.transformer.wte.embedding", "model.embed_tokens.weight"), ("lm_head.weight",) * 2):
        assert torch.equal(one[name][:505], base_rows[theirs])
        assert float(one[name][505:].std()) == pytest.approx(0.02, rel=0.2)


def test_bfloat16_rounds_once_and_keeps_what_is_bfloat16(tmp_path, clip):
    tensors = write_decoder(tmp_path / "lm", "qwen2", dtype=torch.bfloat16)
    build_base(tmp_path / "lm", clip[0], tmp_path / "out", preset=golden("qwen2"))
    made = stored(tmp_path / "out")
    assert {t.dtype for t in made.values()} == {torch.bfloat16}
    assert torch.equal(made["model.transformer.wte.embedding"], tensors["model.embed_tokens.weight"])
    kernel = clip[1]["vision_model.embeddings.patch_embedding.weight"].permute(0, 2, 3, 1).flatten(1)
    assert torch.equal(made["model.vision_backbone.image_vit.patch_embedding.weight"], kernel.bfloat16())


def test_each_tensor_is_read_once_and_written_into_shards(tmp_path, clip, monkeypatch):
    tensors = write_decoder(tmp_path / "lm", "olmo_1124")
    reads = Counter()
    raw = FileSource.raw
    monkeypatch.setattr(FileSource, "raw", lambda self, name: reads.update([name]) or raw(self, name))
    build_base(tmp_path / "lm", clip[0], tmp_path / "out", preset=golden("olmo_1124"), shard_bytes=100_000)
    assert set(reads.values()) == {1}
    last = {name for name in clip[1] if ".layers.10." in name or "post_layernorm" in name}
    assert set(reads) == (tensors.keys() | clip[1].keys()) - last
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    load_checkpoint(tmp_path / "out")


@torch.no_grad()
def test_a_tied_base_is_tied_by_auto_and_copied_for_a_preset(tmp_path, clip):
    tensors = write_decoder(tmp_path / "lm", "qwen2", tie_word_embeddings=True)
    expected = decoder_logits(torch.arange(9), tensors, golden("qwen2").decoder, "qwen2")
    for preset, tied in (("auto", True), (golden("qwen2"), False)):
        out = tmp_path / ("tied" if tied else "copied")
        build_base(tmp_path / "lm", clip[0], out, preset=preset, precision="fp32")
        model, _, config = load_checkpoint(out)
        assert config.decoder.weight_tying == tied
        logits = model.decoder.logits(model.decoder(model.decoder.embed(torch.arange(9)[None])))[0]
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_auto_on_the_command_line(tmp_path, clip, capsys):
    write_decoder(tmp_path / "lm", "olmoe")
    wish = {"--decoder": tmp_path / "lm", "--tower": clip[0], "--out": tmp_path / "out", "--preset": "auto"}
    arguments = ["train", "start", *(str(a) for pair in wish.items() for a in pair), "--precision", "fp32"]
    with pytest.raises(SystemExit, match=r"^0$"):
        main(arguments)
    _, tokenizer, config = load_checkpoint(tmp_path / "out")
    ours = golden("olmoe")
    assert config.vision == ours.vision
    assert config.image == ours.image
    new = replace(ours.decoder, vocab_size=512, additional_vocab_size=128, max_position_embeddings=4096)
    assert config.decoder == new
    assert tokenizer.special.im_start == 512
    with pytest.raises(SystemExit, match=r"^1$"):
        main(arguments)
    assert "out exists already" in capsys.readouterr().err


def test_a_preset_takes_the_other_tower(tmp_path, monkeypatch):
    write_decoder(tmp_path / "lm", "qwen2")
    write_dino(tmp_path / "dino", side=24)
    monkeypatch.setitem(PRESETS, "tiny", golden("qwen2"))
    config = build_base(tmp_path / "lm", tmp_path / "dino", tmp_path / "out", preset="tiny")
    assert config.vision == DINO
    assert config.image.resize == "dino"
    assert config.image.mean == IMAGENET_MEAN != CLIP_MEAN


# ---- the published sizes ----


class Published:
    """Names and shapes of a base, without values."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self.shapes = shapes

    def names(self) -> list[str]:
        return list(self.shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]


PUBLIC = {
    "molmoe-1b": ("olmoe", 50304),
    "molmo-7b-d": ("qwen2", 152064),
    "molmo-7b-o": ("olmo_1124", 100352),
    "molmo-72b": ("qwen2", 152064),
}


@pytest.mark.parametrize("preset", PUBLIC)
def test_every_tensor_of_a_public_molmo_has_a_recipe(preset):
    config, (kind, rows) = PRESETS[preset], PUBLIC[preset]
    decoder = Published(decoder_shapes(config.decoder, kind, rows))
    tower = Published(clip_shapes(config.vision, 24, 577))
    recipes = base_recipes(config, decoder, tower, tied=False)
    shapes = hub_shapes(config)
    random = [name for name in shapes if name not in recipes]
    assert not recipes.keys() - shapes.keys()
    assert len(random) == 13  # four linear layers with biases, three without, pad_embed, new_embedding
    for source in (decoder, tower):
        used = {part: shape for r in recipes.values() if r.base is source for part, shape in r.parts}
        assert used == {part: source.shape(part) for part in used}
        left = set(source.names()) - used.keys()
        assert all(".layers.23." in name or "post_layernorm" in name for name in left)
    whole = sum(int(np.prod(shapes[name])) for name in recipes)
    assert whole == sum(int(np.prod(shape)) for r in recipes.values() for _, shape in r.parts)  # nothing is padded


# ---- the tokenizer ----


def test_the_tokenizer_gets_what_the_references_gets(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(base_tokenizer()))
    for name in KINDS.values():
        decoder = read_config(GOLDEN / name).decoder
        theirs = json.loads((GOLDEN / name / "tokenizer.json").read_text(encoding="utf-8"))
        assert json.loads(molmo_tokenizer(path, decoder))["added_tokens"] == theirs["added_tokens"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["added_tokens"].append(t["added_tokens"][0] | {"id": 600}), "begin at 500"),
        (
            lambda t: t["added_tokens"].append({**t["added_tokens"][0], "id": 499, "content": "<im_col>"}),
            "skips ids",
        ),
        (lambda t: t.pop("model"), "is damaged"),
    ],
)
def test_tokenizers_that_will_not_do(tmp_path, change, message):
    definition = base_tokenizer()
    change(definition)
    path = tmp_path / "tokenizer.json"
    with pytest.raises(TokenizerError, match="cannot be read"):
        molmo_tokenizer(path, golden("olmoe").decoder)
    path.write_text(json.dumps(definition))
    with pytest.raises(TokenizerError, match=message):
        molmo_tokenizer(path, golden("olmoe").decoder)


# ---- what must not pass ----


def changed(directory: Path, change) -> None:
    """Rewrite one of the shards."""
    file = directory / "model-00001-of-00002.safetensors"
    with safe_open(file, "pt") as shard:
        tensors = {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
    change(tensors)
    save_file(tensors, file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.embed_tokens.weight"), "has 0 tensors called embed_tokens.weight"),
        (lambda t: t.pop("lm_head.weight"), "lm has no tensor lm_head.weight"),
        (lambda t: t.update({"lm_head.weight": torch.ones(512, 31)}), r"00001.*lm_head.weight has shape \[512, 31\]"),
        (lambda t: t.update({"lm_head.weight": torch.ones(513, 32)}), r"lm_head.weight has 513 rows"),
        (
            lambda t: t.update({"model.layers.2.x": torch.ones(1)}),
            "model.layers.2.x is not a parameter of a Molmo",
        ),
    ],
)
def test_tensors_that_are_not_those(tmp_path, clip, change, message):
    write_decoder(tmp_path / "lm", "qwen2")
    changed(tmp_path / "lm", change)
    with pytest.raises(CheckpointError, match=message):
        build_base(tmp_path / "lm", clip[0], tmp_path / "out", preset=golden("qwen2"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["lm"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rope_theta": 10000.0}, r"rope_theta 10000.0 instead of 1000000.0"),
        ({"rms_norm_eps": 1e-5}, "norm_eps"),
        ({"num_key_value_heads": 4}, "n_kv_heads 4"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type"),
        ({"head_dim": 16}, "head_dim 16"),
        ({"model_type": "llama"}, '"llama" is not a supported decoder'),
    ],
)
def test_a_base_that_computes_otherwise(tmp_path, clip, wrong, message):
    write_decoder(tmp_path / "lm", "qwen2", **wrong)
    with pytest.raises(BaseError, match=message):
        build_base(tmp_path / "lm", clip[0], tmp_path / "out", preset=golden("qwen2"))


def test_wishes_that_cannot_be_met(tmp_path, clip, monkeypatch):
    write_decoder(tmp_path / "lm", "qwen2")

    def build(lm=tmp_path / "lm", tower=clip[0], **wish):
        return build_base(lm, tower, tmp_path / "out", **{"preset": golden("qwen2"), **wish})

    with pytest.raises(ConfigError, match=r'"molmo" is not a known preset \(known: molmoe-1b'):
        build(preset="molmo")
    with pytest.raises(BaseError, match=r'does not match the preset "molmo-7b-d": it has d_model 32'):
        build(preset="molmo-7b-d")
    with pytest.raises(ExportError, match="int4"):
        build(precision="int4")
    with pytest.raises(BaseError, match="cannot be read"):
        build(lm=tmp_path / "nowhere")
    write_clip(tmp_path / "short", n_layers=9)
    with pytest.raises(BaseError, match="n_layers 9"):
        build(tower=tmp_path / "short")
    tied = golden("qwen2")
    with pytest.raises(BaseError, match="weight_tying False"):
        build(preset=replace(tied, decoder=replace(tied.decoder, weight_tying=True)))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=200_000_000))
    with pytest.raises(ExportError, match=r"needs about \d+ MB, .* only 200 MB free"):
        build()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "content"), [("pytorch_model.bin", b"no zip"), ("model.safetensors", b"short")])
def test_damaged_files(tmp_path, clip, name, content):
    write_decoder(tmp_path / "lm", "qwen2")
    shutil.copytree(clip[0], tmp_path / "clip")
    (tmp_path / "clip" / name).write_bytes(content)
    with pytest.raises(MolmoEdgeError, match="download it again"):
        build_base(tmp_path / "lm", tmp_path / "clip", tmp_path / "out", preset=golden("qwen2"))


def test_integers_in_safetensors_are_passed_over(tmp_path, clip):
    write_decoder(tmp_path / "lm", "qwen2")
    shutil.copytree(clip[0], tmp_path / "clip")
    (tmp_path / "clip" / "pytorch_model.bin").unlink()
    ids = torch.arange(577)[None]
    save_file(clip[1] | {"vision_model.embeddings.position_ids": ids}, tmp_path / "clip" / "model.safetensors")
    for tower in (clip[0], tmp_path / "clip"):
        build_base(tmp_path / "lm", tower, tmp_path / f"out-{tower.parent.name}", preset=golden("qwen2"))
    one, other = (stored(out) for out in sorted(tmp_path.glob("out-*")))
    assert all(torch.equal(one[name], other[name]) for name in one)
