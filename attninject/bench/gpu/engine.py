"""`attninject finetune` on the card as a user runs it: precisions, killed and resumed, DDP, FSDP2; its steps on JPEGs."""

from __future__ import annotations

import csv
import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from attninject.bench import finetuning
from attninject.errors import RunError
from attninject.training import devices

from .sheet import Figures, Setting, Task

PART = "engine"
CLASSES, PER_CLASS, LINKS = 8, 100, 16  # 800 JPEGs of 256×256, each under 16 names


def tasks(setting: Setting) -> Iterator[Task]:
    """Digits first, which take seconds; then a folder of JPEGs with loader processes."""
    for name, flags in _runs(setting).items():
        yield Task(PART, name, 2 if name == "digits" else 4, 25, partial(_digits, setting, name, flags))
    yield Task(PART, "killed and resumed", 3, 45, partial(_killed, setting))
    yield Task(PART, "one process of DDP", 5, 30, partial(_launched, setting, "ddp", ()))
    yield Task(
        PART, "one process of FSDP2", 5, 35, partial(_launched, setting, "fsdp2", ("--sharding", "fsdp2"))
    )
    yield Task(PART, "waiting for images", 3, 70, partial(_waiting, setting))


def _runs(setting: Setting) -> dict[str, tuple[str, ...]]:
    """Runs on digits by name → flags."""
    found = {
        "digits": (),
        "digits bf16": ("--precision", "bf16"),
        "digits fp16": ("--precision", "fp16"),
        "digits channels_last": ("--channels-last", "--precision", "bf16"),
        "digits checkpointing": ("--checkpointing",),
        "digits compiled": ("--compile", "--precision", "bf16"),
    }
    left_out = {"digits compiled", "digits fp16"} if setting.rehearse else set()
    left_out |= set() if setting.bf16 else {name for name, flags in found.items() if "bf16" in flags}
    return {name: flags for name, flags in found.items() if name not in left_out}


def _digits(setting: Setting, name: str, flags: Sequence[str], left: float) -> Figures:
    """A run's figures, best and before training; the second epoch's seconds, when kernels are chosen."""
    out = setting.folder / "runs" / name.replace(" ", "_")
    began = time.perf_counter()
    _call([*_finetune(setting), *flags, "--out", str(out)], left)
    rows = _log(out)
    return {
        "top1": float(rows[-1]["top1"]), "before": float(rows[0]["top1"]), "val_loss": float(rows[-1]["val_loss"]),
        "epoch_seconds": float(rows[-1]["seconds"]), "all_seconds": time.perf_counter() - began,
    }  # fmt: skip


def _finetune(setting: Setting) -> list[str]:
    model, epochs = ("timm/test_resnet", "1") if setting.rehearse else ("timm/resnet18", "3")
    device = ["--device", "cpu"] if setting.device == "cpu" else []
    rule = ["--block", "cbam", "--place", "residual_branch"]
    return [
        "finetune",
        "--model",
        model,
        *rule,
        "--epochs",
        epochs,
        "--lr",
        "1e-3",
        "--attn-lr",
        "1e-2",
        *device,
    ]


def _killed(setting: Setting, left: float) -> Figures:
    """Two runs that are left alone, and one that is killed twice and resumed: the three files are the same bytes."""
    runs = setting.folder / "runs"
    common = [*_finetune(setting), "--save-every", "3"]
    for name in ("whole", "again"):
        _call([*common, "--out", str(runs / name)], left)
    out = runs / "killed"
    checkpoint, killed = out / "checkpoint.safetensors", [*common, "--out", str(out)]
    kills = _kill_after_a_checkpoint(killed, checkpoint)
    kills += _kill_after_a_checkpoint([*killed, "--resume"], checkpoint)
    _call([*killed, "--resume"], left)
    first, second, third = (_weights(runs / name) for name in ("whole", "again", "killed"))
    return {"deterministic": first == second, "bit_identical": first == third, "kills": kills}


