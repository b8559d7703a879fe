"""Reading GGUF headers: results equal those of the gguf package, and every error is named. Needs no llama.cpp."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.constants import GGML_QUANT_SIZES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from molmo_edge.checkpoints.gguf_header import TYPE_SIZES, check_decoder, read_header
from molmo_edge.checkpoints.hub_config import read_config
from molmo_edge.checkpoints.manifest import BundleError
from molmo_edge.checkpoints.weight_files import open_tensors
from molmo_edge.export import gguf_vocab
from molmo_edge.export.gguf import write_decoder
from molmo_edge.frontend.tokenizer import Tokenizer

GOLDEN = Path(__file__).parent / "golden"
CONFIG = read_config(GOLDEN / "molmoe")
TOKENIZER = Tokenizer.from_file(GOLDEN / "molmoe" / "tokenizer.json")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The decoder of the golden MolmoE, without llama.cpp's pre-tokenizer."""
    out = tmp_path_factory.mktemp("gguf") / "decoder.gguf"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf_vocab, "find_pretokenizer", lambda *_: "olmo")
        write_decoder(out, TOKENIZER, CONFIG, open_tensors(GOLDEN / "molmoe"), "f16", "golden")
    return out


@pytest.fixture(scope="module")
def content(path: Path) -> bytes:
    return path.read_bytes()


def as_type(content: bytes, tensor: bytes, kind: int) -> bytes:
    """Change the type of a tensor, which follows its name and dimensions."""
    at = content.index(tensor) + len(tensor)
    (dimensions,) = struct.unpack_from("<I", content, at)
    at += 4 + 8 * dimensions
    return content[:at] + struct.pack("<I", kind) + content[at + 4 :]


def test_it_reads_what_another_reader_reads(path: Path) -> None:
    header, reader = check_decoder(path, CONFIG, TOKENIZER), GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    for name, value in fields.items():
        assert header.metadata[name] == value or np.allclose(header.metadata[name], value), name
    assert set(header.metadata) == set(fields)
    for tensor in reader.tensors:
        found = header.tensors[tensor.name]
        assert found.shape == tuple(map(int, tensor.shape[::-1]))
        assert found.size == tensor.n_bytes


def test_sizes_of_types_are_those_of_ggml() -> None:
    theirs = {int(kind): size for kind, size in GGML_QUANT_SIZES.items()}
    assert {kind: size for kind, size in TYPE_SIZES.items() if theirs.get(kind) != size} == {}
    common = ("F32", "F16", "BF16", "Q4_0", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "IQ4_NL")
    assert {int(GGMLQuantizationType[name]) for name in common} <= set(TYPE_SIZES)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda _: b"", "is not a GGUF"),
        (lambda c: c[:20], "is not a GGUF"),
        (lambda c: b"GGML" + c[4:], "is not a GGUF"),
        (lambda c: c[:4] + struct.pack("<I", 1) + c[8:], "version 1 "),
        (lambda c: c[:4] + c[7:3:-1] + c[8:], "version 50331648"),  # big-endian
        (lambda c: c[:8] + struct.pack("<Q", 1 << 60) + c[16:], "claims"),
        (lambda c: c[:16] + struct.pack("<Q", 1 << 60) + c[24:], "claims"),
        (lambda c: c[:24] + struct.pack("<Q", 1 << 40) + c[32:], "claims"),
        (lambda c: c[:3000], "ends in the middle of the header"),
        (lambda c: c[:-32], "bytes after the end of the file"),
        (lambda c: c.replace(b"olmoe.block_count", b"olmoe.block_c0unt"), "block_count is None, this model's is 2"),
        (lambda c: c.replace(b"blk.0.attn_v.weight", b"blk.0.attn_w.weight"), "no tensor blk.0.attn_v.weight"),
        (lambda c: c.replace(b"blk.0.attn_v.weight", b"blk.0.attn_q.weight"), "occurs twice"),
        (lambda c: c.replace(b"\x05\0\0\0\0\0\0\0olmoe", b"\x05\0\0\0\0\0\0\0llama"), 'architecture is "llama"'),
        (lambda c: c.replace(b"gpt2", b"bert"), "is not a byte-level BPE"),
        (
            lambda c: c.replace(b"molmo_edge.created_by", b"olmoe.key_length_mla_"),
            "has the key olmoe.key_length_mla_, which",
        ),
        (lambda c: as_type(c, b"blk.0.attn_norm.weight", 1), "attn_norm.weight is not in float32"),
        (lambda c: as_type(c, b"blk.0.attn_v.weight", 26), "type 26, which"),
    ],
)
def test_what_is_wrong_is_named(change: object, why: str, content: bytes, tmp_path: Path) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(change(content))  # type: ignore[operator]
    with pytest.raises(BundleError, match=why) as error:
        check_decoder(bad, CONFIG, TOKENIZER)
    assert str(bad) in str(error.value)


def test_another_tokenizer_s_file_is_refused(path: Path) -> None:
    text = (GOLDEN / "molmoe" / "tokenizer.json").read_text("utf-8")
    text = text.replace("<im_col>", "<im_x>").replace("<im_start>", "<im_col>").replace("<im_x>", "<im_start>")
    differs = "its tokenizer differs: token 500 is '<im_start>', this model's is '<im_col>'"
    with pytest.raises(BundleError, match=differs):
        check_decoder(path, CONFIG, Tokenizer(text))


def test_types_that_are_not_known_and_tensors_that_overlap(tmp_path: Path) -> None:
    for raw, why in ((200, "type 200"), (8, "is not a multiple of its block size 32")):
        bad = tmp_path / f"{raw}.gguf"
        writer = GGUFWriter(bad, "olmoe")
        writer.add_tensor("x", np.zeros((2, 33), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        kind = struct.pack("<QQI", 33, 2, 0)
        bad.write_bytes(bad.read_bytes().replace(kind, struct.pack("<QQI", 33, 2, raw)))
        with pytest.raises(BundleError, match=why):
            read_header(bad)
    with pytest.raises(BundleError, match="cannot be read"):
        read_header(tmp_path / "none.gguf")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_damage_gets_past_with_another_error(data: st.DataObject, content: bytes, tmp_path: Path) -> None:
    """Changed or missing bytes anywhere in the header are reported, or are harmless (a name, a merge)."""
    end = content.index(b"output_norm.weight") + 64
    damaged = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, end))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.sampled_from((None, None, data.draw(st.integers(0, end)))))
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(damaged[:cut])
    refused = None
    try:
        check_decoder(bad, CONFIG, TOKENIZER)
    except BundleError as error:
        refused = str(error)
    assert cut is None if refused is None else str(bad) in refused
