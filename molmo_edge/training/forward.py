"""The forward pass of training: from a batch to the sums that make up a step's loss.

Reference: olmo/train.py::train_batch and model_forward. The loss of a step is the sum of weighted cross entropies over
all micro-batches and ranks, divided by the sum of the weights. The forward pass therefore returns sums, not means.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from molmo_edge.errors import MolmoEdgeError
from molmo_edge.modeling import decoder
from molmo_edge.modeling.decoder import Attention, DenseFFN, RMSNorm, Routing, SparseFFN, layer_tables
from molmo_edge.modeling.linear import match
from molmo_edge.modeling.model import Molmo
from molmo_edge.training.attention import Unpadded, packed_mask
from molmo_edge.training.attention_loss import AttentionLoss, attention_loss
from molmo_edge.training.distill_loss import token_divergence
from molmo_edge.training.distillation import Distillation, TeacherTargets
from molmo_edge.training.dropout import ResidualDropout, residual_dropout
from molmo_edge.training.encoding import Batch
from molmo_edge.training.grounding import PointScores, choice_loss, embed_points, point_divergence, point_scores
from molmo_edge.training.regions import HeatMapHead, Names, heat_loss

CHUNK = 1024  # positions whose logits are in memory at once: 200 MB in float32 for a vocabulary of 50,000


class ForwardError(MolmoEdgeError):
    """A configuration that this model or this PyTorch does not support."""


@dataclass(frozen=True)
class ForwardConfig:
    """Losses, dropout and kernels of the forward pass."""

    residual_dropout: float = 0.0
    answer_dropout: float = 0.1  # at positions that predict an answer; reference: response_residual_dropout
    z_loss: float = 1e-4  # times the squared logsumexp of the logits
    balance_loss: float = 0.0  # of the routers; Molmo was trained without
    router_z_loss: float = 0.0
    attention: str = "auto"  # "sdpa", "flex", "unpadded": one row without padding, chosen on a CPU where possible
    experts: str = "auto"  # "grouped", "loop", "wide"
    recompute: bool = True  # recompute the activations of blocks in the backward pass instead of keeping them
    heat_maps: float = 0.0  # weight of the loss on regions (regions.py)
    attention_loss: AttentionLoss | None = None  # on points whose annotations have boxes (attention_loss.py)
    compile: bool = False  # compile the ViT's blocks, norms and dense FFNs with torch.compile


class Sums(NamedTuple):  # a tuple: FSDP looks for the tensors of an output in tuples, lists and dicts
    """Float32 scalars of one batch that are summed over batches."""

    cross_entropy: Tensor  # weighted; it has a gradient, as the other losses do
    z_loss: Tensor
    router_loss: Tensor  # a mean over layers, for the whole batch
    weight: Tensor
    correct: Tensor  # weight of the targets with the largest logit
    expert_load: Tensor  # int64 [n_layers, n_experts], tokens per expert; [0, 0] without experts
    heat_map_loss: Tensor  # on regions, times its weight; a mean over the objects of the batch
    attention_loss: Tensor  # on points, times its weight; a mean over the points of the batch
    point_loss: Tensor  # weighted cross entropy of the choices that grounding tokens stand for
    divergence: Tensor  # weighted, from a teacher's distributions of answer tokens, without the weight of the loss
    hidden_loss: Tensor  # weighted distance from a teacher's hidden states, times its weight
    point_divergence: Tensor  # weighted, from the choices of a teacher's grounding head, times its weight
    image_loss: Tensor  # distance from a teacher's image features, times its weight; a mean for the whole batch


class Pass(NamedTuple):
    """What a forward pass computes before its losses."""

    features: Tensor  # of the towers [c, patches^2, feature_dim]
    cells: Tensor  # the connector's outputs
    tokens: Tensor  # [k, d]: those of the image tokens, in their order
    states: Tensor  # [b * n, d], before the last norm; empty for a batch of regions alone
    layers: list[Tensor]  # states of answer tokens [m, d] after each layer, if a teacher's are to be matched
    points: PointScores | None  # of the choices of grounding tokens


class Trainable(nn.Module):
    """A Molmo whose forward pass returns `Sums`. FSDP wraps it: all parameters are used inside of it."""

    def __init__(
        self,
        molmo: Molmo,
        config: ForwardConfig,
        names: Names | None = None,
        distillation: Distillation | None = None,
    ):
        """names: the vocabulary of the regions; None without a loss on regions. distillation: of a student.

        Raises ForwardError for grouped experts with a PyTorch before 2.10, for a model with several ViTs, and for
        auxiliary losses that need cells within crops or points in digits, which this model does not have.
        """
        c = molmo.config
        if c.extra_vision:
            raise ForwardError("training does not support models with several ViTs")
        if names is not None and c.image.pools_across_crops:
            raise ForwardError("the loss on regions needs cells within crops, but this model pools across crops")
        if config.attention_loss is not None and (c.point_head is not None or c.image.layout != "molmo"):
            raise ForwardError(
                "attention_loss is for points in the digits of Molmo v1, which this model does not write"
            )
        if config.experts == "grouped" and decoder.grouped_mm is None:
            raise ForwardError(f"grouped experts need PyTorch 2.10, this is {torch.__version__}: choose loop or wide")
        if config.attention == "unpadded" and (
            config.attention_loss or config.residual_dropout or config.answer_dropout
        ):
            raise ForwardError("attention unpadded is not possible with dropout or attention_loss: choose auto or sdpa")
        super().__init__()
        self.molmo, self.config, self.names = molmo, config, names
        self.heat_maps = HeatMapHead(molmo.config) if names is not None else None
        self.distillation = distillation
        self.keeps_layers = distillation is not None and bool(len(distillation.hidden))
        self.routing = Routing() if molmo.config.decoder.n_experts else None
        for block in molmo.decoder.blocks:
            if isinstance(block.ffn, SparseFFN):
                block.ffn.routing, block.ffn.kernel = self.routing, config.experts
        self._attended: Batch | None = None  # of the last forward pass
        self._attention_loss: Tensor | None = None
        self._recomputing = False
        if (supervised := config.attention_loss) is not None:
            if supervised.layer >= molmo.config.decoder.n_layers:
                raise ForwardError(f"attention_loss: the decoder has no layer {supervised.layer}, counted from 0")
            molmo.decoder.blocks[supervised.layer].attn.register_forward_hook(self._supervise)
        if config.compile:
            compile_parts(molmo)

    def forward(self, batch: Batch, teacher: TeacherTargets | None = None) -> Sums:
        """The batch must be on the model's device. Dropout is active only in training mode.

        teacher: what a teacher says about the batch; without it the losses of distillation are 0.
        """
        run = self.run(batch)
        zero = torch.zeros((), device=run.cells.device)
        heat_maps = self._heat_map_loss(batch, run.features, run.cells)
        if not len(batch.answered):  # regions alone
            return Sums(zero, zero, zero, zero, zero, self._load(batch), heat_maps, zero, zero, zero, zero, zero, zero)
        at, weights = batch.answered, batch.weights.flatten()
        hidden = self.molmo.decoder.ln_f(run.states.index_select(0, at))
        ce, z, correct, divergence = self._answers(hidden, batch.targets.flatten()[at], weights[at], teacher)
        points = zero if run.points is None else choice_loss(run.points, weights)
        z, router = self.config.z_loss * z, self._router_loss(batch)
        attention = zero if self._attention_loss is None else self._attention_loss
        self._attention_loss = None
        matching = self._matching(run, batch, teacher)
        sums = (ce, z, router, weights[at].sum(), correct, self._load(batch), heat_maps, attention, points)
        return Sums(*sums, divergence, *matching)

    def run(self, batch: Batch) -> Pass:
        """Compute towers, connector, decoder and grounding head."""
        features = self.features(batch) if batch.features is None else batch.features
        cells = self.molmo.connector(features, batch.masks, batch.pooling)  # [c, cells^2, d], or [k, d]
        tokens = cells.flatten(0, -2).index_select(0, batch.cells)  # [k, d]: of the image tokens, in their order
        if self.routing is not None:
            self.routing.logits, self.routing.experts = [], []
        if not len(batch.answered):
            return Pass(features, cells, tokens, cells.new_zeros(0, cells.shape[-1]), [], None)
        if self.routing is not None:
            self.routing.open = True
        layers: list[Tensor] = []
        states = self.states(batch, tokens, features, layers).flatten(0, 1)
        if self.routing is not None:
            self.routing.open = False
        points, head, head_config = None, self.molmo.point_head, self.molmo.config.point_head
        if head is not None and head_config is not None and batch.points is not None and batch.pooling is not None:
            points = point_scores(head, head_config, batch.points, states, batch.cells_at, features, batch.pooling)
        return Pass(features, cells, tokens, states, layers, points)

    def _matching(self, run: Pass, batch: Batch, teacher: TeacherTargets | None) -> tuple[Tensor, Tensor, Tensor]:
        """The weighted losses of hidden states, of the grounding head and of image features."""
        zero = torch.zeros((), device=run.cells.device)
        if self.distillation is None or teacher is None:
            return zero, zero, zero
        config, weights = self.distillation.config, batch.weights.flatten()
        hidden = points = image = zero
        if config.hidden:
            hidden = self.distillation.hidden_loss(run.layers, teacher, weights[batch.answered])
        if config.grounding and run.points is not None:
            theirs = (teacher.patches, teacher.slots, teacher.locations)
            points = config.grounding * point_divergence(
                run.points, theirs, weights, config.temperature, config.reverse
            )
        if config.image:
            image = self.distillation.image_loss(run.tokens, teacher)
        return hidden, points, image

    def states(self, batch: Batch, cells: Tensor, features: Tensor, layers: list[Tensor] | None = None) -> Tensor:
        """Hidden states before the last norm, [b, n, d].

        cells [k, d] are the features of the image tokens, features [c, patches^2, feature_dim] those of the towers.
        layers: a list for the states of answer tokens after each layer, filled if `keeps_layers`.
        """
        molmo, c = self.molmo, self.config
        x = molmo.decoder.embed(batch.ids)  # [b, n, d]
        rows = x.flatten(0, 1).index_add(0, batch.cells_at, cells.to(x.dtype))
        if molmo.point_head is not None and batch.points is not None and batch.pooling is not None:
            rows = embed_points(rows, molmo.point_head, batch.points, features, batch.pooling, cells)
        rates = (c.residual_dropout, c.answer_dropout) if self.training else (0.0, 0.0)
        dropout = residual_dropout(batch, *rates)
        unpadded = Unpadded.of(batch.segments, batch.lengths, batch.block) if self._unpads(batch, dropout) else None
        if unpadded is None:
            x, positions, answered = rows.view_as(x), batch.positions, batch.answered
        else:
            x = rows.index_select(0, unpadded.tokens)[None]
            positions = batch.positions.flatten()[unpadded.tokens][None]
            answered = torch.searchsorted(unpadded.tokens, batch.answered)
        mask = unpadded or packed_mask(batch.segments, c.attention, batch.block)
        tables = layer_tables(positions, molmo.config.decoder)
        self._attended, self._recomputing = batch, False
        for block, (cos, sin) in zip(molmo.decoder.blocks, tables, strict=True):
            x = self._run(block, x, cos, sin, mask, None, dropout)
            if layers is not None and self.keeps_layers:
                layers.append(x.flatten(0, 1).index_select(0, answered))
        self._recomputing = True
        if unpadded is not None:
            x = torch.zeros_like(rows, dtype=x.dtype).index_copy(0, unpadded.tokens, x[0]).view(*batch.ids.shape, -1)
        return x

    def _unpads(self, batch: Batch, dropout: ResidualDropout | None) -> bool:
        """Whether the decoder runs without padding: not where something counts on rows of equal length."""
        kind = self.config.attention
        if kind == "auto":
            possible = dropout is None and self.config.attention_loss is None
            return possible and batch.ids.device.type == "cpu"
        return kind == "unpadded"

    def _supervise(self, attention: nn.Module, args: tuple[Tensor, ...], _output: Tensor) -> None:
        """A hook of the supervised layer: its loss, from the rotated queries and keys.

        It computes the same when activations are recomputed, because the batch stays until the next forward pass.
        """
        batch, supervised = self._attended, self.config.attention_loss
        if batch is None or batch.queries is None or batch.attended is None or supervised is None:
            return
        x, cos, sin = args[:3]
        q, k, _ = cast(Attention, attention).queries_keys_values(x, cos, sin)
        loss = attention_loss(q, k, batch.segments, batch.queries, batch.attended, supervised.heads)
        if not self._recomputing:
            self._attention_loss = supervised.weight * loss

    def features(self, batch: Batch) -> Tensor:
        """Features of all towers, [c, patches^2, feature_dim]. The ViT runs block by block."""
        vision, tower = self.molmo.vision, self.molmo.conv_tower
        x = vision.begin(batch.crops)
        outputs = []
        for block in vision.running:
            x = self._run(block, x)
            outputs.append(x)
        features = vision.end(batch.crops, outputs)
        if tower is None or batch.overviews is None or batch.places is None:
            return features
        sampled = tower(batch.overviews, torch.split(batch.places, batch.crop_counts))
        return torch.cat([features, sampled.to(features.dtype)], dim=-1)

    def _heat_map_loss(self, batch: Batch, features: Tensor, cells: Tensor) -> Tensor:
        """The weighted loss on regions: heat maps, and the patch within each object's cell."""
        if self.heat_maps is None or self.names is None or batch.heat is None or batch.centres is None:
            return torch.zeros((), device=cells.device)
        names = self.names.embed(self.molmo.decoder.embedding)
        objects = max(1, len(batch.centres))
        loss = heat_loss(self.heat_maps.heat(names, cells), batch.heat) / objects
        if len(batch.centres):
            inside = self.heat_maps.patches(names, features, batch.centres)
            loss = loss + F.cross_entropy(inside.float(), batch.centres[:, 3])
        return self.config.heat_maps * loss

    def _run(self, block: nn.Module, *args: object) -> Tensor:
        if self.config.recompute and torch.is_grad_enabled():
            # Dropout has its own generators: no random state has to be restored.
            return cast(Tensor, checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False))
        return cast(Tensor, block(*args))

    def _answers(
        self, hidden: Tensor, targets: Tensor, weights: Tensor, teacher: TeacherTargets | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """hidden [m, d], targets int [m], weights [m] -> weighted cross entropy, logsumexp^2, hits and divergence."""
        heads = self.heads()
        rows, compared = [hidden, targets, weights], None
        if teacher is not None and self.distillation is not None and self.distillation.config.divergence:
            compared = self.distillation.config.temperature, self.distillation.config.reverse
            rows += [teacher.log_probs, teacher.ids, teacher.matched]
        total = torch.zeros(4, device=hidden.device)
        for chunk in zip(*(torch.split(t, CHUNK) for t in rows), strict=True):
            if torch.is_grad_enabled():
                part = checkpoint(_answer_sums, heads, compared, *chunk, use_reentrant=False, preserve_rng_state=False)
            else:
                part = _answer_sums(heads, compared, *chunk)
            total = total + cast(Tensor, part)
        ce, z, correct, divergence = (values.clone() for values in total.unbind())  # FSDP does not accept views
        return ce, z, correct.detach(), divergence

    def heads(self) -> list[Tensor]:
        """The matrices whose rows give the logits, in order."""
        decoder = self.molmo.decoder
        heads = [decoder.embedding if decoder.config.weight_tying else decoder.head.weight]
        return [*heads, decoder.new_head.weight] if decoder.config.additional_head else heads

    def _router_loss(self, batch: Batch) -> Tensor:
        c, routing = self.config, self.routing
        loss = torch.zeros((), device=batch.ids.device)
        if routing is None or not (c.balance_loss or c.router_z_loss):
            return loss
        real = _real(batch, len(routing.logits[0]))
        for logits, experts in zip(routing.logits, routing.experts, strict=True):
            balance, z = router_losses(logits, experts, real)
            loss = loss + c.balance_loss * balance + c.router_z_loss * z
        return loss / len(routing.logits)

    @torch.no_grad()
    def _load(self, batch: Batch) -> Tensor:
        if self.routing is None or not self.routing.experts:
            return torch.zeros(0, 0, dtype=torch.long, device=batch.ids.device)
        real = _real(batch, len(self.routing.experts[0]))
        n = self.molmo.config.decoder.n_experts
        return torch.stack([expert_counts(experts, real, n) for experts in self.routing.experts])


def compile_parts(molmo: Molmo) -> None:
    """Compile modules with many small operations, in place. Routing and dropout are not compiled."""
    for block in molmo.vision.running:
        block.compile(dynamic=True)  # the number of crops differs from batch to batch
    for module in molmo.decoder.modules():
        if isinstance(module, RMSNorm | DenseFFN):
            module.compile(dynamic=True)


def head_logits(heads: Sequence[Tensor], hidden: Tensor) -> Tensor:
    """hidden [m, d] -> float32 [m, n_logits]"""
    return torch.cat([F.linear(match(hidden, head), head) for head in heads], dim=-1).float()


def _answer_sums(
    heads: Sequence[Tensor],
    compared: tuple[float, float] | None,
    hidden: Tensor,
    targets: Tensor,
    weights: Tensor,
    *teacher: Tensor,
) -> Tensor:
    """compared: temperature and share of the reverse divergence, with the teacher's log_probs, ids and matched rows."""
    logits = head_logits(heads, hidden)
    ce = F.cross_entropy(logits, targets, reduction="none")
    z = logits.logsumexp(-1).square()
    correct = (logits.argmax(-1) == targets).float()
    divergence = torch.zeros_like(ce)
    if compared is not None:
        log_probs, ids, matched = teacher
        divergence = matched * token_divergence(logits, log_probs, ids, *compared)
    return torch.stack([(values * weights).sum() for values in (ce, z, correct, divergence)])


def _real(batch: Batch, tokens: int) -> Tensor:
    """bool [tokens]: which of the decoder's tokens are not padding. A decoder that ran without padding has fewer."""
    real = (batch.segments >= 0).flatten()
    return real if len(real) == tokens else real.new_ones(tokens)


def expert_counts(experts: Tensor, real: Tensor, n_experts: int) -> Tensor:
    """experts int [tokens, top_k], real bool [tokens] -> int64 [n_experts], how many real tokens chose each expert.

    It does not synchronise with a GPU, unlike bincount or boolean indexing.
    """
    chosen = real[:, None].expand_as(experts).long()
    return torch.zeros(n_experts, dtype=torch.long, device=experts.device).scatter_add_(
        0, experts.flatten(), chosen.flatten()
    )


def router_losses(logits: Tensor, experts: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """(load balancing loss, z-loss) of a layer over the real tokens.

    logits [tokens, n_experts], experts int [tokens, top_k], real bool [tokens]. The balancing loss is 1 if all experts
    get equally many tokens and equal probability (Switch Transformer, arXiv 2101.03961, eq. 4, for top_k choices). The
    z-loss is the mean squared logsumexp (ST-MoE, arXiv 2202.08906, eq. 5).
    """
    logits, n = logits.float(), logits.shape[1]
    tokens = real.sum()
    share = expert_counts(experts, real, n) / (tokens * experts.shape[1])
    probability = (logits.softmax(-1) * real[:, None]).sum(0) / tokens
    z = (logits.logsumexp(-1).square() * real).sum() / tokens
    return n * (share * probability).sum(), z
