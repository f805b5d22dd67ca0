"""The settings of a run: a file, a dict or flags become a frozen `Experiment`, or one report of all faults.

The tables below are the settings: name, how a value is checked, what it means. The dataclasses hold the
defaults. The command line makes a flag of every row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from attninject.errors import ExperimentError, PatternError, RecipeError
from attninject.recipe.checks import Checker, boolean, checked_fields, choice, integer, plain_value, words
from attninject.recipe.frozen import FrozenDict
from attninject.recipe.loading import load_recipe, recipe_names
from attninject.recipe.patterns import compile_pattern
from attninject.recipe.report import BAD, Node, Report
from attninject.recipe.yaml_text import from_python, read_file, read_yaml

from .words import WORDS

DATA_KINDS = ("digits", "imagefolder", "timm", "torchvision")
FORM = "a mapping with `model:`"


# --- checks ------------------------------------------------------------------------------------


def _number(what: str, low: float = -math.inf, high: float = math.inf, above: bool = False) -> Checker:
    def check(node: Node, report: Report) -> Any:
        value = node.value
        plain = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if plain and (low < value if above else low <= value) and value <= high:
            return float(value)
        return report.expected(node, what)

    return check


def _maybe(check: Checker) -> Checker:
    """The same, or null."""
    return lambda node, report: None if node.value is None else check(node, report)


def _what(node: Node, report: Report) -> Any:
    if isinstance(node.value, list) and node.value:
        parts = [_what(item, report) for item in node.value]
        return BAD if BAD in parts else tuple(parts)
    if isinstance(node.value, int) and not isinstance(node.value, bool) and node.value:
        return node.value
    if not isinstance(node.value, str):
        return report.expected(node, f"{', '.join(WORDS)}, a pattern, a stage's number, or a list of these")
    try:
        return compile_pattern(node.value).text
    except PatternError as error:
        return report.add(node, str(error))


def _unfreeze(node: Node, report: Report) -> Any:
    if not isinstance(node.value, list):
        return report.expected(node, "a list such as [{epoch: 2, what: layer4}]")
    steps = []
    for item in node.value:
        if not isinstance(item.value, dict):
            return report.expected(item, "a mapping such as {epoch: 2, what: layer4}")
        checkers = {"epoch": integer("the number of an epoch, from 1", 1), "what": _what}
        values = checked_fields(item, checkers, "key", report)
        if set(values) != {"epoch", "what"}:
            return report.add(item, "expected both `epoch` and `what`, as in {epoch: 2, what: layer4}")
        steps.append((values["epoch"], values["what"]))
    return BAD if any(BAD in step for step in steps) else tuple(steps)


def _recipe_field(node: Node, report: Report) -> Any:
    if node.value is None:
        return None
    value = plain_value(node, report)
    if value is BAD or not isinstance(value, str | Mapping):
        return (
            BAD if value is BAD else report.expected(node, "a recipe's name, a file, or a rule as a mapping")
        )
    try:
        loaded = load_recipe(value)
    except RecipeError as error:
        return report.add(node, "; ".join(str(fault) for fault in error.faults))
    if isinstance(value, Mapping) or value in recipe_names():
        return value
    return FrozenDict(loaded.to_dict())  # the run's folder stands for itself when the file moves or changes


def _precision(node: Node, report: Report) -> Any:
    """A word; YAML reads a bare `no` as false."""
    found = Node("no", node.line, node.column) if node.value is False else node
    return choice("a precision", ("no", "bf16", "fp16"))(found, report)


_rate, _share = _number("a rate above 0", 0, above=True), _number("a number from 0 to below 1", 0, 0.999999)
_from_zero, _whole, _from_one = (
    _number("a number from 0", 0),
    integer("a number from 0", 0),
    integer("a number from 1", 1),
)

TOP: dict[str, tuple[Checker, str]] = {
    "model": (words, "torchvision/resnet50, timm/convnext_tiny, …"),
    "weights": (words, "none (random; the default), default, a tag, or a local .pth/.safetensors file"),
    "recipe": (_recipe_field, "a shipped recipe's name or a YAML file; null: plain fine-tuning"),
    "out": (words, "folder of the run"),
}
DATA: dict[str, tuple[Checker, str]] = {
    "kind": (choice("a kind of data", DATA_KINDS), f"one of {', '.join(DATA_KINDS)}"),
    "root": (_maybe(words), "folder of the images"),
    "name": (_maybe(words),
        "name for timm's create_dataset (torch/cifar10, hfds/…) or of a torchvision class (CIFAR10)"),
    "train_split": (words, "name of the training split, or of its folder"),
    "val_split": (words, "name of the validation split, or of its folder"),
    "val_fraction": (_maybe(_number("a fraction between 0 and 1", 0, 0.9, above=True)),
        "hold out this part of the training images instead"),
    "size": (_maybe(integer("an image size in pixels", 8)), "image size; default: the model's own, digits: 32"),
    "augment": (choice("an augmentation", ("default", "none")),
        "default: timm's random crop, flip and colour jitter; none: resize only"),
    "auto_augment": (_maybe(words), "timm's policy, as rand-m9-mstd0.5-inc1"),
    "color_jitter": (_from_zero, "strength of timm's colour jitter"),
    "hflip": (_number("a probability", 0, 1), "probability of a horizontal flip"),
    "reprob": (_number("a probability", 0, 1), "probability of random erasing"),
    "unreadable": (choice("what to do with unreadable images", ("refuse", "skip")),
        "refuse: stop and name the file; skip: leave out and count"),
    "workers": (_whole, "loader processes; 0: load in the training process"),
}  # fmt: skip
TRAIN: dict[str, tuple[Checker, str]] = {
    "epochs": (_from_one, "epochs"),
    "batch_size": (_from_one, "images per process and forward"),
    "accumulate": (_from_one, "forwards per optimizer step; what does not fill an epoch's last step is left out"),
    "lr": (_rate, "learning rate of the backbone"),
    "attn_lr": (_maybe(_rate), "learning rate of the blocks; default: lr"),
    "head_lr": (_maybe(_rate), "learning rate of the head; default: lr"),
    "weight_decay": (_from_zero, "weight decay of kernels and matrices"),
    "layer_decay": (_maybe(_number("a factor above 0, at most 1", 0, 1, above=True)),
        "timm's layer-wise learning rate decay"),
    "freeze": (_maybe(_what), f"{', '.join(WORDS)}, a pattern, a stage's number, or a list of these"),
    "unfreeze": (_unfreeze, "gradual unfreezing: [{epoch: 2, what: layer4}]; epochs from 1"),
    "bn": (choice("a mode for frozen batch norms", ("eval", "train")),
        "frozen batch norms keep (eval) or update (train) their statistics"),
    "head": (_maybe(words), "the head's name, where it is not found"),
    "optimizer": (words, "any of timm's optimizers: adamw, sgd, lamb, …"),
    "momentum": (_share, "momentum of optimizers that have one"),
    "scheduler": (words, "any of timm's schedulers: cosine, step, poly, none, …"),
    "warmup_epochs": (_from_zero, "epochs of linear warm-up"),
    "min_lr": (_from_zero, "where the schedule ends"),
    "loss": (choice("a loss", ("ce", "bce")),
        "ce: cross-entropy; bce: binary cross-entropy on one-hot targets"),
    "smoothing": (_share, "label smoothing"),
    "mixup": (_from_zero, "Mixup's alpha; 0: off"),
    "cutmix": (_from_zero, "CutMix's alpha; 0: off"),
    "ema": (_maybe(_number("a decay between 0 and 1", 0, 0.999999999, above=True)),
        "decay of an average of the weights, which is then evaluated and saved"),
    "precision": (_maybe(_precision),
        "mixed precision: no, bf16 or fp16; default: as Accelerate's config says, else no"),
    "clip": (_maybe(_rate), "clip the gradient's norm"),
    "channels_last": (boolean, "channels_last memory format"),
    "compile": (boolean, "torch.compile the model"),
    "checkpointing": (boolean, "gradient checkpointing, for models that offer it"),
    "sync_bn": (boolean, "SyncBatchNorm across GPUs"),
    "sharding": (choice("a way to share the weights out", ("none", "fsdp2")),
        "none: every process holds the model (DDP); fsdp2: each a piece (as accelerate launch --use_fsdp)"),
    "device": (choice("a device", ("auto", "cpu")), "auto: a GPU where there is one"),
    "seed": (_whole, "seed of weights, order, augmentation and dropout"),
    "save_every": (_maybe(_from_one), "optimizer steps between checkpoints; default: at epoch ends"),
    "log_every": (_from_one, "optimizer steps between lines of a log"),
}  # fmt: skip


# --- what comes out ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Data:
    """Where the images come from; the meaning of each field stands in `DATA`."""

    kind: str = "digits"
    root: str | None = None
    name: str | None = None
    train_split: str = "train"
    val_split: str = "val"
    val_fraction: float | None = None
    size: int | None = None
    augment: str = "default"
    auto_augment: str | None = None
    color_jitter: float = 0.4
    hflip: float = 0.5
    reprob: float = 0.0
    unreadable: str = "refuse"
    workers: int = 0


@dataclass(frozen=True)
class Training:
    """How to train; the meaning of each field stands in `TRAIN`."""

    epochs: int = 10
    batch_size: int = 64
    accumulate: int = 1
    lr: float = 1e-4
    attn_lr: float | None = None
    head_lr: float | None = None
    weight_decay: float = 0.05
    layer_decay: float | None = None
    freeze: str | int | tuple[str | int, ...] | None = None
    unfreeze: tuple[tuple[int, Any], ...] = ()
    bn: str = "eval"
    head: str | None = None
    optimizer: str = "adamw"
    momentum: float = 0.9
    scheduler: str = "cosine"
    warmup_epochs: float = 0.0
    min_lr: float = 0.0
    loss: str = "ce"
    smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    ema: float | None = None
    precision: str | None = None
    clip: float | None = None
    channels_last: bool = False
    compile: bool = False
    checkpointing: bool = False
    sync_bn: bool = False
    sharding: str = "none"
    device: str = "auto"
    seed: int = 0
    save_every: int | None = None
    log_every: int = 50

    def to_dict(self) -> dict[str, Any]:
        """As in an experiment file."""
        found = asdict(self)
        found["unfreeze"] = [{"epoch": epoch, "what": _plain(what)} for epoch, what in self.unfreeze]
        return {key: _plain(value) for key, value in found.items()}


@dataclass(frozen=True)
class Experiment:
    """One run: what `attninject finetune` carries out."""

    model: str
    out: str
    weights: str = "none"
    recipe: Any = None
    data: Data = field(default_factory=Data)
    train: Training = field(default_factory=Training)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; `read_experiment` takes it back."""
        top = {"model": self.model, "weights": self.weights, "recipe": _plain(self.recipe), "out": self.out}
        return {**top, "data": asdict(self.data), "train": self.train.to_dict()}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


# --- the way in --------------------------------------------------------------------------------


def read_experiment(path: str | Path | None, overrides: Mapping[str, Any] | None = None) -> Experiment:
    """An experiment from a YAML (or JSON) file, flags laid over it: {"model": …, "train": {"lr": …}}.

    Raises:
        ExperimentError: with every fault of the file, each with its line.
    """
    report = Report(None if path is None else str(path), error=ExperimentError)
    values: dict[str, Any] = {}
    if path is not None:
        text = read_file(str(path), error=ExperimentError)
        node = read_yaml(text, report, "experiment", FORM)
        values = {} if node is None else _sections(node, report)
        report.raise_if_any()
    flags = Report(None, "flags" if overrides else "", error=ExperimentError)
    given = _sections(from_python(dict(overrides or {}), flags), flags)
    flags.raise_if_any()
    merged = {**values, **given, **_nulls(overrides or {}, TOP, flags)}
    for part, table in (("data", DATA), ("train", TRAIN)):
        nulls = _nulls((overrides or {}).get(part) or {}, table, flags.within(part))
        merged[part] = {**values.get(part, {}), **given.get(part, {}), **nulls}
    flags.raise_if_any()
    missing = [key for key in ("model", "out") if key not in merged]
    if missing:
        flags.add(
            Node(None),
            f"{' and '.join(f'`{key}`' for key in missing)} missing: give it in the file or as a flag",
        )
        flags.raise_if_any()
    data, train = Data(**merged.pop("data")), Training(**merged.pop("train"))
    made = Experiment(**merged, data=data, train=train)
    _check_together(made)
    return made