def _kill_after_a_checkpoint(arguments: Sequence[str], file: Path) -> int:
    """A run until its checkpoint has been written anew, then SIGKILL; 1 if that came before the run's own end."""
    before = file.stat().st_mtime_ns if file.is_file() else 0
    command, nowhere = [sys.executable, "-m", "attninject", *arguments], subprocess.DEVNULL
    with subprocess.Popen(command, stdout=nowhere, stderr=nowhere) as process:
        try:
            while process.poll() is None:
                if file.is_file() and file.stat().st_mtime_ns != before:
                    return 1
                time.sleep(0.01)
            return 0
        finally:
            process.kill()


def _weights(folder: Path) -> str:
    """A digest of the last file; it says when nothing was made, so that equal tensors are equal files."""
    return hashlib.sha256((folder / "last.safetensors").read_bytes()).hexdigest()


def _launched(setting: Setting, name: str, flags: Sequence[str], left: float) -> Figures:
    """One process under torchrun, which makes the engine wrap the model."""
    out = setting.folder / "runs" / name
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", "-m", "attninject"]
    _call([*_finetune(setting), *flags, "--out", str(out)], left, launcher)
    rows = _log(out)
    return {"top1": float(rows[-1]["top1"]), "val_loss": float(rows[-1]["val_loss"])}


def _waiting(setting: Setting, left: float) -> Figures:
    """Images per second of the engine's steps on what is read from JPEGs, over those of the same on a batch in memory."""
    batch, size, workers = (4, 32, 0) if setting.rehearse else (64, 224, 8)
    model = "timm/test_resnet" if setting.rehearse else "timm/resnet50"
    task = finetuning.Task(
        model, "se", batch, size, "bf16" if setting.bf16 and not setting.rehearse else "no", channels_last=True,
        device="cpu" if setting.device == "cpu" else "auto",
    )  # fmt: skip
    folder = _photographs(setting)
    try:
        with devices.deterministic():  # as the engine
            held, reading = finetuning.Step(task), finetuning.Step(task, folder, workers)
            held.take(3)
            in_memory = _rate(held, [held.batch] * 10)
            from_files = _second_half(reading)
    finally:
        devices.forget_accelerator()
    return {
        "from_files": from_files, "in_memory": in_memory, "busy": from_files / in_memory, "workers": workers,
        "batch": batch,
    }  # fmt: skip


def _second_half(step: finetuning.Step) -> float:
    """Images per second of the second half of an epoch: what had been read ahead when it began is used up by then."""
    coming = iter(step.run.loaders.train)
    for _ in range(step.run.loaders.steps // 2):
        step.take(batch=next(coming))
    return _rate(step, coming)


def _rate(step: finetuning.Step, batches: Iterable[Any]) -> float:
    """Images per second of steps on some batches."""
    began = time.perf_counter()
    for count, batch in enumerate(batches, 1):  # noqa: B007 (read behind the loop)
        step.take(batch=batch)
    return count * step.task.batch_size / (time.perf_counter() - began)


def _photographs(setting: Setting) -> Path:
    """A folder of JPEGs of smooth noise, which decode as slowly as photographs do."""
    from PIL import Image

    root = setting.folder / "photographs"
    generator = np.random.default_rng(0)
    side, count, links = (48, 4, 1) if setting.rehearse else (256, PER_CLASS, LINKS)
    for label in range(CLASSES):
        folder = root / f"class{label}"
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(count):
            coarse = torch.from_numpy(generator.random((1, 3, side // 8, side // 8), dtype=np.float32))
            smooth = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bicubic").clamp(0, 1)[0]
            pixels = (smooth.permute(1, 2, 0).numpy() * 255).astype("uint8")
            file = folder / f"{number}.jpg"
            Image.fromarray(pixels).save(file, quality=90)
            for link in range(1, links):
                os.link(file, folder / f"{number}-{link}.jpg")
    return root


def _call(arguments: Sequence[str], left: float, launcher: Sequence[str] = ("-m", "attninject")) -> None:
    """The command line in a process of its own.

    Raises:
        RunError: it failed, or took longer than was left; with its last line.
    """
    command = [sys.executable, *launcher, *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=max(left, 1))
    except subprocess.TimeoutExpired as error:
        raise RunError(f"no time left for {' '.join(arguments[:3])}") from error
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no word"])[-1]
        raise RunError(f"{' '.join(arguments[:3])} …: exit code {done.returncode}: {last[:300]}")


def _log(folder: Path) -> list[dict[str, str]]:
    with (folder / "log.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
