"""The loop of a run: epochs of steps, an evaluation after each, checkpoints between them.

Whatever is random depends on (seed, step) or on (seed, epoch, image) alone, so a checkpoint needs no generator
states, and a resumed run continues bit for bit.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attninject.blocks.gate import divided_zeros
from attninject.errors import NonFiniteError, RunError
from attninject.wording import listed

from . import devices, factories, gate_movement, resuming, runs
from .callbacks import Callback
from .data.loaders import Loaders, batches
from .data.seeds import seed_all
from .freezing import trainable
from .job import Job, Result
from .learner import Learner, frozen
from .log_columns import rate_column
from .measuring import Measured, evaluate
from .monitors import ended_early
from .nets import with_shared_norms
from .reporting import Reporter
from .run_files import RunFiles
from .run_state import RunState
from .tracking import Trackers, config_of, names_of, plan_of


def carry_out(job: Job, callbacks: Sequence[Callback] = (), resume: bool = False) -> Result:
    """Set up, go on where `resume` says so, train, give everything back."""
    job = resuming.as_begun(job) if resume else job
    accelerator = devices.open_accelerator(job.train)
    main: bool = accelerator.is_main_process
    files = RunFiles(job, main)
    trackers = Trackers(names_of(job) if main else (), files.folder, job.train.project)
    tell = Reporter(callbacks, files.folder, main, job.train.log_every, trackers)
    try:
        files.begin(resume)
        accelerator.wait_for_everyone()
        run = Run(job, accelerator, files, tell)
        if resume:
            run.resume()
        trackers.begin(run.state.step, resume, config_of(job), plan_of(job.model))
        with devices.interruptible(run.ask_to_stop, accelerator.num_processes), devices.deterministic():
            run.go()
    finally:
        trackers.end()
        files.end()
        devices.forget_accelerator()
        job.model.eval()
    tell.end(run.result())
    return run.result()


class Run:
    """One run: made ready by being made, carried out by `go`."""

    def __init__(self, job: Job, accelerator: Any, files: RunFiles, tell: Reporter) -> None:
        self.job, self.train, self.classes = job, job.train, len(job.images.classes)
        self.accelerator, self.files, self.tell = accelerator, files, tell
        model = with_shared_norms(job.model, job.train, accelerator)
        if job.train.checkpointing:
            factories.switch_checkpointing_on(model)
        thawing = frozen(model, job.train)
        self.loaders = Loaders(job.images, job.data, job.train, job.preprocessing, accelerator)
        self.learner = Learner(model, job.train, thawing, accelerator, job.images, self.loaders.steps)
        self.state = RunState(self.learner)
        self.stop: str | None = None

    def ask_to_stop(self, why: str) -> None:
        """End the run after the step that it is in."""
        self.stop = why

    def resume(self) -> None:
        """Go back to the checkpoint: everything is compared before anything is loaded."""
        assert self.files.folder is not None
        saved = self.files.load()
        resuming.check(saved, self.job, self.accelerator)
        for epoch in range(saved["epoch"] + bool(saved["batch"])):  # groups join in the same order
            self.thaw(epoch)
        self.state.load_state_dict(saved, self.files.folder.path)
        self.tell.say(f"going on from epoch {self.state.epoch}, step {self.state.step}")

    def result(self) -> Result:
        """What the run has come to."""
        state, out = self.state, self.job.out
        return Result(
            self.learner.nets.shipped, state.history, state.best, state.warnings, out, self.files.main
        )

    # --- the loop ---

    def go(self) -> None:
        """Epoch 0 measures the model as it came; then train, measure, save."""
        state, images = self.state, self.job.images
        sizes = f"{len(images.train)} training and {len(images.val)} validation images"
        self.tell.say(
            f"{trainable(self.learner.nets.model)} parameters learn; {self.classes} classes, {sizes}"
            f"{self.learner.nets.manner}"
        )
        if not state.history:
            self.finish_row({"epoch": 0, "step": 0}, time.perf_counter())
            self.write_checkpoint()
        while not self.over():
            self.thaw(state.epoch)
            began = time.perf_counter()
            self.one_epoch()
            self.warn_of_dead_gates()
            row = {
                "epoch": state.epoch + 1,
                "step": state.step,
                "train_loss": state.loss_sum / self.loaders.steps,
            }
            if self.job.data.unreadable == "skip":
                row["skipped"] = state.skipped
            state.end_epoch()
            self.finish_row(row, began)
            self.warn_of_still_gates()
            self.write_checkpoint()
        self.tell_of_early_end()

    def over(self) -> bool:
        """Whether all epochs are done, or patience is at its end: from the log alone, so that a resumed run agrees."""
        state = self.state
        return state.epoch >= self.train.epochs or ended_early(
            self.train, self.job.images.many, state.history
        )

    def tell_of_early_end(self) -> None:
        """Where there were more epochs to come."""
        if self.state.epoch < self.train.epochs:
            best = f"{self.job.monitor.words(self.state.best)} at epoch {self.state.best['epoch']}"
            self.tell.say(f"no better in {self.train.patience} epochs than {best}: the run ends early")

    def thaw(self, epoch: int) -> None:
        """Unfreeze what is due at an epoch (from 0), and say so."""
        added = self.learner.thaw(epoch)
        if added is not None:
            new = f" (new: {', '.join(added)})" if added else ""
            self.tell.say(
                f"epoch {epoch + 1}: {trainable(self.learner.nets.model)} parameters learn from here on{new}"
            )

    def one_epoch(self) -> None:
        """Train to the end of the epoch."""
        state, train = self.state, self.train
        self.learner.nets.net.train()
        self.loaders.order.at(state.epoch, state.batch * train.accumulate)
        coming, began, first = batches(self.loaders.train), time.perf_counter(), state.batch
        title = f"epoch {state.epoch + 1}/{train.epochs}"
        with self.tell.progress(title, state.batch, self.loaders.steps) as bar:
            while state.batch < self.loaders.steps:
                # dropout, drop-path and Mixup of a step draw from (seed, step, rank)
                seed_all(train.seed, 1, state.step, self.accelerator.process_index)
                loss, skipped = self.one_step([next(coming) for _ in range(train.accumulate)])
                state.loss_sum, state.skipped = state.loss_sum + loss, state.skipped + skipped
                state.batch, state.step = state.batch + 1, state.step + 1
                self.learner.advance(state.epoch, state.batch)
                done = (state.batch - first) * self.loaders.order.batch_size * train.accumulate
                speed = done * self.accelerator.num_processes / (time.perf_counter() - began)
                bar(state.batch, state.step, loss, speed)
                self.maybe_save()

    def one_step(self, batches: Sequence[Sequence[Tensor]]) -> tuple[float, int]:
        """Gradients, and an update where the loss is finite; see `Learner.backward`."""
        loss, skipped = self.learner.backward(batches)
        if not np.isfinite(loss):
            zeros = divided_zeros(self.learner.nets.model)
            why = (
                f" ({listed(zeros)}: a zero weight, which weight or spectral norm divides by)"
                if zeros
                else ""
            )
            step = self.state.step + 1
            raise NonFiniteError(f"the loss became {loss} at step {step}{why}; {self.files.kept()}")
        self.learner.update()
        return loss, skipped

    def maybe_save(self) -> None:
        """A checkpoint within the epoch, where it is time; or the end, where it was asked for."""
        every, state = self.train.save_every, self.state
        if self.stop or (every and state.step % every == 0 and state.batch < self.loaders.steps):
            self.write_checkpoint()
        if self.stop:
            raise RunError(f"{self.stop} at step {state.step}; {self.files.kept()}")

    def warn_of_dead_gates(self) -> None:
        """Once in a run."""
        watch, warnings = self.learner.watch, self.state.warnings
        watch.share(self.accelerator.num_processes)
        text = watch.warning(self.learner.nets.model)
        if text and not any(w.startswith("dead gates") for w in warnings):
            warnings.append(text)
            self.tell.warn(text)

    def warn_of_still_gates(self) -> None:
        """At the end, where blocks that could learn have hardly moved."""
        state = self.state
        text = gate_movement.warning(self.learner.nets.model, state.history[-1])
        if text and self.over():
            state.warnings.append(text)
            self.tell.warn(text)

    # --- measuring and writing ---

    def finish_row(self, row: dict[str, Any], began: float) -> None:
        """Evaluate, and give the row to the log, to trackers and to the files that ship."""
        state = self.state
        measured, gates = self.measured()
        row |= measured.row() | {k: v for k, v in gates.items() if k.startswith(gate_movement.PREFIX)}
        if self.job.data.unreadable != "skip":
            del row["val_skipped"]
        for group in self.learner.optimizer.param_groups:
            row[rate_column(group["name"])] = group["lr"]
        row["seconds"] = round(time.perf_counter() - began, 2)
        state.history.append(row)
        worth = self.job.monitor.worth
        if not state.best or worth(row) > worth(state.best):
            state.best = row
            self.files.ship(runs.BEST, self.learner.nets.shipped)
        if row["epoch"]:
            self.files.ship(runs.LAST, self.learner.nets.shipped)
        self.tell.row(state.history, self.train.epochs, gates)
        self.files.measured(row["epoch"], measured)

    def measured(self) -> tuple[Measured, dict[str, float]]:
        """Metrics on the validation images, and how the gates stand."""
        nets = self.learner.nets
        nets.gather(self.state.step)
        nets.measured.eval()
        sample = gate_movement.Sample(len(self.loaders.val))
        held = sample.of(batches(self.loaders.val))
        classes = self.job.images.classes
        found = evaluate(nets.evaluator, held, self.learner.placed, self.accelerator, classes)
        gates = self.gates(sample)
        nets.settle()
        return found, gates

    def gates(self, sample: gate_movement.Sample) -> dict[str, float]:
        """How the gates stand: the first process measures whole weights, the others are told."""
        told: list[dict[str, float]] = [{}]
        if self.accelerator.is_main_process:
            with self.accelerator.autocast():
                images = map(self.learner.placed, sample.chunks())
                told = [gate_movement.movement(self.learner.nets.shipped, images)]
        if self.accelerator.num_processes > 1:
            torch.distributed.broadcast_object_list(told, src=0)
        return told[0]

    def write_checkpoint(self) -> None:
        """Only of finite weights, so that a good one is never replaced by a bad one."""
        if not self.files.folder:
            return
        nets, step = self.learner.nets, self.state.step
        nets.gather(step)
        floating = {n: t for n, t in nets.model.state_dict().items() if t.is_floating_point()}
        bad = [name for name, tensor in floating.items() if not bool(tensor.isfinite().all())]
        if bad:
            raise NonFiniteError(f"{bad[0]} is no longer finite at step {step}; {self.files.kept()}")
        self.files.save(self.state.state_dict(), resuming.terms(self.job, self.accelerator))
        self.accelerator.wait_for_everyone()
