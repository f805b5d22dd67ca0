"""`attninject bench finetune`: what blocks cost while fine-tuning, beside the same backbone without them.

Every step is one of the engine behind `attninject finetune` (`Run.one_step`: forward, loss, backward, clipping,
optimizer, average), on fixed random images. Three runs stand side by side: plain, with the recipe, and with
the recipe on a frozen backbone. On a CPU, times are CPU time of one thread and memory is the growth of the
process's high-water mark, in a process of its own for each run; on a GPU, wall time between synchronisations
and the allocator's peak.
"""

from __future__ import annotations

import gc
import json
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from attninject import api, models
from attninject.training import devices
from attninject.training.data.datasets import Images
from attninject.training.data.opening import open_images
from attninject.training.data.preprocessing import preprocessing_of
from attninject.training.experiment import settings
from attninject.training.freezing import trainable
from attninject.training.job import Job
from attninject.training.loop import Run
from attninject.training.reporting import Reporter
from attninject.training.run_files import RunFiles

from .measure import resident

CLASSES = 10
STEPS_ON_GPU = 10  # between two synchronisations


@dataclass(frozen=True)
class Task:
    """What is fine-tuned, and how."""

    model: str = "torchvision/resnet50"
    recipe: str | None = "cbam_resnet"
    batch_size: int = 8
    size: int = 96
    precision: str = "no"
    channels_last: bool = False
    compile: bool = False
    device: str = "auto"
    freeze: str | None = None

    @property
    def name(self) -> str:
        """As the table calls it."""
        if self.recipe is None:
            return "plain"
        return self.recipe + ("" if self.freeze is None else f", frozen {self.freeze}")


class Noise(Dataset[tuple[torch.Tensor, int]]):
    """As many random images as a batch takes."""

    classes = tuple(str(n) for n in range(CLASSES))

    def __init__(self, count: int, size: int) -> None:
        self.images = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], index % CLASSES


def finetune(task: Task, rounds: int = 5) -> dict[str, Any]:
    """Measure plain fine-tuning, the recipe, and the recipe on a frozen backbone, in turn."""
    tasks = [replace(task, recipe=None), task, replace(task, freeze="backbone")]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with devices.deterministic():  # as the engine
            steps = [Step(one) for one in tasks]
            on_gpu = steps[0].on_gpu
            seconds = _interleaved(steps, rounds)
            shape = [(step.blocks, step.parameters, step.learning) for step in steps]
            del steps
            memory = [_peak_on_gpu(one) if on_gpu else _peak_in_child(one) for one in tasks]
    finally:
        devices.forget_accelerator()
        torch.set_num_threads(threads)
    rows = []
    for one, taken, peak, (blocks, parameters, learning) in zip(tasks, seconds, memory, shape, strict=True):
        pairs = [mine / theirs for mine, theirs in zip(taken, seconds[0], strict=True)]
        middle = statistics.median(taken)
        rows.append(
            {
                "name": one.name,
                "blocks": blocks,
                "parameters": parameters,
                "learning": learning,
                "seconds_per_step": middle,
                "images_per_second": one.batch_size / middle,
                "throughput_of_plain": 1 / statistics.median(pairs),
                "peak_bytes": peak,
                "peak_of_plain": peak / memory[0],
            }
        )
    machine = {"torch": torch.__version__, "python": platform.python_version(), "rounds": rounds,
               "device": torch.cuda.get_device_name() if on_gpu else "cpu, one thread"}  # fmt: skip
    return {"machine": machine, "task": asdict(task), "rows": rows}


# --- one run ------------------------------------------------------------------------------------


