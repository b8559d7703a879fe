"""The sampling loop. Knows no engine: it sees embeddings go in and logits come out.

Greedy is the default and what every parity test compares. Temperature, top-k and top-p draw from one
numpy Generator, so the same seed gives the same answer on every machine whose logits agree.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import numpy as np

from molmo_edge.errors import MolmoEdgeError

if TYPE_CHECKING:
    from molmo_edge.runtimes.protocol import BatchRuntime, Cache, Runtime


class GenerationError(MolmoEdgeError):
    """Sampling settings that make no sense, a prompt that does not fit, or logits that are not numbers."""


@dataclass(frozen=True)
class Sampling:
    """How to choose ids. Raises GenerationError for a setting of another type or out of range."""

    max_new_tokens: int = 256
    temperature: float = 0.0  # 0: greedy; else the logits are divided by it
    top_k: int = 0  # only the k likeliest ids; 0: all
    top_p: float = 1.0  # only the likeliest ids that together hold this much of the probability
    seed: int | None = None  # None: another answer each time

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "top_k", "seed"):
            value = getattr(self, name)
            if not isinstance(value, Integral) and not (name == "seed" and value is None):
                raise GenerationError(f"{name} must be a whole number, it is of type {type(value).__name__}")
        for name in ("temperature", "top_p"):
            value = getattr(self, name)
            if not isinstance(value, Real):
                raise GenerationError(f"{name} must be a number, it is of type {type(value).__name__}")
        if self.max_new_tokens < 1:
            raise GenerationError(f"max_new_tokens must be at least 1, it is {self.max_new_tokens}")
        if not 0.0 <= self.temperature < float("inf"):
            raise GenerationError(f"temperature must be 0 (greedy) or a positive number, it is {self.temperature}")
        if self.top_k < 0:
            raise GenerationError(f"top_k must be 0 (all) or a positive number, it is {self.top_k}")
        if not 0.0 < self.top_p <= 1.0:
            raise GenerationError(f"top_p must be above 0 and at most 1, it is {self.top_p}")
        if self.seed is not None and self.seed < 0:
            raise GenerationError(f"seed must not be negative, it is {self.seed}")


def most_new_tokens(sampling: Sampling, filled: int, capacity: int) -> int:
    """Ids that can be generated behind `filled` positions of a context of `capacity` positions.

    One more than the free positions: the last id is read off the logits and never fed back.
    Raises GenerationError where the prompt alone does not fit.
    """
    if filled > capacity:
        raise GenerationError(
            f"image and question take {filled} positions, but the model's context holds {capacity}: "
            "shorten the question, or use fewer crops"
        )
    return min(sampling.max_new_tokens, capacity - filled + 1)


def generate(
    runtime: Runtime,
    embeddings: np.ndarray,
    cache: Cache,
    sampling: Sampling,
    *,
    eos_id: int,
    vocab_size: int,
    capacity: int,
) -> Iterator[int]:
    """Feed `embeddings` (float32 [n, d_model], n >= 1) behind what `cache` holds, then yield token ids.

    Ends at `eos_id` (which is not yielded), after `max_new_tokens` ids, or when `capacity` positions of the
    cache are filled. Rows of the head at and above `vocab_size` stand for no text and are never chosen.

    Raises GenerationError where the prompt does not fit, before any of it runs, and where logits are NaN or infinite.
    """
    most = most_new_tokens(sampling, cache.length + len(embeddings), capacity)
    random = np.random.default_rng(sampling.seed)
    logits = runtime.forward(embeddings, cache)  # [embedding_size]
    for step in range(most):
        token = next_token(logits[:vocab_size], sampling, random)
        if token == eos_id:
            return
        yield token
        if step + 1 < most:  # nobody would look at the logits behind the last id
            logits = runtime.forward(runtime.embed(np.array([token], dtype=np.int64)), cache)


def generate_batch(
    runtime: BatchRuntime,
    prefilled: tuple[np.ndarray, Any],
    sampling: Sampling,
    most: Sequence[int],
    *,
    eos_id: int,
    vocab_size: int,
) -> list[list[int]]:
    """As `generate`, for several prompts side by side, each with ids and a draw of its own.

    `prefilled`: what `runtime.prefill_batch` gave, with room for `max(most)`. `most`: ids that each prompt may get,
    see `most_new_tokens`. Returns the ids of each.
    """
    logits, batch = prefilled
    randoms = [np.random.default_rng(sampling.seed) for _ in most]
    answers: list[list[int]] = [[] for _ in most]
    going = set(range(len(most)))
    while going:
        for i in sorted(going):
            token = next_token(logits[i, :vocab_size], sampling, randoms[i])
            if token != eos_id:
                answers[i].append(token)
            if token == eos_id or len(answers[i]) == most[i]:
                going.discard(i)
        if going:  # the ended ones run along: what they say is not read
            last = np.array([ids[-1] if ids else eos_id for ids in answers], dtype=np.int64)
            logits = runtime.forward_batch(runtime.embed(last), batch)
    return answers


def likeliest(logits: np.ndarray) -> int:
    """The id with the largest of `logits` (float [vocab_size]), the lowest id of equal ones.

    Raises GenerationError for logits that cannot be chosen from: NaN or +inf anywhere, or -inf everywhere. -inf beside
    a finite logit is valid: that id is never chosen.
    """
    best = int(np.argmax(logits))  # the first NaN where there is one, which would pass for an id
    if not np.isfinite(logits[best]):
        raise GenerationError(
            f"the model's logits are {'not numbers' if np.isnan(logits[best]) else 'infinite'}: its weights are "
            "damaged, or too large for this precision; run `molmo-edge verify` on a bundle, or export it in another one"
        )
    return best


def next_token(logits: np.ndarray, sampling: Sampling, random: np.random.Generator) -> int:
    """Choose an id from `logits` (float [vocab_size]). Of equal logits greedy takes the lowest id.

    Raises GenerationError for logits that cannot be chosen from, see `likeliest`.
    """
    best = likeliest(logits)
    temperature = float(sampling.temperature)  # a Fraction or a numpy number would change the arrays' type
    if temperature == 0.0:
        return best
    order = np.argsort(-logits, kind="stable")  # likeliest first
    if sampling.top_k:
        order = order[: sampling.top_k]
    with np.errstate(over="ignore"):  # a tiny temperature: -inf, and exp(-inf) is the 0 that it should be
        scaled = (logits[order].astype(np.float64) - float(logits[best])) / temperature
    probabilities = np.exp(scaled)
    probabilities /= probabilities.sum()
    if sampling.top_p < 1.0:
        # An id stays while the mass in front of it is below top_p: the likeliest always does.
        keep = np.cumsum(probabilities) - probabilities < sampling.top_p
        order, probabilities = order[keep], probabilities[keep]
        probabilities /= probabilities.sum()
    return int(random.choice(order, p=probabilities))
