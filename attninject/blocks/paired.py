"""Blocks of two inputs: what they do to a value depends on a second one, which a rule's `with` names.

Alone, or in a rule without `with`, such a block is given its own input as the second value too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from attninject.errors import TooFewChannelsError

from . import symbolic
from .attend import attend, attention_rows, head_width, merge_heads, rows, split_heads, unrows
from .base import BATCH_NORM, CONV, Block, Facts, hidden_width, static_shape
from .gate import Blend, Gate, GateKind, Normed, at_least_float32, blend, scale, zero
from .mask import resize
from .options import Init, Int, Reduction, given
from .sequence import glorot_init


class PairBlock(Block):
    """A block whose forward takes a second value: `cls(channels, other_channels=None, *, …)`, forward(x, other).

    A subclass defines `paired` and `attention`. Where its facts say `spatial`, the second value is a map of as many
    dimensions as x, of any size; else it may also be tokens, however many.
    """

    def __init__(
        self, channels: int, dims: int, init: str, other_channels: int | None = None, **args: Any
    ) -> None:
        super().__init__(channels, dims, init, **args)
        if other_channels is not None and not Int(min=1).accepts(other_channels):
            raise TooFewChannelsError(
                f"block {type(self).__name__!r}: other_channels: expected a whole number >= 1, found {other_channels!r}"
            )
        self.other_channels = self.channels if other_channels is None else int(other_channels)

    if TYPE_CHECKING:
        __call__: Callable[..., Tensor]

    def paired(self, x: Tensor, other: Tensor) -> Tensor:
        """The block's formula: x: (B, C, *S), other: (B, other_channels, *T) → the shape and dtype of x."""
        raise NotImplementedError

    def alone(self, x: Tensor) -> Tensor:
        """The formula without a second value, which is that of x given twice: x: (B, C, *S) → the same."""
        return self.paired(x, x)

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """x: (B, C, *S), other: (B, other_channels, *T) or not given → the shape of x."""
        if torch.jit.is_scripting():
            return self.blended(x, self.alone(x) if other is None else self.paired(x, other))
        if type(x) is not Tensor and isinstance(x, fx.Proxy):
            return symbolic.one_call(self, x, *(() if other is None else (other,)))
        return self.blended(x, self.alone(x) if other is None else self.paired(x, other))

    def extra_repr(self) -> str:
        """Channels of both, and whatever differs from the defaults."""
        own, comma, rest = super().extra_repr().partition(", ")
        both = own if self.other_channels == self.channels else f"{own}, {self.other_channels}"
        return f"{both}{comma}{rest}"


class BlendedPair(Blend):
    """`Blend` around a module of two inputs: x + α(f(x, other) − x), α = 0 at init."""

    def forward(self, x: Tensor, other: Tensor) -> Tensor:  # type: ignore[override]
        """x: (B, C, *S), other: (B, other_channels, *T) → the shape and dtype of x."""
        return blend(x, self.block(x, other), self.alpha)


