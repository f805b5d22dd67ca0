"""Batches: which images each process takes, in which order, and the loader processes that read them."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from attninject.errors import DataError

from .. import runs
from ..experiment import Data, Training
from .datasets import Images
from .preprocessing import Preprocessing, transforms
from .samples import Padded, Samples
from .seeds import mixed_seed


class Schedule:
    """A batch sampler: which (epoch, index) each rank loads, batch by batch, from any batch on.

    Training: the same permutation on every rank, cut into batches of batch_size · ranks, of which a rank
    takes every ranks-th; a last batch that is not full is left out, but images that do not fill one are one.
    Validation: in order, and filled up with -1 so that every rank runs the same number of batches.
    """

    def __init__(
        self, count: int, batch_size: int, rank: int = 0, ranks: int = 1, seed: int = 0, train: bool = True
    ) -> None:
        self.count, self.rank, self.ranks, self.seed, self.train = count, rank, ranks, seed, train
        self.batch_size = min(batch_size, max(1, count // ranks)) if train else batch_size
        self.epoch = self.start = 0

    def __len__(self) -> int:
        whole, rest = divmod(self.count, self.batch_size * self.ranks)
        return whole + (0 if self.train else bool(rest)) - self.start

    def at(self, epoch: int, start: int = 0) -> Schedule:
        """Set the epoch and the first batch of the next pass; returns itself."""
        self.epoch, self.start = epoch, start
        return self

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = torch.arange(self.count)
        if self.train:
            generator = torch.Generator().manual_seed(mixed_seed(self.seed, self.epoch))
            order = torch.randperm(self.count, generator=generator)
        size = self.batch_size * self.ranks
        for begin in range(self.start * size, (self.start + len(self)) * size, size):
            batch = order[begin : begin + size]
            batch = torch.cat([batch, batch.new_full((size - len(batch),), -1)])
            yield [(self.epoch, int(index)) for index in batch[self.rank :: self.ranks]]


def loader(samples: Samples, schedule: Schedule, workers: int, pin: bool) -> DataLoader[Any]:
    """Batches in the schedule's order; loader processes live through all epochs."""
    return DataLoader(
        samples,
        batch_sampler=schedule,
        num_workers=workers,
        pin_memory=pin,
        persistent_workers=workers > 0,
        worker_init_fn=_quiet_worker if workers else None,
    )


def batches(of: DataLoader[Any]) -> Iterator[Any]:
    """The loader's batches; what a loader process refuses is said as it would be here, without its traceback."""
    return _plainly(iter(of))  # made at once: it draws from the generator, which a step seeds anew


def _plainly(iterator: Iterator[Any]) -> Iterator[Any]:
    try:
        yield from iterator
    except DataError as error:
        _, found, said = str(error).strip().rpartition(f"{DataError.__name__}: ")
        raise DataError(said if found else str(error)) from error


def _quiet_worker(_: int) -> None:
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C is the run's to hear, which still wants this step's images
    runs.let_go_in_child()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)


class Loaders:
    """Training and validation batches of one run in one process; `order` is where a pass begins."""

    def __init__(
        self,
        images: Images,
        data: Data,
        train: Training,
        preprocessing: Preprocessing | None,
        accelerator: Any,
    ) -> None:
        """Make both loaders.

        Args:
            images: data sets of (image tensor, label), or of images for the transforms.
            data: kind, workers, and what becomes of unreadable images.
            train: batch size, accumulation, seed.
            preprocessing: None: the images are tensors, ready as they are.
            accelerator: tells the number of processes and which of them this is.

        Raises:
            DataError: the images do not fill one step, or not in pairs where Mixup or CutMix needs them.
        """
        rank, ranks = accelerator.process_index, accelerator.num_processes
        count, classes = len(images.train), len(images.classes)
        skip, pin = data.unreadable == "skip", accelerator.device.type == "cuda"
        for_train, for_val = (None, None) if preprocessing is None else transforms(data, preprocessing)
        self.order = Schedule(count, train.batch_size, rank, ranks, train.seed)
        if (train.mixup or train.cutmix) and self.order.batch_size % 2:
            raise DataError(
                f"Mixup and CutMix pair images; {count} training images on {ranks} processes make a batch of "
                f"{self.order.batch_size}: give an even `batch_size` below that"
            )
        in_order = Schedule(len(images.val), train.batch_size, rank, ranks, train=False)
        samples = Samples(images.train, for_train, train.seed, skip, classes, images.many)
        held = Padded(images.val, for_val, train.seed, skip, classes, images.many)
        self.train = loader(samples, self.order, data.workers, pin)
        self.val = loader(held, in_order, data.workers, pin)
        self.steps = len(self.order) // train.accumulate  # per epoch
        if self.steps == 0:
            raise DataError(
                f"{count} training images do not fill one step of {train.batch_size} × {train.accumulate} "
                f"forwards × {ranks} processes"
            )
