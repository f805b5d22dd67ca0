"""What the tests know of double attention, external attention and category attention."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from family_sequence import back, blended, finish
from formula_parts import Weights, batch_norm, conv
from torch import Tensor

VARIANTS: dict[str, list[dict[str, Any]]] = {
    "a2": [
        {"reduction": 8, "bias": False},
        {"reduction": 2, "residual": False},
    ],
    "external": [
        {"memory": 5, "norm": False},
        {"memory": 3, "residual": False},
    ],
    "category_attention": [{"classes": 3, "reduction": 4, "norm": False, "residual": False, "scale": False}],
}
SLOW_EXPORT = {"category_attention"}
JOINT_NORM = {"category_attention"}  # its classes are normalised together
DEAD = {
    # a bias in front of a softmax over positions shifts a whole row of logits; so does the query's bias,
    # which adds M_k b to every position
    "a2": lambda args: {"gather.bias"},
    "external": lambda args: {"query.bias"},
    "category_attention": lambda args: {"regions.bias"},
}


def exponentials(t: Tensor, axis: int) -> Tensor:
    """Positive, summing to 1 along the axis."""
    f = torch.exp(t - t.max(axis, keepdim=True).values)
    return f / f.sum(axis, keepdim=True)


def a2(x: Tensor, w: Weights, a: dict[str, Any], identity: bool, train: bool) -> Tensor:
    """Chen et al., eq. 3-6: gather, then distribute."""
    features, gather, distribute = (conv(x, w, k).flatten(2) for k in ("features", "gather", "distribute"))
    descriptors = torch.einsum("bmk,bnk->bmn", features, exponentials(gather, 2))
    z = torch.einsum("bmn,bni->bmi", descriptors, exponentials(distribute, 1))
    return blended(x, conv(z.reshape(x.shape[0], -1, *x.shape[2:]), w, "out"), a, w)


def external(x: Tensor, w: Weights, a: dict[str, Any], identity: bool, train: bool) -> Tensor:
    """Guo et al., eq. 5-9: softmax over positions, then division by the sum over slots."""
    z = torch.einsum("bcn,sc->bns", conv(x, w, "query").flatten(2), w["keys.weight"])
    z = exponentials(z, 1)
    z = z / z.sum(2, keepdim=True)
    y = conv(back(torch.einsum("bns,cs->bnc", z, w["values.weight"]), x), w, "out")
    return blended(x, batch_norm(y, w, "norm", train) if a.get("norm", True) else y, a, w)


def category(x: Tensor, w: Weights, a: dict[str, Any], identity: bool, train: bool) -> Tensor:
    """Yuan et al., section 3.2: class by class."""

    def transform(t: Tensor, key: str) -> Tensor:
        return batch_norm(conv(t, w, key + ".conv"), w, key + ".norm", train).clamp(min=0)

    regions = exponentials(conv(x, w, "regions").flatten(2), 2)
    f = torch.stack([(m.unsqueeze(1) * x.flatten(2)).sum(2) for m in regions.unbind(1)], 2)
    q, k, v = transform(x, "query").flatten(2), transform(f, "key"), transform(f, "value")
    likeness = torch.einsum("bdi,bdk->bik", q, k) / (q.shape[1] ** 0.5 if a.get("scale", True) else 1)
    y = torch.einsum("bik,bdk->bdi", exponentials(likeness, 2), v)
    y = conv(y.reshape(x.shape[0], -1, *x.shape[2:]), w, "out")
    return blended(x, batch_norm(y, w, "norm", train) if a.get("norm", True) else y, a, w)


def apply_a2(block: Any, x: Tensor, a: Mapping[str, Tensor]) -> Tensor:
    """Double attention from its two sets of weights."""
    features, gather, distribute = (t.flatten(2) for t in (block.features(x), a["gather"], a["distribute"]))
    z = features @ gather.transpose(1, 2) @ distribute
    return finish(block, x, block.out(z.reshape(x.shape[0], -1, *x.shape[2:])))


def apply_external(block: Any, x: Tensor, a: Mapping[str, Tensor]) -> Tensor:
    """External attention from its rows."""
    y = block.out(back(block.values(a["rows"]), x))
    return finish(block, x, y if block.norm is None else block.norm(y))


def apply_category(block: Any, x: Tensor, a: Mapping[str, Tensor]) -> Tensor:
    """Category attention from its regions and rows."""
    means = torch.einsum("bcn,bkn->bck", x.flatten(2), a["regions"].flatten(2))
    y = block.out(back_to(x, a["rows"] @ block.value(means).transpose(1, 2)))
    return finish(block, x, y if block.norm is None else block.norm(y))


def back_to(x: Tensor, t: Tensor) -> Tensor:
    """(B, N, d) → (B, d, *S), the positions of x."""
    return t.transpose(1, 2).reshape(x.shape[0], -1, *x.shape[2:])


FORMULAS = {"a2": a2, "external": external, "category_attention": category}
APPLY = {"a2": apply_a2, "external": apply_external, "category_attention": apply_category}

COUNTS = {
    "a2": lambda c, d: 3 * (c * (c // 4) + c // 4) + c // 4 * c + c,
    "external": lambda c, d: (c * c + c) + 2 * 64 * c + c * c + 2 * c,
    "category_attention": lambda c, d: 19 * (c + 1) + 3 * (c * (c // 2) + 2 * (c // 2)) + c // 2 * c + 2 * c,
}
MACS = {
    # both products with the descriptors are as wide as the layers
    "a2": lambda c, *size: math.prod(size) * (4 * c * (c // 4) + 2 * (c // 4) ** 2),
    "external": lambda c, *size: math.prod(size) * (2 * c * c + 2 * 64 * c),
    # regions and means, then rows and their mixture; two layers see the classes only
    "category_attention": lambda c, *size: (
        math.prod(size) * (2 * 19 * c + 2 * 19 * (c // 2) + 2 * c * (c // 2)) + 2 * 19 * c * (c // 2)
    ),
}
