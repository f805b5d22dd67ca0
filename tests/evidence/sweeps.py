"""Small pictures, a sweep's settings on them, and an engine that runs in this process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from attninject.errors import AttnInjectError
from attninject.evidence.sweep_design import Run
from attninject.evidence.sweep_engines import Event, Tell
from attninject.evidence.sweep_runs import carry_on


def pictures(root: Path, train: int = 10, val: int = 7) -> Path:
    """Two classes, told by a faint tint; so many of each for training and validation."""
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", train), ("val", val)):
        for label in range(2):
            folder = root / split / "ab"[label]
            folder.mkdir(parents=True)
            for number in range(count):
                noise = torch.randint(0, 200, (16, 16, 3), generator=generator, dtype=torch.uint8)
                noise[..., label] += 12
                Image.fromarray(noise.numpy()).save(folder / f"{number}.png")
    return root


def settings(root: Path, out: Path, **more: Any) -> dict[str, Any]:
    """Two arms, plain and SE, on two seeds."""
    return {
        "model": "timm/resnet10t",
        "data": {"kind": "imagefolder", "root": str(root), "size": 32, "augment": "none"},
        "train": {"epochs": 2, "batch_size": 10, "lr": 1e-3, "attn_lr": 1e-2},
        "out": str(out),
        "seeds": 2,
        "recipe": "se",
        "controls": {"bottleneck": False, "random_sites": 0},
        **more,
    }


class Here:
    """Runs one after the other in this process; `stop` of them, then it is interrupted."""

    def __init__(self, stop: int | None = None) -> None:
        self.stop, self.begun = stop, 0

    def carry_out(self, waiting: Sequence[Run], tell: Tell) -> None:
        threads = torch.get_num_threads()
        try:
            for run in waiting:
                if self.begun == self.stop:
                    raise KeyboardInterrupt
                self.begun += 1
                tell(_done(run))
        finally:
            torch.set_num_threads(threads)


def _done(run: Run) -> Event:
    try:
        carry_on(run.experiment.to_dict(), 1, lambda text: None)
    except AttnInjectError as error:
        return Event(run, "failed", str(error))
    return Event(run, "done")


def quiet(text: str) -> None:
    """Say nothing."""
