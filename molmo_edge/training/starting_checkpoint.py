"""The checkpoint that stage 1 starts from: a pretrained language model, a pretrained tower and a random connector.

The result is that of Ai2's scripts/convert_hf_to_molmo.py and olmo/model.py::Molmo.reset_with_pretrained_weights, built
tensor by tensor, in hub layout. With the reference's defaults these weights are random:

- The connector's matrices and `new_embedding` are Normal(0, 0.02), not truncated; its biases and `pad_embed` are zeros.
- Rows of the embedding that a base lacks are Normal(0, 0.02). The public Molmos have none: the special ids of MolmoE
  and 7B-O use rows that pad their base's embedding.

    molmo-edge train start --decoder allenai/OLMoE-1B-7B-0924@fp32 --tower openai/clip-vit-large-patch14-336 \\
        --preset molmoe-1b --out molmoe-start
"""

from __future__ import annotations

import json
import math
import zlib
from dataclasses import fields, replace
from pathlib import Path

import numpy as np

from molmo_edge.checkpoints.hub import fetch_model
from molmo_edge.checkpoints.hub_config import write_hub_config
from molmo_edge.checkpoints.manifest import TOKENIZER
from molmo_edge.checkpoints.safetensors_files import ShardWriter
from molmo_edge.checkpoints.tensor_names import Shape, hub_shapes
from molmo_edge.checkpoints.tensor_sources import DTYPES, CheckpointError, TensorSource, widen
from molmo_edge.config import (
    CLIP_MEAN,
    CLIP_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    ConfigError,
    DecoderConfig,
    ImageConfig,
    MolmoConfig,
    VisionConfig,
)
from molmo_edge.export.precisions import SAFETENSORS_PRECISIONS
from molmo_edge.export.safetensors_checkpoint import (
    SHARD_BYTES,
    check_checkpoint_options,
    round_to_bfloat16,
)
from molmo_edge.export.staging import publish, staged
from molmo_edge.frontend.tokenizer import Tokenizer, TokenizerError
from molmo_edge.presets import PRESETS
from molmo_edge.training.pretrained_layouts import (
    CLIP_LAYERS,
    DINO_LAYERS,
    BaseError,
    Recipe,
    base_recipes,
    is_left_out,
    open_base,
    read_decoder,
    read_tower,
)

IMAGE_TOKENS = ("<im_start>", "<im_end>", "<im_patch>", "<im_col>", "<|image|>")  # in the order of their ids
AUTO = "auto"  # a preset: the configuration of the bases' config.json files
_STD = 0.02  # initializer_range, new_embedding_init_range and init_std of the reference


