"""The tasks by the clock: what is worth most first, a line on the disk for each figure, and no task ends the others."""

from __future__ import annotations

import gc
import platform
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from attninject.bench import measure

from . import blocks, ceilings, engine, networks, truth
from .sheet import Setting, Sheet, Task

PARTS = {"truth": truth, "ceilings": ceilings, "blocks": blocks, "networks": networks, "engine": engine}


class OutOfTime(Exception):
    """The clock ran out within a task."""


def setting_of(device: str, rehearse: bool, folder: Path) -> Setting:
    """What the device offers; four fifths of its free memory are ours."""
    if device == "cuda":
        free, _ = torch.cuda.mem_get_info()
        return Setting(device, rehearse, int(free * 0.8), torch.cuda.is_bf16_supported(), folder.resolve())
    return Setting(device, rehearse, 2**30, True, folder.resolve())


def run(
    setting: Setting, minutes: float, only: Sequence[str] = (), say: Callable[[str], Any] = lambda line: None
) -> None:
    """Carry the tasks out until the minutes are over; every figure is in the folder's sheet as soon as it is there.

    The first line names the machine and all tasks, so that a table can say what is missing.
    """
    until = time.monotonic() + 60 * minutes
    chosen = ordered(setting, only)
    sheet = Sheet(setting.folder)
    try:
        sheet.write("about", "machine", _about(setting, minutes, chosen))
        for task in chosen:
            left = until - time.monotonic()
            if left < (1 if setting.rehearse else task.seconds):
                sheet.write(task.part, task.name, {"left_out": f"{max(left, 0):.0f} s were left"})
                continue
            _carry_out(task, left, sheet)
            say(f"{left:5.0f} s left: {task.part}: {task.name}")
    finally:
        sheet.close()


def ordered(setting: Setting, only: Sequence[str] = ()) -> list[Task]:
    """All tasks of the parts (or of those named), the most valuable first."""
    tasks = [task for name, part in PARTS.items() if not only or name in only for task in part.tasks(setting)]
    return sorted(tasks, key=lambda task: task.rank)


def _carry_out(task: Task, left: float, sheet: Sheet) -> None:
    """One task; what it raises is a line as well."""
    began = time.monotonic()
    try:
        with _alarm(left):
            found = task.work(left)
            rows = [(task.name, found)] if isinstance(found, Mapping) else found
            for name, figures in rows:
                sheet.write(task.part, name, {**figures, "took": time.monotonic() - began})
    except Exception as error:  # whatever went wrong there, the next task may be right
        line = (str(error).strip().splitlines() or [""])[0]
        sheet.write(task.part, task.name, {"error": f"{type(error).__name__}: {line[:300]}"})
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """Raise `OutOfTime` after so many seconds, between two steps of Python."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise OutOfTime("the clock ran out")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _about(setting: Setting, minutes: float, tasks: Sequence[Task]) -> dict[str, Any]:
    """The machine, and what is to be measured."""
    found: dict[str, Any] = {
        "versions": measure.versions(), "python": platform.python_version(), "minutes": minutes,
        "device": "cpu, a rehearsal" if setting.device == "cpu" else torch.cuda.get_device_name(),
        "memory": setting.memory, "bf16": setting.bf16, "tasks": [[task.part, task.name] for task in tasks],
    }  # fmt: skip
    if setting.device == "cuda":
        about = torch.cuda.get_device_properties(0)
        found |= {"capability": [about.major, about.minor], "cuda": torch.version.cuda}
    return found
