"""Loss and accuracy over the validation images, exact on any number of processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from attninject.errors import DataError


@torch.no_grad()
def evaluate(
    runner: Callable[[Tensor], Tensor],
    batches: Iterable[Any],
    placed: Callable[[Tensor], Tensor],
    accelerator: Any,
    classes: int,
) -> dict[str, Any]:
    """Mean loss, top-1 and top-5 accuracy of a model in eval mode; `skipped` counts unreadable images.

    Every process sums over images of its own in float64, with label -1 for padding; the sums are added.
    """
    sums = torch.zeros(5, dtype=torch.float64, device=accelerator.device)
    for x, y, skipped in batches:
        with accelerator.autocast():
            logits = _outputs(runner, placed(x))
        check_classes(logits, classes)
        logits, y = logits.float(), y.to(logits.device)
        counts, target = y >= 0, y.clamp(min=0)
        top = logits.topk(min(5, logits.shape[1]), dim=1).indices == target[:, None]
        losses = nn.functional.cross_entropy(logits, target, reduction="none").double()
        rows = (losses, top[:, 0].double(), top.any(1).double(), torch.ones_like(losses))
        sums += torch.stack([*(r[counts].sum() for r in rows), skipped.to(logits.device).sum().double()])
    loss, top1, top5, count, lost = accelerator.reduce(sums, "sum").tolist()
    if not count:
        raise DataError("not one validation image can be read")
    return {"val_loss": loss / count, "top1": top1 / count, "top5": top5 / count, "val_skipped": int(lost)}


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
