"""What is said about freezing, experiments, data, runs and checkpoints."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from small import images, se
from torch import nn
from torch.utils.data import Dataset

import attninject as ai
from attninject.training.callbacks import printed

from .models import small
from .registry import before, case, cases

# --- freezing ----------------------------------------------------------------------------------


class Net(nn.Module):
    """A stem, two residual units, and a head for `classes`."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.stem, self.units = nn.Conv2d(3, 8, 3, padding=1), nn.Sequential(Unit(), Unit())
        self.head = nn.Linear(8, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.units(self.stem(x)).mean((2, 3)))


class Unit(nn.Module):
    """A residual unit."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.norm(self.conv(x)))


def net(**kw: Any) -> nn.Module:
    """The net with SE behind both norms."""
    torch.manual_seed(0)
    return ai.inject(Net(**kw), **se(after="units.*.norm"), example_inputs=images(size=8))


def _trainable(what: Any, folder: Path) -> str:
    model = ai.freeze(net(), what)
    learning = [name for name, p in model.named_parameters() if p.requires_grad]
    return "\n".join((ai.trainable(model), *learning))


def _groups(rates: dict[str, Any], folder: Path) -> str:
    groups = ai.param_groups(net(), **rates)
    return "\n".join(f"{ {k: v if k != 'params' else len(v) for k, v in g.items()} }" for g in groups)


FREEZE = {
    "backbone": "backbone",
    "blocks": "injected",
    "a pattern": "units.0",
    "a stage": 1,
    "a list": ["head", 1],
}
cases("freeze", [(name, functools.partial(_trainable, what)) for name, what in FREEZE.items()])
cases(
    "freeze",
    [
        ("no stage", lambda folder: ai.freeze(net(), 5)),
        ("no match", lambda folder: ai.freeze(net(), "unit.0")),
        ("no mode of norms", lambda folder: ai.freeze(net(), bn="off")),
        ("no blocks", lambda folder: ai.freeze(Net(), "injected")),
        ("no head", lambda folder: ai.freeze(small())),
        ("no head of that name", lambda folder: ai.freeze(small(), head="inner.c")),
        ("a head of another model", lambda folder: ai.freeze(small(), head=nn.Identity())),
        ("all of it as head", lambda folder: ai.freeze(model := small(), head=model)),
        ("unfreeze nothing", lambda folder: ai.unfreeze(net(), "unit.0")),
        ("gradually nothing", lambda folder: ai.training.GradualUnfreezing(net(), {1: "unitz"})),
        ("trainable", lambda folder: ai.trainable(Net())),
    ],
)
cases(
    "groups",
    [
        ("plain", functools.partial(_groups, {})),
        ("rates", functools.partial(_groups, {"lr": 1e-3, "attn_lr": 1e-2, "head_lr": 0.1})),
        ("layer decay", functools.partial(_groups, {"layer_decay": 0.5})),
        ("too much decay", functools.partial(_groups, {"layer_decay": 1.5})),
    ],
)

# --- experiments -------------------------------------------------------------------------------

FAULTS = """\
modl: timm/resnet18
model: timm/resnet18
recipe: {block: sse, place: stage_ends}
data: {kind: folder, size: 3, hflip: 2, unreadable: ignore}
train:
  epochs: 0
  lr: fast
  optimiser: sgd
  freeze: "layer**"
  unfreeze: [{epoch: 2}]
  precision: fp8
  ema: 1.5
