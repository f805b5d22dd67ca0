"""Chance that depends on numbers alone: a seed from several, and generators that a sample draws from."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def mixed_seed(*numbers: int) -> int:
    """One seed below 2**63 from several numbers; neighbouring ones give unrelated seeds."""
    digest = hashlib.sha256(":".join(map(str, numbers)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def seed_all(*numbers: int) -> None:
    """All generators, of the devices too, seeded by these numbers from here on."""
    seed = mixed_seed(*numbers)
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


@contextmanager
def drawn_from(*numbers: int) -> Iterator[None]:
    """All three generators of the CPU seeded by these numbers for a while, then put back."""
    seed = mixed_seed(*numbers)
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.random.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
