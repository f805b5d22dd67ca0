"""What two processes do for `test_processes.py`; started by torchrun with the folder of the results.

Every run stands in `RUNS` with its settings, so that the test can do the same in one process.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from tiny import Shades, net
from torch import nn

import attninject as ai
from attninject.training import factories, finetune, runs
from attninject.training.sharding import local

BATCH = 8  # of all processes together


class Layered(nn.Module):
    """Two stages of repeated units without batch statistics, a head, and a factor that stays frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.stages = nn.Sequential(*(nn.Sequential(*(Residual() for _ in range(2))) for _ in range(2)))
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.stages(self.stem(x)).mean((2, 3)))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.norm(self.conv(x)))


class Still(Shades):
    """Images that are the same however often and by whomever they are read."""

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        generator = torch.Generator().manual_seed(index)
        image = torch.randn(3, 8, 8, generator=generator)
        image[index % 3] += 1
        return image, index % 3


DATA = Still(48), Still(19)  # 19 do not divide by two processes
COMMON: dict[str, Any] = {"epochs": 2, "lr": 0.05, "optimizer": "sgd", "device": "cpu"}
THAWING = {"freeze": "backbone", "unfreeze": [{"epoch": 2, "what": "stages.1"}]}
RUNS: dict[str, dict[str, Any]] = {
    "ddp": {},
    "ddp_frozen_norms": {"net": "apart", "freeze": "backbone", "ema": 0.5},
    "ddp_norms": {"net": "norms"},
    "ddp_forms": {"net": "forms", "epochs": 1},
    "fsdp2_forms": {"sharding": "fsdp2", "net": "forms", "epochs": 1},
    "fsdp2": {"sharding": "fsdp2", "optimizer": "adamw", "lr": 1e-3},
    "fsdp2_all": {"sharding": "fsdp2", **THAWING, "ema": 0.5, "clip": 0.5, "accumulate": 2},
    "fsdp2_norms": {"sharding": "fsdp2", "net": "norms", "freeze": "backbone"},
}


def model(kind: str) -> nn.Module:
    """The net of a run, with SE blocks, or with its convolutions in two other forms; `apart`: each process its own."""
    if kind in ("norms", "apart"):
        return net(drop=0.0, seed=int(os.environ.get("RANK", "0")) if kind == "apart" else 0)
    torch.manual_seed(0)
    found, x = Layered(), torch.zeros(2, 3, 8, 8)
    if kind == "forms":
        for i, block in enumerate(("dynamic_conv", "deformable_conv")):
            ai.inject(found, block=block, replace=f"stages.{i}.*.conv", example_inputs=x)
        return found
    return ai.inject(found, block="se", after="stages.*.*.norm", args={"reduction": 4}, example_inputs=x)


def go(name: str, processes: int, out: Path, **more: Any) -> tuple[nn.Module, Any]:
    """One run of the table, on so many processes."""
    given = {**COMMON, **RUNS[name], **more}
    made = model(given.pop("net", "layered"))
    given = {"batch_size": BATCH // processes // given.get("accumulate", 1), **given}
    return made, finetune(made, DATA, out=out / name, **given)


class Stops(Still):
    """As a process that is killed: the read of an image in the middle of the second epoch fails."""

    left = 10**9

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return super().__getitem__(index)


def cut_off_and_resumed(out: Path) -> nn.Module:
    """`fsdp2_all`, cut off in the second epoch on every process, and gone on with."""
    made, images = model("layered"), Stops(48)
    images.left = 24 + 14  # of this process: one epoch, and half of the next
    given = {**COMMON, **RUNS["fsdp2_all"], "batch_size": BATCH // 4, "save_every": 1}
    with contextlib.suppress(KeyboardInterrupt):
        finetune(made, (images, DATA[1]), out=out / "resumed", **given)
    made = model("layered")
    finetune(made, DATA, out=out / "resumed", resume=True, **given)
    return made


class Broken(Still):
    """Images of which one, that only the second process reads, cannot be read."""

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if index == 1:
            raise OSError("broken")
        return super().__getitem__(index)


def share_held(made: Any) -> float:
    """How much of the parameters this process's optimizer holds."""
    held = [p for group in made.param_groups for p in group["params"]]
    return sum(local(p).numel() for p in held) / sum(p.numel() for p in held)


def main(out: Path) -> None:
    """All runs, each process writing its figures; then one in which the second process fails."""
    figures: dict[str, Any] = {}
    real, shares = factories.make_optimizer, []

    def listening(*given: Any) -> Any:
        made = real(*given)
        shares.append(share_held(made))
        return made

    factories.make_optimizer = listening
    writing, written = runs.Folder.replacing, []

    def counted(folder: Any, name: str, keep: str | None = None) -> Any:
        written.append(name)
        return writing(folder, name, keep)

    runs.Folder.replacing = counted  # type: ignore[method-assign]
    for name in RUNS:
        made, result = go(name, 2, out)
        figures[name] = {"history": result.history, "class": type(result.model).__name__, "share": shares[-1],
                         "whole": all(type(p) is nn.Parameter for p in result.model.parameters())}  # fmt: skip
        if name == "fsdp2_all":
            again = cut_off_and_resumed(out)
            pairs = zip(made.state_dict().values(), again.state_dict().values(), strict=True)
            figures["resumed equals uninterrupted"] = all(torch.equal(a, b) for a, b in pairs)
    figures["written"] = len(written)
    (out / f"rank{torch.distributed.get_rank()}.json").write_text(json.dumps(figures))
    torch.distributed.barrier()
    finetune(model("layered"), (DATA[0], Broken(19)), out=out / "broken", batch_size=4, **COMMON)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
