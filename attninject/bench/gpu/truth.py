"""Whether it is right on the card: the tests marked `gpu`, a line for each as it ends."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

from attninject.blocks import gpu
from attninject.errors import DataError

from .sheet import Figures, Setting, Task

PART = "truth"
DEVICE, REHEARSE = "ATTNINJECT_TEST_DEVICE", "ATTNINJECT_REHEARSE"
"""Variables that `tests/gpu` reads: where to run, and whether a few cases of each kind will do."""
ROOT = Path(__file__).resolve().parents[3]
KERNELS = "test_gpu_kernels.py"
GROUPS = {
    "test_gpu_identity.py": (1, 100.0),
    "test_gpu_training.py": (2, 60.0),
    KERNELS: (2, 120.0),
    "test_gpu_compile.py": (5, 90.0),
}
"""File of tests → rank and seconds."""
COUNTING = 3.0
"""Seconds that are left for the count when the tests are stopped."""
_LINE = re.compile(r"^(?P<test>tests/\S+?(?:\[.*?\])?) (?P<said>PASSED|FAILED|ERROR|SKIPPED|XFAIL)")


def tasks(setting: Setting) -> Iterator[Task]:
    """A task per file of tests."""
    for file, (rank, seconds) in GROUPS.items():
        yield Task(PART, file, rank, seconds, partial(_tests, file, setting))


def _tests(file: str, setting: Setting, left: float) -> Iterable[tuple[str, Figures]]:
    """Outcomes by test, and the count at the end; stopped when the time is over.

    Raises:
        DataError: there are no tests here, as in an installed package.
    """
    tests = ROOT / "tests" / "gpu" / file
    if not tests.is_file():
        raise DataError("the tests are not here: run it from a checkout")
    command = [
        sys.executable,
        "-m",
        "pytest",
        str(tests),
        "-m",
        "gpu",
        "-v",
        "--tb=line",
        "-p",
        "no:cacheprovider",
        "-W",
        "default",  # what another torch warns of is no fault of ours
    ]
    env = {**os.environ, DEVICE: setting.device, **({REHEARSE: "1"} if setting.rehearse else {})}
    env.pop(gpu.VARIABLE, None)
    if setting.rehearse and file == KERNELS:
        env[gpu.VARIABLE] = "1"
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    process = subprocess.Popen(
        command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    stopper = threading.Timer(max(left - COUNTING, 1), process.kill)
    stopper.start()
    counts: dict[str, int] = {}
    failures: list[str] = []
    try:
        for line in process.stdout or ():
            found = _LINE.match(line)
            if found:
                said = found["said"].lower()
                counts[said] = counts.get(said, 0) + 1
                if said in ("failed", "error"):
                    yield found["test"], {"said": said}
            elif line.startswith(("/", "E  ", "FAILED", "ERROR")):
                failures.append(line.strip()[:400])
    finally:
        stopper.cancel()
        process.kill()
        process.wait()
    yield file, {"counts": counts, "complete": process.returncode in (0, 1), "failures": failures[:20]}
