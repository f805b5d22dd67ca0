"""Images and labels from whatever holds them, checked before anything is computed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attninject.errors import DataError


@dataclass(frozen=True)
class Samples:
    """Labelled images, held in memory: images (n, C, *S) and labels (n,) of int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def classes(self) -> int:
        """One more than the largest label."""
        return int(self.labels.max()) + 1


def labelled(data: Any, images: int, batch_size: int) -> Samples:
    """The first `images` labelled images of a loader, a data set, a pair of tensors, or an iterable of batches.

    Raises:
        DataError: no labels, one class, fewer images than a batch, images of several sizes.
    """
    pairs = [_pair(batch, number) for number, batch in enumerate(taken(data, images, batch_size), 1)]
    if not pairs:
        raise DataError("the data hold no images")
    shapes = {tuple(x.shape[1:]) for x, _ in pairs}
    if len(shapes) > 1:
        sizes = ", ".join("×".join(map(str, s)) for s in sorted(shapes)[:3])
        raise DataError(
            f"the images have several sizes ({sizes}); resize them to one, or give a loss of your own"
        )
    found = Samples(torch.cat([x for x, _ in pairs])[:images], torch.cat([y for _, y in pairs])[:images])
    if len(found) < batch_size:
        raise DataError(
            f"{len(found)} images are fewer than one batch of {batch_size}: give more images, or a smaller batch_size"
        )
    if int(found.labels.min()) < 0:
        raise DataError(f"a label is {int(found.labels.min())}; labels are class numbers from 0")
    if len(found.labels.unique()) < 2:
        raise DataError(
            f"all {len(found)} images have label {int(found.labels[0])}: with one class there is nothing to tell "
            "apart; shuffle the data, or take more images"
        )
    return found


def taken(data: Any, images: int, batch_size: int) -> Iterator[Any]:
    """Batches of a source until `images` images are there; the last batch is left whole.

    Raises:
        DataError: the source is nothing that holds batches.
    """
    count = 0
    for batch in _batches(data, batch_size):
        yield batch
        count += size_of(batch)
        if count >= images:
            return


def _batches(data: Any, batch_size: int) -> Iterable[Any]:
    if _is_pair(data):
        images, labels = data
        if len(images) != len(labels):
            raise DataError(f"{len(images)} images but {len(labels)} labels")
        return zip(images.split(batch_size), torch.as_tensor(labels).split(batch_size), strict=True)
    if isinstance(data, Tensor) or not (hasattr(data, "__iter__") or hasattr(data, "__getitem__")):
        raise DataError(
            f"data: expected batches of (images, labels), a data set, a loader or a pair of tensors, found "
            f"{type(data).__name__}: there are no labels"
        )
    loader = isinstance(data, torch.utils.data.DataLoader | list | tuple | Mapping)
    if not loader and hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        return torch.utils.data.DataLoader(data, batch_size, shuffle=True)
    batches: Iterable[Any] = data
    return batches


def _is_pair(data: Any) -> bool:
    return (
        isinstance(data, list | tuple)
        and len(data) == 2
        and isinstance(data[0], Tensor)
        and isinstance(data[1], Tensor)
        and data[1].ndim < 2
        and data[0].ndim > 1
    )


def _pair(batch: Any, number: int) -> tuple[Tensor, Tensor]:
    """Images and class numbers of a batch."""
    if not isinstance(batch, list | tuple) or len(batch) < 2 or batch[1] is None:
        raise DataError(
            f"batch {number} has no labels: expected (images, labels), found {type(batch).__name__}"
        )
    images, labels = batch[0], torch.as_tensor(batch[1])
    if not isinstance(images, Tensor) or labels.ndim != 1 or labels.is_floating_point():
        raise DataError(
            f"batch {number}: expected a tensor of images and whole class numbers, found {type(images).__name__} "
            f"and labels of shape {tuple(labels.shape)}, {labels.dtype}; give metric= a loss of your own"
        )
    if len(images) != len(labels):
        raise DataError(f"batch {number}: {len(images)} images but {len(labels)} labels")
    return images, labels.long()


# --- batches of any structure ------------------------------------------------------------------


def size_of(batch: Any) -> int:
    """Number of images in a batch: the length of the first tensor, or of the first list of per-image things."""
    if isinstance(batch, Tensor) or (isinstance(batch, list) and not any(_holds_batch(b) for b in batch)):
        return len(batch)
    parts = batch.values() if isinstance(batch, Mapping) else batch
    for part in parts:
        return size_of(part)
    raise DataError("a batch is empty")


def _holds_batch(value: Any) -> bool:
    """Whether an item of a list is itself a batch (4 axes, or labels), rather than one image or target."""
    return isinstance(value, Tensor) and value.ndim != 3


def cut(batch: Any, start: int, stop: int, size: int) -> Any:
    """Images start … stop of a batch of `size`, in the batch's own structure."""
    if isinstance(batch, Tensor) or (isinstance(batch, list) and len(batch) == size):
        return batch[start:stop] if isinstance(batch, list) or batch.ndim else batch
    if isinstance(batch, Mapping):
        return {key: cut(value, start, stop, size) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        return type(batch)(cut(value, start, stop, size) for value in batch)
    return batch


def to_device(batch: Any, device: torch.device) -> Any:
    """The same batch with its tensors on a device."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        return type(batch)(to_device(value, device) for value in batch)
    return batch
