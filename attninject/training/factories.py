"""What timm makes by the settings: optimizer, schedule, loss and Mixup; and what a wrong name is told."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from attninject.errors import ExperimentError, Fault
from attninject.wording import did_you_mean, nearest_hint

from .data.datasets import Images
from .experiment import Training
from .groups import param_groups
from .losses import LabelsCrossEntropy, WeightedCrossEntropy, class_weights

SCHEDULERS = ("cosine", "tanh", "step", "constant", "multistep", "plateau", "poly", "wsd", "rsqrt", "none")
"""timm's, for the nearest word: its factory lists none."""


def rates(train: Training) -> dict[str, Any]:
    """The arguments of `param_groups` and `extend_optimizer`."""
    names = ("lr", "head_lr", "weight_decay", "layer_decay")
    return {"attn_lr": train.rate_of_blocks, **{name: getattr(train, name) for name in names}}


def make_optimizer(model: nn.Module, train: Training) -> torch.optim.Optimizer:
    """Any of timm's optimizers over the model's parameter groups."""
    from timm.optim import create_optimizer_v2, list_optimizers

    known = [str(name) for name in list_optimizers()]
    if train.optimizer.removeprefix("lookahead_") not in known:
        near = nearest_hint(train.optimizer, known)
        raise ExperimentError([Fault(f"train, optimizer: timm has no {train.optimizer!r}{near}")])
    groups = param_groups(model, **rates(train))
    try:
        made = create_optimizer_v2(
            groups, train.optimizer, lr=train.lr, weight_decay=0.0, momentum=train.momentum
        )
    except (ValueError, TypeError, ImportError, AssertionError) as error:
        raise ExperimentError(
            [Fault(f"train, optimizer: timm refuses {train.optimizer!r}: {error}")]
        ) from error
    if getattr(made, "is_second_order", False):
        raise ExperimentError(
            [
                Fault(
                    f"train, optimizer: {train.optimizer!r} needs second derivatives, which are not made here"
                )
            ]
        )
    return made


def make_scheduler(optimizer: torch.optim.Optimizer, train: Training, steps: int) -> Any:
    """Any of timm's schedulers, stepped per update, `steps` to an epoch; None: the rates stay."""
    from timm.scheduler import create_scheduler_v2

    near = "" if train.scheduler in SCHEDULERS else did_you_mean(train.scheduler, SCHEDULERS)
    # timm's steps stand at 0.3, 0.6 and 0.9 of 300 epochs; in a run of ten none would ever come
    steps_at: dict[str, Any] = {
        "step": {"decay_epochs": 0.3 * train.epochs},
        "multistep": {"decay_milestones": [part * train.epochs for part in (0.3, 0.6, 0.9)]},
    }
    try:
        warmup: dict[str, Any] = {"warmup_epochs": train.warmup_epochs, "warmup_lr": train.lr / 100}
        scheduler, _ = create_scheduler_v2(
            optimizer, train.scheduler, num_epochs=train.epochs, min_lr=train.min_lr,
            step_on_epochs=False, updates_per_epoch=steps, **warmup, **steps_at.get(train.scheduler, {}),
        )  # fmt: skip
    except (ValueError, AssertionError, TypeError) as error:
        raise ExperimentError(
            [Fault(f"train, scheduler: timm refuses {train.scheduler!r}: {error}{near}")]
        ) from error
    if scheduler is None and train.scheduler not in ("none", "None", ""):
        raise ExperimentError([Fault(f"train, scheduler: timm has no {train.scheduler!r}{near}")])
    return scheduler


def make_loss(train: Training, images: Images) -> tuple[nn.Module, Any]:
    """The loss, and timm's Mixup (with CutMix) or None."""
    from timm.data import Mixup
    from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

    weights, smoothing, mixup = class_weights(train, images), train.smoothing, None
    if images.many:
        return LabelsCrossEntropy(weights, smoothing), None
    if train.mixup or train.cutmix:
        mixup = Mixup(train.mixup, train.cutmix, label_smoothing=smoothing, num_classes=len(images.classes))
        smoothing = 0.0  # done by Mixup
    if train.loss == "bce":
        return BinaryCrossEntropy(smoothing=smoothing, pos_weight=weights), mixup
    if weights is not None:
        return WeightedCrossEntropy(weights, smoothing), mixup
    if mixup is not None:
        return SoftTargetCrossEntropy(), mixup
    return (LabelSmoothingCrossEntropy(smoothing) if smoothing else nn.CrossEntropyLoss()), None


def switch_checkpointing_on(model: nn.Module) -> None:
    """Gradient checkpointing, as the model itself offers it."""
    switch: Any = getattr(model, "set_grad_checkpointing", None)
    if not callable(switch):
        raise ExperimentError(
            [Fault(f"train, checkpointing: {type(model).__name__} offers none (timm's models do)")]
        )
    switch(True)
