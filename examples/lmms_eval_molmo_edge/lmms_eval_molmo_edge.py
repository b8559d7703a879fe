"""molmo-edge as a model of lmms-eval, which provides the benchmarks, their prompts and their scores.

In a checkout, with molmo-edge installed:

    pip install -e examples/lmms_eval_molmo_edge
    python -m lmms_eval --model molmo_edge --model_args bundle=nano,max_crops=12 --tasks chartqa --limit 50

lmms-eval finds the model by its entry point in the group "lmms_eval.models"; LMMS_EVAL_PLUGINS is not needed.
`model_args` are the arguments of `MolmoEdge`, separated by commas.

The question has the task's own words, preceded by the tag of `style` if it is set. Molmo's academic training sets
have no "Answer the question using a single word" after the question. To leave it out, copy the task's folder, give
the task another name and an empty `post_prompt` for `molmo_edge` under `lmms_eval_specific_kwargs`, and pass the
folder with --include_path. The answer is scored as generated, with its point tags.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from lmms_eval.api.model import lmms
from PIL import Image
from tqdm import tqdm

from molmo_edge import Molmo
from molmo_edge.errors import MolmoEdgeError

# Prefix of a task's name -> style tag of the training set in the reference (olmo/data/academic_datasets.py).
# The reference uses "vqa2" for MMMU's few open questions, which the task's name does not distinguish.
STYLES = {
    "ai2d": "ai2_diagram",
    "chartqa": "chart_qa",
    "docvqa": "doc_qa",
    "infovqa": "info_qa",
    "mmmu": "a_okvqa_mc",
    "ok_vqa": "okvqa",
    "scienceqa": "science_qa",
    "stvqa": "st_qa",
    "textvqa": "text_vqa",
    "vqav2": "vqa2",
}


class LmmsEvalError(MolmoEdgeError):
    """A task or setting of lmms-eval that molmo-edge does not support."""


def manifest() -> Any:
    """Return the ModelManifest for lmms-eval's entry point."""
    # Imported here, because importing lmms_eval.models loads all entry points, including this one.
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="molmo_edge", simple_class_path=f"{__name__}.MolmoEdge")


class MolmoEdge(lmms):
    """`bundle`: a bundle, a checkpoint directory or a hub id; "nano" or None: the embedded model.

    `device`, `precision`, `max_crops`, `threads`: as in `molmo_edge.Molmo`. `style`: the tag before every question,
    such as "vqa2"; "auto": the task's tag in STYLES, if it has one; "none": no tag.
    Raises LmmsEvalError for batches or several processes, and the errors of `Molmo`.
    """

    def __init__(
        self,
        bundle: str | None = None,
        device: str = "auto",
        precision: str = "auto",
        max_crops: int | None = None,
        threads: int | None = None,
        style: str = "none",
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if str(batch_size) != "1" or max_batch_size is not None:
            raise LmmsEvalError("molmo-edge answers one question at a time: leave batch_size at 1")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise LmmsEvalError("molmo-edge runs in one process: start it with python -m lmms_eval")
        self._style = style
        self._molmo = Molmo(bundle, device=device, precision=precision, max_crops=max_crops, threads=threads)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Return the answers in the order of the requests. Consecutive requests about one image share its encoding.

        Each request's `args`: text, generation kwargs, doc_to_visual, doc_id, task, split. The kwargs until,
        max_new_tokens, temperature, top_p and top_k are used; missing ones have the defaults of `Molmo.ask`.
        Raises LmmsEvalError for a document without exactly one image, and the errors of `Molmo.ask`.
        """
        answers = []
        image = scene = None
        for request in tqdm(requests, desc="molmo-edge"):
            text, options, doc_to_visual, doc_id, task, split = request.args
            visuals = doc_to_visual(self.task_dict[task][split][doc_id])
            wanted = _one_image(visuals, f"document {doc_id} of {task}")
            # Compare the pixels: each question of a data set has its own image object.
            if wanted != image:
                image, scene = wanted, self._molmo.encode(wanted)
            tag = _style(self._style, task)
            answer = self._molmo.ask(scene, f"{tag}: {text}" if tag else text, **_sampling(options))
            answers.append(_cut(answer.text, options.get("until")))
        return answers

    def loglikelihood(self, _requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Raises LmmsEvalError: molmo-edge does not compute the probability of a given text."""
        raise LmmsEvalError(
            "molmo-edge does not score given texts (loglikelihood, multiple_choice): "
            "choose a task whose output_type is generate_until"
        )

    def generate_until_multi_round(self, _requests: Sequence[Any]) -> list[str]:
        """Raises LmmsEvalError: these tasks have new images in each round."""
        raise LmmsEvalError(
            "molmo-edge supports one image per conversation, but these tasks have images in every round: "
            "choose a task whose output_type is generate_until"
        )


def _one_image(visuals: Sequence[Any] | None, where: str) -> Image.Image:
    if not visuals:
        raise LmmsEvalError(f"{where} has no image, which Molmo needs: leave this task out")
    if len(visuals) > 1:
        raise LmmsEvalError(f"{where} has {len(visuals)} images, but Molmo supports one: leave this task out")
    (visual,) = visuals
    if not isinstance(visual, Image.Image):
        kind = "a file, usually a video" if isinstance(visual, str) else f"of type {type(visual).__name__}"
        raise LmmsEvalError(f"the visual of {where} is {kind}, but Molmo needs a PIL image: leave this task out")
    return visual


def _style(style: str, task: str) -> str | None:
    if style == "auto":
        return next((tag for name, tag in STYLES.items() if task.startswith(name)), None)
    return None if style == "none" else style


def _sampling(options: dict[str, Any]) -> dict[str, Any]:
    """Keywords of `Molmo.ask`. Tasks write null, or top_p 0 with temperature 0, for the default."""
    names = ("max_new_tokens", "temperature", "top_p", "top_k")
    return {name: options[name] for name in names if options.get(name)}


def _cut(text: str, until: Sequence[str | None] | str | None) -> str:
    """`text` up to the first of the strings in `until`."""
    stops = [until] if isinstance(until, str) else until or []
    ends = [text.index(stop) for stop in stops if stop and stop in text]
    return text[: min(ends, default=len(text))]