def build_base(
    decoder: str | Path,
    tower: str | Path,
    out: str | Path,
    *,
    preset: str | MolmoConfig,
    precision: str = "bf16",
    seed: int = 0,
    crop_size: int | None = None,
    overlap: float | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> MolmoConfig:
    """Write the starting checkpoint to `out`, in hub layout. `out` must not exist, and is written atomically.

    decoder, tower: directories, or hub ids (`owner/name` or `owner/name@revision`). preset: a name in PRESETS, "auto"
    for any supported decoder and tower, or a configuration. precision: "bf16" or "fp32". crop_size, in pixels, and
    overlap: as in `window_variant`. Equal seeds give equal files.

    Memory holds one tensor. Raises ExportError for invalid arguments or a full disk, HubError, ConfigError or
    TokenizerError, BaseError for a base that does not match the configuration, and CheckpointError for incomplete
    weights, all before any weight is read.
    """
    out = Path(out)
    check_checkpoint_options(out, precision)
    dtype = SAFETENSORS_PRECISIONS[precision]
    decoder, tower = _directory(decoder), _directory(tower)
    config, tied = _choose(preset, decoder, tower)
    if crop_size is not None or overlap is not None:
        crop_size = config.image.crop_size if crop_size is None else crop_size
        config = window_variant(config, crop_size, _share(config) if overlap is None else overlap)
    tokenizer = molmo_tokenizer(decoder / TOKENIZER, config.decoder)
    plan = plan_base(config, decoder, tower, tied=tied)
    weights = sum(math.prod(shape) for shape in hub_shapes(config).values())
    with staged(out, weights * DTYPES[dtype].itemsize) as scratch:
        staging = scratch / "checkpoint"
        staging.mkdir()
        with ShardWriter(staging, hub_shapes(config), dtype, shard_bytes) as writer:
            for name, shape in hub_shapes(config).items():
                writer.write(name, _made(plan[name], name, shape, dtype, seed))
        write_hub_config(config, staging, Tokenizer(tokenizer).special)
        (staging / TOKENIZER).write_text(tokenizer, encoding="utf-8")
        publish(staging, out)
    return config


def _directory(base: str | Path) -> Path:
    if Path(base).is_dir() or isinstance(base, Path):
        return Path(base)
    hub_id, _, revision = base.partition("@")
    return fetch_model(hub_id, revision or None)


def _choose(preset: str | MolmoConfig, decoder: Path, tower: Path) -> tuple[MolmoConfig, bool]:
    """The Molmo's configuration, checked against its bases, and whether the decoder's base ties its head."""
    text, eyes = read_decoder(decoder), read_tower(tower)
    if isinstance(preset, MolmoConfig):
        config = preset
    elif preset == AUTO:
        config = _with_tower(ImageConfig(), eyes, text, text.ffn_dim)
    elif preset in PRESETS:
        config = PRESETS[preset]
        if config.vision.image_model_type != eyes.image_model_type:
            config = _with_tower(config.image, eyes, config.decoder, config.projector_dim)
    else:
        raise ConfigError(f'"{preset}" is not a known preset (known: {", ".join((*PRESETS, AUTO))})')
    asked = f'the preset "{preset}"' if isinstance(preset, str) else "this configuration"
    _check_base(config.decoder, text, decoder, asked)
    _check_base(config.vision, eyes, tower, asked)
    return config, text.weight_tying


# A Molmo may differ from its bases in these: rows are added, layers dropped, positions resampled, the head copied.
_ITS_OWN = ("vocab_size", "embedding_size", "additional_vocab_size", "weight_tying", "max_position_embeddings")
_ITS_OWN_TOWER = ("n_layers", "n_pos", "layers")


def _check_base(
    ours: DecoderConfig | VisionConfig, theirs: DecoderConfig | VisionConfig, directory: Path, asked: str
) -> None:
    """Raise BaseError if a base differs from the requested Molmo in what it computes, even if the shapes match."""
    free = _ITS_OWN if isinstance(ours, DecoderConfig) else _ITS_OWN_TOWER
    differ = {
        f.name: (getattr(theirs, f.name), getattr(ours, f.name))
        for f in fields(ours)
        if f.name not in free and getattr(theirs, f.name) != getattr(ours, f.name)
    }
    if isinstance(ours, VisionConfig) and ours.n_layers > theirs.n_layers:
        differ["n_layers"] = (theirs.n_layers, ours.n_layers)
    if isinstance(ours, DecoderConfig) and ours.weight_tying and not getattr(theirs, "weight_tying", False):
        differ["weight_tying"] = (False, True)
    if differ:
        told = ", ".join(f"{name} {a} instead of {b}" for name, (a, b) in differ.items())
        raise BaseError(f"{directory} does not match {asked}: it has {told}")


def _with_tower(image: ImageConfig, tower: VisionConfig, decoder: DecoderConfig, projector_dim: int) -> MolmoConfig:
    """With a tower as Ai2 uses it: CLIP without its last layer, DINOv2 with all layers and its resizing."""
    image = replace(image, patch_size=tower.patch_size)
    if tower.image_model_type == "dino":
        image = replace(image, resize="dino", mean=IMAGENET_MEAN, std=IMAGENET_STD)
        layers, n_layers = DINO_LAYERS, tower.n_layers
    else:
        image = replace(image, resize="default", mean=CLIP_MEAN, std=CLIP_STD)
        layers, n_layers = CLIP_LAYERS, tower.n_layers - 1
    vision = replace(tower, n_pos=image.patches**2 + 1, n_layers=n_layers, layers=layers)
    return MolmoConfig(image=image, vision=vision, decoder=decoder, projector_dim=projector_dim)


def _share(config: MolmoConfig) -> float:
    return sum(config.image.overlap_margins) / config.image.patches


def window_variant(config: MolmoConfig, crop_size: int = 504, overlap: float = 0.30) -> MolmoConfig:
    """`config` with crops of `crop_size` pixels that overlap by about the share `overlap` of a side.

    The margins are whole pooled cells: 30 % of 504 pixels are 10.8 of 36 patches, so 10 patches overlap, 4 dropped on
    one side and 6 on the other. Molmo uses 336 pixels and 1/3. Raises ConfigError.
    """
    if not 0 <= overlap < 1:
        raise ConfigError(f"overlap is a share of a crop's side, at least 0 and less than 1, not {overlap}")
    if crop_size <= 0 or crop_size % (config.image.patch_size * config.image.pool):
        cell = config.image.patch_size * config.image.pool
        below = max(crop_size // cell, 1) * cell
        raise ConfigError(
            f"crop_size must be a multiple of {cell} pixels, such as {below} or {below + cell}, not {crop_size}"
        )
    pool = config.image.pool
    cells = round(overlap * (crop_size // config.image.patch_size) / pool)
    margins = (pool * (cells // 2), pool * (cells - cells // 2))
    image = replace(config.image, crop_size=crop_size, overlap_margins=margins)
    return replace(config, image=image, vision=replace(config.vision, n_pos=image.patches**2 + 1))


def plan_base(config: MolmoConfig, decoder: Path, tower: Path, *, tied: bool = False) -> dict[str, Recipe]:
    """Hub name -> recipe, for every tensor of the Molmo. Only headers are read.

    Raises CheckpointError with the file and the tensor if a tensor is missing, has another shape than the
    configuration requires, or is not a parameter of a Molmo and not known to be unused.
    """
    sources = [(decoder, open_base(decoder)), (tower, open_base(tower))]
    plan = base_recipes(config, sources[0][1], sources[1][1], tied=tied)
    shapes = hub_shapes(config)
    plan |= {name: _random(name) for name in shapes.keys() - plan.keys()}
    if beyond := plan.keys() - shapes.keys():
        raise ValueError(f"no Molmo has {', '.join(sorted(beyond))}")
    for where, base in sources:
        parts = {part: shape for recipe in plan.values() if recipe.base is base for part, shape in recipe.parts}
        _check_parts(where, base, parts)
        for name in base.names():
            if name not in parts and not is_left_out(name, config.vision, tied=tied):
                raise CheckpointError(
                    f"{base.file(name)}: tensor {name} is not a parameter of a Molmo and would be lost"
                )
    for name, recipe in plan.items():
        rows = sum(shape[0] for _, shape in recipe.parts)
        if recipe.change is None and recipe.std is None and rows != shapes[name][0]:
            raise ValueError(f"the parts of {name} have {rows} rows, but it has {shapes[name][0]}")
    return plan


def _check_parts(where: Path, base: TensorSource, parts: dict[str, Shape]) -> None:
    known = set(base.names())
    for part, expected in parts.items():
        if part not in known:
            raise CheckpointError(f"{where} has no tensor {part}: the download may be incomplete")
        if base.shape(part) != expected:
            raise CheckpointError(
                f"{base.file(part)}: tensor {part} has shape {list(base.shape(part))}, "
                f"but the configuration requires {list(expected)}"
            )


# Tensors without a base that are not Normal(0, 0.02).
_ZEROS = ("pad_embed", "bias")


def _random(name: str) -> Recipe:
    known = ("model.vision_backbone.image_p", "model.vision_backbone.pad_embed", "model.transformer.wte.new_embedding")
    if not name.startswith(known):
        raise ValueError(f"no base gives {name}, and it is not random")
    return Recipe(std=0.0 if name.endswith(_ZEROS) else _STD)


def _made(recipe: Recipe, name: str, shape: Shape, dtype: str, seed: int) -> np.ndarray:
    made: np.ndarray = np.empty(shape, DTYPES[dtype])
    row = 0
    for part, _ in recipe.parts:
        assert recipe.base is not None
        values = _part(recipe.base, part, recipe, dtype)
        made[row : row + len(values)] = values
        row += len(values)
    if row < len(made) and recipe.std is not None:
        # Seeded by name, so that a tensor's values do not depend on other tensors.
        random = np.random.default_rng([seed, zlib.crc32(name.encode())])
        rest = random.standard_normal((len(made) - row, *shape[1:]), np.float32) * np.float32(recipe.std)
        made[row:] = rest if dtype == "F32" else round_to_bfloat16(rest)
    return made


def _part(base: TensorSource, name: str, recipe: Recipe, dtype: str) -> np.ndarray:
    raw, stored = base.raw(name), base.dtype(name)
    if stored == dtype and recipe.change is None:
        return raw
    values = widen(raw, stored)
    if recipe.change is not None:
        values = recipe.change(values)
    return values if dtype == "F32" else round_to_bfloat16(values)


def molmo_tokenizer(path: Path, decoder: DecoderConfig) -> str:
    """A base's tokenizer.json with Molmo's five special tokens at the ids from `decoder.vocab_size` on.

    If the base has fewer tokens, as Qwen2 does, |<EXTRA_TOKENS_n>| fill the ids between (olmo/tokenizer.py::
    build_tokenizer). Raises TokenizerError.
    """
    try:
        definition = json.loads(path.read_text(encoding="utf-8"))
        vocabulary, added = definition["model"]["vocab"], definition["added_tokens"]
        known = {**vocabulary, **{entry["content"]: entry["id"] for entry in added}}
        end = 1 + max(known.values())
    except OSError as error:
        raise TokenizerError(f"{path}, the decoder's tokenizer, cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise TokenizerError(f"{path} is damaged, or is not the tokenizer of a supported decoder") from None
    first = decoder.vocab_size
    if end > first:
        raise TokenizerError(f"{path} has the id {end - 1}, but Molmo's special ids begin at {first}")
    if first + len(IMAGE_TOKENS) > decoder.embedding_size + decoder.additional_vocab_size:
        raise TokenizerError(f"ids from {first} to {first + len(IMAGE_TOKENS) - 1} are beyond the decoder's embeddings")
    names = [*(f"|<EXTRA_TOKENS_{n}>|" for n in range(first - end)), *IMAGE_TOKENS]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added.extend({"id": end + n, "content": name, **flags, "special": True} for n, name in enumerate(names))
    text = json.dumps(definition, ensure_ascii=False) + "\n"
    tokenizer = Tokenizer(text, name=str(path))
    if [tokenizer.token(first + n) for n in range(len(IMAGE_TOKENS))] != list(IMAGE_TOKENS):
        raise TokenizerError(f"{path} skips ids, or already uses one of {', '.join(IMAGE_TOKENS)}")
    return text
