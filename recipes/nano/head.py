"""The last stage: the grounding head gets votes of the detector's classes, and learns when to trust which score.

Everything else of the model is fixed, so what the head chooses from is computed once (`head_states`). A linear map of
the decoder's state gives the votes of the detector's names. Two more raise or lower the votes of each level and the
patch's own score: the detector does not know drawn objects and most names, and is better at the rest. These few
parameters are trained; training the whole head on so few photographs makes it worse.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from molmo_edge.config import PointHeadConfig
from molmo_edge.frontend.tokenizer import Tokenizer
from molmo_edge.modeling import Molmo, load_checkpoint, save_checkpoint
from molmo_edge.modeling.point_head import PointHead
from molmo_edge.system.files import replaced_directory
from molmo_edge.training.fake_quantization import Rounded
from molmo_edge.training.grounding import rotated
from molmo_edge.training.optimizer import Rate, rate_at
from molmo_edge.training.regions import PEAK, heat_losses
from molmo_edge.training.telemetry import LOG
from recipes.nano.asked_pictures import AskedPictures
from recipes.nano.detector import COCO_NAMES
from recipes.nano.head_states import Choices, files_of, identity, load, write_choices
from recipes.nano.head_targets import heat_of
from recipes.nano.student import PRECISION
from recipes.nano.votes import DIM, LEVELS, constant, detector_votes, fitted, with_votes

PICTURES = 2000
RATE = Rate(3e-3, 20)
# Logit of the heat from which on there is an object, chosen on photographs of `val`. Focal losses keep the heat low.
THRESHOLD = -1.1


@dataclass(frozen=True)
class Fit:
    """How the weights of the scores are trained."""

    steps: int = 800
    batch: int = 16  # pictures
    rate: Rate = RATE
    decay: float = 0.1
    log_every: int = 20


class Maps(NamedTuple):
    """The scores of a picture's m questions at its n patches, and their targets."""

    states: Tensor  # [m, d_model], normed
    own: Tensor  # [m, n]: of the patches themselves, less that of "no more points"
    votes: Tensor  # [LEVELS, m, n, n_slots]
    heat: Tensor  # int8 [m, n]


class Weights(nn.Module):
    """What the scores are scaled by and raised by, before they compete: see `runtimes.peaks.Votes.scores`."""

    def __init__(self, d_model: int):
        super().__init__()
        self.own, self.votes = nn.Linear(d_model, 1), nn.Linear(d_model, LEVELS)
        self.own_scale = nn.Parameter(torch.zeros(()))  # its logarithm
        for linear, start in ((self.own, -0.5), (self.votes, 1.2)):
            nn.init.zeros_(linear.weight)
            nn.init.constant_(linear.bias, start)

    def forward(self, maps: Maps) -> Tensor:
        """The best scores of the subpatches of each patch, [m, n]."""
        own = maps.own * self.own_scale.exp() + self.own(maps.states)
        votes = (maps.votes + self.votes(maps.states).T[..., None, None]).logsumexp(0)
        return torch.logaddexp(votes, own[..., None]).amax(-1)


class Pictures(NamedTuple):
    """What `read_pictures` has computed."""

    files: list[Path]  # of all pictures
    seconds: list[float]  # that each picture took which was not there before


def choices_of(before: Path, data: AskedPictures, run: Path) -> Path:
    """The folder of the pictures of `data` that are computed with the checkpoint `before`."""
    return run / f"choices-{identity(before, data)}"


