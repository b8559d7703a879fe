"""The parts that `Molmo`, `Chat`, batches and streams share: a runtime, its tokenizer and its image processor."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from molmo_edge.answer import Seconds
from molmo_edge.errors import MolmoEdgeError
from molmo_edge.frontend.crops import ImageProcessor, PreparedImage, load_image, stitched_patches
from molmo_edge.frontend.prompts import Prompt, image_ids
from molmo_edge.runtimes import forks
from molmo_edge.runtimes.grounding import GroundingInputs
from molmo_edge.runtimes.prompt_embeddings import image_embeddings, prefill, with_features
from molmo_edge.sdk.process_bound import NotCopied
from molmo_edge.sdk.serial_runtime import serial_runtime
from molmo_edge.system.log import logger

if TYPE_CHECKING:
    from molmo_edge.config import MolmoConfig
    from molmo_edge.frontend.tokenizer import Tokenizer
    from molmo_edge.runtimes.protocol import Cache, PointRuntime, Runtime

MAX_QUESTION_CHARS = 20_000
MAX_NEW_TOKENS = 384


class QuestionError(MolmoEdgeError):
    """An invalid question, label, history or scene."""


@dataclass(frozen=True, eq=False)
class Scene(NotCopied):
    """An image that `Molmo.encode` encoded and prefilled once. Any thread can ask it any number of questions."""

    image: np.ndarray | None  # uint8 [h, w, 3], EXIF rotation applied; None: questions without an image
    crops: int  # including the global view
    embeddings: np.ndarray  # float32 [n, d_model]: BOS and the image tokens, with the image features added
    seconds: Seconds  # what encoding took
    cache: Cache | None  # prefilled with `embeddings`; each question uses a copy
    engine: Engine = field(repr=False)
    grounding: GroundingInputs | None = field(default=None, repr=False)  # of a model that points by grounding tokens
    born: int = field(default_factory=forks.generation, repr=False)  # see molmo_edge.runtimes.forks

    _instead = "pass its image on, and encode it there"

    def image_flags(self, text: int = 0) -> np.ndarray:
        """Which positions of the scene and of `text` positions after it are image tokens: all of the scene but BOS."""
        at = np.arange(len(self.embeddings) + text)
        return (at > 0) & (at < len(self.embeddings))

    def ran(self, cache: Any) -> Scene:
        """Return the scene with what its grounding tokens need of the run that filled `cache` with it."""
        if self.grounding is None:
            return self
        return dataclasses.replace(self, grounding=dataclasses.replace(self.grounding, states=cache.states))

    @property
    def prefilled(self) -> Cache | None:
        """`cache`, or None in a child process forked since: the child prefills the image again."""
        return self.cache if self.born == forks.generation() else None

    def __repr__(self) -> str:
        if self.image is None:
            return "Scene(no image)"
        height, width = self.image.shape[:2]
        return f"Scene({width}x{height}, {self.crops} crops, {len(self.embeddings)} positions)"


class Engine:
    """A loaded model, for tools and tests that need more than `Molmo` offers. It may change between versions."""

    def __init__(
        self,
        runtime: Runtime,
        tokenizer: Tokenizer,
        *,
        max_crops: int | None = None,
        name: str | None = None,
        started: float | None = None,
    ) -> None:
        """`name`: the model's, for answers. `started`: time.perf_counter() when loading began, None: now."""
        began = time.perf_counter() if started is None else started
        self.runtime, self.tokenizer, self.name = serial_runtime(runtime), tokenizer, name
        image = runtime.config.image
        if max_crops is not None:
            image = dataclasses.replace(image, max_crops=max_crops)
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

    def scene(self, image: Any) -> Scene:
        """Load, crop and encode `image`, without prefill. A Scene is returned unchanged.

        Raises QuestionError for a Scene of another Molmo.
        """
        if isinstance(image, Scene):
            if image.engine is not self:
                raise QuestionError("this scene belongs to another Molmo: encode the image with the one you ask")
            return image
        started = time.perf_counter()
        rgb = load_image(image)
        prepared = self.process(rgb)
        prompt = image_ids(self.tokenizer, prepared)
        if len(prompt.ids) >= self.context:
            raise QuestionError(
                f"the image takes {len(prompt.ids)} of the model's {self.context} positions: lower max_crops"
            )
        cropped = time.perf_counter()
        if self.config.point_head is None:
            embeddings, grounding = image_embeddings(self.runtime, prepared, prompt), None
        else:
            embeddings, grounding = self._grounded(prepared, prompt)
        seconds = Seconds(preprocess=cropped - started, vision=time.perf_counter() - cropped)
        return Scene(rgb, len(prepared.crops), embeddings, seconds, None, self, grounding)

    def _grounded(self, image: PreparedImage, prompt: Prompt) -> tuple[np.ndarray, GroundingInputs]:
        """The embeddings of an image, and what its grounding tokens depend on."""
        runtime = cast("PointRuntime", self.runtime)
        assert image.pooling is not None
        patches = runtime.encode_crops(image.crops)
        features = runtime.connect(patches, image.masks, image.pooling)
        inputs = GroundingInputs(
            head=runtime,
            ids=prompt.ids,
            positions=prompt.token_index,
            indexable=self.tokenizer.special.im_patch,
            patch_features=patches.reshape(-1, patches.shape[-1]),
            pooling=image.pooling,
            features=features,
            grids=(stitched_patches(self.process.config, image.tiling),),
        )
        return with_features(runtime, prompt, features), inputs

    def no_image(self) -> Scene:
        """Return a Scene for questions without an image, as some benchmarks ask them."""
        bos = self.runtime.embed(np.array([self.tokenizer.special.bos]))
        return Scene(None, 0, np.asarray(bos, np.float32), Seconds(), None, self)

    def prefill(self, scene: Scene, room: int) -> Scene:
        """Return `scene` with a filled cache that has `room` free positions, or what the context allows."""
        started = time.perf_counter()
        cache = self.runtime.new_cache(min(len(scene.embeddings) + room, self.context))
        prefill(self.runtime, scene.embeddings, scene.image_flags(), cache)
        seconds = dataclasses.replace(scene.seconds, prefill=time.perf_counter() - started)
        return dataclasses.replace(scene.ran(cache), seconds=seconds, cache=cache)


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
