"""The decoders: Qwen2, Qwen3, OLMo2 (post-norm) and OLMoE, determined by DecoderConfig alone.

Reference: olmo/model.py, OLMoSequentialBlock and OLMoEBlock.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from molmo_edge.config import DecoderConfig
from molmo_edge.modeling.linear import Linear, Module, match, working_dtype
from molmo_edge.modeling.rotary import rotary_frequencies

grouped_mm: Any = getattr(F, "grouped_mm", None)  # one product for all experts, since PyTorch 2.10

_EXACT = 64  # logits that are computed in float32 whatever the dtype of the head
BLOCK = 8  # rows: the grouped product's backward pass needs every expert's block aligned to 16 bytes

# Which keys a query attends to: bool [batch, 1, n, keys], True where it does; None: causal; or a function from
# q [batch, n_heads, n, head_dim] and k, v [batch, n_kv_heads, keys, head_dim] to the output of attention, shaped as q.
Mask = Tensor | Callable[[Tensor, Tensor, Tensor], Tensor] | None
# Applied to a branch before it is added to the residual stream: (branch [batch, n, d], its number) -> [batch, n, d].
Dropout = Callable[[Tensor, int], Tensor]


class RMSNorm(Module):
    """Normalised in float32, cast back, then multiplied by the weight: in bf16 the order matters.

    Reference: RMSLayerNorm.
    """

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x [..., dim] -> the same shape and dtype."""
        wide = x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight.to(x.dtype) * normed.to(x.dtype)


def rotary_tables(positions: Tensor, config: DecoderConfig, *, stretched: bool = False) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 [..., 1, head_dim], for integer positions [...] (rotate-half layout).

    stretched: those of the layers of `config.yarn`.
    """
    frequencies, scale = torch.from_numpy(rotary_frequencies(config, stretched=stretched)), 1.0
    if stretched and config.yarn is not None:
        scale = config.yarn.attention_factor
    angles = positions[..., None].float() * frequencies.to(positions.device)
    angles = torch.cat([angles, angles], dim=-1).unsqueeze(-2)
    return angles.cos() * scale, angles.sin() * scale


def layer_tables(positions: Tensor, config: DecoderConfig) -> list[tuple[Tensor, Tensor]]:
    """The rotary tables of each layer; layers that are stretched alike share them."""
    tables = [rotary_tables(positions, config)]
    stretched = config.yarn.layers if config.yarn else ()
    if stretched:
        tables.append(rotary_tables(positions, config, stretched=True))
    return [tables[layer in stretched] for layer in range(config.n_layers)]


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [batch, n, heads, head_dim]; computed in float32 whatever x is."""
    wide = x.float()
    a, b = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat([-b, a], dim=-1) * sin).to(x.dtype)


def image_attention_mask(image: Tensor, start: int = 0) -> Tensor:
    """The mask of a prefill in which image tokens attend to each other, and everything else is causal.

    image: bool [batch, n], True for image tokens. start: positions in the cache, which all of the n attend to; their
    own attention is not changed, so all images of a prompt must be in one prefill.
    Returns bool [batch, 1, n, start + n].
    """
    n = image.shape[1]
    causal = torch.ones(n, start + n, dtype=torch.bool, device=image.device).tril(start)
    return (causal | F.pad(image[:, :, None] & image[:, None], (start, 0)))[:, None]


