"""Options of llama.cpp for a GGUF decoder."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from molmo_edge.errors import EngineError
from molmo_edge.system.key_values import parse_key_values

# Types of keys and values, with ggml's numbers; the package `gguf`, which lists them, is not a core dependency.
CACHE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8, "iq4_nl": 20, "bf16": 30}
_YES_NO = {"yes": True, "no": False, "auto": None}


@dataclass(frozen=True)
class LlamaOptions:
    """How llama.cpp runs a GGUF decoder. Raises EngineError for an invalid value."""

    gpu_layers: int | None = None  # layers of the decoder on a GPU; None: all, if there is one
    flash_attention: bool | None = None  # None: on GPUs that support it, and if the cache type needs it
    cache: str = "f16"  # type of keys and values, one of CACHE_TYPES; below 16 bits it needs flash attention
    # On the CPU, weights repacked for its kernels take their memory twice. None: if there is memory for it and it is
    # known to be faster (q4_0 and iq4_nl on x86), or, on ARM, llama.cpp's own default.
    repack: bool | None = None

    def __post_init__(self) -> None:
        layers = self.gpu_layers
        if layers is not None and (isinstance(layers, bool) or not isinstance(layers, int) or layers < 0):
            raise EngineError(f"gpu_layers must be a whole number of 0 or more, not {layers!r}")
        for name in ("flash_attention", "repack"):
            if getattr(self, name) not in (True, False, None):
                raise EngineError(f"{name} must be True, False or None, not {getattr(self, name)!r}")
        if self.cache not in CACHE_TYPES:
            raise EngineError(f"{self.cache!r} is not a supported cache type (supported: {', '.join(CACHE_TYPES)})")
        if self.flash_attention is False and self.cache not in ("f32", "f16", "bf16"):
            raise EngineError(f"the cache type {self.cache} needs flash attention, which is switched off")

    @classmethod
    def parse(cls, text: str) -> LlamaOptions:
        """Parse "gpu_layers=20,cache=q8_0,flash_attention=yes,repack=no"; "auto" stands for None."""
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
                    raise EngineError(f"gpu_layers must be a whole number of 0 or more, not {value!r}")
                given[name] = None if value == "auto" else int(value)
            elif value in _YES_NO:
                given[name] = _YES_NO[value]
            else:
                raise EngineError(f"{name} must be yes, no or auto, not {value!r}")
        return cls(**given)
