"""What a run tells: lines or a progress bar, the CSV log, its trackers, and callbacks."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from . import runs
from .callbacks import LOG, Callback
from .job import Result
from .monitors import shown
from .tracking import Trackers


class Reporter:
    """Speaks for the first process only; the others are silent."""

    def __init__(
        self,
        callbacks: Sequence[Callback] = (),
        folder: runs.Folder | None = None,
        main: bool = True,
        every: int = 1,
        trackers: Trackers | None = None,
    ) -> None:
        self.callbacks, self.folder = (callbacks, folder) if main else ((), None)
        self.main, self.every = main, every
        self.trackers = trackers or Trackers(())

    def say(self, text: str, level: int = logging.INFO) -> None:
        """A line."""
        if self.main:
            LOG.log(level, text)
            for callback in self.callbacks:
                callback.on_line(text)

    def warn(self, text: str) -> None:
        """A line that stands out."""
        self.say(f"warning: {text}", logging.WARNING)

    def row(self, history: Sequence[Mapping[str, Any]], epochs: int, gates: Mapping[str, float]) -> None:
        """The last row of the history: a line, the CSV file, trackers (with what they say of gates), callbacks."""
        row = history[-1]
        if self.folder:
            self.folder.log(history)
        self._track({k: v for k, v in row.items() if k not in ("epoch", "step")} | {**gates}, row["step"])
        trained = f"train loss {row['train_loss']:.4f}, " if "train_loss" in row else "before training: "
        self.say(f"epoch {row['epoch']}/{epochs}: {trained}{shown(row)}, {row['seconds']:.1f} s")
        for callback in self.callbacks:
            callback.on_epoch(row)

    def end(self, result: Result) -> None:
        """The run is through."""
        for callback in self.callbacks:
            callback.on_end(result)

    def _track(self, values: Mapping[str, float], step: int) -> None:
        for failure in self.trackers.log(values, step):
            self.warn(failure)

    @contextmanager
    def progress(
        self, title: str, done: int, total: int
    ) -> Iterator[Callable[[int, int, float, float], None]]:
        """Call with (step of the epoch, step in all, loss, images per second): a bar in a terminal, else lines."""
        if self.main and sys.stderr.isatty():
            from tqdm import tqdm

            with tqdm(total=total, initial=done, desc=title, unit="step", leave=False) as bar:

                def show(batch: int, step: int, loss: float, speed: float) -> None:
                    bar.update()
                    bar.set_postfix(loss=f"{loss:.3f}", images=f"{speed:.0f}/s")
                    self._step(batch, step, loss)

                yield show
            return

        def tell(batch: int, step: int, loss: float, speed: float) -> None:
            if self._step(batch, step, loss):
                self.say(f"{title}, step {batch}/{total}: loss {loss:.4f}, {speed:.0f} images/s")

        yield tell

    def _step(self, batch: int, step: int, loss: float) -> bool:
        """Tell callbacks of a step, and trackers of every so-manieth of an epoch; whether it is one."""
        for callback in self.callbacks:
            callback.on_step(step, loss)
        now = batch % self.every == 0
        if now:
            self._track({"step_loss": loss}, step)
        return now
