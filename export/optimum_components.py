"""The components of Molmo for optimum's exporter: modules, sample inputs, and patches for tracing.

Importing this registers the model type "molmo" with transformers' AutoConfig and AutoModel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from optimum.exporters.onnx import OnnxConfig
from optimum.exporters.onnx.model_patcher import ModelPatcher, PatchingSpec
from optimum.utils import NormalizedConfig
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig

from molmo_edge.checkpoints.tensor_names import hub_layout
from molmo_edge.checkpoints.tensor_sources import TensorSource
from molmo_edge.config import MolmoConfig
from molmo_edge.modeling import connector, decoder, vision
from molmo_edge.modeling.model import Molmo

Axes = dict[str, dict[int, str]]  # name of an input or output -> its axes of free size


class MolmoHubConfig(PretrainedConfig):  # type: ignore[misc]
    """A checkpoint's config.json as transformers stores it; molmo_edge.checkpoints.hub_config reads it."""

    model_type = "molmo"


class MolmoForExport:
    """The model that AutoModel creates. It has no weights: `main_export` gets the components from `load_components`."""

    __module__ = "transformers_modules.molmo_edge"  # optimum finds a model's library by the module of its class
    config_class = MolmoHubConfig
    dtype = torch.float32

    def __init__(self, config: MolmoHubConfig) -> None:
        self.config = config

    @classmethod
    def from_pretrained(cls, _directory: str, *, config: MolmoHubConfig, **_: Any) -> MolmoForExport:
        """Return the model for `config`; nothing is read from the directory."""
        return cls(config)


AutoConfig.register(MolmoHubConfig.model_type, MolmoHubConfig, exist_ok=True)
AutoModel.register(MolmoHubConfig, MolmoForExport, exist_ok=True)


class Component(nn.Module):
    """A component as optimum expects a model: with a config, and inputs named like the arguments of `forward`."""

    part: Any
    weights: tuple[str, ...]  # prefixes of its parameter names in modeling.Molmo
    inputs: Axes
    outputs: Axes

    def __init__(self, part: nn.Module, config: MolmoHubConfig) -> None:
        super().__init__()
        self.part, self.config = part, config
        self.requires_grad_(False).eval()


class VisionEncoder(Component):
    """The vision tower: crops -> features."""

    weights, inputs, outputs = ("vision.",), {"crops": {0: "n"}}, {"features": {0: "n"}}

    def forward(self, crops: Tensor) -> Any:
        """crops [n, patches^2, 3 * patch_size^2] -> features [n, patches^2, feature_dim]."""
        return self.part(crops)


class Connector(Component):
    """The connector: features and masks -> image features."""

    weights = ("connector.",)
    inputs, outputs = {"features": {0: "n"}, "masks": {0: "n"}}, {"image_features": {0: "n"}}

    def forward(self, features: Tensor, masks: Tensor) -> Any:
        """features [n, patches^2, feature_dim], masks [n, patches^2] -> image features [n, cells^2, d_model]."""
        return self.part(features, masks)


class EmbedTokens(Component):
    """The embedding table, with the rows of additional tokens at its end."""

    weights = ("decoder.embedding", "decoder.new_embedding")
    inputs, outputs = {"ids": {0: "n"}}, {"embeddings": {0: "n"}}

    def forward(self, ids: Tensor) -> Any:
        """ids int64 [n] -> embeddings [n, d_model]."""
        return self.part(ids)


class DecoderWithoutCache(Component):
    """The decoder, which processes the whole sequence at every call."""

    weights = ("decoder.",)
    inputs, outputs = {"embeddings": {1: "n"}}, {"logits": {}}

    def forward(self, embeddings: Tensor) -> Any:
        """embeddings [1, n, d_model] -> logits [1, vocabulary] of the last position."""
        return self.part.logits(self.part(embeddings)[:, -1])


COMPONENTS: dict[str, type[Component]] = {
    "vision_encoder": VisionEncoder,
    "connector": Connector,
    "embed_tokens": EmbedTokens,
    "decoder_without_cache": DecoderWithoutCache,
}
BUNDLE_COMPONENTS = ("vision_encoder", "connector", "embed_tokens")  # interchangeable with a bundle's


def _length(x: Any) -> Any:
    return x.shape[0] if isinstance(x, Tensor) else len(x)


