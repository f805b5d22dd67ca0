"""The networks of a run: the model, what of it learns (itself, or a sharded twin), wrappers, the average.

model     what the caller gave; whole, and what goes into files
net       what the optimizer moves: the model, or its FSDP2 twin
runner    what a training step calls: the net under DDP and torch.compile
average   of the weights (EMA), kept like the model and its net
"""

from __future__ import annotations

import contextlib
import copy
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from attninject.errors import ExperimentError, Fault
from attninject.surgery import change_history

from .devices import fsdp_asked_for
from .experiment import Training
from .freezing import follow
from .sharding import Twin, agree_on_buffers, local


class Nets:
    """Made once freezing, layout and norms are final; `wrap` anew whenever something is unfrozen."""

    def __init__(self, model: nn.Module, train: Training, accelerator: Any) -> None:
        self.model, self.train, self.accelerator = model, train, accelerator
        self.several = accelerator.num_processes > 1
        self.twin: Twin | None = None
        if self.several and fsdp_asked_for(train):
            self.twin = Twin(model, accelerator)
        else:
            model.to(accelerator.device)
            if train.channels_last:
                model.to(memory_format=torch.channels_last)
        self.net = self.twin.net if self.twin else model
        self._gathered: int | None = None
        self.ddp: Any = None
        self.runner: Any = self.net
        self.wrap()
        self.average: nn.Module | None = None
        self._average_twin: Twin | None = None
        self._ema: Any = None
        if train.ema is not None:  # after DDP, which gives all processes the weights of the first
            self._make_average(train.ema)

    def _make_average(self, decay: float) -> None:
        from timm.utils import ModelEmaV3

        if self.twin is None:
            self._ema = ModelEmaV3(self.model, decay=decay)
            self.average = self._ema.module
        else:
            self.average = copy.deepcopy(self.model).eval()
            self._average_twin = Twin(self.average, self.accelerator)

    @property
    def shipped(self) -> nn.Module:
        """What the run is for: the average where there is one."""
        return self.model if self.average is None else self.average

    @property
    def measured(self) -> nn.Module:
        """What is evaluated: the same, as it can be run."""
        if self._average_twin is not None:
            return self._average_twin.net
        return self.net if self.average is None else self.average

    def wrap(self) -> None:
        """DDP and torch.compile around the net."""
        runner: Any = self.net
        if self.several and self.twin is None:
            on_gpu = self.accelerator.device.type == "cuda"
            runner = nn.parallel.DistributedDataParallel(
                runner, device_ids=[self.accelerator.device.index] if on_gpu else None
            )
        self.ddp = None if runner is self.net else runner
        self.runner = torch.compile(runner) if self.train.compile else runner

    @property
    def manner(self) -> str:
        """How the processes share the work, for a line; empty for one."""
        if not self.several:
            return ""
        shared = "DDP" if self.twin is None else f"FSDP2 in {self.twin.units + 1} units"
        return f"; {self.accelerator.num_processes} processes, {shared}"

    @property
    def evaluator(self) -> Any:
        """What evaluation calls: without DDP, compiled where that is what trains."""
        compiled = self.train.compile and self.ddp is None and self.average is None
        return self.runner if compiled else self.measured

    def backward_of(self, number: int, count: int) -> AbstractContextManager[Any]:
        """Around forward and backward `number` of `count`: gradients are reduced with the last one only."""
        last = number == count
        if self.twin is not None:
            self.twin.sync(last)
        elif self.ddp is not None and not last:
            later: AbstractContextManager[Any] = self.ddp.no_sync()
            return later
        return contextlib.nullcontext()

    def settle(self) -> None:
        """After an evaluation: free what it gathered."""
        for twin in (self.twin, self._average_twin):
            if twin is not None:
                twin.settle()

    def thawed(self) -> None:
        """The model was unfrozen in part: twin and average follow, DDP counts anew."""
        if self.twin is not None:
            self.twin.thaw()
        if self.average is not None:  # what ships must know that this part is no longer the base's
            follow(self.model, self.average)
        self.wrap()

    @torch.no_grad()
    def update_average(self) -> None:
        """Move the average towards the net's weights, piece by piece where they are in pieces."""
        if self._ema is not None:
            self._ema.update(self.net)
        elif self._average_twin is not None:
            assert self.train.ema is not None
            theirs, ours = self._average_twin.net.state_dict(), self.net.state_dict()
            for mean, new in zip(theirs.values(), ours.values(), strict=True):
                if mean.is_floating_point():
                    local(mean).lerp_(local(new).to(mean.dtype), 1 - self.train.ema)
                else:
                    local(mean).copy_(local(new))

    def gather(self, step: int) -> None:
        """Make `model` and `average` what they are at this step, alike on every process."""
        if not self.several or self._gathered == step:
            return
        for twin, plain in ((self.twin, self.model), (self._average_twin, self.average)):
            if twin is not None:
                twin.gather()
            elif plain is not None:
                agree_on_buffers(plain)
        self._gathered = step

    def spread(self) -> None:
        """After `model` and `average` were filled: the twins follow."""
        for twin in (self.twin, self._average_twin):
            if twin is not None:
                twin.spread()


def with_shared_norms(model: nn.Module, train: Training, accelerator: Any) -> nn.Module:
    """The model with SyncBatchNorm where that is asked for: new modules, so before anything is frozen."""
    if train.sync_bn and accelerator.num_processes > 1:
        if accelerator.device.type == "cpu":
            raise ExperimentError([Fault("train, sync_bn: torch's SyncBatchNorm runs on GPUs only")])
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        change_history.remember(model)  # the converted norms are new modules, as yet unchanged
    return model


def placed(x: Tensor, train: Training, device: torch.device) -> Tensor:
    """A batch on the device, in the memory format of the run."""
    x = x.to(device, non_blocking=True)
    return x.contiguous(memory_format=torch.channels_last) if train.channels_last else x
