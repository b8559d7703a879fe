"""The PyTorch model against the reference's own numbers (tests/golden) for all three architectures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from molmo_edge.checkpoints.hub_config import from_hub_config, read_config, to_hub_config
from molmo_edge.checkpoints.tensor_sources import CheckpointError
from molmo_edge.config import ImageConfig, MolmoConfig, VisionConfig
from molmo_edge.frontend.crops import ImageProcessor, load_image
from molmo_edge.frontend.prompts import build_prompt
from molmo_edge.modeling import KVCache, Molmo, load_checkpoint, save_checkpoint

GOLDEN = Path(__file__).parent / "golden"
ARCHITECTURES = ("molmoe", "qwen", "olmo")
CASES = ("square", "landscape", "wide_text")


@pytest.fixture(scope="module", params=ARCHITECTURES)
def golden(request: pytest.FixtureRequest) -> Any:
    """(model, tokenizer, config, expected tensors, expected json) of one architecture."""
    directory = GOLDEN / request.param
    model, tokenizer, config = load_checkpoint(directory)
    expected = {k: torch.from_numpy(v) for k, v in load_file(directory / "expected.safetensors").items()}
    return model, tokenizer, config, expected, json.loads((directory / "expected.json").read_text())


def prepared(golden: Any, case: str) -> tuple[torch.Tensor, ...]:
    """ids [1, n], crops, masks, token_index of a golden case, made by our own front end."""
    _, tokenizer, config, _, cases = golden
    image = ImageProcessor(config.image, tokenizer.special)(load_image(GOLDEN / cases[case]["image"]))
    text = tokenizer.encode(build_prompt(cases[case]["question"]))
    ids = torch.tensor([[tokenizer.special.bos, *image.tokens.tolist(), *text]])
    index = np.where(image.token_index >= 0, image.token_index + 1, -1)
    arrays = (torch.from_numpy(a)[None] for a in (image.crops, image.masks, index))
    return (ids, *arrays)


def assert_close(ours: torch.Tensor, reference: torch.Tensor, tolerance: float = 1e-4) -> None:
    """`tolerance` is relative to the largest reference value, as the golden README states it."""
    worst = (ours - reference).abs().max().item() / reference.abs().max().item()
    assert worst <= tolerance, f"relative error {worst:.2e}"


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_features_and_logits_equal_the_reference(golden: Any, case: str) -> None:
    model, _, _, expected, _ = golden
    ids, crops, masks, index = prepared(golden, case)
    assert torch.equal(ids[0], expected[f"{case}.input_ids"].long())
    features = model.vision(crops[0])
    assert_close(features[:, ::29], expected[f"{case}.vit_features_sample"])
    cells = model.connector(features, masks[0])
    assert_close(cells, expected[f"{case}.image_features"])
    seen: list[torch.Tensor] = []
    handle = model.decoder.blocks[-1].register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    logits = model.decoder.logits(model(ids, crops, masks, index))[0]
    handle.remove()
    assert_close(seen[0][0, ::8], expected[f"{case}.hidden_before_last_block"])
    assert_close(logits[::16], expected[f"{case}.logits_every_16th"])
    assert_close(logits[-1], expected[f"{case}.last_logits"])


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_greedy_ids_through_the_cache_equal_the_reference(golden: Any, case: str) -> None:
    model, _, config, _, cases = golden
    ids, crops, masks, index = prepared(golden, case)
    x = model.embed(ids, model.encode_image(crops[0], masks[0])[None], index)
    cache = KVCache.empty(config.decoder, 1, x.shape[1] + 24, like=x)
    generated: list[int] = []
    for _ in range(24):
        logits = model.decoder.logits(model.decoder(x, cache=cache)[:, -1])
        generated.append(int(logits[0, :500].argmax()))  # the golden argmax is over the 500 real ids
        x = model.embed(torch.tensor([[generated[-1]]]))
    assert generated == cases[case]["generated_ids"]


@torch.no_grad()
def test_cached_equals_uncached(golden: Any) -> None:
    """Prefilled in three uneven pieces, the last of one token: the same hidden states as in one go."""
    model, _, config, _, _ = golden
    ids, crops, masks, index = prepared(golden, "wide_text")
    x = model.embed(ids, model.encode_image(crops[0], masks[0])[None], index)
    whole = model.decoder(x)
    cache = KVCache.empty(config.decoder, 1, x.shape[1], like=x)
    pieces = [model.decoder(part, cache=cache) for part in x.split([200, x.shape[1] - 201, 1], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=0, atol=2e-5)
    assert cache.length == x.shape[1]


def test_a_saved_checkpoint_loads_back(tmp_path: Path) -> None:
    model, _, config = load_checkpoint(GOLDEN / "molmoe")
    save_checkpoint(model, GOLDEN / "molmoe" / "tokenizer.json", tmp_path)
    again, _, config_again = load_checkpoint(tmp_path)
    assert config_again == config
    for (name, ours), (_, theirs) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_dino_layout_and_configuration_survive_saving(tmp_path: Path) -> None:
    config = read_config(GOLDEN / "molmoe")
    vision = VisionConfig(
        "dino", d_model=32, n_layers=3, n_heads=4, mlp_dim=64, n_pos=17, activation="gelu", layers=(-1, -2)
    )
    image = ImageConfig(crop_size=56, overlap_margins=(0, 0), resize="dino", max_crops=4)
    config = MolmoConfig(image, vision, config.decoder, projector_dim=24)
    assert from_hub_config(*to_hub_config(config)) == config
    model = Molmo(config).init_weights(generator=torch.Generator().manual_seed(0)).eval()
    save_checkpoint(model, GOLDEN / "molmoe" / "tokenizer.json", tmp_path)
    again, _, _ = load_checkpoint(tmp_path)
    crops = torch.rand(2, 16, 588)
    with torch.no_grad():
        assert torch.equal(model.vision(crops), again.vision(crops))


def test_a_wrong_shape_is_named(tmp_path: Path) -> None:
    model, _, _ = load_checkpoint(GOLDEN / "molmoe")
    save_checkpoint(model, GOLDEN / "molmoe" / "tokenizer.json", tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"image_projector_dim": 20}))
    with pytest.raises(CheckpointError, match=r"image_projector\.w1\.weight has shape \[16, 32\].*\[20, 32\]"):
        load_checkpoint(tmp_path)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    model, _, _ = load_checkpoint(GOLDEN / "molmoe")
    save_checkpoint(model, GOLDEN / "molmoe" / "tokenizer.json", tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"n_layers": 3}))
    with pytest.raises(CheckpointError, match=r"no tensor model\.transformer\.blocks\.2\."):
        load_checkpoint(tmp_path)