@dataclass
class KVCache:
    """Keys and values of every layer, preallocated: two tensors [layers, batch, n_kv_heads, capacity, head_dim]."""

    keys: Tensor
    values: Tensor
    length: int = 0

    @classmethod
    def empty(cls, config: DecoderConfig, batch: int, capacity: int, like: Tensor) -> KVCache:
        """`like`: a tensor of the cache's dtype and device."""
        shape = (config.n_layers, batch, config.n_kv_heads, capacity, config.head_dim)
        return cls(like.new_zeros(shape), like.new_zeros(shape))

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v [batch, n_kv_heads, n, head_dim] from position `length`; return all up to their end."""
        end = self.length + k.shape[2]
        self.keys[layer, :, :, self.length : end] = k
        self.values[layer, :, :, self.length : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def copy(self, capacity: int | None = None) -> KVCache:
        """`capacity`: positions of the copy, at least `length`; None: the same number."""
        if capacity is None or capacity == self.keys.shape[3]:
            return KVCache(self.keys.clone(), self.values.clone(), self.length)
        shape = (*self.keys.shape[:3], capacity, self.keys.shape[4])
        twin = KVCache(self.keys.new_zeros(shape), self.values.new_zeros(shape), self.length)
        twin.keys[:, :, :, : self.length] = self.keys[:, :, :, : self.length]
        twin.values[:, :, :, : self.length] = self.values[:, :, :, : self.length]
        return twin


class Attention(Module):
    """Self-attention with rotary positions and grouped keys and values."""

    def __init__(self, config: DecoderConfig, layer: int):
        super().__init__()
        self.config, self.layer = config, layer
        d, q, kv = config.d_model, config.q_dim, config.kv_dim
        self.att_proj = Linear(d, q + 2 * kv, bias=config.qkv_bias)  # rows: q, k, v
        self.attn_out = Linear(q, d, bias=False)
        if config.qk_norm:
            self.q_norm, self.k_norm = (
                RMSNorm(config.head_dim if config.qk_norm_per_head else width, config.norm_eps) for width in (q, kv)
            )

    def queries_keys_values(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated q [batch, n_heads, n, head_dim] and k, v [batch, n_kv_heads, n, head_dim]."""
        c = self.config
        q, k, v = torch.split(self.att_proj(x), [c.q_dim, c.kv_dim, c.kv_dim], dim=-1)
        if c.qk_norm and not c.qk_norm_per_head:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.reshape(*t.shape[:-1], t.shape[-1] // c.head_dim, c.head_dim) for t in (q, k, v))
        if c.qk_norm_per_head:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Mask, cache: KVCache | None) -> Tensor:
        """x [batch, n, d_model] -> the same shape. cos, sin: of `rotary_tables`; k and v are appended to `cache`."""
        q, k, v = self.queries_keys_values(x, cos, sin)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        if mask is None or isinstance(mask, Tensor):
            repeats = self.config.n_heads // self.config.n_kv_heads
            if repeats > 1:
                k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        else:
            out = mask(q, k, v)
        return self.attn_out(out.transpose(1, 2).flatten(2))


class DenseFFN(Module):
    """SwiGLU whose up and gate projections are one matrix."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.ff_proj = Linear(config.d_model, 2 * config.ffn_dim, bias=False)  # rows: up, gate
        self.ff_out = Linear(config.ffn_dim, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., d_model] -> the same shape."""
        up, gate = self.ff_proj(x).chunk(2, dim=-1)
        return self.ff_out(F.silu(gate) * up)


@dataclass
class Routing:
    """The choices of the routers while it is `open`, one entry per layer: for a training step's losses and metrics."""

    open: bool = False
    logits: list[Tensor] = field(default_factory=list)  # per layer [tokens, experts]
    experts: list[Tensor] = field(default_factory=list)  # per layer int [tokens, top_k]


