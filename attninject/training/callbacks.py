"""What a run tells while it goes: lines to the logger `attninject`, and lines, steps and epochs to callbacks."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from attninject.errors import ExperimentError, Fault

from .job import Result

LOG = logging.getLogger("attninject")


class Callback:
    """What is called in the course of a run, in its first process; override what you need.

    An error that is raised here ends the run, whose last checkpoint stays.
    """

    def on_line(self, text: str) -> None:
        """A line of progress, the same that goes to the logger `attninject`."""

    def on_step(self, step: int, loss: float) -> None:
        """An optimizer step was taken, the `step`-th of the run; its training loss."""

    def on_epoch(self, row: Mapping[str, Any]) -> None:
        """An epoch was measured; its row of the log. Epoch 0 is the model before training."""

    def on_end(self, result: Result) -> None:
        """The run is through; not called where it was interrupted."""


class Lines(Callback):
    """Hands the lines of a run to a function."""

    def __init__(self, say: Callable[[str], Any]) -> None:
        self.say = say

    def on_line(self, text: str) -> None:
        """A line of progress."""
        self.say(text)


def with_say(callbacks: Sequence[Callback], say: Callable[[str], Any] | None) -> list[Callback]:
    """The callbacks, and what was given under the word of former days.

    Raises:
        ExperimentError: something that is no `Callback`.
    """
    for one in callbacks:
        if not isinstance(one, Callback):
            raise ExperimentError([Fault(f"callbacks are instances of ai.training.Callback, found {one!r}")])
    if say is None:
        return list(callbacks)
    warnings.warn(
        "`say` is deprecated: give `callbacks`, with `on_line`, or listen to the logger `attninject`",
        DeprecationWarning,
        stacklevel=3,
    )
    return [*callbacks, Lines(say)]


@contextmanager
def spoken() -> Iterator[None]:
    """Lines of the logger are printed for a while, unless somebody has set up logging.

    `logging.getLogger("attninject").setLevel("WARNING")` leaves only warnings.
    """
    with nullcontext() if LOG.hasHandlers() else printed():
        yield


@contextmanager
def printed(quiet: bool = False) -> Iterator[None]:
    """The logger's lines on standard output for a while, or nowhere, whatever logging is set up."""
    handler = logging.NullHandler() if quiet else _Printer()
    before = LOG.level, LOG.propagate
    LOG.addHandler(handler)
    LOG.propagate = False
    if LOG.level == logging.NOTSET:
        LOG.setLevel(logging.INFO)
    try:
        yield
    finally:
        LOG.removeHandler(handler)
        LOG.setLevel(before[0])
        LOG.propagate = before[1]


class _Printer(logging.Handler):
    """Print at once, before what a progress bar writes to standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        print(record.getMessage(), flush=True)