out: !!python/object:os.system x
"""


def _read(text: str, folder: Path) -> Any:
    (folder / "e.yaml").write_text(text, encoding="utf-8")
    return ai.training.read_experiment(folder / "e.yaml")


def _flags(given: dict[str, Any], folder: Path) -> Any:
    return ai.training.read_experiment(None, given)


cases(
    "experiment",
    [
        ("many faults", functools.partial(_read, FAULTS)),
        ("empty", functools.partial(_read, "")),
        ("a list", functools.partial(_read, "- model: x")),
        ("no out", functools.partial(_read, "model: timm/resnet18")),
        ("no root", functools.partial(_read, "model: timm/resnet18\nout: x\ndata: {kind: imagefolder}")),
        ("all of it", lambda folder: _read("model: timm/resnet18\nout: x\nrecipe: se", folder).to_dict()),
        ("no file", lambda folder: ai.training.read_experiment(folder / "e.yaml")),
        ("flags", functools.partial(_flags, {"model": 3, "train": {"epochs": None, "lr": -1}})),
        ("an unknown recipe", functools.partial(_flags, {"model": "m", "out": "x", "recipe": "see"})),
    ],
)

# --- runs --------------------------------------------------------------------------------------


class Bare(Dataset):
    """Images (3, 8, 8) whose class is their brightest channel; it does not tell its classes."""

    def __init__(self, count: int, labels: int = 3) -> None:
        self.count, self.labels = count, labels

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image = torch.zeros(3, 8, 8)
        image[index % 3] += 1
        return image, index % self.labels


class Shades(Bare):
    """The same with names."""

    classes = ("red", "green", "blue")


class Aux(Net):
    """Its training output is a dict."""

    def forward(self, x: torch.Tensor) -> Any:
        return {"out": super().forward(x), "aux": x}


def finetune(model: nn.Module | None = None, data: Any = None, **settings: Any) -> Any:
    """A run of one epoch on the CPU that says nothing; its summary."""
    quick = {"epochs": 1, "batch_size": 8, "lr": 1e-2, "device": "cpu"}
    given = (Shades(16), Shades(6)) if data is None else data
    with printed(quiet=True):
        result = ai.training.finetune(net() if model is None else model, given, **{**quick, **settings})
    return f"{len(result.history)} rows"


def _settings(given: dict[str, Any], folder: Path) -> Any:
    return finetune(**given)


SETTINGS: dict[str, dict[str, Any]] = {
    "unknown and wrong": {"epchs": 3, "lr": -1},
    "second derivatives": {"optimizer": "adahessian"},
    "an odd batch": {"mixup": 1.0, "batch_size": 7},
    "everything frozen": {"freeze": ["backbone", "head", "injected"]},
    "no checkpointing": {"checkpointing": True},
    "nothing to undo": {"unfreeze": [{"epoch": 1, "what": "units"}]},
    "no head": {"model": small(), "freeze": "backbone"},
}
cases("setting", [(name, functools.partial(_settings, given)) for name, given in SETTINGS.items()])
case("setting: no optimizer")(before("nearest", lambda folder: finetune(optimizer="adamx")))
case("setting: no scheduler")(before("'cosin'", lambda folder: finetune(scheduler="cosin")))


def _empty(folder: Path) -> Any:
    for split in ("train", "val"):
        (folder / split).mkdir()
    return finetune(data={"kind": "imagefolder", "root": str(folder)})


def _unreadable(folder: Path) -> Any:
    from PIL import Image

    for split in ("train", "val"):
        for name in ("blue", "green", "red"):
            (folder / split / name).mkdir(parents=True)
            for number in range(4):
                Image.new("RGB", (16, 16)).save(folder / split / name / f"{number}.png")
    (folder / "val" / "blue" / "0.png").write_bytes(b"")
    return finetune(data={"kind": "imagefolder", "root": str(folder), "size": 16})


def _other_classes(folder: Path) -> Any:
    for split, names in (("train", "ab"), ("val", "bc")):
        for name in names:
            (folder / split / name).mkdir(parents=True)
            (folder / split / name / "0.png").touch()
    return finetune(data={"kind": "imagefolder", "root": str(folder), "size": 16})


cases(
    "data",
    [
        ("no folder", lambda folder: finetune(data={"kind": "imagefolder", "root": str(folder / "no")})),
        ("no split", lambda folder: finetune(data={"kind": "imagefolder", "root": str(folder)})),
        ("empty", before("folder: ", _empty)),
        ("unreadable", before("(", _unreadable)),
        ("other classes", _other_classes),
        ("no set of torchvision", lambda folder: finetune(data=_torchvision("CIFAR1", folder))),
        ("too few", lambda folder: finetune(data=(Shades(0), Shades(3)))),
        ("none to measure", lambda folder: finetune(data=(Shades(8), Shades(0)))),
        ("a batch that is too large", lambda folder: finetune(data=(Shades(7), Shades(3)), mixup=0.5)),
        ("a label too many", lambda folder: finetune(data=(Shades(24, 4), Shades(6)))),
        ("no classes", lambda folder: finetune(data=(Bare(6), Bare(3)))),
        ("a head of five", lambda folder: finetune(net(classes=5))),
        ("a dict of outputs", lambda folder: finetune(Aux())),
    ],
)


def _torchvision(name: str, folder: Path) -> dict[str, str]:
    return {"kind": "torchvision", "root": str(folder), "name": name}


@case("run: a loss that is not finite")
def _(folder: Path) -> Any:
    model = net()
    nn.init.constant_(model.head.bias, float("nan"))
    return finetune(model)


@case("run: its folder is taken")
def _(folder: Path) -> Any:
    finetune(out=folder / "a")
    return finetune(out=folder / "a")


@case("run: nothing to resume")
def _(folder: Path) -> Any:
    return finetune(out=folder / "a", resume=True)


def _file(folder: Path) -> Any:
    (folder / "a").touch()
    return finetune(out=folder / "a")


case("run: a file in place of its folder")(before("written", _file))


@case("run: no run to take a model from")
def _(folder: Path) -> Any:
    return ai.training.trained(folder)


def _resumed(folder: Path, change: Callable[[Path], Any] | None = None, **settings: Any) -> Any:
    finetune(out=folder / "a")
    if change is not None:
        change(folder / "a" / "checkpoint.safetensors")
    return finetune(out=folder / "a", resume=True, **{"epochs": 2, **settings})


def _plain(file: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, file)


def _spoilt(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


cases(
    "checkpoint",
    [
        ("other settings", lambda folder: _resumed(folder, lr=0.5, ema=0.9)),
        ("another model", lambda folder: _resumed(folder, model=Net())),
        ("no checkpoint", lambda folder: _resumed(folder, _plain)),
        ("another bit", lambda folder: _resumed(folder, _spoilt)),
        ("gone on", _resumed),
    ],
)


def _without(package: str, **settings: Any) -> Any:
    with mock.patch.dict(sys.modules, {package: None}):
        return finetune(**settings)


@case("missing: accelerate")
def _(folder: Path) -> Any:
    return _without("accelerate")


@case("missing: scikit-learn")
def _(folder: Path) -> Any:
    return _without("sklearn.datasets", data="digits")
