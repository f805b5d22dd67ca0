"""How far the gates have moved from 1: a block that has not moved was not tried, whatever its accuracy says."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from attninject import api
from attninject.attention import attention_maps
from attninject.wording import listed

PREFIX = "moved."
"""In front of a block's name: the column of the log."""

IMAGES = 32
"""Validation images that are looked at, spread over the batches."""

CHUNK = 4
"""Images at a time: blocks that relate all positions to all have large maps."""

LITTLE = 0.05
"""Mean |gate − 1| below which a block has hardly moved: switching such blocks off changed accuracy by less than a
tenth of a point (CBAM in resnet10t on the digits, 8 epochs)."""

_GATES = {"gate", "channel", "spatial", "height", "width", "depth", "length"}
_BESIDE = {"fine", "weights", "shift"}  # what a gated block may tell besides


class Sample:
    """A few images of each batch that passes by, for `movement` afterwards."""

    def __init__(self, batches: int) -> None:
        self.each = max(1, IMAGES // max(batches, 1))
        self.kept: list[Tensor] = []

    def of(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The batches as they are; labels below 0 are padding."""
        for batch in batches:
            x, y = batch[0], batch[1]
            if len(self.kept) * self.each < IMAGES:
                counts = (y.view(len(y), -1)[:, 0] >= 0).nonzero()[:, 0]  # y: (B,) or (B, classes)
                some = x[counts[: self.each]]  # by number: a slice would keep its whole batch alive
                self.kept.append(some)
            yield batch

    def chunks(self) -> Iterator[Tensor]:
        """The images, a few at a time."""
        images = torch.cat(self.kept) if self.kept else torch.empty(0)
        yield from images.split(CHUNK) if len(images) else ()


def movement(model: nn.Module, images: Iterable[Tensor]) -> dict[str, float]:
    """How the gates of each injected block stand over the images: columns `moved.<block>`, and their spread.

    `moved` is mean |gate − 1|. Of a blended block, x + α(f(x) − x), the factor that acts is 1 + α(gate − 1):
    |α| · |gate − 1|; where its f has no gate, |α|. Blocks without a gate or α (Non-Local's rows say nothing of how
    much is added) have none. `gates.<block>.mean`, `.sd`, `.min` and `.max` are over images, positions and channels.

    Args:
        model: whole, with injected blocks or without.
        images: batches (B, C, H, W), of any device.
    """
    blocks = api.injected(model)
    if not blocks:
        return {}
    device = next(model.parameters()).device
    found: dict[str, list[float]] = {}
    seen: dict[str, list[Tensor]] = {}
    for x in images:
        for name, maps in attention_maps(model, x.to(device)).items():
            moved = _moved(blocks[name], maps)
            if moved is not None:
                found.setdefault(PREFIX + name, []).extend([moved] * len(x))
            seen.setdefault(name, []).extend(_sums(gate.cpu().double()) for gate in _gates(maps))
    spread = {f"gates.{n}.{k}": v for n, sums in seen.items() if sums for k, v in _spread(sums).items()}
    return {column: sum(values) / len(values) for column, values in found.items()} | spread


def _sums(gate: Tensor) -> Tensor:
    """Count, sum, sum of squares, least and greatest."""
    count = torch.full((), gate.numel(), dtype=gate.dtype)
    return torch.stack([count, gate.sum(), (gate * gate).sum(), gate.min(), gate.max()])


def _spread(sums: Sequence[Tensor]) -> dict[str, float]:
    of = torch.stack(list(sums))
    count, total, squares = of[:, :3].sum(0).tolist()
    sd = max(squares / count - (total / count) ** 2, 0.0) ** 0.5
    return {"mean": total / count, "sd": sd, "min": float(of[:, 3].min()), "max": float(of[:, 4].max())}


def _moved(block: nn.Module, maps: Mapping[str, Tensor]) -> float | None:
    gates = _gates(maps)
    alpha = getattr(block, "alpha", None)
    share = float(alpha.detach().abs().mean()) if isinstance(alpha, Tensor) else None
    if not gates:
        return share
    distance = sum(float((gate.float() - 1).abs().mean()) for gate in gates) / len(gates)
    return distance if share is None else share * distance


def _gates(maps: Mapping[str, Tensor]) -> list[Tensor]:
    """The maps that multiply; none where there are rows, of which DANet calls one `channel`."""
    kinds = {name: re.sub(r"_\d+$", "", name) for name in maps}
    if not set(kinds.values()) <= _GATES | _BESIDE:
        return []
    return [maps[name] for name, kind in kinds.items() if kind in _GATES]


def warning(model: nn.Module, row: Mapping[str, Any]) -> str | None:
    """The sentence on blocks that could learn and have hardly moved by the last row of a log."""
    learning = {n for n, b in api.injected(model).items() if any(p.requires_grad for p in b.parameters())}
    moved = {k.removeprefix(PREFIX): v for k, v in row.items() if k.startswith(PREFIX)}
    still = [name for name, value in moved.items() if name in learning and value < LITTLE]
    if not still:
        return None
    return (
        f"gates that hardly moved: {len(still)} of {len(moved)} blocks are within {LITTLE:g} of 1 on average "
        f"({listed(still, 5)}); what this run shows says little of them: raise `attn_lr`, or train longer"
    )
