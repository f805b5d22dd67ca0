"""Global attention through a few descriptors: double attention, external attention, categories."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor, nn

from .attend import Additive, linear, means, rows, unrows, wide
from .base import BATCH_NORM, CONV, Facts, hidden_width
from .both import ConvNormReLU
from .gate import Normed, at_least_float32, zero
from .options import Init, Int, Reduction, given
from .precision import full_precision, product


class DoubleAttention(Additive):
    """Double attention (A²): x + W Z, z_i = Σ_j (Σ_k A_k softmax_k(B)_jk) softmax_j(V_i)_j.

    arXiv:1810.11579, eq. 3-6: n global descriptors are gathered, each a mean of A over the positions k with
    weights softmax_k(B_jk); every position i then takes a mixture of them with weights softmax_j(V_ji).
    A, B, V, W are 1×1 convolutions. Their hidden width is both m, of A, and n, of B and V. Options:
    `bias`, `residual`.

    Time and memory are linear in the positions. Both softmaxes run in float32.

    Deviations: none; the paper's m and n may differ, in its networks both are C / 4.
    """

    facts = Facts(
        "a2", family="global", spatial=False, paper="arXiv:1810.11579", equation="3-6",
        summary="double attention: gather global descriptors, hand them out again",
    )  # fmt: skip

    def __init__(
        self,
        channels: int,
        *,
        dims: int = 2,
        init: Init = "identity",
        reduction: Annotated[float, Reduction()] = 4,
        bias: bool = True,
        divisor: Annotated[int, Int(min=1)] = 1,
        residual: bool = True,
    ) -> None:
        super().__init__(**given(locals()))
        width, conv = hidden_width(channels, reduction, divisor), CONV[dims]
        self.features = conv(channels, width, 1, bias=bias)
        self.gather = conv(channels, width, 1, bias=bias)
        self.distribute = conv(channels, width, 1, bias=bias)
        self.out = conv(width, channels, 1, bias=bias)
        self.initialise()

    def init_identity(self) -> None:
        """Zero W."""
        zero(self.out)

    def weights(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: (B, C, *S) → softmax(B) over positions and softmax(V) over descriptors: (B, n, N), float32."""
        b, v = at_least_float32(self.gather(x).flatten(2)), at_least_float32(self.distribute(x).flatten(2))
        return torch.softmax(b, 2), torch.softmax(v, 1)

    def branch(self, x: Tensor) -> Tensor:
        """x: (B, C, *S) → the distributed descriptors, the same shape."""
        gathering, distributing = self.weights(x)
        descriptors = means(self.features(x).flatten(2), gathering)  # (B, m, n)
        z = descriptors @ distributing.to(descriptors.dtype)
        y: Tensor = self.out(torch.unflatten(z, 2, x.shape[2:]))
        return y

    def attention(self, x: Tensor) -> dict[str, Tensor]:
        """x: (B, C, *S) → `gather`: (B, n, *S), sums to 1 over positions; `distribute`: the same over n."""
        gathering, distributing = (torch.unflatten(t, 2, x.shape[2:]).to(x.dtype) for t in self.weights(x))
        return {"gather": gathering, "distribute": distributing}


class ExternalAttention(Additive, Normed):
    """External attention: x + BN(W₂ A M_v), A the doubly normalised W₁x M_kᵀ, M_k and M_v learnt memories.

    arXiv:2105.02358, eq. 5-6 and 7-9: per memory slot a softmax over positions, then per position division
    by the sum over slots. Options: `memory` (the number of slots S), `norm` behind W₂, `residual`.

    Time and memory are linear in the positions. Both normalisations are done in float32, as one softmax over
    slots of a log-softmax over positions, which is the same and cannot divide by zero.

    Deviations: the released code adds 10⁻⁹ to that sum, applies a relu to the result (which no identity
    survives), and has W₂ without bias (here W₂ has one exactly where no norm follows).
    The multi-head form for transformers is not here.
    """

    facts = Facts(
        "external", family="global", spatial=False, paper="arXiv:2105.02358", equation="5-9",
        summary="external attention: every position reads a small learnt memory",
    )  # fmt: skip

    def __init__(
        self,
        channels: int,
        *,
        dims: int = 2,
        init: Init = "identity",
        memory: Annotated[int, Int(min=1)] = 64,
        norm: bool = True,
        residual: bool = True,
    ) -> None:
        super().__init__(**given(locals()))
        conv = CONV[dims]
        self.query = conv(channels, channels, 1)
        self.keys = nn.Linear(channels, memory, bias=False)
        self.values = nn.Linear(memory, channels, bias=False)
        self.out = conv(channels, channels, 1, bias=not norm)
        self.norm = BATCH_NORM[dims](channels) if norm else None
        self.initialise()

    def init_identity(self) -> None:
        """Zero the norm's scale and shift, or W₂ where there is no norm."""
        zero(self.out if self.norm is None else self.norm)

    def init_paper(self) -> None:
        """The released code's: normal weights, of variance 2 / fan out for convolutions, M_v as M_kᵀ."""
        for layer in (self.query, self.out):
            nn.init.normal_(layer.weight, std=(2 / self.channels) ** 0.5)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        nn.init.normal_(self.keys.weight, std=(2 / self.keys.out_features) ** 0.5)
        with torch.no_grad():
            self.values.weight.copy_(self.keys.weight.T)

    def weights(self, x: Tensor) -> Tensor:
        """x: (B, C, *S) → A: (B, N, S), float32 or wider; each position's S weights sum to 1."""
        t = at_least_float32(rows(self.query(x)))
        if torch.jit.is_scripting():
            return twofold(linear(t, self.keys.weight, None))
        with full_precision(t):
            return twofold(wide(self.keys, t))

    def branch(self, x: Tensor) -> Tensor:
        """x: (B, C, *S) → what the memory gives, the same shape."""
        t = self.values(self.weights(x).to(self.values.weight.dtype))
        return self.normed(self.out(unrows(t, x)))

    def attention(self, x: Tensor) -> dict[str, Tensor]:
        """x: (B, C, *S) → `rows`: (B, N, S), the weights of each position over the memory's slots."""
        return {"rows": self.weights(x).to(x.dtype)}


