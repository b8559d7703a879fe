"""Decoders as GGUF on llama.cpp: equal to PyTorch and the reference; caches are independent; foreign files refused."""

from __future__ import annotations

import functools
import gc
import json
import shutil
import threading
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("llama_cpp")

import exported
import torch
from exported import ARCHITECTURES, CASES, GOLDEN, case, costs, expected, greedy, prompt, relative
from gguf import GGUFReader
from gguf.quants import dequantize

from molmo_edge import Molmo, gguf_layout
from molmo_edge.bundle import BundleError, default_bundle, load_tokenizer
from molmo_edge.config import DecoderConfig, MolmoConfig
from molmo_edge.export import CheckPhoto, ExportError, export_bundle
from molmo_edge.gguf_layout import NoGraphError, decoder_tensors
from molmo_edge.modeling import load_checkpoint
from molmo_edge.prompt import text_ids
from molmo_edge.quantize.gguf import GGUF_WORDS, quantize_gguf
from molmo_edge.runtimes import EngineError, Unavailable, open_runtime
from molmo_edge.runtimes.llama import LlamaCache, LlamaRuntime
from molmo_edge.runtimes.llama_options import LlamaOptions
from molmo_edge.selfcheck import check_bundle
from molmo_edge.tokenizer import Tokenizer

EXACT = LlamaOptions(cache="f32", flash_attention=False)
# What float16 cannot hold, the random decoder of the golden OLMo makes.
HALVES = {"molmoe": "f16", "qwen": "f16", "olmo": "bf16"}


def bundle(architecture: str, precision: str, **options: Any) -> Path:
    return exported.bundle(architecture, precision, engine="gguf", **options)


@functools.cache
def runtime(architecture: str, precision: str, options: LlamaOptions = EXACT) -> LlamaRuntime:
    opened = open_runtime(bundle(architecture, precision), threads=2, llama=options)
    assert isinstance(opened, LlamaRuntime)
    return opened


def logits_of(engine: Any, rows: np.ndarray, last: int) -> np.ndarray:
    """At the last positions, [last, embedding_size]."""
    cache = engine.new_cache(len(rows))
    engine.forward(rows[:-last], cache)
    return np.stack([engine.forward(row[None], cache) for row in rows[-last:]])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_f32_equals_the_reference(architecture: str, name: str) -> None:
    tensors, cases = expected(architecture)
    engine = runtime(architecture, "f32")
    rows = prompt(engine, case(architecture, name))  # images encoded by the bundle itself
    logits = engine.forward(rows, engine.new_cache(len(rows)))
    assert relative(logits, tensors[f"{name}.last_logits"]) < 1e-4
    assert greedy(engine, rows, 24) == cases[name]["generated_ids"]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("architecture", ("molmoe", "qwen"))
