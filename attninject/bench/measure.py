"""Instruments that the benchmarks share: time, bytes kept for backward, peak memory, bandwidth.

Times are compared only within one run: contenders take turns in rounds, so that whatever slows the machine
slows all of them. On a CPU with one thread they are CPU time, which other work on the machine shifts little;
with several threads wall time; on a GPU the time between two CUDA events.
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from attninject.files import installed_versions

Work = Callable[[], Any]
LIBRARIES = ("attninject", "torch", "timm", "torchvision", "mmcv", "mmcv-lite")
ALLOCATOR = ("LD_PRELOAD", "GLIBC_TUNABLES", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""Settings that change what fresh memory costs; besides these, everything that begins with MALLOC_."""

# --- time ---------------------------------------------------------------------------------------


def timed(work: Callable[..., Any], *args: Any) -> tuple[float, Any]:
    """CPU seconds that `work(*args)` took, and what it returned; earlier garbage is not its business."""
    gc.collect()
    began = time.process_time()
    result = work(*args)
    return time.process_time() - began, result


def seconds(work: Work, device: str = "cpu", times: int = 1) -> float:
    """Seconds that one call of `work` takes, the mean of `times` calls in a row."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(times):
            work()
        end.record()
        end.synchronize()
        made: float = start.elapsed_time(end) / 1e3 / times
        return made
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    began = clock()
    for _ in range(times):
        work()
    return (clock() - began) / times


def interleaved(
    contenders: Mapping[str, Work],
    rounds: int,
    device: str = "cpu",
    *,
    enough: float = math.inf,
    least: int = 3,
    sample: float = 0.02,
) -> dict[str, list[float]]:
    """Seconds per call of each contender, one figure per round; who goes first alternates.

    Two calls of each are not counted: one warms up, another tells how many calls take `sample` seconds (the first
    would not: it compiles and loads), and a figure is the mean of so many. After `enough` seconds no new round begins,
    but `least` rounds are made.
    """
    times = {}
    for name, work in contenders.items():
        work()
        times[name] = max(1, round(sample / max(seconds(work, device), 1e-6)))
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    began = time.perf_counter()
    names = list(contenders)
    with _no_collection():
        for one in range(rounds):
            if one >= least and time.perf_counter() - began > enough:
                break
            gc.collect()
            for name in names if one % 2 else names[::-1]:
                taken[name].append(seconds(contenders[name], device, times[name]))
    return taken


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """No collection by chance, which would strike one contender and not the other; those asked for are quick."""
    gc.collect()
    was = gc.isenabled()
    gc.disable()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        if was:
            gc.enable()


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """That many threads within an operation for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# --- figures ------------------------------------------------------------------------------------


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles (of few values, the nearest ones)."""
    ordered = sorted(values)
    last = len(ordered) - 1
    low, high = ordered[round(last * 0.25)], ordered[round(last * 0.75)]
    return {"median": statistics.median(ordered), "q1": low, "q3": high}


def ratios(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """Spread of the ratios within the rounds."""
    return spread([a / b for a, b in zip(above, below, strict=True)])


def geometric_mean(values: Iterable[float]) -> float | None:
    """The n-th root of the product of n positive numbers; None of none."""
    logs = [math.log(value) for value in values]
    return math.exp(statistics.fmean(logs)) if logs else None


# --- memory -------------------------------------------------------------------------------------


def saved_bytes(forward: Work, own: Iterable[Tensor] = ()) -> int:
    """Bytes that `forward()` keeps for its backward, each storage once, those of `own` (parameters) left out."""
    kept: dict[int, torch.UntypedStorage] = {}
    left_out = {t.untyped_storage().data_ptr() for t in own}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in left_out:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    total = sum(storage.nbytes() for storage in kept.values())
    del result
    return total


def peak_bytes(work: Work, device: str = "cpu") -> int:
    """The most bytes of tensors alive at once during `work()`, beyond those alive before: an exact count.

    On a CPU every allocation and release that torch's allocator reports to its profiler; scratch memory that
    libraries allocate past it is not seen.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    from torch.profiler import ProfilerActivity, profile

    with _silent_profiler(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        work()
    result: Any = record.profiler
    events = [e for e in result.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


@contextlib.contextmanager
def _silent_profiler() -> Iterator[None]:
    """The profiler's native part writes its progress to the error stream, past every logging setting."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def resident() -> dict[str, int]:
    """This process's resident size and its high-water mark in bytes, as the kernel counts them."""
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as status:
            fields = dict(line.split(":", 1) for line in status)
        return {key: int(fields[key].split()[0]) * 1024 for key in ("VmRSS", "VmHWM")}
    except OSError:  # not Linux: only the high-water mark is to be had
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return {"VmRSS": peak, "VmHWM": peak}


# --- the machine --------------------------------------------------------------------------------


def machine(device: str = "cpu") -> dict[str, Any]:
    """What a figure depends on: versions, threads, device, allocator."""
    return {
        "versions": versions(),
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "allocator": allocator(),
        "fresh_page_cost": fresh_page_cost() if device == "cpu" else None,
    }


def versions() -> dict[str, str]:
    """Name → version of the libraries compared, as far as they are installed."""
    return {**installed_versions(LIBRARIES), "torch": torch.__version__}


def allocator() -> dict[str, str]:
    """The settings of the environment that change how memory is allocated."""
    return {k: v for k, v in sorted(os.environ.items()) if k in ALLOCATOR or k.startswith("MALLOC_")}


def fresh_page_cost(size: int = 25 * 2**20) -> dict[str, float]:
    """Milliseconds to fill a tensor of 25 MB in memory just allocated, and in memory already in use.

    The difference is what every large temporary pays where the allocator hands its memory back at once.
    """
    used = torch.empty(size, dtype=torch.uint8)
    used.fill_(1)
    works: dict[str, Work] = {
        "fresh": lambda: torch.empty(size, dtype=torch.uint8).fill_(1),
        "used": lambda: used.fill_(1),
    }
    taken = interleaved(works, 5, sample=0)
    return {name: 1e3 * statistics.median(values) for name, values in taken.items()}


def copy_bandwidth(device: str = "cpu", size: int | None = None) -> float:
    """Bytes read and written per second by a copy of a tensor far larger than any cache."""
    size = size or (2**30 if device == "cuda" else 2**27)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    taken = interleaved({"copy": lambda: target.copy_(source)}, 7, device, sample=0.05)
    return 2 * size / statistics.median(taken["copy"])


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as info:
            names = [line.partition(":")[2].strip() for line in info if line.startswith("model name")]
    except OSError:
        names = []
    return next(iter(names), "") or platform.processor() or platform.machine()


def python(code: str) -> str:
    """What a fresh process of this Python prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout
