"""How a GGUF decoder is run: what llama.cpp lets one choose, and what is chosen where nobody does."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from molmo_edge.errors import EngineError
from molmo_edge.system.key_values import parse_key_values

# Of keys and values, by ggml's numbers for them.
CACHE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8, "iq4_nl": 20, "bf16": 30}
_YES_NO = {"yes": True, "no": False, "auto": None}


@dataclass(frozen=True)
class LlamaOptions:
    """Raises EngineError for a setting that is none."""

    gpu_layers: int | None = None  # layers of the decoder on a GPU; None: all where there is one
    flash_attention: bool | None = None  # None: on a GPU that llama.cpp has it for, and where the cache needs it
    cache: str = "f16"  # keys and values, one of CACHE_TYPES; values below 16 bits need flash attention
    # CPU: weights laid out anew, which takes their memory twice. None: where that was measured to be faster (q4_0; on
    # ARM, where it was not measured, as llama.cpp does) and there is memory for it.
    repack: bool | None = None

    def __post_init__(self) -> None:
        layers = self.gpu_layers
        if layers is not None and (isinstance(layers, bool) or not isinstance(layers, int) or layers < 0):
            raise EngineError(f"gpu_layers must be a whole number of layers, it is {layers!r}")
        for name in ("flash_attention", "repack"):
            if getattr(self, name) not in (True, False, None):
                raise EngineError(f"{name} must be True, False or None, it is {getattr(self, name)!r}")
        if self.cache not in CACHE_TYPES:
            raise EngineError(f"the cache type {self.cache!r} is not known; known are {', '.join(CACHE_TYPES)}")
        if self.flash_attention is False and self.cache not in ("f32", "f16", "bf16"):
            raise EngineError(f"a cache in {self.cache} needs flash attention, which was switched off")

    @classmethod
    def parse(cls, text: str) -> LlamaOptions:
        """From "gpu_layers=20,cache=q8_0,flash_attention=yes,repack=no"; "auto" leaves a choice to llama.cpp."""
        given: dict[str, Any] = {}
        known = [field.name for field in dataclasses.fields(cls)]
        expected = f"the options of llama.cpp are {', '.join(f'{name}=VALUE' for name in known)}, separated by commas"
        try:
            pairs = parse_key_values(text)
        except ValueError as error:
            raise EngineError(f"{error} is not NAME=VALUE: {expected}") from None
        for name, value in pairs.items():
            if name not in known:
                raise EngineError(f'"{name}" is not a known option: {expected}')
            if name == "cache":
                given[name] = value
            elif name == "gpu_layers":
                if value != "auto" and not value.isdecimal():
                    raise EngineError(f"gpu_layers must be a whole number of layers, it is {value!r}")
                given[name] = None if value == "auto" else int(value)
            elif value in _YES_NO:
                given[name] = _YES_NO[value]
            else:
                raise EngineError(f"{name} must be yes, no or auto, it is {value!r}")
        return cls(**given)
