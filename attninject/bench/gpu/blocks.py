"""Blocks forward and backward beside timm's, eager and compiled: time, share of copy bandwidth, memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from attninject.bench import block_speed
from attninject.bench.block_speed import Case
from attninject.bench.peers import SUBJECTS

from . import crossovers
from .sheet import Figures, Setting, Task

PART = "blocks"
MAPS = ((128, 256, 56, 56), (128, 512, 28, 28), (256, 1024, 14, 14))
"""Far beyond a card's cache (50 MB), so that no run finds its input there: 206, 103 and 103 MB in bf16."""
REHEARSED = ((2, 32, 8, 8),)
FIRST = ("se", "cbam", "channel_attention", "spatial_attention", "eca", "gc", "scse", "bam", "coord")
"""What the goals speak of; the pairwise blocks come later."""
FORMATS = ("channels_last", "NCHW")
CASE = 6.0  # seconds, by estimate


def tasks(setting: Setting) -> Iterator[Task]:
    """A task per block, map, format and dtype; the first map in bf16 and channels_last comes first."""
    maps = REHEARSED if setting.rehearse else MAPS
    formats = FORMATS[:1] if setting.rehearse else FORMATS
    for number, size in enumerate(maps):
        for dtype in setting.dtypes:
            for memory_format in formats:
                for name in SUBJECTS:
                    late = (number > 0) + (dtype != setting.dtypes[0]) + (memory_format != formats[0])
                    rank = 2 if not late and name in FIRST else 5 + late + (name not in FIRST)
                    case = fitting(Case(name, size, memory_format, dtype, setting.device), setting.memory)
                    label = f"{name} {case.label} {memory_format} {dtype}"
                    yield Task(PART, label, rank, CASE, partial(_measured, case, setting))
    yield from crossovers.tasks(setting, FIRST)
    for name in FIRST:
        size = maps[0]
        case = fitting(Case(name, size, FORMATS[0], setting.dtypes[0], setting.device), setting.memory)
        yield Task(PART, f"{name} compiled", 6, 60, partial(_compiled, case, setting))


def fitting(case: Case, memory: int) -> Case:
    """The case with its batch halved until some sixteen maps fit; pairwise blocks cut as on a CPU's bench."""
    size = block_speed.cut(case.size, case.subject, case.device)
    width = 4 if case.dtype == "float32" else 2
    while size[0] > 1 and 16 * width * torch.Size(size).numel() > memory:
        size = (size[0] // 2, *size[1:])
    return replace(case, size=size)


def _measured(case: Case, setting: Setting, left: float) -> Figures:
    """Each of our forms, also where the dispatch would not take it by itself: that is what the dispatch learns from."""
    return _row(case, block_speed.measured(case, setting.rounds, enough=1.0, forms=True))


def _compiled(case: Case, setting: Setting, left: float) -> Figures:
    """Our definition and timm's module, both compiled by inductor, beside the eager ones."""
    found = block_speed.measured(case, setting.rounds, compiled=not setting.rehearse, enough=1.0, forms=True)
    return _row(case, found)


def _row(case: Case, found: dict[str, Any]) -> Figures:
    """What the table reads; the medians in seconds, and which peer is the fastest."""
    medians = {name: value["median"] for name, value in found["seconds"].items()}
    return {
        "block": case.name, "size": list(case.size), "format": case.format, "dtype": case.dtype,
        "seconds": medians, "floor_bytes": found["floor_bytes"], "map_bytes": found["map_bytes"],
        "saved": found["saved"], "peak": found["peak"], "difference": found["difference"],
        "skipped": found["skipped"],
    }  # fmt: skip