def twofold(z: Tensor) -> Tensor:
    """Softmax over positions, divided by its sum over slots: z: (B, N, S) → the same shape."""
    return torch.softmax(torch.log_softmax(z, 1), 2)


class CategoryAttention(Additive, Normed):
    """Category attention: x + BN(W y), y_i = Σ_k softmax_k(φ(x_i)ᵀ ψ(f_k)) δ(f_k), one f_k for each class.

    arXiv:1909.11065, section 3.2 (object-contextual representations): a map of logits for each class, R x, becomes a
    soft region by a softmax over the positions, f_k is the mean of x over region k, and every position takes the
    classes that it is like. R is a 1×1 convolution to `classes`, of which a loss may make a segmentation; φ, ψ and
    δ are 1×1 convolutions to C / `reduction` with batch norm and relu. `scale`: the logits times d^-1/2, as in the
    released code; `norm` behind W, `residual`.

    Time and memory are linear in the positions. Both softmaxes run in float32.

    Deviations: the paper's R reads an earlier stage and is trained by a loss of its own; it joins [x; relu(BN(W y))]
    by a convolution, where here BN(W y) is added to x; the released code has two convolutions in φ and ψ.
    """

    facts = Facts(
        "category_attention", family="global", spatial=False, paper="arXiv:1909.11065", equation="section 3.2",
        summary="category attention: a soft region for each class, whose means every position reads",
    )  # fmt: skip

    def __init__(
        self,
        channels: int,
        *,
        dims: int = 2,
        init: Init = "identity",
        classes: Annotated[int, Int(min=2)] = 19,
        reduction: Annotated[float, Reduction()] = 2,
        scale: bool = True,
        norm: bool = True,
        divisor: Annotated[int, Int(min=1)] = 1,
        residual: bool = True,
    ) -> None:
        super().__init__(**given(locals()))
        width = hidden_width(channels, reduction, divisor)
        self.scale = width**-0.5 if scale else 1.0
        self.regions = CONV[dims](channels, classes, 1)
        self.query = ConvNormReLU(channels, width, 1, dims, bias=False)
        self.key = ConvNormReLU(channels, width, 1, 1, bias=False)
        self.value = ConvNormReLU(channels, width, 1, 1, bias=False)
        self.out = CONV[dims](width, channels, 1, bias=not norm)
        self.norm = BATCH_NORM[dims](channels) if norm else None
        self.initialise()

    def init_identity(self) -> None:
        """Zero the norm's scale and shift, or W where there is no norm."""
        zero(self.out if self.norm is None else self.norm)

    def weights(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x: (B, C, *S) → soft regions (B, K, N), means over them (B, C, K), rows (B, N, K)."""
        regions = torch.softmax(at_least_float32(self.regions(x)).flatten(2), 2)
        classes = means(x.flatten(2), regions)
        q, k = at_least_float32(rows(self.query(x))), at_least_float32(self.key(classes))
        return regions, classes, torch.softmax(self.scale * product(q, k), 2)

    def branch(self, x: Tensor) -> Tensor:
        """x: (B, C, *S) → what the classes give, the same shape."""
        _, classes, each = self.weights(x)
        v = rows(self.value(classes))
        return self.normed(self.out(unrows(each.to(v.dtype) @ v, x)))

    def attention(self, x: Tensor) -> dict[str, Tensor]:
        """x: (B, C, *S) → `regions`: (B, K, *S), each sums to 1; `rows`: (B, N, K), each position's classes."""
        regions, _, each = self.weights(x)
        return {"regions": torch.unflatten(regions, 2, x.shape[2:]).to(x.dtype), "rows": each.to(x.dtype)}
