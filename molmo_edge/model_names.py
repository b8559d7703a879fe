"""The short names of the published models: `Molmo("molmoe-1b")`, `molmo-edge pull molmo2-4b`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

APACHE = "Apache-2.0"


@dataclass(frozen=True)
class NamedModel:
    """A published model. Licenses are those of the public model cards and repositories."""

    name: str
    hub_id: str | None  # None: part of this package
    download: int | None  # bytes of the weights on the hub, approximately; None: unknown
    license: str  # of the weights
    bases: tuple[tuple[str, str], ...]  # the models that it was trained from, and their licenses


_CLIP = ("CLIP ViT-L/14-336", "MIT")
_SIGLIP2 = ("SigLIP2 so400m/14-384", APACHE)
# Download sizes: 28.9 GB is the size of MolmoE's file; the others are 4 bytes for each parameter, since the reference
# converts checkpoints to the hub in float32. Before a download the hub's own numbers are shown.
_MODELS = (
    NamedModel("nano", None, 0, APACHE, (("DINOv2 ViT-S/14", APACHE), ("NanoDet-g", APACHE), ("SmolLM2-135M", APACHE))),
    NamedModel("molmoe-1b", "allenai/MolmoE-1B-0924", 28_900_000_000, APACHE, (("OLMoE-1B-7B-0924", APACHE), _CLIP)),
    NamedModel("molmo-7b-d", "allenai/Molmo-7B-D-0924", 32_100_000_000, APACHE, (("Qwen2-7B", APACHE), _CLIP)),
    NamedModel(
        "molmo-7b-o", "allenai/Molmo-7B-O-0924", 30_700_000_000, APACHE, (("OLMo-7B-1024-preview", APACHE), _CLIP)
    ),
    NamedModel(
        "molmo-72b", "allenai/Molmo-72B-0924", 293_000_000_000, APACHE, (("Qwen2-72B", "Tongyi Qianwen"), _CLIP)
    ),
    NamedModel("molmo2-4b", "allenai/Molmo2-4B", 19_400_000_000, APACHE, (("Qwen3-4B", APACHE), _SIGLIP2)),
    NamedModel("molmo2-8b", "allenai/Molmo2-8B", 34_600_000_000, APACHE, (("Qwen3-8B", APACHE), _SIGLIP2)),
    NamedModel("molmo2-o-7b", "allenai/Molmo2-O-7B", 31_000_000_000, APACHE, (("Olmo-3-7B", APACHE), _SIGLIP2)),
    NamedModel("molmopoint-8b", "allenai/MolmoPoint-8B", None, APACHE, (("Qwen3-8B", APACHE), _SIGLIP2)),
)
NAMED_MODELS = {model.name: model for model in _MODELS}


def full_name(model: object) -> object:
    """The hub id of a short name; everything else unchanged. A file or directory with that name comes first."""
    named = NAMED_MODELS.get(model) if isinstance(model, str) else None
    if named is None or named.hub_id is None or Path(named.name).exists():
        return model
    return named.hub_id


def short_name(hub_id: str) -> str | None:
    """The short name of a hub id, if it has one."""
    return next((model.name for model in _MODELS if model.hub_id == hub_id), None)
