"""What a block is measured against: the papers' formulas written plainly, timm's modules, mmcv's.

A formula is a module with the keys of our block, so that it takes our weights as they are; timm's and mmcv's
modules take them under their own names. With our weights every peer computes what our block computes under
`init="paper"` (the benchmark checks it before it measures): a ratio to anything else would mean nothing.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

State = Mapping[str, Tensor]

# --- the papers' formulas -----------------------------------------------------------------------


class SE(nn.Module):
    """arXiv:1709.01507, eq. 2-4: x · σ(W₂ relu(W₁ mean))."""

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, channels // reduction, 1)
        self.fc2 = nn.Conv2d(channels // reduction, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W) → the same shape."""
        s = x.mean((2, 3), keepdim=True)
        return x * torch.sigmoid(self.fc2(F.relu(self.fc1(s))))


class ChannelAttention(SE):
    """arXiv:1807.06521, eq. 2: x · σ(MLP(mean) + MLP(max))."""

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W) → the same shape."""
        avg, top = x.mean((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
        return x * torch.sigmoid(self.fc2(F.relu(self.fc1(avg))) + self.fc2(F.relu(self.fc1(top))))


class SpatialAttention(nn.Module):
    """arXiv:1807.06521, eq. 3, with the released code's norm: x · σ(BN(conv₇([max; mean])))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 7, padding=3, bias=False)
        self.norm = nn.BatchNorm2d(1)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W) → the same shape."""
        pooled = torch.cat([x.amax(1, keepdim=True), x.mean(1, keepdim=True)], 1)
        return x * torch.sigmoid(self.norm(self.conv(pooled)))


class CBAM(nn.Module):
    """arXiv:1807.06521, eq. 1: the channel half, then the spatial half."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channel = ChannelAttention(channels)
        self.spatial = SpatialAttention(channels)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W) → the same shape."""
        made: Tensor = self.spatial(self.channel(x))
        return made


class _ConvNormReLU(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: int = 1, dilation: int = 1) -> None:
        super().__init__()
        padding = dilation * (kernel // 2)
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=padding, dilation=dilation)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)))


class BAM(nn.Module):
    """arXiv:1807.06514, eq. 1-4, with the released code's product: x · (1 + σ(channel · spatial))."""

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        hidden = channels // reduction
        self.channel = nn.Sequential(_ConvNormReLU(channels, hidden), nn.Conv2d(hidden, channels, 1))
        self.spatial = nn.Sequential(
            _ConvNormReLU(channels, hidden),
            _ConvNormReLU(hidden, hidden, 3, 4),
            _ConvNormReLU(hidden, hidden, 3, 4),
            nn.Conv2d(hidden, 1, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W) → the same shape."""
        return x * (1 + torch.sigmoid(self.channel(x.mean((2, 3), keepdim=True)) * self.spatial(x)))


class ECA(nn.Module):
    """arXiv:1910.03151, eq. 9 and 12: x · σ(conv1d over the channels of the mean)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        kernel = int((math.log2(channels) + 1) / 2) // 2 * 2 + 1
        self.conv = nn.Conv1d(1, 1, kernel, padding=kernel // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W) → the same shape."""
        z = self.conv(x.mean((2, 3)).unsqueeze(1)).squeeze(1)
        return x * torch.sigmoid(z)[:, :, None, None]


class _ContextMLP(nn.Module):
    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, hidden, 1)
        self.norm = nn.LayerNorm(hidden)
        self.fc2 = nn.Conv2d(hidden, channels, 1)

    def forward(self, s: Tensor) -> Tensor:
        made: Tensor = self.fc2(F.relu(self.norm(self.fc1(s).flatten(1))[:, :, None, None]))
        return made


class GC(nn.Module):
    """arXiv:1904.11492, eq. 5: x + W₂ relu(LN(W₁ Σ_j softmax_j(w x_j) x_j))."""

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        self.conv_attn = nn.Conv2d(channels, 1, 1)
        self.mlp_add = _ContextMLP(channels, channels // reduction)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W) → the same shape."""
        weights = torch.softmax(self.conv_attn(x).flatten(2), 2)  # (B, 1, N)
        context = x.flatten(2) @ weights.transpose(1, 2)  # (B, C, 1)
        made: Tensor = x + self.mlp_add(context.unsqueeze(3))
        return made


class Coordinate(nn.Module):
    """arXiv:2103.02907, eq. 4-9: x · σ(F_h f_h) · σ(F_w f_w)."""

    def __init__(self, channels: int, reduction: int = 32) -> None:
        super().__init__()
        hidden = max(8, channels // reduction)
        self.conv1 = nn.Conv2d(channels, hidden, 1)
        self.norm = nn.BatchNorm2d(hidden)
        self.excite = nn.ModuleList(nn.Conv2d(hidden, channels, 1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W) → the same shape."""
        height, width = x.shape[2:]
        strips = torch.cat([x.mean(3, keepdim=True), x.mean(2, keepdim=True).transpose(2, 3)], 2)
        f_h, f_w = F.hardswish(self.norm(self.conv1(strips))).split([height, width], 2)
        gate_h = torch.sigmoid(self.excite[0](f_h))
        gate_w = torch.sigmoid(self.excite[1](f_w.transpose(2, 3)))
        return x * gate_h * gate_w


class SCSE(nn.Module):
    """arXiv:1803.02579, section 2: the map scaled per channel plus the map scaled per position."""

    def __init__(self, channels: int, reduction: int = 2) -> None:
        super().__init__()
        self.channel = SE(channels, reduction)
        self.spatial = nn.Conv2d(channels, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W) → the same shape."""
        made: Tensor = self.channel(x) + x * torch.sigmoid(self.spatial(x))
        return made


class NonLocal(nn.Module):
    """arXiv:1711.07971, eq. 1 and 6: x + BN(W y), y = f(θ, φ) g, by the matrix of all pairs.

    The concatenation form's w·[θ_i; φ_j] is summed as a_i + b_j: the pairs themselves would take gigabytes.
    """

    def __init__(self, channels: int, mode: str = "embedded_gaussian") -> None:
        super().__init__()
        width = channels // 2
        self.mode = mode
        self.theta, self.phi, self.g = (nn.Conv2d(channels, width, 1) for _ in range(3))
        self.concat = nn.Linear(2 * width, 1, bias=False) if mode == "concatenation" else None
        self.out = nn.Conv2d(width, channels, 1)
        self.norm = nn.BatchNorm2d(channels)

    def pairs(self, theta: Tensor, phi: Tensor) -> Tensor:
        """θ: (B, N, d), φ: (B, d, N) → f / C(x): (B, N, N)."""
        if self.mode == "embedded_gaussian":
            return torch.softmax(theta @ phi, 2)
        if self.mode == "dot_product":
            return (theta @ phi) / phi.shape[2]
        assert self.concat is not None
        first, second = self.concat.weight.chunk(2, 1)
        return F.relu(theta @ first.T + (second @ phi)) / phi.shape[2]

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W) → the same shape."""
        theta, phi, g = (layer(x).flatten(2) for layer in (self.theta, self.phi, self.g))
        y = self.pairs(theta.transpose(1, 2), phi) @ g.transpose(1, 2)
        made: Tensor = x + self.norm(self.out(y.transpose(1, 2).unflatten(2, x.shape[2:])))
        return made


class PAM(nn.Module):
    """arXiv:1809.02983, eq. 1-2: x + γ Σ_j softmax_j(B_iᵀ C_j) D_j, by the matrix of all pairs."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.query = nn.Conv2d(channels, channels // 8, 1)
        self.key = nn.Conv2d(channels, channels // 8, 1)
        self.value = nn.Conv2d(channels, channels, 1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W) → the same shape."""
        query, key, value = (layer(x).flatten(2) for layer in (self.query, self.key, self.value))
        attention = torch.softmax(query.transpose(1, 2) @ key, 2)
        y = value @ attention.transpose(1, 2)
        made: Tensor = x + self.gamma * y.unflatten(2, x.shape[2:])
        return made


class CAM(nn.Module):
    """arXiv:1809.02983, eq. 3-4, with the released code's softmax(max E − E): x + γ Σ_j w_ij x_j."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W) → the same shape."""
        flat = x.flatten(2)
        energy = flat @ flat.transpose(1, 2)
        attention = torch.softmax(energy.amax(2, keepdim=True) - energy, 2)
        made: Tensor = x + self.gamma * (attention @ flat).unflatten(2, x.shape[2:])
        return made


# --- timm's and mmcv's modules ------------------------------------------------------------------


def _timm_se(channels: int) -> nn.Module:
    from timm.layers import SEModule

    return SEModule(channels, rd_ratio=1 / 16, rd_divisor=1)


def _timm_channel(channels: int) -> nn.Module:
    from timm.layers.cbam import ChannelAttn

    return ChannelAttn(channels, rd_ratio=1 / 16, mlp_bias=True)


def _timm_spatial(channels: int) -> nn.Module:
    from timm.layers.cbam import SpatialAttn

    return SpatialAttn()


def _timm_cbam(channels: int) -> nn.Module:
    from timm.layers.cbam import CbamModule

    return CbamModule(channels, rd_ratio=1 / 16, mlp_bias=True)


def _timm_eca(channels: int) -> nn.Module:
    from timm.layers import EcaModule

    return EcaModule(channels)


def _timm_gc(channels: int) -> nn.Module:
    from timm.layers import GlobalContext

    return GlobalContext(channels, fuse_add=True, fuse_scale=False, rd_ratio=1 / 16)


def _timm_coord(channels: int) -> nn.Module:
    from timm.layers.coord_attn import CoordAttn

    return CoordAttn(channels, rd_channels=max(8, channels // 32), bias=True)


def _timm_nonlocal(channels: int) -> nn.Module:
    from timm.layers import NonLocalAttn

    return NonLocalAttn(channels, use_scale=False, rd_channels=channels // 2)


def _mmcv_gc(channels: int) -> nn.Module:
    from mmcv.cnn.bricks.context_block import ContextBlock

    made: nn.Module = ContextBlock(channels, ratio=1 / 16)
    return made


def _mmcv_nonlocal(mode: str) -> Callable[[int], nn.Module]:
    def build(channels: int) -> nn.Module:
        from mmcv.cnn.bricks.non_local import NonLocal2d

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made: nn.Module = NonLocal2d(channels, use_scale=False, norm_cfg={"type": "BN"}, mode=mode)
            return made

    return build


def _renamed(**prefixes: str) -> Callable[[State], State]:
    """Our keys under other prefixes; `a__b` stands for `a.b`."""
    table = {ours.replace("__", "."): theirs for ours, theirs in prefixes.items()}

    def rename(state: State) -> State:
        found = {}
        for key, value in state.items():
            start = max((p for p in table if key.startswith(p + ".")), key=len, default=None)
            found[key if start is None else table[start] + key[len(start) :]] = value
        return found

    return rename


def _mean_first(state: State) -> State:
    """timm's spatial half: [mean, max] where ours has [max, mean]; other names for convolution and norm."""
    swapped = {k: v.flip(1) if k.endswith("conv.weight") else v for k, v in state.items()}
    names = {"conv.": "conv.conv.", "norm.": "conv.bn."}
    found = {}
    for key, value in swapped.items():
        head, spatial, tail = key.rpartition("spatial.")
        mine = next((old for old in names if tail.startswith(old)), None)
        found[key if mine is None else head + spatial + names[mine] + tail[len(mine) :]] = value
    return found


def _of_mmcv_gc(state: State) -> State:
    """mmcv's layer norm is over (C, 1, 1)."""
    renamed = _renamed(
        conv_attn="conv_mask",
        mlp_add__fc1="channel_add_conv.0",
        mlp_add__norm="channel_add_conv.1",
        mlp_add__fc2="channel_add_conv.3",
    )(state)
    return {k: v[:, None, None] if k.startswith("channel_add_conv.1.") else v for k, v in renamed.items()}


def _of_mmcv_nonlocal(state: State) -> State:
    """mmcv has no bias in front of the norm, which would take it away again in train mode."""
    renamed = _renamed(
        theta="theta.conv", phi="phi.conv", g="g.conv", out="conv_out.conv", norm="conv_out.bn"
    )(state)
    return {k: v for k, v in renamed.items() if k != "conv_out.conv.bias"}


# --- the table ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Peer:
    """Somebody else's form of a block: how to build it for some channels, and our weights in its words."""

    build: Callable[[int], nn.Module]
    weights: Callable[[State], State] = dict

    def made(self, channels: int, ours: nn.Module) -> nn.Module:
        """Built, with the weights of our block; every key must fit."""
        module = self.build(channels)
        module.load_state_dict(self.weights(ours.state_dict()))
        return module


@dataclass(frozen=True)
class Subject:
    """A block that is measured.

    `floor`: how often the map must at least be read or written, forward and backward together; None where
    arithmetic bounds the block, not memory. `pairwise`: its cost is quadratic in the positions.
    """

    block: str
    args: Mapping[str, Any]
    peers: Mapping[str, Peer]
    floor: int | None = None
    pairwise: bool = False


def _nonlocal(mode: str, **more: Peer) -> Subject:
    """mmcv's concatenation form is no peer: it divides a relu's output in place and so has no backward."""
    peers = {"formula": Peer(lambda channels: NonLocal(channels, mode)), **more}
    if mode != "concatenation":
        peers["mmcv"] = Peer(_mmcv_nonlocal(mode), _of_mmcv_nonlocal)
    return Subject("nonlocal", {"mode": mode}, peers, pairwise=True)


SUBJECTS: dict[str, Subject] = {
    "se": Subject("se", {}, {"formula": Peer(SE), "timm": Peer(_timm_se)}, 7),
    "channel_attention": Subject(
        "channel_attention", {}, {"formula": Peer(ChannelAttention), "timm": Peer(_timm_channel)}, 7
    ),
    "spatial_attention": Subject(
        "spatial_attention",
        {},
        {"formula": Peer(SpatialAttention), "timm": Peer(_timm_spatial, _mean_first)},
        7,
    ),
    "cbam": Subject("cbam", {}, {"formula": Peer(CBAM), "timm": Peer(_timm_cbam, _mean_first)}, 10),
    "bam": Subject("bam", {}, {"formula": Peer(BAM)}, 8),
    "eca": Subject("eca", {}, {"formula": Peer(ECA), "timm": Peer(_timm_eca)}, 7),
    "gc": Subject(
        "gc",
        {},
        {
            "formula": Peer(GC),
            "timm": Peer(_timm_gc),
            "mmcv": Peer(_mmcv_gc, _of_mmcv_gc),
        },
        7,
    ),
    "coord": Subject(
        "coord",
        {},
        {
            "formula": Peer(Coordinate),
            "timm": Peer(_timm_coord, _renamed(norm="bn1", excite__0="conv_h", excite__1="conv_w")),
        },
        7,
    ),
    "scse": Subject("scse", {}, {"formula": Peer(SCSE)}, 7),
    "nonlocal": _nonlocal(
        "embedded_gaussian", timm=Peer(_timm_nonlocal, _renamed(theta="t", phi="p", out="z"))
    ),
    "nonlocal dot product": _nonlocal("dot_product"),
    "nonlocal concatenation": _nonlocal("concatenation"),
    "danet_pam": Subject("danet_pam", {}, {"formula": Peer(PAM)}, pairwise=True),
    "danet_cam": Subject("danet_cam", {}, {"formula": Peer(CAM)}),
}
"""Row of the tables → what is measured."""
