"""Train nano's connector and decoder on cached vision features: on a CPU in hours, on a GPU in minutes.

Two stages. `align` trains the connector alone, so that its cells mean the decoder's words. `answer` trains
connector and decoder on packed questions, with the two losses of grounding.py beside. A run writes
`state.pt` and `log.jsonl` into its directory and, started again, goes on from there.

`python -m molmo_edge.training.nano --start START --train CACHE --val CACHE --run DIR`
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from molmo_edge.frontend.tokenizer import Tokenizer
from molmo_edge.modeling import Molmo, load_checkpoint, save_checkpoint
from molmo_edge.modeling.decoder import SparseFFN, rotary_tables
from molmo_edge.system.log import shown, steps_log
from molmo_edge.training.batches import IGNORED, Batch, PackedQuestions, Visits, collate, to_device
from molmo_edge.training.features import Sample, read_sample
from molmo_edge.training.grounding import looking_loss, naming_loss
from molmo_edge.training.workers import Loader


@dataclass(frozen=True)
class TrainConfig:
    """One run. Learning rates go up linearly over `warmup` steps and down by a cosine to a tenth."""

    align_steps: int = 1500
    align_batch: int = 16
    steps: int = 6000
    batch: int = 6
    questions: int = 6  # most annotations packed behind an image
    lr_align: float = 1e-3
    lr_connector: float = 4e-4
    lr_decoder: float = 6e-4
    warmup: int = 150
    weight_decay: float = 0.01
    clip: float = 1.0  # separately for connector and decoder, as the reference does
    naming: float = 0.3  # weight of naming_loss
    looking: float = 0.5  # weight of looking_loss
    looking_layer: int = 3
    looking_heads: int = 3
    dense_share: float = 0.5  # share of the steps with all experts at work, before top_k goes down
    seed: int = 0
    save_every: int = 250
    val_every: int = 500


@torch.no_grad()
def init_connector(model: Molmo, samples: list[Sample], generator: torch.Generator) -> None:
    """Random weights that see standardised features, and cells as large as token embeddings.

    DINOv2's raw block outputs have a few channels hundreds of times larger than the rest; without this
    they are all that the connector sees for its first thousands of steps.
    """
    features = torch.from_numpy(np.concatenate([s.features.reshape(-1, s.features.shape[-1]) for s in samples])).float()
    mean, std = features.mean(0), features.std(0)
    pooling, projector = model.connector.pooling, model.connector.projector
    for linear in (pooling.wq, pooling.wk, pooling.wv):
        weight = torch.randn(linear.weight.shape, generator=generator) / len(mean) ** 0.5 / std
        linear.weight.copy_(weight)
        linear.bias.copy_(-(weight @ mean))
    for linear in (pooling.wo, projector.w1, projector.w3, projector.w2):
        linear.weight.copy_(torch.randn(linear.weight.shape, generator=generator) / linear.weight.shape[1] ** 0.5)
    cells = torch.cat(
        [
            image_cells(model, {k: torch.from_numpy(getattr(s, k))[None] for k in ("features", "masks")}).flatten(0, 2)
            for s in samples[:8]
        ]
    )
    projector.w2.weight.mul_(model.decoder.embedding.std() / cells.std())


def name_table(model: Molmo, tokenizer: Tokenizer, names: list[str]) -> Tensor:
    """Unit vectors [names, d_model]: the mean embedding of each name's tokens, less the mean of all names."""
    with torch.no_grad():
        device = model.decoder.embedding.device
        rows = [model.decoder.embed(torch.tensor(tokenizer.encode(" " + n), device=device)).mean(0) for n in names]
        table = torch.stack(rows)
        return F.normalize(table - table.mean(0), dim=-1)


def image_cells(model: Molmo, batch: Batch) -> Tensor:
    """Connector output [batch, n_crops, cells^2, d_model]."""
    cells = model.connector(batch["features"].flatten(0, 1).float(), batch["masks"].flatten(0, 1))
    return cells.unflatten(0, batch["features"].shape[:2])


def scatter_cells(cells: Tensor, token_index: Tensor, n: int) -> Tensor:
    """Cells at their positions of the batch laid end to end: [batch * n, d_model], zeros elsewhere."""
    index = token_index.flatten(1)
    kept = index >= 0
    flat = (index + torch.arange(len(index), device=index.device)[:, None] * n)[kept]
    out = cells.new_zeros(len(index) * n, cells.shape[-1])
    return out.index_put((flat,), cells.flatten(1, 2)[kept])


