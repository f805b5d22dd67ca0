"""The machine that a run stands on: Accelerate's devices, repeatable algorithms, signals."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from attninject.errors import ExperimentError, Fault, MissingPackageError

from .experiment import Training


def open_accelerator(train: Training) -> Any:
    """Accelerate's view of device, processes and precision."""
    try:
        from accelerate import Accelerator
        from accelerate.utils import GradientAccumulationPlugin
    except ImportError as error:
        raise MissingPackageError(
            'fine-tuning needs accelerate, which is not installed: pip install "attninject[train]"'
        ) from error
    _refuse_other_engines()
    forget_accelerator()  # a run before this one may have had another precision
    try:
        # accumulation is the loop's: a number from Accelerate's config would divide the loss once more
        own = GradientAccumulationPlugin(num_steps=1)
        accelerator = Accelerator(
            cpu=train.device == "cpu", mixed_precision=train.precision, gradient_accumulation_plugin=own
        )
        # a loop of the caller's that ended within its window would leave every step of the optimizer out
        accelerator.gradient_state._set_sync_gradients(True)
    except (ValueError, RuntimeError) as error:
        raise ExperimentError(
            [Fault(f"train, precision: {train.precision or 'as configured'} is not to be had here: {error}")]
        ) from error
    if fsdp_asked_for(train) and accelerator.device.type == "cpu" and not cpus_average(torch.__version__):
        text = f"torch {torch.__version__} adds gradients up on CPUs where it should average them"
        raise ExperimentError([Fault(f"train, sharding: {text}; take sharding none, or torch 2.9")])
    return accelerator


def cpus_average(version: str) -> bool:
    """Whether FSDP 2 on CPUs gives the mean of the processes' gradients: torch 2.8 gives the sum, 2.6 fails."""
    return tuple(int(part) for part in version.split(".")[:2]) >= (2, 9)


def forget_accelerator() -> None:
    """Let the next run have settings of its own."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()


def leave_processes() -> None:
    """Take leave of the other processes, once all are done."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def fsdp_asked_for(train: Training) -> bool:
    """By the setting, or by `accelerate launch --use_fsdp` (an Accelerate config with FSDP)."""
    return train.sharding == "fsdp2" or fsdp_by_accelerate()


def fsdp_by_accelerate() -> bool:
    """Whether `accelerate launch` put down that it wants FSDP."""
    return _said("ACCELERATE_USE_FSDP")


def _said(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("true", "1", "yes")


def _refuse_other_engines() -> None:
    """What an Accelerate config may ask for and is not here is named, not passed over."""
    others = {
        "DEEPSPEED": "DeepSpeed",
        "MEGATRON_LM": "Megatron-LM",
        "PARALLELISM_CONFIG": "model parallelism",
    }
    asked = [word for name, word in others.items() if _said(f"ACCELERATE_USE_{name}")]
    if fsdp_by_accelerate() and os.environ.get("FSDP_VERSION", "1") != "2":
        asked.append("FSDP 1")
    if asked:
        raise ExperimentError(
            [
                Fault(
                    f"Accelerate's config asks for {', '.join(asked)}; the engine has DDP and FSDP 2 (fsdp_version: 2)"
                )
            ]
        )


@contextmanager
def deterministic() -> Iterator[None]:
    """Algorithms of cuDNN that give the same bits each time, for runs that are resumed."""
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before


@contextmanager
def interruptible(ask: Callable[[str], None], processes: int) -> Iterator[None]:
    """Ctrl-C and SIGTERM `ask` the run to end after its step; a second one ends it at once.

    In a run of one process only: of several, each would stop at a step of its own and wait for the others.
    """
    if processes > 1 or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    asked: list[int] = []

    def heard(number: int, frame: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        ask(f"interrupted by {signal.Signals(number).name}")

    for number in before:
        signal.signal(number, heard)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
