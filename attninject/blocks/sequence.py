"""Self-attention as in transformers, on maps and on token sequences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from .attend import (
    Additive,
    attend,
    attention_rows,
    bounded,
    head_width,
    merge_heads,
    rows,
    split_heads,
    unrows,
)
from .base import Facts, column, hidden_width, static_shape
from .gate import at_least_float32, zero
from .options import Init, Int, Reduction, given
from .precision import full_precision, product


class SelfAttention(Additive):
    """Scaled dot-product self-attention with one head: x + softmax(Q Kᵀ / √d) V, Q, K, V linear in x.

    arXiv:1706.03762, eq. 1, around a residual (its section 3.1). Options: `reduction` (d = C / reduction, the
    width of queries and keys; values have C), `scale` (the 1/√d), `residual`, `bias` of the three layers. Under a
    `score` of additive the logit of i and j is vᵀ tanh(q_i + k_j) instead of q_iᵀ k_j (arXiv:1409.0473, section
    3.1 and appendix A.1.2), which `scale` does not touch.

    No output layer: the values' layer is the last one, and zero under `init="identity"`. No positional
    encoding: permuted positions give a permuted output. Memory is linear in the positions, in training too;
    not linear: `attention(x)`, second derivatives, and additive scores, which need d numbers for each pair of
    positions: for small maps.

    Deviations: the paper normalises after the sum (LayerNorm), here nothing is normalised. SAGAN's
    self-attention (arXiv:1805.08318) is `reduction=8, scale=False` but for its output layer and γ.
    """

    facts = Facts(
        "self_attention", family="global", spatial=False, paper="arXiv:1706.03762", equation="1",
        summary="scaled dot-product self-attention with one head, in linear memory",
    )  # fmt: skip

    def __init__(
        self,
        channels: int,
        *,
        dims: int = 2,
        init: Init = "identity",
        reduction: Annotated[float, Reduction()] = 1,
        score: Literal["dot", "additive"] = "dot",
        scale: bool = True,
        residual: bool = True,
        bias: bool = True,
    ) -> None:
        super().__init__(**given(locals()))
        width = hidden_width(channels, reduction)
        self.scale = width**-0.5 if scale else 1.0
        self.query = nn.Linear(channels, width, bias=bias)
        self.key = nn.Linear(channels, width, bias=bias)
        self.value = nn.Linear(channels, channels, bias=bias)
        self.score = nn.Linear(width, 1, bias=False) if score == "additive" else None
        self.initialise()

    def init_identity(self) -> None:
        """Zero the values' layer."""
        zero(self.value)

    def init_paper(self) -> None:
        """Glorot's uniform weights, zero biases, as the paper's released code."""
        glorot_init(self.query, self.key, self.value, *([] if self.score is None else [self.score]))

    def additive_rows(self, q: Tensor, k: Tensor) -> Tensor:
        """Queries and keys (B, N, d) → softmax over j of vᵀ tanh(q_i + k_j): (B, N, N), float32 or wider."""
        assert self.score is not None
        pairs = torch.tanh(at_least_float32(q).unsqueeze(2) + at_least_float32(k).unsqueeze(1))
        return torch.softmax(product(pairs, self.score.weight.to(pairs.dtype).transpose(0, 1)).squeeze(3), 2)

    def branch(self, x: Tensor) -> Tensor:
        """x: (B, C, *S) → the attended values, the same shape."""
        t = rows(x)
        q, k, v = self.query(t), self.key(t), self.value(t)
        if self.score is not None:
            return unrows(self.additive_rows(q, k).to(v.dtype) @ v, x)
        q, k, v = q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1)
        return unrows(attend(q, k, v, self.scale).squeeze(1), x)

    def attention(self, x: Tensor) -> dict[str, Tensor]:
        """x: (B, C, *S) → `rows`: (B, N, N), the weights that position i gives to each j; they sum to 1."""
        t = rows(x)
        q, k = self.query(t), self.key(t)
        found = attention_rows(q, k, self.scale) if self.score is None else self.additive_rows(q, k)
        return {"rows": found.to(x.dtype)}


