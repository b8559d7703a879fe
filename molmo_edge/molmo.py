"""`Molmo`: one object that answers questions about images.

The way of the data: image -> crops -> features -> embeddings -> tokens -> text -> points. This module only
joins the parts; each of them can be used, and is tested, alone.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np

from molmo_edge.answer import Answer, Seconds
from molmo_edge.checkpoints.bundle import load_tokenizer, resolve_model
from molmo_edge.config import PRECISIONS, ConfigError, ImageConfig
from molmo_edge.errors import MolmoEdgeError
from molmo_edge.frontend.crops import ImageProcessor, load_image
from molmo_edge.frontend.points import Point
from molmo_edge.frontend.prompts import caption_question, count_question, image_ids, point_question, text_ids
from molmo_edge.frontend.tokenizer import Tokenizer
from molmo_edge.runtimes import forks
from molmo_edge.runtimes.generate import GenerationError, Sampling, likeliest, most_new_tokens
from molmo_edge.runtimes.prompt_embeddings import image_embeddings
from molmo_edge.sdk.batch import ask_batch
from molmo_edge.sdk.model_name import model_name
from molmo_edge.sdk.process_bound import NotCopied
from molmo_edge.sdk.shared_engine import Serial
from molmo_edge.sdk.streaming import Stream, generate_pieces
from molmo_edge.sdk.streaming import finished as _finished
from molmo_edge.system.log import logger

if TYPE_CHECKING:
    from molmo_edge.chat import Chat
    from molmo_edge.config import MolmoConfig
    from molmo_edge.runtimes import Cache, LlamaOptions, Runtime

History = Sequence[tuple[str, str]]  # earlier turns about the same image: (question, answer as generated)

MAX_QUESTION_CHARS = 20_000
MAX_NEW_TOKENS = 384


class QuestionError(MolmoEdgeError):
    """A question or a label that cannot be asked."""


@dataclass(frozen=True, eq=False)
class Scene(NotCopied):
    """An image, encoded and prefilled once by `Molmo.encode`; ask it as often as you like, from any thread."""

    image: np.ndarray | None  # uint8 [h, w, 3], EXIF rotation applied; None of `Molmo.no_image`
    crops: int  # the global view counted
    embeddings: np.ndarray  # float32 [n, d_model]: BOS and the image tokens, features added
    seconds: Seconds  # what encoding took
    cache: Cache | None  # prefilled with `embeddings`; copied for each question, never written to
    owner: Molmo
    born: int = field(default_factory=forks.generation, repr=False)  # see molmo_edge.runtimes.forks

    _instead = "pass its image on, and encode it there"

    @property
    def prefilled(self) -> Cache | None:
        """`cache`, or None in a child that was forked since: there it is prefilled again."""
        return self.cache if self.born == forks.generation() else None

    def __repr__(self) -> str:
        if self.image is None:
            return "Scene(no image)"
        height, width = self.image.shape[:2]
        return f"Scene({width}x{height}, {self.crops} crops, {len(self.embeddings)} positions)"


class Molmo(NotCopied):
    """A model, ready to be asked; safe to share between threads.

    After `os.fork` a child opens a bundle on ONNX Runtime again when it first asks; on other engines every call there
    raises EngineError. `os.fork` waits for a model that is still loading.

    `model`: None for the embedded nano; a bundle directory; a checkpoint directory (runs on PyTorch), in hub layout
    or the reference's own; or a hub id, with `revision` a branch, tag or commit there. `device`: one of
    `molmo_edge.runtimes.DEVICES`; "auto" is the best that there is. `precision`: of a checkpoint's
    weights, "fp32", "bf16", "int8", "nf4" (both of bitsandbytes), or "auto": bf16 on a GPU, fp32 on a CPU that has
    the memory. `max_crops`: fewer crops than the model's own limit are faster and see less. `threads`: CPU threads,
    at most the cores that this process may use; None for the physical ones, or a container's quota.
    `engine_options`: LlamaOptions for a bundle with a GGUF decoder (molmo_edge.runtimes.LlamaOptions).

    Every method raises MolmoEdgeError, with one sentence that says what to do, for what is wrong with its
    arguments. `image` is a path, bytes, a file object, a PIL image, a uint8 array [h, w], [h, w, 3] or
    [h, w, 4], or a Scene of this Molmo.
    """

    _instead = "pass the model's path or hub id on, and open it there"

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        device: str = "auto",
        precision: str = "auto",
        revision: str | None = None,
        max_crops: int | None = None,
        threads: int | None = None,
        engine_options: LlamaOptions | None = None,
    ) -> None:
        from molmo_edge.runtimes import open_runtime

        started = time.perf_counter()
        # What can be wrong is found before an engine opens: it would go on loading behind the error.
        if max_crops is not None:
            ImageConfig(max_crops=max_crops)
        if precision not in PRECISIONS:
            raise ConfigError(f'precision "{precision}" is not known; known are {", ".join(PRECISIONS)}')
        directory = resolve_model(model, revision=revision)
        tokenizer = load_tokenizer(directory)
        runtime = open_runtime(
            directory, device=device, precision=precision, threads=threads, engine_options=engine_options
        )
        self._assemble(runtime, tokenizer, max_crops, started, model_name(directory))

    @classmethod
    def from_parts(
        cls, runtime: Runtime, tokenizer: Tokenizer, *, max_crops: int | None = None, name: str | None = None
    ) -> Molmo:
        """A Molmo on any engine that follows `molmo_edge.runtimes.Runtime`. `name`: what its answers say of it."""
        molmo = cls.__new__(cls)
        molmo._assemble(runtime, tokenizer, max_crops, time.perf_counter(), name)
        return molmo

    def _assemble(
        self, runtime: Runtime, tokenizer: Tokenizer, max_crops: int | None, started: float, name: str | None
    ) -> None:
        self.name = name  # of a bundle, owner/name of the hub, or a directory
        self._runtime = Serial(runtime)
        self._tokenizer = tokenizer
        image = runtime.config.image
        if max_crops is not None:
            image = dataclasses.replace(image, max_crops=max_crops)
        self._process = ImageProcessor(image, tokenizer.special)
        self._load_seconds = time.perf_counter() - started
        logger.debug("%s: opened on %s in %.3f s", name, runtime.engine, self._load_seconds)

    @property
    def config(self) -> MolmoConfig:
        """The model's configuration, its own `max_crops` included."""
        return self._runtime.config

    def close(self) -> None:
        """Free the engine's memory now. The object cannot be asked afterwards."""
        self._runtime.close()

    def __enter__(self) -> Molmo:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def encode(self, image: Any, *, room: int = 512) -> Scene:
        """Encode and prefill `image` once; pass the Scene wherever an image goes.

        `room`: positions kept free behind the image for question and answer. A longer exchange still works,
        but prefills the image again. A Scene is returned as it is.
        """
        if not isinstance(room, Integral) or room < 0:
            raise QuestionError(f"room must be a whole number of positions, it is {room!r}")
        if isinstance(image, Scene):
            return self._own(image)
        scene = self._see(image)
        started = time.perf_counter()
        cache = self._runtime.new_cache(min(len(scene.embeddings) + room, self._context))
        self._runtime.forward(scene.embeddings, cache)
        seconds = dataclasses.replace(scene.seconds, prefill=time.perf_counter() - started)
        return dataclasses.replace(scene, seconds=seconds, cache=cache)

    def chat(self, image: Any) -> Chat:
        """A conversation about `image`: `chat.ask(question)`. Each turn runs its own tokens only.

        The image is encoded and prefilled before this returns; of a Scene, what it has is copied.
        """
        from molmo_edge.chat import Chat

        return Chat(self, self._own(image) if isinstance(image, Scene) else self._see(image))

    def no_image(self) -> Scene:
        """A Scene for questions in words alone, as some benchmarks ask them. Nothing stands for the image."""
        bos = self._runtime.embed(np.array([self._tokenizer.special.bos]))
        return Scene(None, 0, np.asarray(bos, np.float32), Seconds(), None, self)

    def ask(
        self,
        image: Any,
        question: str,
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        history: History = (),
    ) -> Answer:
        """Ask `question` about `image`. `temperature` 0 is greedy, the same answer each time."""
        return self.stream(
            image,
            question,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            history=history,
        ).answer

    def point(
        self,
        image: Any,
        label: str,
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        history: History = (),
    ) -> Answer:
        """Point at every `label` ("the dog"): `answer.points`. Keywords as of `ask`."""
        return self.ask(
            image,
            point_question(_checked(label, "label")),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            history=history,
        )

    def count(
        self,
        image: Any,
        label: str,
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        history: History = (),
    ) -> Answer:
        """Count every `label` ("cups"): `answer.count`, with a point for each. Keywords as of `ask`."""
        return self.ask(
            image,
            count_question(_checked(label, "label")),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            history=history,
        )

    def caption(
        self,
        image: Any,
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        history: History = (),
    ) -> Answer:
        """Describe `image`. Keywords as of `ask`."""
        return self.ask(
            image,
            caption_question(),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            history=history,
        )

    def stream(
        self,
        image: Any,
        question: str,
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        history: History = (),
    ) -> Stream:
        """As `ask`, piece by piece. The arguments are checked, and the image is encoded, before this returns."""
        sampling = Sampling(max_new_tokens, temperature, top_k, top_p, seed)
        _checked(question, "question")
        turns = [*_turns(history), question]
        scene = self._own(image) if isinstance(image, Scene) else self._see(image)
        ids = text_ids(self._tokenizer, turns)
        most = most_new_tokens(sampling, len(scene.embeddings) + len(ids), self._context)
        result: list[Answer] = []
        return Stream(self._answer(scene, ids, sampling, most, asked_scene=scene is image, result=result), result)

    def _answer(
        self, scene: Scene, ids: np.ndarray, sampling: Sampling, most: int, *, asked_scene: bool, result: list[Answer]
    ) -> Iterator[str | Point]:
        began = time.perf_counter()
        embeddings = self._runtime.embed(ids)  # [n, d_model]
        capacity = len(scene.embeddings) + len(ids) + most - 1
        if (kept := scene.prefilled) is not None and capacity <= kept.capacity:
            cache = kept.copy()
        else:
            cache = self._runtime.new_cache(capacity)
            embeddings = np.concatenate([scene.embeddings, embeddings])
        generated = yield from generate_pieces(
            self._runtime, self._tokenizer, embeddings, cache, sampling, capacity=capacity, began=began
        )
        spent = Seconds(load=self._load_seconds, prefill=generated.prefill, decode=generated.decode)
        if not asked_scene:
            spent = dataclasses.replace(spent, preprocess=scene.seconds.preprocess, vision=scene.seconds.vision)
        text, points, token_ids = generated.text, generated.points, generated.token_ids
        complete, prefilled = len(token_ids) < most, len(embeddings)
        result.append(
            _finished(scene, text, points, token_ids, len(ids), spent, complete=complete, prefilled=prefilled)
        )

    @overload
    def ask_batch(
        self,
        asks: Sequence[tuple[Any, str]],
        *,
        errors: Literal["return"] = "return",
        max_new_tokens: int = ...,
        temperature: float = ...,
        top_k: int = ...,
        top_p: float = ...,
        seed: int | None = ...,
    ) -> list[Answer | MolmoEdgeError]: ...

    @overload
    def ask_batch(
        self,
        asks: Sequence[tuple[Any, str]],
        *,
        errors: Literal["raise"],
        max_new_tokens: int = ...,
        temperature: float = ...,
        top_k: int = ...,
        top_p: float = ...,
        seed: int | None = ...,
    ) -> list[Answer]: ...

    def ask_batch(
        self,
        asks: Sequence[tuple[Any, str]],
        *,
        errors: Literal["return", "raise"] = "return",
        max_new_tokens: int = MAX_NEW_TOKENS,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> Sequence[Answer | MolmoEdgeError]:
        """Ask several (image, question) pairs; each gets the answer that `ask` gives it, at its place in the list.

        `errors`: what happens to a pair that `ask` would refuse, for an image that cannot be read, an empty question,
        or a prompt that does not fit. "return": its place holds the MolmoEdgeError, and the others are answered.
        "raise": it is raised. A failure of the engine or of the model, and wrong sampling settings, always raise.

        A checkpoint on PyTorch runs the pairs side by side, other engines take one after the other. Side by side a
        product may round otherwise, which in float32 has changed no answer yet. Memory grows with the number of pairs.
        `usage.seconds` of prefill and decode are then those of the whole batch.
        """
        return ask_batch(self, asks, Sampling(max_new_tokens, temperature, top_k, top_p, seed), errors)

    def gaps(self, image: Any, question: str, token_ids: Sequence[int], *, complete: bool = True) -> list[float]:
        """How far each id of a given answer lies behind the likeliest at its place, in logits; 0.0 where it is that.

        `complete`: the end behind the ids counts as one of them. Raises GenerationError for logits that are not finite.
        """
        _checked(question, "question")
        scene = self._own(image) if isinstance(image, Scene) else self._see(image)
        given = [*token_ids, self._tokenizer.special.eos] if complete else list(token_ids)
        if wrong := [token for token in given if not 0 <= token < self.config.decoder.vocab_size]:
            raise GenerationError(
                f"the model cannot answer {wrong[0]}: its ids are 0 to {self.config.decoder.vocab_size - 1}"
            )
        prompt = np.concatenate([scene.embeddings, self._runtime.embed(text_ids(self._tokenizer, [question]))])
        cache = self._runtime.new_cache(len(prompt) + max(0, len(given) - 1))
        found: list[float] = []
        rows = prompt
        for token in given:  # the last of them is read off the logits, and never fed back
            logits = self._runtime.forward(rows, cache)[: self.config.decoder.vocab_size]
            found.append(float(logits[likeliest(logits)] - logits[token]))
            rows = self._runtime.embed(np.array([token]))
        return found

    @property
    def _context(self) -> int:
        return self.config.decoder.max_position_embeddings

    def _own(self, scene: Scene) -> Scene:
        if scene.owner is not self:
            raise QuestionError("this scene was encoded by another Molmo: encode the image with the one you ask")
        return scene

    def _see(self, image: Any) -> Scene:
        """Load, crop and encode `image`, without prefill."""
        started = time.perf_counter()
        rgb = load_image(image)
        prepared = self._process(rgb)
        prompt = image_ids(self._tokenizer, prepared)
        if len(prompt.ids) >= self._context:
            raise QuestionError(
                f"the image takes {len(prompt.ids)} of the model's {self._context} positions: lower max_crops"
            )
        cropped = time.perf_counter()
        embeddings = image_embeddings(self._runtime, prepared, prompt)
        seconds = Seconds(preprocess=cropped - started, vision=time.perf_counter() - cropped)
        return Scene(rgb, len(prepared.crops), embeddings, seconds, None, self)


def _checked(text: str, what: str) -> str:
    if not isinstance(text, str):
        raise QuestionError(f"the {what} must be a str, it is {type(text).__name__}")
    if not text.strip():
        raise QuestionError(f"the {what} is empty: say what you want to know")
    if len(text) > MAX_QUESTION_CHARS:
        raise QuestionError(f"the {what} has {len(text)} characters, at most {MAX_QUESTION_CHARS} are read: shorten it")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise QuestionError(f"the {what} is not valid Unicode text: was it typed in another encoding?") from None
    return text


def _turns(history: History) -> Iterator[str]:
    says = "history is a list of (question, answer) pairs, both of them str"
    if not isinstance(history, (list, tuple)):
        raise QuestionError(f"{says}; it is {type(history).__name__}")
    for turn in history:
        # A str of two characters would pass for a pair.
        if not isinstance(turn, (list, tuple)) or len(turn) != 2 or not all(isinstance(text, str) for text in turn):
            raise QuestionError(says)
        yield from turn
