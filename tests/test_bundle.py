"""Opening bundles: damaged and inconsistent ones are refused, and files are verified once per machine."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from molmo_edge import Molmo
from molmo_edge.checkpoints.bundle import is_bundle, load_tokenizer, open_bundle, resolve_model
from molmo_edge.checkpoints.hub_config import read_config
from molmo_edge.checkpoints.manifest import BundleError, Manifest, read_manifest, write_manifest
from molmo_edge.selfcheck import check_bundle


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_bundle, tmp_path / "bundle")


def edit(bundle: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Edit the manifest and update its hash."""
    manifest = json.loads((bundle / "molmo_edge.json").read_text())
    change(manifest)
    write_manifest(bundle, manifest)


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_sound_bundle_opens(bundle: Path, golden: Path) -> None:
    opened = open_bundle(bundle)
    assert opened.config == read_config(golden / "molmoe")
    assert opened.manifest.special_ids.im_patch == 502
    assert opened.path("decoder").is_file()
    assert opened.components["decoder"].engine == "onnx"
    with pytest.raises(BundleError, match="no component 'motor'"):
        opened.path("motor")


def test_a_damaged_file_is_refused_by_name(bundle: Path) -> None:
    flip_a_byte(bundle / "decoder.onnx")
    with pytest.raises(BundleError, match=r"decoder\.onnx does not have the sha256"):
        open_bundle(bundle)


def test_a_file_cut_short_is_refused_whatever_was_verified(bundle: Path) -> None:
    open_bundle(bundle)
    path = bundle / "connector.onnx"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BundleError, match=r"connector\.onnx has \d+ bytes, the manifest says"):
        open_bundle(bundle, hashes=False)


def test_a_missing_file_is_refused_by_name(bundle: Path) -> None:
    (bundle / "embed_tokens.onnx").unlink()
    with pytest.raises(BundleError, match=r"embed_tokens\.onnx cannot be read"):
        open_bundle(bundle)


def test_hashes_are_compared_once_a_machine(bundle: Path) -> None:
    open_bundle(bundle)
    path = bundle / "decoder.onnx"
    before = path.stat()
    flip_a_byte(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # the time of change stays the same
    open_bundle(bundle)
    with pytest.raises(BundleError, match="sha256"):
        open_bundle(bundle, hashes=True)
    os.utime(path)
    with pytest.raises(BundleError, match="sha256"):
        open_bundle(bundle)


def test_a_cache_that_cannot_be_written_costs_only_time(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.touch()
    monkeypatch.setenv("MOLMO_EDGE_CACHE", str(in_the_way / "cache"))
    open_bundle(bundle)
    flip_a_byte(bundle / "decoder.onnx")
    with pytest.raises(BundleError, match="sha256"):
        open_bundle(bundle)


@pytest.mark.parametrize("file", ["../decoder.onnx", "/etc/passwd", "a/../../b", "C:x", "..\\x", "", ".", None, 3])
def test_no_file_outside_the_bundle(bundle: Path, file: Any) -> None:
    edit(bundle, lambda m: m["components"]["decoder"].update(file=file))
    with pytest.raises(BundleError, match="not inside the bundle"):
        open_bundle(bundle)


def test_no_check_image_outside_the_bundle(bundle: Path) -> None:
    edit(bundle, lambda m: m["check"].update(image="../../secret.png"))
    with pytest.raises(BundleError, match="not inside the bundle"):
        open_bundle(bundle)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: m.update(format_version=2), "pip install --upgrade molmo-edge"),
        (lambda m: m.update(format_version="1"), r"'1' is not a supported format version \(supported: 1\)"),
        (lambda m: m.update(format_version=True), "True is not a supported format version"),
        (lambda m: m.update(format="gguf"), "not a molmo-edge bundle"),
        (lambda m: m.pop("model"), "incomplete: 'model' is missing"),
        (lambda m: m.pop("special_ids"), "incomplete: 'special_ids' is missing"),
        (lambda m: m["special_ids"].pop("eos"), "incomplete: 'eos' is missing"),
        (lambda m: m["components"].pop("decoder"), "lacks the component decoder"),
        (lambda m: m["components"]["decoder"].pop("sha256"), "incomplete: 'sha256' is missing"),
        (lambda m: m["components"]["decoder"].update(bytes="many"), "malformed"),
        (lambda m: m.update(components=[]), "malformed"),
        (lambda m: m["model"]["decoder"].update(n_heads=5), "n_heads 5"),
        (lambda m: m["model"]["decoder"].update(flux=1), "newer molmo-edge"),
        (lambda m: m["check"].update(points=[1, 2]), "malformed"),
        (lambda m: m["check"].pop("sha256"), "incomplete: 'sha256' is missing"),
        (lambda m: m["check"].update(tolerance=-1), "tolerance must be 0 to 100"),
        (lambda m: m["check"].update(tolerance=float("nan")), "tolerance must be 0 to 100"),
        (lambda m: m["check"].update(sums=[1]), "malformed"),
        (lambda m: m["components"]["decoder"].update(bytes=float("inf")), "malformed"),
        (
            lambda m: m["components"]["tokenizer"].update(file="other.json"),
            r"file must be tokenizer\.json",
        ),
        (lambda m: m["check"].update(complete="yes"), "complete must be bool"),
        (lambda m: m["check"].update(token_ids=["1"]), "a token id must be int"),
        (lambda m: m["components"]["decoder"].update(weight_errors={"w": [1]}), "malformed"),
        (lambda m: m.update(target=5), "malformed"),
        (lambda m: m.update(source="x"), "malformed"),
        (lambda m: m.update(model=[]), "not an object"),
        (lambda m: m["model"].update(image=[]), "no section for ImageConfig"),
        (lambda m: m["model"].update(projector_dim=None), "projector_dim must be int"),
        (lambda m: m["model"]["image"].update(crop_size="336"), "crop_size must be int"),
        (lambda m: m["model"]["image"].update(overlap_margins=[4]), "overlap_margins must be"),
        (lambda m: m["model"]["image"].update(pool=0), "pool must be positive"),
        (lambda m: m["model"]["vision"].update(patch_size=0), "patch_size must be positive"),
        (lambda m: m["model"]["decoder"].update(n_heads=0), "n_heads must be positive"),
        (lambda m: m["model"]["decoder"].update(rope_theta=[1]), "rope_theta must be float"),
    ],
)
def test_a_manifest_that_does_not_add_up(bundle: Path, change: Callable[[dict[str, Any]], None], says: str) -> None:
    edit(bundle, change)
    with pytest.raises(BundleError, match=says) as caught:
        open_bundle(bundle)
    assert "molmo_edge.json" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b'"x"', b"[" * 100_000], ids=range(6))
