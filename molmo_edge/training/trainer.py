"""The trainer: steps over the mixture, validation, checkpoints, and resumption at any step.

Reference: olmo/train.py::Trainer. A step's loss is the sum of weighted cross entropies over the sum of weights of all
micro-batches on all ranks, so it depends neither on the number of micro-batches and ranks nor on padding.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from molmo_edge.checkpoints.tensor_names import hub_layout
from molmo_edge.checkpoints.tensor_sources import TensorSource
from molmo_edge.config import MolmoConfig
from molmo_edge.data.examples import DataSet
from molmo_edge.data.mixture import Order
from molmo_edge.errors import first_line
from molmo_edge.frontend.tokenizer import MOLMOE_SPECIAL_IDS, SpecialIds, Tokenizer
from molmo_edge.modeling import Molmo
from molmo_edge.modeling.weights import fill, put, save_checkpoint
from molmo_edge.system.cores import available_cores
from molmo_edge.system.files import replaced_directory
from molmo_edge.system.log import steps_log
from molmo_edge.training.distillation import Distillation, DistillConfig
from molmo_edge.training.encoding import Encoder, image_tokens
from molmo_edge.training.expert_plot import plot_experts
from molmo_edge.training.fake_quantization import Rounded
from molmo_edge.training.features import FeatureCache, FeatureError, open_features, write_features
from molmo_edge.training.flops import cost, device_flops, passes
from molmo_edge.training.forward import Sums, Trainable
from molmo_edge.training.guard import Guard
from molmo_edge.training.loader import MicroBatch, Samples, Share, open_loader, start
from molmo_edge.training.optimizer import Optimizer, part_of
from molmo_edge.training.parallel import World, accumulate, at_rest, whole
from molmo_edge.training.recipe import Recipe
from molmo_edge.training.regions import HeatMapHead, Names
from molmo_edge.training.run_checkpoints import CHECKPOINTS, Checkpoints, ResumeError, SaveError
from molmo_edge.training.sharding import shard, sparse_layers
from molmo_edge.training.stopping import StopRequest, stop_requests
from molmo_edge.training.teacher import OnlineTeacher, TargetSource, shares_towers
from molmo_edge.training.telemetry import Log, Window

SHARD_BYTES = 5_000_000_000
VALIDATION_SEED = 0
_MOST_REASONS = 20  # replaced examples whose reasons are logged


@dataclass(frozen=True)
class Data:
    """Data sets for training, with their rates, and for validation."""

    sets: Sequence[DataSet]
    rates: Sequence[float]
    validation: Sequence[DataSet] = ()


def build(
    config: MolmoConfig,
    source: TensorSource,
    where: str,
    recipe: Recipe,
    here: World,
    names: Names | None = None,
    teacher: MolmoConfig | None = None,
) -> Trainable:
    """The model, or this rank's shards of it, on the rank's device, in float32 and in training mode.

    A rank never holds more than its shards and one whole parameter. names: the vocabulary of the data sets' regions, if
    the recipe has a loss on them. teacher: the configuration of the teacher, if the recipe distills.
    """
    with torch.device("meta"):
        distillation = None
        if recipe.distill is not None and teacher is not None:
            distillation = Distillation(recipe.distill, config, teacher)
        model = Trainable(Molmo(config), recipe.forward, names, distillation)
    molmo = model.molmo
    freeze(molmo, recipe.frozen)
    shard(model, recipe.layout, here, compute=compute_dtype(recipe, here))
    model.to_empty(device=here.device)
    parameters = {name.removeprefix("molmo."): p for name, p in model.named_parameters()}
    fill(config, source, parameters, where=where)
    if model.heat_maps is not None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            head = HeatMapHead(config)
        for name, fresh in head.named_parameters():
            put(parameters[f"heat_maps.{name}"], fresh)
    if model.distillation is not None:
        assert recipe.distill is not None
        assert teacher is not None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed + 1)
            projections = Distillation(recipe.distill, config, teacher)
        for name, fresh in projections.named_parameters():
            put(parameters[f"distillation.{name}"], fresh)
    return model.train()


def check_frozen(recipe: Recipe) -> None:
    """Raise FeatureError if the recipe trains the towers, whose features would then change."""
    if "vision" not in recipe.frozen:
        raise FeatureError('cached features need frozen towers: add "vision" to the frozen parts')


def cache_features(
    root: Path,
    config: MolmoConfig,
    source: TensorSource,
    data: Data,
    recipe: Recipe,
    here: World,
    special: SpecialIds = MOLMOE_SPECIAL_IDS,
) -> FeatureCache:
    """The cache below `root` for `Trainer`, with the features of all pictures of `data`. Collective over the ranks.

    special: of the model's tokenizer; the features do not depend on the ids, but the model must have those it needs.
    """
    image = recipe.image(config)
    cache = open_features(root, config, source, image, compute_dtype(recipe, here))
    for sets, seed in ((data.sets, recipe.seed), (data.validation, VALIDATION_SEED)):
        write_features(
            cache, config, source, image, sets, seed, here.device, rank=here.rank, ranks=here.ranks, wait=here.wait,
            special=special, workers=min(recipe.workers, available_cores()),
        )  # fmt: skip
    here.wait()
    return cache


def freeze(molmo: Molmo, parts: Sequence[str]) -> None:
    """Freeze `parts` and the input embedding (reference: ft_embedding "lm_head"), in place."""
    for name, parameter in molmo.named_parameters():
        parameter.requires_grad_(part_of(name) not in parts)
    if not molmo.config.decoder.weight_tying:
        molmo.decoder.embedding.requires_grad_(False)
    for block in molmo.vision.blocks[molmo.config.vision.last_layer + 1 :]:  # their outputs are not used
        block.requires_grad_(False)


def compute_dtype(recipe: Recipe, here: World) -> torch.dtype:
    """The dtype of matrix products. On most CPUs bfloat16 is a hundred times slower than float32."""
    if recipe.precision == "auto":
        return torch.bfloat16 if here.device.type == "cuda" else torch.float32
    return torch.bfloat16 if recipe.precision == "bf16" else torch.float32


class Trainer:
    """A run in a directory. In a directory with checkpoints it resumes from the latest one."""

    def __init__(
        self,
        model: Trainable,
        tokenizer: Tokenizer,
        data: Data,
        recipe: Recipe,
        directory: Path,
        here: World,
        features: FeatureCache | None = None,
        teacher: TargetSource | None = None,
    ):
        """features: the result of `cache_features`, read instead of crops; the vision part must be frozen.

        teacher: of a run whose recipe and model distill.
        """
        if features is not None:
            check_frozen(recipe)
        assert (teacher is None) == (model.distillation is None)
        self.teacher = teacher
        # Then features are computed once for both. Not with sharded weights: the towers would not be gathered.
        self.same_towers = (
            isinstance(teacher, OnlineTeacher)
            and (teacher.second is None and features is None and here.ranks == 1)
            and shares_towers(model.molmo, teacher.model.molmo)
        )
        self.model, self.tokenizer, self.data, self.recipe, self.here = model, tokenizer, data, recipe, here
        self.directory = directory
        self.share = Share(recipe.batch, recipe.micro, here.rank, here.ranks)
        self.dtype = compute_dtype(recipe, here)
        self.optimizer = Optimizer(model, recipe.optimizer)
        self.guard = Guard()
        self.step = 0  # completed steps
        self._request = StopRequest()
        self.checkpoints = Checkpoints(directory / CHECKPOINTS, here, recipe.keep)
        config = model.molmo.config
        if recipe.experts is not None:
            config = dataclasses.replace(
                config, decoder=dataclasses.replace(config.decoder, top_k=recipe.experts.top_k)
            )
            model.molmo.config = config
        # As the final model is exported: with all experts active, a bundle stores them in another way.
        self.rounded = None if recipe.qat is None else Rounded(model.molmo, recipe.qat.precision)
        self.encoder = Encoder(tokenizer, recipe.image(config), recipe.encoding, features, config)
        self.cost, self.passes = cost(config), passes(model)
        self.device_flops = here.ranks * device_flops(here.device, self.dtype)
        if (latest := self.checkpoints.latest()) is not None:
            self._resume(latest)

    def train(self) -> Path:
        """Run the remaining steps and write the model in hub layout to `directory`/model, which is returned.

        Ctrl-C, SIGTERM and SIGUSR1 on any rank end the run after the step, with a checkpoint and SystemExit. In the
        last step, the model is written before.
        """
        log = Log(self.directory, self.recipe.steps) if self.here.first else None
        model = self.directory / "model"
        self.checkpoints.remove_parts()
        try:
            with stop_requests() as self._request:
                self._steps(log)
            self.write_model(model)
        finally:
            if log is not None:
                log.close()
                _plot(self.directory)
        if number := self._request.number:  # in the last step: nothing may follow in this process
            raise SystemExit(128 + number)
        return model

    def write_model(self, directory: Path, dtype: str = "F32") -> None:
        """Write the current model in hub layout, in place of `directory`. Collective: all ranks must call it."""
        parameters = {name.removeprefix("molmo."): p for name, p in at_rest(self.model).items()}
        if not self.here.first:
            for name in hub_layout(self.model.molmo.config):
                whole(parameters[name])
        else:
            with replaced_directory(directory) as part:
                tokenizer = part / "tokenizer.json"
                tokenizer.write_text(self.tokenizer.definition, encoding="utf-8")
                special = self.tokenizer.special
                if special.bos != special.eos:  # it is not in tokenizer.json
                    bos = json.dumps({"bos_token": self.tokenizer.token(special.bos)}, indent=2) + "\n"
                    (part / "tokenizer_config.json").write_text(bos, encoding="utf-8")
                save_checkpoint(
                    self.model.molmo,
                    tokenizer,
                    part,
                    dtype=dtype,
                    parameter=lambda name: whole(parameters[name]),
                    shard_bytes=SHARD_BYTES,
                )
        self.here.wait()

    # --- one step ---------------------------------------------------------------------------------------------------

    def _steps(self, log: Log | None) -> None:
        recipe = self.recipe
        batches, window, reasons = self.batches(), Window(self.device_flops), 0
        while self.step < recipe.steps:
            self._activate_experts()
            waiting = time.perf_counter()
            micro = [next(batches) for _ in range(self.share.steps)]
            window.waited += time.perf_counter() - waiting
            values, reason, stop = self.update(micro, window)
            self.step += 1
            if log is not None and reason is not None:
                log.note(self.step, f"skipped: {reason}")
            if log is not None and reasons < _MOST_REASONS:  # of this rank
                for why in [why for one in micro for why in one.replaced][: _MOST_REASONS - reasons]:
                    log.note(self.step, f"replaced {why}")
                    reasons += 1
            if self._is_due(recipe.log_every) or self.step == 1:
                figures = window.figures(self.here)
                if log is not None:
                    log.write(self.step, values | figures)
                window = Window(self.device_flops)
            if self.data.validation and self._is_due(recipe.validate_every):
                measured = self.validate()
                if log is not None:
                    log.write(self.step, measured)
                window = Window(self.device_flops)
            if self._is_due(recipe.save_every) or stop:
                self.optimizer.zero_grad()  # as large as the model
                self._settle(log, self.checkpoints.finish)
                self.checkpoints.save(self.step, self.model, self.optimizer, self._state())
            if stop and self.step < recipe.steps:
                self.checkpoints.finish()
                self.here.wait()  # a launcher kills the other ranks as soon as one exits
                if log is not None:
                    log.note(self.step, "stopped by a signal after saving a checkpoint: run the same command to resume")
                raise SystemExit(128 + (self._request.number or signal.SIGTERM))
            self._settle(log, self.checkpoints.poll)
        self.checkpoints.finish()

    def _activate_experts(self) -> None:
        if (schedule := self.recipe.experts) is not None:
            n_experts = self.model.molmo.config.decoder.n_experts
            for ffn in sparse_layers(self.model):
                ffn.top_k = schedule.at(self.step, self.recipe.steps, n_experts)

    def _settle(self, log: Log | None, write: Callable[[], None]) -> None:
        """Log an error of writing a checkpoint: the next one may find room on the disk."""
        try:
            write()
        except SaveError as error:
            if log is not None:
                log.note(self.step, f"{error}; the run continues")

    def _is_due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.recipe.steps

    def update(self, micro: Sequence[MicroBatch], window: Window) -> tuple[dict[str, float], str | None, bool]:
        """Compute gradients and update the weights, unless the guard objects.

        Returns figures of the step, why it was skipped or None, and whether any rank was asked to stop.
        """
        weight = torch.tensor([float(sum(m.batch.weights.sum() for m in micro))], device=self.here.device)
        self.here.sum(weight)
        weight = torch.where(weight > 0, weight, 1.0)  # batches without answers
        self.optimizer.zero_grad()
        totals, load = torch.zeros(12, device=self.here.device), None
        with self._rounded():
            for i, one in enumerate(micro):
                accumulate(self.model, last=i + 1 == len(micro))
                sums = self._forward(one)
                totals[:11] += self._backward(sums, weight[0], 1 / (len(micro) * self.here.ranks))
                load = sums.expert_load if load is None else load + sums.expert_load
        totals[11] = self._request.number
        self.here.sum(totals)
        norms = self.optimizer.norms()
        ce, z, accuracy, points, *taught, router_loss, heat_maps, attention, image, asked = (totals / weight).tolist()
        values = {"loss": ce, "z_loss": z, "router_loss": router_loss, "accuracy": accuracy}
        if self.model.heat_maps is not None:
            values["heat_map_loss"] = heat_maps
        if self.recipe.forward.attention_loss is not None:
            values["attention_loss"] = attention
        if self.model.molmo.point_head is not None:
            values["point_loss"] = points
        if (distill := self.recipe.distill) is not None:
            values |= _taught(distill, [*taught, image])
        values |= {f"norm_{part}": float(norm) for part, norm in norms.items()}
        judged = ce + heat_maps + attention + points + sum(taught) + image
        reason = self.guard.judge(judged, [float(norm) for norm in norms.values()])
        if reason is None:
            self.optimizer.clip(norms)
            rates = self.optimizer.step(self.step + 1, self.recipe.steps)
            values |= {f"rate_{part}": rate for part, rate in rates.items()}
        self._count(micro, load, window)
        return values, reason, asked > 0

    def _backward(self, sums: Sums, weight: Tensor, share: float) -> Tensor:
        """Add the gradients of a micro-batch, a `share` of the step of this total weight; returns its losses."""
        distill = self.recipe.distill
        data, divergence = (1.0, 0.0) if distill is None else (distill.cross_entropy, distill.divergence)
        loss = data * (sums.cross_entropy + sums.point_loss) + sums.z_loss + divergence * sums.divergence
        loss = (loss + sums.hidden_loss + sums.point_divergence) / weight
        # The auxiliary losses are means over each micro-batch.
        auxiliary = torch.stack([sums.router_loss, sums.heat_map_loss, sums.attention_loss, sums.image_loss])
        torch.autograd.backward(loss + share * auxiliary.sum())
        figures = [sums.cross_entropy, sums.z_loss, sums.correct, sums.point_loss]
        figures += [sums.divergence, sums.hidden_loss, sums.point_divergence, *(share * weight * auxiliary)]
        return torch.stack(figures).detach()

    @property
    def _rounds(self) -> bool:
        """Whether weights are rounded in this step."""
        qat = self.recipe.qat
        return qat is not None and qat.active(self.step, self.recipe.steps)

    def _rounded(self) -> contextlib.AbstractContextManager[None]:
        """Within it, weights are rounded, if they are in this step."""
        if self.rounded is None or not self._rounds:
            return contextlib.nullcontext()
        return self.rounded.weights()

    def _forward(self, one: MicroBatch) -> Sums:
        batch, targets = one.batch.to(self.here.device), None
        # Without autocast's cache: each weight is used once, and the cache would keep a copy of all of them.
        mixed = {"enabled": self.dtype != torch.float32, "cache_enabled": False}
        with torch.autocast(self.here.device.type, self.dtype, **mixed):
            if self.same_towers and not self._rounds:  # the teacher's towers are never rounded
                with torch.no_grad():
                    batch = dataclasses.replace(batch, features=self.model.features(batch))
            if self.teacher is not None and (self.model.training or self.teacher.validates):
                targets = self.teacher.targets(dataclasses.replace(one, batch=batch), self.here.device)
            return cast(Sums, self.model(batch, targets))

    def _count(self, micro: Sequence[MicroBatch], load: Tensor | None, window: Window) -> None:
        for one in micro:
            b = one.batch
            window.tokens += sum(b.lengths)
            window.image_tokens += image_tokens(b)
            window.answers += len(b.answered)
            window.flops += self.passes * self.cost.forward(b)
            window.sequences += len(b.lengths)
            window.replaced += len(one.replaced)
        window.steps += 1
        if load is not None and load.numel():
            window.load = load if window.load is None else window.load + load

    # --- data, validation, state ------------------------------------------------------------------------------------

    def _order(self) -> Order:
        return Order([len(s) for s in self.data.sets], self.data.rates, self.recipe.seed)

    def batches(self) -> Iterator[MicroBatch]:
        """This rank's micro-batches from the current step on."""
        recipe = self.recipe
        return start(
            open_loader(
                Samples(
                    self.data.sets, self.encoder, recipe.seed, None if self.teacher is None else self.teacher.second
                ),
                self._order(),
                self.share,
                step=self.step,
                steps=recipe.steps,
                workers=min(recipe.workers, available_cores()),
                length=recipe.encoding.sequence if recipe.pad else None,
                pin=self.here.device.type == "cuda",
            )
        )

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Loss and accuracy on the same examples every time, without dropout."""
        sets, micro = self.data.validation, self.recipe.micro
        order = Order([len(s) for s in sets], [len(s) for s in sets], self.recipe.seed)
        share = Share(micro * self.here.ranks, micro, self.here.rank, self.here.ranks)
        encoding = dataclasses.replace(self.encoder.encoding, shuffle=False)
        encoder = dataclasses.replace(self.encoder, encoding=encoding)
        once = -(-sum(len(s) for s in sets) // share.batch)
        count = min(self.recipe.validation_batches, once)
        taught = self.teacher is not None and self.teacher.validates
        second = self.teacher.validation_second() if self.teacher is not None and taught else None
        batches = open_loader(Samples(sets, encoder, VALIDATION_SEED, second), order, share, step=0, steps=count)
        self.model.eval()
        totals = torch.zeros(7, device=self.here.device)
        with self._rounded():
            for one in batches:
                sums = self._forward(one)
                one_batch = torch.ones((), device=self.here.device)
                figures = [sums.cross_entropy, sums.correct, sums.weight, sums.point_loss, sums.divergence]
                totals += torch.stack([*figures, sums.heat_map_loss, one_batch])
        self.model.train()
        ce, correct, weight, points, divergence, heat_maps, seen = self.here.sum(totals).tolist()
        weight = weight or 1.0
        measured = {"validation_loss": ce / weight, "validation_accuracy": correct / weight}
        measured |= {} if self.model.molmo.point_head is None else {"validation_point_loss": points / weight}
        if taught and self.recipe.distill is not None and self.recipe.distill.divergence:
            measured["validation_divergence"] = divergence / weight
        return measured | ({} if self.model.heat_maps is None else {"validation_heat_map_loss": heat_maps / seen})

    def _identity(self) -> dict[str, Any]:
        """Settings that must be equal in a resumed run: the samples and the trained weights depend on them."""
        return {
            "seed": self.recipe.seed,
            "batch": self.recipe.batch,
            "data": {s.name: len(s) for s in self.data.sets},
            "rates": [round(rate, 9) for rate in self.data.rates],
            "frozen parts": sorted(self.recipe.frozen),
        } | self._lessons()

    def _lessons(self) -> dict[str, Any]:
        if self.teacher is None or self.recipe.distill is None:
            return {}
        return {"teacher": self.teacher.identity, "losses": dataclasses.asdict(self.recipe.distill)}

    def _state(self) -> dict[str, Any]:
        return {"step": self.step, "guard": self.guard.state(), "identity": self._identity()}

    def _resume(self, path: Path) -> None:
        state = self.checkpoints.state(path)
        if differs := _difference(state["identity"], self._identity()):
            raise ResumeError(
                f"{path} belongs to a run with different settings: {differs}. Use the settings that the run started "
                "with, or another directory"
            )
        self.checkpoints.load(path, self.model, self.optimizer)
        self.step, self.guard = state["step"], Guard(**state["guard"])


def _plot(run: Path) -> None:
    """Draw the use of experts. An error must neither end the run nor hide the error that ended it."""
    try:
        plot_experts(run)
    except Exception as error:
        steps_log.warning("the use of experts could not be drawn: %s", first_line(error))


def _taught(config: DistillConfig, values: Sequence[float]) -> dict[str, float]:
    """The losses of distillation for the log, those with a weight."""
    names = ("divergence", "hidden_loss", "point_divergence", "image_loss")
    weights = (config.divergence, config.hidden, config.grounding, config.image)
    return {name: value for name, value, weight in zip(names, values, weights, strict=True) if weight}


def _difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    return ", ".join(key for key in now if before.get(key) != now[key])
