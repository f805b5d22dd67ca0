"""Reference formulas, in float64, of ECA, GCT, SRM, GC and GE."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from formula_parts import CONV, Weights, batch_norm, column, conv, descriptor, gate, linear
from torch import Tensor

VARIANTS: dict[str, list[dict[str, Any]]] = {
    "eca": [{"kernel_size": 7, "gate": "hard_sigmoid"}, {"gamma": 1, "beta": 2, "gate": "tanh"}],
    "gct": [{"mode": "l1"}, {"mode": "l2", "eps": 0.5}],
    "srm": [{"gate": "hard_sigmoid"}],
    "gc": [
        {"reduction": 4},
        {"fusion": "multiply", "reduction": 4},
        {"fusion": "both", "pool": "avg", "reduction": 2, "gate": "tanh"},
    ],
    "ge": [
        {"mode": "theta_minus", "extent": 2},
        {"mode": "theta_minus", "extent": 0},
        {"mode": "theta", "extent": 2, "gate": "tanh"},
        {"mode": "theta_plus", "extent": 4, "reduction": 4},
    ],
}
PAPER_IS_IDENTITY = {"gct", "gc"}
# with one hidden channel (16 channels, reduction 16) LayerNorm has one value, so W1 learns nothing; the test
# of gradients has 64 channels; w's bias shifts every logit of the one softmax row alike
DEAD = {"gc": lambda args: {"conv_attn.bias"}}
CONSTANT = {"eca": {"identity"}, "gct": {"identity", "paper", "blend"}, "srm": {"paper"}}


def eca(x: Tensor, w: Weights, a: dict[str, Any], identity: bool, train: bool) -> Tensor:
    """ECA, eq. 9: channel c sees its neighbours' means through one shared kernel; eq. 12 for its size."""
    s, kernel = descriptor(x, "avg"), w["conv.weight"].flatten()
    t = math.log2(s.shape[1]) / a.get("gamma", 2) + a.get("beta", 1) / a.get("gamma", 2)
    nearest = min(range(1, 99, 2), key=lambda odd: (abs(odd - t), -odd))
    assert len(kernel) == (a.get("kernel_size") or nearest)
    half, z = len(kernel) // 2, torch.zeros_like(s)
    for c in range(s.shape[1]):
        for i, weight in enumerate(kernel):
            if 0 <= c + i - half < s.shape[1]:
                z[:, c] = z[:, c] + weight * s[:, c + i - half]
    return x * column(gate(z, a.get("gate", "sigmoid"), identity), x)


def gct(x: Tensor, w: Weights, a: dict[str, Any], identity: bool, train: bool) -> Tensor:
    """GCT, eq. 2-4, with the released code's ε inside the mean."""
    rows, eps = x.flatten(2), a.get("eps", 1e-5)
    if a.get("mode", "l2") == "l2":
        s = w["weight"] * ((rows**2).sum(2) + eps) ** 0.5
        hat = s / ((s**2).sum(1, keepdim=True) / s.shape[1] + eps) ** 0.5
    else:
        s = w["weight"] * rows.abs().sum(2)
        hat = s / (s.abs().sum(1, keepdim=True) / s.shape[1] + eps)
    return x * column(1 + torch.tanh(w["gamma"] * hat + w["beta"]), x)


def srm(x: Tensor, w: Weights, a: dict[str, Any], identity: bool, train: bool) -> Tensor:
    """SRM, section 3."""
    rows = x.flatten(2)
    mean = rows.sum(2) / rows.shape[2]
    deviation = (((rows - mean.unsqueeze(2)) ** 2).sum(2) / rows.shape[2]) ** 0.5
    z = w["cfc"][:, 0] * mean + w["cfc"][:, 1] * deviation
    return x * column(gate(batch_norm(z, w, "norm", train), a.get("gate", "sigmoid"), identity), x)


def context_mlp(s: Tensor, w: Weights, key: str) -> Tensor:
    """W₂ relu(LN(W₁ s))."""
    h = linear(s, w, key + ".fc1")
    centred = h - h.mean(1, keepdim=True)
    h = centred / ((centred**2).mean(1, keepdim=True) + 1e-5) ** 0.5
    return linear((h * w[key + ".norm.weight"] + w[key + ".norm.bias"]).clamp(min=0), w, key + ".fc2")


