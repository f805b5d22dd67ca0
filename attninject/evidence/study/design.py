"""What is trained: tasks, nets, blocks, seeds and budgets, as `PROTOCOL.md` fixes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

TASKS = ("digits_on_photos", "letters", "stamps", "corruptions", "rotations")
NEW_TASKS = ("numerals", "typefaces", "counts", "channels")
"""Of the second part, on which nothing was chosen."""
SEEDS = (0, 1, 2, 3, 4)
"""Split, images, order, head and blocks' init vary together with the seed."""

SIZE = 64
TRAIN, VALIDATION, TEST = 256, 96, 256
BATCH, EPOCHS = 16, 5
HEAD_LR = 1e-3
BACKBONE_LR = 1e-4
"""Of all layers of the net where they learn too."""
ATTN_LRS = (1e-3, 3e-3, 1e-2)
TUNING_SEEDS = (0, 1, 2)

SHARE = 0.25
"""Of the parameters of blocks at all sites: the budget of what is chosen."""
RANDOM_DRAWS = 4
"""Random sets per seed, within the budget."""
PERMUTATIONS = 10
"""Of the training labels, per task: what p-values are where labels mean nothing."""
CANDIDATES: Mapping[str, Mapping[str, Any]] = {"vit": {"place": "residual_branch", "exclude": "blocks.5.*"}}
"""Net → fields of the rule of all candidates, else `block_end`: behind every unit, sites differ in depth and width
most. The ViT has six units alone, but twelve branches; behind those of the last no patch is read."""


@dataclass(frozen=True)
class Group:
    """One task on one net with one block in one regime: the runs in it are compared with one another."""

    task: str
    net: str
    block: str
    regime: str = "frozen"

    @property
    def key(self) -> tuple[str, str, str, str]:
        """The first four columns of its rows."""
        return self.task, self.net, self.block, self.regime


@dataclass(frozen=True)
class Run:
    """One training: blocks at some sites (numbers, rising; none: plain), all with one learning rate."""

    seed: int
    sites: tuple[int, ...]
    lr: float


CHOOSERS = ("score", "gradient_norm", "squared_gradients", "gradient_rank")
"""Methods whose choice within the budget is trained, beside those that look at no image."""

FEW = ("digits_on_photos", "rotations")
GAINING = ("letters", "corruptions")
"""Beside digits_on_photos, where lite0 gained."""

STAGES: tuple[tuple[str, str, str, str, tuple[str, ...]], ...] = (
    ("rank", "lite0", "se", "frozen", TASKS),
    ("choose", "lite0", "se", "frozen", TASKS),
    ("rank", "vit", "se", "frozen", TASKS),
    ("null", "lite0", "se", "frozen", TASKS),
    ("explore", "lite0", "se", "frozen", TASKS),
    ("bottleneck", "lite0", "se", "frozen", TASKS),
    ("rank", "lite1", "se", "frozen", FEW[:1]),
    ("rank", "lite0", "cbam", "frozen", FEW[:1]),
    ("headroom", "lite0", "se", "all", FEW[:1]),
    ("choose", "vit", "se", "frozen", GAINING[:1]),
    ("rank", "lite0_random", "se", "frozen", FEW[:1]),
    # the second part
    ("rank", "lite1", "se", "frozen", GAINING[:1]),
    ("rank", "lite0", "se", "frozen", NEW_TASKS),
    ("rungs", "lite0", "se", "frozen", NEW_TASKS),
    ("choose", "lite0", "se", "frozen", NEW_TASKS),
    ("rungs", "lite0", "se", "frozen", TASKS),
    ("choose", "lite0", "se", "frozen", TASKS),
    ("rank", "lite1", "se", "frozen", GAINING),
    ("rungs", "lite1", "se", "frozen", (*FEW[:1], *GAINING)),
    ("rungs", "vit", "se", "frozen", GAINING[:1]),
    ("choose", "vit", "se", "frozen", GAINING[:1]),
    ("choose", "lite1", "se", "frozen", (*FEW[:1], *GAINING)),
    ("rank", "lite0", "cbam", "frozen", GAINING),
    ("choose", "lite0", "cbam", "frozen", (*FEW[:1], *GAINING)),
    ("headroom", "lite0", "se", "all", GAINING),
    # where lite0 had nothing to rank
    ("rank", "lite1", "se", "frozen", TASKS),
    ("rank", "lite0", "cbam", "frozen", TASKS),
    ("headroom", "lite0", "se", "all", TASKS),
    ("choose", "vit", "se", "frozen", TASKS),
    ("choose", "lite1", "se", "frozen", TASKS),
    ("choose", "lite0", "cbam", "frozen", TASKS),
    ("choose", "lite0", "se", "all", FEW),
)
"""What is done, the most valuable first: stage, net, block, regime, tasks. Cut off anywhere, the rest is missing."""
