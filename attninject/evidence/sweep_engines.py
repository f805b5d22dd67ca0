"""Who carries the runs of a sweep out: processes of this machine, Ray's tasks, or a script for Slurm.

Each leaves the same files. A worker that dies, however it does, loses nothing but the time since the run's last
checkpoint: another goes on from there, bit for bit.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shlex
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from attninject import plugins
from attninject.errors import MissingPackageError, RunError
from attninject.files import replacing
from attninject.training import runs

from .sweep_design import Run

RETRIES = 3
"""How often a run goes on after its worker has died."""

PATIENCE = 20.0
"""Seconds that a worker has for its last checkpoint when the sweep is interrupted."""

PACKAGE_PARENT = str(Path(__file__).resolve().parents[2])


@dataclass(frozen=True)
class Event:
    """What became of a run: `said` a line, `done`, `failed` for good, `died` and to be taken up again."""

    run: Run
    kind: str
    text: str = ""


Tell = Callable[[Event], None]


class Engine(Protocol):
    """Carries runs out and tells of each; returns when all are done or have failed."""

    def carry_out(self, waiting: Sequence[Run], tell: Tell) -> None:
        """Begin or resume every run that is given."""
        ...


def environment(threads: int) -> dict[str, str]:
    """For a worker: this package, wherever it was imported from, so many threads, and the plugins."""
    paths = [PACKAGE_PARENT, *filter(None, [os.environ.get("PYTHONPATH")])]
    made = {plugins.VARIABLE: os.pathsep.join(map(str, plugins.files()))} if plugins.files() else {}
    return {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": str(threads), **made}


# --- this machine ------------------------------------------------------------------------------


class Local:
    """So many processes on this machine, each with one run after the other."""

    def __init__(self, out: Path, workers: int = 1, threads: int = 1) -> None:
        self.out, self.workers, self.threads = out, workers, threads

    def carry_out(self, waiting: Sequence[Run], tell: Tell) -> None:
        """See `Engine`. On KeyboardInterrupt the workers are ended; their runs go on at the next call."""
        todo: queue.SimpleQueue[Run] = queue.SimpleQueue()
        events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        for run in waiting:
            todo.put(run)
        count = min(self.workers, len(waiting))
        hands = [_Hand(self.out / f"worker-{n}.log", self.threads, todo, events) for n in range(1, count + 1)]
        try:
            for hand in hands:
                hand.start()
            left = count
            while left:
                event = events.get()
                if event is None:
                    left -= 1
                else:
                    tell(event)
        finally:
            for hand in hands:
                hand.end()


class _Hand(threading.Thread):
    """Keeps one worker process at work; starts another where it has died."""

    def __init__(
        self, log: Path, threads: int, todo: queue.SimpleQueue[Run], events: queue.SimpleQueue[Event | None]
    ) -> None:
        super().__init__(daemon=True)
        self.log, self.threads, self.todo, self.events = log, threads, todo, events
        self.process: subprocess.Popen[str] | None = None
        self.ended = False

    def run(self) -> None:
        """Take runs until there are none."""
        try:
            while not self.ended:
                run = self.todo.get_nowait()
                try:
                    self._one(run)
                except OSError as error:  # no process can be started
                    self.events.put(Event(run, "failed", str(error)))
        except queue.Empty:
            pass
        finally:
            self.events.put(None)

    def _one(self, run: Run) -> None:
        for attempt in range(RETRIES + 1):
            last = self._answers(run)
            if "done" in last or self.ended:
                self.events.put(Event(run, "done"))
                return
            if "failed" in last:
                self.events.put(Event(run, "failed", last["failed"]))
                return
            again = "taken up again" if attempt < RETRIES else f"given up after {RETRIES + 1} tries"
            text = f"its worker has died ({last['died']}): {again}; see {self.log}"
            self.events.put(Event(run, "died" if attempt < RETRIES else "failed", text))

    def _answers(self, run: Run) -> dict[str, Any]:
        """Give a run to the process; its last answer, or {"died": how}."""
        process = self.process if self.process and self.process.poll() is None else self._new_process()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(
                json.dumps({"settings": run.experiment.to_dict(), "threads": self.threads}) + "\n"
            )
            process.stdin.flush()
            for line in process.stdout:
                answer: dict[str, Any] = json.loads(line)
                if "said" not in answer:
                    return answer
                self.events.put(Event(run, "said", answer["said"]))
        except (OSError, ValueError):
            pass  # it died within a line, or before it was asked
        code = process.wait()
        with contextlib.suppress(OSError):  # what was still to be written has no reader
            process.communicate()
        return {"died": f"signal {-code}" if code < 0 else f"exit code {code}"}

    def _new_process(self) -> subprocess.Popen[str]:
        with self.log.open("a", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "attninject.evidence.sweep_worker"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                env={**os.environ, **environment(self.threads)}, start_new_session=True,
            )  # fmt: skip
        return self.process

    def end(self) -> None:
        """End the process, and with it the thread: a run at work may write its checkpoint first."""
        self.ended = True
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
        self.join(PATIENCE)
        while self.is_alive():  # it may have started another process meanwhile
            if self.process is not None:
                self.process.kill()
            self.join(0.1)
        if self.process is not None:
            self.process.kill()
            with contextlib.suppress(OSError, ValueError):  # closed where it has died
                self.process.communicate()


# --- Slurm -------------------------------------------------------------------------------------


class Slurm:
    """Writes `sweep.sbatch`, an array of one task for each run; starting it is the user's."""

    def __init__(self, out: Path, workers: int = 1, threads: int = 1) -> None:
        self.out, self.workers, self.threads = out, workers, threads

    def carry_out(self, waiting: Sequence[Run], tell: Tell) -> None:
        """Write the settings of each run, the list of their folders, and the script."""
        for run in waiting:
            run.folder.mkdir(parents=True, exist_ok=True)
            if not (run.folder / runs.CHECKPOINT).exists():
                _write(run.folder / runs.SETTINGS, json.dumps(run.experiment.to_dict(), indent=2) + "\n")
        _write(self.out / "runs.txt", "".join(f"{run.folder.resolve()}\n" for run in waiting))
        _write(self.out / "sweep.sbatch", self.script(len(waiting)))

    def script(self, count: int) -> str:
        """The script: each task carries one run out, or on, by `attninject finetune` alone."""
        out = self.out.resolve()
        own = "".join(f" --plugin {shlex.quote(str(file))}" for file in plugins.files())
        return f"""\
#!/bin/bash
#SBATCH --job-name=attninject-sweep
#SBATCH --array=1-{count}%{self.workers}
#SBATCH --cpus-per-task={self.threads}
#SBATCH --requeue
#SBATCH --output={out}/slurm-%A-%a.log
# partition, time and GPUs are your cluster's: add #SBATCH lines, or give them to sbatch
set -euo pipefail
export OMP_NUM_THREADS={self.threads}
cd {shlex.quote(os.getcwd())}
run=$(sed -n "${{SLURM_ARRAY_TASK_ID}}p" {shlex.quote(f"{out}/runs.txt")})
resume=()  # empty, it is unset to an old bash
if [ -e "$run/{runs.CHECKPOINT}" ] || [ -e "$run/{runs.PREVIOUS}" ]; then resume=(--resume); fi
set -- finetune "$run/{runs.SETTINGS}" --out "$run" ${{resume[@]+"${{resume[@]}}"}}
{shlex.quote(sys.executable)} -m attninject "$@"{own}
"""


