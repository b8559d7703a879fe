"""Hub-layout directory <-> `modeling.Molmo`, tensor by tensor."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from molmo_edge.config import MolmoConfig
from molmo_edge.hub_config import to_hub_config
from molmo_edge.modeling.checkpoint import CheckpointError, TensorSource, open_tensors
from molmo_edge.modeling.layout import hub_layout
from molmo_edge.modeling.model import Molmo
from molmo_edge.tokenizer import Tokenizer


def load_checkpoint(
    directory: str | Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> tuple[Molmo, Tokenizer, MolmoConfig]:
    """Read a checkpoint directory in hub layout (config.json, tokenizer.json, weights).

    Returns the model in eval mode, its tokenizer and its configuration. Raises CheckpointError naming
    the file and the tensor where one is missing or has another shape than config.json says.
    """
    directory = Path(directory)
    config = MolmoConfig.from_hub(directory)
    tokenizer = Tokenizer.from_file(directory / "tokenizer.json")
    model = build_model(config, open_tensors(directory), where=str(directory), dtype=dtype, device=device)
    return model, tokenizer, config


def build_model(
    config: MolmoConfig,
    source: TensorSource,
    *,
    where: str,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> Molmo:
    """A `Molmo` in eval mode with its parameters filled from `source`, one hub tensor in memory at a time."""
    with torch.device("meta"):
        model = Molmo(config)
    model = model.to(dtype).to_empty(device=device)
    parameters = dict(model.named_parameters())
    known = set(source.names())
    with torch.no_grad():
        for name, slot in hub_layout(config).items():
            parameter = parameters.pop(name)
            for e, hub_name in enumerate(slot):
                target = parameter if len(slot) == 1 else parameter[e]
                if hub_name not in known:
                    raise CheckpointError(f"{where} has no tensor {hub_name}: the download may be incomplete")
                if tuple(source.shape(hub_name)) != tuple(target.shape):
                    raise CheckpointError(
                        f"{where}: tensor {hub_name} has shape {list(source.shape(hub_name))}, "
                        f"but config.json asks for {list(target.shape)}"
                    )
                target.copy_(torch.from_numpy(np.array(source.get(hub_name))))  # a view of the file is read-only
    if unknown := sorted(name for name, parameter in parameters.items() if parameter.numel()):
        raise CheckpointError(f"no hub tensor is known for {', '.join(unknown)}")
    return model.eval()


def save_checkpoint(model: Molmo, tokenizer_json: str | Path, directory: str | Path) -> None:
    """Write config.json, preprocessor_config.json, tokenizer.json and model.safetensors (float32) in hub layout."""
    from safetensors.numpy import save_file

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    raw, preprocessor = to_hub_config(model.config)
    (directory / "config.json").write_text(json.dumps(raw, indent=1) + "\n", encoding="utf-8")
    (directory / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=1) + "\n", encoding="utf-8")
    (directory / "tokenizer.json").write_text(Path(tokenizer_json).read_text(encoding="utf-8"), encoding="utf-8")
    parameters = dict(model.named_parameters())
    tensors: dict[str, np.ndarray] = {}
    for name, slot in hub_layout(model.config).items():
        parameter = parameters[name].detach().float().cpu()
        parts = [parameter] if len(slot) == 1 else list(parameter)
        tensors |= {hub: np.ascontiguousarray(part.numpy()) for hub, part in zip(slot, parts, strict=True)}
    save_file(tensors, directory / "model.safetensors")
