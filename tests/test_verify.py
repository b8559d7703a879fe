"""`molmo-edge verify` refuses changed bundles: an edited manifest, or stages that compute other values."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fuzzed_manifests
import numpy as np
import pytest
from PIL import Image

from molmo_edge import Molmo
from molmo_edge.checkpoints.bundle import default_bundle, load_tokenizer, open_bundle
from molmo_edge.checkpoints.manifest import BundleError
from molmo_edge.errors import MolmoEdgeError
from molmo_edge.frontend.crops import ImageProcessor, load_image
from molmo_edge.selfcheck import check_bundle

Cli = Callable[..., tuple[int, str, str]]
Change = Callable[[dict[str, Any]], object]

# Edits that change answers to some photo or question, without changing the hash of a file.
HARMFUL: dict[str, Change] = {
    "mean": lambda m: m["model"]["image"].update(mean=[0.485, 0.456, 0.406]),
    "a mean in its fourth digit": lambda m: m["model"]["image"]["mean"].__setitem__(0, 0.4815),
    "std": lambda m: m["model"]["image"].update(std=[0.229, 0.224, 0.225]),
    "an exchanged std": lambda m: m["model"]["image"]["std"].reverse(),
    "overlap_margins": lambda m: m["model"]["image"].update(overlap_margins=[2, 2]),
    "one more crop": lambda m: m["model"]["image"].update(max_crops=m["model"]["image"]["max_crops"] + 1),
    "one crop less": lambda m: m["model"]["image"].update(max_crops=m["model"]["image"]["max_crops"] - 1),
    "no crops": lambda m: m["model"]["image"].update(max_crops=0),
    "resize": lambda m: m["model"]["image"].update(resize="dino"),
    "max_position_embeddings": lambda m: m["model"]["decoder"].update(max_position_embeddings=512),
    "rope_theta": lambda m: m["model"]["decoder"].update(rope_theta=1e6),
    "vocab_size": lambda m: m["model"]["decoder"].update(vocab_size=480),
    "a special id": lambda m: m["special_ids"].update(im_col=499),
    "the question": lambda m: m["check"].update(question="Point to the rocket."),
    "a recorded id": lambda m: m["check"]["token_ids"].__setitem__(0, 17),
    "recorded points": lambda m: m["check"].update(points=[[1.0, 2.0]]),
}


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_bundle, tmp_path / "bundle")


def write(bundle: Path, manifest: dict[str, Any], *, sealed: bool, settings: bool = False) -> None:
    """`sealed`: update the hash of the content; `settings`: also update the checksum of the settings."""
    if sealed:
        from molmo_edge.checkpoints.manifest import content_sha256
        from molmo_edge.sdk.stage_checksums import settings_sum

        if settings and {"model", "special_ids"} <= set(manifest) and "sums" in (manifest.get("check") or {}):
            manifest["check"]["sums"]["settings"] = settings_sum(manifest)
        manifest["sha256"] = content_sha256(manifest)
    (bundle / "molmo_edge.json").write_text(json.dumps(manifest))


def caught_by(bundle: Path) -> str:
    """Return why `verify` refuses the bundle; "" if it passes."""
    try:
        report = check_bundle(bundle, threads=1)
    except BundleError as error:
        return "its own sha256" if "changed after it was written" in str(error) else "opening"
    except MolmoEdgeError:
        return "running"
    if report.passed:
        return ""
    different = getattr(report, "different", None)
    return different.name if different else "answer"


def behaviour(bundle: Path) -> tuple[bytes, list[tuple[int, ...]]]:
    """Return pixels and tokens of some images, and answers: an edit must not change these unnoticed."""
    config, special = open_bundle(bundle, hashes=False).config.image, load_tokenizer(bundle).special
    photo = load_image(bundle / "check" / "photo.png")
    seen = b""
    for rgb in (photo, np.ascontiguousarray(photo[:90]), np.repeat(photo[:, :30], 9, axis=0)):
        prepared = ImageProcessor(config, special)(rgb)
        seen += b"".join(a.tobytes() for a in (prepared.crops, prepared.masks, prepared.tokens, prepared.token_index))
    with Molmo(bundle, threads=1) as molmo:
        answers = [molmo.ask(photo[:90], q, max_new_tokens=4).token_ids for q in ("Point to the helmet.", "What?")]
    return seen, answers


@pytest.mark.parametrize("sealed", [False, True], ids=["stale hash", "new hash"])
@pytest.mark.parametrize("name", HARMFUL)
def test_a_change_of_what_a_bundle_answers_is_refused(bundle: Path, name: str, sealed: bool, cli: Cli) -> None:
    manifest = fuzzed_manifests.read(bundle)
    HARMFUL[name](manifest)
    write(bundle, manifest, sealed=sealed)
    status, _, err = cli("verify", bundle, "--threads", 1)
    assert status == 1
    assert ("changed after it was written" in err) is not sealed
    assert err.count("\n") == 1
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("a mean in its fourth digit", "pixels"),
        ("an exchanged std", "pixels"),
        ("resize", "pixels"),
        ("one more crop", "layout"),
        ("overlap_margins", "layout"),
        ("the question", "layout"),
        ("vocab_size", "logits"),
    ],
)
def test_the_first_part_that_differs_names_the_cause(bundle: Path, name: str, part: str, cli: Cli) -> None:
    """Even if the hash of the manifest and the checksum of its settings are updated."""
    manifest = fuzzed_manifests.read(bundle)
    HARMFUL[name](manifest)
    write(bundle, manifest, sealed=True, settings=True)
    report = check_bundle(bundle, threads=1)
    assert report.different is not None
    assert report.different.name == part
    assert not report.passed
    status, out, err = cli("verify", bundle, "--threads", 1)
    assert status == 1
    assert f"DIFFERS  {part}" in out
    assert f"the checksum of {part} differs from the recorded one" in err
    found = json.loads(cli("verify", bundle, "--json", "--threads", 1)[1])
    assert [p["name"] for p in found["parts"] if not p["same"]] == [part]
    assert not found["passed"]


@pytest.mark.parametrize(
    ("within", "sealed"),
    [((), False), (("model", "special_ids"), False), (("model", "special_ids"), True)],
    ids=["any field", "model", "model, new hash"],
)
def test_every_one_of_300_fuzzed_manifests_is_refused(bundle: Path, within: tuple[str, ...], sealed: bool) -> None:
    manifest = fuzzed_manifests.read(bundle)
    passed = []
    for edit in fuzzed_manifests.edits(manifest, 300, within=within):
        write(bundle, edit.apply(manifest), sealed=sealed)
        if not caught_by(bundle):
            passed.append(str(edit))
    assert not passed


def _fuzz_with_new_hashes(bundle: Path, count: int, *, settings: bool) -> Counter[str]:
    """Of edits with a matching hash, `verify` may pass only those that change neither pixels nor answers."""
    manifest, before = fuzzed_manifests.read(bundle), behaviour(bundle)
    caught, changed = Counter[str](), []
    for edit in fuzzed_manifests.edits(manifest, count, seed=count):
        write(bundle, edit.apply(manifest), sealed=True, settings=settings)
        caught[by := caught_by(bundle)] += 1
        if not by and behaviour(bundle) != before:
            changed.append(str(edit))
    assert not changed
    return caught


@pytest.mark.parametrize("settings", [False, True], ids=["", "and sum of settings"])
def test_fuzzed_manifests_with_a_hash_to_match(bundle: Path, settings: bool) -> None:
    caught = _fuzz_with_new_hashes(bundle, 25, settings=settings)
    assert "its own sha256" not in caught
    assert caught["opening"]
    assert caught["settings"] * (not settings) + settings


@pytest.mark.slow
@pytest.mark.timeout(900)  # a busy machine took 216 s
@pytest.mark.parametrize("settings", [False, True], ids=["", "and sum of settings"])
def test_300_fuzzed_manifests_with_a_hash_to_match(bundle: Path, settings: bool) -> None:
    print(_fuzz_with_new_hashes(bundle, 300, settings=settings))


def test_an_edited_manifest_does_not_open(bundle: Path) -> None:
    manifest = fuzzed_manifests.read(bundle)
    manifest["model"]["image"]["max_crops"] = 3
    write(bundle, manifest, sealed=False)
    for use in (open_bundle, load_tokenizer, Molmo):
        with pytest.raises(BundleError, match=r"molmo_edge\.json: the manifest was changed after"):
            use(bundle)


def test_the_text_of_a_manifest_may_change_and_its_content_not(bundle: Path) -> None:
    """Git converts line ends, editors reindent, and keys have no order."""
    manifest = fuzzed_manifests.read(bundle)
    turned = json.dumps(dict(reversed(manifest.items())), indent=7, ensure_ascii=False).replace("\n", "\r\n")
    (bundle / "molmo_edge.json").write_bytes(turned.encode())
    assert check_bundle(bundle, threads=1).exact
    del manifest["sha256"]
    write(bundle, manifest, sealed=False)
    with pytest.raises(BundleError, match="changed after it was written"):  # sums came with the hash
        open_bundle(bundle)


def test_an_older_bundle_without_sums_opens_and_verify_says_that_it_checks_less(bundle: Path, cli: Cli) -> None:
    manifest = fuzzed_manifests.read(bundle)
    del manifest["sha256"], manifest["check"]["sums"], manifest["check"]["tolerance"]
    write(bundle, manifest, sealed=False)
    with Molmo(bundle, threads=1) as molmo:
        assert molmo.ask(bundle / "check" / "photo.png", "What?", max_new_tokens=2).token_ids
    status, out, err = cli("verify", bundle, "--threads", 1)
    assert status == 0
    assert "answered with the same tokens" in out
    assert "without checksums" in err
    assert "only its files and its answer are checked" in err
    assert cli("verify", bundle, "--threads", 1, "--quiet")[2] == ""


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: s.update(version=2), "pip install --upgrade"),
        (lambda s: s.pop("version"), "incomplete"),
        (lambda s: s.pop("pixels"), "incomplete"),
        (lambda s: s["logits"].update(sums="many"), "incomplete"),
        (lambda s: s.update(layout=3), "incomplete"),
    ],
)
def test_sums_that_are_not_read_are_refused(bundle: Path, change: Change, says: str) -> None:
    manifest = fuzzed_manifests.read(bundle)
    change(manifest["check"]["sums"])
    write(bundle, manifest, sealed=True)
    with pytest.raises(BundleError, match=says):
        check_bundle(bundle, threads=1)


@pytest.mark.parametrize(
    ("tolerance", "point", "passes"),
    [
        (None, [11.9, 20.0], True),  # 2 percent where the manifest does not say it
        (None, [12.1, 20.0], False),
        (1.0, [10.0, 20.9], True),
        (1.0, [11.9, 20.0], False),
        (5.0, [10.0, 16.0], True),
        (0.0, [10.0, 20.0], True),
    ],
)
def test_a_recorded_point_farther_than_the_tolerance_fails(
    bundle: Path,
    saying: Callable[..., Molmo],
    monkeypatch: pytest.MonkeyPatch,
    tolerance: float | None,
    point: list[float],
    passes: bool,
) -> None:
    molmo = saying('<point x="10.0" y="20.0" alt="a">a</point>')
    ids = molmo.ask(bundle / "check" / "photo.png", "Where?").token_ids
    manifest = fuzzed_manifests.read(bundle)
    manifest["check"].update(token_ids=list(ids), points=[point], complete=True, tolerance=tolerance)
    for unset in ("sums", *(("tolerance",) if tolerance is None else ())):
        manifest["check"].pop(unset, None)
    write(bundle, manifest, sealed=True)
    monkeypatch.setattr("molmo_edge.selfcheck.open_runtime", lambda *_, **__: molmo.fake)  # type: ignore[attr-defined]
    report = check_bundle(bundle)
    assert report.token_ids == ids
    assert report.passed is passes


def test_sums_pass_on_engines_that_round_otherwise(tmp_path: Path) -> None:
    """In eight bits, changing every pixel by a millionth changes the integers it is rounded to."""
    pytest.importorskip("onnx")
    from exported import GOLDEN

    from molmo_edge.export import CheckPhoto, export_bundle
    from molmo_edge.frontend.prompts import image_ids
    from molmo_edge.runtimes import open_runtime
    from molmo_edge.runtimes.prompt_embeddings import image_embeddings
    from molmo_edge.sdk import stage_checksums as sums

    for precision in ("fp32", "int8"):
        out = tmp_path / precision
        export_bundle(GOLDEN / "molmoe", out, precision, check=CheckPhoto(GOLDEN / "astronaut.png", "What?", 8))
        recorded = fuzzed_manifests.read(out)["check"]["sums"]
        runtime, tokenizer = open_runtime(out, threads=2), load_tokenizer(out)
        image = ImageProcessor(runtime.config.image, tokenizer.special)(load_image(GOLDEN / "astronaut.png"))
        noise = np.random.default_rng(0).choice([-1e-6, 1e-6], image.crops.shape).astype(np.float32)
        for scale, same in ((0, True), (1, True), (1e6, False)):
            image.crops[...] *= 1 + scale * noise
            found = sums.array_sum(image_embeddings(runtime, image, image_ids(tokenizer, image)))
            part = sums.compare("features", recorded["features"], found, [precision])
            assert part.same is same, (precision, scale, part)


def test_signed_sums_tell_how_far_arrays_are_apart() -> None:
    from molmo_edge.sdk import stage_checksums as sums

    random = np.random.default_rng(0)
    exact = random.normal(size=(7, 300, 40)).astype(np.float32)
    recorded = json.loads(json.dumps(sums.array_sum(exact)))
    assert sums.compare("pixels", recorded, sums.array_sum(exact)).same
    assert sums.compare("pixels", recorded, sums.array_sum(exact * (1 + 1e-7))).same
    for size in (1e-4, 0.01, 0.3):
        part = sums.compare("pixels", recorded, sums.array_sum(exact + size * random.normal(size=exact.shape)))
        assert not part.same
        assert part.distance == pytest.approx(size, rel=0.5)
    one = exact.copy()
    one[3, 123, 5] += 0.1  # a single value of 84,000
    assert not sums.compare("pixels", recorded, sums.array_sum(one)).same
    assert sums.compare("pixels", recorded, sums.array_sum(exact[:, :-1])).distance is None
    assert not sums.compare("features", recorded, sums.array_sum(exact * np.nan), ["fp32"]).same
    shifted = sums.logits_sum(exact[0, 0]), sums.logits_sum(exact[0, 0] + 5)
    assert sums.compare("logits", *shifted, ["fp32"]).distance == pytest.approx(0, abs=1e-6)


# nano, by name and as a source.


def test_verify_takes_nano_by_name(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, err = cli("verify", "nano", "--json", "--quiet")
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert found["name"] == "nano"
    assert found["passed"]
    assert [p["name"] for p in found["parts"]][-1] == "logits"
    status, _, err = cli("verify", "nowhere")
    assert status == 1
    assert "there is no directory nowhere" in err
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    assert cli("verify", tmp_path / "a.png")[0] == 1


def test_a_checkpoint_is_not_verified(golden: Path, cli: Cli) -> None:
    status, _, err = cli("verify", golden / "molmoe")
    assert status == 1
    assert "molmo_edge.json is missing" in err


def test_a_bundle_made_of_a_bundle_keeps_its_check(bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    from molmo_edge.export import export_bundle

    manifest = fuzzed_manifests.read(bundle)
    manifest["check"]["tolerance"] = 1.25
    write(bundle, manifest, sealed=True)
    made = export_bundle(bundle, tmp_path / "int8", "int8", measure=False)["check"]
    assert made["question"] == "Point to the helmet."
    assert made["tolerance"] == 1.25
    assert made["sha256"] == manifest["check"]["sha256"]
    assert len(made["token_ids"]) == 8
    assert made["sums"]["features"] != manifest["check"]["sums"]["features"]
    assert made["sums"]["pixels"] == manifest["check"]["sums"]["pixels"]
    report = check_bundle(tmp_path / "int8", threads=1)
    assert report.exact
    assert report.passed


@pytest.mark.slow
def test_an_export_of_nano_keeps_its_check(cli: Cli, tmp_path: Path) -> None:
    assert cli("export", "nano", "--out", tmp_path / "copy", "--quiet")[0] == 0
    made = fuzzed_manifests.read(tmp_path / "copy")["check"]
    shipped = fuzzed_manifests.read(default_bundle())["check"]
    assert made["question"] == shipped["question"]
    assert len(made["points"]) == len(shipped["points"]) > 0
    assert cli("verify", tmp_path / "copy", "--quiet")[0] == 0
