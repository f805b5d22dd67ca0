"""What the tests know of DANet's attentions and of SCA-CNN's."""

from __future__ import annotations

import math
from typing import Any

import torch
from family_sequence import softmax
from formula_parts import Weights, column, conv, descriptor, gate
from torch import Tensor

VARIANTS: dict[str, list[dict[str, Any]]] = {
    "danet_pam": [{"reduction": 2, "bias": False}],
    "danet_cam": [{"invert": False}],
    "danet": [{"reduction": 4, "invert": False}],
    "sca": [
        {"order": "spatial_first", "reduction": 2},
        {"gate": "sigmoid"},
        {"order": "spatial_first", "gate": "tanh"},
    ],
}
CONSTANT = {"danet_cam": {"identity", "paper", "blend"}}
PAPER_IS_IDENTITY = {"danet_pam", "danet_cam", "danet"}
DEAD = {
    # one number for all logits of a softmax: the keys' bias for a row, the score's bias for all
    "danet_pam": lambda args: {"key.bias"},
    "danet": lambda args: {"position.key.bias"},
    "sca": lambda args: (
        {"channel_score.bias", "spatial_score.bias"} if args.get("gate", "softmax") == "softmax" else set()
    ),
}
NO_LOGITS = {"sca", "sca-order=spatial_first-reduction=2"}  # its own softmax: test_block_global looks at it


def pam(x: Tensor, w: Weights, prefix: str = "") -> Tensor:
    """Fu et al., eq. 1-2, what is added to x."""
    b, c, d = (conv(x, w, prefix + key).flatten(2) for key in ("query", "key", "value"))
    weights = softmax(torch.einsum("bci,bcj->bij", b, c))
    return w[prefix + "gamma"] * torch.einsum("bij,bcj->bci", weights, d).reshape(x.shape)


def cam(x: Tensor, w: Weights, a: dict[str, Any], prefix: str = "") -> Tensor:
    """Fu et al., eq. 3-4, what is added to x; the released code's max − E."""
    flat = x.flatten(2)
    e = torch.einsum("bin,bjn->bij", flat, flat)
    if a.get("invert", True):
        e = e.max(2, keepdim=True).values - e
    return w[prefix + "gamma"] * torch.einsum("bij,bjn->bin", softmax(e), flat).reshape(x.shape)


def danet(x: Tensor, w: Weights, a: dict[str, Any], identity: bool, train: bool) -> Tensor:
    """Both, x added once."""
    return x + pam(x, w, "position.") + cam(x, w, a, "channel.")


def sca(
    x: Tensor, w: Weights, a: dict[str, Any], identity: bool, train: bool, h: Tensor | None = None
) -> Tensor:
    """Chen et al., eq. 4-7, h the state that is given, or the mean of the features."""
    kind = a.get("gate", "softmax")

    def factors(z: Tensor) -> Tensor:
        if kind != "softmax":
            return gate(z, kind, identity)
        return softmax(z.flatten(1)).reshape(z.shape) * (z[0].numel() if identity else 1)

    def channel(x: Tensor) -> Tensor:
        s = descriptor(x, "avg")
        hidden = s.unsqueeze(2) * w["channel_value.weight"][:, 0] + w["channel_value.bias"]
        hidden = torch.tanh(hidden + ((s if h is None else h) @ w["channel_context.weight"].T).unsqueeze(1))
        z = hidden @ w["channel_score.weight"][0] + w["channel_score.bias"]
        return x * factors(column(z, x))

    def spatial(x: Tensor) -> Tensor:
        context = (descriptor(x, "avg") if h is None else h) @ w["spatial_context.weight"].T
        hidden = torch.tanh(conv(x, w, "spatial_value") + column(context, x))
        return x * factors(conv(hidden, w, "spatial_score"))

    if a.get("order") == "spatial_first":
        return channel(spatial(x))
    return spatial(channel(x))


def apply_pam(block: Any, x: Tensor, rows: Tensor) -> Tensor:
    """What position attention adds, from its rows."""
    return block.gamma * (block.value(x).flatten(2) @ rows.transpose(1, 2)).reshape(x.shape)


def apply_cam(block: Any, x: Tensor, rows: Tensor) -> Tensor:
    """What channel attention adds, from its rows."""
    return block.gamma * (rows @ x.flatten(2)).reshape(x.shape)


FORMULAS = {
    "danet_pam": lambda x, w, a, identity, train: x + pam(x, w),
    "danet_cam": lambda x, w, a, identity, train: x + cam(x, w, a),
    "danet": danet,
    "sca": sca,
}
APPLY = {
    "danet_pam": lambda block, x, a: x + apply_pam(block, x, a["rows"]),
    "danet_cam": lambda block, x, a: x + apply_cam(block, x, a["rows"]),
    "danet": lambda block, x, a: (
        x + apply_pam(block.position, x, a["position"]) + apply_cam(block.channel, x, a["channel"])
    ),
    "sca": lambda block, x, a: x * a["channel"] * a["spatial"],
}


def pam_macs(c: int, *size: int) -> int:
    """Three layers, and twice N² at the values' width, to which queries and keys are filled up."""
    n = math.prod(size)
    return n * (2 * c * (c // 8) + c * c) + 2 * n * n * c


COUNTS = {
    "danet_pam": lambda c, d: 2 * (c * (c // 8) + c // 8) + c * c + c + 1,
    "danet_cam": lambda c, d: 1,
    "danet": lambda c, d: 2 * (c * (c // 8) + c // 8) + c * c + c + 2,
    # both values and contexts, both scores
    "sca": lambda c, d: 2 * (c // 4) + (c + 1) * (c // 4) + 2 * c * (c // 4) + 2 * (c // 4 + 1),
}
MACS = {
    "danet_pam": pam_macs,
    "danet_cam": lambda c, *size: 2 * c * c * math.prod(size),
    "danet": lambda c, *size: pam_macs(c, *size) + 2 * c * c * math.prod(size),
    # per channel one number to k and back, per position C to k and to one, and the two contexts
    "sca": lambda c, *size: 2 * c * (c // 4) + math.prod(size) * (c + 1) * (c // 4) + 2 * c * (c // 4),
}
