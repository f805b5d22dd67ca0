"""Dead gates: blocks that have had no gradient at all, which a log would not show."""

from __future__ import annotations

import torch
from torch import nn

from attninject import api
from attninject.wording import listed


class Watch:
    """Which blocks have had a gradient since the run began; free once all have."""

    def __init__(self) -> None:
        self.alive: set[str] = set()
        self.complete = False

    def look(self, model: nn.Module) -> None:
        """Note the gradients of a step, before they are cleared."""
        if self.complete:
            return
        blocks = api.injected(model)
        for name, block in blocks.items():
            if name not in self.alive and any(_has_gradient(p) for p in block.parameters()):
                self.alive.add(name)
        self.complete = len(self.alive) >= len(blocks)

    def share(self, processes: int) -> None:
        """Of a sharded block a process sees its own part of the gradient: put together what all saw."""
        if processes > 1:
            found: list[set[str]] = [set()] * processes
            torch.distributed.all_gather_object(found, self.alive)
            self.alive = set().union(*found)

    def warning(self, model: nn.Module) -> str | None:
        """The sentence on those that could learn and have had no gradient."""
        learning = [n for n, b in api.injected(model).items() if any(p.requires_grad for p in b.parameters())]
        dead = [name for name in learning if name not in self.alive]
        if not dead:
            return None
        return (
            f"dead gates: {len(dead)} of {len(learning)} blocks have had no gradient so far ({listed(dead, 5)}); "
            f"nothing reaches them, or their last layer and what stands before it are both zero "
            f"(as behind the zeroed last norms of a timm resnet with random weights)"
        )


def _has_gradient(parameter: nn.Parameter) -> bool:
    gradient = parameter.grad
    if gradient is None:
        return False
    own = gradient.to_local() if hasattr(gradient, "to_local") else gradient
    return bool(own.count_nonzero())
