"""What goes into a run, and what comes out of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from attninject.errors import ExperimentError, Fault

from .data.datasets import Images
from .data.preprocessing import Preprocessing
from .experiment import Data, Experiment, Training
from .monitors import Monitor, monitor_of


@dataclass(frozen=True, eq=False)
class Job:
    """A model, images, and the settings of one run."""

    model: nn.Module  # trained in place
    images: Images
    data: Data
    train: Training
    preprocessing: Preprocessing | None = None  # None: the images are tensors, ready as they are
    out: Path | None = None  # None: nothing is written
    base: str | None = None  # the base model's name, for the delta
    experiment: Experiment | None = None  # where the run was asked for by one

    def __post_init__(self) -> None:
        """Refuse settings that do not go with such images.

        Raises:
            ExperimentError: a figure that they do not give, or mixing where it is not to be had.
        """
        monitor_of(self.train.monitor, self.images.many)
        if self.images.many and (self.train.mixup or self.train.cutmix):
            raise ExperimentError(
                [Fault("train, mixup and cutmix: they mix images of one class each, not of several labels")]
            )

    @property
    def monitor(self) -> Monitor:
        """What the best epoch is best in."""
        return monitor_of(self.train.monitor, self.images.many)


@dataclass
class Result:
    """What a run leaves: a row per epoch (0: before training), the best, the evaluated model, warnings."""

    model: nn.Module
    history: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    out: Path | None = None
    main: bool = True  # whether this process is the one that writes
