"""molmo-edge as a model of lmms-eval, which has the benchmarks, their prompts and their scores.

In the checkout, beside an installed molmo-edge:

    pip install -e examples/lmms_eval_molmo_edge
    python -m lmms_eval --model molmo_edge --model_args bundle=nano,max_crops=12 --tasks chartqa --limit 50

lmms-eval finds it by its entry point in the group "lmms_eval.models"; LMMS_EVAL_PLUGINS need not be set. `model_args`
are those of `MolmoEdge`, with commas between them.

The question is asked in the task's own words, behind the tag of `style` if one is set. Molmo's academic training sets
had no "Answer the question using a single word" after it: a copy of the task's folder with a task name of its own and
an empty `post_prompt` for `molmo_edge` under `lmms_eval_specific_kwargs`, named with --include_path, leaves that out.
The answer is scored as generated, point tags included.
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

# What a task's name begins with -> the tag in front of the questions of the training set that it belongs to, as the
# reference asks them (olmo/data/academic_datasets.py). It asks MMMU's few open questions as "vqa2", which the name of
# a task does not tell.
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
    """A task or a setting of lmms-eval that Molmo cannot follow."""


def manifest() -> Any:
    """What the entry point gives lmms-eval: a ModelManifest."""
    # Here, because importing lmms_eval.models loads the entry points, this one too.
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="molmo_edge", simple_class_path=f"{__name__}.MolmoEdge")


class MolmoEdge(lmms):
    """`bundle`: a bundle, a checkpoint directory or a hub id; "nano", or none, is the embedded model.

    `device`, `precision`, `max_crops`, `threads`: as for `molmo_edge.Molmo`. `style`: the tag in front of every
    question, "vqa2" for one; "auto": the one in STYLES, where the task has one; "none": none.
    Raises LmmsEvalError for a batch or more than one process, and what `Molmo` raises.
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
            raise LmmsEvalError("molmo-edge answers one question after the other: leave batch_size at 1")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise LmmsEvalError("molmo-edge runs in one process: start it with python -m lmms_eval")
        self._style = style
        self._molmo = Molmo(bundle, device=device, precision=precision, max_crops=max_crops, threads=threads)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The answers, in the order of the requests. Neighbours about the same image share one encoding.

        Each request's `args`: text, generation kwargs, doc_to_visual, doc_id, task, split. Of the kwargs
        until, max_new_tokens, temperature, top_p and top_k count; what a task leaves out is as in `Molmo.ask`.
        Raises LmmsEvalError for a document with no image, several, or a video, and what `Molmo.ask` raises.
        """
        answers = []
        image = scene = None
        for request in tqdm(requests, desc="molmo-edge"):
            text, options, doc_to_visual, doc_id, task, split = request.args
            visuals = doc_to_visual(self.task_dict[task][split][doc_id])
            wanted = _one_image(visuals, f"document {doc_id} of {task}")
            # By what is in it: each question of a data set comes with an image object of its own.
            if wanted != image:
                image, scene = wanted, self._molmo.encode(wanted)
            tag = _style(self._style, task)
            answer = self._molmo.ask(scene, f"{tag}: {text}" if tag else text, **_sampling(options))
            answers.append(_cut(answer.text, options.get("until")))
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Raises LmmsEvalError: a Molmo gives answers, not the probability of a text."""
        raise LmmsEvalError(
            "molmo-edge does not score given texts (loglikelihood, multiple_choice): "
            "choose a task whose output_type is generate_until"
        )

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Raises LmmsEvalError: these tasks show new images from round to round."""
        raise LmmsEvalError(
            "molmo-edge answers about one image a conversation, these tasks bring images in every round: "
            "choose a task whose output_type is generate_until"
        )


def _one_image(visuals: Sequence[Any] | None, where: str) -> Image.Image:
    if not visuals:
        raise LmmsEvalError(f"{where} has no image, and Molmo answers about an image: leave this task out")
    if len(visuals) > 1:
        raise LmmsEvalError(f"{where} has {len(visuals)} images, and Molmo takes one: leave this task out")
    (visual,) = visuals
    if not isinstance(visual, Image.Image):
        kind = "a file, a video as a rule" if isinstance(visual, str) else f"of type {type(visual).__name__}"
        raise LmmsEvalError(f"what {where} shows is {kind}, and Molmo takes a PIL image: leave this task out")
    return visual


def _style(style: str, task: str) -> str | None:
    if style == "auto":
        return next((tag for name, tag in STYLES.items() if task.startswith(name)), None)
    return None if style == "none" else style


def _sampling(options: dict[str, Any]) -> dict[str, Any]:
    """Keywords of `Molmo.ask`. Tasks write null, and top_p: 0 beside a temperature of 0, for "as usual"."""
    names = ("max_new_tokens", "temperature", "top_p", "top_k")
    return {name: options[name] for name in names if options.get(name)}


def _cut(text: str, until: Sequence[str | None] | str | None) -> str:
    """`text` up to the first of the strings in `until`."""
    stops = [until] if isinstance(until, str) else until or []
    ends = [text.index(stop) for stop in stops if stop and stop in text]
    return text[: min(ends, default=len(text))]