def test_a_manifest_that_is_none(bundle: Path, content: bytes) -> None:
    (bundle / "molmo_edge.json").write_bytes(content)
    with pytest.raises(BundleError, match=r"molmo_edge\.json"):
        open_bundle(bundle)


def test_a_manifest_is_written_as_it_was_read(bundle: Path) -> None:
    """Byte for byte, with and without the optional fields."""
    path = bundle / "molmo_edge.json"
    assert json.dumps(read_manifest(bundle).to_dict(), indent=1) + "\n" == path.read_text()
    content = json.loads(path.read_text())
    decoder, check = content["components"]["decoder"], content.pop("check")
    content["components"]["decoder"] = {name: decoder[name] for name in ("file", "engine", "precision", "onnxruntime")}
    content["components"]["decoder"] |= {"sha256": decoder["sha256"], "bytes": decoder["bytes"], "operators": "onnx"}
    content["components"]["decoder"] |= {"weight_errors": {"a": [0.1, 2.0]}, "largest_value": None}
    content["components"]["decoder"] |= {"kept_in_fp32": ["b", "c"], "importance": "measured"}
    content["components"]["decoder"] |= {"trained_scales": {"kept_pass": 1, "divergences": [0.25, 0.125]}}
    content["components"]["decoder"] |= {"max_error": 0.0, "relative_error": 0.25}
    content["target"] = {"name": "cuda", "device": "cuda", "defaults": "measured"}
    del content["sha256"], check["sums"]
    write_manifest(bundle, content)
    assert json.dumps(read_manifest(bundle).to_dict(), indent=1) + "\n" == path.read_text()
    content["components"]["decoder"]["largest_value"] = 7.5
    content["check"] = check
    write_manifest(bundle, content)
    assert json.dumps(Manifest.from_dict(content).to_dict(), indent=1) + "\n" == path.read_text()


def test_resolve_model_names_what_it_was_given(bundle: Path, golden: Path, tmp_path: Path) -> None:
    assert resolve_model(bundle) == bundle
    assert resolve_model(str(golden / "molmoe")) == golden / "molmoe"
    assert is_bundle(bundle)
    assert not is_bundle(golden / "molmoe")
    with pytest.raises(BundleError, match="neither a bundle"):
        resolve_model(tmp_path)
    with pytest.raises(BundleError, match="is a file"):
        resolve_model(bundle / "molmo_edge.json")
    with pytest.raises(BundleError, match="no directory"):
        resolve_model("nowhere")
    with pytest.raises(BundleError, match="no directory"):
        resolve_model("../a/b/c")
    with pytest.raises(BundleError, match="got int"):
        resolve_model(7)  # type: ignore[arg-type]


