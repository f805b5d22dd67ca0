"""The engine behind `attninject finetune`: timm's parts and Accelerate, and what only blocks need.

One pass through `_Run.epochs` is the training loop. Whatever is random depends on (seed, step) or on (seed,
epoch, image) alone, so a checkpoint needs no generator states, and a resumed run continues bit for bit.
"""

from __future__ import annotations

import contextlib
import json
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from attninject import api, delta, edits, models
from attninject.errors import (
    CheckpointError,
    DataError,
    ExperimentError,
    Fault,
    MissingPackageError,
    NonFiniteError,
    RunError,
    UnknownModelError,
)
from attninject.probe import rng_kept
from attninject.training import data as images_of
from attninject.training import runs
from attninject.training.experiment import Data, Experiment, Training, read_experiment, settings
from attninject.training.freezing import GradualUnfreezing, freeze, head_of, trainable
from attninject.training.groups import extend_optimizer, param_groups

MAY_CHANGE = ("epochs", "log_every", "save_every", "workers", "device", "root")  # on resume


@dataclass
class Result:
    """What a run leaves: a row per epoch (0: before training), the best, the evaluated model, warnings."""

    model: nn.Module
    history: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    out: Path | None = None


def finetune(
    model: nn.Module,
    data: Any = "digits",
    *,
    out: Any = None,
    recipe: Any = None,
    resume: bool = False,
    base: str | None = None,
    say: Callable[[str], None] | None = None,
    **train: Any,
) -> Result:
    """Fine-tune a model, with or without injected blocks; the model is trained in place.

    Args:
        model: gives logits (B, classes) for images (B, 3, H, W).
        data: a kind (`"digits"`), a mapping as in an experiment file, or a pair of data sets of (image
            tensor, label) for training and validation.
        out: folder for log and checkpoints; None: nothing is written.
        recipe: injected first, as `inject` takes it.
        resume: go on from the checkpoint in `out`.
        base: the base model's name, stored in the delta for messages.
        say: gets lines of progress; None: `print`.
        **train: the keys of `train` in an experiment file: `epochs=10, lr=1e-4, freeze="backbone"`, …

    Raises:
        ExperimentError: a setting is wrong.
        DataError, RunError, CheckpointError: see there.
    """
    pair = data if isinstance(data, tuple) else None
    data_settings, train_settings = settings("digits" if pair else data, **train)
    with rng_kept():
        if pair:
            opened = images_of.Images(pair[0], pair[1], images_of.classes_of(pair[0]))
        else:
            opened = images_of.open_images(data_settings)
        if recipe is not None:
            api.inject(model, recipe)
        look = None if pair else images_of.look_of(model, data_settings)
        run = _Run(model, opened, data_settings, train_settings, look, out, base, say or _print)
        return run.carry_out(resume)


def run_experiment(
    experiment: Experiment, resume: bool = False, say: Callable[[str], None] | None = None
) -> Result:
    """Build the model, inject the recipe, train: what `attninject finetune` does."""
    with rng_kept():
        opened = images_of.open_images(experiment.data)
        torch.manual_seed(experiment.train.seed)
        model = build(experiment.model, experiment.weights, len(opened.classes))
        if experiment.recipe is not None:
            api.inject(model, experiment.recipe)
        look = images_of.look_of(model, experiment.data)
        args = (model, opened, experiment.data, experiment.train, look, experiment.out, experiment.model)
        return _Run(*args, say or _print, experiment).carry_out(resume)


def trained(folder: Any, file: str = runs.BEST) -> nn.Module:
    """The trained model of a run of `attninject finetune`, in eval mode, from its folder alone.

    The base is built as the run built it (same weights, or the same seed), the file of the run goes onto it.

    Raises:
        RunError: the folder holds no such run.
    """
    where = Path(folder)
    if not (where / runs.SETTINGS).is_file() or not (where / file).is_file():
        raise RunError(f"{where} holds no run of attninject finetune ({runs.SETTINGS} and {file})")
    experiment = read_experiment(where / runs.SETTINGS)
    classes = (where / runs.CLASSES).read_text(encoding="utf-8").split("\n")[:-1]
    if experiment.recipe is None:
        return models.build(experiment.model, str(where / file), num_classes=len(classes)).eval()
    with rng_kept():
        torch.manual_seed(experiment.train.seed)
        model = build(experiment.model, experiment.weights, len(classes))
    return delta.load(model, where / file).eval()


