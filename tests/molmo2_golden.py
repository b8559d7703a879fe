"""Molmo2's golden data: the images that its cases name, and the inputs built from them."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from molmo_edge.checkpoints.hub_config import read_config
from molmo_edge.config import ImageConfig
from molmo_edge.frontend.chatml import chat_ids, frame_ids
from molmo_edge.frontend.crops import ImageProcessor, PreparedImage
from molmo_edge.frontend.tokenizer import Tokenizer
from molmo_edge.frontend.video import PreparedVideo, prepare_video, sample_frames

GOLDEN = Path(__file__).parent / "golden"
GOLDEN2 = Path(__file__).parent / "golden2"
MODELS = ("molmo2_qwen3", "molmo2_olmo3", "molmo_point")


def read(name: str) -> Any:
    return json.loads((GOLDEN2 / name).read_text(encoding="utf-8"))


def synthetic(width: int, height: int, frame: int = 0) -> np.ndarray:
    """The pattern that tests/golden2/README.md defines. uint8 [height, width, 3]."""
    y, x = np.mgrid[0:height, 0:width].astype(np.int64)
    x, y, s = x + 5 * frame, y + 3 * frame, width + height
    red = 7 * x + 3 * y + 11 * s
    green = 200 * ((x // 8 + y // 8) % 2) + x * y % 53 + 17 * frame
    blue = x * x // 97 + 5 * y + s
    return (np.stack([red, green, blue], axis=-1) % 256).astype(np.uint8)


def picture(name: str) -> np.ndarray:
    if name.startswith("synth_"):
        width, height = map(int, name.removeprefix("synth_").split("x"))
        return synthetic(width, height)
    with Image.open(GOLDEN / name) as image:
        return np.array(image.convert("RGB"))


@dataclass(frozen=True)
class Inputs:
    """A case as arrays, all images or frames of its prompt together."""

    ids: np.ndarray  # int32 [n]
    positions: np.ndarray  # int64 [n_cells]: of the image features in `ids`
    block: np.ndarray  # bool [n]: tokens of images
    crops: np.ndarray | None
    pooling: np.ndarray | None
    images: list[PreparedImage]
    video: PreparedVideo | None


@functools.cache
def tokenizer_of(model: str) -> Tokenizer:
    return Tokenizer.from_file(GOLDEN2 / model / "tokenizer.json")


@functools.cache
def inputs_of(model: str, name: str) -> Inputs:
    case, tokenizer = read(f"{model}/expected.json")["cases"][name], tokenizer_of(model)
    config = read_config(GOLDEN2 / model).image
    process = ImageProcessor(config, tokenizer.special)
    images = [process(picture(image)) for image in case.get("images", ())]
    video = video_of(case, config)
    ids: list[int] = [tokenizer.special.bos]
    for number, image in enumerate(images, start=1):
        ids += tokenizer.encode(f"Image {number}") if len(images) > 1 else []
        ids += image.tokens.tolist()
    ids += frame_ids(tokenizer, video.times, video.grid[0] * video.grid[1]) if video else []
    ids += chat_ids(tokenizer, turns_of(case))
    parts: list[Any] = [*images, *([video] if video else [])]
    pooling, offset = [], 0
    for part in parts:
        pooling.append(np.where(part.pooling < 0, -1, part.pooling + offset))
        offset += part.crops.shape[0] * part.crops.shape[1]
    special = tokenizer.special
    patches = [token for token in (special.im_patch, special.im_low) if token is not None]
    return Inputs(
        np.array(ids, np.int32),
        np.flatnonzero(np.isin(ids, patches)),
        np.isin(ids, special.image_block),
        np.concatenate([part.crops for part in parts]) if parts else None,
        np.concatenate(pooling) if parts else None,
        images,
        video,
    )


def video_of(case: dict[str, Any], config: ImageConfig) -> PreparedVideo | None:
    video = case.get("video")
    if video is None:
        return None
    numbers = sample_frames(video["frames"], video["fps"], max_frames=384)
    frames = [synthetic(video["width"], video["height"], number) for number in numbers]
    return prepare_video(frames, [number / video["fps"] for number in numbers], config)


def turns_of(case: dict[str, Any]) -> list[str]:
    """The texts of the case's turns, a style written in front as the template does."""
    if "messages" not in case:
        return [case["question"] if "question" in case else case["video"]["question"]]
    turns = []
    for message in case["messages"]:
        content = message["content"]
        parts = [{"text": content}] if isinstance(content, str) else [p for p in content if p["type"] == "text"]
        turns.append(" ".join((f"{p['style']}: " if "style" in p else "") + p["text"] for p in parts))
    return turns
