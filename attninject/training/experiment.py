"""The settings of a run: a file, a dict or flags become a frozen `Experiment`, or one report of all faults.

What settings there are stands in `finetune_settings`; the dataclasses here hold the defaults. No torch here: the
command line describes its flags from this module.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from attninject import plugins
from attninject.errors import ExperimentError
from attninject.recipe.checks import Checker, checked_fields
from attninject.recipe.report import BAD, Node, Report
from attninject.recipe.yaml_text import from_python, read_file, read_yaml

from .finetune_settings import DATA, DATA_KINDS, TOP, TRAIN, Table

__all__ = [
    "DATA",
    "TOP",
    "TRAIN",
    "Data",
    "Experiment",
    "Training",
    "data_of",
    "data_section",
    "read_experiment",
    "settings",
]

FORM = "a mapping with `model:`"
HELD_OUT = 0.2
"""The part of a folder without splits that is held out for validation."""


@dataclass(frozen=True)
class Data:
    """Where the images come from; the meaning of each field stands in `DATA`."""

    kind: str = "digits"
    root: str | None = None
    labels: str | None = None
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
    images: int = 256
    classes: int = 10
    seed: int = 0
    workers: int = 0


GATE_RATE = 10.0
"""The blocks' rate in times `lr`, unless `attn_lr` says another: measured by `python -m attninject.evidence.gate_rates`.

At `lr` itself gates that begin at 1 stay there for the length of a usual fine-tuning, and nothing is learnt of them.
"""


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
    class_weights: str | tuple[tuple[str, float], ...] | None = None
    mixup: float = 0.0
    cutmix: float = 0.0
    ema: float | None = None
    precision: str | None = None
    monitor: str | None = None
    patience: int | None = None
    min_delta: float = 0.0
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
    track: tuple[str, ...] | None = None
    project: str = "attninject"

    @property
    def rate_of_blocks(self) -> float:
        """`attn_lr`, or its default."""
        return GATE_RATE * self.lr if self.attn_lr is None else self.attn_lr

    def to_dict(self) -> dict[str, Any]:
        """As in an experiment file."""
        found = asdict(self)
        found["unfreeze"] = [{"epoch": epoch, "what": _plain(what)} for epoch, what in self.unfreeze]
        if isinstance(self.class_weights, tuple):
            found["class_weights"] = dict(self.class_weights)
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
        with plugins.named_beside(Path(path)):
            values = {} if node is None else _sections(node, report)
            report.raise_if_any()
    flags = Report(None, "flags" if overrides else "", error=ExperimentError)
    given = _sections(from_python(dict(overrides or {}), flags), flags)
    flags.raise_if_any()
    merged = {**values, **given, **_nulls(overrides or {}, TOP, flags)}
    for part, table in (("data", DATA), ("train", TRAIN)):
        over = (overrides or {}).get(part) or {}
        nulls = _nulls(over if isinstance(over, Mapping) else {}, table, flags.within(part))
        merged[part] = {**values.get(part, {}), **given.get(part, {}), **nulls}
    if given.get("data", {}).get("kind", "digits") not in DATA_KINDS and "root" not in given["data"]:
        merged["data"].pop("root", None)  # the folder that a flag names takes the place of the file's
    flags.raise_if_any()
    missing = [key for key in ("model", "out") if key not in merged]
    if missing:
        flags.add(
            Node(None),
            f"{' and '.join(f'`{key}`' for key in missing)} missing: give it in the file or as a flag",
        )
        flags.raise_if_any()
    data, train = data_of(merged.pop("data")), Training(**merged.pop("train"))
    made = Experiment(**merged, data=data, train=train)
    _check_together(made)
    return made


def _nulls(given: Mapping[str, Any], table: Table, flags: Report) -> dict[str, Any]:
    """What is laid over a file as None is null there, not absent."""
    found = {key: table[key][0] for key, value in given.items() if value is None and key in table}
    return {key: check(Node(None), flags.within(key)) for key, check in found.items()}


def settings(data: Any = "digits", **train: Any) -> tuple[Data, Training]:
    """The two parts of an experiment from Python: data as a kind, a folder or a mapping, training as keywords."""
    report = Report(error=ExperimentError)
    values = _sections(from_python({"data": data or {}, "train": train}, report), report)
    report.raise_if_any()
    made = data_of(values.get("data", {})), Training(**values.get("train", {}))
    _check_together(Experiment("given", "given", data=made[0], train=made[1]))
    return made


def data_of(values: Mapping[str, Any]) -> Data:
    """The settings `data`; a folder as `kind` is an image folder, or with `labels` of several labels each.

    Without splits in it a part is held out.

    Raises:
        ExperimentError: a folder as `kind`, and `root` beside it.
    """
    kind = values.get("kind", "digits")
    if kind in DATA_KINDS:
        return Data(**values)
    if values.get("root") is not None:
        report = Report(error=ExperimentError)
        report.add(Node(None), f"data {kind!r} is a folder, and `root` is another: give one of the two")
        report.raise_if_any()
    found = Data(**{**values, "kind": "multilabel" if values.get("labels") else "imagefolder", "root": kind})
    divided = found.val_fraction is not None or (Path(kind) / found.train_split).is_dir()
    return found if divided else replace(found, val_fraction=HELD_OUT)


def data_section(node: Node, report: Report) -> Any:
    """The settings `data` as a mapping, or as a text: a kind or a folder."""
    if not isinstance(node.value, str):
        return _section(DATA)(node, report)
    kind = DATA["kind"][0](node, report)
    return BAD if kind is BAD else {"kind": kind}


def _sections(node: Node, report: Report) -> dict[str, Any]:
    if not isinstance(node.value, dict):
        report.expected(node, FORM)
        return {}
    checkers = {key: check for key, (check, _) in TOP.items()}
    checkers |= {"data": data_section, "train": _section(TRAIN)}
    return checked_fields(node, checkers, "key", report)


def _section(table: Table) -> Checker:
    def check(node: Node, report: Report) -> Any:
        if not isinstance(node.value, dict):
            return report.expected(node, "a mapping")
        return checked_fields(node, {key: check for key, (check, _) in table.items()}, "key", report)

    return check


def _check_together(made: Experiment) -> None:
    """What settings demand or forbid one another."""
    report, data, train = Report(error=ExperimentError), made.data, made.train
    nowhere = Node(None)
    if data.kind not in ("digits", "random") and not data.root:
        report.add(nowhere, f"data kind {data.kind!r} needs `root`, the folder of the images")
    if data.kind in ("timm", "torchvision") and not data.name:
        report.add(nowhere, f"data kind {data.kind!r} needs `name`, such as CIFAR10")
    if data.labels and data.kind != "multilabel":
        report.add(
            nowhere, f"`labels` is for images of several labels each: data kind multilabel, not {data.kind!r}"
        )
    if train.min_delta and train.patience is None:
        report.add(nowhere, "`min_delta` counts for `patience`, which is not given")
    if (train.mixup or train.cutmix) and train.batch_size % 2:
        report.add(
            nowhere, f"Mixup and CutMix pair images: `batch_size` must be even, it is {train.batch_size}"
        )
    if train.unfreeze and train.freeze is None:
        report.add(nowhere, "`unfreeze` has nothing to undo without `freeze`")
    report.raise_if_any()
