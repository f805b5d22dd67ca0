"""A run tried on a copy of its model: what it would cost, and which learning rate suits it."""

from __future__ import annotations

import copy
import csv
import io
import itertools
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attninject.errors import RunError
from attninject.inspection import Learning

from . import devices
from .data.loaders import batches
from .data.seeds import seed_all
from .freezing import trainable
from .job import Job
from .loop import Run
from .measuring import evaluate
from .reporting import Reporter
from .run_files import RunFiles
from .tracking import plan_of

MEASURED = 3
"""Steps whose time is taken, after one that warms up."""


@contextmanager
def on_a_copy(job: Job) -> Iterator[Run]:
    """A run of one process that writes nothing and trains a copy of the model, made ready.

    Raises:
        RunError: the model cannot be copied, or there are several processes.
    """
    accelerator = devices.open_accelerator(job.train)
    try:
        if accelerator.num_processes > 1:
            raise RunError(
                "what a run would do is tried in one process: start it without torchrun or accelerate"
            )
        try:
            model = copy.deepcopy(job.model)
        except Exception as error:  # what a class of the caller's raises when it is copied
            raise RunError(f"the model cannot be copied, to be tried: {error}") from error
        tried = replace(job, model=model, out=None)
        with devices.deterministic():
            run = Run(tried, accelerator, RunFiles(tried, True), Reporter(main=False))
            run.thaw(0)
            run.learner.nets.net.train()
            yield run
    finally:
        devices.forget_accelerator()


def _steps(run: Run) -> Iterator[float]:
    """The loss of one step after another, over as many epochs as are asked for."""
    step = 0
    for epoch in itertools.count():
        run.loaders.order.at(epoch)
        coming = batches(run.loaders.train)
        for _ in range(run.loaders.steps):
            seed_all(run.train.seed, 1, step, 0)
            loss, _ = run.learner.backward([next(coming) for _ in range(run.train.accumulate)])
            yield loss
            run.learner.update()
            step += 1


# --- what it would cost -------------------------------------------------------------------------


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
    with on_a_copy(job) as run:
        on_gpu = run.accelerator.device.type == "cuda"
        held = 0 if on_gpu else _saved_for_backward(run)
        step = _median_of_steps(run)
        memory = _memory(run, held)
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
    for _ in itertools.islice(_steps(run), MEASURED + 2):  # a step's update comes with the next one's loss
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


def _memory(run: Run, activations: int) -> dict[str, int]:
    if run.accelerator.device.type == "cuda":
        return {"peak": torch.cuda.max_memory_allocated()}
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


# --- which learning rate ------------------------------------------------------------------------

STEPS, LOW, HIGH = 100, 1e-7, 1.0
AROUND = 5
"""Steps to either side over which losses are averaged, and over which a fall is taken."""

DIVERGED = 4.0
"""The test ends where the mean of the last losses is so many times the least such mean: the rest is of no use."""


@dataclass(frozen=True)
class RateTest:
    """A learning-rate range test; `print` it.

    Attributes:
        rates: of `lr`, one step each; the other groups' rates kept their ratio to it.
        losses: of each step, as it came.
        smoothed: their mean over a few steps to either side.
        suggestion: where the mean falls most steeply over log lr; None: it never falls.
        ratios: group → its rate in times `lr`.
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...]
    suggestion: float | None
    ratios: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**vars(self)}

    def csv(self) -> str:
        """A row per step: rate, loss, mean."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["lr", "loss", "smoothed"])
        writer.writerows(zip(self.rates, self.losses, self.smoothed, strict=True))
        return text.getvalue()

    def draw(self, file: Path) -> None:
        """The losses over the rates, as a picture; the suffix says of what kind.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        axes.plot(self.rates, self.losses, ".", color="0.7", label="loss of a step")
        axes.plot(self.rates, self.smoothed, color="C0", label="mean over some steps")
        if self.suggestion is not None:
            axes.axvline(self.suggestion, color="C1", label=f"suggestion: {self.suggestion:.1e}")
        low, high = min(self.smoothed), max(self.smoothed)
        axes.set(
            xscale="log", xlabel="lr", ylabel="training loss", ylim=(low - 0.1 * (high - low), high + 0.1)
        )
        axes.legend()
        figure.savefig(file)

    def __str__(self) -> str:
        tried = f"{len(self.rates)} rates from {self.rates[0]:.0e} to {self.rates[-1]:.0e} were tried, a step each"
        if self.suggestion is None:
            return f"{tried}: the loss never fell, and there is nothing to suggest; look at the data and at `freeze`"
        others = ", ".join(
            f"{n} {self.suggestion * r:.1e}" for n, r in self.ratios.items() if r != 1 and "no decay" not in n
        )
        least = self.rates[min(range(len(self.smoothed)), key=self.smoothed.__getitem__)]
        return "\n".join([
            f"{tried}; the loss fell most steeply at lr {self.suggestion:.1e}: try --lr {self.suggestion:.1e}",
            *([f"the other groups keep their ratio to it: {others}"] if others else []),
            f"it was least at {least:.1e}; a rate near or above that is too high",
        ])  # fmt: skip


def try_rates(job: Job, steps: int = STEPS) -> RateTest:
    """The learning-rate range test of Smith (arXiv:1506.01186, section 3.3), on a copy of the model.

    Rates rise step by step, here by a factor (Smith: by a sum), without warm-up or schedule; the suggestion is where
    the mean of the losses falls most steeply over log lr.

    Raises:
        As `loop.carry_out`.
    """
    rates = [LOW * (HIGH / LOW) ** (i / (steps - 1)) for i in range(steps)]
    losses: list[float] = []
    with on_a_copy(job) as run:
        groups = [
            (g, g.get("initial_lr", g["lr"]) / run.train.lr) for g in run.learner.optimizer.param_groups
        ]
        least = math.inf
        for rate, loss in zip(rates, _steps(run), strict=False):
            losses.append(loss)
            now = statistics.fmean(losses[-AROUND:])
            least = min(least, now)
            if not now <= DIVERGED * least:  # too much, or not finite
                break
            for group, ratio in groups:  # for the update that follows
                group["lr"] = rate * ratio
    losses = list(itertools.takewhile(math.isfinite, losses))
    if len(losses) < 2 * AROUND:
        raise RunError(
            f"the loss has diverged after {len(losses)} steps, at rates near {LOW:g}: look at the data"
        )
    smoothed = _smoothed(losses)
    named = {group["name"]: ratio for group, ratio in groups}
    return RateTest(tuple(rates[: len(losses)]), tuple(losses), smoothed, _steepest(rates, smoothed), named)


def _smoothed(losses: Sequence[float]) -> tuple[float, ...]:
    """The mean of each loss with as many on its left as on its right, where there are so many."""
    last = len(losses) - 1
    sides = [min(AROUND, i, last - i) for i in range(len(losses))]
    return tuple(statistics.fmean(losses[i - n : i + n + 1]) for i, n in enumerate(sides))


def _steepest(rates: Sequence[float], smoothed: Sequence[float]) -> float | None:
    """The rate in the middle of the greatest fall, before the mean is least; None: it falls nowhere."""
    least = min(range(len(smoothed)), key=smoothed.__getitem__)
    falls = [
        (smoothed[i + AROUND] - smoothed[i - AROUND], rates[i]) for i in range(AROUND, least - AROUND + 1)
    ]
    fall, rate = min(falls, default=(0.0, 0.0))
    return rate if fall < 0 else None