class Projection(Normed):
    """A 1×1 convolution, and behind it a batch norm in place of its bias where one is wanted."""

    def __init__(self, inputs: int, outputs: int, dims: int, *, bias: bool, norm: bool) -> None:
        super().__init__()
        self.conv = CONV[dims](inputs, outputs, 1, bias=bias and not norm)
        self.norm = BATCH_NORM[dims](outputs) if norm else None

    if TYPE_CHECKING:
        __call__: Callable[..., Tensor]

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, inputs, *S) → (B, outputs, *S)."""
        return self.normed(self.conv(x))


def resized(t: Tensor, like: Tensor) -> Tensor:
    """t: (B, D, *T) → (B, D, *S), the positions of `like`: (B, C, *S), by linear interpolation."""
    size = static_shape(like)[2:]
    return t if static_shape(t)[2:] == size else resize(t, size)


class AttentionGate(PairBlock):
    """Additive attention gate: x · g(ψ relu(W_x x + W_g s + b) + b_ψ), s the gating signal, one gate per position.

    arXiv:1804.03999, eq. 1-2 (there, the signal is called g): for a U-Net's skip connections, x what is skipped and s
    what the decoder has made one resolution further down. F = C / `reduction` channels between (released code: 2), so
    F (C + C_s + 2) + 1 parameters. `norm` puts a batch norm behind W_x, W_g and ψ in place of the biases, as the
    copies of this gate do that MONAI and many others have; `gate` is the function behind ψ.

    Deviations: the signal is brought to the resolution of x, by linear interpolation of W_g s, where the paper brings
    x to that of the signal by strides and the gates back to that of x; the released code's convolution and norm
    behind x · g are left out.
    """

    facts = Facts(
        "attention_gate", family="spatial", spatial=True, paper="arXiv:1804.03999", equation="1-2",
        summary="additive attention gate: a second value, as a decoder's signal, gates each position",
    )  # fmt: skip

    def __init__(
        self,
        channels: int,
        other_channels: int | None = None,
        *,
        dims: int = 2,
        init: Init = "identity",
        reduction: Annotated[float, Reduction()] = 2,
        divisor: Annotated[int, Int(min=1)] = 1,
        norm: bool = False,
        gate: GateKind = "sigmoid",
    ) -> None:
        super().__init__(**given(locals()))
        hidden = hidden_width(channels, reduction, divisor)
        self.inputs = Projection(channels, hidden, dims, bias=False, norm=norm)
        self.signal = Projection(self.other_channels, hidden, dims, bias=True, norm=norm)
        self.score = Projection(hidden, 1, dims, bias=True, norm=norm)
        self.gate = Gate(gate, identity=self.identity)
        self.initialise()

    def init_identity(self) -> None:
        """Zero ψ, or the scale and shift of the norm behind it (see `SpatialAttention.init_identity`)."""
        zero(self.score.conv if self.score.norm is None else self.score.norm)

    def factor(self, x: Tensor, other: Tensor) -> Tensor:
        """x: (B, C, *S), other: (B, C_s, *T) → the gates (B, 1, *S), float32 or wider."""
        z = F.relu(self.inputs(x) + resized(self.signal(other), x))
        return self.gate(at_least_float32(self.score(z)))

    def paired(self, x: Tensor, other: Tensor) -> Tensor:
        """x: (B, C, *S), other: (B, C_s, *T) → x · gate."""
        return scale(x, self.factor(x, other))

    def attention(self, x: Tensor, other: Tensor | None = None) -> dict[str, Tensor]:
        """x: (B, C, *S), other: (B, C_s, *T) → `gate`: (B, 1, *S)."""
        return {"gate": self.factor(x, x if other is None else other).to(x.dtype)}


class CrossAttention(PairBlock):
    """Multi-head attention to another value: x + W [head_1 … head_h], Q of x, K and V of the other one, d = C / h.

    arXiv:1706.03762, section 3.2.3 (the decoder's attention to the encoder): head = softmax(Q Kᵀ / √d) V. The other
    value may be a map of any size, tokens or one vector, with channels of its own. Options: `num_heads` (must divide C),
    `scale` (the 1/√d), `residual`, `bias` of all layers.

    No positional encoding: permuted positions of the other value change nothing; what is taken from a single one is the
    same everywhere, so that `query` and `key` then learn nothing. No mask: padding is attended to like the rest. Memory
    is linear in the positions of both, in training too; not linear: `attention` and second derivatives.

    Deviations: none but the LayerNorm around the residual, which is left out. `residual=False, init="paper"` is
    torch's `nn.MultiheadAttention(C, h, kdim=C_o, vdim=C_o)`, keys `q_proj_weight`, `k_proj_weight`,
    `v_proj_weight`, `in_proj_bias`, `out_proj` for our `query`, `key`, `value`, `proj`.
    """

    facts = Facts(
        "cross_attention", family="global", spatial=False, paper="arXiv:1706.03762", equation="section 3.2.3",
        summary="multi-head attention from here to a second value, a map or tokens, in linear memory",
    )  # fmt: skip

    def __init__(
        self,
        channels: int,
        other_channels: int | None = None,
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
        self.query = nn.Linear(channels, channels, bias=bias)
        self.key = nn.Linear(self.other_channels, channels, bias=bias)
        self.value = nn.Linear(self.other_channels, channels, bias=bias)
        self.proj = nn.Linear(channels, channels, bias=bias)
        self.initialise()

    def needs_blend(self) -> bool:
        """Without a residual no layer's zero gives x."""
        return not self.residual

    def init_identity(self) -> None:
        """Zero the output layer."""
        zero(self.proj)

    def init_paper(self) -> None:
        """Glorot's uniform weights, zero biases."""
        glorot_init(self.query, self.key, self.value, self.proj)

    def paired(self, x: Tensor, other: Tensor) -> Tensor:
        """x: (B, C, *S), other: (B, C_o, *T) → the same shape as x."""
        t = rows(other)
        q = split_heads(self.query(rows(x)), self.num_heads)
        k, v = split_heads(self.key(t), self.num_heads), split_heads(self.value(t), self.num_heads)
        y = unrows(self.proj(merge_heads(attend(q, k, v, self.scale))), x).to(x.dtype)
        if self.residual:
            return x + y
        return torch.empty_like(x).copy_(y)  # in the memory format of x

    def attention(self, x: Tensor, other: Tensor | None = None) -> dict[str, Tensor]:
        """x: (B, C, *S), other: (B, C_o, *T) → `rows`: (B, h, N, M), per head; they sum to 1 over the last axis."""
        q = split_heads(self.query(rows(x)), self.num_heads)
        k = split_heads(self.key(rows(x if other is None else other)), self.num_heads)
        return {"rows": attention_rows(q, k, self.scale).to(x.dtype)}