def _all_experts(ffn: decoder.SparseFFN, x: Tensor) -> Tensor:
    """Run every expert for every token: a trace cannot sort tokens by expert, as the model does."""
    flat = x.reshape(-1, x.shape[-1])
    return decoder.mix_experts(flat, *ffn.route(flat), (ffn.gate, ffn.up, ffn.down), "wide").view_as(x)


def _repeat_heads(x: Tensor, repeats: int, dim: int) -> Tensor:
    """As Tensor.repeat_interleave."""
    x = x.unsqueeze(dim + 1)
    return x.expand(*(repeats if axis == dim + 1 else -1 for axis in range(x.ndim))).flatten(dim, dim + 1)


class _Patcher(ModelPatcher):  # type: ignore[misc]
    def patch_ops(self) -> None:
        super().patch_ops()
        # After optimum's own patch, which would fix the traced length.
        torch.Tensor.repeat_interleave = _repeat_heads  # type: ignore[method-assign,assignment]


class ComponentOnnxConfig(OnnxConfig):  # type: ignore[misc]
    """Inputs, outputs and sample inputs of one component, for `custom_onnx_configs` of `main_export`."""

    NORMALIZED_CONFIG_CLASS = NormalizedConfig
    _MODEL_PATCHER = _Patcher

    def __init__(self, component: str, model: MolmoConfig, config: MolmoHubConfig) -> None:
        super().__init__(config)
        self.component, self.model = component, model
        # len() of a tensor is an int, which a trace makes a constant; optimum only hides the warning.
        self.PATCHING_SPECS = [
            *(PatchingSpec(module, "len", _length, len) for module in (vision, connector, decoder)),
            PatchingSpec(decoder.SparseFFN, "forward", _all_experts, decoder.SparseFFN.forward),
        ]

    @property
    def inputs(self) -> Axes:
        """The component's inputs and their axes of free size."""
        return COMPONENTS[self.component].inputs

    @property
    def outputs(self) -> Axes:
        """The component's outputs and their axes of free size."""
        return COMPONENTS[self.component].outputs

    def generate_dummy_inputs(self, framework: str = "pt", *, n: int = 2, **_: Any) -> dict[str, Any]:
        """Sample inputs of size `n` with every kind of patch and both kinds of id."""
        m, rng = self.model, np.random.default_rng(n)
        patches, rows = m.image.patches**2, m.decoder.embedding_size + m.decoder.additional_vocab_size
        crops = rng.normal(size=(n, patches, 3 * m.vision.patch_size**2))
        crops[-1] = -1  # padding
        makers: dict[str, Callable[[], np.ndarray]] = {
            "crops": lambda: crops,
            "features": lambda: rng.normal(size=(n, patches, m.feature_dim)),
            "masks": lambda: rng.choice([-1, 0, 0.5, 1], size=(n, patches)),
            "ids": lambda: np.append(rng.integers(0, rows, n - 1), rows - 1),
            "embeddings": lambda: rng.normal(size=(1, n, m.decoder.d_model)),
        }
        made = {name: makers[name]().astype(np.int64 if name == "ids" else np.float32) for name in self.inputs}
        return made if framework == "np" else {name: torch.from_numpy(value) for name, value in made.items()}


def load_components(
    names: tuple[str, ...], model_config: MolmoConfig, tensors: TensorSource, config: MolmoHubConfig
) -> dict[str, Component]:
    """Load the named components, reading only their tensors."""
    with torch.device("meta"):
        model = Molmo(model_config)
    prefixes = tuple(prefix for name in names for prefix in COMPONENTS[name].weights)
    weights = {}
    if not model_config.decoder.additional_vocab_size:  # a table without rows has no tensor in the checkpoint
        weights["decoder.new_embedding"] = torch.empty(0, model_config.decoder.d_model)
    for name, slot in hub_layout(model_config).items():
        if name.startswith(prefixes):
            parts = [torch.from_numpy(np.require(tensors.get(hub), requirements="W")) for hub in slot]
            weights[name] = parts[0] if len(parts) == 1 else torch.stack(parts)
    model.load_state_dict(weights, strict=False, assign=True)
    return {name: COMPONENTS[name](_part(model, name), config) for name in names}


def _part(model: Molmo, component: str) -> nn.Module:
    if component == "embed_tokens":
        # One table: Decoder.embed branches on the ids, and a trace keeps one branch only.
        table = torch.cat([model.decoder.embedding, model.decoder.new_embedding])
        embedding: nn.Embedding = nn.Embedding.from_pretrained(table)
        return embedding
    if component == "decoder_without_cache":
        return model.decoder
    return model.vision if component == "vision_encoder" else model.connector