def read_pictures(before: Path, data: AskedPictures, run: Path, pictures: int, precision: str = "fp32") -> Pictures:
    """Compute what the head of the checkpoint `before` chooses from in `pictures` pictures of `data`.

    The weights are rounded as in the bundle, because rounding raises or lowers the scores of all patches. Pictures that
    are there, because the command was interrupted, are not computed again.
    """
    model, _, _ = load_checkpoint(before)
    tokenizer = Tokenizer.from_file(before / "tokenizer.json")
    folder = choices_of(before, data, run)
    rounded = Rounded(model, PRECISION["decoder"])
    with rounded.weights(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        seconds = write_choices(model, tokenizer, data, folder, pictures)
    return Pictures(files_of(folder, pictures), seconds)


@torch.no_grad()
def add_votes(
    before: Path, classes: Sequence[tuple[Tensor, Tensor]], files: Sequence[Path], run: Path, fit: Fit
) -> Path:
    """Add votes to the grounding head of the checkpoint `before`; returns RUN/model.

    classes: the detector's, see `detector.score_layers`; files: of `read_pictures`.
    """
    old, _, config = load_checkpoint(before)
    config = with_votes(config)
    model = Molmo(config).init_weights(generator=torch.Generator().manual_seed(0))
    model.load_state_dict(old.state_dict(), strict=False)
    head = model.point_head
    assert head is not None
    keys, bias, queries = detector_votes(config, classes)
    put_keys(head, keys, bias, *fitted(*named_states(files, queries)))
    assert config.point_head is not None
    maps = [maps_of(head, config.point_head, load(file)) for file in files]
    weights = train(Weights(config.decoder.d_model), maps, run / LOG, fit)
    put(weights, head, constant(config))
    with replaced_directory(run / "model") as part:
        save_checkpoint(model, before / "tokenizer.json", part)
    return run / "model"


def put_keys(head: PointHead, keys: Tensor, key_bias: Tensor, queries: Tensor, query_bias: Tensor) -> None:
    """Fill in the votes: the matrices of their keys, and of their queries without the offset."""
    head.vote_k.load_state_dict({"weight": keys, "bias": key_bias})
    head.vote_q.load_state_dict({"weight": F.pad(queries, (0, 0, 0, 1)), "bias": F.pad(query_bias, (0, 1))})


def named_states(files: Sequence[Path], queries: Tensor) -> tuple[Tensor, Tensor]:
    """The normed states of all questions about the detector's names, and its queries of them."""
    states, found = [], []
    for file in files:
        choices = load(file)
        known = choices.names < len(COCO_NAMES)  # they come first in the vocabulary
        states.append(torch.from_numpy(choices.states[known]).float())
        found.append(queries[torch.from_numpy(choices.names[known])])
    return torch.cat(states), torch.cat(found)


def maps_of(head: PointHead, config: PointHeadConfig, choices: Choices) -> Maps:
    """The scores of a picture's questions, before `Weights`."""
    states, cells = (torch.from_numpy(x).float() for x in (choices.states, choices.cells))
    features, slots = torch.from_numpy(choices.features).float(), torch.from_numpy(choices.slots)
    query, turns = head.patch_q(states), torch.from_numpy(choices.turns)
    own = query @ rotated(head.patch_k(cells), turns, config.rope_theta).T - (query @ head.no_more)[:, None]
    keys = head.vote_k(features).unflatten(-1, (LEVELS, -1)).flatten(0, 1).transpose(0, 1)  # [votes, n * slots, dim]
    queries = head.vote_q(states)[:, :-1].unflatten(-1, (LEVELS, -1)).transpose(0, 1)  # [votes, m, dim]
    votes = (queries @ keys.transpose(1, 2)).unflatten(-1, slots.shape)
    heat = torch.from_numpy(heat_of(choices))
    return Maps(states, own / math.sqrt(float(choices.classes)), votes.masked_fill(~slots, -1e4), heat)


def train(weights: Weights, maps: Sequence[Maps], log: Path, fit: Fit) -> Weights:
    """Train the weights on the focal loss of the heat maps of all questions."""
    optimizer, rng = torch.optim.AdamW(weights.parameters(), weight_decay=fit.decay), np.random.default_rng(0)
    losses: list[float] = []
    lines = []
    for step in range(1, fit.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(fit.rate, step, fit.steps, 0.02)
        batch = [maps[int(i)] for i in rng.integers(len(maps), size=fit.batch)]
        objects = max(1, sum(int((one.heat == PEAK).sum()) for one in batch))
        with torch.enable_grad():
            loss = torch.stack([heat_losses(weights(one), one.heat).sum() for one in batch]).sum() / objects
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        losses.append(float(loss))
        if step % fit.log_every == 0:
            lines.append(json.dumps({"step": step, "point_loss": round(float(np.mean(losses[-fit.log_every :])), 4)}))
            log.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return weights


def put(weights: Weights, head: PointHead, constant: int) -> None:
    """Fold the weights, and THRESHOLD, into the matrices of a head, whose scores are then above 0 at an object."""
    scale = weights.own_scale.exp()
    for values in (head.patch_q.weight, head.patch_q.bias):
        values.mul_(scale)
    queries, bias = head.vote_q.weight, head.vote_q.bias
    rows = torch.arange(LEVELS) * DIM + constant
    queries[rows] += weights.votes.weight
    bias[rows] += weights.votes.bias - THRESHOLD
    queries[-1], bias[-1] = weights.own.weight[0], weights.own.bias[0] - THRESHOLD
