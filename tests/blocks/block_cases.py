"""What the block tests share: the cases, scrambled weights, odd inputs.

A family of blocks brings its own module `family_<name>.py` with any of these tables, which the tests gather:
`VARIANTS` (block → option combinations), `FORMULAS` and `APPLY` (as in test_block_formulas), `DEAD` (block →
function of the arguments → names of the tensors that mathematically get no gradient), `PAPER_IS_IDENTITY`
(blocks that as published start as the identity), `NO_LOGITS` (test ids without gate or softmax), `REFUSES`
(block → those of 1, 3 and 7 channels that it refuses with its default options), `CONSTANT` (block → the inits
under which no weight is random), `JOINT_NORM` (blocks whose norms see several values even at one position),
`UNSCRIPTED` (blocks that TorchScript does not compile), `STRAIGHT_THROUGH` (blocks whose gradient is not that of
their value, but that of their formula by autograd), `SLOW_EXPORT` (blocks whose export with free sizes and
compiling take many seconds), and, which every block must have, `COUNTS` and `MACS` (as in test_block_counts).
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn

from attninject.blocks import registry
from attninject.observe.example_inputs import Inputs
from attninject.observe.probe import run
from attninject.planning.cost import macs_of

FAMILIES = [importlib.import_module(file.stem) for file in sorted(Path(__file__).parent.glob("family_*.py"))]
Table = TypeVar("Table", dict, set)


def gathered(table: str, start: Table) -> Table:
    """`start` and what the family modules hold under that name."""
    for family in FAMILIES:
        start = start | getattr(family, table, type(start)())
    return start


NAMES = [name for name in registry.list_blocks() if registry.get(name).family not in ("registered", "timm")]
"""Every built-in block: a new one is tested by being in the registry. (timm's: test_block_foreign.)"""

VARIANTS: dict[str, list[dict[str, Any]]] = gathered("VARIANTS", {
    "se": [
        {"reduction": 0.25, "squeeze": "max", "gate": "tanh"},
        {"reduction": 4, "bias": False, "squeeze": "both", "gate": "relu"},
        {"divisor": 8, "gate": "hard_sigmoid"},
    ],
    "channel_attention": [
        {"pool": "avg", "reduction": 4, "bias": False},
        {"pool": "max", "gate": "tanh"},
    ],
    "spatial_attention": [
        {"kernel_size": 3, "norm": False, "bias": True, "concat": "mean_max"},
        {"kernel_size": 5, "bias": True, "gate": "hard_sigmoid", "pool": "max"},
    ],
    "cbam": [
        {"order": "spatial_first", "kernel_size": 3, "norm": False, "bias": False, "reduction": 4},
        {"order": "parallel", "pool": "max", "residual": True, "reduction": 4},
        {"residual": True, "concat": "mean_max", "reduction": 4},
        {"pool": "avg", "spatial_pool": "avg", "spatial_bias": True, "norm": False, "reduction": 4},
    ],
    "bam": [
        {"mode": "sum", "reduction": 4, "num_layers": 1, "dilation": 2},
        {"num_layers": 0, "reduction": 2, "bias": False, "channel_layers": 2},
    ],
})  # fmt: skip
"""Option combinations to test beside the defaults."""
PAPER_IS_IDENTITY: set[str] = gathered("PAPER_IS_IDENTITY", set())
NO_LOGITS: set[str] = gathered("NO_LOGITS", set())
REFUSES: dict[str, set[int]] = gathered("REFUSES", {})
SLOW_EXPORT: set[str] = gathered("SLOW_EXPORT", set())
UNSCRIPTED: set[str] = gathered("UNSCRIPTED", set())
STRAIGHT_THROUGH: set[str] = gathered("STRAIGHT_THROUGH", set())
CONSTANT: dict[str, set[str]] = gathered("CONSTANT", {})
JOINT_NORM: set[str] = gathered("JOINT_NORM", set())


def label(case: tuple[str, dict[str, Any]]) -> str:
    """`se-gate=tanh`: a readable test id."""
    name, args = case
    return "-".join([name, *(f"{k}={v}" for k, v in args.items())])


CASES = [(name, args) for name in NAMES for args in ({}, *VARIANTS.get(name, []))]
DIMS = [(name, dims) for name in NAMES for dims in registry.get(name).dims]
CASES_BY_INIT = [
    pytest.param(case, init, id=f"{label(case)}-{init}", marks=[pytest.mark.slow] if slow else [])
    for case in CASES
    for init in ("identity", "paper", "blend")
    for slow in [bool(case[1]) and init != "identity"]
]
"""Every case under identity, and the defaults under every init; the rest belongs to the slow tier."""
SIZES: dict[int, tuple[int, ...]] = {1: (9,), 2: (7, 5), 3: (3, 5, 4)}


def build(name: str, channels: int = 16, **kwargs: Any) -> nn.Module:
    """A block with seeded weights."""
    torch.manual_seed(0)
    return registry.create_block(name, channels, **kwargs)


def scrambled(name: str, channels: int = 16, seed: int = 1, **kwargs: Any) -> nn.Module:
    """A block in which no tensor is at its initial value, so that every term of its formula counts."""
    block = build(name, channels, **kwargs)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in block.parameters():
            p.normal_(0, 0.5, generator=generator)
        for key, buffer in block.named_buffers():
            if key.endswith("running_var"):
                buffer.uniform_(0.5, 2, generator=generator)
            elif key.endswith("running_mean"):
                buffer.normal_(generator=generator)
    return block


def macs(block: nn.Module, x: Tensor, mode: str = "meta") -> int:
    """Multiply-accumulates for one sample of x in a recorded forward: on stand-ins, or in `mode` "real" with data.

    Our own count, not torch's: what torch's counter makes of its fused attention differs between its releases.
    """
    return macs_of(run(block, Inputs((x,)), mode))


def noise(*shape: int, seed: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    """Seeded normal values that leave the global generator alone."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
