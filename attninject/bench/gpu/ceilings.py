"""What the card can do at all: bytes per second of a copy, and products of matrices per second."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from functools import partial

import torch

from attninject.bench import measure

from .sheet import Figures, Setting, Task

PART = "ceilings"


def tasks(setting: Setting) -> Iterator[Task]:
    """Copy bandwidth, and the rate of a bf16 and a float32 matrix product."""
    yield Task(PART, "copy", 0, 3, partial(_copy, setting))
    for dtype in setting.dtypes:
        yield Task(PART, f"product {dtype}", 0, 3, partial(_product, setting, dtype))


def _copy(setting: Setting, left: float) -> Figures:
    size = 2**22 if setting.rehearse else min(2**31, setting.memory // 4)
    return {"bytes_per_second": measure.copy_bandwidth(setting.device, size), "bytes": size}


def _product(setting: Setting, dtype: str, left: float) -> Figures:
    """Random factors: a card is faster on zeros."""
    n = 128 if setting.rehearse else 8192
    generator = torch.Generator(setting.device).manual_seed(0)
    like = {"device": setting.device, "dtype": getattr(torch, dtype)}
    a, b = (torch.randn(n, n, generator=generator, device=setting.device).to(**like) for _ in range(2))
    taken = measure.interleaved({"product": lambda: a @ b}, 7, setting.device, sample=0.05)["product"]
    return {"operations_per_second": 2 * n**3 / statistics.median(taken), "n": n}