def _write(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


# --- Ray ---------------------------------------------------------------------------------------


class Ray:
    """Tasks of Ray on this machine, or on the cluster that RAY_ADDRESS names; the folder must be seen from all of it.

    Core tasks, not Tune: arms that are stopped early cannot be compared with those that are not.
    """

    def __init__(
        self, workers: int | None = None, threads: int = 1, *, cpus: float = 1, gpus: float = 0
    ) -> None:
        self.workers, self.threads, self.cpus, self.gpus = workers, threads, cpus, gpus

    def carry_out(self, waiting: Sequence[Run], tell: Tell) -> None:
        """See `Engine`: a task whose worker dies is run again by Ray, and goes on from the run's checkpoint."""
        ray = self._connected()
        try:
            task = ray.remote(max_retries=RETRIES, num_cpus=self.cpus, num_gpus=self.gpus)(_ray_task)
            todo = list(reversed(waiting))
            limit = self.workers or len(waiting)
            running: dict[Any, Run] = {}
            while todo or running:
                while todo and len(running) < limit:
                    run = todo.pop()
                    running[task.remote(run.experiment.to_dict(), self.threads)] = run
                done, _ = ray.wait(list(running), num_returns=1)
                self._tell_of(ray, done[0], running.pop(done[0]), tell)
        finally:
            ray.shutdown()

    def _tell_of(self, ray: Any, reference: Any, run: Run, tell: Tell) -> None:
        try:
            failed = ray.get(reference)
        except ray.exceptions.RayError as error:
            failed = " ".join(str(error).split())
        tell(Event(run, "failed", failed) if failed else Event(run, "done"))

    def _connected(self) -> Any:
        try:
            import ray
        except ImportError as error:
            raise MissingPackageError(
                'the engine "ray" needs Ray: pip install "attninject[sweep]"; --engine local needs nothing'
            ) from error
        address = os.environ.get("RAY_ADDRESS")
        size = {} if address else {"num_cpus": (self.workers or os.cpu_count() or 1) * self.cpus}
        env = {"env_vars": environment(self.threads)}
        try:
            _knock(address)
            ray.init(address=address, runtime_env=env, log_to_driver=False, include_dashboard=False, **size)
        except (ConnectionError, OSError, RuntimeError, ValueError) as error:
            where = f"Ray's cluster at RAY_ADDRESS={address}" if address else "Ray on this machine"
            raise RunError(
                f"{where} cannot be reached ({str(error).partition(chr(10))[0]}); start it (ray start --head), unset "
                f"RAY_ADDRESS for this machine alone, or take --engine local: runs go on from where they are"
            ) from error
        return ray


def _knock(address: str | None) -> None:
    """OSError where nobody listens at host:port: Ray itself would go on asking for minutes."""
    host, colon, port = (address or "").rpartition("://")[2].rpartition(":")
    if colon and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def _ray_task(settings: dict[str, Any], threads: int) -> str:
    """One run in a process of Ray's; "" or why it failed."""
    from attninject.errors import AttnInjectError
    from attninject.evidence.sweep_runs import carry_on

    try:
        plugins.load_inherited()
        carry_on(settings, threads, lambda text: None)
    except (AttnInjectError, OSError, RuntimeError) as error:
        return " ".join(str(error).split()) or type(error).__name__
    return ""
