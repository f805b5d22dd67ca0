"""Channel gates from other descriptors than SE's: neighbours, norms, styles, global and local context."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attninject.blocks.fast.dispatch import SMALL, untouched
from attninject.errors import BlockError

from .attend import means
from .base import (
    BATCH_NORM,
    CONV,
    Block,
    Facts,
    GateBlock,
    column,
    he_init,
    hidden_width,
    pool,
    positions,
    static_shape,
)
from .fast import channel as fast_channel
from .fast import context as fast_context
from .gate import Gate, GateKind, Normed, at_least_float32, normalize, scale, zero
from .options import Backend, Init, Int, Number, Odd, Positive, Reduction, given


class ECA(GateBlock):
    """Efficient channel attention: x · g(conv_k(s)), s = mean of x, the 1-D convolution over the channels.

    arXiv:1910.03151, eq. 9 (one kernel of k weights shared by all channels, no bias) and 12 (k grows with the
    channels: the odd number nearest to log₂(C)/γ + b/γ). A `kernel_size` of None is eq. 12, with
    `gamma` and `beta` for γ and b.

    Deviations: none. timm's `EcaModule(C)` has the same key and output but never a kernel below 3, where
    eq. 12 gives 1 for C < 8. The order of the channels matters to this block: its first and last channels see
    zeros beyond the edge.
    """

    facts = Facts(
        "eca", family="channel", spatial=False, paper="arXiv:1910.03151", equation="9, 12",
        summary="efficient channel attention: one small kernel slides over the channels",
    )  # fmt: skip
    fast_from = SMALL

    def __init__(
        self,
        channels: int,
        *,
        dims: int = 2,
        init: Init = "identity",
        kernel_size: Annotated[int, Odd()] | None = None,
        gamma: Annotated[float, Positive()] = 2,
        beta: Annotated[float, Number()] = 1,
        gate: GateKind = "sigmoid",
        backend: Backend = "auto",
    ) -> None:
        super().__init__(**given(locals()))
        k = adaptive_kernel(channels, gamma, beta) if kernel_size is None else kernel_size
        self.conv = nn.Conv1d(1, 1, k, padding=k // 2, bias=False)
        self.gate = Gate(gate, identity=self.identity)
        self.initialise()

    def init_identity(self) -> None:
        """Zero the kernel: z = 0."""
        zero(self.conv)

    def slide(self, mean: Tensor) -> Tensor:
        """The descriptor (B, C, 1, …) → the gate, the same shape."""
        z = self.conv(mean.flatten(1).unsqueeze(1)).squeeze(1)
        return self.gate(z.view_as(mean))

    def factor(self, x: Tensor) -> Tensor:
        """x: (B, C, *S) → (B, C, 1, …)."""
        return self.slide(pool(x, "avg"))

    def fast_transform(self, x: Tensor) -> Tensor:
        """x: (B, C, *S) → x · gate."""
        conduits, (mean,) = fast_channel.squeeze(x, ("avg",))
        return fast_channel.scale(x, self.slide(mean), conduits)


def adaptive_kernel(channels: int, gamma: float = 2, beta: float = 1) -> int:
    """ECA's kernel size, eq. 12: the odd number nearest to |log₂(C)/γ + b/γ|, the larger of two, at least 1.

    >>> [adaptive_kernel(c) for c in (1, 8, 64, 256, 512, 1024, 2048)]
    [1, 3, 3, 5, 5, 5, 7]
    """
    t = int(abs((math.log2(channels) + beta) / gamma))
    return t if t % 2 else t + 1


class GCT(GateBlock):
    """Gated channel transformation: x · (1 + tanh(γ ŝ + β)), ŝ = α‖x‖ normalised across the channels.

    arXiv:1909.11519, eq. 2 (s_c = α_c (Σ x² + ε)^½ over positions), 3 (ŝ_c = s_c / (mean of s² + ε)^½), 4.
    Per channel α (here `weight`: `alpha` is what `init="blend"` adds), γ and β. The published α = 1,
    γ = β = 0 make it the identity, so `identity` and `paper` are the same. `mode` l1 is its
    ablation: s_c = α_c Σ|x|, ŝ_c = s_c / (mean of |s| + ε). `eps` is ε.

    Deviations: ε stands inside eq. 3's mean, as in the released code; in the paper beside the sum, C times as
    small. The released option `after_relu` only leaves out an absolute value that has no effect there.
    """

    facts = Facts(
        "gct", family="channel", spatial=False, paper="arXiv:1909.11519", equation="2-4",
        summary="gated channel transformation: channels compete by their norms",
    )  # fmt: skip

    def __init__(
        self,
        channels: int,
        *,
        dims: int = 2,
        init: Init = "identity",
        mode: Literal["l2", "l1"] = "l2",
        eps: Annotated[float, Positive()] = 1e-5,
    ) -> None:
        super().__init__(**given(locals()))
        self.mode, self.eps = mode, eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.gamma = nn.Parameter(torch.zeros(channels))
        self.beta = nn.Parameter(torch.zeros(channels))
        self.gate = Gate("tanh", identity=True)
        self.initialise()

    def init_blend(self) -> None:
        """γ = 1, or behind α = 0 nothing would ever learn."""
        nn.init.ones_(self.gamma)

    def factor(self, x: Tensor) -> Tensor:
        """x: (B, C, *S) → (B, C, 1, …)."""
        wide = at_least_float32(x.new_empty(0)).dtype  # sums of squares overflow in float16
        norm = torch.linalg.vector_norm(x, 2 if self.mode == "l2" else 1, positions(x), dtype=wide)
        if self.mode == "l2":
            s = self.weight * (norm.square() + self.eps).sqrt()
            size = (s.square().mean(1, keepdim=True) + self.eps).sqrt()
        else:
            s = self.weight * norm
            size = s.abs().mean(1, keepdim=True) + self.eps
        return self.gate(column(self.gamma * (s / size) + self.beta, x))


class SRM(GateBlock, Normed):
    """Style-based recalibration: x · g(BN(w_c · [mean of x_c, deviation of x_c])), one pair w_c per channel.

    arXiv:1903.10829, section 3: style pooling, then style integration (the channel-wise fully connected layer
    `cfc`, norm, gate).

    Deviations: the deviation is the paper's, over N positions; the released code divides by N - 1, which is
    undefined at one position. Variances below 1e-12 count as 1e-12, where the root has no slope. Under
    `identity` the norm's scale and shift are zero and `cfc` is random, in the released code `cfc` is zero.
    """

    facts = Facts(
        "srm", family="channel", spatial=False, paper="arXiv:1903.10829", equation="section 3",
        summary="style-based recalibration: a gate per channel from its mean and deviation",
    )  # fmt: skip

    def __init__(
        self,
        channels: int,
        *,
        dims: int = 2,
        init: Init = "identity",
        gate: GateKind = "sigmoid",
    ) -> None:
        super().__init__(**given(locals()))
        self.cfc = nn.Parameter(torch.empty(channels, 2).uniform_(-(2**-0.5), 2**-0.5))  # as torch's layers
        self.norm = BATCH_NORM[dims](channels)
        self.gate = Gate(gate, identity=self.identity)
        self.initialise()

    def init_identity(self) -> None:
        """Zero the norm's scale and shift, not `cfc` (see `SpatialAttention.init_identity`)."""
        zero(self.norm)

    def init_paper(self) -> None:
        """The released code's: `cfc` at zero, so every gate at g(0)."""
        nn.init.zeros_(self.cfc)

    def init_blend(self) -> None:
        """The random `cfc`."""

    def factor(self, x: Tensor) -> Tensor:
        """x: (B, C, *S) → (B, C, 1, …)."""
        variance, mean = torch.var_mean(at_least_float32(x), positions(x), correction=0)
        style = torch.stack([mean, variance.clamp(min=1e-12).sqrt()], 2).to(x.dtype)
        return self.gate(self.normed(column((self.cfc * style).sum(2), x)))


