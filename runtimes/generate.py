"""The sampling loop over any runtime: embeddings in, logits out.

Greedy decoding is the default, and parity tests use it. Temperature, top-k and top-p draw from one numpy Generator: a
seed gives the same answer on every machine whose logits agree.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from molmo_edge.errors import MolmoEdgeError
from molmo_edge.runtimes.prompt_embeddings import prefill

if TYPE_CHECKING:
    from molmo_edge.runtimes.constraint import Constraint
    from molmo_edge.runtimes.drafting import Drafts
    from molmo_edge.runtimes.grounding import GroundingInputs
    from molmo_edge.runtimes.protocol import BatchRuntime, Cache, DraftRuntime, Runtime


class GenerationError(MolmoEdgeError):
    """Invalid sampling settings, a prompt that does not fit, or logits that are NaN or infinite."""


@dataclass(frozen=True)
class Sampling:
    """How to choose ids. Raises GenerationError for a setting of the wrong type or out of range."""

    max_new_tokens: int = 256
    temperature: float = 0.0  # 0: greedy; otherwise the logits are divided by it
    top_k: int = 0  # sample only from the k most likely ids; 0: all
    top_p: float = 1.0  # sample only from the most likely ids whose probabilities add up to this value
    seed: int | None = None  # None: a different answer each time
    timeout: float | None = None  # seconds for the whole answer, for callers of `generate`; None: no limit

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "top_k", "seed"):
            value = getattr(self, name)
            if not isinstance(value, Integral) and not (name == "seed" and value is None):
                raise GenerationError(f"{name} must be an integer, not {type(value).__name__}")
        for name in ("temperature", "top_p"):
            value = getattr(self, name)
            if not isinstance(value, Real):
                raise GenerationError(f"{name} must be a number, not {type(value).__name__}")
        if self.max_new_tokens < 1:
            raise GenerationError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
        if not 0.0 <= self.temperature < float("inf"):
            raise GenerationError(f"temperature must be 0 (greedy) or a finite positive number, not {self.temperature}")
        if self.top_k < 0:
            raise GenerationError(f"top_k must be 0 (all) or positive, not {self.top_k}")
        if not 0.0 < self.top_p <= 1.0:
            raise GenerationError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if self.seed is not None and self.seed < 0:
            raise GenerationError(f"seed must be 0 or more, not {self.seed}")
        if self.timeout is not None and (not isinstance(self.timeout, Real) or not self.timeout > 0):
            raise GenerationError(f"timeout must be a positive number of seconds, not {self.timeout!r}")

    def draws(self) -> np.random.Generator | None:
        """Return the random numbers of one answer; None for greedy decoding, which spares it importing numpy.random."""
        return None if float(self.temperature) == 0.0 else np.random.default_rng(self.seed)


def most_new_tokens(sampling: Sampling, filled: int, capacity: int) -> int:
    """Return how many ids can follow `filled` positions in a context of `capacity` positions.

    That is one more than the free positions, because the last id is never fed back. Raises GenerationError if the
    prompt alone does not fit.
    """
    if filled > capacity:
        raise GenerationError(
            f"image and question take {filled} positions, but the model's context has {capacity}: "
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
    image: np.ndarray | None = None,
    grounding: GroundingInputs | None = None,
    constraint: Constraint | None = None,
    drafts: Drafts | None = None,
) -> Generator[int, None, None]:
    """Append `embeddings` (float32 [n, d_model], n >= 1) to `cache`, then yield token ids.

    Ends at `eos_id` (which is not yielded), after `max_new_tokens` ids, or when `capacity` positions of the cache are
    filled. Ids of `vocab_size` and above only pad the head and are never chosen. `image`: bool [n], which embeddings
    are image tokens (see `prefill`); None: none of them. `grounding`: of the images in the prompt, for a model that
    points by grounding tokens; their ids follow those of the vocabulary. `constraint`: which ids are allowed; the
    answer ends when it is complete. `drafts`: verify several ids in one run of a DraftRuntime; not with `grounding`.

    Raises GenerationError, before anything runs, for a prompt that does not fit, and for NaN or infinite logits.
    """
    most = most_new_tokens(sampling, cache.length + len(embeddings), capacity)
    random = sampling.draws()
    # [embedding_size]
    logits = runtime.forward(embeddings, cache) if image is None else prefill(runtime, embeddings, image, cache)
    grounded = None if grounding is None else grounding.begin(_states(cache))
    try:
        for step in range(most):
            scores = logits[:vocab_size] if grounded is None else grounded.logits(logits, _states(cache)[-1])
            token = next_token(scores if constraint is None else constraint.masked(scores), sampling, random)
            if token == eos_id:
                return
            if constraint is not None:
                constraint.accept(token)
            yield token
            if constraint is not None and constraint.complete:
                return
            if step + 1 == most:  # the logits after the last id are not needed
                return
            if drafts is not None:
                logits = drafts.after(token, cast("DraftRuntime", runtime), cache, most - step - 2)
            elif grounded is None:
                logits = runtime.forward(runtime.embed(np.array([token], dtype=np.int64)), cache)
            else:
                logits = runtime.forward(grounded.embed(token), cache)
    finally:
        if drafts is not None:
            drafts.end(cache)


def _states(cache: Any) -> np.ndarray:
    """The hidden states of the last run, see `PointRuntime`."""
    states: np.ndarray = cache.states
    return states


def generate_batch(
    runtime: BatchRuntime,
    prefilled: tuple[np.ndarray, Any],
    sampling: Sampling,
    most: Sequence[int],
    *,
    eos_id: int,
    vocab_size: int,
    constraints: Sequence[Constraint] | None = None,
) -> list[list[int]]:
    """Like `generate`, for a batch of prompts; each has its own random draw. Returns the ids of each.

    `prefilled`: the result of `runtime.prefill_batch`, with room for `max(most)`. `most`: the limit on ids for each
    prompt, see `most_new_tokens`. `constraints`: of each prompt, as in `generate`.
    """
    logits, batch = prefilled
    randoms = [sampling.draws() for _ in most]
    answers: list[list[int]] = [[] for _ in most]
    unfinished = set(range(len(most)))
    while unfinished:
        for i in sorted(unfinished):
            scores, constraint = logits[i, :vocab_size], None if constraints is None else constraints[i]
            token = next_token(scores if constraint is None else constraint.masked(scores), sampling, randoms[i])
            if token != eos_id:
                answers[i].append(token)
                if constraint is not None:
                    constraint.accept(token)
            complete = constraint is not None and constraint.complete
            if token == eos_id or complete or len(answers[i]) == most[i]:
                unfinished.discard(i)
        if unfinished:  # finished prompts stay in the batch; their logits are ignored
            last = np.array([ids[-1] if ids else eos_id for ids in answers], dtype=np.int64)
            logits = runtime.forward_batch(runtime.embed(last), batch)
    return answers


def likeliest(logits: np.ndarray) -> int:
    """Return the id of the largest of `logits` (float [vocab_size]); on a tie, the lowest id.

    Raises GenerationError for NaN or +inf anywhere, or -inf everywhere. Individual values of -inf are valid: these ids
    are never chosen.
    """
    best = int(np.argmax(logits))  # argmax returns the first NaN, if there is one
    if not np.isfinite(logits[best]):
        raise GenerationError(
            f"the model's logits are {'NaN' if np.isnan(logits[best]) else 'infinite'}: its weights are damaged, or "
            "overflow in this precision; check a bundle with `molmo-edge verify`, or export with another precision"
        )
    return best


def next_token(logits: np.ndarray, sampling: Sampling, random: np.random.Generator | None) -> int:
    """Choose an id from `logits` (float [vocab_size]). `random`: see `Sampling.draws`.

    Raises GenerationError for the same logits as `likeliest`.
    """
    best = likeliest(logits)
    temperature = float(sampling.temperature)  # a Fraction or a numpy scalar would change the dtype of the arrays
    if random is None or temperature == 0.0:
        return best
    order = np.argsort(-logits, kind="stable")  # most likely first
    if sampling.top_k:
        order = order[: sampling.top_k]
    with np.errstate(over="ignore"):  # a tiny temperature gives -inf, and exp(-inf) is 0 as it should be
        scaled = (logits[order].astype(np.float64) - float(logits[best])) / temperature
    probabilities = np.exp(scaled)
    probabilities /= probabilities.sum()
    if sampling.top_p < 1.0:
        # Keep an id while the probability of all more likely ones is below top_p; the most likely one always stays.
        keep = np.cumsum(probabilities) - probabilities < sampling.top_p
        order, probabilities = order[keep], probabilities[keep]
        probabilities /= probabilities.sum()
    return int(random.choice(order, p=probabilities))
