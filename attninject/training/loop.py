"""The training loop: timm's parts and Accelerate, and what only blocks need.

One pass through `Run.go` is a run. Whatever is random depends on (seed, step) or on (seed, epoch, image)
alone, so a checkpoint needs no generator states, and a resumed run continues bit for bit.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from attninject import api, delta
from attninject.errors import DataError, ExperimentError, Fault, NonFiniteError, RunError
from attninject.training import data as images_of
from attninject.training import devices, factories, resuming, runs

from .dead_gates import Watch
from .experiment import Data, Experiment, Training
from .freezing import GradualUnfreezing, freeze, trainable
from .groups import extend_optimizer
from .measuring import check_classes, evaluate
from .nets import Nets, placed, with_shared_norms
from .reporting import Reporter


@dataclass
class Result:
    """What a run leaves: a row per epoch (0: before training), the best, the evaluated model, warnings."""

    model: nn.Module
    history: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    out: Path | None = None
    main: bool = True  # whether this process is the one that writes


class Run:
    """One run: `carry_out` once."""

    def __init__(
        self,
        model: nn.Module,
        opened: images_of.Images,
        data: Data,
        train: Training,
        look: images_of.Look | None,
        out: Any,
        base: str | None,
        say: Callable[[str], None],
        experiment: Experiment | None = None,
    ) -> None:
        self.model, self.images, self.data, self.train = model, opened, data, train
        self.base, self.experiment, self.look = base, experiment, look
        self.folder = None if out is None else runs.Folder(out)
        self._say = say
        self.result = Result(model, out=None if out is None else Path(out))
        self.epoch = self.batch = self.step = 0  # finished epochs; steps done in this one; steps in all
        self.loss_sum, self.skipped = 0.0, 0  # of this epoch, over all processes
        self.watch = Watch()
        self.stop: str | None = None

    def carry_out(self, resume: bool) -> Result:
        """Set up, go on where `resume` says so, train, give everything back."""
        self.accelerator = devices.open_accelerator(self.train)
        self.result.main = self.main
        self.tell = Reporter(self._say, self.folder, self.main, self.train.log_every)
        try:
            if self.folder and self.main:
                self.folder.begin(resume)
            self.accelerator.wait_for_everyone()
            self.prepare()
            if resume:
                self.resume()
            self.tell.begin(self.step)
            processes = self.accelerator.num_processes
            with devices.interruptible(self.ask_to_stop, processes), devices.deterministic():
                self.go()
        finally:
            self.tell.end()
            if self.folder:
                self.folder.end()
            devices.forget_accelerator()
            self.model.eval()
        return self.result

    @property
    def main(self) -> bool:
        """Whether this is the process that writes."""
        return self.accelerator.is_main_process

    def ask_to_stop(self, why: str) -> None:
        """End the run after the step that it is in."""
        self.stop = why

    # --- setting up ---

    def prepare(self) -> None:
        """Freeze, place, and make everything that a step needs."""
        train, accelerator = self.train, self.accelerator
        self.model = self.result.model = with_shared_norms(self.model, train, accelerator)
        if train.checkpointing:
            factories.switch_checkpointing_on(self.model)
        # without `freeze` nothing is frozen, but a head that was named is remembered
        freeze(self.model, () if train.freeze is None else train.freeze, bn=train.bn, head=train.head)
        due: dict[int, list[str | int]] = {}
        for epoch, what in train.unfreeze:
            due.setdefault(epoch - 1, []).extend([what] if isinstance(what, str | int) else what)
        self.thawing = GradualUnfreezing(self.model, due)
        if not any(p.requires_grad for p in self.model.parameters()):
            raise ExperimentError([Fault("everything is frozen: nothing would learn")])
        self.make_loaders()
        self.nets = Nets(self.model, train, accelerator)
        self.result.model = self.nets.shipped
        self.names = {id(p): n for n, p in self.nets.net.named_parameters()}
        self.raw_optimizer = factories.make_optimizer(self.nets.net, train)
        self.optimizer = accelerator.prepare_optimizer(self.raw_optimizer)
        self.make_scheduler()
        self.criterion, self.mixup = factories.make_loss(train, len(self.images.classes))

    def make_loaders(self) -> None:
        """The order of the images and their loaders, for this process."""
        data, train, accelerator = self.data, self.train, self.accelerator
        rank, ranks = accelerator.process_index, accelerator.num_processes
        for_train, for_val = images_of.transforms(data, self.look) if self.look else (None, None)
        skip, pin = data.unreadable == "skip", accelerator.device.type == "cuda"
        self.order = images_of.Schedule(len(self.images.train), train.batch_size, rank, ranks, train.seed)
        if (train.mixup or train.cutmix) and self.order.batch_size % 2:
            raise DataError(
                f"Mixup and CutMix pair images; {len(self.images.train)} training images on {ranks} processes "
                f"make a batch of {self.order.batch_size}: give an even `batch_size` below that"
            )
        val_order = images_of.Schedule(len(self.images.val), train.batch_size, rank, ranks, train=False)
        classes = len(self.images.classes)
        samples = images_of.Samples(self.images.train, for_train, train.seed, skip, classes)
        held = images_of.Padded(self.images.val, for_val, train.seed, skip, classes)
        self.loader = images_of.loader(samples, self.order, data.workers, pin)
        self.val_loader = images_of.loader(held, val_order, data.workers, pin)
        self.steps = len(self.order) // train.accumulate  # per epoch
        if self.steps == 0:
            raise DataError(
                f"{len(self.images.train)} training images do not fill one step of {train.batch_size} × "
                f"{train.accumulate} forwards × {ranks} processes"
            )

    def make_scheduler(self) -> None:
        """The schedule over all groups that the optimizer has by now."""
        self.scheduler = factories.make_scheduler(self.raw_optimizer, self.train, self.steps)
        if self.scheduler is not None:
            self.scheduler.step_update(self.step)

    def resume(self) -> None:
        """Go back to the checkpoint: everything is compared before anything is loaded."""
        assert self.folder is not None
        tensors, meta = self.folder.load()
        resuming.check(self, meta)
        for epoch in range(meta["epoch"] + bool(meta["batch"])):  # groups join in the same order
            self.epoch = epoch
            self.thaw()
        resuming.restore(self, tensors, meta)
        self.tell.say(f"going on from epoch {self.epoch}, step {self.step}")

    # --- the loop ---

    def go(self) -> None:
        """Epoch 0 measures the model as it came; then train, measure, save."""
        sizes = f"{len(self.images.train)} training and {len(self.images.val)} validation images"
        self.tell.say(
            f"{trainable(self.model)} parameters learn; {len(self.images.classes)} classes, {sizes}"
            f"{self.nets.manner}"
        )
        if not self.result.history:
            self.finish_row({"epoch": 0, "step": 0}, time.perf_counter())
            self.write_checkpoint()
        while self.epoch < self.train.epochs:
            self.thaw()
            began = time.perf_counter()
            self.one_epoch()
            self.warn_of_dead_gates()
            row = {"epoch": self.epoch + 1, "step": self.step, "train_loss": self.loss_sum / self.steps}
            if self.data.unreadable == "skip":
                row["skipped"] = self.skipped
            self.epoch, self.batch, self.loss_sum, self.skipped = self.epoch + 1, 0, 0.0, 0
            self.finish_row(row, began)
            self.write_checkpoint()

    def thaw(self) -> None:
        """Unfreeze what is due; its parameters join the optimizer."""
        if self.thawing.step(self.epoch):
            self.nets.thawed()
            added = extend_optimizer(self.raw_optimizer, self.nets.net, **factories.rates(self.train))
            self.make_scheduler()
            new = f" (new: {', '.join(added)})" if added else ""
            self.tell.say(
                f"epoch {self.epoch + 1}: {trainable(self.model)} parameters learn from here on{new}"
            )

    def one_epoch(self) -> None:
        """Train to the end of the epoch."""
        self.nets.net.train()
        self.order.at(self.epoch, self.batch * self.train.accumulate)
        batches, began, first = images_of.batches(self.loader), time.perf_counter(), self.batch
        title = f"epoch {self.epoch + 1}/{self.train.epochs}"
        with self.tell.progress(title, self.batch, self.steps) as bar:
            while self.batch < self.steps:
                self.seed_step()
                loss, skipped = self.one_step([next(batches) for _ in range(self.train.accumulate)])
                self.loss_sum, self.skipped = self.loss_sum + loss, self.skipped + skipped
                self.batch, self.step = self.batch + 1, self.step + 1
                if self.scheduler is not None:
                    self.scheduler.step_update(self.step)
                done = (self.batch - first) * self.train.batch_size * self.train.accumulate
                speed = done * self.accelerator.num_processes / (time.perf_counter() - began)
                bar(self.batch, self.step, loss, speed)
                self.maybe_save()

    def maybe_save(self) -> None:
        """A checkpoint within the epoch, where it is time; or the end, where it was asked for."""
        every = self.train.save_every
        if self.stop or (every and self.step % every == 0 and self.batch < self.steps):
            self.write_checkpoint()
        if self.stop:
            raise RunError(f"{self.stop} at step {self.step}; {self.kept()}")

    def seed_step(self) -> None:
        """Dropout, drop-path and Mixup of a step draw from (seed, step, rank)."""
        seed = images_of.mixed_seed(self.train.seed, 1, self.step, self.accelerator.process_index)
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)

    def one_step(self, batches: Sequence[Sequence[Tensor]]) -> tuple[float, int]:
        """Forward, backward, step, average; mean loss and number of unreadable images over all processes."""
        sums = torch.zeros(2, device=self.accelerator.device)
        for number, (x, y, passed_over) in enumerate(batches, 1):
            x, y = self.placed(x), y.to(self.accelerator.device, non_blocking=True)
            if self.mixup is not None:
                x, y = self.mixup(x, y)
            with self.nets.backward_of(number, len(batches)):
                with self.accelerator.autocast():
                    logits = self.nets.runner(x)
                check_classes(logits, len(self.images.classes))
                loss = self.criterion(logits.float(), y) / len(batches)
                sums[0] += loss.detach()
                sums[1] += (passed_over > 0).sum()
                self.accelerator.backward(loss)
        value, skipped = self.accelerator.reduce(sums, "mean").tolist()
        if not np.isfinite(value):
            raise NonFiniteError(f"the loss became {value} at step {self.step + 1}; {self.kept()}")
        if self.train.clip is not None:
            learning = [p for p in self.nets.net.parameters() if p.grad is not None]
            self.accelerator.clip_grad_norm_(learning, self.train.clip)
        self.optimizer.step()
        self.watch.look(self.nets.net)
        self.optimizer.zero_grad()
        self.nets.update_average()
        return value, round(skipped * self.accelerator.num_processes)

    def placed(self, x: Tensor) -> Tensor:
        """A batch where and as the net wants it."""
        return placed(x, self.train, self.accelerator.device)

    def warn_of_dead_gates(self) -> None:
        """Once in a run."""
        self.watch.share(self.accelerator.num_processes)
        text = self.watch.warning(self.model)
        if text and not any(w.startswith("dead gates") for w in self.result.warnings):
            self.result.warnings.append(text)
            self.tell.say(f"warning: {text}")

    # --- measuring and writing ---

    def finish_row(self, row: dict[str, Any], began: float) -> None:
        """Evaluate, and give the row to the log, to TensorBoard and to the files that ship."""
        self.nets.gather(self.step)
        self.nets.measured.eval()
        row |= evaluate(
            self.nets.evaluator,
            images_of.batches(self.val_loader),
            self.placed,
            self.accelerator,
            len(self.images.classes),
        )
        self.nets.settle()
        if self.data.unreadable != "skip":
            del row["val_skipped"]
        for group in self.raw_optimizer.param_groups:
            row[f"lr {group['name']}"] = group["lr"]
        row["seconds"] = round(time.perf_counter() - began, 2)
        self.result.history.append(row)
        if not self.result.best or row["top1"] > self.result.best["top1"]:
            self.result.best = row
            self.ship(runs.BEST)
        if row["epoch"]:
            self.ship(runs.LAST)
        self.tell.row(self.result.history, self.train.epochs)

    def kept(self) -> str:
        """Which checkpoint a message may offer."""
        return self.folder.last_good() if self.folder else "nothing was saved, as `out` was not given"

    def ship(self, name: str) -> None:
        """The file that is the run's product: a delta, or without blocks a plain state dict."""
        if not self.folder or not self.main:
            return
        model = self.nets.shipped
        with self.folder.replacing(name) as temporary:
            if api.injected(model):
                delta.save(model, temporary, base=self.base)
            else:
                delta.save_tensors(delta.detached(model.state_dict()), temporary, {"format": "pt"})

    def write_checkpoint(self) -> None:
        """Only of finite weights, so that a good one is never replaced by a bad one."""
        if not self.folder:
            return
        self.nets.gather(self.step)
        bad = [
            n
            for n, t in self.model.state_dict().items()
            if t.is_floating_point() and not bool(t.isfinite().all())
        ]
        if bad:
            raise NonFiniteError(f"{bad[0]} is no longer finite at step {self.step}; {self.kept()}")
        tensors, meta = resuming.state(self)
        if self.main:
            if self.experiment is not None:  # anew each time: a resumed run may have more epochs
                text = json.dumps(self.experiment.to_dict(), indent=2) + "\n"
                self.folder.write(runs.SETTINGS, text)
            self.folder.write(runs.CLASSES, "\n".join(self.images.classes) + "\n")
            self.folder.save(tensors, meta)
        self.accelerator.wait_for_everyone()
