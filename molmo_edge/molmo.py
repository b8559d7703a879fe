"""`Molmo`: answers questions about images.

Image -> crops -> features -> embeddings -> tokens -> text -> points. This module joins the parts
(molmo_edge.sdk); each of them can be used, and is tested, on its own.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, cast, overload

from molmo_edge.answer import Answer
from molmo_edge.chat import Chat
from molmo_edge.errors import MolmoEdgeError
from molmo_edge.frontend.prompts import caption_question, count_question, point_question
from molmo_edge.frontend.tokenizer import Tokenizer
from molmo_edge.runtimes.generate import Sampling
from molmo_edge.sdk.answer_form import Schema, answer_form
from molmo_edge.sdk.async_answers import AsyncStream
from molmo_edge.sdk.batch import ask_batch, same_question
from molmo_edge.sdk.engine import (
    MAX_NEW_TOKENS,
    MAX_QUESTION_CHARS,
    ROOM,
    Engine,
    QuestionError,
    Scene,
    check_room,
    check_text,
)
from molmo_edge.sdk.image_tokens import ImageTokens
from molmo_edge.sdk.open_engine import open_engine
from molmo_edge.sdk.process_bound import NotCopied
from molmo_edge.sdk.streaming import History, Stream, checked_history, stream_answer

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from molmo_edge.config import MolmoConfig
    from molmo_edge.runtimes import LlamaOptions, Runtime
    from molmo_edge.sdk.async_answers import AskKeywords, PointKeywords, SamplingKeywords

__all__ = [
    "MAX_NEW_TOKENS",
    "MAX_QUESTION_CHARS",
    "History",
    "ImageTokens",
    "Molmo",
    "QuestionError",
    "Scene",
    "Stream",
]


class Molmo(NotCopied):
    """A loaded model that answers questions about images. Threads may share it.

    `model`: a bundle directory; a checkpoint directory (runs on PyTorch) in hub layout or the reference's own; a hub
    id, with `revision` a branch, tag or commit; None for the embedded nano. `device`: one of
    `molmo_edge.config.DEVICES`; "auto" picks the best available. `precision`: of a checkpoint's weights: "fp32",
    "bf16", "int8", "nf4" (bitsandbytes), or "auto": bf16 on a GPU, fp32 on a CPU with enough memory. `max_crops`: a
    limit on the crops of an image in place of the model's own. With more crops the model sees more detail; time, memory
    and positions of the context grow with them. `image_tokens`: the share of an image's tokens that the decoder sees,
    such as 0.5; the others are left out, and those that stay keep their positions. That is faster and needs less
    memory, but costs accuracy. None or 1: all tokens. A bundle with a GGUF decoder does not support it. `reuse_crops`:
    encode an image of one crop (at most 336 x 336 pixels in Molmo) once instead of twice: the crop has the pixels of
    the global view. `threads`: CPU threads, at most the cores available to this process; None: the physical cores, or a
    container's quota. `engine_options`: LlamaOptions for a bundle with a GGUF decoder. `alpha`: of transparent images;
    "drop" ignores transparency, as the reference's training does, "white" blends with white. `scene_cache`: a folder
    for encoded and prefilled images and videos, which may be shared by processes: a picture with the same pixels is
    read from there. The least recently used files are removed above `scene_cache_size`, bytes or "500MB". None: no
    cache. `draft`: whether the parts of a point that the grammar fixes are drafted and verified in one run of the
    decoder, which saves runs (docs/app.md). None: for bundles exported with `drafting`, whose ids stay the same, which
    the first answers check on this machine. True: with every model that can; its runs of several positions may round
    differently from single ones, which can change an id. False: never.

    Methods raise MolmoEdgeError for invalid arguments. `image` is a path, bytes, a file object, a PIL image, a uint8
    array [h, w], [h, w, 3] or [h, w, 4], or a Scene of this Molmo. Models of the Molmo2 generation also take a list
    of images, which the question is about together, or a Video.

    After `os.fork`, a child reopens a bundle on ONNX Runtime at its first question; with other engines every call in
    the child raises EngineError. `os.fork` waits for a model that is still loading.
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
        alpha: str = "drop",
        scene_cache: str | os.PathLike[str] | None = None,
        scene_cache_size: int | str = "2GB",
        image_tokens: float | ImageTokens | None = None,
        reuse_crops: bool = False,
        draft: bool | None = None,
    ) -> None:
        self.engine = open_engine(
            model,
            device=device,
            precision=precision,
            revision=revision,
            max_crops=max_crops,
            threads=threads,
            engine_options=engine_options,
            alpha=alpha,
            scene_cache=scene_cache,
            scene_cache_size=scene_cache_size,
            image_tokens=image_tokens,
            reuse_crops=reuse_crops,
            draft=draft,
        )

    @classmethod
    def from_parts(
        cls,
        runtime: Runtime,
        tokenizer: Tokenizer,
        *,
        max_crops: int | None = None,
        alpha: str = "drop",
        name: str | None = None,
        image_tokens: float | ImageTokens | None = None,
        reuse_crops: bool = False,
        draft: bool | None = None,
    ) -> Molmo:
        """Make a Molmo from any Runtime. `name`: in answers. `image_tokens`: needs `open_runtime(..., gaps=True)`."""
        molmo = cls.__new__(cls)
        molmo.engine = Engine(
            runtime,
            tokenizer,
            max_crops=max_crops,
            alpha=alpha,
            name=name,
            tokens=image_tokens,
            reuse_crops=reuse_crops,
            draft=draft,
        )
        return molmo

    @property
    def name(self) -> str | None:
        """The name of the bundle, owner/name of a hub id, or the name of the directory."""
        return self.engine.name

    @property
    def config(self) -> MolmoConfig:
        """The model's configuration; `max_crops` is the model's own limit."""
        return self.engine.config

    def close(self) -> None:
        """Free the engine's memory. The object cannot be used afterwards."""
        self.engine.runtime.close()

    def __enter__(self) -> Molmo:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def encode(self, image: Any, *, room: int = ROOM) -> Scene:
        """Encode and prefill `image` once; pass the Scene wherever an image goes. A Scene is returned unchanged.

        `room`: positions to keep free for question and answer. If they need more, the cache is copied into a larger
        one.
        """
        room = check_room(room)
        scene = self.engine.scene(image)
        return scene if scene is image or scene.prefilled is not None else self.engine.prefill(scene, room)

    def load_scene(self, path: str | os.PathLike[str], *, room: int = ROOM) -> Scene:
        """Load a Scene that `Scene.save` wrote, without running vision tower or decoder. `room`: see `encode`.

        Raises SceneFileError for a file that is damaged, of a newer version, or saved with another model, engine or
        precision of a checkpoint.
        """
        return self.engine.load(path, check_room(room))

    def chat(self, image: Any, *, history: History = (), trim: bool = False) -> Chat:
        """Start a conversation about `image`: `chat.ask(question)`. Each turn runs only its own tokens.

        The image is encoded and prefilled before this returns; a Scene's cache is copied. `history`: (question, answer)
        turns to continue, as in `Chat.history`. `trim`: see `Chat.ask`.
        """
        turns = checked_history(history)
        return Chat(self.engine, self.engine.scene(image), history=turns, trim=trim)

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
        timeout: float | None = None,
        schema: Schema | None = None,
        regex: str | None = None,
        choices: Sequence[str] | None = None,
    ) -> Answer:
        """Ask `question` about `image`.

        `temperature` 0 is greedy: the same answer each time. Above 0, `top_k` (0: all) and `top_p` restrict the
        sampling, and `seed` makes it reproducible. `history`: earlier (question, answer) turns about the same image.
        `timeout`: seconds, checked before the question is run and after each token; then AnswerTimeout is raised, whose
        `answer` has what was generated until then.

        At most one of these constrains the answer, and `answer.parsed` is its value (extra `schema`): `schema`, a
        Pydantic model or a JSON schema as a dict; `regex`, a pattern in Rust's syntax that the whole text matches;
        `choices`, the texts to choose from. An answer that `max_new_tokens` cuts off has the text so far, and
        `complete` False.
        """
        sampling = Sampling(max_new_tokens, temperature, top_k, top_p, seed, timeout)
        form = answer_form(self.engine, schema, regex, choices)
        return stream_answer(self.engine, image, question, sampling, history, form).answer

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
        timeout: float | None = None,
    ) -> Answer:
        """Point at every `label` ("the dog"): `answer.points`. For the keywords see `ask`."""
        sampling = Sampling(max_new_tokens, temperature, top_k, top_p, seed, timeout)
        question = point_question(check_text(label, "label"))
        return stream_answer(self.engine, image, question, sampling, history).answer

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
        timeout: float | None = None,
    ) -> Answer:
        """Count every `label` ("cups"): `answer.count`, with a point for each. For the keywords see `ask`."""
        sampling = Sampling(max_new_tokens, temperature, top_k, top_p, seed, timeout)
        question = count_question(check_text(label, "label"))
        return stream_answer(self.engine, image, question, sampling, history).answer

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
        timeout: float | None = None,
    ) -> Answer:
        """Describe `image`. For the keywords see `ask`."""
        sampling = Sampling(max_new_tokens, temperature, top_k, top_p, seed, timeout)
        return stream_answer(self.engine, image, caption_question(), sampling, history).answer

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
        timeout: float | None = None,
        schema: Schema | None = None,
        regex: str | None = None,
        choices: Sequence[str] | None = None,
    ) -> Stream:
        """Like `ask`, piece by piece. The arguments are checked, and the image is encoded, before this returns."""
        sampling = Sampling(max_new_tokens, temperature, top_k, top_p, seed, timeout)
        form = answer_form(self.engine, schema, regex, choices)
        return stream_answer(self.engine, image, question, sampling, history, form)

    async def ask_async(self, image: Any, question: str, **options: Unpack[AskKeywords]) -> Answer:
        """`await` the answer of `ask` without blocking the event loop.

        If the task is cancelled, the model is free after the token that is being generated, or after the image that is
        being encoded. Up to four asynchronous answers of a model are made at the same time; further ones wait.
        """
        return await self.stream_async(image, question, **options).answer()

    async def point_async(self, image: Any, label: str, **options: Unpack[PointKeywords]) -> Answer:
        """`await` the answer of `point`, see `ask_async`."""
        return await self.ask_async(image, point_question(check_text(label, "label")), **options)

    async def count_async(self, image: Any, label: str, **options: Unpack[PointKeywords]) -> Answer:
        """`await` the answer of `count`, see `ask_async`."""
        return await self.ask_async(image, count_question(check_text(label, "label")), **options)

    async def caption_async(self, image: Any, **options: Unpack[PointKeywords]) -> Answer:
        """`await` the answer of `caption`, see `ask_async`."""
        return await self.ask_async(image, caption_question(), **options)

    def stream_async(self, image: Any, question: str, **options: Unpack[AskKeywords]) -> AsyncStream:
        """Like `stream`, for `async for piece in molmo.stream_async(...)`; see `ask_async`.

        Arguments are checked, and the image is encoded, when the first piece is awaited.
        """
        return AsyncStream(self.engine.worker, lambda: self.stream(image, question, **options))

    async def encode_async(self, image: Any, *, room: int = ROOM) -> Scene:
        """`await` the Scene of `encode` without blocking the event loop."""
        return await self.engine.worker.run(lambda: self.encode(image, room=room))

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
        schema: Schema | None = ...,
        regex: str | None = ...,
        choices: Sequence[str] | None = ...,
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
        schema: Schema | None = ...,
        regex: str | None = ...,
        choices: Sequence[str] | None = ...,
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
        schema: Schema | None = None,
        regex: str | None = None,
        choices: Sequence[str] | None = None,
    ) -> Sequence[Answer | MolmoEdgeError]:
        """Ask several (image, question) pairs; each gets the answer that `ask` gives, in the order of the list.

        `schema`, `regex` and `choices`: of all answers, as in `ask`.

        `errors`: what to do about a pair that `ask` would refuse (an unreadable image, an empty question, a prompt
        that does not fit), or whose answer fails a validator of `schema`. "return": put the MolmoEdgeError in its place
        and answer the others. "raise": raise it. Failures of the engine or the model, and invalid sampling settings or
        constraints, always raise.

        A checkpoint on PyTorch decodes the pairs as one batch; other engines take them one after the other. In a
        batch, matrix products may round differently (in float32 this changed no answer in tests), memory grows with the
        number of pairs, and `usage.seconds` gives prefill and decode of the whole batch.
        """
        form = answer_form(self.engine, schema, regex, choices)
        return ask_batch(self.engine, asks, Sampling(max_new_tokens, temperature, top_k, top_p, seed), errors, form)

    @overload
    def point_batch(
        self,
        images: Sequence[Any],
        label: str,
        *,
        errors: Literal["return"] = "return",
        **options: Unpack[SamplingKeywords],
    ) -> list[Answer | MolmoEdgeError]: ...

    @overload
    def point_batch(
        self, images: Sequence[Any], label: str, *, errors: Literal["raise"], **options: Unpack[SamplingKeywords]
    ) -> list[Answer]: ...

    def point_batch(
        self,
        images: Sequence[Any],
        label: str,
        *,
        errors: Literal["return", "raise"] = "return",
        **options: Unpack[SamplingKeywords],
    ) -> Sequence[Answer | MolmoEdgeError]:
        """`point` in each of `images`, one answer for each. For the keywords see `ask_batch`."""
        asks = same_question(images, point_question(check_text(label, "label")))
        answers: list[Answer | MolmoEdgeError] = cast("Any", self.ask_batch)(asks, errors=errors, **options)
        return answers

    @overload
    def count_batch(
        self,
        images: Sequence[Any],
        label: str,
        *,
        errors: Literal["return"] = "return",
        **options: Unpack[SamplingKeywords],
    ) -> list[Answer | MolmoEdgeError]: ...

    @overload
    def count_batch(
        self, images: Sequence[Any], label: str, *, errors: Literal["raise"], **options: Unpack[SamplingKeywords]
    ) -> list[Answer]: ...

    def count_batch(
        self,
        images: Sequence[Any],
        label: str,
        *,
        errors: Literal["return", "raise"] = "return",
        **options: Unpack[SamplingKeywords],
    ) -> Sequence[Answer | MolmoEdgeError]:
        """`count` in each of `images`, one answer for each. For the keywords see `ask_batch`."""
        asks = same_question(images, count_question(check_text(label, "label")))
        answers: list[Answer | MolmoEdgeError] = cast("Any", self.ask_batch)(asks, errors=errors, **options)
        return answers

    @overload
    def caption_batch(
        self, images: Sequence[Any], *, errors: Literal["return"] = "return", **options: Unpack[SamplingKeywords]
    ) -> list[Answer | MolmoEdgeError]: ...

    @overload
    def caption_batch(
        self, images: Sequence[Any], *, errors: Literal["raise"], **options: Unpack[SamplingKeywords]
    ) -> list[Answer]: ...

    def caption_batch(
        self,
        images: Sequence[Any],
        *,
        errors: Literal["return", "raise"] = "return",
        **options: Unpack[SamplingKeywords],
    ) -> Sequence[Answer | MolmoEdgeError]:
        """`caption` of each of `images`, one answer for each. For the keywords see `ask_batch`."""
        asks = same_question(images, caption_question())
        answers: list[Answer | MolmoEdgeError] = cast("Any", self.ask_batch)(asks, errors=errors, **options)
        return answers
