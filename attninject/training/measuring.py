"""Metrics over the validation images, exact on any number of processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from attninject.errors import DataError

from .metrics import Metrics, Tally
from .multilabel_metrics import LabelMetrics, LabelTally

Measured = Metrics | LabelMetrics


@torch.no_grad()
def evaluate(
    runner: Callable[[Tensor], Tensor],
    batches: Iterable[Any],
    placed: Callable[[Tensor], Tensor],
    accelerator: Any,
    classes: Sequence[str],
    confusion: bool = False,
) -> Measured:
    """Metrics of a model in eval mode on batches (x, y, passed over), of all processes.

    Every process sums over images of its own, with label -1 for padding, in float64 on the CPU: not every device has
    that. The sums are added.

    Args:
        classes: their names; labels y are (B,), or (B, classes) of images with several each.
        confusion: count which class is taken for which too; of this process's images alone.

    Raises:
        DataError: not one image can be read, or the model does not fit the images or the classes.
    """
    tally: Tally | LabelTally | None = None
    for x, y, skipped in batches:
        with accelerator.autocast():
            logits = _outputs(runner, placed(x))
        check_classes(logits, len(classes))
        if tally is None:
            tally = LabelTally(confusion) if y.ndim == 2 else Tally(len(classes), confusion)
        tally.add(logits.float().cpu(), y, skipped)
    if tally is None or not tally.reduced(accelerator).images:
        raise DataError("not one validation image can be read")
    return tally.metrics(classes)


def _outputs(runner: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """What the model gives for x: (B, 3, H, W); many networks take images of one size only."""
    try:
        return runner(x)
    except torch.OutOfMemoryError:
        raise
    except (AssertionError, RuntimeError) as error:
        said = str(error).strip().partition("\n")[0]
        raise DataError(
            f"the model does not run on images of shape {tuple(x.shape)}: {said}; where their size is at fault, "
            f"give another with `size` of `data` (--data-size)"
        ) from error


def check_classes(logits: Any, classes: int) -> None:
    """Refuse a head for another number of classes, and a model with further outputs (auxiliary heads)."""
    if not isinstance(logits, Tensor):
        raise DataError(
            f"the model gives a {type(logits).__name__} instead of logits of shape (batch, {classes}); "
            f"take its auxiliary heads off (torchvision's: aux_logits=False)"
        )
    if logits.ndim != 2 or logits.shape[1] != classes:
        raise DataError(
            f"the model gives outputs of shape {tuple(logits.shape)}, the images have {classes} classes: "
            f"expected (batch, {classes}); give the model that many classes (num_classes={classes})"
        )
