"""Molmo in PyTorch: vision tower, connector, decoders (dense and OLMoE), checkpoint loading.

Names are looked up on first use, so that `molmo_edge.checkpoints.tensor_sources`, which needs no torch,
can be imported without it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from molmo_edge.modeling.decoder import Decoder, KVCache
    from molmo_edge.modeling.model import Molmo
    from molmo_edge.modeling.weights import load_checkpoint, save_checkpoint

__all__ = ["Decoder", "KVCache", "Molmo", "load_checkpoint", "save_checkpoint"]

_HOME = {"Decoder": "decoder", "KVCache": "decoder", "Molmo": "model"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME.get(name, 'weights')}"), name)