class MultiHeadSelfAttention(Additive):
    """Multi-head self-attention: x + W [head_1 … head_h], head = softmax(Q Kᵀ / √d) V, d = C / h.

    arXiv:1706.03762, section 3.2.2. Options: `num_heads` (must divide C), `scale` (the 1/√d), `residual`,
    `bias` of both layers.

    No positional encoding: permuted positions give a permuted output. Memory is linear in the positions, in
    training too; not linear: `attention(x)` and second derivatives.

    Deviations: none but the LayerNorm around the residual, which is left out. `residual=False, init="paper"`
    is torch's `nn.MultiheadAttention` of one sequence with itself, keys `in_proj_weight`, `in_proj_bias`,
    `out_proj` for our `qkv.weight`, `qkv.bias`, `proj`, and timm's `Attention(qkv_bias=True)` key by key.
    """

    facts = Facts(
        "mhsa", family="global", spatial=False, paper="arXiv:1706.03762", equation="section 3.2.2",
        summary="multi-head self-attention, in linear memory",
    )  # fmt: skip

    def __init__(
        self,
        channels: int,
        *,
        dims: int = 2,
        init: Init = "identity",
        num_heads: Annotated[int, Int(min=1)] = 8,
        scale: bool = True,
        residual: bool = True,
        bias: bool = True,
    ) -> None:
        super().__init__(**given(locals()))
        width = head_width(self.facts.name, channels, num_heads)
        self.num_heads = num_heads
        self.scale = width**-0.5 if scale else 1.0
        self.qkv = nn.Linear(channels, 3 * channels, bias=bias)
        self.proj = nn.Linear(channels, channels, bias=bias)
        self.initialise()

    def init_identity(self) -> None:
        """Zero the output layer."""
        zero(self.proj)

    def init_paper(self) -> None:
        """Glorot's uniform weights, zero biases."""
        glorot_init(self.qkv, self.proj)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x: (B, C, *S) → queries, keys, values: (B, h, N, d) each."""
        q, k, v = [split_heads(t, self.num_heads) for t in self.qkv(rows(x)).chunk(3, 2)]
        return q, k, v

    def branch(self, x: Tensor) -> Tensor:
        """x: (B, C, *S) → the heads' mixture, the same shape."""
        q, k, v = self.heads(x)
        return unrows(self.proj(merge_heads(attend(q, k, v, self.scale))), x)

    def attention(self, x: Tensor) -> dict[str, Tensor]:
        """x: (B, C, *S) → `rows`: (B, h, N, N), per head; they sum to 1 over the last axis."""
        q, k, _ = self.heads(x)
        return {"rows": attention_rows(q, k, self.scale).to(x.dtype)}