class SparseFFN(Module):
    """OLMoE's experts: softmax over all of them in float32, the top_k largest, NOT renormalised."""

    kernel = "auto"  # or "wide", "grouped", "loop", see `mix_experts`
    routing: Routing | None = None

    def __init__(self, config: DecoderConfig):
        super().__init__()
        d, ffn, e = config.d_model, config.ffn_dim, config.n_experts
        self.top_k = config.top_k
        self.router = Linear(d, e, bias=False)
        self.gate = nn.Parameter(torch.empty(e, ffn, d))
        self.up = nn.Parameter(torch.empty(e, ffn, d))
        self.down = nn.Parameter(torch.empty(e, d, ffn))

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [tokens, d] -> weights float32 [tokens, top_k] and expert ids [tokens, top_k]."""
        logits = self.router(x)
        weights, experts = choose_experts(logits, self.top_k)
        if self.routing is not None and self.routing.open:  # closed while activations are recomputed
            self.routing.logits.append(logits)
            self.routing.experts.append(experts)
        return weights, experts

    def forward(self, x: Tensor) -> Tensor:
        """x [..., d] -> float32 [..., d]."""
        flat = x.reshape(-1, x.shape[-1])
        return self.mix(flat, *self.route(flat)).view_as(x)

    def mix(self, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        """x [tokens, d], weights and experts [tokens, top_k] -> float32 [tokens, d]."""
        return mix_experts(x, weights, experts, (self.gate, self.up, self.down), self.kernel)

    def expert(self, x: Tensor, e: int) -> Tensor:
        """SwiGLU of expert `e` alone: x [n, d] -> [n, d]."""
        return _swiglu(match(x, self.gate), self.gate[e], self.up[e], self.down[e])


Matrices = tuple[Tensor, Tensor, Tensor]  # gate and up [experts, ffn, d], down [experts, d, ffn]


def mix_experts(x: Tensor, weights: Tensor, experts: Tensor, matrices: Matrices, kernel: str = "auto") -> Tensor:
    """Sum over k of weights[k] * expert[k](x): x [tokens, d], the other two [tokens, top_k] -> float32 [tokens, d].

    kernel: "wide" (all experts as one SwiGLU), "grouped" (one grouped product), "loop" (expert by expert), or "auto"
    for the fastest on this device.
    """
    gate, up, down = matrices
    if kernel == "auto":
        # If half of the experts are used, one wide product wastes less than gathering tokens costs.
        many = 2 * experts.shape[1] >= len(gate)
        kernel = "wide" if many else "grouped" if has_grouped_mm(gate) else "loop"
    if kernel == "wide":
        return _wide(x, weights, experts, matrices)
    if kernel == "grouped":
        return _grouped(x, weights, experts, matrices)
    # Unbound once: indexing gate[e] would give each expert a gradient as large as all of gate.
    each = list(zip(gate.unbind(), up.unbind(), down.unbind(), strict=True))
    return by_expert(match(x, gate), weights, experts, len(gate), lambda rows, e: _swiglu(rows, *each[e]))


def _swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def _wide(x: Tensor, weights: Tensor, experts: Tensor, matrices: Matrices) -> Tensor:
    """All experts as one SwiGLU; the unchosen ones are multiplied by zero."""
    gate, up, down = matrices
    e, ffn, d = gate.shape
    x = match(x, gate)
    gates = x.new_zeros(len(x), e).scatter(1, experts, weights.to(x.dtype))  # [tokens, experts]
    hidden = F.silu(F.linear(x, gate.view(e * ffn, d))) * F.linear(x, up.view(e * ffn, d))
    hidden = (hidden.view(-1, e, ffn) * gates.to(hidden.dtype)[..., None]).flatten(1)
    return F.linear(hidden, down.transpose(0, 1).reshape(d, e * ffn)).float()


def _grouped(x: Tensor, weights: Tensor, experts: Tensor, matrices: Matrices) -> Tensor:
    """As `by_expert`, with one kernel per matrix for all experts and no synchronisation with the CPU."""
    dtype = working_dtype(matrices[0])
    gate, up, down = (w.to(dtype).transpose(1, 2) for w in matrices)

    def swiglu(rows: Tensor, ends: Tensor) -> Tensor:
        hidden = F.silu(grouped_mm(rows, gate, offs=ends)) * grouped_mm(rows, up, offs=ends)
        return cast(Tensor, grouped_mm(hidden, down, offs=ends))

    return in_blocks(x.to(dtype), weights, experts, len(gate), swiglu)


def in_blocks(
    x: Tensor, weights: Tensor, experts: Tensor, n_experts: int, products: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """As `by_expert`, with `products` of all experts at once.

    products: from rows [m, d], a block for each expert, and int32 [n_experts], the end of each block, to rows [m, d].
    Rows between an expert's last token and the end of its block are zeros; rows after the last block are ignored.
    """
    order, token = _sorted(experts)
    owner = experts.flatten()[order]  # [tokens * top_k], rising
    counts = torch.zeros(n_experts, dtype=torch.long, device=x.device).scatter_add_(0, owner, torch.ones_like(owner))
    # At least one block: for an expert without rows some devices leave memory uninitialised (pytorch#172439).
    blocks = ((counts + BLOCK - 1) // BLOCK * BLOCK).clamp(min=BLOCK)
    ends = blocks.cumsum(0)
    # The row of each choice: after the blocks of earlier experts, in the order of its own expert.
    place = torch.arange(len(owner), device=x.device) + (ends - blocks - counts.cumsum(0) + counts)[owner]
    rows = x.new_zeros(len(owner) + n_experts * BLOCK, x.shape[1]).index_copy(0, place, x.index_select(0, token))
    # Rows after the last block may be NaN, so they are dropped rather than multiplied by zero.
    return _scatter(products(rows, ends.int()).index_select(0, place), weights, order, token, len(x))


def choose_experts(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The router's logits [tokens, experts] -> weights float32 and expert ids, both [tokens, top_k]."""
    weights, experts = F.softmax(logits.float(), dim=-1).topk(top_k, dim=-1)
    return weights, experts


