"""A MolmoE bundle beside llama.cpp on the same decoder: prefill of a prompt of embeddings, and tokens after it.

    pip install llama-cpp-python gguf
    python benchmarks/against_llama_cpp.py --make /data/random-molmoe --gguf /data/q4_k_m.gguf
    python benchmarks/against_llama_cpp.py --bundle /data/molmoe-q4 --gguf /data/q4_k_m.gguf

The first command writes the checkpoint's decoder as llama.cpp's own OLMoE (float16, beside the result, 14 GB that are
removed again) and quantises it with llama.cpp. The second loads both into one process and lets them take turns.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import llama_cpp
import numpy as np

from molmo_edge.bundle import open_bundle
from molmo_edge.config import MolmoConfig
from molmo_edge.modeling.checkpoint import TensorSource, open_tensors
from molmo_edge.runtimes.onnx import OnnxRuntime

_CONTEXT = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--make", type=Path, metavar="CHECKPOINT")
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--positions", type=int, default=740, help="of the prompt: 740 are a photo of 640x480")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if args.make:
        make_gguf(args.make, args.gguf)
    if args.bundle:
        compare(args)


def compare(args: argparse.Namespace) -> None:
    bundle = open_bundle(args.bundle, hashes=False)
    random = np.random.default_rng(0)
    rows = (0.02 * random.normal(size=(args.positions + args.tokens, bundle.config.decoder.d_model))).astype(np.float32)
    engines = {"onnxruntime": _ours(bundle.path("decoder"), bundle.config, args.threads)}
    engines["llama.cpp"] = _theirs(args.gguf, args.threads)
    figures: dict[str, list[tuple[float, float]]] = {name: [] for name in engines}
    for _ in range(args.runs + 1):  # the first warms up
        for name, (begin, step) in engines.items():
            began = time.perf_counter()
            begin(rows[: args.positions])
            prefilled = time.perf_counter()
            for row in rows[args.positions :]:
                step(row[None])
            figures[name].append((prefilled - began, time.perf_counter() - prefilled))
    result: dict[str, float] = {}
    for name, seconds in figures.items():
        prefill, decode = (statistics.median(column) for column in zip(*seconds[1:], strict=True))
        result[f"{name} prefill tokens/s"] = round(args.positions / prefill, 1)
        result[f"{name} decode tokens/s"] = round(args.tokens / decode, 2)
    for stage in ("prefill", "decode"):
        ours, theirs = (result[f"{name} {stage} tokens/s"] for name in engines)
        result[f"{stage} ratio"] = round(ours / theirs, 2)
    print(json.dumps(result))


Engine = tuple[Callable[[np.ndarray], object], Callable[[np.ndarray], object]]  # begins a sequence, goes on with it


def _ours(decoder: Path, config: MolmoConfig, threads: int) -> Engine:
    runtime = OnnxRuntime(config, {"decoder": decoder}, threads=threads)
    cache = runtime.new_cache(_CONTEXT)

    def begin(rows: np.ndarray) -> np.ndarray:
        cache.length = 0
        return runtime.forward(rows, cache)

    return begin, lambda rows: runtime.forward(rows, cache)


def _theirs(gguf: Path, threads: int) -> Engine:
    llama_cpp.llama_log_set(_silent, ctypes.c_void_p(0))
    model = llama_cpp.llama_model_load_from_file(str(gguf).encode(), llama_cpp.llama_model_default_params())
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = _CONTEXT, _CONTEXT, 512
    params.n_threads = params.n_threads_batch = threads
    context = llama_cpp.llama_init_from_model(model, params)
    batch = llama_cpp.llama_batch_init(_CONTEXT, llama_cpp.llama_model_n_embd(model), 1)
    length = 0

    def run(rows: np.ndarray) -> None:
        nonlocal length
        ctypes.memmove(batch.embd, np.ascontiguousarray(rows).ctypes.data, rows.nbytes)
        batch.n_tokens = len(rows)
        for i in range(len(rows)):
            batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = length + i, 1, 0
            batch.logits[i] = i == len(rows) - 1
        if llama_cpp.llama_decode(context, batch):
            raise SystemExit("llama.cpp failed")
        llama_cpp.llama_get_logits_ith(context, len(rows) - 1)[0]
        length += len(rows)

    def begin(rows: np.ndarray) -> None:
        nonlocal length
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        length = 0
        run(rows)

    return begin, run


@llama_cpp.llama_log_callback
def _silent(level: int, text: bytes, data: object) -> None:
    pass


def make_gguf(checkpoint: Path, out: Path) -> None:
    import gguf

    config, tensors = MolmoConfig.from_hub(checkpoint), open_tensors(checkpoint)
    d = config.decoder
    whole = out.with_suffix(".f16.gguf")
    writer = gguf.GGUFWriter(whole, "olmoe")
    writer.add_context_length(4096)
    writer.add_embedding_length(d.d_model)
    writer.add_block_count(d.n_layers)
    writer.add_feed_forward_length(d.ffn_dim)
    writer.add_head_count(d.n_heads)
    writer.add_head_count_kv(d.n_kv_heads)
    writer.add_layer_norm_rms_eps(d.norm_eps)
    writer.add_rope_freq_base(d.rope_theta)
    writer.add_expert_count(d.n_experts)
    writer.add_expert_used_count(d.top_k)
    writer.add_vocab_size(d.embedding_size)
    writer.add_tokenizer_model("no_vocab")
    made = list(_tensors(config, tensors))
    for name, shape, dtype, _ in made:
        writer.add_tensor_info(name, shape, np.dtype(dtype), np.dtype(dtype).itemsize * int(np.prod(shape)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, shape, dtype, parts in made:  # one at a time
        values = [part.astype(dtype) for part in (make() for make in parts)]
        writer.write_tensor_data((values[0] if len(values) == 1 else np.stack(values)).reshape(shape))
    writer.close()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M, 2
    if llama_cpp.llama_model_quantize(str(whole).encode(), str(out).encode(), params):
        raise SystemExit("llama.cpp could not quantise")
    whole.unlink()


Part = Callable[[], np.ndarray]


def _tensors(config: MolmoConfig, tensors: TensorSource) -> list[tuple[str, tuple[int, ...], type, list[Part]]]:
    """Name, shape, type, and what makes its parts, in llama.cpp's words."""
    d, hub = config.decoder, "model.transformer"
    w, made = d.d_model, []

    def add(name: str, shape: tuple[int, ...], *parts: Part) -> None:
        made.append((f"{name}.weight", shape, np.float32 if len(shape) == 1 else np.float16, list(parts)))

    def get(name: str, rows: slice = slice(None)) -> Part:
        return lambda: tensors.get(name)[rows]

    add("token_embd", (d.embedding_size, w), get(f"{hub}.wte.embedding"))
    add("output_norm", (w,), get(f"{hub}.ln_f.weight"))
    add("output", (d.embedding_size, w), get("lm_head.weight"))
    for n in range(d.n_layers):
        block, ours = f"{hub}.blocks.{n}", f"blk.{n}"
        add(f"{ours}.attn_norm", (w,), get(f"{block}.attn.attn_norm.weight"))
        for i, part in enumerate("qkv"):
            add(f"{ours}.attn_{part}", (w, w), get(f"{block}.attn.att_proj.weight", slice(i * w, (i + 1) * w)))
        for part in "qk":
            add(f"{ours}.attn_{part}_norm", (w,), get(f"{block}.attn.{part}_norm.weight"))
        add(f"{ours}.attn_output", (w, w), get(f"{block}.attn.attn_out.weight"))
        add(f"{ours}.ffn_norm", (w,), get(f"{block}.mlp.ff_norm.weight"))
        made.append((f"{ours}.ffn_gate_inp.weight", (d.n_experts, w), np.float32, [get(f"{block}.mlp.gate.weight")]))
        for part, shape in (("gate", (d.ffn_dim, w)), ("up", (d.ffn_dim, w)), ("down", (w, d.ffn_dim))):
            names = [f"{block}.mlp.experts.{e}.{part}_proj.weight" for e in range(d.n_experts)]
            add(f"{ours}.ffn_{part}_exps", (d.n_experts, *shape), *map(get, names))
    return made


if __name__ == "__main__":
    main()
