"""From how many elements of a map on which form of a block is the fastest on a GPU.

Cards that `attninject bench gpu` has measured stand in `crossover.json`; it is empty, as none has been. Any other
card is measured when a block first gets a large map there, once for each block, dtype and layout, in about a second.
The outcome is kept in the user's cache folder. The kernels take part under ATTNINJECT_MEASURE=kernels alone: no card
has run them yet, and a fault of theirs there would end the training that is under way. ATTNINJECT_MEASURE=0 forbids
all, and it does not happen while a CUDA graph is captured, nor under torch's deterministic algorithms, since two runs
might then choose differently and round differently. What is not measured is guessed: no kernels, and the lean form
from `GUESS` times as many elements as on a CPU.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from attninject.blocks import gpu
from attninject.files import installed_versions, replacing

Form = Literal["plain", "lean", "kernels"]
GUESS = 64
"""How many times as large as on a CPU a map must be for the lean form. An estimate, not measured."""
VARIABLE, WITH_KERNELS = "ATTNINJECT_MEASURE", "kernels"
SHIPPED = Path(__file__).with_name("crossover.json")
CHANNELS, SIDE, BATCHES = 64, 32, (4, 16, 64, 256)
"""What is measured: maps of 2¹⁸, 2²⁰, 2²² and 2²⁴ elements."""

Row = Mapping[str, float]
_found: dict[tuple[Any, ...], Thresholds | None] = {}
"""None: no file tells, and nothing was measured; the files are not read again."""


@dataclass(frozen=True)
class Thresholds:
    """Elements of a map from which on a form is taken; None: never. Kernels outrank the lean form."""

    lean: int | None = None
    kernels: int | None = None

    def form(self, elements: int) -> Form:
        """The form for a map of so many elements."""
        if self.kernels is not None and elements >= self.kernels:
            return "kernels"
        return "lean" if self.lean is not None and elements >= self.lean else "plain"


def form(x: Tensor, kind: type[Any], least: int) -> Form:
    """The form for x: (B, C, *S) on a GPU, in a block of class `kind` whose fast form pays from `least` on a CPU."""
    at = x.device.index, kind, x.dtype, x.is_contiguous()
    known = _found.get(at)
    if known is None:
        known = None if at in _found else _looked_up(x, kind)
        if known is None and _may_measure():
            known = _measured(x, kind) or Thresholds(least * GUESS)
        _found[at] = known
    return (known or Thresholds(least * GUESS)).form(x.numel())


def key(block: str, dtype: torch.dtype | str, contiguous: bool) -> str:
    """What an entry of a card is for: `cbam bfloat16 channels_last`."""
    return f"{block} {str(dtype).removeprefix('torch.')} {'NCHW' if contiguous else 'channels_last'}"


def thresholds(rows: Iterable[Row]) -> Thresholds:
    """From seconds by size: the lean form from where it is faster than the plain one at every larger size measured
    too, the kernels from where they are faster than both. A row: `elements`, and seconds by form.

    >>> thresholds([{"elements": 4, "plain": 2, "lean": 3}, {"elements": 8, "plain": 4, "lean": 3}])
    Thresholds(lean=8, kernels=None)
    """
    falling = sorted(rows, key=lambda row: -row["elements"])

    def start(wins: Callable[[Row], bool]) -> int | None:
        found = None
        for row in falling:
            if not wins(row):
                break
            found = int(row["elements"])
        return found

    return Thresholds(
        start(lambda row: row["lean"] < row["plain"]),
        start(lambda row: "kernels" in row and row["kernels"] < min(row["lean"], row["plain"])),
    )


# --- files ------------------------------------------------------------------------------------------


def _looked_up(x: Tensor, kind: type[Any]) -> Thresholds | None:
    """What is shipped of this card, or was measured here."""
    entry, card = key(kind.facts.name, x.dtype, x.is_contiguous()), torch.cuda.get_device_name(x.device)
    for file, name in ((SHIPPED, card), (_remembered(), _versioned(card))):
        found = _read(file).get(name, {}).get(entry)
        if found is not None:
            return found
    return None


def _read(file: Path) -> dict[str, dict[str, Thresholds]]:
    """Card → entry → thresholds; nothing of a file that is missing or damaged."""
    try:
        cards = json.loads(file.read_text(encoding="utf-8"))["cards"]
        return {card: {name: _entry(e) for name, e in entries.items()} for card, entries in cards.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def _entry(found: Mapping[str, Any]) -> Thresholds:
    made = Thresholds(found["lean"], found["kernels"])
    if not all(n is None or (type(n) is int and n >= 0) for n in (made.lean, made.kernels)):
        raise ValueError(f"no numbers of elements: {found!r}")
    return made


def written(cards: Mapping[str, Mapping[str, Thresholds]]) -> str:
    """Such a file's text."""
    plain = {
        card: {name: asdict(t) for name, t in sorted(entries.items())} for card, entries in cards.items()
    }
    return json.dumps({"cards": plain}, indent=1) + "\n"