def answer_losses(model: Molmo, batch: Batch, table: Tensor, config: TrainConfig) -> dict[str, Tensor]:
    """The weighted cross entropy ("answer"), "naming", "looking", and "right": the share of exact next tokens."""
    decoder, n = model.decoder, batch["ids"].shape[1]
    cells = image_cells(model, batch)
    spread = scatter_cells(cells, batch["token_index"], n)
    x = decoder.embed(batch["ids"]) + spread.view(*batch["ids"].shape, -1)
    seen: list[Tensor] = []
    attention = decoder.blocks[config.looking_layer].attn
    handle = attention.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    hidden = decoder(x, batch["positions"], batch["mask"])
    handle.remove()
    logits = decoder.logits(hidden.flatten(0, 1)[batch["answered"]]).float()
    targets, weights = batch["targets"], batch["loss_weights"]
    token_losses = F.cross_entropy(logits, targets, reduction="none", ignore_index=IGNORED)
    zero = token_losses.new_zeros(())
    losses = {
        "answer": (token_losses * weights).sum() / weights.sum(),
        "naming": naming_loss(spread, batch["regions"], table) if len(batch["regions"].names) else zero,
        "looking": zero,
        "right": (logits.argmax(-1) == targets)[targets != IGNORED].float().mean(),
    }
    if len(batch["queries"]):
        q, k, _ = attention.queries_keys_values(seen[0], *rotary_tables(batch["positions"], decoder.config))
        rows, at = batch["queries"].unbind(1)
        visible = batch["mask"][rows, 0, at]
        losses["looking"] = looking_loss(q, k, batch["queries"], visible, batch["wanted"], config.looking_heads)
    return losses


