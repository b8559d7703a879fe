"""The ViT over one crop: CLIP, DINOv2 or SigLIP, determined by VisionConfig alone.

Reference: olmo/image_vit.py, VisionTransformer, DinoVisionTransformer and SiglipVisionTransformer.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from molmo_edge.config import VisionConfig
from molmo_edge.modeling.linear import Linear, Module


def quick_gelu(x: Tensor) -> Tensor:
    """CLIP's approximation of GELU."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": quick_gelu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
}


class VisionAttention(Module):
    """Multi-head attention of the blocks and, with separate queries, of the connector's pooling."""

    def __init__(self, input_dim: int, d_model: int, n_heads: int, *, output: bool = True):
        super().__init__()
        self.n_heads = n_heads
        self.wq = Linear(input_dim, d_model)
        self.wk = Linear(input_dim, d_model)
        self.wv = Linear(input_dim, d_model)
        self.wo = Linear(d_model, d_model) if output else None

    def forward(self, x: Tensor, memory: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """x [n, q, input_dim] attends to memory [n, k, input_dim] (x if None) -> [n, q, d_model].

        mask: bool [n, k], False for slots of memory that hold nothing.
        """
        memory = x if memory is None else memory
        q, k, v = self._split(self.wq(x)), self._split(self.wk(memory)), self._split(self.wv(memory))
        mask = None if mask is None else mask[:, None, None]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # [n, heads, q, head_dim]
        out = out.transpose(1, 2).flatten(2)
        return out if self.wo is None else self.wo(out)

    def _split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], self.n_heads, x.shape[-1] // self.n_heads).transpose(1, 2)


class VisionMLP(Module):
    """Two linear layers with the activation of `config` between them."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.w1 = Linear(config.d_model, config.mlp_dim)
        self.w2 = Linear(config.mlp_dim, config.d_model)
        self.act = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        """x [..., d_model] -> the same shape."""
        return self.w2(self.act(self.w1(x)))


class VisionBlock(Module):
    """Pre-norm block; DINOv2's LayerScale multiplies each branch."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.attention = VisionAttention(config.d_model, config.d_model, config.n_heads)
        self.feed_forward = VisionMLP(config)
        self.attention_norm = nn.LayerNorm(config.d_model, eps=config.norm_eps)
        self.ffn_norm = nn.LayerNorm(config.d_model, eps=config.norm_eps)
        self.layer_scale = config.parts.layer_scale
        if self.layer_scale:
            self.lambda1 = nn.Parameter(torch.ones(config.d_model))
            self.lambda2 = nn.Parameter(torch.ones(config.d_model))

    def forward(self, x: Tensor) -> Tensor:
        """x [n, n_pos, d_model] -> the same shape."""
        attended = self.attention(self.attention_norm(x))
        x = x + (attended * self.lambda1 if self.layer_scale else attended)
        fed = self.feed_forward(self.ffn_norm(x))
        return x + (fed * self.lambda2 if self.layer_scale else fed)


class VisionTransformer(Module):
    """A ViT such as CLIP, SigLIP or DINOv2, without its final norm; `config.parts` names its optional parts."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        parts = config.parts
        self.class_embedding = nn.Parameter(torch.zeros(config.d_model)) if parts.class_token else None
        self.positional_embedding = nn.Parameter(torch.zeros(config.n_pos, config.d_model))
        self.patch_embedding = Linear(3 * config.patch_size**2, config.d_model, bias=parts.patch_bias)
        self.pre_ln = nn.LayerNorm(config.d_model, eps=config.norm_eps) if parts.pre_ln else None
        self.blocks = cast("list[VisionBlock]", nn.ModuleList(VisionBlock(config) for _ in range(config.n_layers)))

    def forward(self, crops: Tensor) -> Tensor:
        """Patch features of each crop: the outputs of `config.layers`, concatenated in that order.

        crops: float32 [n, patches, 588] in every precision, because in bfloat16 some pixel of nearly every crop rounds
        to exactly -1. A crop whose pixels are ALL -1 is padding and gives zeros (reference:
        MolmoVisionBackbone.encode_image; the public MolmoE code tests for ANY, which blanks real crops).
        Returns float32 [n, patches, d_model * len(layers)].
        """
        x = self.begin(crops)
        outputs = []
        for block in self.running:
            x = block(x)
            outputs.append(x)
        return self.end(crops, outputs)

    @property
    def running(self) -> list[VisionBlock]:
        """The blocks up to the last one whose output is used."""
        return self.blocks[: self.config.last_layer + 1]

    def begin(self, crops: Tensor) -> Tensor:
        """crops [n, patches, 588] -> the input of the first block, [n, n_pos, d_model]."""
        x = self.patch_embedding(crops)
        if self.class_embedding is not None:
            x = torch.cat([self.class_embedding.to(x.dtype).expand(len(x), 1, -1), x], dim=1)
        x = x + self.positional_embedding.to(x.dtype)
        return x if self.pre_ln is None else cast(Tensor, self.pre_ln(x))

    def end(self, crops: Tensor, outputs: list[Tensor]) -> Tensor:
        """Outputs of the running blocks -> [n, patches, d_model * len(layers)], zeros for crops that are padding."""
        real = ~torch.all(crops.flatten(1) == -1, dim=1)  # [n]
        # Negative indices count from the last of all n_layers blocks, whether or not it runs.
        first = self.config.n_pos - self.config.n_patches  # without the class token
        chosen = [outputs[layer % self.config.n_layers][:, first:] for layer in self.config.layers]
        x = torch.cat(chosen, dim=-1)
        return x * real[:, None, None].to(x.dtype)
