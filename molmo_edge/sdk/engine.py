"""The parts that `Molmo`, `Chat`, batches and streams share: a runtime, its tokenizer and its image processor."""

from __future__ import annotations

import dataclasses
import os
import time
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from molmo_edge.answer import Seconds
from molmo_edge.checkpoints.identity import model_identity
from molmo_edge.errors import EngineError, MolmoEdgeError
from molmo_edge.frontend.crops import ImageProcessor
from molmo_edge.frontend.image_files import check_alpha
from molmo_edge.frontend.prompts import asked_label
from molmo_edge.frontend.visual_prompt import UnsupportedInputError
from molmo_edge.runtimes.drafting import Drafts, PointDrafter, choose_trust
from molmo_edge.runtimes.generate import GenerationError
from molmo_edge.runtimes.grammar import Grammars
from molmo_edge.runtimes.prompt_embeddings import prefill
from molmo_edge.sdk.async_worker import Worker
from molmo_edge.sdk.encoding import check_reuse_crops, encode
from molmo_edge.sdk.image_tokens import ImageTokens, image_tokens
from molmo_edge.sdk.inputs import Inputs, read_inputs
from molmo_edge.sdk.process_bound import NotCopied
from molmo_edge.sdk.readable_text import counted
from molmo_edge.sdk.scene_file import SceneFileError, StoredScene, read_scene, write_scene
from molmo_edge.sdk.scene_store import SceneStore, scene_key
from molmo_edge.sdk.serial_runtime import serial_runtime
from molmo_edge.sdk.shown import Shown
from molmo_edge.system import forks
from molmo_edge.system.lazy import cached_property
from molmo_edge.system.log import logger

if TYPE_CHECKING:
    from molmo_edge.config import MolmoConfig
    from molmo_edge.frontend.tokenizer import Tokenizer
    from molmo_edge.frontend.visual_prompt import VisualPrompt
    from molmo_edge.runtimes.grounding import GroundingInputs
    from molmo_edge.runtimes.protocol import Cache, GappedRuntime, Runtime, StoringRuntime

MAX_QUESTION_CHARS = 20_000
MAX_NEW_TOKENS = 384
ROOM = 512  # free positions in the cache of a scene; more are added when an answer needs them


class QuestionError(MolmoEdgeError):
    """An invalid question, label, history or scene."""