def has_grouped_mm(weight: Tensor) -> bool:
    """Whether grouped_mm can be used: its kernels need bfloat16 on Ampere or later."""
    if grouped_mm is None or not weight.is_cuda or working_dtype(weight) != torch.bfloat16:
        return False
    return torch.cuda.get_device_capability(weight.device) >= (8, 0)


def by_expert(
    x: Tensor, weights: Tensor, experts: Tensor, n_experts: int, expert: Callable[[Tensor, int], Tensor]
) -> Tensor:
    """Sum over k of weights[k] * expert[k](x), with the tokens sorted by expert and one call per expert.

    x [tokens, d]; weights float32 and experts int, both [tokens, top_k]. Returns float32 [tokens, d].
    """
    order, token = _sorted(experts)
    counts = experts.flatten().bincount(minlength=n_experts).tolist()
    rows = torch.split(x.index_select(0, token), counts)
    # Expert 0 always runs, so that an empty batch has an output with a gradient, too.
    blocks = [expert(mine, e) for e, mine in enumerate(rows) if len(mine) or e == 0]
    return _scatter(torch.cat(blocks), weights, order, token, len(x))


def _sorted(experts: Tensor) -> tuple[Tensor, Tensor]:
    """experts [tokens, top_k] -> the choices [tokens * top_k] in the order of their expert, and the token of each."""
    order = experts.flatten().argsort(stable=True)
    return order, order // experts.shape[1]


def _scatter(out: Tensor, weights: Tensor, order: Tensor, token: Tensor, tokens: int) -> Tensor:
    weighted = out.float() * weights.flatten()[order, None]
    return weighted.new_zeros(tokens, out.shape[1]).index_add(0, token, weighted)


class Block(Module):
    """A decoder layer: attention and FFN, each with a norm before it or, with `norm_after`, after it."""

    def __init__(self, config: DecoderConfig, layer: int):
        super().__init__()
        self.norm_after = config.norm_after
        self.attn = Attention(config, layer)
        self.attn_norm = RMSNorm(config.d_model, config.norm_eps)
        self.ffn: SparseFFN | DenseFFN = SparseFFN(config) if config.n_experts else DenseFFN(config)
        self.ff_norm = RMSNorm(config.d_model, config.norm_eps)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Mask = None,
        cache: KVCache | None = None,
        dropout: Dropout | None = None,
    ) -> Tensor:
        """x [batch, n, d_model] -> the same shape; the other arguments as in `Attention`.

        dropout: applied to the output of each branch, with the branch's number: 2 * layer, and 1 more for the FFN.
        """
        drop = dropout or _keep
        number = 2 * self.attn.layer
        if self.norm_after:
            x = x + drop(self.attn_norm(self.attn(x, cos, sin, mask, cache)), number)
            return x + drop(self.ff_norm(self.ffn(x)), number + 1)
        x = x + drop(self.attn(self.attn_norm(x), cos, sin, mask, cache), number)
        return x + drop(self.ffn(self.ff_norm(x)), number + 1)


