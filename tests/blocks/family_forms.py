"""What the tests know of convolutions in another form: dynamic, deformable, of selective kernels, split, involution."""

from __future__ import annotations

import math
from typing import Any

import torch
from formula_parts import CONV, Weights, batch_norm, column, conv, descriptor, flat, linear
from torch import Tensor

VARIANTS: dict[str, list[dict[str, Any]]] = {
    "dynamic_conv": [
        {"kernels": 2, "reduction": 0.5, "temperature": 1, "groups": 4, "bias": True},
        {"kernels": 3, "kernel_size": 1, "divisor": 8},
    ],
    "deformable_conv": [
        {"offset_groups": 2, "groups": 4, "bias": True},
        {"kernel_size": 1, "offset_groups": 4},
    ],
    "selective_kernel": [
        {"branches": [[1, 1], [5, 1]], "norm": False, "reduction": 2, "min_width": 4, "branch_groups": 4},
        {"groups": 8, "bias": True, "kernel_size": 5, "divisor": 8},
    ],
    "splat": [{"radix": 4, "groups": 2, "bias": True, "kernel_size": 1, "min_width": 3, "reduction": 2}],
    "involution": [{"kernel_size": 3, "group_channels": 4, "reduction": 2, "softmax": True}],
}

UNSCRIPTED = set(VARIANTS)
NO_LOGITS = {"involution"}
DEAD = {"splat": lambda args: {"new.fc1.bias"}}  # in front of a batch norm
REFUSES = {"splat": {1, 3, 7}}
SLOW_EXPORT = {"involution", "splat"}


def residual(x: Tensor, y: Tensor, w: Weights) -> Tensor:
    """x + α(y − x) where the block blends, else y."""
    return x + w["alpha"] * (y - x) if "alpha" in w else y