def glorot_init(*layers: nn.Linear) -> None:
    """Uniform weights of variance 2 / (fan in + fan out), zero biases."""
    for layer in layers:
        nn.init.xavier_uniform_(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


@dataclass(frozen=True)
class Terms:
    """Four characters 0 or 1, at least one of them 1."""

    text: str = (
        "a string of four 0s and 1s, one per term and at least one 1, as '1111' or '0010' "
        "(in quotes: YAML reads a bare 0010 as the number 8)"
    )

    def accepts(self, value: Any) -> bool:
        """Whether the value is such a string."""
        return isinstance(value, str) and len(value) == 4 and set(value) <= {"0", "1"} and "1" in value


class GeneralizedAttention(Additive):
    """Generalised attention: x + W Σ_k softmax_k(E) V x_k per head, E the sum of any of four terms.

    arXiv:1904.05873, eq. 1 and section 3.1. Per head of width d = C / h, for query q and key k:

    | `terms` | E_j | depends on |
    |---|---|---|
    | `1000` | (U z_q)ᵀ (K x_k) | query and key content |
    | `0100` | (U z_q)ᵀ (P r_{k−q}) | query content and relative position |
    | `0010` | uᵀ (K x_k) | key content only |
    | `0001` | vᵀ (P r_{k−q}) | relative position only |

    r holds sin(ω_t δ) and cos(ω_t δ) for every axis' offset δ and ω_t = 1000^(−t/T), t < T = `frequencies`.
    `terms` is any sum of these, `1111` by default; `0010` costs a fraction, as all queries share one row.
    Options besides: `num_heads` (must divide C), `sub_sample` (keys and values from every second position
    along the last two axes), `residual`.

    Memory is linear in the positions for every subset, in training too: the sine of a difference is a sum of
    products of sines and cosines, so the positional terms are dot products of 2T numbers per axis as well and
    join the content in one fused attention. Not linear: `attention(x)`, second derivatives. Logits are formed
    in float32, also under autocast.

    Deviations: the paper's other two mechanisms are blocks of their own, `deformable_conv` and, for dynamic
    convolution, `involution` with `softmax`. The released code has C / 4
    frequencies per axis (16 by default here), scales the positional layers by 1/√2, takes q − k, samples keys
    by 2 by default, and multiplies by a zero γ what W gives; here W itself starts at zero.
    """

    facts = Facts(
        "generalized", family="global", spatial=True, paper="arXiv:1904.05873", equation="1",
        summary="generalised attention: any subset of content and relative-position terms",
    )  # fmt: skip

    def __init__(
        self,
        channels: int,
        *,
        dims: int = 2,
        init: Init = "identity",
        terms: Annotated[str, Terms()] = "1111",
        num_heads: Annotated[int, Int(min=1)] = 8,
        frequencies: Annotated[int, Int(min=1)] = 16,
        sub_sample: bool = False,
        residual: bool = True,
    ) -> None:
        super().__init__(**given(locals()))
        width = head_width(self.facts.name, channels, num_heads)
        self.num_heads, self.frequencies, self.sub_sample = num_heads, frequencies, sub_sample
        query_key, query_position, key_only, position_only = (t == "1" for t in terms)
        content, geometry = query_key or key_only, query_position or position_only
        self.one_row = terms == "0010"
        self.query_in_content, self.query_in_geometry = query_key, query_position

        def layer(needed: bool, inputs: int) -> nn.Linear | None:
            return nn.Linear(inputs, channels, bias=False) if needed else None

        self.query = layer(query_key or query_position, channels)
        self.key = layer(content, channels)
        self.position = layer(geometry, 2 * frequencies * dims)
        self.value = nn.Linear(channels, channels, bias=False)
        self.proj = nn.Linear(channels, channels)
        self.key_bias = _head_bias(num_heads, width) if key_only else None
        self.position_bias = _head_bias(num_heads, width) if position_only else None
        self.initialise()

    def init_identity(self) -> None:
        """Zero the output layer."""
        zero(self.proj)

    def init_paper(self) -> None:
        """The released code's: uniform weights of variance 1 / fan in, and an output that starts at zero."""
        self.init_blend()
        if self.args["residual"]:
            zero(self.proj)

    def init_blend(self) -> None:
        """The same, the output layer not at zero."""
        for layer in (self.query, self.key, self.position, self.value, self.proj):
            if layer is not None:
                nn.init.kaiming_uniform_(layer.weight, a=1)
        nn.init.zeros_(self.proj.bias)

    def split(self, t: Tensor) -> Tensor:
        """(B, N, C) → (B, h, N, d)."""
        return split_heads(t, self.num_heads)

    def match(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x: (B, C, *S) → (B, h, N, e), (B, h, M, e), (B, h, M, d): E is the dot product of the first two.

        N is 1 where no chosen term depends on the query. All three are float32 or wider.
        """
        here = rows(x)
        there = rows(every_second(x)) if self.sub_sample else here
        query = None if self.query is None else self.compared(self.query(here))
        key = None if self.key is None else self.compared(self.key(there))
        value = at_least_float32(self.split(self.value(there)))
        batch, heads, count = value.shape[:3]
        asked: list[Tensor] = []
        offered: list[Tensor] = []
        if key is not None:
            asked.append(added(query if self.query_in_content else None, self.key_bias, value))
            offered.append(key)
        if self.position is not None:
            q = added(query if self.query_in_geometry else None, self.position_bias, value)
            q, k = self.turned(q, self.position.weight.to(q.dtype), x)
            asked.append(q)
            offered.append(k.expand(batch, heads, count, -1))
        queries = 1 if self.one_row else here.shape[1]
        every = [t.expand(batch, heads, queries, -1) for t in asked]
        return torch.cat(every, 3), torch.cat(offered, 3), value

    def compared(self, t: Tensor) -> Tensor:
        """(B, N, C) → what goes into logits: (B, h, N, d), float32 or wider."""
        return at_least_float32(bounded(self.split(t), 1.0))

    def turned(self, q: Tensor, weight: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the positional terms compare: (·, h, N, e) and (M, e), e = 2 T · dims.

        q: (·, h, N or 1, d), the vector that meets P r, weight: P. With c = Pᵀ q, per axis and frequency

            c_s sin ω(k − q) + c_c cos ω(k − q)
                = sin ωk · (c_s cos ωq + c_c sin ωq) + cos ωk · (c_c cos ωq − c_s sin ωq).
        """
        c = product(q, torch.unflatten(weight, 0, (self.num_heads, -1)))
        c_s, c_c = torch.unflatten(c, -1, (self.dims, 2, self.frequencies)).unbind(-2)
        grid = coordinates(x, q.dtype)
        steps = torch.arange(self.frequencies, device=x.device, dtype=q.dtype)
        omega = 1000 ** (-steps / self.frequencies)
        here = rows(grid).squeeze(0).unsqueeze(2) * omega  # (N, dims, T)
        there = here if not self.sub_sample else rows(every_second(grid)).squeeze(0).unsqueeze(2) * omega
        sin, cos = here.sin(), here.cos()
        turned = torch.cat([c_s * cos + c_c * sin, c_c * cos - c_s * sin], -1)
        return turned.flatten(-2), torch.cat([there.sin(), there.cos()], -1).flatten(-2)

    def attended(self, x: Tensor) -> Tensor:
        """x: (B, C, *S) → the heads' values (B, h, N, d), N = 1 where one row serves all."""
        q, k, v = self.match(x)
        if torch.jit.is_scripting():
            return attend(q, k, v, 1.0)
        with full_precision(x):
            return attend(q, k, v, 1.0)

    def branch(self, x: Tensor) -> Tensor:
        """x: (B, C, *S) → the attended values: the same shape, or (B, C, 1, …) where one row serves all."""
        y = self.proj(merge_heads(self.attended(x)).to(self.proj.weight.dtype))
        return column(y.squeeze(1), x) if self.one_row else unrows(y, x)

    def attention(self, x: Tensor) -> dict[str, Tensor]:
        """x: (B, C, *S) → `rows`: (B, h, N, M), per head; (B, h, 1, M) where no term depends on the query."""
        q, k, _ = self.match(x)
        return {"rows": attention_rows(q, k, 1.0).to(x.dtype)}


def _head_bias(heads: int, width: int) -> nn.Parameter:
    """One vector per head, (h, 1, d): u or v, uniform within the released code's 1/√(2d)."""
    bound = (2 * width) ** -0.5
    return nn.Parameter(torch.empty(heads, 1, width).uniform_(-bound, bound))


def added(query: Tensor | None, bias: Tensor | None, like: Tensor) -> Tensor:
    """The sum of those that are there, (B, h, N, d) or (1, h, 1, d), in the dtype of `like`."""
    if query is None:
        assert bias is not None
        return bias.to(like.dtype).unsqueeze(0)
    total = query.to(like.dtype)
    return total if bias is None else total + bias.to(like.dtype)


def every_second(x: Tensor) -> Tensor:
    """Positions 0, 2, 4, … along the last two spatial axes (one in 1D)."""
    return x[..., ::2] if x.ndim == 3 else x[..., ::2, ::2]


def coordinates(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Each position's place along each axis: x: (B, C, *S) → (1, dims, *S)."""
    axes = [torch.arange(n, device=x.device, dtype=dtype) for n in static_shape(x)[2:]]
    return torch.stack(torch.meshgrid(axes, indexing="ij")).unsqueeze(0)
