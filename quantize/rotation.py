"""Rotate the hidden channels of a model by orthogonal matrices, without a change of its outputs (QuaRot's R1 and R2).

Quantization loses most where a few channels are much larger than the others. An RMSNorm without gain commutes with any
rotation of its input, so the residual stream can be rotated as a whole: the gains of the norms move into the matrices
after them, whatever writes to the stream writes rotated, and whatever reads it rotates back. Everything is folded into
the weights; the graphs and their speed stay the same.

- The decoder's residual stream: embeddings, connector, attention, FFN or experts, router, head and point head.
- The values of each attention head, which attention only averages: the rows of the values and the columns after them.
- The residual stream of a ViT, by a rotation that commutes with LayerNorm, and with it the features that connector and
  point head read. A ViT with a LayerNorm before its first block (CLIP) keeps its stream, because nothing after this
  norm could take the rotation without a matrix of its own.

References: QuaRot (arXiv 2404.00456), SliceGPT (arXiv 2401.15024).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np

from molmo_edge.checkpoints.tensor_names import (
    BACKBONE,
    TRANSFORMER,
    block_names,
    connector_name,
    head_name,
    matrices_after_norms,
    vit_names,
)
from molmo_edge.checkpoints.tensor_sources import Changed, TensorSource
from molmo_edge.config import MolmoConfig, VisionConfig
from molmo_edge.quantize import QuantizeError
from molmo_edge.quantize.orthogonal import Rotation, random_rotation

SEED = 0

_Get = Callable[[str], np.ndarray]
_Change = Callable[[np.ndarray], np.ndarray]
_Changes = dict[str, list[_Change]]  # hub name -> what happens to the tensor, in this order


def check_rotation(config: MolmoConfig) -> None:
    """Raise QuantizeError if the decoder's residual stream cannot be rotated."""
    if config.decoder.norm_after:
        raise QuantizeError(
            "this decoder has its norms after attention and FFN (OLMo), so their gains cannot be folded into the next "
            "matrices, which rotate needs: leave rotate out"
        )


def rotated(config: MolmoConfig, tensors: TensorSource, seed: int = SEED) -> tuple[MolmoConfig, TensorSource]:
    """Rotated weights that compute the same function, and their configuration.

    A head that is tied to the embeddings becomes a tensor of its own, since only the head takes the last norm's gain.
    Raises QuantizeError for a decoder with norms after its branches.
    """
    check_rotation(config)
    rng = np.random.default_rng(seed)
    changes: _Changes = {}
    _rotate_decoder(config, tensors.get, changes, rng)
    _rotate_vision(config, tensors.get, changes, rng)
    aliases: dict[str, str] = {}
    rotated_config = config
    if config.decoder.weight_tying:
        rotated_config = replace(config, decoder=replace(config.decoder, weight_tying=False))
        aliases[head_name(rotated_config)] = head_name(config)

    def change(name: str) -> np.ndarray:
        array = tensors.get(aliases.get(name, name))
        for step in changes.get(name, ()):
            array = step(array)
        return array

    return rotated_config, Changed(tensors, change, aliases)


def rotated_parts(config: MolmoConfig) -> tuple[str, ...]:
    """The components whose residual stream `rotated` rotates."""
    vision = any(not vit.parts.pre_ln for vit, _, _ in vit_names(config))
    return ("vision_encoder", "decoder") if vision else ("decoder",)


def _rotate_decoder(config: MolmoConfig, get: _Get, changes: _Changes, rng: np.random.Generator) -> None:
    d = config.decoder
    stream, values = random_rotation(d.d_model, rng), random_rotation(d.head_dim, rng)
    untied = replace(config, decoder=replace(d, weight_tying=False))
    for table in (f"{TRANSFORMER}.wte.embedding", f"{TRANSFORMER}.wte.new_embedding"):
        _add(changes, table, stream.apply)
    _add(changes, f"{connector_name(config)}.image_projector.w2.weight", partial(_rows, stream.apply))
    for layer in range(d.n_layers):
        names = block_names(config, layer)
        for gain, matrices in matrices_after_norms(config, layer).items():
            for matrix in matrices:
                _add(changes, matrix, partial(_scaled_columns, get, gain), stream.apply)
            _add(changes, gain, np.ones_like)
        start = d.q_dim + d.kv_dim
        _add(changes, f"{names.attention}.att_proj.weight", partial(_rows, values.apply_heads, start=start))
        _add(changes, f"{names.attention}.att_proj.bias", partial(_rows, values.apply_heads, start=start))
        _add(changes, f"{names.attention}.attn_out.weight", values.apply_heads, partial(_rows, stream.apply))
        experts = [f"{names.ffn}.experts.{e}.down_proj" for e in range(d.n_experts)]
        for matrix in experts or [f"{names.ffn}.ff_out"]:
            _add(changes, f"{matrix}.weight", partial(_rows, stream.apply))
    last = f"{TRANSFORMER}.ln_f.weight"
    for head in (head_name(untied), "lm_head.new_output_embeddings"):
        _add(changes, head, partial(_scaled_columns, get, last), stream.apply)
    _add(changes, last, np.ones_like)
    if config.point_head is not None:
        hub = "model.point_predictor"
        for query in ("patch_q", "patch_k", "subpatch_q", *(("vote_q",) if config.point_head.votes else ())):
            _add(changes, f"{hub}.{query}.weight", partial(_scaled_columns, get, f"{hub}.x_norm.weight"), stream.apply)
        _add(changes, f"{hub}.x_norm.weight", np.ones_like)
        _add(changes, f"{hub}.subpatch_loc_k.weight", stream.apply)  # it reads the stream without a norm
        for leaf in ("weight", "bias"):
            _add(changes, f"model.build_vit_embedding.{leaf}", partial(_rows, stream.apply))


