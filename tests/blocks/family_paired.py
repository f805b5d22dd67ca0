"""What the tests know of blocks of two inputs: here given their own input as the second (test_block_pairs: another)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from family_sequence import back, blended, dense, mixed, sequence, softmax
from formula_parts import Weights, batch_norm, conv, gate
from torch import Tensor

VARIANTS: dict[str, list[dict[str, Any]]] = {
    "attention_gate": [
        {"norm": True, "reduction": 4},
        {"divisor": 8, "gate": "tanh"},
    ],
    "cross_attention": [
        {"num_heads": 4, "scale": False, "bias": False},
        {"num_heads": 1, "residual": False},
    ],
}
REFUSES = {"cross_attention": {1, 3, 7}}
DEAD = {"cross_attention": lambda args: {"key.bias"}}  # it adds the same to every logit of a softmax row


def projected(x: Tensor, w: Weights, key: str, train: bool) -> Tensor:
    """A 1×1 convolution, and the batch norm behind it where there is one."""
    y = conv(x, w, key + ".conv")
    return batch_norm(y, w, key + ".norm", train) if key + ".norm.weight" in w else y


def gates(x: Tensor, s: Tensor, w: Weights, train: bool) -> Tensor:
    """Oktay et al., eq. 1, without its sigmoid; s: the signal, of the resolution of x."""
    z = (projected(x, w, "inputs", train) + s).clamp(min=0)
    return projected(z, w, "score", train)


def attention_gate(x: Tensor, w: Weights, a: dict[str, Any], identity: bool, train: bool) -> Tensor:
    """Oktay et al., eq. 1-2, gated by itself."""
    z = gates(x, projected(x, w, "signal", train), w, train)
    y = x * gate(z, a.get("gate", "sigmoid"), identity)
    return x + w["alpha"] * (y - x) if "alpha" in w else y


def attended(x: Tensor, other: Tensor, w: Weights, a: dict[str, Any]) -> Tensor:
    """Vaswani et al., section 3.2.3, head by head: (B, N, C)."""
    heads = a.get("num_heads", 8)
    width = x.shape[1] // heads
    q, k, v = (dense(sequence(t), w, key) for t, key in ((x, "query"), (other, "key"), (other, "value")))
    outputs = []
    for h in range(heads):
        part = slice(h * width, (h + 1) * width)
        logits = torch.einsum("bid,bjd->bij", q[..., part], k[..., part])
        outputs.append(softmax(logits / width**0.5 if a.get("scale", True) else logits) @ v[..., part])
    return dense(torch.cat(outputs, 2), w, "proj")


def cross_attention(x: Tensor, w: Weights, a: dict[str, Any], identity: bool, train: bool) -> Tensor:
    """Vaswani et al., section 3.2.3, to itself."""
    return blended(x, back(attended(x, x, w, a), x), a, w)


def apply_cross_attention(block: Any, x: Tensor, a: Mapping[str, Tensor]) -> Tensor:
    """From its rows."""
    return mixed(block, x, block.value(sequence(x)), a["rows"])


FORMULAS = {"attention_gate": attention_gate, "cross_attention": cross_attention}
APPLY = {"attention_gate": lambda block, x, a: x * a["gate"], "cross_attention": apply_cross_attention}

COUNTS = {
    "attention_gate": lambda c, d: c // 2 * (2 * c + 2) + 1,
    "cross_attention": lambda c, d: 4 * (c * c + c),
}
MACS = {
    "attention_gate": lambda c, *size: math.prod(size) * c // 2 * (2 * c + 1),
    "cross_attention": lambda c, *size: 4 * c * c * math.prod(size) + 2 * c * math.prod(size) ** 2,
}
