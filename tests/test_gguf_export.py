"""Bundles with a GGUF: what can be asked for, what is in them, and what is refused before llama.cpp sees it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("llama_cpp")

import torch
from exported import GOLDEN, case, costs, expected, gguf_bundle, gguf_runtime, relative
from test_conv_tower import write_checkpoint

from molmo_edge import Molmo
from molmo_edge.checkpoints import gguf_layout
from molmo_edge.checkpoints.bundle import default_bundle
from molmo_edge.checkpoints.gguf_layout import NoGraphError
from molmo_edge.checkpoints.hub_config import read_config
from molmo_edge.checkpoints.manifest import MANIFEST, BundleError, write_manifest
from molmo_edge.config import DecoderConfig, YarnConfig
from molmo_edge.export import CheckPhoto, ExportError, export_bundle
from molmo_edge.export.precisions import GGUF_FLOATS, GGUF_PRECISIONS
from molmo_edge.frontend.tokenizer import Tokenizer
from molmo_edge.modeling import load_checkpoint
from molmo_edge.presets import PRESETS
from molmo_edge.quantize import QuantizeError
from molmo_edge.quantize.llama_quantize import quantize_gguf
from molmo_edge.runtimes import open_runtime
from molmo_edge.runtimes.llama_options import LlamaOptions
from molmo_edge.selfcheck import check_bundle, logit_gaps
from molmo_edge.system.files import sha256_of


class TestExport:
    def test_words(self, tmp_path: Path) -> None:
        for word in GGUF_PRECISIONS:  # llama.cpp takes each of them
            manifest = export_bundle(GOLDEN / "molmoe", tmp_path / word, word.upper(), engine="gguf", measure=False)
            entry = manifest["components"]["decoder"]
            assert (entry["file"], entry["engine"], entry["precision"]) == (f"decoder-{word}.gguf", "gguf", word)
            table = manifest["components"]["embed_tokens"]["precision"]
            assert table == ("fp32" if word in GGUF_FLOATS else "int8")

    def test_by_component_and_by_target(self, tmp_path: Path) -> None:
        manifest = export_bundle(
            GOLDEN / "qwen", tmp_path / "a", {"decoder": "q8_0", "connector": "q8"}, engine="gguf", measure=False
        )
        words = {name: c.get("precision") for name, c in manifest["components"].items()}
        assert words["decoder"] == "q8_0"
        assert words["connector"] == "q8"
        assert words["vision_encoder"] == "fp32"
        manifest = export_bundle(GOLDEN / "qwen", tmp_path / "b", engine="gguf", target="cpu-x86", measure=False)
        words = {name: c.get("precision") for name, c in manifest["components"].items()}
        assert words["decoder"] == "q4_k_m"
        assert words["vision_encoder"] == "int8"
        assert words["embed_tokens"] == "int8"

    def test_what_cannot_be(self, tmp_path: Path) -> None:
        for options, message in (
            ({"precision": "q4"}, "'q4' is not a supported precision for gguf"),
            ({"precision": {"decoder": "mixed"}}, "'mixed' is not a supported precision for decoder"),
            ({"precision": "q4_k_m", "block": 64}, "define their own"),
            ({"precision": "f16", "calibrate": GOLDEN}, "uses no calibration for f16"),
            ({"precision": "q8_0", "calibrate": GOLDEN}, "uses no calibration for q8_0"),
            ({"precision": "q8_0", "plain": True}, "cannot be int8 in|cannot be q8 in standard"),
        ):
            with pytest.raises(ExportError, match=message):
                export_bundle(GOLDEN / "molmoe", tmp_path / "no", engine="gguf", **options)  # type: ignore[arg-type]
        with pytest.raises(ExportError, match="choose the engine gguf"):
            export_bundle(GOLDEN / "molmoe", tmp_path / "no", mmproj=True)
        with pytest.raises(ExportError, match="q4_k_m' is not a supported precision for onnx"):
            export_bundle(GOLDEN / "molmoe", tmp_path / "no", "q4_k_m")
        assert not (tmp_path / "no").exists()

    def test_numbers_that_16_bits_cannot_hold(self, tmp_path: Path) -> None:
        with pytest.raises(ExportError, match=r"NaN or Inf.*bf16 or f32"):
            export_bundle(GOLDEN / "olmo", tmp_path / "no", "f16", engine="gguf")
        assert not (tmp_path / "no").exists()

    def test_what_llama_cpp_will_not_round(self, tmp_path: Path) -> None:
        (tmp_path / "no.gguf").write_bytes(b"GGUF")
        with pytest.raises(QuantizeError, match=r"cannot make q8_0 of this decoder: .*failed to"):
            quantize_gguf(tmp_path / "no.gguf", tmp_path / "out.gguf", "q8_0")

    def test_decoders_without_a_graph(self) -> None:
        plain = DecoderConfig(n_kv_heads=16)
        assert gguf_layout.architecture(plain) == "qwen2"
        assert gguf_layout.architecture(replace(plain, image_attention="bidirectional")) == "qwen2"
        olmo3 = replace(plain, qk_norm=True, norm_after=True, yarn=PRESETS["molmo2-o-7b"].decoder.yarn, n_layers=32)
        assert gguf_layout.architecture(olmo3) == "olmo2"
        for odd in (
            replace(plain, qk_norm=True),
            replace(plain, norm_after=True),
            DecoderConfig(n_experts=8, top_k=2),
            DecoderConfig(n_experts=8, top_k=2, qk_norm=True, n_kv_heads=4),
            DecoderConfig(n_experts=8, top_k=2, qk_norm=True, qk_norm_per_head=True),
            replace(plain, head_dim_override=64),
            replace(plain, yarn=YarnConfig(layers=(0,))),
        ):
            with pytest.raises(NoGraphError, match="export to ONNX"):
                gguf_layout.architecture(odd)

    def test_calibration_helps_and_is_recorded(self) -> None:
        """An importance matrix from the golden photos, on the golden photos: the divergence falls."""
        plain = costs("molmoe", gguf_runtime("molmoe", "q4_0", LlamaOptions()))[0]
        weighed = gguf_bundle("molmoe", "q4_0", calibrate=GOLDEN)
        entry = json.loads((weighed / MANIFEST).read_text())["components"]["decoder"]
        assert "photos" in entry["importance"]
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
            question = "How many cups are there?"
            gaps = logit_gaps(ours.engine, photo, question, nano.ask(photo, question).token_ids)
            assert max(gaps) < 0.5  # its own answer, or one that is as likely
        with pytest.raises(ExportError, match="cannot be read back from a GGUF"):
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
        assert status == 0
        assert json.loads(said)["token_ids"] == wanted["generated_ids"]
        assert cli("verify", out)[0] == 0
        status, said, _ = cli(
            "bench", "-m", out, "--max-new-tokens", 2, "--repeat", 1, "--max-crops", 1, "--json", "-q"
        )
        assert status == 0
        assert json.loads(said)["timings"][0]["engine"] == "llama.cpp"

    def test_wrong_use(self, cli: Any, tmp_path: Path) -> None:
        photo = GOLDEN / "coffee.png"
        status, _, said = cli("ask", photo, "What?", "--llama", "cache=q9")
        assert status == 2
        assert "'q9' is not a supported cache type" in " ".join(said.split())
        status, _, said = cli("ask", photo, "What?", "--llama", "cache=f16")  # nano is no GGUF
        assert status == 1
        assert "apply to bundles with a GGUF decoder" in said
        status, _, said = cli("export", GOLDEN / "qwen", "--engine", "gguf", "--block", 32, "--out", tmp_path / "no")
        assert status == 1
        assert "define their own" in said
        status, _, said = cli("export", GOLDEN / "qwen", "--engine", "torch", "--mmproj", "--out", tmp_path / "no")
        assert status == 2

    def test_doctor_names_what_llama_cpp_has(self, cli: Any) -> None:
        status, said, _ = cli("doctor", "--json")
        assert status == 0
        assert json.loads(said)["llama_cpp_devices"][-1] == "CPU"


class TestMmproj:
    def test_it_holds_the_vision_part(self) -> None:
        """Read back into a model of our own, it gives the reference's features; float16 matrices cost a little."""
        from mmproj_reader import vision_from_mmproj

        for architecture in ("molmoe", "qwen"):
            c = case(architecture, "square")
            model = load_checkpoint(GOLDEN / architecture)[0]
            with torch.inference_mode():
                exact = model.encode_image(torch.from_numpy(c.crops), torch.from_numpy(c.masks)).numpy()
                model = vision_from_mmproj(gguf_bundle(architecture, "f16", mmproj=True) / "mmproj-f16.gguf", model)
                found = model.encode_image(torch.from_numpy(c.crops), torch.from_numpy(c.masks)).numpy()
            assert relative(found, exact) < 2e-3