def _keep(branch: Tensor, _number: int) -> Tensor:
    return branch


class Decoder(Module):
    """The language model: embeddings, blocks, the final norm and the head."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Parameter(torch.zeros(config.embedding_size, config.d_model))
        self.new_embedding = nn.Parameter(torch.zeros(config.additional_vocab_size, config.d_model))
        # The items of a ModuleList are typed as plain modules.
        self.blocks = cast("list[Block]", nn.ModuleList(Block(config, layer) for layer in range(config.n_layers)))
        self.ln_f = RMSNorm(config.d_model, config.norm_eps)
        if not config.weight_tying:
            self.head = Linear(config.d_model, config.embedding_size, bias=False)
        if config.additional_head:
            self.new_head = Linear(config.d_model, config.additional_vocab_size, bias=False)

    def embed(self, ids: Tensor) -> Tensor:
        """ids [...] -> float32 [..., d_model], looked up in embedding followed by new_embedding.

        The special ids of MolmoE are padding rows of the embedding, those of Qwen2 are rows of new_embedding.
        """
        size = len(self.embedding)
        rows = F.embedding(ids.clamp(max=size - 1), self.embedding)
        if len(self.new_embedding):
            new = F.embedding((ids - size).clamp(min=0), self.new_embedding)
            rows = torch.where((ids >= size)[..., None], new, rows)
        return rows.float()  # the residual stream is float32, see linear.py

    def forward(
        self,
        x: Tensor,
        positions: Tensor | None = None,
        mask: Mask = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Embeddings [batch, n, d_model] -> final hidden states (after ln_f), same shape; the rest as `states`."""
        return self.ln_f(self.states(x, positions, mask, cache))

    def states(
        self,
        x: Tensor,
        positions: Tensor | None = None,
        mask: Mask = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Embeddings [batch, n, d_model] -> hidden states before ln_f, same shape.

        positions: int [batch, n]; if None, they continue those of the cache. mask: see `Mask`; a model with
        `bidirectional_images` needs `image_attention_mask` for the prefill of its images.
        """
        n, start = x.shape[1], cache.length if cache is not None else 0
        if positions is None:
            positions = torch.arange(start, start + n, device=x.device)[None]
        if mask is None and start:
            keys = torch.arange(start + n, device=x.device)
            mask = (keys[None] <= keys[start:, None])[None, None]
        for tables, block in zip(layer_tables(positions, self.config), self.blocks, strict=True):
            x = block(x, *tables, mask, cache)
        if cache is not None:
            cache.length += n
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., d_model] -> [..., embedding_size], and additional_vocab_size more if the head has rows for them.

        A head in bfloat16 returns bfloat16 logits, whose maximum is often tied, so the _EXACT largest are recomputed
        in float32.
        """
        logits = self._base_logits(hidden)
        if not self.config.additional_head:
            return logits
        return torch.cat([logits, self.new_head(hidden).to(logits.dtype)], dim=-1)

    def _base_logits(self, hidden: Tensor) -> Tensor:
        weight = self.embedding if self.config.weight_tying else self.head.weight
        logits = F.linear(match(hidden, weight), weight)
        if weight.dtype == torch.float32:
            return logits
        best = logits.topk(min(_EXACT, len(weight)), dim=-1).indices
        # One position at a time, because each gathers rows of the head.
        pairs = zip(best.view(-1, best.shape[-1]), hidden.reshape(-1, hidden.shape[-1]), strict=True)
        exact = torch.stack([weight[rows].float() @ one.float() for rows, one in pairs])
        return logits.float().scatter(-1, best, exact.view(best.shape))
