"""Map the reference's own checkpoints (`config.yaml` and `model.pt`, as in its tarballs) to hub names.

Dense models differ from the hub's only by the prefix "model.". In MolmoE the blocks have other names, and all experts
of a layer are in one matrix, with the down projections transposed (olmo/model.py::OLMoEBlock and megablocks' MLP).
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from molmo_edge.checkpoints.hub_config import REFERENCE_CONFIG, read_reference_config
from molmo_edge.checkpoints.tensor_names import hub_shapes
from molmo_edge.checkpoints.tensor_sources import DTYPES, CheckpointError, Entry
from molmo_edge.config import MolmoConfig

_EXPERT = re.compile(r"model\.(transformer\.blocks\.\d+\.)mlp\.experts\.(\d+)\.(gate|up|down)_proj\.weight")
_FUSED = {"gate": "w1", "up": "v1", "down": "w2"}


def hub_entries(entries: dict[str, Entry], path: Path) -> dict[str, Entry]:
    """The tensors of the `model.pt` at `path` by hub name; those of an expert are slices of the fused matrix.

    Raises ConfigError for the config.yaml next to it, and CheckpointError for a missing tensor or a fused matrix of the
    wrong shape.
    """
    config = read_reference_config(path.with_name(REFERENCE_CONFIG))
    found = {}
    for name in hub_shapes(config):
        match = _EXPERT.fullmatch(name)
        source = f"{match[1]}ffn.experts.mlp.{_FUSED[match[3]]}" if match else _renamed(name, config)
        if source not in entries:
            raise CheckpointError(f"{path} has no tensor {source}: is it complete, and does config.yaml belong to it?")
        entry = entries[source]
        found[name] = _expert(source, entry, config, int(match[2]), match[3]) if match else entry
    return found


def _expert(name: str, fused: Entry, config: MolmoConfig, expert: int, part: str) -> Entry:
    d = config.decoder
    if fused.shape != (d.n_experts * d.ffn_dim, d.d_model):
        raise CheckpointError(
            f"{fused.path}: tensor {name} has shape {list(fused.shape)}, but the "
            f"configuration has {d.n_experts} experts of {d.ffn_dim} x {d.d_model}"
        )
    row, column = fused.strides or (d.d_model, 1)
    offset = fused.offset + expert * d.ffn_dim * row * DTYPES[fused.dtype].itemsize
    if part == "down":  # stored transposed
        return replace(fused, shape=(d.d_model, d.ffn_dim), strides=(column, row), offset=offset)
    return replace(fused, shape=(d.ffn_dim, d.d_model), strides=(row, column), offset=offset)


def _renamed(name: str, config: MolmoConfig) -> str:
    if config.decoder.n_experts:
        name = name.replace("lm_head.weight", "transformer.ff_out.weight")
        name = re.sub(r"(blocks\.\d+\.)attn\.", r"\1", name)
        name = re.sub(r"(blocks\.\d+\.)mlp\.ff_norm\.", r"\1ff_norm.", name)
        name = re.sub(r"(blocks\.\d+\.)mlp\.gate\.", r"\1ffn.router.layer.", name)
    return name.removeprefix("model.")
