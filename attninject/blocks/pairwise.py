"""Non-local blocks: every position looks at every other, in memory linear in their number."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attninject.blocks.fast.dispatch import SMALL, untouched

from .attend import (
    attend,
    attention_rows,
    exporting,
    linear,
    project,
    relu_of_sums,
    rows,
    saturated,
    unrows,
)
from .base import BATCH_NORM, CONV, Block, Facts, hidden_width, static_shape
from .fast import affinity, pairs
from .gate import Normed, at_least_float32, zero
from .options import Backend, Init, Int, Reduction, given
from .precision import autocasting, full_precision, product

SOFTMAX_MODES = ("embedded_gaussian", "gaussian")
FEW = 1024
"""Positions up to which a softmax by blocks is faster than the fused one, which wants its rows copied."""


class NonLocal(Block, Normed):
    """Non-local block: x + BN(W y), y_i = Σ_j f(x_i, x_j) g(x_j) / C(x).

    arXiv:1711.07971, eq. 1, 6 (the residual form) and the four f of its eq. 2-5 by `mode`:

    | mode | f(x_i, x_j) | C(x) |
    |---|---|---|
    | embedded_gaussian | exp(θ(x_i)ᵀ φ(x_j)), the default | Σ_j f |
    | gaussian | exp(x_iᵀ x_j), without θ and φ | Σ_j f |
    | dot_product | θ(x_i)ᵀ φ(x_j) | number of j |
    | concatenation | relu(w_aᵀ θ(x_i) + w_bᵀ φ(x_j)), w = [w_a; w_b] | number of j |

    θ, φ, g, W are 1×1 convolutions through a bottleneck of C / `reduction`. Options: `mode`, `sub_sample`
    (max-pool φ and g by 2 over positions, in 3D by 1×2×2, as in section 3.3; a side of one position stays),
    `norm` behind W, `scale` (the logit, or f itself where there is no exp, times d^-1/2, d the width of the
    vectors compared), `bias` of the convolutions.

    Memory is linear in the positions, in training too, in every mode: the Gaussian forms use torch's fused
    attention, the dot product is summed as θ (φᵀ g), the concatenation over sorted prefix sums in
    O(N log N). Where the positions are so few that their matrix is no larger than the embeddings, it is
    formed, which is cheaper. Not linear: `attention(x)`, which returns the matrix; second derivatives of the
    Gaussian forms; an exported concatenation form, since ONNX cannot search a sorted list.

    Deviations: with sub-sampling, "number of j" counts the pooled positions that are summed (the paper
    writes N). The last two modes' sums are unbounded: they and W are computed in float32, and cut to the
    largest number of a narrower input dtype. The released Caffe2 code divides the logits by √d
    (`scale=True`), pools x in front of φ and g, and has the norm that is the default here. timm's
    `NonLocalAttn` is `reduction=8, divisor=8, init="paper"` with keys `t`, `p`, `g`, `z`, `norm` for our
    `theta`, `phi`, `g`, `out`, `norm`, under `use_scale=False`; its scale is C^-1/2 where ours is d^-1/2.
    """

    facts = Facts(
        "nonlocal", family="global", spatial=True, paper="arXiv:1711.07971", equation="1-6",
        summary="non-local block: attention between all positions, in linear memory",
    )  # fmt: skip
    fast_from = SMALL

    def __init__(
        self,
        channels: int,
        *,
        dims: int = 2,
        init: Init = "identity",
        mode: Literal["embedded_gaussian", "gaussian", "dot_product", "concatenation"] = "embedded_gaussian",
        reduction: Annotated[float, Reduction()] = 2,
        sub_sample: bool = False,
        norm: bool = True,
        scale: bool = False,
        bias: bool = True,
        divisor: Annotated[int, Int(min=1)] = 1,
        backend: Backend = "auto",
    ) -> None:
        super().__init__(**given(locals()))
        width = hidden_width(channels, reduction, divisor)
        conv, embedded = CONV[dims], mode != "gaussian"
        self.mode, self.sub_sample, self.width = mode, sub_sample, width if embedded else channels
        self.bounded = mode in SOFTMAX_MODES
        self.scale = (width if embedded else channels) ** -0.5 if scale else 1.0
        self.theta = conv(channels, width, 1, bias=bias) if embedded else None
        self.phi = conv(channels, width, 1, bias=bias) if embedded else None
        self.g = conv(channels, width, 1, bias=bias)
        self.concat = nn.Linear(2 * width, 1, bias=False) if mode == "concatenation" else None
        self.out = conv(width, channels, 1, bias=bias)
        self.norm = BATCH_NORM[dims](channels) if norm else None
        self.initialise()

    def init_identity(self) -> None:
        """Zero the norm's scale and shift, or W where there is no norm."""
        zero(self.out if self.norm is None else self.norm)

    def init_paper(self) -> None:
        """The released code's: normal weights of deviation 0.01, zero biases; and the zero of section 4.1."""
        self.init_blend()
        self.init_identity()

    def init_blend(self) -> None:
        """The same, W's norm or W itself not at zero."""
        for layer in (self.theta, self.phi, self.g, self.concat, self.out):
            if layer is not None:
                nn.init.normal_(layer.weight, std=0.01)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def maps(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x: (B, C, *S) → θ, φ and g as maps, φ and g of fewer positions if sub-sampled."""
        theta = x if self.theta is None else self.theta(x)
        phi = x if self.phi is None else self.phi(x)
        g = self.g(x)
        if self.sub_sample:
            phi, g = halve(phi), halve(g)
        return theta, phi, g

    def fast_maps(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same with one gradient of x written instead of three added up, where that is known to pay."""
        layers = [layer for layer in (self.theta, self.phi, self.g) if layer is not None]
        if x.device.type != "cpu" or not self.bare(x, *layers):
            return self.maps(x)
        found = pairs.project(x, layers)
        theta, phi, g = found if len(found) == 3 else (x, x, found[0])
        return (theta, halve(phi), halve(g)) if self.sub_sample else (theta, phi, g)

    def embed(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x: (B, C, *S) of N positions → θ (B, N, d), φ (B, M, d) and g (B, M, e), M ≤ N.

        d and e are the bottleneck's width, but for the Gaussian mode, where θ and φ are x.
        """
        theta, phi, g = self.maps(x)
        return rows(theta), rows(phi), rows(g)

    def transform(self, x: Tensor) -> Tensor:
        """x: (B, C, *S) → the same shape."""
        theta, phi, g = self.embed(x)
        if self.bounded:
            q, k, v = [t.unsqueeze(1) for t in [theta, phi, g]]  # one head: (B, 1, N, d)
            return self.added(x, attend(q, k, v, self.scale).squeeze(1))
        return self.added(x, self.unbounded(theta, phi, g))

    def added(self, x: Tensor, y: Tensor) -> Tensor:
        """x + BN(W y) for rows y: (B, N, e); a transposed map counts as rows and is not copied."""
        if self.bounded:
            z: Tensor = self.out(unrows(y, x))
        elif torch.jit.is_scripting():
            z = saturated(unrows(linear(y, self.out.weight, self.out.bias), x), x.dtype)
        else:
            z = project(self.out, y, x)
        halved = self.training and self.out.weight.dtype == torch.float16
        if halved and not self.bounded and self.norm is not None:
            z = z.clamp(-255, 255)  # whose squares, the norm's statistics, float16 can hold
        return x + self.normed(z).to(x.dtype)

    def fast_applies(self, x: Tensor) -> bool:
        """Without a softmax always; with one on a CPU and in full precision, for few positions.

        Elsewhere torch's fused kernels are faster, or nothing was measured.
        """
        if not self.bounded:
            return True
        few = x.shape[2:].numel() <= FEW and x.is_contiguous()
        return x.device.type == "cpu" and full(x) and (few or self.others(x) <= self.width)

    def fast_transform(self, x: Tensor) -> Tensor:
        """x: (B, C, *S) → the same shape; all maps stay laid out as x."""
        if not self.bounded:
            return self.added(x, self.cheapest(x))
        theta, phi, g = self.fast_maps(x)
        if self.others(x) <= self.width:
            q, k, v = (t.flatten(2) for t in (theta, phi, g))
            return self.added(x, pairs.gather(q, k, v, self.scale).mT)
        y = affinity.attend(theta if self.scale == 1 else self.scale * theta, phi, g)
        return self.added(x, y.flatten(2).mT)

    def others(self, x: Tensor) -> int:
        """M, how many positions are summed over."""
        sides = x.shape[2:]
        kept = max(0, len(sides) - 2) if self.sub_sample else len(sides)
        return math.prod(sides[:kept]) * math.prod(side // 2 or side for side in sides[kept:])

    def cheapest(self, x: Tensor) -> Tensor:
        """x: (B, C, *S) → `unbounded` in the cheaper order of products; rows (B, N, e) of a map that lies as x.

        With the N×M matrix or without; the matrix only where it is no larger than the embeddings.
        """
        by_rows = not pairs.lies_by_rows(x.flatten(2))  # of the transposed map
        n, m, factor = x.shape[2:].numel(), self.others(x), self.scale / self.others(x)
        if self.mode == "concatenation":
            a, b, g = self.folded(x) if self.foldable(x) else self.unfolded(x)
            with full_precision(x):
                a, b = factor * a, factor * b  # relu(t · f) is t · relu(f) for t > 0
                if m > self.width:
                    return relu_of_sums(a, b, g.contiguous())
                return pairs.product(torch.relu_(a.unsqueeze(2) + b.unsqueeze(1)), g, by_rows)
        theta, phi, g = (at_least_float32(t).flatten(2).mT for t in self.fast_maps(x))
        d, e = theta.shape[2], g.shape[2]
        with full_precision(x):
            if n * m * (d + e) <= (n + m) * d * e:
                return pairs.product((theta @ phi.mT) * factor, g, by_rows)
            return pairs.product(theta, (phi.mT @ g) * factor, by_rows)

    def unfolded(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x: (B, C, *S) → both summands of the concatenation form, and the rows of g, float32 or wider."""
        theta, phi, g = (at_least_float32(t).flatten(2).mT for t in self.maps(x))
        with full_precision(x):
            return *self.halves(theta, phi), g

    def foldable(self, x: Tensor) -> bool:
        """Whether θ and φ may go into `concat`'s weights."""
        return not self.sub_sample and self.bare(x, self.theta, self.phi)

    def bare(self, x: Tensor, *layers: nn.Module | None) -> bool:
        """Whether these are our 1×1 convolutions in x's precision, and nobody would miss a call of theirs."""
        one, none = (1,) * self.dims, (0,) * self.dims
        return full(x) and all(
            type(layer) is CONV[self.dims]
            and (layer.kernel_size, layer.stride, layer.padding, layer.groups) == (one, one, none, 1)
            and type(layer.weight) in (nn.Parameter, Tensor)
            and layer.weight.dtype == x.dtype
            and untouched(layer)
            for layer in layers
        )

    def folded(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same as `unfolded`, by w_aᵀ (Θ x + t) = (Θᵀ w_a)ᵀ x + w_aᵀ t: two of the four large products less."""
        assert self.concat is not None
        directions, shifts = [], []
        for layer, w in zip((self.theta, self.phi), self.concat.weight.chunk(2, 1), strict=True):
            assert layer is not None
            directions.append(w @ layer.weight.flatten(1))
            shifts.append(w.new_zeros(1) if layer.bias is None else w @ layer.bias)
        flat = x.flatten(2).mT
        weight = torch.cat(directions).T.expand(x.shape[0], -1, -1)
        a, b = (pairs.product(flat, weight, flat.is_contiguous()) + torch.cat(shifts)).unbind(2)
        return a, b, self.g(x).flatten(2).mT

    def unbounded(self, theta: Tensor, phi: Tensor, g: Tensor) -> Tensor:
        """Rows of the embeddings → y: (B, N, e) of the modes without softmax, float32 or wider."""
        theta, phi, g = [at_least_float32(t) for t in [theta, phi, g]]
        g = self.scale / phi.shape[1] * g
        if self.mode == "dot_product":
            return product(theta, product(phi.transpose(1, 2), g))
        a, b = self.halves(theta, phi)
        if exporting():
            return product(F.relu(a.unsqueeze(2) + b.unsqueeze(1)), g)
        return relu_of_sums(a, b, g)

    def halves(self, theta: Tensor, phi: Tensor) -> tuple[Tensor, Tensor]:
        """The two summands of the concatenation form: w_aᵀ θ (B, N) and w_bᵀ φ (B, M)."""
        assert self.concat is not None
        first, second = self.concat.weight.to(theta.dtype).squeeze(0).chunk(2)
        return (theta * first).sum(2), (phi * second).sum(2)

    def attention(self, x: Tensor) -> dict[str, Tensor]:
        """x: (B, C, *S) → `rows`: (B, N, M), f / C(x): the weight of each j for i.

        Under a softmax they sum to 1; without one they stay float32, which half precision might not hold.
        """
        theta, phi, _ = (at_least_float32(t) for t in self.embed(x))
        if self.bounded:
            return {"rows": attention_rows(theta, phi, self.scale).to(x.dtype)}
        with full_precision(x):
            if self.mode == "dot_product":
                f = theta @ phi.transpose(1, 2)
            else:
                a, b = self.halves(theta, phi)
                f = F.relu(a.unsqueeze(2) + b.unsqueeze(1))
        return {"rows": f * (self.scale / phi.shape[1])}


def full(x: Tensor) -> bool:
    """Whether layers compute in x's dtype, and that is float32 or wider."""
    kind = x.device.type
    low = autocasting(kind)
    return at_least_float32(x) is x and not low


def halve(x: Tensor) -> Tensor:
    """Max-pool by 2 over the last two spatial axes (one in 1D): an odd last position goes, a lone one stays.

    A reduction over reshaped axes, not a pooling call, whose backward is not deterministic everywhere.
    """
    shape = static_shape(x)
    for axis in range(max(2, x.ndim - 2), x.ndim):
        pairs = shape[axis] // 2
        if pairs:
            x = torch.unflatten(x.narrow(axis, 0, 2 * pairs), axis, (pairs, 2)).amax(axis + 1)
    return x