def gc(x: Tensor, w: Weights, a: dict[str, Any], identity: bool, train: bool) -> Tensor:
    """GCNet, eq. 5, and its multiplying fusion."""
    rows = x.flatten(2)
    if a.get("pool", "att") == "att":
        logits = torch.einsum("bcn,c->bn", rows, w["conv_attn.weight"].flatten()) + w["conv_attn.bias"]
        weights = torch.exp(logits) / torch.exp(logits).sum(1, keepdim=True)
        s = torch.einsum("bcn,bn->bc", rows, weights)
    else:
        s = descriptor(x, "avg")
    y = x
    if a.get("fusion", "add") != "add":
        y = y * column(gate(context_mlp(s, w, "mlp_scale"), a.get("gate", "sigmoid"), identity), x)
    if a.get("fusion", "add") != "multiply":
        y = y + column(context_mlp(s, w, "mlp_add"), x)
    return y


def neighbourhood_means(x: Tensor, e: int, axis: int) -> Tensor:
    """Along one axis, the mean over the 2e - 1 positions around 0, e, 2e, … that exist."""
    n = x.shape[axis]
    windows = [x.narrow(axis, max(0, i - e + 1), min(n, i + e) - max(0, i - e + 1)) for i in range(0, n, e)]
    return torch.stack([t.sum(axis) / t.shape[axis] for t in windows], axis)


def ge(x: Tensor, w: Weights, a: dict[str, Any], identity: bool, train: bool) -> Tensor:
    """Gather-excite, eq. 1-2 with the gathers of section 3."""
    mode, extent, z = a.get("mode", "theta"), a.get("extent", 8), x
    if mode == "theta_minus":
        z = column(descriptor(x, "avg"), x) if extent == 0 else z
        for axis in range(2, x.ndim if extent else 2):
            z = neighbourhood_means(z, extent, axis)
    else:
        for i in range(1 if extent == 0 else int(math.log2(extent))):
            step = {} if extent == 0 else {"stride": 2, "padding": 1}
            z = CONV[x.ndim](z.clamp(min=0) if i else z, w[f"convs.{i}.weight"], groups=x.shape[1], **step)
            z = batch_norm(z, w, f"norms.{i}", train)
    if mode == "theta_plus":
        z = conv(conv(z, w, "fc1").clamp(min=0), w, "fc2")
    for axis in range(2, x.ndim):  # nearest neighbour: position i of n looks at ⌊i · m / n⌋ of m
        n, m = x.shape[axis], z.shape[axis]
        z = z.index_select(axis, torch.arange(n) * m // n)
    if "alpha" in w:  # no layer to zero: blended, with the published gate
        return x + w["alpha"] * (x * gate(z, a.get("gate", "sigmoid"), False) - x)
    return x * gate(z, a.get("gate", "sigmoid"), identity)


def apply_ge(block: Any, x: Tensor, a: Mapping[str, Tensor]) -> Tensor:
    """Gather-excite from its gate, blended where the block is."""
    y = x * a["gate"]
    return y if block.alpha is None else x + block.alpha * (y - x)


def apply_gc(block: Any, x: Tensor, a: Mapping[str, Tensor]) -> Tensor:
    """Global context from what it scales and shifts by; and its weights are those of the context."""
    if "weights" in a:
        s = (x * a["weights"]).flatten(2).sum(2)
        torch.testing.assert_close(column(s, x), block.context(x))
    return x * a.get("gate", 1) + a.get("shift", 0)


FORMULAS = {"eca": eca, "gct": gct, "srm": srm, "gc": gc, "ge": ge}
APPLY = {
    "eca": lambda block, x, a: x * a["gate"],
    "gct": lambda block, x, a: x * a["gate"],
    "srm": lambda block, x, a: x * a["gate"],
    "gc": apply_gc,
    "ge": apply_ge,
}


def eca_kernel(c: int) -> int:
    """Eq. 12: the odd number nearest to (log₂ C + 1) / 2, the larger of two."""
    return min(range(1, 99, 2), key=lambda odd: (abs(odd - (math.log2(c) + 1) / 2), -odd))


COUNTS = {
    "eca": lambda c, d: eca_kernel(c),
    "gct": lambda c, d: 3 * c,
    "srm": lambda c, d: 2 * c + 2 * c,
    "gc": lambda c, d: (c + 1) + (c * (c // 16) + c // 16) + 2 * (c // 16) + (c // 16 * c + c),
    "ge": lambda c, d: 3 * (3**d * c + 2 * c),
}
MACS = {
    "eca": lambda c, *size: c * eca_kernel(c),
    "gct": lambda c, *size: 0,
    "srm": lambda c, *size: 0,
    # the logits and the weighted mean, then the MLP on one position
    "gc": lambda c, *size: 2 * c * math.prod(size) + 2 * c * (c // 16),
    "ge": lambda c, *size: 3 ** len(size) * c * sum(math.prod(-(-n // e) for n in size) for e in (2, 4, 8)),
}
