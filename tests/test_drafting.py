"""Drafted answers: ids equal to those without drafts, in the loop on a scripted runtime and on the engines."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from exported import CASES, GOLDEN, bundle, case, gguf_bundle, gguf_runtime, prompt, relative, runtime
from hypothesis import given, settings
from hypothesis import strategies as st

from molmo_edge import Molmo
from molmo_edge.checkpoints.bundle import open_bundle
from molmo_edge.errors import EngineError
from molmo_edge.export import ExportError, ExportOptions, export_bundle
from molmo_edge.export.options import check_options
from molmo_edge.frontend.points import format_count, format_points
from molmo_edge.frontend.tokenizer import Tokenizer
from molmo_edge.runtimes.constraint import OneOf
from molmo_edge.runtimes.drafting import Drafts, PointDrafter, Trust, choose_trust
from molmo_edge.runtimes.generate import Sampling, generate
from molmo_edge.runtimes.protocol import DRAFT_ROWS

TOKENIZER = Tokenizer.from_file(GOLDEN / "molmoe" / "tokenizer.json")
EOS, VOCAB = TOKENIZER.special.eos, 512
ONE, TWO = [(50.5, 40.0)], [(1.0, 20.5), (77.7, 3.0)]
TEXTS = [
    format_points(ONE, "cup"),
    format_points(TWO, "red cups"),
    format_count([*TWO, *ONE], "cups"),
    '<point x="5.5" y="6.5" alt="cups">dogs</point>, and <points x1="zz',
    "There are none.",
]


@dataclass
class Cache:
    """The ids of its positions; lowering `length` forgets the last ones for good."""

    capacity: int
    ids: list[int] = field(default_factory=list)

    @property
    def length(self) -> int:
        return len(self.ids)

    @length.setter
    def length(self, value: int) -> None:
        assert value <= len(self.ids)
        del self.ids[value:]


@dataclass
class Scripted:
    """Logits that depend on all ids so far, and prefer to continue `script`."""

    script: list[int]
    strength: float = 6.0
    rounding: float = 0.0  # what a run of several positions adds to its logits
    drafts: str = "exact"
    runs: list[int] = field(default_factory=list)

    def embed(self, ids: np.ndarray) -> np.ndarray:
        return ids[:, None].astype(np.float32)

    def forward(self, embeddings: np.ndarray, cache: Cache) -> np.ndarray:
        self.runs.append(len(embeddings))
        return self._rows(embeddings, cache)[-1]

    def forward_each(self, embeddings: np.ndarray, cache: Cache) -> np.ndarray:
        assert 1 < len(embeddings) <= DRAFT_ROWS
        self.runs.append(len(embeddings))
        return self._rows(embeddings, cache) + np.float32(self.rounding)

    def _rows(self, embeddings: np.ndarray, cache: Cache) -> np.ndarray:
        rows = []
        for token in embeddings[:, 0]:
            cache.ids.append(int(token))
            assert len(cache.ids) <= cache.capacity
            row = np.random.default_rng([i + 1 for i in cache.ids]).standard_normal(VOCAB).astype(np.float32)
            at = len(cache.ids) - 1
            row[self.script[at] if at < len(self.script) else EOS] += self.strength
            rows.append(row)
        return np.stack(rows)


def run(
    runtime: Any, sampling: Sampling, drafts: Drafts | None, constraint: Any = None, capacity: int = 400
) -> tuple[list[int], Cache]:
    cache = Cache(capacity)
    tokens = generate(
        runtime,
        np.zeros((1, 1), np.float32),
        cache,  # type: ignore[arg-type]
        sampling,
        eos_id=EOS,
        vocab_size=VOCAB,
        capacity=capacity,
        constraint=constraint,
        drafts=drafts,
    )
    return list(tokens), cache


def drafts_of(label: str = "cups", *, checked: bool = False) -> Drafts:
    return Drafts(PointDrafter(TOKENIZER, label), Trust(checked=checked))


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(TEXTS),
    st.lists(st.tuples(st.integers(0, 60), st.integers(0, 400)), max_size=4),
    st.sampled_from([0.0, 0.7, 1.5]),
    st.integers(0, 5),
    st.integers(1, 80),
    st.booleans(),
    st.sampled_from([3.0, 8.0]),
    st.sampled_from([20, 400]),
)
def test_ids_equal_those_without_drafts(
    text: str,
    changes: list[tuple[int, int]],
    temperature: float,
    seed: int,
    most: int,
    checked: bool,
    strength: float,
    capacity: int,
) -> None:
    script = TOKENIZER.encode(f" {text}")
    for at, token in changes:
        script[at % len(script)] = token
    sampling = Sampling(most, temperature, seed=seed)
    plain, drafted = Scripted(script, strength), Scripted(script, strength)
    drafts = drafts_of(checked=checked)
    ids, cache = run(plain, sampling, None, capacity=capacity)
    found, drafted_cache = run(drafted, sampling, drafts, capacity=capacity)
    assert found == ids
    assert drafted_cache.ids == cache.ids, "positions that were refused are forgotten"
    if not checked:
        assert len(drafted.runs) + drafts.accepted == len(plain.runs), "each accepted id saves a run"


def test_points_take_less_than_half_the_runs() -> None:
    script = TOKENIZER.encode(f" {format_count(TWO, 'cups')}")
    plain, drafted = Scripted(script, 20.0), Scripted(script, 20.0)
    ids, _ = run(plain, Sampling(), None)
    found, _ = run(drafted, Sampling(), drafts_of())
    assert ids == found == script
    assert len(drafted.runs) < 0.5 * len(plain.runs)


def test_a_constrained_answer_is_equal() -> None:
    choices = [format_points(ONE, "cup"), format_points(TWO, "cups"), "There are none."]
    for script in ([], TOKENIZER.encode(f" {choices[1]}")):
        ids, _ = run(Scripted(script, 2.0), Sampling(), None, OneOf.of(choices, TOKENIZER))
        drafts = drafts_of()
        found, _ = run(Scripted(script, 2.0), Sampling(), drafts, OneOf.of(choices, TOKENIZER))
        assert found == ids
        assert (drafts.accepted > 0) == ("<" in TOKENIZER.decode(ids))


@pytest.mark.parametrize("rounding", [1e-6, float("nan")])
def test_it_stops_where_several_positions_round_differently(rounding: float) -> None:
    script = TOKENIZER.encode(f" {TEXTS[1]}")
    trust = Trust(checked=True)
    drafts = Drafts(PointDrafter(TOKENIZER, "red cups"), trust)
    ids, _ = run(Scripted(script, 20.0), Sampling(), None)
    found, _ = run(Scripted(script, 20.0, rounding), Sampling(), drafts)
    assert found == ids
    assert not trust.allowed
    assert drafts.accepted == 0


def test_it_is_trusted_after_some_equal_rows() -> None:
    script, trust = TOKENIZER.encode(f" {TEXTS[1]}"), Trust(checked=True)
    first, second = (Drafts(PointDrafter(TOKENIZER, "red cups"), trust) for _ in range(2))
    run(Scripted(script, 20.0), Sampling(), first)
    assert trust.complete
    run(Scripted(script, 20.0), Sampling(), second)
    assert 0 < first.accepted < second.accepted


def test_closing_in_the_middle_leaves_the_ids_that_were_chosen() -> None:
    script = TOKENIZER.encode(f" {TEXTS[2]}")
    runtime, cache = Scripted(script, 20.0), Cache(200)
    tokens = generate(
        runtime,  # type: ignore[arg-type]
        np.zeros((1, 1), np.float32),
        cache,  # type: ignore[arg-type]
        Sampling(),
        eos_id=EOS,
        vocab_size=VOCAB,
        capacity=200,
        drafts=drafts_of(),
    )
    seen = [next(tokens) for _ in range(9)]
    tokens.close()
    assert seen == script[:9]
    assert cache.ids in ([0, *seen], [0, *seen[:-1]])


@pytest.mark.parametrize("name", ["golden/molmoe", "golden/qwen", "golden2/molmo2_qwen3", "golden2/molmo2_olmo3"])
def test_drafts_are_the_ids_that_the_tokenizer_gives(name: str) -> None:
    tokenizer = Tokenizer.from_file(GOLDEN.parent / name / "tokenizer.json")
    texts = [f" {format_count(TWO, 'red cups')}", f" {format_points(ONE, 'cup')}"]
    if tokenizer.special.chat_markup:
        texts = ['<points coords="1 1 105 200 2 300 400">red cups</points>']
    for text in texts:
        ids, drafter, drafted = tokenizer.encode(text), PointDrafter(tokenizer, "red cups"), 0
        at = 0
        while at < len(ids):
            drafter.feed(ids[at])
            at += 1
            for token in drafter.draft(DRAFT_ROWS - 1):
                if at == len(ids) or token != ids[at]:
                    break
                drafter.feed(token)
                at, drafted = at + 1, drafted + 1
        assert drafted > 0.4 * len(ids), text


# The engines.


def check_rows(engine: Any, rows: np.ndarray, tolerance: float | None) -> None:
    """Compare `forward_each` with single runs, also after a part of it was forgotten. `tolerance` None: bits."""

    def same(found: np.ndarray, exact: np.ndarray) -> bool:
        return np.array_equal(found, exact) if tolerance is None else relative(found, exact) < tolerance

    start, n = len(rows) - 24, 24
    cache = engine.new_cache(len(rows))
    engine.forward(rows[:start], cache)
    single, several = cache.copy(), cache.copy()
    exact = np.stack([engine.forward(row[None], single) for row in rows[start:]])
    at = 0
    for count in (5, 2, 9, 8):
        found = engine.forward_each(rows[start + at : start + at + count], several)
        assert found.shape == (count, exact.shape[1])
        assert same(found, exact[at : at + count])
        at += count
    assert at == n
    assert several.length == single.length
    assert several.length == several.capacity
    several.length = start + 3  # as after a refused draft
    again = np.stack([engine.forward(row[None], several) for row in rows[start + 3 : start + 6]])
    assert same(again, exact[3:6])
    twin = several.copy()
    assert same(engine.forward_each(rows[start + 6 : start + 9], twin), exact[6:9])
    if hasattr(twin, "arrays"):
        stored = engine.load_cache(several.arrays(), several.length, several.capacity)
        assert same(engine.forward_each(rows[start + 6 : start + 8], stored), exact[6:8])


@pytest.mark.parametrize(
    ("architecture", "precision"),
    [("molmoe", "fp32"), ("molmoe", "int8"), ("molmoe", "q8"), ("qwen", "int8"), ("olmo", "q8")],
)
def test_onnx_runs_of_several_positions_have_the_same_bits(architecture: str, precision: str) -> None:
    engine = runtime(architecture, precision, drafting=True)
    assert engine.drafts == "exact"
    rows = prompt(engine, case(architecture, CASES[0]))
    check_rows(engine, rows, None)


def test_the_normal_graph_gives_the_same_logits() -> None:
    rows = prompt(runtime("molmoe"), case("molmoe", CASES[0]))
    found = []
    for engine in (runtime("molmoe"), runtime("molmoe", drafting=True)):
        cache = engine.new_cache(len(rows))
        engine.forward(rows[:-1], cache)
        found.append(engine.forward(rows[-1:], cache))
    assert relative(found[1], found[0]) < 1e-5


def test_llama_gives_logits_of_several_positions() -> None:
    pytest.importorskip("llama_cpp")
    pytest.importorskip("gguf")
    engine = gguf_runtime("molmoe", "f32")
    assert engine.drafts == "rounded"
    check_rows(engine, prompt(engine, case("molmoe", CASES[0])), 1e-4)


def test_torch_gives_logits_of_several_positions() -> None:
    from molmo_edge.runtimes.torch import TorchRuntime

    engine = TorchRuntime(GOLDEN / "molmoe", precision="fp32", threads=1)
    assert engine.drafts == "rounded"
    check_rows(engine, prompt(engine, case("molmoe", CASES[0])), 1e-4)


MODELS: dict[str, Callable[[], Path]] = {
    "onnx": lambda: bundle("molmoe", "fp32", drafting=True),
    "onnx-int8": lambda: bundle("molmoe", "int8", drafting=True),
    "llama": lambda: gguf_bundle("molmoe", "f32"),
    "torch": lambda: GOLDEN / "molmoe",
}


@pytest.mark.parametrize("kind", MODELS)
def test_answers_are_equal_on_every_engine(kind: str) -> None:
    """The golden models have random weights: a pattern makes them point, and the digits are theirs."""
    pytest.importorskip("llguidance")
    if kind == "llama":
        pytest.importorskip("llama_cpp")
        pytest.importorskip("gguf")
    point = r'<point x="[0-9][0-9]\.[0-9]" y="[0-9][0-9]\.[0-9]" alt="(red )?cups">[a-z ]{1,9}</point>'
    image = GOLDEN / "coffee.png"
    with (
        Molmo(MODELS[kind](), draft=True, max_crops=0) as drafting,
        Molmo(MODELS[kind](), draft=False, max_crops=0) as plain,
    ):
        scenes = [molmo.encode(image) for molmo in (drafting, plain)]
        for options in ({}, {"temperature": 1.0, "seed": 3}, {"temperature": 2.0, "seed": 4, "top_k": 20}):
            first, second = (
                molmo.ask(scene, "Point to the cups.", regex=point, max_new_tokens=60, **options)  # type: ignore[arg-type]
                for molmo, scene in zip((drafting, plain), scenes, strict=True)
            )
            assert first == second
            assert re.fullmatch(point, first.text) or not first.complete
            assert first.usage.tokens.drafted > 5
            assert second.usage.tokens.drafted == 0
        chats = [molmo.chat(scene) for molmo, scene in zip((drafting, plain), scenes, strict=True)]
        turns = [
            [chat.ask(question, regex=point, max_new_tokens=40) for question in ("Point to the cups.", "And now?")]
            for chat in chats
        ]
        assert turns[0] == turns[1]
        assert chats[0].positions == chats[1].positions


def test_without_being_asked_only_equal_bits_are_used() -> None:
    pytest.importorskip("llguidance")
    point = r'<point x="[0-9][0-9]\.[0-9]" y="[0-9][0-9]\.[0-9]" alt="cups">cups</point>'
    image = GOLDEN / "coffee.png"
    found = []
    for path in (bundle("molmoe"), bundle("molmoe", "fp32", drafting=True)):
        with Molmo(path, max_crops=0) as molmo:
            answers = [molmo.ask(image, "Point to the cups.", regex=point, max_new_tokens=60) for _ in range(2)]
            found.append([answer.usage.tokens.drafted for answer in answers])
    assert found[0] == [0, 0], "a bundle that was exported without the option does not draft"
    assert 0 < found[1][0] < found[1][1], "the first answer checks the first runs"


def test_what_cannot_draft_says_so() -> None:
    with pytest.raises(EngineError, match="--drafting"):
        Molmo(bundle("molmoe"), draft=True)
    with pytest.raises(EngineError, match="draft must be True, False or None"):
        Molmo(bundle("molmoe"), draft="yes")  # type: ignore[arg-type]
    engine, cache = runtime("molmoe"), runtime("molmoe").new_cache(4)
    with pytest.raises(EngineError, match="export it with the option drafting"):
        engine.forward_each(np.zeros((2, engine.config.decoder.d_model), np.float32), cache)
    grounded = SimpleNamespace(config=SimpleNamespace(point_head=object()), drafts="")
    with pytest.raises(EngineError, match="grounding tokens"):
        choose_trust(grounded, True)  # type: ignore[arg-type]
    assert choose_trust(grounded, None) is None  # type: ignore[arg-type]


def test_the_manifest_says_whether_a_bundle_drafts() -> None:
    path = bundle("molmoe", "fp32", drafting=True)
    components = json.loads((path / "molmo_edge.json").read_text(encoding="utf-8"))["components"]
    assert components["decoder"]["drafting"] is True
    assert not any("drafting" in component for name, component in components.items() if name != "decoder")
    assert open_bundle(path).components["decoder"].drafting
    assert not open_bundle(bundle("molmoe")).components["decoder"].drafting


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (ExportOptions("fp32", plain=True, drafting=True), "ONNX Runtime's operators"),
        (ExportOptions("f16", "gguf", drafting=True), "leave drafting out"),
    ],
)
def test_exports_that_cannot_draft_are_refused(options: ExportOptions, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        check_options(options)


def test_a_model_with_grounding_tokens_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="grounding tokens"):
        export_bundle(GOLDEN.parent / "golden2" / "molmo_point", tmp_path / "out", drafting=True)


def test_molmo2_drafts_with_bidirectional_images(tmp_path: Path) -> None:
    """The rows of a prompt of images, which has a mask, and what follows."""
    out = tmp_path / "out"
    export_bundle(GOLDEN.parent / "golden2" / "molmo2_qwen3", out, measure=False, drafting=True)
    pytest.importorskip("llguidance")
    point = r'<points coords="1 1 [0-9][0-9][0-9] [0-9][0-9][0-9] 2 [0-9][0-9][0-9] [0-9][0-9][0-9]">cups</points>'
    found = []
    for draft in (True, False):
        with Molmo(out, draft=draft, max_crops=1) as molmo:
            found.append(molmo.ask(GOLDEN / "coffee.png", "Point to the cups.", regex=point, max_new_tokens=60))
    assert found[0] == found[1]
    assert found[0].usage.tokens.drafted > 5


def test_the_command_line_has_the_option(cli: Callable[..., tuple[int, str, str]]) -> None:
    path, photo = bundle("molmoe"), GOLDEN / "coffee.png"
    status, _, error = cli("ask", photo, "What is this?", "--model", path, "--draft", "--max-new-tokens", "2")
    assert (status, "--drafting" in error) == (1, True)
    drafting = bundle("molmoe", "fp32", drafting=True)
    outs = [
        json.loads(cli("ask", photo, "What?", "--model", drafting, option, "--max-new-tokens", "3", "--json")[1])
        for option in ("--draft", "--no-draft")
    ]
    assert outs[0]["token_ids"] == outs[1]["token_ids"]
    assert outs[0]["usage"]["tokens"]["drafted"] == 0


def test_it_drafts_where_image_tokens_are_left_out() -> None:
    pytest.importorskip("llguidance")
    point = r'<point x="[0-9][0-9]\.[0-9]" y="[0-9][0-9]\.[0-9]" alt="cups">cups</point>'
    found = []
    for draft in (True, False):
        with Molmo(bundle("molmoe", "fp32", drafting=True), draft=draft, max_crops=0, image_tokens=0.5) as molmo:
            found.append(molmo.ask(GOLDEN / "coffee.png", "Point to the cups.", regex=point, max_new_tokens=60))
    assert found[0] == found[1]
    assert found[0].usage.tokens.drafted > 5
    assert found[0].usage.tokens.dropped
