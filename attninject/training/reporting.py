"""What a run tells: lines or a progress bar, the CSV log, TensorBoard where that is installed."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from . import runs
from .log_columns import scalar_name

BOARD = "tensorboard"  # folder within the run's


class Reporter:
    """Speaks for the first process only; the others are silent."""

    def __init__(
        self, say: Callable[[str], None], folder: runs.Folder | None, main: bool, every: int
    ) -> None:
        self._say, self.folder, self.main, self.every = say, folder if main else None, main, every
        self._board: Any = None

    def say(self, text: str) -> None:
        """A line."""
        if self.main:
            self._say(text)

    def begin(self, step: int) -> None:
        """Open TensorBoard's file; what an interrupted run wrote beyond `step` is dropped from view."""
        writer = _writer_class() if self.folder else None
        if writer is not None:
            assert self.folder is not None
            self._board = writer(str(self.folder / BOARD), purge_step=step + 1)

    def row(self, history: Sequence[Mapping[str, Any]], epochs: int) -> None:
        """The last row of the history: a line, the CSV file, TensorBoard."""
        row = history[-1]
        if self.folder:
            self.folder.log(history)
        for key, value in row.items():
            if key not in ("epoch", "step"):
                self._scalar(key, value, row["step"])
        if self._board is not None:
            self._board.flush()
        trained = f"train loss {row['train_loss']:.4f}, " if "train_loss" in row else "before training: "
        self.say(f"epoch {row['epoch']}/{epochs}: {trained}validation loss {row['val_loss']:.4f}, "
                 f"top-1 {row['top1']:.2%}, top-5 {row['top5']:.2%}, {row['seconds']:.1f} s")  # fmt: skip

    def _scalar(self, key: str, value: float, step: int) -> None:
        if self._board is not None:
            self._board.add_scalar(re.sub(r"[^\w/.-]+", "_", scalar_name(key)), value, step)

    def end(self) -> None:
        """Close what is open."""
        if self._board is not None:
            self._board.close()
            self._board = None

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
                    if batch % self.every == 0:
                        self._scalar("step_loss", loss, step)

                yield show
            return

        def tell(batch: int, step: int, loss: float, speed: float) -> None:
            if batch % self.every == 0:
                self._scalar("step_loss", loss, step)
                self.say(f"{title}, step {batch}/{total}: loss {loss:.4f}, {speed:.0f} images/s")

        yield tell


def _writer_class() -> Any:
    """TensorBoard's writer, or None where it is not installed: it is nobody's requirement."""
    if importlib.util.find_spec("tensorboard") is None:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter
