"""All that training changes: what a checkpoint must hold so that a run goes on as if it had not stopped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attninject.errors import CheckpointError

from .learner import Learner
from .log_columns import renamed
from .optimizer_state import load_optimizer_state, optimizer_state


@dataclass
class RunState:
    """Counters and the log of a run, and through its learner weights, average, optimizer and scaler.

    Generators are not among it: what is random depends on the counters alone.
    """

    learner: Learner
    epoch: int = 0  # finished epochs
    batch: int = 0  # steps done in this one
    step: int = 0  # steps in all
    loss_sum: float = 0.0  # of this epoch, over all processes
    skipped: int = 0  # unreadable images of this epoch, over all processes
    history: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def end_epoch(self) -> None:
        """Count an epoch as finished and begin the next one's sums."""
        self.epoch, self.batch, self.loss_sum, self.skipped = self.epoch + 1, 0, 0.0, 0

    def state_dict(self) -> dict[str, Any]:
        """Whole tensors by `model.…`, `ema.…`, `optimizer.…` and `group.…`; the rest is plain JSON.

        Every process must ask for it, as what is sharded is put together here.
        """
        nets, scaler = self.learner.nets, self._scaler()
        tensors = {f"model.{k}": t for k, t in nets.model.state_dict().items()}
        if nets.average is not None:
            tensors |= {f"ema.{k}": t for k, t in nets.average.state_dict().items()}
        of_optimizer, numbers = optimizer_state(
            self.learner.optimizer, self.learner.held(), self.learner.train.optimizer
        )
        return {
            **tensors, **of_optimizer, "optimizer": numbers,
            "scaler": scaler.state_dict() if scaler else None,
            "epoch": self.epoch, "batch": self.batch, "step": self.step,
            "loss_sum": self.loss_sum, "skipped": self.skipped,
            "history": self.history, "best": self.best, "warnings": self.warnings,
            "alive": sorted(self.learner.watch.alive),
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any], source: Path) -> None:
        """Take all of it over; the optimizer must have its groups already. Other keys are passed over.

        Raises:
            CheckpointError: it is of another model or optimizer; `source` is where it came from.
        """
        nets, scaler = self.learner.nets, self._scaler()
        tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
        self.epoch, self.batch, self.step = state["epoch"], state["batch"], state["step"]
        self.loss_sum, self.skipped = state["loss_sum"], state["skipped"]
        self.history = [renamed(row) for row in state["history"]]
        self.best, self.warnings = renamed(state["best"]), state["warnings"]
        self.learner.watch.alive = set(state["alive"])
        _fill(nets.model, "model.", tensors, source)
        if nets.average is not None:
            _fill(nets.average, "ema.", tensors, source)
        nets.spread()
        load_optimizer_state(self.learner.optimizer, self.learner.held(), tensors, state["optimizer"])
        if scaler and state["scaler"]:
            scaler.load_state_dict(state["scaler"])
        self.learner.advance(self.epoch, self.batch)

    def _scaler(self) -> Any:
        """The scaler of fp16's gradients, where there is one."""
        return getattr(self.learner.accelerator, "scaler", None)


def _fill(model: nn.Module, prefix: str, tensors: Mapping[str, Tensor], source: Path) -> None:
    """Copy a checkpoint's tensors into a model's own, every key and shape compared."""
    held = model.state_dict()
    saved = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
    odd = [k for k in {**held, **saved} if k not in held or k not in saved or held[k].shape != saved[k].shape]
    if odd:
        raise CheckpointError(
            f"the checkpoint in {source} is of another model: {len(odd)} tensors differ ({odd[0]})"
        )
    with torch.no_grad():
        for key, tensor in held.items():
            tensor.copy_(saved[key])