class ContextMLP(nn.Module):
    """W₂ relu(LN(W₁ s)): (B, C, 1, …) → the same shape; timm's keys."""

    def __init__(self, channels: int, hidden: int, dims: int) -> None:
        super().__init__()
        self.fc1 = CONV[dims](channels, hidden, 1)
        self.norm = nn.LayerNorm(hidden)
        self.fc2 = CONV[dims](hidden, channels, 1)

    def forward(self, s: Tensor) -> Tensor:
        """s: (B, C, 1, …) → the same shape."""
        y: Tensor = self.fc2(F.relu(column(self.norm(self.fc1(s).flatten(1)), s)))
        return y


class GC(Block):
    """Global context: s = Σ_j softmax_j(w · x_j) x_j, then x + MLP(s) (add) or x · g(MLP(s)) (multiply).

    arXiv:1904.11492, eq. 4 (the framework: context, transform, fusion), 5 (the block that adds); multiplying
    and the plain mean are its ablations. MLP: W₂ relu(LN(W₁ s)) through C / `reduction`. A `fusion`
    of both multiplies first, each with its own MLP; a `pool` of avg is the mean, no softmax; `gate` is that of
    the multiplying form.

    Deviations: none. timm's `GlobalContext` is `fusion="multiply", reduction=8, init="paper"` with the same
    keys; its LayerNorm has ε 1e-6, ours 1e-5 as released. A hidden width of one makes the norm's output
    constant: W₁ cannot learn, choose a smaller `reduction`.
    """

    facts = Facts(
        "gc", family="global", spatial=False, paper="arXiv:1904.11492", equation="4, 5",
        summary="global context: one attention-weighted mean for all positions, added or multiplied",
    )  # fmt: skip
    fast_from = SMALL

    def __init__(
        self,
        channels: int,
        *,
        dims: int = 2,
        init: Init = "identity",
        fusion: Literal["add", "multiply", "both"] = "add",
        pool: Literal["att", "avg"] = "att",
        reduction: Annotated[float, Reduction()] = 16,
        divisor: Annotated[int, Int(min=1)] = 1,
        gate: GateKind = "sigmoid",
        backend: Backend = "auto",
    ) -> None:
        super().__init__(**given(locals()))
        hidden = hidden_width(channels, reduction, divisor)
        self.conv_attn = CONV[dims](channels, 1, 1) if pool == "att" else None
        self.mlp_scale = ContextMLP(channels, hidden, dims) if fusion != "add" else None
        self.mlp_add = ContextMLP(channels, hidden, dims) if fusion != "multiply" else None
        self.gate = Gate(gate, identity=self.identity)
        self.initialise()

    def init_identity(self) -> None:
        """Zero the last layer of each MLP."""
        for mlp in (self.mlp_scale, self.mlp_add):
            zero(None if mlp is None else mlp.fc2)

    def init_paper(self) -> None:
        """The released code's: He for w, and zero last layers (so that adding starts as the identity)."""
        self.init_blend()
        self.init_identity()

    def init_blend(self) -> None:
        """The same, the last layers not at zero."""
        if self.conv_attn is not None:
            he_init(self.conv_attn)

    def weights(self, x: Tensor) -> Tensor | None:
        """x: (B, C, *S) of N positions → (B, 1, N) that sum to 1, float32 or wider; None for the plain mean."""
        if self.conv_attn is None:
            return None
        return torch.softmax(at_least_float32(self.conv_attn(x)).flatten(2), 2)

    def context(self, x: Tensor) -> Tensor:
        """x: (B, C, *S) → s: (B, C, 1, …)."""
        weights = self.weights(x)
        if weights is None:
            return pool(x, "avg")
        return column(means(x.flatten(2), weights).squeeze(2), x)

    def fused(self, s: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The context (B, C, 1, …) → factor and summand of the same shape, None where not used."""
        factor = None if self.mlp_scale is None else self.gate(at_least_float32(self.mlp_scale(s)))
        summand = None if self.mlp_add is None else self.mlp_add(s).to(s.dtype)
        return factor, summand

    def transform(self, x: Tensor) -> Tensor:
        """x: (B, C, *S) → x · factor + summand."""
        factor, summand = self.fused(self.context(x))
        y = x if factor is None else scale(x, factor)
        return y if summand is None else y + summand

    def fast_applies(self, x: Tensor) -> bool:
        """If the layer that reads the map is the plain convolution it was built as."""
        conv = self.conv_attn
        return conv is None or (type(conv) is CONV[self.dims] and untouched(conv))

    def fast_transform(self, x: Tensor) -> Tensor:
        """x: (B, C, *S) → x · factor + summand."""
        if self.conv_attn is None:
            conduits, (s,) = fast_channel.squeeze(x, ("avg",))
        else:
            conduits, s = fast_context.context(x, self.conv_attn)
        return fast_context.affine_of(x, *self.fused(s), conduits)

    def attention(self, x: Tensor) -> dict[str, Tensor]:
        """x: (B, C, *S) → of these what there is: `weights`: (B, 1, *S), `gate` and `shift`: (B, C, 1, …)."""
        weights, (factor, summand) = self.weights(x), self.fused(self.context(x))
        found = {
            "weights": None if weights is None else torch.unflatten(weights, 2, x.shape[2:]).to(x.dtype),
            "gate": None if factor is None else factor.to(x.dtype),
            "shift": summand,
        }
        return {name: tensor for name, tensor in found.items() if tensor is not None}


class GE(GateBlock):
    """Gather-excite: x · g(interp(gather(x))), gathering over neighbourhoods of `extent` e or the whole map.

    arXiv:1810.12348, eq. 1-2 and section 3; interp: nearest neighbour back to the map's size. The `mode`:
    theta_minus is the mean over windows of 2e - 1 at stride e, without parameters; theta log₂ e depthwise 3×3
    convolutions of stride 2, each with a norm, relu between; theta_plus SE's two layers behind that. An
    `extent` of 0 is the whole map; theta and theta_plus then need its side, `feat_size`, as their gather is
    one depthwise kernel of that size: such a block works at that size only.

    Deviations: none from the paper. Windows count only positions inside the map, as timm's do. A global mean
    behind SE's layers is the block `se`. timm's `GatherExcite` is `theta_minus` with `use_mlp=False`; its
    other forms cannot be built in 1.0.31. `theta_minus` has nothing to zero: its `identity` is `blend`. A
    program exported with a map that gathers to one position serves only such maps.
    """

    facts = Facts(
        "ge", family="channel", spatial=True, paper="arXiv:1810.12348", equation="1-2",
        summary="gather-excite: a gate per channel and neighbourhood",
    )  # fmt: skip

    def __init__(
        self,
        channels: int,
        *,
        dims: int = 2,
        init: Init = "identity",
        mode: Literal["theta_minus", "theta", "theta_plus"] = "theta",
        extent: Literal[0, 2, 4, 8] = 8,
        feat_size: Annotated[int, Int(min=1)] | None = None,
        reduction: Annotated[float, Reduction()] = 16,
        divisor: Annotated[int, Int(min=1)] = 1,
        gate: GateKind = "sigmoid",
    ) -> None:
        super().__init__(**given(locals()))
        self._check_size(mode, extent, feat_size)
        self.mode, self.extent, self.feat_size = mode, extent, feat_size
        self.convs = self._gather_layers()
        self.norms = nn.ModuleList(BATCH_NORM[dims](channels) for _ in self.convs)
        self.fc1: nn.Module | None = None
        self.fc2: nn.Module | None = None
        if mode == "theta_plus":
            hidden = hidden_width(channels, reduction, divisor)
            self.fc1, self.fc2 = CONV[dims](channels, hidden, 1), CONV[dims](hidden, channels, 1)
        self.gate = Gate(gate, identity=self.identity)
        self.initialise()

    @staticmethod
    def _check_size(mode: str, extent: int, feat_size: int | None) -> None:
        fixed = mode != "theta_minus" and extent == 0
        if fixed and feat_size is None:
            raise BlockError(
                f"block 'GE': mode {mode!r} with extent 0 gathers by one kernel as large as the map: give "
                "feat_size (the side of the map), or an extent of 2, 4 or 8, or mode 'theta_minus'"
            )
        if feat_size is not None and not fixed:
            raise BlockError(
                "block 'GE': feat_size: only for extent 0 with mode 'theta' or 'theta_plus', leave it out"
            )

    def _gather_layers(self) -> nn.ModuleList:
        c, conv = self.channels, CONV[self.dims]
        if self.mode == "theta_minus":
            return nn.ModuleList()
        if self.feat_size is not None:
            return nn.ModuleList([conv(c, c, self.feat_size, groups=c, bias=False)])
        steps = int(math.log2(self.extent))
        return nn.ModuleList(conv(c, c, 3, stride=2, padding=1, groups=c, bias=False) for _ in range(steps))

    def needs_blend(self) -> bool:
        """Without parameters there is no layer to zero."""
        return bool(self.args["mode"] == "theta_minus")

    def init_identity(self) -> None:
        """Zero the last layer: SE's second, or the last norm."""
        zero(self.fc2 if self.fc2 is not None else self.norms[-1])

    def gather(self, x: Tensor) -> Tensor:
        """x: (B, C, *S) → (B, C, *⌈S/e⌉), or (B, C, 1, …) for the whole map."""
        if self.mode == "theta_minus":
            return window_means(x, self.extent) if self.extent else pool(x, "avg")
        size = static_shape(x)[2:]
        if self.feat_size is not None:  # noqa: SIM102 (TorchScript tells by it whether there is a number)
            if size != [self.feat_size] * self.dims:
                raise BlockError(f"block 'GE' was built for maps of feat_size {self.feat_size}, found {size}")
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms)):  # noqa: B905 (not in TorchScript)
            x = conv(F.relu(x) if i else x)
            x = norm(x) if torch.jit.is_scripting() else normalize(norm, x)
        return x

    def factor(self, x: Tensor) -> Tensor:
        """x: (B, C, *S) → (B, C, *S), or (B, C, 1, …) for the whole map."""
        z = self.gather(x)
        if self.fc1 is not None and self.fc2 is not None:
            z = self.fc2(F.relu(self.fc1(z)))
        if self.extent:
            z = F.interpolate(z, size=static_shape(x)[2:], mode="nearest")
        return self.gate(at_least_float32(z))


def window_means(x: Tensor, extent: int) -> Tensor:
    """Means over windows of 2e - 1 positions at stride e, cut at the edges: (B, C, *S) → (B, C, *⌈S/e⌉).

    By 2-D pooling in every dimension, since a window's mean is the mean of its rows' means: torch's 3-D
    pooling has no deterministic backward on a GPU.
    """

    if x.ndim == 4:
        return _pool2d(x, [extent, extent])
    if x.ndim == 3:
        return _pool2d(x.unsqueeze(3), [extent, 1]).squeeze(3)
    depth = static_shape(x)[2]
    planes = _pool2d(x.flatten(1, 2), [extent, extent])
    rows, sides = torch.unflatten(planes, 1, (-1, depth)).flatten(3), static_shape(planes)[2:]
    return torch.unflatten(_pool2d(rows, [extent, 1]), 3, sides)


def _pool2d(x: Tensor, extents: list[int]) -> Tensor:
    kernel, padding = [2 * e - 1 for e in extents], [e - 1 for e in extents]
    return F.avg_pool2d(x, kernel, extents, padding, count_include_pad=False)