class Step:
    """One step of the engine, ready to be taken again and again."""

    def __init__(self, task: Task, folder: Path | None = None, workers: int = 0) -> None:
        """`folder`: of images, read by so many loader processes; None: as many random ones as a batch takes."""
        self.task = task
        names = ("batch_size", "precision", "channels_last", "compile", "device", "freeze")
        kind = "digits" if folder is None else {"kind": str(folder), "size": task.size, "workers": workers}
        data, train = settings(kind, epochs=1, **{name: getattr(task, name) for name in names})
        noise = Noise(task.batch_size, task.size)
        images = Images(noise, noise, noise.classes) if folder is None else open_images(data)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = models.build(task.model, num_classes=len(images.classes))
            if task.recipe is not None:
                api.inject(model, task.recipe)
        job = Job(model, images, data, train, None if folder is None else preprocessing_of(model, data))
        self.run = Run(job, devices.open_accelerator(train), RunFiles(job, True), Reporter(main=False))
        self.run.learner.nets.net.train()
        self.batch: Any = next(iter(self.run.loaders.train)) if folder is None else None
        self.on_gpu = self.run.accelerator.device.type == "cuda"
        self.blocks, self.learning = len(api.injected(model)), trainable(model)
        self.parameters = sum(p.numel() for p in model.parameters())

    def take(self, count: int = 1, batch: Any = None) -> None:
        """So many steps on a batch, by default the step's own; done when this returns."""
        for _ in range(count):
            self.run.one_step([self.batch if batch is None else batch])
        if self.on_gpu:
            torch.cuda.synchronize()


def _interleaved(steps: list[Step], rounds: int) -> list[list[float]]:
    """Seconds per step of each, in turn; the first two rounds (kernels, compilation) are not counted."""
    count = STEPS_ON_GPU if steps[0].on_gpu else 1
    clock = time.perf_counter if steps[0].on_gpu else time.process_time
    taken: list[list[float]] = [[] for _ in steps]
    for number in range(rounds + 2):
        for step, times in zip(steps, taken, strict=True):
            gc.collect()
            began = clock()
            step.take(count)
            if number > 1:
                times.append((clock() - began) / count)
    return taken


# --- memory -------------------------------------------------------------------------------------


def _peak_on_gpu(task: Task) -> int:
    """The allocator's peak over three steps, weights and optimizer included."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    Step(task).take(3)
    return torch.cuda.max_memory_allocated()


def _peak_in_child(task: Task) -> int:
    code = (
        "import json, sys; from attninject.bench import finetuning as b; "
        "print(json.dumps(b.growth(b.Task(**json.loads(sys.argv[1])))))"
    )
    command = [sys.executable, "-c", code, json.dumps(asdict(task))]
    made: int = json.loads(
        subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
    )
    return made


def growth(task: Task) -> int:
    """Bytes by which three steps raise this process's high-water mark; for a fresh process."""
    torch.set_num_threads(1)
    step = Step(task)
    before = resident()["VmRSS"]
    step.take(3)
    return resident()["VmHWM"] - before


# --- words --------------------------------------------------------------------------------------


def to_markdown(result: dict[str, Any]) -> str:
    """The table."""
    machine, task = result["machine"], result["task"]
    said = [f"batch {task['batch_size']}", f"{task['size']}×{task['size']}", f"precision {task['precision']}"]
    said += [word for word in ("channels_last", "compile") if task[word]]
    lines = [
        f"Fine-tuning {task['model']} ({', '.join(said)}), torch {machine['torch']}, {machine['device']}; "
        f"medians of {machine['rounds']} interleaved rounds; random weights and images.",
        "",
        "| | blocks | parameters | learning | ms per step | images/s | throughput, of plain | peak, MiB | "
        "peak, of plain |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in result["rows"]:
        lines.append(
            f"| {row['name']} | {row['blocks']} | {row['parameters']:,} | {row['learning']} | "
            f"{row['seconds_per_step'] * 1e3:.1f} | {row['images_per_second']:.1f} | "
            f"{row['throughput_of_plain']:.3f} | {row['peak_bytes'] / 2**20:.0f} | {row['peak_of_plain']:.3f} |"
        )
    return "\n".join(lines)
