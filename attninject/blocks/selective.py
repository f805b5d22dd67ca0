"""Blocks that choose: among kernels (SK), among scales (multi-scale spatial), among positions (DCN)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import BATCH_NORM, CONV, Block, Facts, GateBlock, count, he_init, hidden_width, pool, static_shape
from .both import ConvNormReLU
from .choosing import Choosing
from .gate import Gate, GateKind, Normed, added, at_least_float32, scale, zero
from .options import Branches, Count, Init, Int, Reduction, given


class SK(Block, Normed):
    """Selective kernel: Σ_i a_i · u_i, u_i = relu(BN(conv_i(x))) of different kernel and dilation.

    arXiv:1903.06586, eq. 1-6: s = mean of Σ u_i over positions, z = relu(BN(W s)) of width
    d = max(C / r, L), and a softmax over the branches of A_i z, one weight per channel and branch.
    `branches` are pairs [kernel size, dilation], `reduction` is r, `min_width` L, which applies after `divisor`,
    and `groups` those of the branches' convolutions.

    A softmax over branches of new convolutions has no setting that returns x, so `init="identity"` means
    `blend`: x + α(SK(x) − x). In train mode the norm of z sees one value per channel and sample; at batch 1
    it uses its running statistics.

    Deviations: the default branches are the paper's efficient form, its 5×5 kernel made of a 3×3 with
    dilation 2. `groups` is cut to gcd(C, groups), so that every C is defined. In the paper a `sk` *replaces*
    a 3×3 convolution and may stride; here it keeps its input's shape. timm's `SelectiveKernel` with
    `split_input=False`, equal groups and `rd_channels=d` agrees under `init="paper"`, with keys
    `paths.i.bn`, `attn.fc_reduce`, `attn.bn`, `attn.fc_select` for our `paths.i.norm`, `fc_reduce`, `norm`,
    `fc_select`; by default it splits the channels over the paths.
    """

    facts = Facts(
        "sk", family="channel", spatial=True, paper="arXiv:1903.06586", equation="1-6",
        summary="selective kernel: branches of several kernels, weighed per channel by a softmax",
    )  # fmt: skip

    def __init__(
        self,
        channels: int,
        *,
        dims: int = 2,
        init: Init = "identity",
        branches: Annotated[Sequence[Sequence[int]], Branches()] = ((3, 1), (3, 2)),
        reduction: Annotated[float, Reduction()] = 16,
        min_width: Annotated[int, Int(min=1)] = 32,
        groups: Annotated[int, Int(min=1)] = 32,
        divisor: Annotated[int, Int(min=1)] = 1,
    ) -> None:
        super().__init__(**given(locals()))
        width = max(min_width, hidden_width(channels, reduction, divisor))
        shared = math.gcd(channels, groups)
        self.paths = nn.ModuleList(
            ConvNormReLU(channels, channels, kernel, dims, False, dilation, shared)
            for kernel, dilation in branches
        )
        self.fc_reduce = CONV[dims](channels, width, 1, bias=False)
        self.norm = BATCH_NORM[dims](width)
        self.fc_select = CONV[dims](width, channels * len(branches), 1, bias=False)
        self.initialise()

    def needs_blend(self) -> bool:
        """Always: the branches are convolutions that never return x."""
        return True

    def init_paper(self) -> None:
        """He by fan-out for the convolutions, as in residual networks; the norms at 1 and 0."""
        for layer in self.modules():
            if isinstance(layer, CONV[self.dims]):
                he_init(layer, mode="fan_out")

    def weights(self, features: list[Tensor]) -> Tensor:
        """The branches' features, M of (B, C, *S) → (B, M, C, 1, …), summing to 1 over M, in float32."""
        z = F.relu(self.normed(self.fc_reduce(pool(added(features), "avg"))))
        logits = torch.unflatten(self.fc_select(z), 1, (len(self.paths), self.channels))
        return torch.softmax(at_least_float32(logits), 1)

    def transform(self, x: Tensor) -> Tensor:
        """x: (B, C, *S) → the same shape."""
        features = [path(x) for path in self.paths]
        weights = self.weights(features).unbind(1)
        return added([scale(u, weights[i]) for i, u in enumerate(features)]).to(x.dtype)

    def attention(self, x: Tensor) -> dict[str, Tensor]:
        """x: (B, C, *S) → `branches`: (B, M, C, 1, …), each branch's weight per channel; they sum to 1."""
        return {"branches": self.weights([path(x) for path in self.paths]).to(x.dtype)}


