"""What the tests know of self-attention, multi-head self-attention and generalised attention."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from formula_parts import Weights
from torch import Tensor

VARIANTS: dict[str, list[dict[str, Any]]] = {
    "self_attention": [
        {"reduction": 4, "scale": False},
        {"residual": False, "bias": False},
        {"score": "additive", "reduction": 4},
    ],
    "mhsa": [
        {"num_heads": 4, "scale": False, "bias": False},
        {"num_heads": 1, "residual": False},
    ],
    "generalized": [
        {"terms": "0010", "num_heads": 4},
        {"terms": "1000", "residual": False},
        {"terms": "0101", "frequencies": 3, "sub_sample": True},
        {"terms": "0011", "num_heads": 2, "sub_sample": True},
    ],
}
PAPER_IS_IDENTITY = {"generalized"}
ODD = {1, 3, 7}
REFUSES = {"mhsa": ODD, "generalized": ODD}
DEAD = {
    # the keys' bias adds the same to every logit of a softmax row
    "self_attention": lambda args: set() if args.get("score") == "additive" else {"key.bias"},
    "mhsa": lambda args: set(),
    "generalized": lambda args: set(),
}


def dense(t: Tensor, w: Weights, key: str) -> Tensor:
    """t: (…, C) → t Wᵀ + b."""
    y = t @ w[key + ".weight"].T
    return y + w[key + ".bias"] if key + ".bias" in w else y


def softmax(e: Tensor) -> Tensor:
    """Over the last axis, from exponentials."""
    f = torch.exp(e - e.max(-1, keepdim=True).values)
    return f / f.sum(-1, keepdim=True)


def sequence(x: Tensor) -> Tensor:
    """x: (B, C, *S) → (B, N, C)."""
    return x.reshape(*x.shape[:2], -1).transpose(1, 2)


def back(t: Tensor, x: Tensor) -> Tensor:
    """(B, N, C) → the shape of x."""
    return t.transpose(1, 2).reshape(x.shape)


def with_residual(x: Tensor, y: Tensor, a: dict[str, Any]) -> Tensor:
    """x + y, or y alone."""
    return x + y if a.get("residual", True) else y


def blended(x: Tensor, y: Tensor, a: dict[str, Any], w: Weights) -> Tensor:
    """The same with the blend that identity means without a residual."""
    y = with_residual(x, y, a)
    return x + w["alpha"] * (y - x) if "alpha" in w else y


def self_attention(x: Tensor, w: Weights, a: dict[str, Any], identity: bool, train: bool) -> Tensor:
    """Vaswani et al., eq. 1, or with the scores of Bahdanau et al., appendix A.1.2."""
    q, k, v = (dense(sequence(x), w, key) for key in ("query", "key", "value"))
    logits = torch.einsum("bid,bjd->bij", q, k)
    if a.get("score") == "additive":
        e = torch.exp(2 * (q.unsqueeze(2) + k.unsqueeze(1)))
        logits = torch.einsum("bijd,d->bij", (e - 1) / (e + 1), w["score.weight"][0])
    elif a.get("scale", True):
        logits = logits / q.shape[2] ** 0.5
    return blended(x, back(softmax(logits) @ v, x), a, w)


def mhsa(x: Tensor, w: Weights, a: dict[str, Any], identity: bool, train: bool) -> Tensor:
    """Vaswani et al., section 3.2.2: head by head, concatenated, mixed."""
    heads = a.get("num_heads", 8)
    width = x.shape[1] // heads
    q, k, v = dense(sequence(x), w, "qkv").split(x.shape[1], 2)
    outputs = []
    for h in range(heads):
        part = slice(h * width, (h + 1) * width)
        logits = torch.einsum("bid,bjd->bij", q[..., part], k[..., part])
        outputs.append(softmax(logits / width**0.5 if a.get("scale", True) else logits) @ v[..., part])
    return blended(x, back(dense(torch.cat(outputs, 2), w, "proj"), x), a, w)


def relative(shape: tuple[int, ...], strides: tuple[int, ...], count: int) -> Tensor:
    """r_{k−q}: (N, M, 2 · count · dims), of every query and every key, the keys `strides` apart."""
    places = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float64) for n in shape)).reshape(
        -1, len(shape)
    )
    kept = [
        i for i, p in enumerate(places.tolist()) if all(c % s == 0 for c, s in zip(p, strides, strict=True))
    ]
    delta = places[kept].unsqueeze(0) - places.unsqueeze(1)
    columns = []
    for axis in range(len(shape)):
        for wave in (torch.sin, torch.cos):
            columns += [wave(delta[..., axis] / 1000 ** (t / count)) for t in range(count)]
    return torch.stack(columns, 2)


def generalized(x: Tensor, w: Weights, a: dict[str, Any], identity: bool, train: bool) -> Tensor:
    """Zhu et al., eq. 1 and the four terms, each as an N×M matrix of its own."""
    heads, terms, dims = a.get("num_heads", 8), a.get("terms", "1111"), x.ndim - 2
    width, strides = x.shape[1] // heads, (1,) * dims
    s = x
    if a.get("sub_sample"):
        strides = {1: (2,), 2: (2, 2), 3: (1, 2, 2)}[dims]
        s = x[(slice(None), slice(None), *(slice(None, None, n) for n in strides))]
    z, c = sequence(x), s.reshape(*s.shape[:2], -1).transpose(1, 2)
    r = relative(tuple(x.shape[2:]), strides, a.get("frequencies", 16)).to(x.dtype)
    outputs = []
    for h in range(heads):
        part = slice(h * width, (h + 1) * width)
        energy = torch.zeros(z.shape[0], z.shape[1], c.shape[1], dtype=x.dtype)
        if terms[0] == "1":
            q, k = z @ w["query.weight"][part].T, c @ w["key.weight"][part].T
            energy = energy + torch.einsum("bid,bjd->bij", q, k)
        if terms[1] == "1":
            q, p = z @ w["query.weight"][part].T, r @ w["position.weight"][part].T
            energy = energy + torch.einsum("bid,ijd->bij", q, p)
        if terms[2] == "1":
            energy = energy + (c @ w["key.weight"][part].T @ w["key_bias"][h, 0]).unsqueeze(1)
        if terms[3] == "1":
            energy = energy + r @ w["position.weight"][part].T @ w["position_bias"][h, 0]
        outputs.append(softmax(energy) @ (c @ w["value.weight"][part].T))
    return blended(x, back(dense(torch.cat(outputs, 2), w, "proj"), x), a, w)


def mixed(block: Any, x: Tensor, values: Tensor, rows: Tensor) -> Tensor:
    """Heads' rows (B, h, N, M) and values (B, M, C) → the output of a block with an output layer."""
    v = values.reshape(*values.shape[:2], rows.shape[1], -1).transpose(1, 2)
    y = block.proj((rows @ v).transpose(1, 2).reshape(x.shape[0], rows.shape[2], -1))
    return finish(block, x, back(y.expand(-1, x[0, 0].numel(), -1), x))


