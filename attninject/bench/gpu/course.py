"""The tasks by the clock: what is worth most first, a line on the disk for each figure, and no task ends the others.

A worker process goes through them. What a task raises is a line, and the next begins; where the worker itself is lost
(a library crashes, a kernel has broken the card's context, a wait without end), the next task has a worker of its own.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import platform
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import IO, Any

import torch

from attninject.bench import measure
from attninject.blocks import gpu
from attninject.errors import RunError

from . import blocks, ceilings, engine, networks, truth
from .sheet import Setting, Sheet, Task

PARTS = {"truth": truth, "ceilings": ceilings, "blocks": blocks, "networks": networks, "engine": engine}
WORKER = (sys.executable, "-m", "attninject.bench.gpu.course")
LEAST = 60.0
"""Seconds that any task may take, so long as they are left; else twice what it is estimated to take."""
GRACE = 30.0
"""Seconds after which a worker is ended that has not ended its task itself."""
START = 180.0
"""Seconds that a worker has until its first task."""
LOST = 3
"""The exit code of a worker whose card does not answer any more."""


class OutOfTime(BaseException):
    """The clock ran out within a task; past every `except Exception` in it."""


def run(
    device: str, rehearse: bool, out: Path, minutes: float, only: Sequence[str] = (),
    say: Callable[[str], Any] = lambda line: None, worker: Sequence[str] = WORKER,
) -> None:  # fmt: skip
    """Carry the tasks out until the minutes are over; every figure is in the sheet of `out` as soon as it is there.

    What tasks write beside it lies in a temporary folder.

    Raises:
        RunError: a worker ends before its first task.
    """
    until = time.time() + 60 * minutes
    first: int | None = 0
    with tempfile.TemporaryDirectory(prefix="attninject-") as folder:
        given = {"device": device, "rehearse": rehearse, "folder": folder, "out": str(out.resolve()),
                 "minutes": minutes, "until": until, "only": list(only)}  # fmt: skip
        while first is not None:
            first = _watched({**given, "first": first}, say, worker)


def _watched(given: Mapping[str, Any], say: Callable[[str], Any], command: Sequence[str]) -> int | None:
    """A worker from its task `first` on: the number of the task that another has to begin with; None: all is done."""
    process = subprocess.Popen([*command, json.dumps(given)], stdout=subprocess.PIPE, process_group=0)
    lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(process.stdout, lines), daemon=True).start()
    at: dict[str, Any] = {}
    code: int | None = None
    why = "it did not end in time"
    try:
        while line := lines.get(timeout=at.get("seconds", START) + GRACE):
            at = json.loads(line)
            say(f"{given['until'] - time.time():5.0f} s left: {at['part']}: {at['name']}")
        code = process.wait(GRACE)
        why = f"signal {-code}" if code < 0 else f"exit code {code}"
    except (queue.Empty, subprocess.TimeoutExpired):
        pass
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # what its tasks have begun, too
        process.wait()
    if code == 0:
        return None
    if not at:
        raise RunError(f"the process that measures ended before its first task ({why})")
    if code != LOST:
        with Sheet(Path(given["out"])) as sheet:
            sheet.write(at["part"], at["name"], {"error": f"its process was lost ({why})"})
    return int(at["number"]) + 1


def _listen(stream: IO[bytes], lines: queue.SimpleQueue[bytes]) -> None:
    with stream:
        for line in stream:
            lines.put(line)
    lines.put(b"")


# --- the worker --------------------------------------------------------------------------------


def main() -> None:
    """Inside the worker: a line of JSON as each task begins; whatever else prints goes to stderr."""
    given = json.loads(sys.argv[1])
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def tell(number: int, task: Task, seconds: float) -> None:
        at = {"number": number, "part": task.part, "name": task.name, "seconds": seconds}
        print(json.dumps(at), file=out, flush=True)

    if given["rehearse"]:
        gpu.interpret()  # before anything loads Triton for a card
    setting = setting_of(given["device"], given["rehearse"], Path(given["folder"]))
    tasks = ordered(setting, given["only"])
    with Sheet(Path(given["out"])) as sheet:
        if not given["first"]:
            sheet.write("about", "machine", _about(setting, given["minutes"], tasks))
        done = carry_out(setting, tasks, sheet, given["until"], given["first"], tell)
    if done < len(tasks):
        os._exit(LOST)  # without the tidying up that would wait for the card


def setting_of(device: str, rehearse: bool, folder: Path) -> Setting:
    """What the device offers; four fifths of its free memory are ours."""
    if device == "cuda":
        free, _ = torch.cuda.mem_get_info()
        return Setting(device, rehearse, int(free * 0.8), torch.cuda.is_bf16_supported(), folder)
    return Setting(device, rehearse, 2**30, True, folder)


def ordered(setting: Setting, only: Sequence[str] = ()) -> list[Task]:
    """All tasks of the parts (or of those named), the most valuable first."""
    tasks = [task for name, part in PARTS.items() if not only or name in only for task in part.tasks(setting)]
    return sorted(tasks, key=lambda task: task.rank)


def carry_out(
    setting: Setting, tasks: Sequence[Task], sheet: Sheet, until: float, first: int = 0,
    tell: Callable[[int, Task, float], Any] = lambda number, task, seconds: None,
) -> int:  # fmt: skip
    """Go through the tasks from `first` on; how many are behind it at the end: not all where the card is lost.

    Args:
        setting: what tasks share.
        tasks: in order.
        sheet: what they find.
        until: the clock's (`time.time`) end.
        first: number of the task to begin with.
        tell: told of each that begins, with the seconds that it may take.
    """
    for number, task in enumerate(tasks[first:], first):
        left = until - time.time()
        if left < (1 if setting.rehearse else task.seconds):
            sheet.write(task.part, task.name, {"left_out": f"{max(left, 0):.0f} s were left"})
            continue
        seconds = left if setting.rehearse else min(left, max(2 * task.seconds, LEAST))
        tell(number, task, seconds)
        _one(task, seconds, sheet)
        if setting.device == "cuda" and not _answers():
            return number + 1
    return len(tasks)


def _one(task: Task, seconds: float, sheet: Sheet) -> None:
    """One task; what it raises is a line as well."""
    began = time.monotonic()
    try:
        with _alarm(seconds):
            found = task.work(seconds)
            rows = [(task.name, found)] if isinstance(found, Mapping) else found
            for name, figures in rows:
                sheet.write(task.part, name, {**figures, "took": time.monotonic() - began})
    except (Exception, OutOfTime) as error:  # whatever went wrong there, the next task may be right
        line = (str(error).strip().splitlines() or [""])[0]
        sheet.write(task.part, task.name, {"error": f"{type(error).__name__}: {line[:300]}"})
    finally:
        if "torch._dynamo" in sys.modules:  # the next task's compiling reaches no limit of recompilations
            torch._dynamo.reset()
        gc.collect()
        if torch.cuda.is_initialized():
            with contextlib.suppress(RuntimeError):  # the card may be lost
                torch.cuda.empty_cache()


def _answers() -> bool:
    """Whether the card still computes: after an access that it forbids, every call of the process fails."""
    try:
        return float(torch.ones(2, device="cuda").sum()) == 2
    except RuntimeError:
        return False


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


if __name__ == "__main__":
    main()
