"""The sampling loop on a runtime whose logits are written down."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest

from molmo_edge.generate import GenerationError, Sampling, generate, next_token

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
    assert len(runtime.script) == 2 and cache.length == 5


def test_stops_where_the_context_ends() -> None:
    tokens, _, cache = run([1, 2, 3, 4, 5, 6], prompt=3, capacity=5)
    assert tokens == [1, 2, 3]  # two fed back, the third read off the last logits
    assert cache.length == 5


def test_a_prompt_past_the_context_is_refused_before_it_runs() -> None:
    with pytest.raises(GenerationError, match=r"101 positions.*holds 100"):
        run([1], prompt=101)


def test_rows_behind_the_vocabulary_are_never_chosen() -> None:
    logits = np.full(ROWS, 100, np.float32)
    logits[:VOCAB] = 0
    tokens = [next_token(logits[:VOCAB], Sampling(temperature=5.0), np.random.default_rng(s)) for s in range(50)]
    assert max(tokens) < VOCAB
    assert run([3, EOS])[0] == [3]  # Scripted prefers row 10 all along


def test_nan_logits_are_an_error_and_not_a_token() -> None:
    logits = np.zeros(VOCAB, np.float32)
    logits[4] = np.nan
    for temperature in (0.0, 1.0):
        with pytest.raises(GenerationError, match="not numbers"):
            next_token(logits, Sampling(temperature=temperature), np.random.default_rng(0))


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