def test_a_convolutional_tower_beside_the_vit(tmp_path: Path) -> None:
    """It is part of the vision graph; an mmproj has no place for it."""
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    with pytest.raises(ExportError, match="leave mmproj out"):
        export_bundle(checkpoint, tmp_path / "mmproj", "f32", engine="gguf", mmproj=True)
    export_bundle(checkpoint, tmp_path / "bundle", "f32", engine="gguf")
    photo = np.arange(120 * 160 * 3, dtype=np.uint32).reshape(120, 160, 3).astype(np.uint8)
    ids = []
    for model in (checkpoint, tmp_path / "bundle"):
        with Molmo(model) as molmo:
            ids.append(molmo.ask(photo, "Why?", max_new_tokens=12).token_ids)
    assert ids[0] == ids[1]


class TestForeign:
    """Refused by name, before llama.cpp sees the file."""

    @pytest.fixture
    def swapped(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
        """`swapped(bytes)` is a bundle of the golden MolmoE whose manifest vouches for these bytes as its decoder."""
        from molmo_edge.runtimes import llama

        given: list[Any] = []
        directory = tmp_path / "bundle"
        shutil.copytree(gguf_bundle("molmoe", "f32"), directory)
        gguf_bundle("qwen", "f32")  # made now, while llama.cpp may be used
        monkeypatch.setattr(llama, "LlamaModel", lambda *arguments: given.append(arguments))

        def make(content: bytes) -> Path:
            path = directory / "decoder-f32.gguf"
            path.write_bytes(content)
            manifest = json.loads((directory / MANIFEST).read_text())
            manifest["components"]["decoder"] |= {"bytes": len(content), "sha256": sha256_of(path)}
            write_manifest(directory, manifest)
            return directory

        yield make
        assert not given, "llama.cpp was given the file"

    def test_damage_that_the_hash_sees(self, tmp_path: Path) -> None:
        shutil.copytree(gguf_bundle("molmoe", "f32"), tmp_path / "b")
        with (tmp_path / "b" / "decoder-f32.gguf").open("r+b") as file:
            file.seek(5000)
            file.write(b"\xff")
        with pytest.raises(BundleError, match=r"decoder-f32.gguf does not have the sha256"):
            open_runtime(tmp_path / "b")

    def test_other_models(self, swapped: Any) -> None:
        content = (gguf_bundle("molmoe", "f32") / "decoder-f32.gguf").read_bytes()
        for bad, message in (
            ((gguf_bundle("qwen", "f32") / "decoder-f32.gguf").read_bytes(), 'architecture is "qwen2"'),
            (b"PK" + content[2:], "is not a GGUF"),
            (content[:-64], "bytes after the end of the file"),
            (content[:700], "ends in the middle of the header"),
            (content[:4] + b"\x09\0\0\0" + content[8:], "version 9"),
            (content[:8] + b"\xff" * 8 + content[16:], "claims to have 18446744073709551615"),
            (content.replace(b"blk.1.attn_k.weight", b"blk.1.attn_K.weight"), "no tensor blk.1.attn_k.weight"),
            (b"", "is not a GGUF"),
        ):
            with pytest.raises(BundleError, match=message):
                open_runtime(swapped(bad))

    def test_another_tokenizer(self, swapped: Any, tmp_path: Path) -> None:
        from molmo_edge.checkpoints.weight_files import open_tensors
        from molmo_edge.export.gguf import write_decoder

        checkpoint = GOLDEN / "molmoe"
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
        other, config = Tokenizer(head + vocab), read_config(checkpoint)
        write_decoder(tmp_path / "other.gguf", other, config, open_tensors(checkpoint), "f32", "other")
        with pytest.raises(BundleError, match="its tokenizer differs: token"):
            open_runtime(swapped((tmp_path / "other.gguf").read_bytes()))