def _rotate_vision(config: MolmoConfig, get: _Get, changes: _Changes, rng: np.random.Generator) -> None:
    """The values of all ViTs and of the connector, and the streams of the ViTs without a norm before the blocks."""
    streams: list[tuple[VisionConfig, Rotation | None]] = []
    for vit, _, hub in vit_names(config):
        values = random_rotation(vit.head_dim, rng)
        stream = None if vit.parts.pre_ln else random_rotation(vit.d_model, rng, keep_mean=True)
        streams.append((vit, stream))
        for layer in range(vit.n_layers):
            _rotate_vit_block(f"{hub}.transformer.resblocks.{layer}", vit, get, changes, stream, values)
        if stream is not None:
            for leaf in ("positional_embedding", "class_embedding"):
                _add(changes, f"{hub}.{leaf}", stream.apply)
            for leaf in ("weight", "bias"):
                _add(changes, f"{hub}.patch_embedding.{leaf}", partial(_rows, stream.apply))
    features = partial(_apply_features, streams)
    pooling = f"{connector_name(config)}.image_pooling_2d"
    readers = [f"{pooling}.{w}.weight" for w in ("wq", "wk", "wv")]
    keys = [f"model.point_predictor.{name}.weight" for name in ("subpatch_k", "vote_k")]
    for reader in (*readers, f"{BACKBONE}.pad_embed", *keys):
        _add(changes, reader, features)
    if config.point_head is not None:  # its rows belong to the decoder's stream
        changes["model.build_vit_embedding.weight"].insert(0, features)
    if config.pooling_output:
        heads = config.pooling_heads or config.vision.n_heads
        values = random_rotation(config.vision.d_model // heads, rng)
        for leaf in ("weight", "bias"):
            _add(changes, f"{pooling}.wv.{leaf}", partial(_rows, values.apply_heads))
        _add(changes, f"{pooling}.wo.weight", values.apply_heads)


def _rotate_vit_block(
    block: str, vit: VisionConfig, get: _Get, changes: _Changes, stream: Rotation | None, values: Rotation
) -> None:
    readers = {"attention_norm": ("attention.wq", "attention.wk", "attention.wv"), "ffn_norm": ("feed_forward.w1",)}
    writers = {"attention.wo": "lambda1", "feed_forward.w2": "lambda2"}
    if stream is not None:
        for norm, matrices in readers.items():
            for matrix in matrices:
                bias = partial(_with_norm_bias, get, f"{block}.{matrix}.weight", f"{block}.{norm}.bias")
                _add(changes, f"{block}.{matrix}.bias", bias)
                gain = partial(_scaled_columns, get, f"{block}.{norm}.weight")
                _add(changes, f"{block}.{matrix}.weight", gain, stream.apply)
            _add(changes, f"{block}.{norm}.weight", np.ones_like)
            _add(changes, f"{block}.{norm}.bias", np.zeros_like)
    for leaf in ("weight", "bias"):
        _add(changes, f"{block}.attention.wv.{leaf}", partial(_rows, values.apply_heads))
    _add(changes, f"{block}.attention.wo.weight", values.apply_heads)
    if stream is not None:
        for matrix, scale in writers.items():
            for leaf in ("weight", "bias"):
                if vit.parts.layer_scale:
                    _add(changes, f"{block}.{matrix}.{leaf}", partial(_scaled_rows, get, f"{block}.{scale}"))
                _add(changes, f"{block}.{matrix}.{leaf}", partial(_rows, stream.apply))
            _add(changes, f"{block}.{scale}", np.ones_like)


def _add(changes: _Changes, name: str, *steps: _Change) -> None:
    changes.setdefault(name, []).extend(steps)


def _rows(apply: _Change, array: np.ndarray, start: int = 0) -> np.ndarray:
    """A matrix [out, in] or a bias [out] whose outputs from `start` are rotated."""
    turned = apply(array[start:].T).T
    return turned if not start else np.concatenate([array[:start], turned])


def _scaled_columns(get: _Get, gain: str, array: np.ndarray) -> np.ndarray:
    return np.asarray(array * get(gain))


def _scaled_rows(get: _Get, scale: str, array: np.ndarray) -> np.ndarray:
    factor = get(scale)
    return np.asarray(array * (factor if array.ndim == 1 else factor[:, None]))


def _with_norm_bias(get: _Get, matrix: str, norm: str, bias: np.ndarray) -> np.ndarray:
    """The bias of a matrix after a LayerNorm, with what the norm's bias contributes."""
    return np.asarray(bias + get(matrix).astype(np.float64) @ get(norm))


def _apply_features(streams: list[tuple[VisionConfig, Rotation | None]], array: np.ndarray) -> np.ndarray:
    """[..., feature_dim]: the outputs of the layers of each ViT, and those of a convolutional tower, which stay."""
    out, start = np.array(array, np.float32), 0
    for vit, stream in streams:
        end = start + vit.feature_dim
        if stream is not None:
            out[..., start:end] = stream.apply_heads(array[..., start:end])
        start = end
    return out
