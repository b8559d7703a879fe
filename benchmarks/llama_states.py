"""What it costs to read MolmoPoint's states from llama.cpp: CPU time with and without the evaluation callback.

    python benchmarks/llama_states.py

The decoder is random: 28 layers of width 1024, q4_k_m, one thread. CPU time is measured because other programs do not
change it.
"""

from __future__ import annotations

import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from molmo_edge.checkpoints.hub_config import read_config
from molmo_edge.checkpoints.tensor_names import hub_shapes
from molmo_edge.config import MolmoConfig
from molmo_edge.export.gguf import export_decoder
from molmo_edge.frontend.tokenizer import Tokenizer
from molmo_edge.runtimes.llama import LlamaCache
from molmo_edge.runtimes.llama_native import LlamaContext, LlamaModel
from molmo_edge.runtimes.llama_options import LlamaOptions

GOLDEN = Path(__file__).parent.parent / "tests" / "golden2" / "molmo_point"
IMAGE, TOKENS, ROUNDS = 256, 10, 3


class RandomTensors:
    """A TensorSource of random weights."""

    def __init__(self, config: MolmoConfig) -> None:
        self._shapes = hub_shapes(config)

    def names(self) -> list[str]:
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, _name: str) -> str:
        return "BF16"

    def get(self, name: str) -> np.ndarray:
        values = np.random.default_rng(len(name)).standard_normal(self._shapes[name], np.float32)
        return np.ones_like(values) if values.ndim == 1 else 0.02 * values

    raw = get

    def file(self, _name: str) -> Path:
        return GOLDEN


def main() -> None:
    config = read_config(GOLDEN)
    shape = {"d_model": 1024, "n_layers": 28, "n_heads": 16, "n_kv_heads": 8, "head_dim_override": 128}
    config = replace(config, decoder=replace(config.decoder, ffn_dim=3072, **shape))
    rows = np.random.default_rng(0).standard_normal((IMAGE, 1024)).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder) / "scratch"
        scratch.mkdir()
        tokenizer = Tokenizer.from_file(GOLDEN / "tokenizer.json")
        path = export_decoder(Path(folder), scratch, tokenizer, config, RandomTensors(config), "q4_k_m", "random")
        options, stop = LlamaOptions(), threading.Event()
        models = {
            name: LlamaModel(path, 1, False, options, stop, IMAGE, states)
            for name, states in (("without", None), ("with", (27, 1024)))
        }
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
        for _ in range(ROUNDS):
            for name, model in models.items():
                cache = LlamaCache(LlamaContext(model, IMAGE + TOKENS))
                start = time.process_time()
                cache.append(rows, block=True)
                middle = time.process_time()
                for row in rows[:TOKENS]:
                    cache.append(row[None])
                seconds[name].append((middle - start, (time.process_time() - middle) / TOKENS))
    for name, found in seconds.items():
        image, token = map(min, zip(*found, strict=True))
        sys.stdout.write(
            f"{name}: {image:.2f} s for {IMAGE} image tokens, {1000 * token:.1f} ms for each token after\n"
        )


if __name__ == "__main__":
    main()
