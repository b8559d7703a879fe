"""Write a full-size checkpoint with seeded random weights in the layout of the public ones.

    python benchmarks/make_random_checkpoint.py --preset molmoe-1b --layout hub --out /data/random-molmoe

molmoe-1b: one float32 pickle of 28.9 GB, as on the hub. The other presets: float32 safetensors in shards of 5 GB with
an index. Benchmarks of full-size models use these when the hub is not reachable. Matrices are normally distributed with
a standard deviation of 0.02, norms are ones, biases zeros; the values of a tensor depend only on --seed and its name.
Without --tokenizer a placeholder is written: single bytes, one merge, and Molmo's special tokens.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from molmo_edge.checkpoints.hub_config import write_hub_config
from molmo_edge.checkpoints.pickles import read_pickle
from molmo_edge.checkpoints.safetensors_files import ShardWriter
from molmo_edge.checkpoints.tensor_names import hub_shapes
from molmo_edge.checkpoints.weight_files import PICKLE
from molmo_edge.config import MolmoConfig
from molmo_edge.frontend.tokenizer import CHAT_END, END_OF_TEXT, Tokenizer
from molmo_edge.presets import PRESETS

_STD = 0.02
_CHUNK = 1 << 22  # values that a thread generates at a time
_SHARD = 5_000_000_000  # bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="molmoe-1b")
    parser.add_argument("--layout", choices=["hub"], default="hub")
    parser.add_argument("--out", type=Path, required=True, help="directory to create; it must not exist")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json to use instead of the placeholder")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    began = time.perf_counter()
    size = make_checkpoint(PRESETS[args.preset], args.out, seed=args.seed, tokenizer=args.tokenizer)
    seconds = time.perf_counter() - began
    print(f"{size / 1e9:.2f} GB in {seconds:.0f} s, {size / 1e6 / seconds:.0f} MB/s", file=sys.stderr)


def make_checkpoint(config: MolmoConfig, out: Path, *, seed: int = 0, tokenizer: Path | None = None) -> int:
    """Write the directory `out`, completely or not at all. Returns the bytes of its weights."""
    part = out.with_name(f".{out.name}.part")
    part.mkdir(parents=True)
    try:
        definition = tokenizer.read_text(encoding="utf-8") if tokenizer else stand_in_tokenizer(config)
        write_hub_config(config, part, Tokenizer(definition).special)
        (part / "tokenizer.json").write_text(definition, encoding="utf-8")
        write = _write_pickle if config.decoder.n_experts else _write_shards
        with ThreadPoolExecutor() as pool:
            write(part, hub_shapes(config), lambda name, out: _draw(name, out, seed, pool))
        part.rename(out)
    except BaseException:
        shutil.rmtree(part)
        raise
    return sum(path.stat().st_size for path in out.iterdir() if path.suffix in (".bin", ".safetensors"))


Draw = Callable[[str, np.ndarray], None]


def _draw(name: str, out: np.ndarray, seed: int, pool: ThreadPoolExecutor) -> None:
    """Fill the float32 array `out` in place."""
    if out.ndim == 1 and name.endswith((".weight", ".bias")):
        out[:] = 1.0 if name.endswith(".weight") else 0.0
        return
    flat = out.reshape(-1)
    key = zlib.crc32(name.encode())

    def fill(start: int) -> None:
        part = flat[start : start + _CHUNK]
        np.random.default_rng([seed, key, start]).standard_normal(out=part, dtype=np.float32)
        part *= _STD

    list(pool.map(fill, range(0, flat.size, _CHUNK)))


def _write_pickle(directory: Path, shapes: dict[str, tuple[int, ...]], draw: Draw) -> None:
    """As torch.save, but without holding the tensors: writes a file with empty space for them, then their values."""
    tensors = {name: torch.empty(shape) for name, shape in shapes.items()}  # never written to, so not resident
    with torch.serialization.skip_data():
        torch.save(tensors, directory / PICKLE)
    del tensors
    with (directory / PICKLE).open("r+b") as file:
        for name, entry in read_pickle(directory / PICKLE).items():
            values = np.empty(entry.shape, np.float32)
            draw(name, values)
            file.seek(entry.offset)
            file.write(values.data)


def _write_shards(directory: Path, shapes: dict[str, tuple[int, ...]], draw: Draw) -> None:
    with ShardWriter(directory, shapes, "F32", _SHARD) as writer:
        for name, shape in shapes.items():
            values = np.empty(shape, np.float32)
            draw(name, values)
            writer.write(name, values)


_IMAGE_TOKENS = ("<im_start>", "<im_end>", "<im_patch>", "<im_col>")
_MOLMO2_TOKENS = ("<low_res_im_start>", "<|image|>", "<im_low>", "<frame_start>", "<frame_end>", "<|video|>")


def stand_in_tokenizer(config: MolmoConfig) -> str:
    """A tokenizer.json of single bytes, unused tokens, and the end of text as the last id; then Molmo's special tokens.

    For Molmo2 the tokens of ChatML come before the end of text.
    """
    from tokenizers.pre_tokenizers import ByteLevel

    vocab_size = config.decoder.vocab_size
    special = {vocab_size - 1: END_OF_TEXT}
    if config.decoder.bidirectional_images:
        special |= {vocab_size - 3: "<|im_start|>", vocab_size - 2: CHAT_END}
        special |= dict(enumerate((*_IMAGE_TOKENS, *_MOLMO2_TOKENS), vocab_size))
    else:
        special |= dict(enumerate((*_IMAGE_TOKENS, "<|image|>"), vocab_size))
    tokens = [*sorted(ByteLevel.alphabet()), "Ġt"]
    unused = [f"<unused {i}>" for i in range(len(tokens), min(special))]  # the library fills gaps with added tokens
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    definition = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": token, **flags} for i, token in special.items()],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "vocab": {token: i for i, token in enumerate([*tokens, *unused])},
            "merges": [["Ġ", "t"]],  # llama.cpp needs at least one
        },
    }
    return json.dumps(definition)


if __name__ == "__main__":
    main()
