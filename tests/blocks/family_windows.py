"""What the tests know of Twins' local and global attention."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from family_sequence import ODD, back, blended, dense, finish, sequence, softmax
from formula_parts import CONV, Weights
from torch import Tensor

from attninject.blocks.windows import partition

VARIANTS: dict[str, list[dict[str, Any]]] = {
    "twins_lsa": [
        {"window_size": 2, "num_heads": 4, "bias": False},
        {"window_size": 3, "num_heads": 1, "norm": False, "residual": False},
    ],
    "twins_gsa": [
        {"sr_ratio": 1, "num_heads": 4, "bias": False},
        {"sr_ratio": 2, "num_heads": 1, "norm": False, "residual": False},
    ],
    "twins": [
        {"window_size": 3, "sr_ratio": 2, "num_heads": 4, "norm": False},
        {"window_size": 2, "sr_ratio": 1, "residual": False},
    ],
}
SLOW_EXPORT = {"twins_lsa", "twins_gsa", "twins"}
REFUSES = dict.fromkeys(VARIANTS, ODD)
DEAD = dict.fromkeys(VARIANTS, lambda args: set())


def layer_norm(t: Tensor, w: Weights, key: str) -> Tensor:
    """(…, C): over the channels; nothing where there are no such weights."""
    if key + ".weight" not in w:
        return t
    mean, var = t.mean(-1, keepdim=True), t.var(-1, unbiased=False, keepdim=True)
    return (t - mean) / (var + 1e-5).sqrt() * w[key + ".weight"] + w[key + ".bias"]


def multi_head(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """q: (B, N, C), k and v: (B, M, C) → (B, N, C), head by head."""
    outputs = []
    for part in torch.arange(q.shape[2]).chunk(heads):
        logits = torch.einsum("bid,bjd->bij", q[..., part], k[..., part]) / len(part) ** 0.5
        outputs.append(softmax(logits) @ v[..., part])
    return torch.cat(outputs, 2)


def lsa(x: Tensor, w: Weights, a: dict[str, Any], identity: bool, train: bool) -> Tensor:
    """Twins, LSA: window by window over the positions that exist, no filling anywhere."""
    side, heads = a.get("window_size", 7), a.get("num_heads", 8)
    y = torch.zeros_like(x)
    for corner in itertools.product(*(range(0, n, side) for n in x.shape[2:])):
        place = (slice(None), slice(None), *(slice(c, c + side) for c in corner))
        t = layer_norm(sequence(x[place]), w, "pre_norm")
        q, k, v = dense(t, w, "qkv").split(x.shape[1], 2)
        y[place] = back(dense(multi_head(q, k, v, heads), w, "proj"), x[place])
    return blended(x, y, a, w)


def gsa(x: Tensor, w: Weights, a: dict[str, Any], identity: bool, train: bool) -> Tensor:
    """Twins, GSA: every position against the cells of a strided convolution."""
    side, heads = a.get("sr_ratio", 4), a.get("num_heads", 8)
    t = layer_norm(sequence(x), w, "pre_norm")
    coarse = t
    if side > 1:
        whole = F.pad(back(t, x), [p for n in reversed(x.shape[2:]) for p in (0, -n % side)])
        cells = CONV[x.ndim](whole, w["sr.weight"], w["sr.bias"], stride=side)
        coarse = layer_norm(sequence(cells), w, "norm")
    k, v = dense(coarse, w, "kv").split(x.shape[1], 2)
    y = dense(multi_head(dense(t, w, "q"), k, v, heads), w, "proj")
    return blended(x, back(y, x), a, w)


def under(w: Weights, prefix: str) -> dict[str, Tensor]:
    """A submodule's weights."""
    return {k.removeprefix(prefix): v for k, v in w.items() if k.startswith(prefix)}


def twins(x: Tensor, w: Weights, a: dict[str, Any], identity: bool, train: bool) -> Tensor:
    """Twins, eq. 4 without its MLPs."""
    y = lsa(x, under(w, "lsa."), a, identity, train)
    y = gsa(y, under(w, "gsa."), a, identity, train)
    return x + w["alpha"] * (y - x) if "alpha" in w else y


def apply_lsa(block: Any, x: Tensor, a: Mapping[str, Tensor]) -> Tensor:
    """LSA from its rows."""
    values = block.qkv(partition(block.channels_last(x), block.window_size)).chunk(3, 2)[2]
    return finish(block, x, block.mix(a["rows"].flatten(0, 1) @ block.heads(values), x))


def apply_gsa(block: Any, x: Tensor, a: Mapping[str, Tensor]) -> Tensor:
    """GSA from its rows."""
    _, _, v = block.match(x)
    return finish(block, x, back(block.proj((a["rows"] @ v).transpose(1, 2).flatten(2)), x))


def apply_twins(block: Any, x: Tensor, a: Mapping[str, Tensor]) -> Tensor:
    """The pair from both halves' rows."""
    y = apply_lsa(block.lsa, x, {"rows": a["local"]})
    y = apply_gsa(block.gsa, y, {"rows": a["global"]})
    return y if block.alpha is None else x + block.alpha * (y - x)


FORMULAS = {"twins_lsa": lsa, "twins_gsa": gsa, "twins": twins}
APPLY = {"twins_lsa": apply_lsa, "twins_gsa": apply_gsa, "twins": apply_twins}


def lsa_macs(c: int, *size: int) -> int:
    """All positions of the filled windows, each against the 7^d of its own."""
    n = math.prod(-(-side // 7) * 7 for side in size)
    return 4 * c * c * n + 2 * c * n * 7 ** len(size)


def gsa_macs(c: int, *size: int) -> int:
    """Queries and output at every position, keys and values at the cells, 4 positions a side."""
    n, cells = math.prod(size), math.prod(-(-side // 4) for side in size)
    return 2 * c * c * n + (4 ** len(size) + 2) * c * c * cells + 2 * c * n * cells


COUNTS = {
    "twins_lsa": lambda c, d: 4 * (c * c + c) + 2 * c,
    "twins_gsa": lambda c, d: 4 * (c * c + c) + (4**d * c * c + c) + 4 * c,
    "twins": lambda c, d: COUNTS["twins_lsa"](c, d) + COUNTS["twins_gsa"](c, d),
}
MACS = {
    "twins_lsa": lsa_macs,
    "twins_gsa": gsa_macs,
    "twins": lambda c, *size: lsa_macs(c, *size) + gsa_macs(c, *size),
}
