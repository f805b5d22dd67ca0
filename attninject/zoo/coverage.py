"""The zoo's sweep: models × (place, block), a row of findings per model, each model in a process that may die.

A row is one line of JSON in FOLDER/rows.jsonl, written as its model finishes, so that a sweep that is killed
goes on where it was.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from torch import nn

from attninject import api, models
from attninject.anatomy.places import PLACES
from attninject.errors import (
    AttnInjectError,
    LayoutError,
    NoSuchPlaceError,
    NoTensorError,
    ProbeError,
    RunError,
    UnsupportedModelError,
)
from attninject.files import installed_versions
from attninject.planning.planned_site import Site
from attninject.planning.support import refuse_unsupported
from attninject.zoo import guarantees, subjects

ROWS = "rows.jsonl"
LEVELS = ("plan", "cheap", "full")
CHEAP = ("eval", "train", "gradient", "deepcopy", "pickle")
ON_META = ("eval", "deepcopy", "pickle")  # of these, what needs no values: calls, keys, copies
WITHOUT_GRID = "se"  # works in any layout: for where the block asked for needs a grid of positions
THOROUGH = (
    "stage_end",
    "residual_branch",
    "block_end",
)  # the copies are checked here, and what torch makes of it
ELSEWHERE = ("eval", "train", "gradient")  # of CHEAP, what is checked at the other places
DEFAULT_PLACES = (*THOROUGH, *sorted(set(PLACES) - set(THOROUGH)))
INSTEAD = {"residual_branch": "block_end"}  # what is examined on a net that lacks the place asked for
RETIRE_AFTER = 40  # models per process: torch and the libraries keep some memory of each


@dataclass(frozen=True)
class Asked:
    """What a sweep checks on every model."""

    places: tuple[str, ...] = DEFAULT_PLACES
    block: str = "cbam"
    level: str = "full"
    meta: bool = False

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**asdict(self), "places": list(self.places)}


# --- one row -----------------------------------------------------------------------------------


def row(name: str, asked: Asked, meta_because: str = "") -> dict[str, Any]:
    """Everything that the zoo finds out about one model; nothing that goes wrong is raised."""
    gc.collect()
    began = time.perf_counter()
    result: dict[str, Any] = {
        "model": name,
        "family": models.family(name),
        "asked": asked.to_dict(),
        "device": "meta" if asked.meta or meta_because else "cpu",
        "versions": installed_versions(("attninject", "torch", "torchvision", "timm")),
    }
    if meta_because:
        result["meta_because"] = meta_because
    try:
        result |= _examine(name, asked, result)
    except UnsupportedModelError as error:
        result |= {"status": "refused", "error": guarantees.told(error)}
    except Exception as error:
        result |= {"status": "failed", "error": guarantees.told(error)}
    result["seconds"] = round(time.perf_counter() - began, 2)
    return result


def _examine(name: str, asked: Asked, result: dict[str, Any]) -> dict[str, Any]:
    """What building, planning and checking the model gives; on meta tensors as far as `result` says so."""
    began = time.process_time()
    try:
        model = subjects.build(name, result["device"] == "meta")
    except Exception as error:
        return {"status": "unbuildable", "error": guarantees.told(error)}
    found: dict[str, Any] = {"build_seconds": round(time.process_time() - began, 3)}
    found["parameters"] = subjects.parameters(model)
    root = subjects.ROOTS.get(result["family"], "")
    if root:
        found["root"] = root
    bare, checks = _bare(name, model, asked, found)
    try:
        found["places"] = _places(bare, asked, root, checks)
    except ProbeError:
        if not bare.on_meta:
            raise
        result["device"] = "cpu"  # what it computes next depends on values: they are needed after all
        return _examine(name, asked, result)
    if asked.level == "full" and bare.values:
        entries = {p: e for p, e in found["places"].items() if "sites" in e}
        chosen = [p for p in THOROUGH[: 2 if "residual_branch" in entries else None] if p in entries]
        rules = [{"block": entries[p]["block"], "place": p} for p in chosen or entries]
        if rules:
            found["together"] = _together(bare, rules, root)
    found["status"] = _overall(found)
    return found


def _places(bare: guarantees.Bare, asked: Asked, root: str, checks: tuple[str, ...]) -> dict[str, Any]:
    """The entries of the places asked for, and of what is examined instead of one that the net lacks."""
    entries = (not checks and _planned_at_once(bare, asked, root)) or {
        place: _place(bare, place, asked.block, root, checks) for place in asked.places
    }
    for place, other in INSTEAD.items():
        if entries.get(place, {}).get("status") == "absent" and other not in entries:
            entries[other] = _place(bare, other, asked.block, root, checks)
    return entries


def _bare(
    name: str, model: nn.Module, asked: Asked, found: dict[str, Any]
) -> tuple[guarantees.Bare, tuple[str, ...]]:
    """The model ready for its checks, and which of them it can have."""
    if asked.level == "plan" or _is_refused(model):
        return guarantees.Bare(model, None), ()
    calls = subjects.calls(name, model)
    found["input"] = subjects.shape_text(calls.eval)
    if guarantees.on_meta(model):
        return guarantees.Bare(model, subjects.on_meta(calls)), ON_META
    subjects.randomise(model)
    return guarantees.Bare(model, calls), CHEAP


def _is_refused(model: nn.Module) -> bool:
    """Whether the library refuses the model as such, so that there is nothing to run."""
    try:
        refuse_unsupported(model)
    except UnsupportedModelError:
        return True
    return False


def _of(found: dict[str, Any], sites: Sequence[Site]) -> dict[str, Any]:
    """An entry with its sites and its status."""
    return {**guarantees.counted(sites), **found, "status": _worst(found["checks"])}


def _planned_at_once(bare: guarantees.Bare, asked: Asked, root: str) -> dict[str, Any] | None:
    """The entries of all places from one plan, for structure alone; None where they must be planned one by one."""
    rules = [{"block": asked.block, "place": place, "optional": True} for place in asked.places]
    recipe = {"name": "zoo", "rules": rules}
    try:
        plan, found = guarantees.check(bare, {"recipe": recipe, "root": root}, ())
    except UnsupportedModelError:
        raise
    except Exception:
        return None
    entries: dict[str, Any] = {}
    for index, place in enumerate(asked.places):
        sites = [s for s in plan.sites if s.rule == index]
        why = next((n for n in plan.notes if n.startswith(f"rule {index + 1} ") and "no place" in n), "")
        if not sites and not why:
            return None
        more = _of(found, sites) if sites else {"status": "absent", "error": why.removesuffix(" (skipped)")}
        entries[place] = {"block": asked.block, **more}
    return entries


def _place(
    bare: guarantees.Bare, place: str, block: str, root: str, checks: tuple[str, ...]
) -> dict[str, Any]:
    """The entry of one place: `green`, `bare`, `failed`, `absent`, with what was found.

    Raises:
        UnsupportedModelError, ProbeError: no place of this model can be planned.
    """
    entry: dict[str, Any] = {"block": block}
    if place not in THOROUGH:
        checks = tuple(c for c in checks if c in ELSEWHERE)
    for block_here in dict.fromkeys((block, WITHOUT_GRID)):
        try:
            plan, found = guarantees.check(bare, {"block": block_here, "place": place, "root": root}, checks)
            return {**entry, **_of(found, plan.sites)}
        except (UnsupportedModelError, ProbeError):
            raise
        except (NoSuchPlaceError, NoTensorError) as error:  # no one tensor enters a densely connected unit
            return {**entry, "status": "absent", "error": guarantees.told(error)}
        except LayoutError as error:
            if block_here == WITHOUT_GRID:
                return {**entry, "status": "failed", "error": guarantees.told(error)}
            entry = {"block": WITHOUT_GRID, "instead_of": block, "refused": guarantees.told(error)}
        except Exception as error:
            return {**entry, "status": "failed", "error": guarantees.told(error)}
    return entry


def _together(bare: guarantees.Bare, rules: list[dict[str, Any]], root: str) -> dict[str, Any]:
    try:
        checks = guarantees.check_together(bare, rules, root)
    except AttnInjectError as error:
        return {"status": "failed", "error": guarantees.told(error)}
    return {"status": _worst(checks), "checks": checks}


def _worst(checks: dict[str, dict[str, str]]) -> str:
    statuses = {c["status"] for c in checks.values()}
    return next((s for s in (guarantees.FAILED, guarantees.BARE) if s in statuses), "green")


def _overall(found: dict[str, Any]) -> str:
    """Green when every promise holds, and there is a stage end and a branch or block end to hold it at."""
    places = found["places"]
    statuses = [e["status"] for e in places.values()] + [found.get("together", {}).get("status", "green")]
    if guarantees.FAILED in statuses or places.get("stage_end", {}).get("status") == "absent":
        return "failed"
    if all(s == "absent" for s in statuses[:-1]):
        return "failed"
    return "bare" if guarantees.BARE in statuses else "green"


# --- rows on disk ------------------------------------------------------------------------------


def read(folder: Path) -> list[dict[str, Any]]:
    """The rows of a folder, as they were written; a line cut short, or of something else, is no row."""
    path = folder / ROWS
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            found = json.loads(line)
            if isinstance(found, dict) and {"model", "family", "status"} <= found.keys():
                rows.append(found)
    return rows


def append(folder: Path, found: dict[str, Any]) -> None:
    """Write one row; a line that an earlier sweep left unfinished is closed first."""
    folder.mkdir(parents=True, exist_ok=True)
    line = json.dumps(found, ensure_ascii=False) + "\n"
    with (folder / ROWS).open("ab+") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                line = "\n" + line
        file.write(line.encode())


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
        command = [sys.executable, "-m", "attninject.zoo.coverage", json.dumps(asked.to_dict())]
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