def build(name: str, weights: str, classes: int) -> nn.Module:
    """The model with a head for so many classes; where the weights have others, with a new last layer."""
    try:
        return models.build(name, weights, num_classes=classes)
    except UnknownModelError:
        if weights == "none":
            raise
    last = _last_layer(models.build(name, "none"))
    held = models.shapes(weights).get(f"{last}.weight")
    model = models.build(name, weights, **({"num_classes": held[0]} if held else {}))
    if callable(getattr(model, "reset_classifier", None)):
        model.reset_classifier(classes)  # type: ignore[operator]
    else:
        model.set_submodule(last, _with_outputs(model.get_submodule(last), classes))
    return model


def _last_layer(model: nn.Module) -> str:
    """Name of the layer that gives the logits."""
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
        and f"{name}.".startswith(tuple(f"{h}." for h in head_of(model)))
    ]
    if not found:
        raise UnknownModelError(f"{type(model).__name__} has no layer that gives logits")
    return found[-1]


def _with_outputs(layer: nn.Module, classes: int) -> nn.Module:
    if isinstance(layer, nn.Linear):
        return nn.Linear(layer.in_features, classes, bias=layer.bias is not None)
    assert isinstance(layer, nn.Conv2d)
    return nn.Conv2d(layer.in_channels, classes, layer.kernel_size, bias=layer.bias is not None)  # type: ignore[arg-type]


def _print(text: str) -> None:
    print(text, flush=True)


# --- a run -------------------------------------------------------------------------------------