@dataclass(frozen=True, eq=False)
class Scene(NotCopied):
    """One or several images, or a video, that `Molmo.encode` encoded and prefilled once.

    Any thread can ask it any number of questions.
    """

    shown: Shown  # the images, or the frames of the video; none of them: questions without an image
    crops: int  # of all images, including their global views; or frames
    embeddings: np.ndarray  # float32 [n, d_model]: BOS and the image tokens, with the image features added
    seconds: Seconds  # what encoding took
    cache: Cache | None  # prefilled with `embeddings`; each question uses a copy
    engine: Engine = field(repr=False)
    flags: np.ndarray = field(repr=False)  # bool [n]: which positions are image tokens
    grounding: GroundingInputs | None = field(default=None, repr=False)  # of a model that points by grounding tokens
    positions: np.ndarray | None = field(default=None, repr=False)  # int [n] of `embeddings`; None: 0, 1, 2, ...
    dropped: int = 0  # image tokens that `image_tokens` left out
    born: int = field(default_factory=forks.generation, repr=False)  # see molmo_edge.system.forks

    _instead = "pass its image on, and encode it there"

    @property
    def end(self) -> int:
        """The position of the first token after the scene."""
        return len(self.embeddings) if self.positions is None else int(self.positions[-1]) + 1

    def image_flags(self, text: int = 0) -> np.ndarray:
        """Which positions of the scene and of `text` positions after it are image tokens."""
        return np.append(self.flags, np.zeros(text, bool))

    @property
    def image(self) -> np.ndarray | None:
        """The first image, or frame, uint8 [h, w, 3]; None for questions without an image."""
        return self.shown.images[0] if self.shown.images else None

    def ran(self, cache: Any) -> Scene:
        """Return the scene with what its grounding tokens need of the run that filled `cache` with it."""
        if self.grounding is None:
            return self
        return dataclasses.replace(self, grounding=dataclasses.replace(self.grounding, states=cache.states))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the scene to a file in the safetensors format, for `Molmo.load_scene`. An existing file is replaced.

        The file holds images, embeddings, and keys and values of the decoder, unchanged: answers about the loaded
        scene have equal ids. Raises SceneFileError if the Molmo was made from parts, and OSError.
        """
        scene = self if self.prefilled is not None else self.engine.prefill(self, 0)
        assert scene.cache is not None
        stored = StoredScene(
            scene.shown,
            scene.crops,
            scene.embeddings,
            scene.flags,
            scene.grounding,
            scene.cache,
            scene.positions,
            scene.dropped,
        )
        write_scene(Path(path), stored, self.engine.runtime, self.engine.identity)

    @property
    def prefilled(self) -> Cache | None:
        """`cache`, or None in a child process forked since: the child prefills the image again."""
        return self.cache if self.born == forks.generation() else None

    def __repr__(self) -> str:
        shown = self.shown
        if not shown.images:
            return "Scene(no image)"
        height, width = shown.size_of(0)
        if shown.times is not None:
            what = f"video {width}x{height}, {counted(len(shown.times), 'frame')} of {shown.times[-1]:.1f} s"
        elif len(shown.images) > 1:
            sizes = ", ".join(f"{rgb.shape[1]}x{rgb.shape[0]}" for rgb in shown.images)
            what = f"{len(shown.images)} images {sizes}, {self.crops} crops"
        else:
            what = f"{width}x{height}, {self.crops} crops"
        left_out = f", {counted(self.dropped, 'image token')} left out" if self.dropped else ""
        return f"Scene({what}, {len(self.embeddings)} positions{left_out})"


class Engine:
    """A loaded model, for tools and tests that need more than `Molmo` offers. It may change between versions."""

    def __init__(
        self,
        runtime: Runtime,
        tokenizer: Tokenizer,
        *,
        max_crops: int | None = None,
        alpha: str = "drop",
        name: str | None = None,
        directory: Path | None = None,
        store: SceneStore | None = None,
        draft: bool | None = None,
        started: float | None = None,
        tokens: float | ImageTokens | None = None,
        reuse_crops: bool = False,
    ) -> None:
        """`alpha`: see `load_image`. `name`: the model's, for answers. `directory`: its files, to save scenes.
        `store`: where scenes are kept. `draft`: see `choose_trust`. `tokens`, `reuse_crops`: see Molmo, `image_tokens`.

        `started`: time.perf_counter() when loading began, None: now.
        """
        began = time.perf_counter() if started is None else started
        self.runtime, self.tokenizer, self.name = serial_runtime(runtime), tokenizer, name
        self._trust = choose_trust(runtime, draft)
        self._directory, self._store = directory, store
        self.worker = Worker()
        image = runtime.config.image
        if max_crops is not None:
            image = dataclasses.replace(image, max_crops=max_crops)
        check_alpha(alpha)
        self.alpha = alpha
        self.image_tokens = image_tokens(tokens)
        if self.image_tokens is not None:
            reason = getattr(runtime, "no_gaps", "its runtime does not implement GappedRuntime")
            if reason is not None:
                raise EngineError(f"this model cannot leave out image tokens: {reason}")
        self.reuse_crops = check_reuse_crops(reuse_crops)
        if reuse_crops and not hasattr(runtime, "encode_crops"):
            raise EngineError(
                "this model cannot reuse crops: its runtime does not implement PartedRuntime; leave reuse_crops out"
            )
        self.process = ImageProcessor(image, tokenizer.special)
        self.load_seconds = time.perf_counter() - began
        logger.debug("%s: opened on %s in %.3f s", name, runtime.engine, self.load_seconds)

    @property
    def config(self) -> MolmoConfig:
        """The configuration of the model."""
        return self.runtime.config

    @property
    def context(self) -> int:
        """Positions of the model's context."""
        return self.config.decoder.max_position_embeddings

    @cached_property
    def identity(self) -> str:
        """Tells the model apart from others, see `model_identity`. Raises SceneFileError if it was made from parts."""
        if self._directory is None:
            raise SceneFileError(
                "this model was made from parts, so that a scene cannot be tied to its files: open it with "
                "Molmo(model) to save or load scenes"
            )
        return model_identity(self._directory)

    def with_max_crops(self, max_crops: int) -> Engine:
        """This model with another limit on the crops of an image. Both share the loaded model and the scene cache."""
        return Engine(
            self.runtime,
            self.tokenizer,
            max_crops=max_crops,
            alpha=self.alpha,
            name=self.name,
            directory=self._directory,
            store=self._store,
            tokens=self.image_tokens,
            reuse_crops=self.reuse_crops,
        )

    @cached_property
    def grammars(self) -> Grammars:
        """Compiles constraints on answers. Raises ModuleNotFoundError without llguidance."""
        return Grammars(self.tokenizer, self.config.decoder.vocab_size)

    def drafts(self, question: str) -> Drafts | None:
        """The drafts of the answer to `question`; None: without."""
        if self._trust is None or not self._trust.allowed:
            return None
        return Drafts(PointDrafter(self.tokenizer, asked_label(question)), self._trust)

    def scene(self, image: Any, text: int = 0) -> Scene:
        """Load, crop and encode `image` (see `Molmo`). A Scene is returned unchanged.

        Without a scene cache the image is not prefilled yet; a scene from the cache, or for it, is.

        `text`: positions that the question takes. Raises QuestionError for a Scene of another Molmo, and before
        anything is encoded QuestionError or GenerationError for what does not fit into the model's context.
        """
        if isinstance(image, Scene):
            if image.engine is not self:
                raise QuestionError("this scene belongs to another Molmo: encode the image with the one you ask")
            return image
        started = time.perf_counter()
        inputs = read_inputs(image, self.config, alpha=self.alpha)
        prompt = inputs.prompt(self.process, self.tokenizer)
        self._check_room(inputs, prompt, text)
        if (store := self._store) is None:
            return self._encoded(inputs, prompt, started)
        runtime = cast("StoringRuntime", self.runtime)
        kind = runtime.cache_format, runtime.cache_settings
        choice = () if self.image_tokens is None else (self.image_tokens,)
        key = scene_key(inputs, self.identity, self.process.config.max_crops, *kind, *choice)
        scene = store.get(key, lambda path: self.load(path, ROOM))
        if scene is not None:
            return dataclasses.replace(scene, seconds=Seconds(preprocess=time.perf_counter() - started))
        scene = self.prefill(self._encoded(inputs, prompt, started), ROOM)
        store.put(key, scene.save)
        return scene

    def _encoded(self, inputs: Inputs, prompt: VisualPrompt, started: float) -> Scene:
        choice = self.image_tokens
        encoded = encode(self.runtime, self.process, inputs, prompt, choice, reuse_crops=self.reuse_crops)
        seconds = Seconds(preprocess=time.perf_counter() - started - encoded.vision, vision=encoded.vision)
        kept = encoded.kept
        return Scene(
            encoded.shown,
            encoded.crops,
            encoded.embeddings,
            seconds,
            None,
            self,
            prompt.image if kept is None else prompt.image[kept],
            encoded.grounding,
            kept if choice is not None and choice.original_positions else None,
            len(prompt.ids) - len(encoded.embeddings),
        )

    def _check_room(self, inputs: Inputs, prompt: VisualPrompt, text: int) -> None:
        """Refuse a prompt that cannot run, before the vision tower does."""
        visible = len(prompt.ids)
        if visible >= self.context:
            raise QuestionError(inputs.too_long(visible, text, self.context))
        if visible + text > self.context:
            raise GenerationError(inputs.too_long(visible, text, self.context))
        check = getattr(self.runtime, "check_images", None)
        if check is not None:
            try:
                check(prompt.image)
            except EngineError as error:  # of this prompt, not of the engine
                raise UnsupportedInputError(str(error)) from None

    def no_image(self) -> Scene:
        """Return a Scene for questions without an image, as some benchmarks ask them."""
        bos = self.runtime.embed(np.array([self.tokenizer.special.bos]))
        return Scene(Shown(()), 0, np.asarray(bos, np.float32), Seconds(), None, self, np.zeros(1, bool))

    def prefill(self, scene: Scene, room: int) -> Scene:
        """Return `scene` with a filled cache that has `room` free positions, or what the context allows."""
        started = time.perf_counter()
        cache = self.new_cache(scene, min(len(scene.embeddings) + room, self.slots(scene)))
        prefill(self.runtime, scene.embeddings, scene.image_flags(), cache)
        seconds = dataclasses.replace(scene.seconds, prefill=time.perf_counter() - started)
        return dataclasses.replace(scene.ran(cache), seconds=seconds, cache=cache)

    def slots(self, scene: Scene) -> int:
        """The most embeddings of a cache of `scene`: the context without the positions that were left out."""
        return self.context - (scene.end - len(scene.embeddings))

    def new_cache(self, scene: Scene, capacity: int) -> Cache:
        """Return an empty cache for the embeddings of `scene` and what follows them."""
        if scene.positions is None:
            return self.runtime.new_cache(capacity)
        return cast("GappedRuntime", self.runtime).new_cache(capacity, scene.positions)

    def load(self, path: str | os.PathLike[str], room: int) -> Scene:
        """Read the file of a scene, see `Molmo.load_scene`."""
        started = time.perf_counter()
        stored = read_scene(Path(path), self.runtime, self.identity, room=room)
        return Scene(
            stored.shown,
            stored.crops,
            stored.embeddings,
            Seconds(preprocess=time.perf_counter() - started),
            stored.cache,
            self,
            stored.flags,
            stored.grounding,
            stored.positions,
            stored.dropped,
        )


def check_text(text: str, name: str = "question") -> str:
    """Return `text`. Raises QuestionError unless it is a non-empty str of valid Unicode and acceptable length."""
    if not isinstance(text, str):
        raise QuestionError(f"the {name} must be a str, not {type(text).__name__}")
    if not text.strip():
        raise QuestionError(f"the {name} is empty")
    if len(text) > MAX_QUESTION_CHARS:
        raise QuestionError(f"the {name} has {len(text)} characters, the limit is {MAX_QUESTION_CHARS}: shorten it")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise QuestionError(f"the {name} is not valid Unicode text (it has lone surrogates)") from None
    return text


def check_room(room: int) -> int:
    """Return `room` as an int. Raises QuestionError unless it is an integer of 0 or more."""
    if not isinstance(room, Integral) or room < 0:
        raise QuestionError(f"room must be a number of positions (an integer of 0 or more), not {room!r}")
    return int(room)