def plain(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int = 1) -> Tensor:
    """Size-keeping convolution; the weight's shape says how many groups there are."""
    padding = dilation * (weight.shape[-1] // 2)
    groups = x.shape[1] // weight.shape[1]
    return CONV[x.ndim](x, weight, bias, padding=padding, dilation=dilation, groups=groups)


def dynamic_conv(x: Tensor, w: Weights, a: dict[str, Any], identity: bool, train: bool) -> Tensor:
    """Each sample by itself, with the kernel that it mixes."""
    e = torch.exp(
        linear(linear(descriptor(x, "avg"), w, "new.fc1").clamp(min=0), w, "new.fc2")
        / a.get("temperature", 30)
    )
    shares = e / e.sum(1, keepdim=True)
    kernels = [w["conv.weight"], *w["new.weight"].split(x.shape[1])]
    biases = [w["conv.bias"], *w["new.bias"].split(x.shape[1])] if "conv.bias" in w else None
    made = []
    for sample, share in zip(x, shares, strict=True):
        weight = sum(s * k for s, k in zip(share, kernels, strict=True))
        bias = None if biases is None else sum(s * b for s, b in zip(share, biases, strict=True))
        made.append(plain(sample.unsqueeze(0), weight, bias))
    return residual(x, torch.cat(made), w)


def sampled(x: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """x: (B, C, H, W) at fractional positions (B, H, W) → (B, C, H, W), between four neighbours, 0 outside."""
    height, width = x.shape[2:]
    top, left = down.floor(), right.floor()
    total = torch.zeros_like(x)
    for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
        row, col = top + i, left + j
        share = (1 - (down - row).abs()) * (1 - (right - col).abs())
        inside = (row >= 0) & (row < height) & (col >= 0) & (col < width)
        at = (row.clamp(0, height - 1) * width + col.clamp(0, width - 1)).long().flatten(1)
        picked = x.flatten(2).gather(2, at.unsqueeze(1).expand(-1, x.shape[1], -1)).view_as(x)
        total = total + picked * (share * inside).unsqueeze(1)
    return total


def deformable_conv(x: Tensor, w: Weights, a: dict[str, Any], identity: bool, train: bool) -> Tensor:
    """DCN v2, eq. 1, point by point of the kernel."""
    size, parts = a.get("kernel_size", 3), a.get("offset_groups", 1)
    z = plain(x, w["new.offset.weight"], w["new.offset.bias"])
    points = size * size
    offsets = z[:, : 2 * points * parts].unflatten(1, (parts, points, 2))
    masks = 1 / (1 + torch.exp(-z[:, 2 * points * parts :].unflatten(1, (parts, points))))
    rows = torch.arange(x.shape[2], dtype=x.dtype).view(1, -1, 1)
    cols = torch.arange(x.shape[3], dtype=x.dtype).view(1, 1, -1)
    weight, bias = w["conv.weight"], w.get("conv.bias")
    y = 0 if bias is None else bias.view(1, -1, 1, 1)
    for k in range(points):
        i, j = k // size, k % size
        seen = [
            sampled(
                part, rows + i - size // 2 + offsets[:, g, k, 0], cols + j - size // 2 + offsets[:, g, k, 1]
            )
            * masks[:, g, k].unsqueeze(1)
            for g, part in enumerate(x.chunk(parts, 1))
        ]
        y = y + plain(torch.cat(seen, 1), weight[:, :, i : i + 1, j : j + 1], None)
    return residual(x, y, w)


def selective_kernel(x: Tensor, w: Weights, a: dict[str, Any], identity: bool, train: bool) -> Tensor:
    """SKNet, eq. 1-6, with a plain convolution as the first branch."""
    u = [plain(x, w["conv.weight"], w.get("conv.bias"))]
    for i, (_, dilation) in enumerate(a.get("branches", [[3, 2]])):
        y = plain(x, w[f"new.paths.{i}.weight"], None, dilation)
        u.append(batch_norm(y, w, f"new.norms.{i}", train) if a.get("norm", True) else y)
    s = descriptor(sum(u), "avg") @ flat(w["new.fc_reduce.weight"]).T
    z = batch_norm(s, w, "new.norm", train).clamp(min=0)
    e = [torch.exp(t) for t in (z @ flat(w["new.fc_select.weight"]).T).split(x.shape[1], 1)]
    y = sum(column(t / sum(e), x) * ui for t, ui in zip(e, u, strict=True))
    return residual(x, y, w)


def splat(x: Tensor, w: Weights, a: dict[str, Any], identity: bool, train: bool) -> Tensor:
    """ResNeSt, section 3.1, cardinal group by cardinal group; the old bias is the last split's."""
    radix, parts = a.get("radix", 2), []
    groups = a.get("groups", 1)
    bias = w.get("conv.bias")
    for i, (xs, ws) in enumerate(zip(x.chunk(groups, 1), w["conv.weight"].chunk(groups, 0), strict=True)):
        u = [plain(t, k, None) for t, k in zip(xs.chunk(radix, 1), ws.chunk(radix, 1), strict=True)]
        if bias is not None:
            u[-1] = u[-1] + column(bias.chunk(groups)[i].unsqueeze(0), x)
        parts.append(u)
    s = torch.cat([descriptor(sum(u), "avg") for u in parts], 1)
    z = batch_norm(grouped(s, w, "new.fc1", groups), w, "new.norm", train).clamp(min=0)
    made = []
    for u, logits in zip(parts, grouped(z, w, "new.fc2", groups).chunk(groups, 1), strict=True):
        e = [torch.exp(t) for t in logits.chunk(radix, 1)]
        made.append(sum(column(t / sum(e), x) * ui for t, ui in zip(e, u, strict=True)))
    return residual(x, torch.cat(made, 1), w)


def grouped(s: Tensor, w: Weights, key: str, groups: int) -> Tensor:
    """s: (B, C) → W s + b, W in blocks of its groups."""
    blocks = zip(s.chunk(groups, 1), flat(w[key + ".weight"]).chunk(groups, 0), strict=True)
    return torch.cat([t @ k.T for t, k in blocks], 1) + w[key + ".bias"]


def involution(x: Tensor, w: Weights, a: dict[str, Any], identity: bool, train: bool) -> Tensor:
    """Involution, eq. 4-6: every position's surroundings, unfolded by one-hot convolutions."""
    size, dims, channels = a.get("kernel_size", 7), x.ndim - 2, x.shape[1]
    z = batch_norm(conv(x, w, "new.reduce"), w, "new.norm", train).clamp(min=0)
    h = conv(z, w, "new.span").unflatten(
        1, (channels // min(channels, a.get("group_channels", 16)), size**dims)
    )
    if a.get("softmax"):
        h = torch.exp(h) / torch.exp(h).sum(2, keepdim=True)
    one_hot = torch.eye(size**dims, dtype=x.dtype).reshape(-1, 1, *[size] * dims)
    seen = CONV[x.ndim](x.reshape(-1, 1, *x.shape[2:]), one_hot, padding=size // 2)
    seen = seen.reshape(*x.shape[:2], size**dims, *x.shape[2:])
    y = (seen * h.repeat_interleave(channels // h.shape[1], 1)).sum(2)
    return residual(x, y, w)


def mixed(block: Any, x: Tensor, y: Tensor) -> Tensor:
    """With the block's α, where it has one."""
    return y if block.alpha is None else x + block.alpha * (y - x)


def apply_dynamic(block: Any, x: Tensor, a: dict[str, Tensor]) -> Tensor:
    """Every kernel's result, weighed."""
    kernels = [block.conv.weight, *block.new.weight.split(x.shape[1])]
    biases = (
        [None] * len(kernels)
        if block.conv.bias is None
        else [block.conv.bias, *block.new.bias.split(x.shape[1])]
    )
    made = [plain(x, k, b) for k, b in zip(kernels, biases, strict=True)]
    return mixed(block, x, sum(column(a["kernels"][:, i : i + 1], x) * y for i, y in enumerate(made)))


def apply_deformable(block: Any, x: Tensor, a: dict[str, Tensor]) -> Tensor:
    """The convolution where the offsets point to."""
    return mixed(
        block, x, block.new.deformed(x, a["offsets"], a["masks"], block.conv.weight, block.conv.bias)
    )


def apply_selective(block: Any, x: Tensor, a: dict[str, Tensor]) -> Tensor:
    """The branches' features, weighed."""
    u = torch.stack(block.new.features(x, block.conv(x)), 1)
    return mixed(block, x, (u * a["branches"]).sum(1))


def apply_splat(block: Any, x: Tensor, a: dict[str, Tensor]) -> Tensor:
    """The splits' results, weighed."""
    u = torch.stack(block.new.splits(x, None, block.conv.weight, block.conv.bias), 1)
    return mixed(block, x, (u * a["splits"]).sum(1))


def apply_involution(block: Any, x: Tensor, a: dict[str, Tensor]) -> Tensor:
    """What each point of the kernel sees, weighed."""
    seen, kernels = torch.stack(block.new.windows(x), 2), a["kernels"]
    return mixed(block, x, (seen * kernels.repeat_interleave(x.shape[1] // kernels.shape[1], 1)).sum(2))


FORMULAS = {
    "dynamic_conv": dynamic_conv, "deformable_conv": deformable_conv, "selective_kernel": selective_kernel,
    "splat": splat, "involution": involution,
}  # fmt: skip
APPLY = {
    "dynamic_conv": apply_dynamic, "deformable_conv": apply_deformable, "selective_kernel": apply_selective,
    "splat": apply_splat, "involution": apply_involution,
}  # fmt: skip
COUNTS = {
    "dynamic_conv": lambda c, d: 4 * 3**d * c * c + c * (c // 4) + c // 4 + 4 * (c // 4) + 4,
    "deformable_conv": lambda c, d: 9 * c * c + 27 * (9 * c + 1),
    "selective_kernel": lambda c, d: (
        3**d * c * c + 3**d * c * (c // 32) + 2 * c + (32 * c + 2 * 32) + 2 * 32 * c
    ),
    "splat": lambda c, d: (
        3**d * c * c + (c * max(c // 2, 32) + 3 * max(c // 2, 32)) + 2 * c * (max(c // 2, 32) + 1)
    ),
    "involution": lambda c, d: c * (c // 4) + 2 * (c // 4) + 7**d * (c // 16) * (c // 4 + 1),
}
MACS = {
    # the kernels are mixed by a matrix product, then convolve once
    "dynamic_conv": lambda c, *size: (
        3 ** len(size) * c * c * (math.prod(size) + 4) + c * (c // 4) + 4 * (c // 4)
    ),
    "deformable_conv": lambda c, *size: (9 * c * c + 27 * 9 * c) * math.prod(size),
    "selective_kernel": lambda c, *size: 3 ** len(size) * c * (c + c // 32) * math.prod(size) + 3 * 32 * c,
    # both splits together are the convolution
    "splat": lambda c, *size: 3 ** len(size) * c * c * math.prod(size) + 3 * c * max(c // 2, 32),
    "involution": lambda c, *size: (c + 7 ** len(size) * (c // 16)) * (c // 4) * math.prod(size),
}