def test_f16_gives_the_reference_s_tokens(architecture: str, name: str) -> None:
    engine = runtime(architecture, "f16", LlamaOptions())  # as a user has it: keys and values in f16 too
    rows = prompt(engine, case(architecture, name))
    assert greedy(engine, rows, 24) == expected(architecture)[1][name]["generated_ids"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_position_equals_pytorch(architecture: str) -> None:
    model = load_checkpoint(GOLDEN / architecture)[0]
    for precision, bound in (("f32", 1e-5), (HALVES[architecture], 1e-2)):
        engine = runtime(architecture, precision)
        rows = prompt(engine, case(architecture, "landscape"))
        with torch.inference_mode():
            hidden = model.decoder(torch.from_numpy(rows)[None])
            exact = model.decoder.logits(hidden[0]).numpy()[-64:]
        assert relative(logits_of(engine, rows, 64), exact) < bound, precision


def test_logits_of_chunks_equal_those_of_single_positions() -> None:
    engine = runtime("molmoe", "f32")
    rows = prompt(engine, case("molmoe", "landscape"))
    assert len(rows) > 512  # more than one chunk
    whole = engine.forward(rows, engine.new_cache(len(rows)))
    assert relative(logits_of(engine, rows, 8)[-1], whole) < 1e-5


@pytest.mark.parametrize(("precision", "most"), (("q8_0", 0.005), ("q4_k_m", 0.05)))
def test_what_rounding_costs(precision: str, most: float, capsys: pytest.CaptureFixture[str]) -> None:
    divergence, same = costs("molmoe", runtime("molmoe", precision, LlamaOptions()))
    with capsys.disabled():
        print(f"\nmolmoe as GGUF {precision}: mean KL {divergence:.2g}, same top token {same:.1%}")
    assert divergence < most


def test_special_rows_survive() -> None:
    """The image tokens' rows: MolmoE's are padding rows of the embedding, 7B-D's lie behind it (molmo_edge.export)."""
    for architecture in ARCHITECTURES:
        engine, directory = runtime(architecture, "q4_k_m" if architecture != "olmo" else "bf16"), GOLDEN / architecture
        model, tokenizer, _ = load_checkpoint(directory)
        ids = np.array([*asdict(tokenizer.special).values(), 0, 7])
        with torch.inference_mode():
            exact = model.decoder.embed(torch.from_numpy(ids)).numpy()
        assert np.array_equal(engine.embed(ids), exact), architecture


def test_the_file_holds_the_checkpoint() -> None:
    """Every tensor of an f32 file, read by another reader, is what the layout says it is made of."""
    from molmo_edge.modeling.checkpoint import open_tensors

    for architecture in ARCHITECTURES:
        config, tensors = MolmoConfig.from_hub(GOLDEN / architecture), open_tensors(GOLDEN / architecture)
        found = {t.name: t for t in GGUFReader(bundle(architecture, "f32") / "decoder-f32.gguf").tensors}
        for tensor in decoder_tensors(config.decoder):
            data = dequantize(found[tensor.name].data, found[tensor.name].tensor_type).reshape(tensor.shape)
            whole = [tensors.get(part.hub) for part in tensor.parts]
            exact = [
                w if p.rows is None else w[p.start : p.start + p.rows] for w, p in zip(whole, tensor.parts, strict=True)
            ]
            assert np.array_equal(data, exact[0] if len(exact) == 1 else np.stack(exact)), tensor.name


def test_text_alone_in_any_program() -> None:
    """llama.cpp by itself, from ids of its own tokenizer: the same logits as our embeddings of the same text."""
    import llama_cpp

    engine, directory = runtime("molmoe", "f32"), bundle("molmoe", "f32")
    tokenizer = load_tokenizer(directory)
    ids = [tokenizer.special.bos, *text_ids(tokenizer, ["What is this?"])]
    model = llama_cpp.Llama(str(directory / "decoder-f32.gguf"), n_ctx=256, logits_all=False, verbose=False)
    assert model.tokenize(b" User: What is this? Assistant:", add_bos=True, special=False) == ids
    assert model.token_eos() == tokenizer.special.eos
    model.eval(ids)
    theirs = np.ctypeslib.as_array(
        llama_cpp.llama_get_logits_ith(model.ctx, -1), (engine.config.decoder.embedding_size,)
    )
    rows = engine.embed(np.array(ids))
    # Its cache is in float16.
    assert relative(theirs.copy(), engine.forward(rows, engine.new_cache(len(rows)))) < 1e-3
    said = model.create_chat_completion([{"role": "user", "content": "What is this?"}], max_tokens=4)
    assert said["usage"]["prompt_tokens"] == len(ids)
    model.close()


class TestCaches:
    """Copies share memory; nobody may notice."""

    rows: np.ndarray

    @pytest.fixture(autouse=True)
    def _prepare(self) -> None:
        self.engine = runtime("molmoe", "f32")
        self.rows = prompt(self.engine, case("molmoe", "square"))
        self.text = [self.engine.embed(np.array(ids)) for ids in ([5, 9, 77, 3], [200, 1, 8, 9, 10, 11])]

    def alone(self, *parts: np.ndarray) -> np.ndarray:
        rows = np.concatenate(parts)
        return self.engine.forward(rows, self.engine.new_cache(len(rows)))

    def test_copies_are_independent(self) -> None:
        base = self.engine.new_cache(len(self.rows) + 8)
        self.engine.forward(self.rows, base)
        copies = [base.copy() for _ in range(2)]
        found = [self.engine.forward(text, copy) for text, copy in zip(self.text, copies, strict=True)]
        again = self.engine.forward(self.text[1], base)  # the original too, after its copies
        for logits, text in zip([*found, again], [*self.text, self.text[1]], strict=True):
            assert relative(logits, self.alone(self.rows, text)) < 1e-5
        assert [base.length, *(copy.length for copy in copies)] == [len(self.rows) + n for n in (6, 4, 6)]

    def test_many_copies_that_do_not_fit_into_one_memory(self) -> None:
        base = self.engine.new_cache(len(self.rows) + 6)
        self.engine.forward(self.rows, base)
        copies = [base.copy() for _ in range(40)]  # more than sequences, and their texts more than positions
        for i, copy in enumerate(copies):
            text = self.text[i % 2]
            assert relative(self.engine.forward(text, copy), self.alone(self.rows, text)) < 1e-5
        assert relative(self.engine.forward(self.text[0], base), self.alone(self.rows, self.text[0])) < 1e-5

    def test_copies_that_are_gone_give_their_room_back(self) -> None:
        base = self.engine.new_cache(len(self.rows) + 6)
        self.engine.forward(self.rows, base)
        for i in range(60):
            copy = base.copy()
            self.engine.forward(self.text[i % 2], copy)
            assert copy._context is base._context
            del copy
            gc.collect()

    def test_a_shorter_length_forgets(self) -> None:
        cache = self.engine.new_cache(len(self.rows) + 16)
        self.engine.forward(self.rows, cache)
        self.engine.forward(self.text[0], cache)
        cache.length = len(self.rows)
        copy = cache.copy()
        for each in (cache, copy):
            logits = self.engine.forward(self.text[1], each)
            assert relative(logits, self.alone(self.rows, self.text[1])) < 1e-5

    def test_a_saved_state_goes_on_elsewhere(self, tmp_path: Path) -> None:
        cache = self.engine.new_cache(len(self.rows) + 6)
        self.engine.forward(self.rows, cache)
        (tmp_path / "state").write_bytes(cache.state())
        other = open_runtime(bundle("molmoe", "f32"), llama=EXACT)  # as another process would
        assert isinstance(other, LlamaRuntime)
        restored = other.restore((tmp_path / "state").read_bytes(), cache.length, cache.length + 6)
        assert relative(other.forward(self.text[0], restored), self.alone(self.rows, self.text[0])) < 1e-5
        with pytest.raises(EngineError, match="are not of this model"):
            other.restore(bytes(cache.state()[:-100]), cache.length, cache.length + 6)
        with pytest.raises(EngineError, match="does not have 3 positions"):
            other.restore(bytes(cache.state()), 3, cache.length)
        other.close()

    def test_what_does_not_fit_is_refused(self) -> None:
        cache = self.engine.new_cache(4)
        with pytest.raises(EngineError, match="5 positions do not fit"):
            self.engine.forward(self.rows[:5], cache)
        with pytest.raises(EngineError, match="nothing to run"):
            self.engine.forward(self.rows[:0], cache)
        with pytest.raises(EngineError, match="32 wide"):
            self.engine.forward(self.rows[:2, :7], cache)
        with pytest.raises(EngineError, match="this model has"):
            self.engine.new_cache(10**6)
        with pytest.raises(EngineError, match="another runtime"):
            self.engine.forward(self.rows[:2], exported.runtime("molmoe").new_cache(8))

    def test_an_interrupted_prompt_leaves_a_sound_cache(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from molmo_edge.runtimes import llama

        cache = self.engine.new_cache(len(self.rows) + 8)
        self.engine.forward(self.text[0], cache)

        def interrupted(running: Any) -> int:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(llama, "_wait", interrupted)
            self.engine.forward(self.rows, cache)
        assert cache.length == len(self.text[0])
        logits = self.engine.forward(self.text[1], cache)
        assert relative(logits, self.alone(self.text[0], self.text[1])) < 1e-5


def test_threads_share_a_molmo() -> None:
    molmo = Molmo(bundle("qwen", "f32"), threads=1, llama=EXACT, max_crops=1)
    scene = molmo.encode(GOLDEN / "coffee.png", room=40)
    questions = [f"Point to the {thing}." for thing in ("cup", "spoon", "table", "saucer")]
    alone = [molmo.ask(scene, question, max_new_tokens=8).token_ids for question in questions]
    found: dict[str, Any] = {}

    def ask(question: str) -> None:
        found[question] = molmo.ask(scene, question, max_new_tokens=8).token_ids

    threads = [threading.Thread(target=ask, args=(question,)) for question in questions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[question] for question in questions] == alone
    molmo.close()
    with pytest.raises(EngineError, match="closed"):
        molmo.ask(GOLDEN / "coffee.png", "What?")


def test_a_closed_runtime_s_caches_stay_sound() -> None:
    engine = open_runtime(bundle("qwen", "f32"))
    cache = engine.new_cache(8)
    assert isinstance(cache, LlamaCache)
    engine.forward(np.zeros((3, 32), np.float32), cache)
    engine.close()
    del engine
    gc.collect()
    assert len(cache.copy().state()) == len(cache.state())


def test_options_change_no_token() -> None:
    rows = prompt(runtime("molmoe", "f32"), case("molmoe", "square"))
    for options in (
        LlamaOptions(repack=True),
        LlamaOptions(flash_attention=True),
        LlamaOptions(cache="bf16", gpu_layers=0),
    ):
        engine = runtime("molmoe", "f16", options)
        assert greedy(engine, rows, 24) == expected("molmoe")[1]["square"]["generated_ids"], options


def test_options_are_read_and_refused() -> None:
    assert LlamaOptions.parse("") == LlamaOptions()
    wanted = LlamaOptions(gpu_layers=20, cache="q8_0", flash_attention=True, repack=False)
    assert LlamaOptions.parse("gpu_layers=20, cache=q8_0,flash_attention=yes,repack=no") == wanted
    assert LlamaOptions.parse("gpu_layers=auto,repack=auto") == LlamaOptions()
    for text, why in (
        ("cache=q9", "'q9' is not known"),
        ("gpu_layers=-1", "whole number"),
        ("gpu_layers=many", "whole number"),
        ("repack=maybe", "yes, no or auto"),
        ("threads=2", "no option of llama.cpp's"),
        ("cache", "no option of llama.cpp's"),
        ("cache=q8_0,flash_attention=no", "needs flash attention"),
    ):
        with pytest.raises(EngineError, match=why):
            LlamaOptions.parse(text)
    with pytest.raises(EngineError, match="not for it"):
        open_runtime(exported.bundle("molmoe"), llama=LlamaOptions())
    with pytest.raises(EngineError, match="does not run on llama"):
        open_runtime(GOLDEN / "molmoe", llama=LlamaOptions())


def test_a_gpu_that_is_not_here_is_refused_with_what_builds_it() -> None:
    from molmo_edge.runtimes.llama_library import gpus

    if gpus():
        pytest.skip("this build has a GPU")
    for device, flag in (("cuda", "GGML_CUDA"), ("vulkan", "GGML_VULKAN"), ("mps", "GGML_METAL")):
        with pytest.raises(Unavailable, match=f"CPU alone: .*{flag}=on.* pip install"):
            open_runtime(bundle("molmoe", "f32"), device=device)


class TestExport:
    def test_words(self, tmp_path: Path) -> None:
        for word in GGUF_WORDS:  # llama.cpp takes each of them
            manifest = export_bundle(GOLDEN / "molmoe", tmp_path / word, word.upper(), engine="gguf", measure=False)
            entry = manifest["components"]["decoder"]
            assert (entry["file"], entry["engine"], entry["precision"]) == (f"decoder-{word}.gguf", "gguf", word)
            assert manifest["components"]["embed_tokens"]["precision"] == "fp32"

    def test_by_component_and_by_target(self, tmp_path: Path) -> None:
        manifest = export_bundle(
            GOLDEN / "qwen", tmp_path / "a", {"decoder": "q8_0", "connector": "q8"}, engine="gguf", measure=False
        )
        words = {name: c.get("precision") for name, c in manifest["components"].items()}
        assert words["decoder"] == "q8_0" and words["connector"] == "q8" and words["vision_encoder"] == "fp32"
        manifest = export_bundle(GOLDEN / "qwen", tmp_path / "b", engine="gguf", target="cpu-x86", measure=False)
        words = {name: c.get("precision") for name, c in manifest["components"].items()}
        assert words["decoder"] == "q4_k_m" and words["vision_encoder"] == "int8" and words["embed_tokens"] == "fp32"

    def test_what_cannot_be(self, tmp_path: Path) -> None:
        for wishes, why in (
            ({"precision": "q4"}, "'q4' is not known for gguf"),
            ({"precision": {"decoder": "mixed"}}, "'mixed' is not known for decoder"),
            ({"precision": "q4_k_m", "block": 64}, "have their own"),
            ({"precision": "f16", "calibrate": GOLDEN}, "for rounded weights"),
            ({"precision": "q8_0", "plain": True}, "connector would be q8|vision_encoder"),
        ):
            with pytest.raises(ExportError, match=why):
                export_bundle(GOLDEN / "molmoe", tmp_path / "no", engine="gguf", **wishes)  # type: ignore[arg-type]
        with pytest.raises(ExportError, match="made with the engine gguf"):
            export_bundle(GOLDEN / "molmoe", tmp_path / "no", mmproj=True)
        with pytest.raises(ExportError, match="q4_k_m' is not known for onnx"):
            export_bundle(GOLDEN / "molmoe", tmp_path / "no", "q4_k_m")
        assert not (tmp_path / "no").exists()

    def test_numbers_that_16_bits_cannot_hold(self, tmp_path: Path) -> None:
        with pytest.raises(ExportError, match=r"no numbers.*bf16 or f32"):
            export_bundle(GOLDEN / "olmo", tmp_path / "no", "f16", engine="gguf")
        assert not (tmp_path / "no").exists()

    def test_what_llama_cpp_will_not_round(self, tmp_path: Path) -> None:
        (tmp_path / "no.gguf").write_bytes(b"GGUF")
        with pytest.raises(ExportError, match=r"cannot make q8_0 of this decoder: .*failed to"):
            quantize_gguf(tmp_path / "no.gguf", tmp_path / "out.gguf", "q8_0")

    def test_decoders_without_a_graph(self) -> None:
        plain = DecoderConfig(n_kv_heads=16)
        assert gguf_layout.architecture(plain) == "qwen2"
        for odd in (
            replace(plain, qk_norm=True),
            replace(plain, norm_after=True),
            DecoderConfig(n_experts=8, top_k=2),
            DecoderConfig(n_experts=8, top_k=2, qk_norm=True, n_kv_heads=4),
        ):
            with pytest.raises(NoGraphError, match="export to ONNX"):
                gguf_layout.architecture(odd)

    def test_calibration_helps_and_is_said(self) -> None:
        """An importance matrix from the golden photos, on the golden photos: the divergence falls."""
        plain = costs("molmoe", runtime("molmoe", "q4_0", LlamaOptions()))[0]
        weighed = bundle("molmoe", "q4_0", calibrate=GOLDEN)
        engine = open_runtime(weighed)
        assert costs("molmoe", engine)[0] < plain  # type: ignore[arg-type]
        engine.close()

    def test_verify(self, tmp_path: Path) -> None:
        check = CheckPhoto(GOLDEN / "coffee.png", "Point to the cup.", max_new_tokens=8)
        export_bundle(GOLDEN / "molmoe", tmp_path / "b", "q8_0", engine="gguf", check=check, measure=False)
        assert check_bundle(tmp_path / "b").exact

    def test_from_a_bundle(self, tmp_path: Path) -> None:
        """What another engine's bundle holds goes into a GGUF: nano, whose checkpoint nobody has."""
        manifest = export_bundle(default_bundle(), tmp_path / "nano", "q8_0", engine="gguf", measure=False)
        assert "molmo_edge.json" in manifest["source"]["files"]
        with Molmo(tmp_path / "nano") as ours, Molmo() as nano:
            photo = GOLDEN / "coffee.png"
            gaps = ours.gaps(photo, "How many cups are there?", nano.ask(photo, "How many cups are there?").token_ids)
            assert max(gaps) < 0.5  # its own answer, or one that is as likely
        with pytest.raises(ExportError, match="not in an ONNX graph"):
            export_bundle(tmp_path / "nano", tmp_path / "again")


class TestCommandLine:
    def test_from_a_checkpoint_to_an_answer(self, cli: Any, tmp_path: Path) -> None:
        out = tmp_path / "bundle"
        status, said, _ = cli(
            "export", GOLDEN / "molmoe", "--engine", "gguf", "--precision", "f32", "--mmproj", "--out", out, "--json"
        )
        assert status == 0
        assert {"decoder", "mmproj"} <= set(json.loads(said)["manifest"]["components"])
        wanted = expected("molmoe")[1]["square"]
        options = ("--max-new-tokens", 24, "--json", "--llama", "cache=f32,flash_attention=no")
        status, said, _ = cli("ask", GOLDEN / wanted["image"], wanted["question"], "-m", out, *options)
        assert status == 0 and json.loads(said)["token_ids"] == wanted["generated_ids"]
        assert cli("verify", out)[0] == 0
        status, said, _ = cli(
            "bench", "-m", out, "--max-new-tokens", 2, "--repeat", 1, "--max-crops", 1, "--json", "-q"
        )
        assert status == 0 and json.loads(said)["timings"][0]["engine"] == "llama.cpp"

    def test_wrong_use(self, cli: Any, tmp_path: Path) -> None:
        photo = GOLDEN / "coffee.png"
        status, _, said = cli("ask", photo, "What?", "--llama", "cache=q9")
        assert status == 2 and "'q9' is not known" in " ".join(said.split())
        status, _, said = cli("ask", photo, "What?", "--llama", "cache=f16")  # nano is no GGUF
        assert status == 1 and "not for it" in said
        status, _, said = cli("export", GOLDEN / "qwen", "--engine", "gguf", "--block", 32, "--out", tmp_path / "no")
        assert status == 1 and "have their own" in said
        status, _, said = cli("export", GOLDEN / "qwen", "--engine", "torch", "--mmproj", "--out", tmp_path / "no")
        assert status == 2

    def test_doctor_names_what_llama_cpp_has(self, cli: Any) -> None:
        status, said, _ = cli("doctor", "--json")
        assert status == 0 and json.loads(said)["llama_cpp_devices"][-1] == "CPU"


class TestMmproj:
    def test_it_holds_the_vision_part(self) -> None:
        """Read back into a model of our own, it gives the reference's features; float16 matrices cost a little."""
        from mmproj_reader import vision_from_mmproj

        for architecture in ("molmoe", "qwen"):
            c = case(architecture, "square")
            model = load_checkpoint(GOLDEN / architecture)[0]
            with torch.inference_mode():
                exact = model.encode_image(torch.from_numpy(c.crops), torch.from_numpy(c.masks)).numpy()
                model = vision_from_mmproj(bundle(architecture, "f16", mmproj=True) / "mmproj-f16.gguf", model)
                found = model.encode_image(torch.from_numpy(c.crops), torch.from_numpy(c.masks)).numpy()
            assert relative(found, exact) < 2e-3


class TestForeign:
    """Refused by name, before llama.cpp sees the file."""

    @pytest.fixture
    def swapped(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
        """`swapped(bytes)` is a bundle of the golden MolmoE whose manifest vouches for these bytes as its decoder."""
        from molmo_edge.bundle import MANIFEST, sha256_of
        from molmo_edge.runtimes import llama

        def never(*_: Any) -> None:
            raise AssertionError("llama.cpp was given the file")

        monkeypatch.setattr(llama, "_Model", never)
        directory = tmp_path / "bundle"
        shutil.copytree(bundle("molmoe", "f32"), directory)

        def make(content: bytes) -> Path:
            path = directory / "decoder-f32.gguf"
            path.write_bytes(content)
            manifest = json.loads((directory / MANIFEST).read_text())
            manifest["components"]["decoder"] |= {"bytes": len(content), "sha256": sha256_of(path)}
            (directory / MANIFEST).write_text(json.dumps(manifest))
            return directory

        return make

    def test_damage_that_the_hash_sees(self, tmp_path: Path) -> None:
        shutil.copytree(bundle("molmoe", "f32"), tmp_path / "b")
        with (tmp_path / "b" / "decoder-f32.gguf").open("r+b") as file:
            file.seek(5000)
            file.write(b"\xff")
        with pytest.raises(BundleError, match=r"decoder-f32.gguf does not have the sha256"):
            open_runtime(tmp_path / "b")

    def test_other_models(self, swapped: Any) -> None:
        content = (bundle("molmoe", "f32") / "decoder-f32.gguf").read_bytes()
        for bad, why in (
            ((bundle("qwen", "f32") / "decoder-f32.gguf").read_bytes(), 'architecture "qwen2"'),
            (b"PK" + content[2:], "is not a GGUF"),
            (content[:-64], "bytes behind the file"),
            (content[:700], "ends in the middle of its header"),
            (content[:4] + b"\x09\0\0\0" + content[8:], "version 9"),
            (content[:8] + b"\xff" * 8 + content[16:], "claims 18446744073709551615"),
            (content.replace(b"blk.1.attn_k.weight", b"blk.1.attn_K.weight"), "no tensor blk.1.attn_k.weight"),
            (b"", "is not a GGUF"),
        ):
            with pytest.raises(BundleError, match=why):
                open_runtime(swapped(bad))

    def test_another_tokenizer(self, swapped: Any, tmp_path: Path) -> None:
        from molmo_edge.export.gguf import write_decoder
        from molmo_edge.modeling.checkpoint import open_tensors

        checkpoint = GOLDEN / "molmoe"
        other = tmp_path / "other"
        other.mkdir()
        text = (checkpoint / "tokenizer.json").read_text("utf-8")
        tokens = Tokenizer(text)
        a, b = (
            next(t for i in r if (t := tokens.token(i)) and t.isalpha()) for r in (range(300, 400), range(401, 480))
        )
        swap = {f'"{a}":': f'"{b}":', f'"{b}":': f'"{a}":'}
        start = text.index('"vocab"')
        head, vocab = text[:start], text[start:]
        i, j = (vocab.index(key) for key in swap)
        (i, first), (j, second) = sorted(((i, f'"{a}":'), (j, f'"{b}":')))
        vocab = vocab[:i] + swap[first] + vocab[i + len(first) : j] + swap[second] + vocab[j + len(second) :]
        (other / "tokenizer.json").write_text(head + vocab, "utf-8")
        config = MolmoConfig.from_hub(checkpoint)
        write_decoder(tmp_path / "other.gguf", other, config, open_tensors(checkpoint), "f32", "other")
        with pytest.raises(BundleError, match="made for another tokenizer: token"):
            open_runtime(swapped((tmp_path / "other.gguf").read_bytes()))