def _nulls(
    given: Mapping[str, Any], table: Mapping[str, tuple[Checker, str]], flags: Report
) -> dict[str, Any]:
    """What is laid over a file as None is null there, not absent."""
    found = {key: table[key][0] for key, value in given.items() if value is None and key in table}
    return {key: check(Node(None), flags.within(key)) for key, check in found.items()}


def settings(data: Any = "digits", **train: Any) -> tuple[Data, Training]:
    """The two parts of an experiment from Python: data as a kind or a mapping, training as keywords."""
    report = Report(error=ExperimentError)
    given = {"kind": data} if isinstance(data, str) else dict(data or {})
    values = _sections(from_python({"data": given, "train": train}, report), report)
    report.raise_if_any()
    made = Data(**values.get("data", {})), Training(**values.get("train", {}))
    _check_together(Experiment("given", "given", data=made[0], train=made[1]))
    return made


def _sections(node: Node, report: Report) -> dict[str, Any]:
    if not isinstance(node.value, dict):
        report.expected(node, FORM)
        return {}
    checkers = {key: check for key, (check, _) in TOP.items()}
    checkers |= {"data": _section(DATA), "train": _section(TRAIN)}
    return checked_fields(node, checkers, "key", report)


def _section(table: Mapping[str, tuple[Checker, str]]) -> Checker:
    def check(node: Node, report: Report) -> Any:
        if not isinstance(node.value, dict):
            return report.expected(node, "a mapping")
        return checked_fields(node, {key: check for key, (check, _) in table.items()}, "key", report)

    return check


def _check_together(made: Experiment) -> None:
    """What settings demand or forbid one another."""
    report, data, train = Report(error=ExperimentError), made.data, made.train
    nowhere = Node(None)
    if data.kind != "digits" and not data.root:
        report.add(nowhere, f"data kind {data.kind!r} needs `root`, the folder of the images")
    if data.kind in ("timm", "torchvision") and not data.name:
        report.add(nowhere, f"data kind {data.kind!r} needs `name`, such as CIFAR10")
    if (train.mixup or train.cutmix) and train.batch_size % 2:
        report.add(
            nowhere, f"Mixup and CutMix pair images: `batch_size` must be even, it is {train.batch_size}"
        )
    if train.unfreeze and train.freeze is None:
        report.add(nowhere, "`unfreeze` has nothing to undo without `freeze`")
    report.raise_if_any()
