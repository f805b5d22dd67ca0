"""What learns in a run: nets, optimizer, schedule and loss, and the two halves of a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from attninject.errors import ExperimentError, Fault

from . import factories
from .data.datasets import Images
from .dead_gates import Watch
from .experiment import Training
from .freezing import GradualUnfreezing, freeze
from .groups import extend_optimizer
from .measuring import check_classes
from .nets import Nets, placed


def frozen(model: nn.Module, train: Training) -> GradualUnfreezing:
    """Freeze what the settings say; returns what unfreezes it again, epoch by epoch.

    Raises:
        ExperimentError: nothing is left to learn.
        NoMatchError, NoHeadError: see `freeze`.
    """
    # without `freeze` nothing is frozen, but a head that was named is remembered
    freeze(model, () if train.freeze is None else train.freeze, bn=train.bn, head=train.head)
    due: dict[int, list[str | int]] = {}
    for epoch, what in train.unfreeze:
        due.setdefault(epoch - 1, []).extend([what] if isinstance(what, str | int) else what)
    thawing = GradualUnfreezing(model, due)
    if not any(p.requires_grad for p in model.parameters()):
        raise ExperimentError([Fault("everything is frozen: nothing would learn")])
    return thawing


class Learner:
    """Made once the model is frozen as it should begin; `steps` are those of one epoch."""

    def __init__(
        self,
        model: nn.Module,
        train: Training,
        thawing: GradualUnfreezing,
        accelerator: Any,
        images: Images,
        steps: int,
    ) -> None:
        self.train, self.thawing, self.accelerator = train, thawing, accelerator
        self.classes, self.steps = len(images.classes), steps
        self.nets = Nets(model, train, accelerator)
        self.names = {id(p): n for n, p in self.nets.net.named_parameters()}
        self.optimizer = factories.make_optimizer(self.nets.net, train)
        self.prepared: Any = accelerator.prepare_optimizer(self.optimizer)  # scales gradients of fp16
        self._schedule(0)
        self.criterion, self.mixup = factories.make_loss(train, images)
        self.criterion.to(accelerator.device)
        self.watch = Watch()

    def _schedule(self, epoch: int) -> None:
        """The schedule over all groups that the optimizer has by now, as it stands when an epoch begins."""
        self.scheduler = factories.make_scheduler(self.optimizer, self.train, self.steps)
        self.advance(epoch, 0)

    def thaw(self, epoch: int) -> list[str] | None:
        """Unfreeze what is due; its parameters join the optimizer.

        Returns:
            Names of the groups that were added; None: nothing was due.
        """
        if not self.thawing.step(epoch):
            return None
        self.nets.thawed()
        added = extend_optimizer(self.optimizer, self.nets.net, **factories.rates(self.train))
        self._schedule(epoch)
        return added

    def backward(self, batches: Sequence[Sequence[Tensor]]) -> tuple[float, int]:
        """Gradients of one step from as many batches (x, y, passed over) as it accumulates.

        x: (B, 3, H, W), y: (B,) or (B, classes). Returns the mean loss and the number of unreadable
        images, over all processes.
        """
        sums = torch.zeros(2, device=self.accelerator.device)
        for number, (x, y, passed_over) in enumerate(batches, 1):
            x, y = self.placed(x), y.to(self.accelerator.device, non_blocking=True)
            if self.mixup is not None:
                x, y = self.mixup(x, y)
            with self.nets.backward_of(number, len(batches)):
                with self.accelerator.autocast():
                    logits = self.nets.runner(x)
                check_classes(logits, self.classes)
                loss = self.criterion(logits.float(), y) / len(batches)
                sums[0] += loss.detach()
                sums[1] += (passed_over > 0).sum()
                self.accelerator.backward(loss)
        value, skipped = self.accelerator.reduce(sums, "mean").tolist()
        return value, round(skipped * self.accelerator.num_processes)

    def update(self) -> None:
        """Clip the gradients, move the weights along them and the average along the weights."""
        if self.train.clip is not None:
            learning = [p for p in self.nets.net.parameters() if p.grad is not None]
            self.accelerator.clip_grad_norm_(learning, self.train.clip)
        self.prepared.step()
        self.watch.look(self.nets.net)
        self.prepared.zero_grad()
        self.nets.update_average()

    def advance(self, epoch: int, steps: int) -> None:
        """Rates for what comes after so many steps of an epoch.

        They follow the place in the run, not the count of all steps: a resumed run may have more or fewer to an epoch.
        """
        if self.scheduler is not None:
            self.scheduler.step_update(epoch * self.steps + steps)

    def placed(self, x: Tensor) -> Tensor:
        """A batch where and as the net wants it."""
        return placed(x, self.train, self.accelerator.device)

    def held(self) -> list[tuple[str, nn.Parameter]]:
        """The optimizer's parameters with their names, in its own order."""
        return [(self.names[id(p)], p) for group in self.optimizer.param_groups for p in group["params"]]