def scale_at(step: int, steps: int, warmup: int) -> float:
    """Learning-rate factor: linear warm-up, cosine down to 0.1."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))


def experts_at(step: int, config: TrainConfig, n_experts: int, top_k: int) -> int:
    """All experts at first, then one fewer at a time down to top_k, reached three quarters through the rest."""
    start = config.dense_share * config.steps
    done = (step - start) / max(1.0, 0.75 * (config.steps - start))
    return n_experts if done < 0 else max(top_k, n_experts - 1 - int(done * (n_experts - top_k)))


class Run:
    """Model, optimiser and place in a run directory; `train` goes through both stages."""

    def __init__(
        self,
        start: Path,
        train: list[Path],
        val: list[Path],
        directory: Path,
        config: TrainConfig,
        names: list[str],
        device: str,
    ):
        self.config, self.directory, self.device = config, directory, torch.device(device)
        directory.mkdir(parents=True, exist_ok=True)
        self.start = start
        self.model, self.tokenizer, self.model_config = load_checkpoint(start, device=device)
        self.model.train()
        for parameter in (*self.model.vision.parameters(), self.model.decoder.embedding):
            parameter.requires_grad_(False)
        self.table = name_table(self.model, self.tokenizer, names)
        data = partial(PackedQuestions, tokenizer=self.tokenizer, config=self.model_config, names=names)
        self.train_data = {
            "align": data(train, questions=0, seed=config.seed),
            "answer": data(train, questions=config.questions, seed=config.seed),
        }
        self.val_data = data(val, questions=config.questions, seed=config.seed + 1)
        self.connector = list(self.model.connector.parameters())
        self.decoder = [p for p in self.model.decoder.parameters() if p.requires_grad]
        self.optimiser = torch.optim.AdamW(
            [{"params": self.connector}, {"params": self.decoder}],
            betas=(0.9, 0.95),
            eps=1e-8,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.step = {"align": 0, "answer": 0}
        self.target_top_k = self.model_config.decoder.n_experts // 2
        if (directory / "state.pt").exists():
            self._resume()
        else:
            chosen = self.train_data["align"].paths[:: max(1, len(self.train_data["align"]) // 100)]
            samples = [read_sample(path) for path in chosen]
            init_connector(self.model.cpu(), samples, torch.Generator().manual_seed(config.seed))
            self.model.to(self.device)

    def _resume(self) -> None:
        state = torch.load(self.directory / "state.pt", map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.step = state["step"]
        now = dataclasses.asdict(self.config)
        changed = {key: [old, now[key]] for key, old in state["config"].items() if now.get(key) != old}
        if changed:  # allowed, to give a run more steps; but never without a word
            self.log(stage="resume", changed=changed)

    def save(self) -> None:
        part = self.directory / "state.part"
        state = {
            "config": dataclasses.asdict(self.config),
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "step": self.step,
        }
        torch.save(state, part)
        os.replace(part, self.directory / "state.pt")

    def log(self, **record: Any) -> None:
        line = json.dumps({k: round(v, 5) if isinstance(v, float) else v for k, v in record.items()})
        steps_log.info("%s", line)
        with (self.directory / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def train(self) -> None:
        self._stage("align", self.config.align_steps, self.config.align_batch)
        self._stage("answer", self.config.steps, self.config.batch)
        self.export()

    def _batches(self, data: PackedQuestions, batch: int, first: int, steps: int, seed: int) -> Loader[Batch]:
        sampler = Visits(data.groups, batch, first, steps, seed)
        return Loader(data, batch_sampler=sampler, collate=collate, num_workers=1, prefetch_factor=6)

    def _stage(self, stage: str, steps: int, size: int) -> None:
        c, first = self.config, self.step[stage]
        began, done = time.monotonic(), 0
        for step, batch in enumerate(self._batches(self.train_data[stage], size, first, steps, c.seed), start=first):
            losses = self._update(stage, step, steps, to_device(batch, self.device))
            self.step[stage] = step + 1
            done += size
            if not all(math.isfinite(v) for v in losses.values()):
                raise FloatingPointError(f"{stage} step {step}: a loss is not finite: {losses}")
            if step % 20 == 0:
                self.log(stage=stage, step=step, **losses, samples_per_s=done / (time.monotonic() - began))
            if (step + 1) % c.save_every == 0 or step + 1 == steps:
                self.save()
            if stage == "answer" and ((step + 1) % c.val_every == 0 or step + 1 == steps):
                self.log(stage="val", step=step, **self.validate())

    def _update(self, stage: str, step: int, steps: int, batch: Batch) -> dict[str, float]:
        c, d = self.config, self.model_config.decoder
        scale = scale_at(step, steps, c.warmup)
        rates = (c.lr_align, 0.0) if stage == "align" else (c.lr_connector, c.lr_decoder)
        for group, rate in zip(self.optimiser.param_groups, rates, strict=True):
            group["lr"] = rate * scale
        with torch.autocast(self.device.type, torch.bfloat16):
            if stage == "align":
                spread = scatter_cells(image_cells(self.model, batch), batch["token_index"], batch["ids"].shape[1])
                losses = {"naming": naming_loss(spread, batch["regions"], self.table)}
                total = losses["naming"]
            else:
                self.set_experts(experts_at(step, c, d.n_experts, self.target_top_k))
                losses = answer_losses(self.model, batch, self.table, c)
                total = losses["answer"] + c.naming * losses["naming"] + c.looking * losses["looking"]
        total.backward()
        norms = [nn.utils.clip_grad_norm_(group, c.clip) for group in (self.connector, self.decoder)]
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        return {k: v.item() for k, v in losses.items()} | {"norm": max(n.item() for n in norms)}

    def set_experts(self, top_k: int) -> None:
        for block in self.model.decoder.blocks:
            assert isinstance(block.ffn, SparseFFN)
            block.ffn.top_k = top_k

    @torch.no_grad()
    def validate(self, batches: int = 16) -> dict[str, float]:
        sums: dict[str, float] = {}
        for batch in self._batches(self.val_data, self.config.batch, 0, batches, 0):
            with torch.autocast(self.device.type, torch.bfloat16):
                losses = answer_losses(self.model, to_device(batch, self.device), self.table, self.config)
            sums = {k: sums.get(k, 0.0) + v.item() / batches for k, v in losses.items()}
        return sums

    def export(self) -> None:
        """Write the trained model in hub layout, with the number of experts it ended with."""
        decoder = dataclasses.replace(self.model_config.decoder, top_k=self.target_top_k)
        self.model.config = dataclasses.replace(self.model_config, decoder=decoder)
        save_checkpoint(self.model, self.start / "tokenizer.json", self.directory / "checkpoint")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--start", required=True, type=Path, help="checkpoint from molmo_edge.training.nano_start")
    parser.add_argument("--train", required=True, type=Path, nargs="+", help="features of the training pictures")
    parser.add_argument(
        "--val", required=True, type=Path, nargs="+", help="features of others, for the validation loss"
    )
    parser.add_argument("--names", required=True, type=Path, help="JSON list of the names to learn")
    parser.add_argument("--run", required=True, type=Path, help="directory for state, log and checkpoint")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for field in dataclasses.fields(TrainConfig):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)
    args = vars(parser.parse_args())
    config = TrainConfig(**{f.name: args[f.name] for f in dataclasses.fields(TrainConfig)})
    names = json.loads(args["names"].read_text(encoding="utf-8"))
    with shown():
        Run(args["start"], args["train"], args["val"], args["run"], config, names, args["device"]).train()


if __name__ == "__main__":
    main()