def finish(block: Any, x: Tensor, y: Tensor) -> Tensor:
    """Residual or not, blended or not."""
    y = with_residual(x, y, block.args)
    return y if block.alpha is None else x + block.alpha * (y - x)


def apply_generalized(block: Any, x: Tensor, a: Mapping[str, Tensor]) -> Tensor:
    """Generalised attention from its rows."""
    s = x[..., ::2, ::2] if block.sub_sample else x
    return mixed(block, x, block.value(s.flatten(2).transpose(1, 2)), a["rows"])


FORMULAS = {"self_attention": self_attention, "mhsa": mhsa, "generalized": generalized}
APPLY = {
    "self_attention": lambda block, x, a: finish(block, x, back(a["rows"] @ block.value(sequence(x)), x)),
    "mhsa": lambda block, x, a: mixed(block, x, block.qkv(sequence(x)).chunk(3, 2)[2], a["rows"]),
    "generalized": apply_generalized,
}

COUNTS = {
    "self_attention": lambda c, d: 3 * (c * c + c),
    "mhsa": lambda c, d: 4 * (c * c + c),
    "generalized": lambda c, d: 4 * c * c + c + 2 * 16 * d * c + 2 * c,
}
MACS = {
    "self_attention": lambda c, *size: 3 * c * c * math.prod(size) + 2 * c * math.prod(size) ** 2,
    "mhsa": lambda c, *size: 4 * c * c * math.prod(size) + 2 * c * math.prod(size) ** 2,
    # the queries through P as well; each of 8 heads compares C / 8 numbers and 32 sines and cosines per axis
    "generalized": lambda c, *size: (
        math.prod(size) * (4 * c * c + 32 * len(size) * c)
        + 2 * math.prod(size) ** 2 * (c + 8 * 32 * len(size))
    ),
}
