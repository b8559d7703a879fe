"""From random weights, the connector's among them, to exact answers about eight pictures: the whole way in one test."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from molmo_edge import Molmo as Sdk
from molmo_edge.config import DecoderConfig, ImageConfig, MolmoConfig, VisionConfig
from molmo_edge.data.drawn.pointing import labelled_scene
from molmo_edge.data.examples import Annotation, Example
from molmo_edge.frontend.points import format_points
from molmo_edge.training.encoding import Encoding
from molmo_edge.training.forward import ForwardConfig
from molmo_edge.training.optimizer import OptimizerConfig, Rate
from molmo_edge.training.recipe import Recipe

GOLDEN = Path(__file__).parent / "golden"
POINT, COUNT = "Point to them.", "How many?"


@dataclass(frozen=True)
class Eight:
    """Pictures that are asked the same: only by looking can they be told apart."""

    rows: tuple[tuple[np.ndarray, str, str], ...]
    name: str = "eight"

    def __len__(self) -> int:
        return len(self.rows)

    def example(self, index: int, _rng: np.random.Generator) -> Example:
        picture, points, count = self.rows[index]
        return Example(picture, (Annotation("demo", (POINT, points)), Annotation("demo", (COUNT, count))))


def eight() -> Eight:
    rows = []
    for number in range(8):
        scene = labelled_scene(np.random.default_rng(number))
        label, points = min(((lb, p) for lb, p in scene.points.items() if p), key=lambda item: len(item[1]))
        picture = np.asarray(scene.image.convert("RGB"))
        rows.append((picture, format_points(points, label), f"There are {len(points)} of {label}."))
    return Eight(tuple(rows))


@pytest.mark.slow
def test_eight_pictures_are_learnt_to_the_letter(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from molmo_edge.checkpoints.weight_files import open_tensors
    from molmo_edge.frontend.tokenizer import Tokenizer
    from molmo_edge.modeling import Molmo, save_checkpoint
    from molmo_edge.training.parallel import world
    from molmo_edge.training.trainer import Data, Trainer, build

    d = 64
    config = MolmoConfig(
        ImageConfig(crop_size=112, overlap_margins=(2, 2), max_crops=2),
        VisionConfig("openai", d, 4, 4, 4 * d, n_pos=65, layers=(-1, -3)),
        DecoderConfig(
            d_model=d,
            n_layers=3,
            n_heads=4,
            n_kv_heads=4,
            ffn_dim=d,
            n_experts=4,
            top_k=2,
            vocab_size=500,
            embedding_size=512,
            additional_vocab_size=16,
            qk_norm=True,
        ),
        projector_dim=d,
    )
    start = tmp_path / "start"
    model = Molmo(config).init_weights(std=d**-0.5, generator=torch.Generator().manual_seed(0))
    save_checkpoint(model, GOLDEN / "molmoe" / "tokenizer.json", start)
    rate = Rate(2e-3, 15)
    recipe = Recipe(
        steps=150,
        batch=8,
        micro=8,
        mixture=(),
        precision="fp32",
        encoding=Encoding(sequence=1024),
        forward=ForwardConfig(answer_dropout=0.0, recompute=False),
        optimizer=OptimizerConfig(rate, rate, rate),
        max_crops=None,
        save_every=1000,
        log_every=25,
        workers=0,
    )
    data = eight()
    with world("cpu") as here:
        trainable = build(config, open_tensors(start), "start", recipe, here)
        tokenizer = Tokenizer.from_file(start / "tokenizer.json")
        trained = Trainer(trainable, tokenizer, Data([data], [1.0]), recipe, tmp_path / "run", here).train()
    molmo = Sdk(trained)
    for picture, points, count in data.rows:
        assert molmo.ask(picture, POINT, max_new_tokens=400).text == points
        assert molmo.ask(picture, COUNT, max_new_tokens=60).text == count
