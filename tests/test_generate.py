"""The sampling loop on a runtime with scripted logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from molmo_edge import Molmo
from molmo_edge.runtimes.generate import GenerationError, Sampling, generate, generate_batch, next_token
from molmo_edge.selfcheck import logit_gaps

VOCAB, ROWS, EOS = 10, 12, 9


@dataclass
class Cache:
    capacity: int = 100
    length: int = 0

    def copy(self) -> Cache:
        return Cache(self.capacity, self.length)


@dataclass
class Scripted:
    """The n-th forward prefers the n-th id."""

    script: list[int]
    fed: list[int] = field(default_factory=list)

    def embed(self, ids: np.ndarray) -> np.ndarray:
        return ids[:, None].astype(np.float32)

    def forward(self, embeddings: np.ndarray, cache: Cache) -> np.ndarray:
        cache.length += len(embeddings)
        self.fed += [int(e[0]) for e in embeddings]
        logits = np.linspace(0, 0.1, ROWS, dtype=np.float32)
        logits[VOCAB:] = 50  # rows without a token
        logits[self.script.pop(0)] = 5
        return logits


def run(script: list[int], prompt: int = 3, **settings: object) -> tuple[list[int], Scripted, Cache]:
    capacity = int(settings.pop("capacity", 100))  # type: ignore[call-overload]
    runtime, cache = Scripted(script), Cache(capacity)
    tokens = generate(
        runtime,  # type: ignore[arg-type]
        np.zeros((prompt, 1), np.float32),
        cache,
        Sampling(**settings),  # type: ignore[arg-type]
        eos_id=EOS,
        vocab_size=VOCAB,
        capacity=capacity,
    )
    return list(tokens), runtime, cache


def test_greedy_takes_the_likeliest_and_stops_at_eos() -> None:
    tokens, runtime, cache = run([4, 2, 7, EOS, 1])
    assert tokens == [4, 2, 7]
    assert runtime.fed == [0, 0, 0, 4, 2, 7]
    assert cache.length == 6


def test_eos_at_once_is_an_empty_answer() -> None:
    assert run([EOS])[0] == []


def test_stops_at_max_new_tokens_without_a_last_forward() -> None:
    tokens, runtime, cache = run([1, 2, 3, 4, 5], max_new_tokens=3)
    assert tokens == [1, 2, 3]
    assert len(runtime.script) == 2
    assert cache.length == 5


def test_stops_where_the_context_ends() -> None:
    tokens, _, cache = run([1, 2, 3, 4, 5, 6], prompt=3, capacity=5)
    assert tokens == [1, 2, 3]  # two are fed back, the third comes from the last logits
    assert cache.length == 5


def test_a_prompt_past_the_context_is_refused_before_it_runs() -> None:
    with pytest.raises(GenerationError, match=r"101 positions.*has 100"):
        run([1], prompt=101)


def test_rows_behind_the_vocabulary_are_never_chosen() -> None:
    logits = np.full(ROWS, 100, np.float32)
    logits[:VOCAB] = 0
    tokens = [next_token(logits[:VOCAB], Sampling(temperature=5.0), np.random.default_rng(s)) for s in range(50)]
    assert max(tokens) < VOCAB
    assert run([3, EOS])[0] == [3]  # Scripted always prefers row 10


def test_nan_logits_are_an_error_and_not_a_token() -> None:
    logits = np.zeros(VOCAB, np.float32)
    logits[4] = np.nan
    for temperature in (0.0, 1.0):
        with pytest.raises(GenerationError, match="logits are NaN"):
            next_token(logits, Sampling(temperature=temperature), np.random.default_rng(0))


BAD = {
    "one +inf": [0, np.inf, 0],
    "+inf beside NaN": [np.inf, 0, np.nan],
    "+inf beside -inf": [-np.inf, np.inf, 0],
    "-inf everywhere": [-np.inf] * 3,
    "NaN everywhere": [np.nan] * 3,
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("temperature", [0.0, 1e-320, 0.7, 1e30])
@pytest.mark.parametrize("top", [{}, {"top_k": 1}, {"top_k": 2, "top_p": 0.5}])
@pytest.mark.parametrize("name", BAD)
def test_logits_that_are_not_finite_are_one_clear_error(name: str, temperature: float, top: dict[str, float]) -> None:
    sampling = Sampling(temperature=temperature, **top)  # type: ignore[arg-type]
    for dtype in (np.float32, np.float64, np.float16):
        with pytest.raises(GenerationError, match=r"the model's logits are (infinite|NaN): .*molmo-edge verify"):
            next_token(np.array(BAD[name], dtype), sampling, np.random.default_rng(0))


def test_infinite_logits_stop_a_stream_and_a_batch() -> None:
    class Broken(Scripted):
        def forward(self, embeddings: np.ndarray, cache: Cache) -> np.ndarray:
            logits = super().forward(embeddings, cache)
            logits[3] = np.inf if len(self.fed) > 4 else logits[3]
            return logits

        def forward_batch(self, embeddings: np.ndarray, batch: Cache) -> np.ndarray:
            return self.forward(embeddings, batch)[None]

    for temperature in (0.0, 0.8):
        sampling = Sampling(temperature=temperature, top_k=1)
        runtime: Any = Broken([4, 2, 7, EOS])
        ids = generate(
            runtime, np.zeros((3, 1), np.float32), Cache(), sampling, eos_id=EOS, vocab_size=VOCAB, capacity=100
        )
        assert [next(ids), next(ids)] == [4, 2]
        with pytest.raises(GenerationError, match="infinite"):
            next(ids)
        runtime = Broken([4, 2, 7, EOS])
        prefilled = runtime.forward(np.zeros((3, 1), np.float32), Cache())[None], Cache()
        with pytest.raises(GenerationError, match="infinite"):
            generate_batch(runtime, prefilled, sampling, [9], eos_id=EOS, vocab_size=VOCAB)


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_a_molmo_whose_logits_are_not_finite_says_so(saying: Callable[..., Molmo], value: float) -> None:
    molmo = saying("two dogs")
    forward = molmo.fake.forward  # type: ignore[attr-defined]
    molmo.fake.forward = lambda *given: np.where(np.arange(512) == 7, value, forward(*given)[:512])  # type: ignore[attr-defined]
    photo = np.zeros((30, 40, 3), np.uint8)
    for ask in (
        lambda: molmo.ask(photo, "What?"),
        lambda: molmo.ask(photo, "What?", temperature=0.7, seed=1),
        lambda: molmo.ask_batch([(photo, "What?")]),
        lambda: logit_gaps(molmo.engine, photo, "What?", [1, 2]),
    ):
        with pytest.raises(GenerationError, match="the model's logits are"):
            ask()
    for wrong in (-1, 500, 10**9):
        with pytest.raises(GenerationError, match=f"{wrong} is not an id of this model"):
            logit_gaps(saying("two dogs").engine, photo, "What?", [1, wrong])


@pytest.mark.filterwarnings("error")
def test_ids_at_minus_infinity_are_never_drawn() -> None:
    logits = np.array([-np.inf, 0.5, -np.inf, 0.4], np.float32)
    for temperature in (0.0, 1e-320, 1.0, 1e30):
        drawn = {next_token(logits, Sampling(temperature=temperature), np.random.default_rng(s)) for s in range(40)}
        assert drawn <= {1, 3}
        assert temperature >= 1 or drawn == {1}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("temperature", [1e-320, 5e-324, 1e-45, Fraction(1, 10**400), np.float32(1e-45), 1e300])
def test_a_temperature_however_small_or_large_draws_without_a_warning(temperature: float) -> None:
    logits = np.array([1.0, 3.0, 2.0, -3e38], np.float32)
    sampling = Sampling(temperature=temperature)
    drawn = {next_token(logits, sampling, np.random.default_rng(seed)) for seed in range(40)}
    assert drawn == {1} if temperature < 1 else len(drawn) > 1


def draws(n: int = 4000, **settings: float) -> np.ndarray:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    random = np.random.default_rng(7)
    sampling = Sampling(**settings)  # type: ignore[arg-type]
    return np.bincount([next_token(logits, sampling, random) for _ in range(n)], minlength=4) / n


def test_temperature_one_draws_the_models_own_probabilities() -> None:
    assert draws(temperature=1.0) == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.03)


def test_temperature_sharpens_and_flattens() -> None:
    # p ** (1 / t), normalised
    assert draws(temperature=0.5) == pytest.approx(np.array([0.25, 0.09, 0.0225, 0.0025]) / 0.365, abs=0.03)
    assert draws(temperature=100.0) == pytest.approx([0.25] * 4, abs=0.03)


def test_top_k_and_top_p_keep_the_head_of_the_distribution() -> None:
    assert draws(temperature=1.0, top_k=2) == pytest.approx([0.625, 0.375, 0, 0], abs=0.03)
    assert draws(temperature=1.0, top_p=0.6) == pytest.approx([0.625, 0.375, 0, 0], abs=0.03)
    assert draws(temperature=1.0, top_p=0.01)[0] == 1.0
    assert draws(temperature=1.0, top_k=1)[0] == 1.0


def test_a_seed_repeats_the_draw() -> None:
    def sample(seed: int) -> list[int]:
        return run([1] * 20, temperature=50.0, max_new_tokens=20, seed=seed)[0]

    assert sample(3) == sample(3)
    assert any(sample(3) != sample(seed) for seed in range(4, 8))


@pytest.mark.parametrize(
    "settings",
    [
        {"max_new_tokens": 0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"seed": -1},
        {"max_new_tokens": "5"},
        {"max_new_tokens": 2.5},
        {"temperature": None},
        {"temperature": "hot"},
        {"top_k": None},
        {"top_p": "all"},
        {"seed": 1.5},
    ],
)
def test_settings_of_another_type_or_out_of_range(settings: dict[str, object]) -> None:
    (name,) = settings
    with pytest.raises(GenerationError, match=name):
        Sampling(**settings)  # type: ignore[arg-type]


def test_numpys_numbers_are_numbers() -> None:
    assert Sampling(np.int64(3), np.float32(0.5), seed=np.int32(1)).max_new_tokens == 3  # type: ignore[arg-type]