class Scale(Normed):
    """BN(conv([max of x; mean of x])) with one kernel and one dilation: logits of one scale."""

    def __init__(self, kernel: int, dilation: int, dims: int, bias: bool, norm: bool) -> None:
        super().__init__()
        padding = dilation * (kernel // 2)
        self.conv = CONV[dims](2, 1, kernel, padding=padding, dilation=dilation, bias=bias)
        self.norm = BATCH_NORM[dims](1) if norm else None

    def forward(self, pooled: Tensor) -> Tensor:
        """pooled: (B, 2, *S) → (B, 1, *S)."""
        return self.normed(self.conv(pooled))


class MultiScaleSpatial(GateBlock):
    """Multi-scale spatial attention: one gate per position from several kernels and dilations, fused.

    Each scale is CBAM's spatial attention (arXiv:1807.06521, eq. 3), z_i = BN(conv_i([max of x; mean of x]))
    with its own kernel and dilation; they lie side by side as in atrous spatial pyramid pooling
    (arXiv:1606.00915, section 3.2, which sums its scales; arXiv:1706.05587 concatenates them and mixes by a
    1×1 convolution). `branches` are pairs [kernel size, dilation]; `fuse` sum: x · g(Σ z_i), conv:
    x · g(w · [z_1; …; z_n] + b), mean: x · Σ g(z_i) / n; `bias` of the scales' convolutions, `norm` behind
    them.

    Deviations: no one paper defines this block; it is put together from the equations named. The order is
    [max, mean], as in CBAM's released code.
    """

    facts = Facts(
        "multiscale_spatial", family="spatial", spatial=True, paper="arXiv:1606.00915", equation="section 3.2",
        summary="spatial gates of several kernels and dilations, fused into one",
    )  # fmt: skip

    def __init__(
        self,
        channels: int,
        *,
        dims: int = 2,
        init: Init = "identity",
        branches: Annotated[Sequence[Sequence[int]], Branches()] = ((3, 1), (5, 1), (7, 1), (3, 4)),
        fuse: Literal["sum", "conv", "mean"] = "sum",
        bias: bool = False,
        norm: bool = True,
        gate: GateKind = "sigmoid",
    ) -> None:
        super().__init__(**given(locals()))
        self.mean = fuse == "mean"
        self.scales = nn.ModuleList(
            Scale(kernel, dilation, dims, bias, norm) for kernel, dilation in branches
        )
        self.fuse = CONV[dims](len(branches), 1, 1) if fuse == "conv" else None
        self.gate = Gate(gate, identity=self.identity)
        self.initialise()

    def init_identity(self) -> None:
        """Zero the layer behind which z is: the fusing convolution, else each scale's norm or convolution."""
        zero(self.fuse)
        if self.fuse is None:
            zero(*(s.conv if s.norm is None else s.norm for s in self.scales))  # type: ignore[arg-type]

    def init_paper(self) -> None:
        """He by fan-out as in CBAM's released code, zero biases; no norm at zero."""
        he_init(*(s.conv for s in self.scales), mode="fan_out")  # type: ignore[arg-type]
        if self.fuse is not None and self.fuse.bias is not None:
            nn.init.zeros_(self.fuse.bias)

    def factor(self, x: Tensor) -> Tensor:
        """x: (B, C, *S) → the one gate (B, 1, *S), float32 or wider; gates are averaged first."""
        pooled = torch.cat([x.amax(1, keepdim=True), x.mean(1, keepdim=True)], 1)
        logits = torch.cat([at_least_float32(s(pooled)) for s in self.scales], 1)
        if self.mean:
            return self.gate(logits).sum(1, keepdim=True) / len(self.scales)
        if self.fuse is None:
            return self.gate(logits.sum(1, keepdim=True))
        return self.gate(at_least_float32(self.fuse(logits.to(self.fuse.weight.dtype))))


class DynamicCapacity(Choosing):
    """Dynamic capacity: a gate from a coarse path everywhere, from a fine path at the k salient positions.

    arXiv:1511.07838, section 2: coarse features at all positions; a saliency from them picks k
    positions; there, and only there, a wider path with a larger field is computed, and its results replace
    the coarse ones. Here c = W₁x (1×1, width C / `reduction`), zᶜ = W₂ relu(c), s = wᵀc + b; at the k
    positions of largest s, zᶠ = V₂ relu(V₁ · patch of `kernel_size`) of width C / `fine_reduction`, and
    z = zᶜ + σ(s)(zᶠ − zᶜ); elsewhere z = zᶜ. The output is x · g(z), z: (B, C, *S).
    `k` is a number of positions (all of them, where there are fewer) or a fraction (at least one position);
    `divisor` rounds both widths, `bias` is that of all layers.

    Deviations: the paper's saliency is the gradient of the classifier's entropy, which no block inside a
    network has; here it is a learned score, and σ(s) in front of the replacement is how the score gets its
    gradient. Its paths are small networks whose features go on; here they end in the logits of a gate, so
    that the shape is kept and identity is exact. s reads c before its relu, or many positions would tie at 0.
    The paper's extra loss, which draws coarse and fine features together, is left to the training.
    """

    facts = Facts(
        "dynamic_capacity", family="both", spatial=True, paper="arXiv:1511.07838", equation="section 2",
        summary="dynamic capacity: a coarse gate everywhere, a fine one at the k salient positions",
    )  # fmt: skip

    def __init__(
        self,
        channels: int,
        *,
        dims: int = 2,
        init: Init = "identity",
        k: Annotated[float, Count()] = 0.25,
        reduction: Annotated[float, Reduction()] = 16,
        fine_reduction: Annotated[float, Reduction()] = 4,
        kernel_size: Literal[1, 3, 5] = 3,
        bias: bool = True,
        divisor: Annotated[int, Int(min=1)] = 1,
        gate: GateKind = "sigmoid",
    ) -> None:
        super().__init__(**given(locals()))
        coarse = hidden_width(channels, reduction, divisor)
        fine = hidden_width(channels, fine_reduction, divisor)
        conv = CONV[dims]
        self.kernel_size = kernel_size
        self.coarse1 = conv(channels, coarse, 1, bias=bias)
        self.coarse2 = conv(coarse, channels, 1, bias=bias)
        self.score = conv(coarse, 1, 1, bias=bias)
        self.fine1 = nn.Linear(channels * kernel_size**dims, fine, bias=bias)
        self.fine2 = nn.Linear(fine, channels, bias=bias)
        self.gate = Gate(gate, identity=self.identity)
        self.initialise()

    def init_identity(self) -> None:
        """Zero the last layer of either path: z = 0 whichever path it is from."""
        zero(self.coarse2, self.fine2)

    def init_paper(self) -> None:
        """Torch's weights (the paper names none), zero biases."""
        for layer in (self.coarse1, self.coarse2, self.score, self.fine1, self.fine2):
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def logits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: (B, C, *S) of N positions → z: (B, C, N), float32 or wider, and the fine positions (B, 1, k)."""
        c = self.coarse1(x)
        z = at_least_float32(self.coarse2(F.relu(c))).flatten(2)
        s = at_least_float32(self.score(c)).flatten(2)
        top, index = torch.topk(s, self.chosen(count(x)), dim=2)
        fine = self.fine2(F.relu(self.fine1(patches(x, index[:, 0], self.kernel_size))))
        at = index.expand(-1, self.channels, -1)
        coarse = z.gather(2, at)
        chosen = coarse + torch.sigmoid(top) * (at_least_float32(fine).transpose(1, 2) - coarse)
        return z.scatter(2, at, chosen), index

    def transform(self, x: Tensor) -> Tensor:
        """x: (B, C, *S) → x · gate."""
        z, _ = self.logits(x)
        return scale(x, self.gate(z).view(x.shape))

    def attention(self, x: Tensor) -> dict[str, Tensor]:
        """x: (B, C, *S) → `gate`: (B, C, *S), and `fine`: (B, 1, *S), 1 where the fine path ran, else 0."""
        z, index = self.logits(x)
        fine = torch.zeros_like(z[:, :1]).scatter(2, index, 1.0)
        shape = (x.shape[0], 1, *x.shape[2:])
        return {"gate": self.gate(z).view(x.shape).to(x.dtype), "fine": fine.view(shape).to(x.dtype)}


def patches(x: Tensor, index: Tensor, kernel: int) -> Tensor:
    """The kernel-sized surroundings, zeros outside, of some positions: (B, k, C · kernel^dims).

    x: (B, C, *S); index: (B, k), positions numbered row by row. The values lie as in a convolution's weight,
    channel by channel. Only these are read, so the cost is that of k positions.
    """
    size, edge = static_shape(x)[2:], kernel // 2
    offsets = torch.arange(kernel, device=x.device)
    at, unit = index.new_zeros([1]).expand(list(index.shape) + [1]), count(x)  # noqa: RUF005
    for n in size:  # Horner's rule over the axes of the padded map
        unit = unit // n
        here = (index // unit % n).unsqueeze(2) + offsets
        at = (at.unsqueeze(3) * (n + 2 * edge) + here.unsqueeze(2)).flatten(2)
    padded = F.pad(x, [edge] * (2 * len(size))).flatten(2)
    found = padded.gather(2, at.flatten(1).unsqueeze(1).expand(-1, x.shape[1], -1))
    return torch.unflatten(found, 2, at.shape[1:]).transpose(1, 2).flatten(2)