def _remember(card: str, entry: str, found: Thresholds) -> None:
    """Into the user's cache; if that cannot be written, the next process measures again."""
    with suppress(OSError):
        file = _remembered()
        file.parent.mkdir(parents=True, exist_ok=True)
        cards = _read(file)
        cards.setdefault(card, {})[entry] = found
        with replacing(file) as new:
            new.write_text(written(cards), encoding="utf-8")


def _remembered() -> Path:
    return (
        Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "attninject" / SHIPPED.name
    )


def _versioned(card: str) -> str:
    """What was measured holds for these versions, and with the kernels or without."""
    versions = _versions()
    return ", ".join([card, *versions, WITH_KERNELS] if _kernels_too() else [card, *versions])


@functools.cache
def _versions() -> tuple[str, ...]:
    found = installed_versions(("attninject", "torch", "triton"))
    return tuple(f"{name} {number}" for name, number in found.items())


# --- measuring --------------------------------------------------------------------------------------


def _kernels_too() -> bool:
    return os.environ.get(VARIABLE) == WITH_KERNELS


def _may_measure() -> bool:
    forbidden = os.environ.get(VARIABLE) == "0" or torch.are_deterministic_algorithms_enabled()
    return not forbidden and not torch.cuda.is_current_stream_capturing()


def _measured(x: Tensor, kind: type[Any]) -> Thresholds | None:
    """Measured and remembered; None where it fails, for want of memory or whatever.

    In a thread of its own, where nothing of the caller's holds: autocast, hooks on saved tensors (checkpointing counts
    what goes through them), modes that record operations, a side stream.
    """
    try:
        with ThreadPoolExecutor(1) as apart:
            found = thresholds(apart.submit(_rows, kind, x.device, x.dtype, x.is_contiguous()).result())
    except Exception:  # whatever it is, it must not end the caller's training
        return None
    entry = key(kind.facts.name, x.dtype, x.is_contiguous())
    _remember(_versioned(torch.cuda.get_device_name(x.device)), entry, found)
    return found


def _rows(kind: type[Any], device: torch.device, dtype: torch.dtype, contiguous: bool) -> list[Row]:
    """Seconds of a forward and backward of a new block, by form, for each size."""
    layout = torch.contiguous_format if contiguous else torch.channels_last
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they were
        block = kind(CHANNELS, init="paper")
    block.to(device=device, dtype=dtype, memory_format=layout)
    rows: list[Row] = []
    for batch in BATCHES:
        x = torch.linspace(-3, 3, batch * CHANNELS * SIDE**2, device=device).view(batch, CHANNELS, SIDE, SIDE)
        x = x.to(dtype=dtype, memory_format=layout)
        if not block.fast_applies(x):
            raise ValueError("a block as it is built by default has no fast form on a GPU")
        forms = {"plain": block.transform, "lean": block.fast_transform}
        if _kernels_too() and gpu.serves(x):
            forms["kernels"] = functools.partial(_by_kernels, block)
        rows.append({"elements": x.numel(), **{name: _seconds(call, x) for name, call in forms.items()}})
    return rows


def _by_kernels(block: Any, x: Tensor) -> Tensor:
    with gpu.kernels(True):
        y: Tensor = block.fast_transform(x)
        return y


def _seconds(call: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """The least of five, each after the other, by the card's own clock."""
    x = x.detach().requires_grad_()
    taken: list[float] = []
    with torch.cuda.device(x.device):
        for _ in range(8):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call(x).backward(x.detach())
            x.grad = None
            end.record()
            end.synchronize()
            taken.append(begin.elapsed_time(end) / 1e3)
    return min(taken[3:])
