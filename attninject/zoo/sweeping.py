"""The zoo's sweep: each model in a process that may die, its row on disk as soon as it is made."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from torch import nn

from attninject import api, models, plugins
from attninject.errors import AttnInjectError, RunError
from attninject.zoo.coverage import Asked, row
from attninject.zoo.row_file import append, read

RETIRE_AFTER = 40  # models per process: torch and the libraries keep some memory of each


def to_do(names: Sequence[str], asked: Asked, folder: Path, retry: bool) -> list[str]:
    """The names without a row that answers what is asked; `retry`: those whose newest row is not green too."""
    done = {r["model"]: r["status"] for r in read(folder) if r.get("asked") == asked.to_dict()}
    again = {n for n, status in done.items() if retry and status not in ("green", "refused")}
    return [n for n in names if n not in done or n in again]


# --- processes ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Limits:
    """What one model may take before its process is ended: seconds, and bytes of resident memory."""

    seconds: float
    memory: int


class Worker:
    """A process that makes rows, one name at a time; it can be killed without harm to the sweep."""

    def __init__(self, asked: Asked, limits: Limits, threads: int) -> None:
        self.limits, self.made = limits, 0
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        command = [sys.executable, "-m", "attninject.zoo.sweeping", json.dumps(asked.to_dict())]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
        )
        self.lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        threading.Thread(target=self._listen, args=(self.process.stdout,), daemon=True).start()
        self.ready = False

    def _listen(self, stream: IO[bytes]) -> None:
        for line in stream:
            self.lines.put(line)
        self.lines.put(b"")

    def ask(self, name: str, meta_because: str = "") -> tuple[dict[str, Any] | None, str]:
        """The row of a model, or None and what ended the process."""
        self.made += 1
        try:
            self._send({"name": name, "meta_because": meta_because})
        except OSError:
            return None, self._ended()
        began = time.monotonic()
        while True:
            with contextlib.suppress(queue.Empty):
                line = self.lines.get(timeout=0.2)
                return (json.loads(line), "") if line else (None, self._ended())
            if time.monotonic() - began > self.limits.seconds:
                self.end()
                return None, f"took longer than {self.limits.seconds:g} s"
            if resident(self.process.pid) > self.limits.memory:
                self.end()
                return None, f"needs more than {self.limits.memory / 2**30:.3g} GiB of memory"

    def _send(self, task: dict[str, str]) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(task).encode() + b"\n")
        self.process.stdin.flush()

    def _ended(self) -> str:
        code = self.process.wait()
        return f"its process ended with signal {-code}" if code < 0 else f"its process ended with code {code}"

    @property
    def spent(self) -> bool:
        """Whether the next model should have a fresh process."""
        return self.made >= RETIRE_AFTER or self.process.poll() is not None

    def end(self) -> None:
        """End the process, whatever it is doing."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                stream.close()  # type: ignore[union-attr]


def resident(pid: int) -> int:
    """Bytes of memory that a process holds; 0 where the system does not say."""
    try:
        with open(f"/proc/{pid}/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def main() -> None:
    """Inside a worker: names in, rows out; whatever else prints goes to stderr."""
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    given = json.loads(sys.argv[1])
    asked = Asked(**{**given, "places": tuple(given["places"])})
    _warm_up()
    plugins.load_inherited()
    for line in sys.stdin:
        task = json.loads(line)
        out.write(json.dumps(row(task["name"], asked, task["meta_because"]), ensure_ascii=False) + "\n")
        out.flush()


def _warm_up() -> None:
    """What the first plan of a process loads should not count as the first model's planning."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).eval()
    with contextlib.suppress(AttnInjectError):
        api.plan(net, block="se", after="0", args={"reduction": 4})


# --- the sweep ---------------------------------------------------------------------------------


def sweep(
    names: Sequence[str],
    asked: Asked,
    *,
    folder: Path | None = None,
    jobs: int = 1,
    limits: Limits,
) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Rows as they are made, and written to FOLDER: number, how many there will be, row."""
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
    for name in names:
        waiting.put(name)
    done: queue.SimpleQueue[dict[str, Any] | BaseException] = queue.SimpleQueue()
    stop = threading.Event()
    count = max(1, min(jobs, len(names)))
    threads = max(1, (os.cpu_count() or 1) // count)
    if "OMP_NUM_THREADS" in os.environ:
        threads = int(os.environ["OMP_NUM_THREADS"])
    crew = [_Crew(waiting, done, stop, lambda: Worker(asked, limits, threads), asked) for _ in range(count)]
    try:
        for one in crew:
            one.start()
        for number in range(1, len(names) + 1):
            found = done.get()
            if isinstance(found, BaseException):
                raise RunError(f"the zoo cannot start its processes: {found}") from found
            if folder is not None:
                append(folder, found)
            yield number, len(names), found
    finally:
        stop.set()
        for one in crew:
            one.end()


class _Crew(threading.Thread):
    """One lane of the sweep: a worker, replaced whenever it is spent."""

    def __init__(
        self,
        waiting: queue.SimpleQueue[str],
        done: queue.SimpleQueue[dict[str, Any] | BaseException],
        stop: threading.Event,
        hire: Callable[[], Worker],
        asked: Asked,
    ) -> None:
        super().__init__(daemon=True)
        self.waiting, self.done, self.stop, self.hire, self.asked = waiting, done, stop, hire, asked
        self.worker: Worker | None = None

    def run(self) -> None:
        """Until nothing is waiting."""
        try:
            while not self.stop.is_set():
                self.done.put(self._row(self.waiting.get_nowait()))
        except queue.Empty:
            pass
        except BaseException as error:
            self.done.put(error)
        finally:
            self.end()

    def _row(self, name: str) -> dict[str, Any]:
        began = time.perf_counter()
        found, why = self._ask(name)
        if found is None and "memory" in why and not self.asked.meta:
            found, why = self._ask(name, why)
        if found is not None:
            return found
        return {
            "model": name,
            "family": models.family(name),
            "asked": self.asked.to_dict(),
            "status": "failed",
            "error": why,
            "seconds": round(time.perf_counter() - began, 2),
        }

    def _ask(self, name: str, meta_because: str = "") -> tuple[dict[str, Any] | None, str]:
        if self.worker is None or self.worker.spent:
            self.end()
            self.worker = self.hire()
        return self.worker.ask(name, meta_because)

    def end(self) -> None:
        """End the worker's process."""
        if self.worker is not None:
            self.worker.end()
            self.worker = None


if __name__ == "__main__":
    main()