def test_a_tokenizer_that_is_not_the_graphs_is_refused(bundle: Path, golden: Path) -> None:
    assert load_tokenizer(bundle).special.im_patch == 502
    assert load_tokenizer(golden / "molmoe").special.im_patch == 502
    edit(bundle, lambda m: m["special_ids"].update(im_patch=501))
    with pytest.raises(BundleError, match="im_patch at 502, the manifest says 501"):
        load_tokenizer(bundle)
    with pytest.raises(BundleError, match="im_patch"):
        Molmo(bundle)
    flip_a_byte(bundle / "tokenizer.json")
    with pytest.raises(BundleError, match="sha256"):
        load_tokenizer(bundle)


@pytest.mark.parametrize("name", ["decoder.onnx.data", "decoder.onnx_data"])
def test_weights_beside_a_graph_must_be_listed(bundle: Path, name: str) -> None:
    (bundle / name).write_bytes(b"weights")
    with pytest.raises(BundleError, match=f"{name} is not in the manifest"):
        open_bundle(bundle)
    entry = {"file": name, "bytes": 7, "sha256": hashlib.sha256(b"weights").hexdigest()}
    edit(bundle, lambda m: m["components"].update(decoder_data=entry))
    open_bundle(bundle)


def test_the_checks_own_image_is_verified(bundle: Path) -> None:
    check = open_bundle(bundle).check
    assert check is not None
    flip_a_byte(bundle / check.image.file)
    open_bundle(bundle)  # does not verify the image
    with pytest.raises(BundleError, match="does not have the sha256"):
        check_bundle(bundle, threads=1)


def test_another_models_answers_fail_the_check(bundle: Path, golden: Path, tmp_path: Path) -> None:
    """All files match the manifest, but one matrix was damaged before the export."""
    torch = pytest.importorskip("torch")
    from molmo_edge.export import export_bundle
    from molmo_edge.modeling import load_checkpoint, save_checkpoint

    model, _, _ = load_checkpoint(golden / "molmoe")
    with torch.no_grad():
        model.decoder.blocks[1].attn.attn_out.weight.mul_(-1)
    save_checkpoint(model, golden / "molmoe" / "tokenizer.json", tmp_path / "damaged")
    export_bundle(tmp_path / "damaged", tmp_path / "other")
    shutil.copytree(bundle / "check", tmp_path / "other" / "check")
    check = json.loads((bundle / "molmo_edge.json").read_text())["check"]
    edit(tmp_path / "other", lambda m: m.update(check=check))
    report = check_bundle(tmp_path / "other", threads=1)
    assert not report.passed
    assert report.different is not None
    assert report.different.name == "logits"
    edit(tmp_path / "other", lambda m: m["check"].pop("sums"))  # as in older bundles
    report = check_bundle(tmp_path / "other", threads=1)
    assert not report.passed
    assert report.gap is not None
    assert report.gap > 0.5


def test_an_answer_that_does_not_stop_fails_the_check(bundle: Path) -> None:
    check = open_bundle(bundle).check
    assert check is not None
    assert not check.complete
    edit(bundle, lambda m: m["check"].update(complete=True))
    report = check_bundle(bundle, threads=1)
    assert report.token_ids[: len(check.token_ids)] == check.token_ids
    assert not report.stopped
    assert not report.exact
    assert not report.passed


def test_an_answer_that_stops_where_it_did_passes_the_check(
    bundle: Path, saying: Callable[..., Molmo], monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = saying("two dogs").ask(bundle / "check" / "photo.png", "What?")
    assert recorded.complete
    new = {"complete": True, "token_ids": list(recorded.token_ids), "points": [], "sums": None}
    edit(bundle, lambda m: m["check"].update(new))
    monkeypatch.setattr("molmo_edge.selfcheck.open_runtime", lambda *_, **__: saying("two dogs").fake)  # type: ignore[attr-defined]
    assert check_bundle(bundle).exact
    longer = saying("two dogs" + " and on" * 50).fake  # type: ignore[attr-defined]
    monkeypatch.setattr("molmo_edge.selfcheck.open_runtime", lambda *_, **__: longer)
    report = check_bundle(bundle)
    assert not report.stopped
    assert not report.passed


def test_the_check_passes_on_a_sound_copy_and_fails_on_another_answer(bundle: Path) -> None:
    report = check_bundle(bundle, threads=1)
    assert report.exact
    assert report.passed
    assert len(report.token_ids) == 8
    edit(bundle, lambda m: m["check"].update(token_ids=[1, 2, 3]))
    report = check_bundle(bundle, threads=1)
    assert not report.exact
    assert not report.passed


def test_the_check_compares_every_hash_again(bundle: Path) -> None:
    open_bundle(bundle)
    path = bundle / "vision_encoder.onnx"
    before = path.stat()
    flip_a_byte(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(BundleError, match=r"vision_encoder\.onnx"):
        check_bundle(bundle)
