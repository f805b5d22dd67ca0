"""Which learning rate suits a run: a range test on a copy of its model."""

from __future__ import annotations

import csv
import io
import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attninject.errors import RunError

from .job import Job
from .trial import on_a_copy, steps_of

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
        for rate, loss in zip(rates, steps_of(run), strict=False):
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