class _Run:
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
        self.loss_sum = 0.0
        self.alive: set[str] = set()
        self.stop: str | None = None

    def carry_out(self, resume: bool) -> Result:
        self.accelerator = _accelerator(self.train)
        try:
            if self.folder and self.main:
                self.folder.begin(resume)
            self.accelerator.wait_for_everyone()
            self.prepare()
            if resume:
                self.resume()
            with _interruptible(self), _deterministic():
                self.go()
        finally:
            if self.folder:
                self.folder.end()
            _forget_accelerator()
            self.model.eval()
        return self.result

    @property
    def main(self) -> bool:
        return self.accelerator.is_main_process

    def say(self, text: str) -> None:
        if self.main:
            self._say(text)

    # --- setting up ---

    def prepare(self) -> None:
        train, accelerator = self.train, self.accelerator
        if train.sync_bn and accelerator.num_processes > 1:
            self.model = self.result.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
            edits.remember(self.model)  # the converted norms are new modules, as yet unchanged
        if train.checkpointing:
            _switch_checkpointing_on(self.model)
        if train.freeze is not None:
            freeze(self.model, train.freeze, bn=train.bn, head=train.head)
        self.thawing = GradualUnfreezing(self.model, {epoch - 1: what for epoch, what in train.unfreeze})
        self.model.to(accelerator.device)
        if train.channels_last:
            self.model.to(memory_format=torch.channels_last)
        if not any(p.requires_grad for p in self.model.parameters()):
            raise ExperimentError([Fault("everything is frozen: nothing would learn")])
        self.make_loaders()
        self.names = {id(p): n for n, p in self.model.named_parameters()}
        self.raw_optimizer = self.make_optimizer()
        self.optimizer = accelerator.prepare_optimizer(self.raw_optimizer)
        self.make_scheduler()
        self.ema: Any = None
        if train.ema is not None:
            from timm.utils import ModelEmaV3

            self.ema = ModelEmaV3(self.model, decay=train.ema)
            self.result.model = self.ema.module
        self.criterion, self.mixup = _loss(train, len(self.images.classes))
        self.wrap()

    def make_loaders(self) -> None:
        data, train, accelerator = self.data, self.train, self.accelerator
        rank, ranks = accelerator.process_index, accelerator.num_processes
        for_train, for_val = images_of.transforms(data, self.look) if self.look else (None, None)
        skip, pin = data.unreadable == "skip", accelerator.device.type == "cuda"
        self.order = images_of.Schedule(len(self.images.train), train.batch_size, rank, ranks, train.seed)
        val_order = images_of.Schedule(len(self.images.val), train.batch_size, rank, ranks, train=False)
        samples = images_of.Samples(self.images.train, for_train, train.seed, skip)
        held = images_of.Padded(self.images.val, for_val, train.seed, skip)
        self.loader = images_of.loader(samples, self.order, data.workers, pin)
        self.val_loader = images_of.loader(held, val_order, data.workers, pin)
        self.steps = len(self.order) // train.accumulate  # per epoch
        if self.steps == 0:
            raise DataError(
                f"{len(self.images.train)} training images do not fill one step of {train.batch_size} × "
                f"{train.accumulate} forwards × {ranks} processes"
            )

    def rates(self) -> dict[str, Any]:
        t = self.train
        return {"lr": t.lr, "attn_lr": t.attn_lr, "head_lr": t.head_lr, "weight_decay": t.weight_decay,
                "layer_decay": t.layer_decay}  # fmt: skip

    def make_optimizer(self) -> torch.optim.Optimizer:
        from timm.optim import create_optimizer_v2, list_optimizers

        train = self.train
        known = [str(name) for name in list_optimizers()]
        if train.optimizer.removeprefix("lookahead_") not in known:
            from attninject.patterns import nearest

            near = ", ".join(nearest(train.optimizer, known))
            raise ExperimentError(
                [Fault(f"train, optimizer: timm has no {train.optimizer!r}; nearest: {near}")]
            )
        groups = param_groups(self.model, **self.rates())
        return create_optimizer_v2(
            groups, train.optimizer, lr=train.lr, weight_decay=0.0, momentum=train.momentum
        )

    def make_scheduler(self) -> None:
        from timm.scheduler import create_scheduler_v2

        train = self.train
        try:
            warmup: dict[str, Any] = {"warmup_epochs": train.warmup_epochs, "warmup_lr": train.lr / 100}
            self.scheduler, _ = create_scheduler_v2(
                self.raw_optimizer, train.scheduler, num_epochs=train.epochs, min_lr=train.min_lr,
                step_on_epochs=False, updates_per_epoch=self.steps, **warmup,
            )  # fmt: skip
        except (ValueError, AssertionError, TypeError) as error:
            raise ExperimentError(
                [Fault(f"train, scheduler: timm refuses {train.scheduler!r}: {error}")]
            ) from error
        if self.scheduler is not None:
            self.scheduler.step_update(self.step)
        elif train.scheduler not in ("none", "None", ""):
            raise ExperimentError([Fault(f"train, scheduler: timm has no {train.scheduler!r}")])

    def wrap(self) -> None:
        """DDP and torch.compile around the model; anew whenever something is unfrozen."""
        runner: Any = self.model
        if self.accelerator.num_processes > 1:
            on_gpu = self.accelerator.device.type == "cuda"
            runner = nn.parallel.DistributedDataParallel(
                runner, device_ids=[self.accelerator.device.index] if on_gpu else None
            )
        self.ddp = runner if runner is not self.model else None
        self.runner: Any = torch.compile(runner) if self.train.compile else runner

    # --- the loop ---

    def go(self) -> None:
        sizes = f"{len(self.images.train)} training and {len(self.images.val)} validation images"
        self.say(f"{trainable(self.model)} parameters learn; {len(self.images.classes)} classes, {sizes}")
        if not self.result.history:
            self.finish_row({"epoch": 0, "step": 0}, time.perf_counter())
            self.write_checkpoint()
        while self.epoch < self.train.epochs:
            self.thaw()
            began = time.perf_counter()
            skipped = self.one_epoch()
            self.warn_of_dead_gates()
            row = {"epoch": self.epoch + 1, "step": self.step, "train_loss": self.loss_sum / self.steps}
            if self.data.unreadable == "skip":
                row["skipped"] = skipped
            self.epoch, self.batch, self.loss_sum = self.epoch + 1, 0, 0.0
            self.finish_row(row, began)
            self.write_checkpoint()

    def thaw(self) -> None:
        """Unfreeze what is due; its parameters join the optimizer, and DDP counts anew."""
        if self.thawing.step(self.epoch):
            added = extend_optimizer(self.raw_optimizer, self.model, **self.rates())
            self.make_scheduler()
            self.wrap()
            self.say(f"epoch {self.epoch + 1}: {trainable(self.model)} parameters learn from here on"
                     + (f" (new: {', '.join(added)})" if added else ""))  # fmt: skip

    def one_epoch(self) -> int:
        """Train to the end of the epoch; how many images could not be read."""
        self.model.train()
        self.order.at(self.epoch, self.batch * self.train.accumulate)
        batches, skipped, began, first = iter(self.loader), 0, time.perf_counter(), self.batch
        with self.progress() as bar:
            while self.batch < self.steps:
                self.seed_step()
                parts = [next(batches) for _ in range(self.train.accumulate)]
                loss = self.one_step(parts)
                skipped += sum(int((part[2] > 0).sum()) for part in parts)
                self.loss_sum += loss
                self.batch, self.step = self.batch + 1, self.step + 1
                if self.scheduler is not None:
                    self.scheduler.step_update(self.step)
                done = (self.batch - first) * self.train.batch_size * self.train.accumulate
                bar(loss, done * self.accelerator.num_processes / (time.perf_counter() - began))
                every = self.train.save_every
                if self.stop or (every and self.step % every == 0 and self.batch < self.steps):
                    self.write_checkpoint()
                if self.stop:
                    raise RunError(f"{self.stop} at step {self.step}; {self.kept()}")
        return skipped

    def seed_step(self) -> None:
        """Dropout, drop-path and Mixup of a step draw from (seed, step, rank)."""
        seed = images_of.mixed_seed(self.train.seed, 1, self.step, self.accelerator.process_index)
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)

    def one_step(self, parts: Sequence[Sequence[Tensor]]) -> float:
        total = torch.zeros((), device=self.accelerator.device)
        for number, (x, y, _) in enumerate(parts, 1):
            x, y = self.placed(x), y.to(self.accelerator.device, non_blocking=True)
            if self.mixup is not None:
                x, y = self.mixup(x, y)
            more = number < len(parts)
            with self.ddp.no_sync() if self.ddp is not None and more else contextlib.nullcontext():
                with self.accelerator.autocast():
                    logits = self.runner(x)
                loss = self.criterion(logits.float(), y) / len(parts)
                total += loss.detach()
                self.accelerator.backward(loss)
        value = float(self.accelerator.reduce(total, "mean"))
        if not np.isfinite(value):
            raise NonFiniteError(f"the loss became {value} at step {self.step + 1}; {self.kept()}")
        if self.train.clip is not None:
            self.accelerator.clip_grad_norm_(
                [p for p in self.model.parameters() if p.grad is not None], self.train.clip
            )
        self.optimizer.step()
        self.watch_gates()
        self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.update(self.model)
        return value

    def placed(self, x: Tensor) -> Tensor:
        x = x.to(self.accelerator.device, non_blocking=True)
        return x.contiguous(memory_format=torch.channels_last) if self.train.channels_last else x

    # --- gates ---

    def watch_gates(self) -> None:
        """Note which blocks have had a gradient; free once all have."""
        for name, block in api.injected(self.model).items() if len(self.alive) < self.blocks else ():
            if name not in self.alive and any(
                p.grad is not None and bool(p.grad.count_nonzero()) for p in block.parameters()
            ):
                self.alive.add(name)

    @property
    def blocks(self) -> int:
        return len(api.injected(self.model))

    def warn_of_dead_gates(self) -> None:
        learning = [
            n for n, b in api.injected(self.model).items() if any(p.requires_grad for p in b.parameters())
        ]
        dead = [name for name in learning if name not in self.alive]
        if dead and not any(w.startswith("dead gates") for w in self.result.warnings):
            shown = ", ".join(dead[:5]) + (", …" if len(dead) > 5 else "")
            text = (
                f"dead gates: {len(dead)} of {len(learning)} blocks have had no gradient so far ({shown}); "
                f"nothing reaches them, or their last layer and what stands before it are both zero"
            )
            self.result.warnings.append(text)
            self.say(f"warning: {text}")

    # --- measuring ---

    @torch.no_grad()
    def evaluate(self) -> dict[str, Any]:
        """Loss, top-1 and top-5 accuracy over the validation images, exact on any number of processes."""
        model: nn.Module = self.result.model
        model.eval()
        compiled = self.train.compile and self.ddp is None and self.ema is None
        runner = self.runner if compiled else model
        sums = torch.zeros(5, dtype=torch.float64, device=self.accelerator.device)
        for x, y, skipped in self.val_loader:
            with self.accelerator.autocast():
                logits = runner(self.placed(x))
            logits, y = logits.float(), y.to(logits.device)
            self.check_classes(logits)
            counts, target = y >= 0, y.clamp(min=0)
            top = logits.topk(min(5, logits.shape[1]), dim=1).indices == target[:, None]
            losses = nn.functional.cross_entropy(logits, target, reduction="none").double()
            rows = (losses, top[:, 0].double(), top.any(1).double(), torch.ones_like(losses))
            sums += torch.stack([*(r[counts].sum() for r in rows), skipped.to(logits.device).sum().double()])
        loss, top1, top5, count, lost = self.accelerator.reduce(sums, "sum").tolist()
        if not count:
            raise DataError("not one validation image can be read")
        found = {"val_loss": loss / count, "top1": top1 / count, "top5": top5 / count}
        return {**found, "val_skipped": int(lost)} if self.data.unreadable == "skip" else found

    def check_classes(self, logits: Tensor) -> None:
        if logits.ndim != 2 or logits.shape[1] != len(self.images.classes):
            raise DataError(
                f"the model gives outputs of shape {tuple(logits.shape)}, the images have "
                f"{len(self.images.classes)} classes: expected (batch, {len(self.images.classes)}); give the "
                f"model that many classes (num_classes={len(self.images.classes)})"
            )

    def finish_row(self, row: dict[str, Any], began: float) -> None:
        row |= self.evaluate()
        for group in self.raw_optimizer.param_groups:
            row[f"lr {group['name']}"] = group["lr"]
        row["seconds"] = round(time.perf_counter() - began, 2)
        self.result.history.append(row)
        if not self.result.best or row["top1"] > self.result.best["top1"]:
            self.result.best = row
            self.ship(runs.BEST)
        if row["epoch"]:
            self.ship(runs.LAST)
        if self.folder and self.main:
            self.folder.log(self.result.history)
        trained = f"train loss {row['train_loss']:.4f}, " if "train_loss" in row else "before training: "
        self.say(f"epoch {row['epoch']}/{self.train.epochs}: {trained}validation loss {row['val_loss']:.4f}, "
                 f"top-1 {row['top1']:.2%}, top-5 {row['top5']:.2%}, {row['seconds']:.1f} s")  # fmt: skip

    @contextlib.contextmanager
    def progress(self) -> Iterator[Callable[[float, float], None]]:
        """A bar in a terminal, a line now and then in a log."""
        title = f"epoch {self.epoch + 1}/{self.train.epochs}"
        if self.main and sys.stderr.isatty():
            from tqdm import tqdm

            with tqdm(total=self.steps, initial=self.batch, desc=title, unit="step", leave=False) as bar:

                def show(loss: float, speed: float) -> None:
                    bar.update()
                    bar.set_postfix(loss=f"{loss:.3f}", images=f"{speed:.0f}/s")

                yield show
            return

        def tell(loss: float, speed: float) -> None:
            if self.batch % self.train.log_every == 0:
                self.say(f"{title}, step {self.batch}/{self.steps}: loss {loss:.4f}, {speed:.0f} images/s")

        yield tell

    # --- files ---

    def kept(self) -> str:
        return self.folder.last_good() if self.folder else "nothing was saved, as `out` was not given"

    def ship(self, name: str) -> None:
        """The file that is the run's product: a delta, or without blocks a plain state dict."""
        if not self.folder or not self.main:
            return
        model = self.result.model
        with self.folder.replacing(name) as temporary:
            if api.injected(model):
                delta.save(model, temporary, base=self.base)
            else:
                from safetensors.torch import save_file

                state = {k: v.detach().cpu().contiguous().clone() for k, v in model.state_dict().items()}
                save_file(state, temporary, metadata={"format": "pt"})

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that training has changed, as tensors and as JSON."""
        tensors = {f"model.{k}": t for k, t in self.model.state_dict().items()}
        if self.ema is not None:
            tensors |= {f"ema.{k}": t for k, t in self.ema.module.state_dict().items()}
        of_optimizer, numbers = self.optimizer_state()
        tensors |= of_optimizer
        scaler = getattr(self.accelerator, "scaler", None)
        meta = {
            "epoch": self.epoch, "batch": self.batch, "step": self.step, "loss_sum": self.loss_sum,
            "history": self.result.history, "best": self.result.best, "warnings": self.result.warnings,
            "alive": sorted(self.alive), "classes": list(self.images.classes),
            "processes": self.accelerator.num_processes, "settings": self.settings(),
            "optimizer": numbers, "scaler": scaler.state_dict() if scaler else None,
        }  # fmt: skip
        return tensors, json.loads(json.dumps(meta))  # what cannot be JSON is found here, not in the file

    def settings(self) -> dict[str, Any]:
        made = self.experiment.to_dict() if self.experiment else {}
        made.pop("out", None)
        return {**made, "data": asdict(self.data), "train": self.train.to_dict()}

    def write_checkpoint(self) -> None:
        """Only of finite weights, so that a good one is never replaced by a bad one."""
        if not self.folder:
            return
        bad = [
            n
            for n, t in self.model.state_dict().items()
            if t.is_floating_point() and not bool(t.isfinite().all())
        ]
        if bad:
            raise NonFiniteError(f"{bad[0]} is no longer finite at step {self.step}; {self.kept()}")
        if self.main:
            if self.experiment is not None:  # anew each time: a resumed run may have more epochs
                self.folder.write(runs.SETTINGS, json.dumps(self.experiment.to_dict(), indent=2) + "\n")
            self.folder.write(runs.CLASSES, "\n".join(self.images.classes) + "\n")
            self.folder.save(*self.state())
        self.accelerator.wait_for_everyone()

    def resume(self) -> None:
        """Go back to the checkpoint: everything is compared before anything is loaded."""
        assert self.folder is not None
        tensors, meta = self.folder.load()
        self.check_resume(meta)
        for epoch in range(
            meta["epoch"] + bool(meta["batch"])
        ):  # groups join the optimizer in the same order
            self.epoch = epoch
            self.thaw()
        self.epoch, self.batch, self.step = meta["epoch"], meta["batch"], meta["step"]
        self.loss_sum, self.alive = meta["loss_sum"], set(meta["alive"])
        self.result.history, self.result.best = meta["history"], meta["best"]
        self.result.warnings = meta["warnings"]
        _fill(self.model, "model.", tensors, self.folder.path)
        if self.ema is not None:
            _fill(self.ema.module, "ema.", tensors, self.folder.path)
        self.restore_optimizer(tensors, meta)
        scaler = getattr(self.accelerator, "scaler", None)
        if scaler and meta["scaler"]:
            scaler.load_state_dict(meta["scaler"])
        if self.scheduler is not None:
            self.scheduler.step_update(self.step)
        self.say(f"going on from epoch {self.epoch}, step {self.step}")

    def optimizer_state(self) -> tuple[dict[str, Tensor], list[tuple[str, str, Any]]]:
        """Tensors by `optimizer.PARAMETER|ENTRY` or `group.NUMBER|ENTRY`; what is no tensor as triples."""
        state = self.raw_optimizer.state_dict()
        owners = [(f"optimizer.{name}", state["state"].get(i, {})) for i, name in enumerate(self.learning())]
        owners += [(f"group.{i}", group) for i, group in enumerate(state["param_groups"])]
        tensors, numbers = {}, []
        for owner, entries in owners:
            for key, value in entries.items():
                if isinstance(value, Tensor):
                    tensors[f"{owner}|{key}"] = value
                elif isinstance(value, int | float | str | None):
                    numbers.append((owner, key, value))
        return tensors, numbers

    def learning(self) -> list[str]:
        """Names of the optimizer's parameters, in its own order."""
        return [self.names[id(p)] for group in self.raw_optimizer.param_groups for p in group["params"]]

    def restore_optimizer(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        state = self.raw_optimizer.state_dict()
        owners = {f"group.{i}": group for i, group in enumerate(state["param_groups"])}
        for i, name in enumerate(self.learning()):
            owners[f"optimizer.{name}"] = state["state"].setdefault(i, {})
        entries = [(*key.rpartition("|")[::2], t) for key, t in tensors.items() if "|" in key]
        for owner, key, value in [*entries, *meta["optimizer"]]:
            if owner not in owners:
                raise CheckpointError(f"the checkpoint holds {owner}, which this run's optimizer has not")
            owners[owner][key] = value
        state["state"] = {i: held for i, held in state["state"].items() if held}
        self.raw_optimizer.load_state_dict(state)

    def check_resume(self, meta: Mapping[str, Any]) -> None:
        gone = [c for c in meta["classes"] if c not in self.images.classes]
        new = [c for c in self.images.classes if c not in meta["classes"]]
        if gone or new or meta["classes"] != list(self.images.classes):
            raise DataError(
                "the classes are not those that this run began with: "
                + "; ".join(filter(None, (f"gone: {', '.join(gone[:5])}" if gone else "",
                                          f"new: {', '.join(new[:5])}" if new else "",
                                          "" if gone or new else "another order")))
            )  # fmt: skip
        then, now = meta["settings"], json.loads(json.dumps(self.settings()))
        changed = [
            f"{key}: {then.get(part, {}).get(key)!r} then, {value!r} now"
            for part in ("data", "train")
            for key, value in now[part].items()
            if key not in MAY_CHANGE and then.get(part, {}).get(key) != value
        ]
        changed += [
            f"{key}: {then[key]!r} then, {now[key]!r} now"
            for key in ("model", "weights", "recipe")
            if key in then and key in now and then[key] != now[key]
        ]
        if changed:
            raise RunError(
                f"the run in {self.result.out} was begun with other settings ({'; '.join(changed)})"
            )
        if meta["batch"] and meta["processes"] != self.accelerator.num_processes:
            raise RunError(
                f"the checkpoint is from within an epoch on {meta['processes']} processes; there are "
                f"{self.accelerator.num_processes} now, which would see other images"
            )


# --- parts -------------------------------------------------------------------------------------


def _fill(model: nn.Module, prefix: str, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Copy a checkpoint's tensors into a model's own, every key and shape compared."""
    state = model.state_dict()
    saved = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
    odd = [
        k for k in {**state, **saved} if k not in state or k not in saved or state[k].shape != saved[k].shape
    ]
    if odd:
        raise CheckpointError(
            f"the checkpoint in {path} is of another model: {len(odd)} tensors differ ({odd[0]})"
        )
    with torch.no_grad():
        for key, tensor in state.items():
            tensor.copy_(saved[key])


def _accelerator(train: Training) -> Any:
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
    except ImportError as error:
        raise MissingPackageError(
            'fine-tuning needs accelerate, which is not installed: pip install "attninject[train]"'
        ) from error
    AcceleratorState._reset_state()  # a run before this one may have had another precision
    try:
        return Accelerator(cpu=train.device == "cpu", mixed_precision=train.precision)
    except (ValueError, RuntimeError) as error:
        raise ExperimentError(
            [Fault(f"train, precision: {train.precision} is not to be had here: {error}")]
        ) from error


def _forget_accelerator() -> None:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()


def _loss(train: Training, classes: int) -> tuple[nn.Module, Any]:
    from timm.data import Mixup
    from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

    mixup = None
    if train.mixup or train.cutmix:
        mixup = Mixup(train.mixup, train.cutmix, label_smoothing=train.smoothing, num_classes=classes)
    if train.loss == "bce":
        return BinaryCrossEntropy(smoothing=0.0 if mixup else train.smoothing), mixup
    if mixup is not None:
        return SoftTargetCrossEntropy(), mixup
    return (LabelSmoothingCrossEntropy(train.smoothing) if train.smoothing else nn.CrossEntropyLoss()), None


def _switch_checkpointing_on(model: nn.Module) -> None:
    switch: Any = getattr(model, "set_grad_checkpointing", None)
    if not callable(switch):
        raise ExperimentError(
            [Fault(f"train, checkpointing: {type(model).__name__} offers none (timm's models do)")]
        )
    switch(True)


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    """Algorithms of cuDNN that give the same bits each time, for runs that are resumed."""
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before


@contextlib.contextmanager
def _interruptible(run: _Run) -> Iterator[None]:
    """Ctrl-C and SIGTERM end the run after the step, with a checkpoint; a second one ends it at once.

    In a run of one process only: of several, each would stop at a step of its own and wait for the others.
    """
    if run.accelerator.num_processes > 1 or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, frame: Any) -> None:
        if run.stop:
            raise KeyboardInterrupt
        run.stop = f"interrupted by {signal.Signals(number).name}"

    for number in before:
        signal.signal(number, ask)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
