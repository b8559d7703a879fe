"""Open the teacher of a run: the model itself, or its targets in a cache."""

from __future__ import annotations

from pathlib import Path

from molmo_edge.checkpoints.hub_config import read_config
from molmo_edge.checkpoints.identity import model_identity
from molmo_edge.checkpoints.weight_files import open_tensors
from molmo_edge.config import MolmoConfig
from molmo_edge.frontend.tokenizer import Tokenizer
from molmo_edge.training.distillation import Distillation
from molmo_edge.training.encoding import Encoder
from molmo_edge.training.features import FeatureCache, open_features
from molmo_edge.training.parallel import World
from molmo_edge.training.recipe import Recipe
from molmo_edge.training.teacher import OnlineTeacher, TargetSource, build_teacher, check_inputs, second_encoding
from molmo_edge.training.teacher_cache import cache_targets, check_cached, open_targets
from molmo_edge.training.trainer import Data, cache_features, compute_dtype


def check_teacher(
    directory: Path, student: MolmoConfig, tokenizer: Tokenizer, recipe: Recipe, *, cached: bool = False
) -> None:
    """Raise DistillError if the teacher in `directory` and the student do not fit together.

    cached: whether its targets are cached. Reads configurations and tokenizers alone, so call it before features are
    computed.
    """
    assert recipe.distill is not None
    config, theirs = read_config(directory), Tokenizer.from_file(directory / "tokenizer.json")
    Distillation(recipe.distill, student, config)
    if cached:
        check_cached(recipe.distill)
    check_inputs(recipe.distill, second_encoding(config, theirs, student, tokenizer, recipe))


def open_teacher(
    directory: Path,
    student: MolmoConfig,
    tokenizer: Tokenizer,
    data: Data,
    recipe: Recipe,
    here: World,
    *,
    cache: Path | None = None,
    features: FeatureCache | None = None,
    features_root: Path | None = None,
    step: int = 0,
) -> TargetSource:
    """The teacher in `directory` for a run that distills; with `cache`, its targets, computed now where missing.

    features: of the student's towers, below features_root, where those of the teacher's are cached, too. step:
    completed steps of a run that is resumed (`run_checkpoints.completed_steps`), whose targets are not needed.
    Collective over the ranks. Raises DistillError if teacher and student do not fit together.
    """
    assert recipe.distill is not None
    check_teacher(directory, student, tokenizer, recipe, cached=cache is not None)
    config, source = read_config(directory), open_tensors(directory)
    theirs, own = Tokenizer.from_file(directory / "tokenizer.json"), None
    if features_root is not None:
        own = open_features(features_root, config, source, recipe.image(config), compute_dtype(recipe, here))
    second = second_encoding(config, theirs, student, tokenizer, recipe, own, features)
    check_inputs(recipe.distill, second)
    if features_root is not None:
        own = cache_features(features_root, config, source, data, recipe, here, theirs.special)

    def build() -> OnlineTeacher:
        dtype = compute_dtype(recipe, here)
        return build_teacher(
            directory, student, tokenizer, recipe, here, dtype, features=own, student_features=features
        )

    if cache is None:
        return build()
    targets = open_targets(cache, model_identity(directory), recipe.distill, student, tokenizer.definition, second)
    encoder = Encoder(tokenizer, recipe.image(student), recipe.encoding, features, student)
    cache_targets(targets, data.sets, data.rates, encoder, recipe, here, second, build, step)
    here.wait()
    return targets
