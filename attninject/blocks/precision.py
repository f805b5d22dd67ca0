"""Autocast, and how to be free of it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

MANY = 2**16
"""Positions from which on weights over them are kept in float32: float16 rounds numbers of about their inverse."""


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, free of autocast; in a scripted network, which has an autocast of its own, just the product."""
    if torch.jit.is_scripting():
        return a @ b
    with full_precision(a):
        return a @ b


def full_precision(t: Tensor) -> AbstractContextManager[object]:
    """Autocast switched off on t's device; nothing where it is off, which keeps exported graphs flat."""
    kind = t.device.type
    return torch.autocast(kind, enabled=False) if autocasting(kind) else nullcontext()


def autocasting(kind: str) -> bool:
    """Whether autocast is on for this type of device; never on those without it (meta)."""
    # torch 2.6's compiler cannot trace the question whether there is one, but no such device comes to it
    known = kind != "meta" if torch.compiler.is_compiling() else torch.amp.is_autocast_available(kind)
    return known and torch.is_autocast_enabled(kind)
