"""From which size on which form of a block is the fastest: times, and the data file that the dispatch reads."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from attninject.bench import block_speed, measure
from attninject.bench.block_speed import KERNELS, OURS, PLAIN, Case
from attninject.blocks.fast import crossover
from attninject.errors import DataError

from . import sheet
from .sheet import Figures, Setting, Task

PART = "blocks"
NAMES = {PLAIN: "plain", OURS: "lean", KERNELS: "kernels"}
"""A contender → its form."""


def tasks(setting: Setting, names: Sequence[str]) -> Iterator[Task]:
    """A task per block, dtype and format; bf16 in channels_last comes first."""
    formats = ("channels_last",) if setting.rehearse else ("channels_last", "NCHW")
    for dtype in setting.dtypes[:1] if setting.rehearse else setting.dtypes:
        for memory_format in formats:
            first = dtype == setting.dtypes[0] and memory_format == formats[0]
            for name in names:
                work = partial(_crossover, name, dtype, memory_format, setting)
                yield Task(PART, f"{name} crossover {memory_format} {dtype}", 4 if first else 7, 5, work)


def _crossover(name: str, dtype: str, memory_format: str, setting: Setting, left: float) -> Figures:
    """Seconds of a forward and backward over the size of the map, by form."""
    rows = []
    skipped: dict[str, str] = {}
    for batch in (1, 2) if setting.rehearse else (8, 32, 128, 512, 2048):
        side = 4 if setting.rehearse else crossover.SIDE
        case = Case(name, (batch, crossover.CHANNELS, side, side), memory_format, dtype, setting.device)
        x, gradient = case.tensor(0).requires_grad_(), case.tensor(1)
        if 16 * x.nbytes > setting.memory:
            break
        modules, skipped = block_speed.contenders(case)
        block_speed.take_forms(modules, skipped, x)
        modules = {who: modules[who] for who in NAMES if who in modules}
        block_speed.differences(modules, skipped, x, gradient)
        if PLAIN not in modules:
            raise DataError(f"the definition: {skipped[PLAIN]}")
        works = {NAMES[who]: block_speed.step(module, x, gradient) for who, module in modules.items()}
        times = measure.interleaved(works, setting.rounds, setting.device, enough=0.3, sample=0.01)
        rows.append(
            {"elements": x.numel(), **{form: statistics.median(taken) for form, taken in times.items()}}
        )
    return {"block": name, "dtype": dtype, "format": memory_format, "sizes": rows, "skipped": skipped}


def write(folder: Path) -> Path | None:
    """The thresholds of a folder's figures beside them, as `blocks/fast/crossover.json` has them; None without any."""
    rows = sheet.read(folder)
    card = next((r["device"] for r in reversed(rows) if r["part"] == "about"), "")
    entries = {
        crossover.key(r["block"], r["dtype"], r["format"] == "NCHW"): crossover.thresholds(r["sizes"])
        for r in rows if r.get("sizes")
    }  # fmt: skip
    if not entries or card.startswith("cpu"):
        return None
    file = folder / crossover.SHIPPED.name
    file.write_text(crossover.written({card: entries}), encoding="utf-8")
    return file
