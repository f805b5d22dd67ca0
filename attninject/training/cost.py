"""What a run would do and take: its plan, parameters, steps, time and memory, from a few steps on a copy."""

from __future__ import annotations

import itertools
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attninject.inspection import Learning

from .data.loaders import batches
from .freezing import trainable
from .job import Job
from .loop import Run
from .measuring import evaluate
from .tracking import plan_of
from .trial import on_a_copy, steps_of

MEASURED = 3
"""Steps whose time is taken, after one that warms up."""


@dataclass(frozen=True)
class DryRun:
    """What a run would do and take; `print` it.

    Attributes:
        plan: the injected blocks, as a table in Markdown.
        learning: parameters that learn in the first epoch, of all.
        images: of training and of validation.
        classes: how many.
        epochs, steps: epochs, and steps of each.
        step_seconds: of a step, with reading its images: the median of some that were taken.
        epoch_seconds, seconds: of an epoch with its validation, and of the run.
        memory: bytes by what they are for; on a GPU `peak` alone, as its allocator says.
        how: how time and memory were found.
    """

    plan: str
    learning: Learning
    images: tuple[int, int]
    classes: int
    epochs: int
    steps: int
    step_seconds: float
    epoch_seconds: float
    seconds: float
    memory: dict[str, int]
    how: str

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        counts = {"learning": self.learning.learning, "total": self.learning.total}
        return {**vars(self), **counts, "images": list(self.images)}

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {_mib(size)}" for name, size in self.memory.items())
        return "\n".join([
            self.plan, "",
            f"{self.learning} parameters learn; {self.classes} classes, {self.images[0]} training and "
            f"{self.images[1]} validation images",
            f"{self.epochs} epochs of {self.steps} steps, {self.step_seconds:.3g} s each; about "
            f"{_duration(self.epoch_seconds)} for an epoch, {_duration(self.seconds)} in all",
            f"memory: about {_mib(sum(self.memory.values()))} ({parts})",
            self.how,
        ])  # fmt: skip


def estimate(job: Job) -> DryRun:
    """Take a few steps and two batches of validation on a copy of the model, and reckon up the run.

    Raises:
        As `loop.carry_out`.
    """
    elsewhere = _forget_peak()
    with on_a_copy(job) as run:
        on_gpu = run.accelerator.device.type == "cuda"
        held = 0 if on_gpu else _saved_for_backward(run)
        step = _median_of_steps(run)
        memory = {"peak": torch.cuda.max_memory_allocated() - elsewhere} if on_gpu else _memory(run, held)
        val = _seconds_of_validation(run)
        epochs, steps = run.train.epochs, run.loaders.steps
        learning, images = trainable(run.learner.nets.model), run.job.images
    epoch = steps * step + val
    counted = "the peak of the GPU's allocator" if on_gpu else "counted tensors, not what Python itself takes"
    how = (
        f"time: the median of {MEASURED} steps, and up to two validation batches, with reading, on a copy of the "
        f"model; memory: {counted}"
    )
    if job.train.unfreeze:
        how += "; what is unfrozen later is not in it"
    return DryRun(
        plan_of(job.model), learning, (len(images.train), len(images.val)), len(images.classes), epochs, steps, step,
        epoch, epochs * epoch + val, memory, how,
    )  # fmt: skip


def _median_of_steps(run: Run) -> float:
    taken, began = [], time.perf_counter()
    for _ in itertools.islice(steps_of(run), MEASURED + 2):  # a step's update comes with the next one's loss
        if run.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - began)
        began = time.perf_counter()
    return statistics.median(taken[2:])


def _seconds_of_validation(run: Run) -> float:
    """Of all its batches, from the first two."""
    nets, count = run.learner.nets, len(run.loaders.val)
    nets.measured.eval()
    some, began = min(2, count), time.perf_counter()
    held = itertools.islice(batches(run.loaders.val), some)
    evaluate(nets.evaluator, held, run.learner.placed, run.accelerator, run.job.images.classes)
    return (time.perf_counter() - began) / some * count


def _saved_for_backward(run: Run) -> int:
    """Bytes that one forward keeps for its backward, parameters not among them."""
    own = {p.untyped_storage().data_ptr() for p in run.learner.nets.model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = run.learner.placed(next(batches(run.loaders.train))[0])
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), run.accelerator.autocast():
        logits = run.learner.nets.runner(x)
    del logits
    return sum(kept.values()) + x.nbytes


def _forget_peak() -> int:
    """What was done on a GPU before is not the trial's; bytes that are held there now."""
    if not torch.cuda.is_initialized():
        return 0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _memory(run: Run, activations: int) -> dict[str, int]:
    nets = run.learner.nets
    state = [v for s in run.learner.optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
    averaged = 0 if nets.average is None else _weights(nets.average)
    return {
        "weights": _weights(nets.model) + averaged,
        "gradients": sum(p.nbytes for p in nets.model.parameters() if p.requires_grad),
        "optimizer": sum(t.nbytes for t in state),
        "activations": activations,
    }


def _weights(model: nn.Module) -> int:
    return sum(t.nbytes for t in itertools.chain(model.parameters(), model.buffers()))


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB" if size >= 10 * 2**20 else f"{size / 2**20:.2g} MiB"


def _duration(seconds: float) -> str:
    """12.3 s, 4 min 10 s, 2 h 05 min."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
