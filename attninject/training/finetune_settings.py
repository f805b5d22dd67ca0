"""The settings of a run, one row each: name, how a value is checked, what it means.

Everything else follows from these tables: what an experiment file may hold, what `finetune` takes, and a flag
of the command line for every row. The defaults stand in the dataclasses of `experiment`. No torch here.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attninject.errors import PatternError, RecipeError
from attninject.recipe.checks import Checker, boolean, checked_fields, choice, integer, plain_value, words
from attninject.recipe.frozen import FrozenDict
from attninject.recipe.loading import load_recipe, recipe_names
from attninject.recipe.patterns import compile_pattern
from attninject.recipe.report import BAD, Node, Report
from attninject.wording import did_you_mean

from .monitors import MONITORS
from .words import WORDS

Table = Mapping[str, tuple[Checker, str]]

DATA_KINDS = ("digits", "imagefolder", "multilabel", "random", "timm", "torchvision")
TRACKERS = (
    "aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb",
)  # fmt: skip
"""Those that Accelerate knows."""

# --- checks ------------------------------------------------------------------------------------


def _number(what: str, low: float = -math.inf, high: float = math.inf, above: bool = False) -> Checker:
    def check(node: Node, report: Report) -> Any:
        value = node.value
        plain = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if plain and (low < value if above else low <= value) and value <= high:
            return float(value)
        return report.expected(node, what)

    return check


def _kind(node: Node, report: Report) -> Any:
    """A kind of data, or a folder that is there: `experiment.data_of` makes it an image folder."""
    if isinstance(node.value, str) and node.value not in DATA_KINDS and Path(node.value).is_dir():
        return node.value
    return choice("a folder of images that is there, or a kind of data", DATA_KINDS)(node, report)


def _maybe(check: Checker) -> Checker:
    """The same, or null."""
    return lambda node, report: None if node.value is None else check(node, report)


_POLICIES: Mapping[str, Mapping[str, type]] = {
    "rand": {"m": int, "n": int, "p": float, "mstd": float, "mmax": int, "inc": int},
    "augmix": {"m": int, "w": int, "d": int, "a": float, "b": int, "mstd": float},
    **{key: {"mstd": float} for key in ("v0", "v0r", "original", "originalr", "3a")},
}
"""Policies of timm's `auto_augment`, and what their sections take; timm passes over a section without a number."""
_SETS = ("weights", "3a", "3aw")  # what timm's `rand` draws from: a section t…


def _policy(node: Node, report: Report) -> Any:
    if not isinstance(node.value, str):
        return report.expected(node, "a policy of timm's, as rand-m9-mstd0.5-inc1")
    policy, *sections = node.value.split("-")
    if policy not in _POLICIES:
        what = f"a policy of timm's ({', '.join(_POLICIES)}), as rand-m9-mstd0.5-inc1"
        return report.expected(node, what, did_you_mean(policy, _POLICIES))
    takes = _POLICIES[policy]
    for section in sections:
        if policy == "rand" and section.startswith("t") and section[1:] in _SETS:
            continue
        key, number = re.fullmatch(r"([a-z]*)(.*)", section, re.DOTALL).groups()  # type: ignore[union-attr]
        pattern = r"-?\d+" if takes.get(key) is int else r"\d+(\.\d+)?|inf"
        if key not in takes or not re.fullmatch(pattern, number):
            form = ", ".join(f"{name}{1 if kind is int else 0.5}" for name, kind in takes.items())
            hint = did_you_mean(key, takes) if key not in takes else ""
            return report.expected(node, f"sections such as {form} behind {policy!r}", hint)
    return node.value


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


def _trackers(node: Node, report: Report) -> Any:
    """Names in a list, or in a text with commas; `none`: not even TensorBoard's files."""
    names = [item.value for item in node.value] if isinstance(node.value, list) else node.value
    if isinstance(names, str):
        names = [] if names == "none" else [name.strip() for name in names.split(",")]
    if not isinstance(names, list):
        return report.expected(node, "trackers, as tensorboard,mlflow")
    for name in names:
        if name not in TRACKERS:
            near = did_you_mean(name, TRACKERS) if isinstance(name, str) else ""
            return report.add(node, f"no tracker {name!r}{near}; known are {', '.join(TRACKERS)}, or none")
    return tuple(dict.fromkeys(names))


def _class_weights(node: Node, report: Report) -> Any:
    """`balanced`, or names of classes and weights: as a mapping, or in a CSV file of two columns."""
    if node.value == "balanced":
        return "balanced"
    if isinstance(node.value, dict):
        rows = [(str(name), item.value) for name, (_, item) in node.value.items()]
    elif isinstance(node.value, str):
        try:
            rows = _weights_in(Path(node.value))
        except (OSError, ValueError) as error:
            return report.add(
                node, f"expected balanced, or a CSV file with `class,weight` in each row: {error}"
            )
    else:
        return report.expected(node, "balanced, a file, or a mapping of classes to weights")
    for name, weight in rows:
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
            return report.add(node, f"the weight of {name!r} must be a number from 0, found {weight!r}")
    return tuple((name, float(weight)) for name, weight in rows)


def _weights_in(file: Path) -> list[tuple[str, Any]]:
    """The rows of a CSV file; a first row without a number is its head."""
    with file.open(newline="", encoding="utf-8") as stream:
        rows = [row for row in csv.reader(stream) if row]
    if any(len(row) != 2 for row in rows):
        raise ValueError(f"{file} has rows that are not of two cells")
    found = [(name.strip(), _as_number(cell)) for name, cell in rows]
    return found[1:] if found and isinstance(found[0][1], str) else found


def _as_number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


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


# --- the tables -------------------------------------------------------------------------------

TOP: Table = {
    "model": (words, "torchvision/resnet50, timm/convnext_tiny, …"),
    "weights": (words, "none (random; the default), default, a tag, or a local .pth/.safetensors file"),
    "recipe": (_recipe_field, "a shipped recipe's name or a YAML file; null: plain fine-tuning"),
    "out": (words, "folder of the run"),
}
DATA: Table = {
    "kind": (_kind, f"a folder with a folder of images per class, or one of {', '.join(DATA_KINDS)}"),
    "root": (_maybe(words), "folder of the images"),
    "labels": (_maybe(words),
        "of multilabel: a CSV file, or a folder with a text file per image; default: labels.csv or labels in root"),
    "name": (_maybe(words),
        "name for timm's create_dataset (torch/cifar10, hfds/…) or of a torchvision class (CIFAR10)"),
    "train_split": (words, "name of the training split, or of its folder"),
    "val_split": (words, "name of the validation split, or of its folder"),
    "val_fraction": (_maybe(_number("a fraction between 0 and 1", 0, 0.9, above=True)),
        "hold out this part of the training images instead"),
    "size": (_maybe(integer("an image size in pixels", 8)), "image size; default: the model's own, digits: 32"),
    "augment": (choice("an augmentation", ("default", "none")),
        "default: timm's random crop, flip and colour jitter; none: resize only"),
    "auto_augment": (_maybe(_policy), "timm's policy, as rand-m9-mstd0.5-inc1"),
    "color_jitter": (_from_zero, "strength of timm's colour jitter"),
    "hflip": (_number("a probability", 0, 1), "probability of a horizontal flip"),
    "reprob": (_number("a probability", 0, 1), "probability of random erasing"),
    "unreadable": (choice("what to do with unreadable images", ("refuse", "skip")),
        "refuse: stop and name the file; skip: leave out and count"),
    "images": (_from_one, "of random: how many images; a fifth of them is for validation"),
    "classes": (integer("a number from 2", 2), "of random: how many classes"),
    "seed": (_whole, "of random: seed of images and labels"),
    "workers": (_whole, "loader processes; 0: load in the training process"),
}  # fmt: skip
TRAIN: Table = {
    "epochs": (_from_one, "epochs"),
    "batch_size": (_from_one, "images per process and forward"),
    "accumulate": (_from_one, "forwards per optimizer step; what does not fill an epoch's last step is left out"),
    "lr": (_rate, "learning rate of the backbone"),
    "attn_lr": (_maybe(_rate), "learning rate of the blocks; default: ten times lr"),
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
    "class_weights": (_maybe(_class_weights),
        "weights of the classes in the loss: balanced, or a CSV file with class,weight in each row"),
    "mixup": (_from_zero, "Mixup's alpha; 0: off"),
    "cutmix": (_from_zero, "CutMix's alpha; 0: off"),
    "ema": (_maybe(_number("a decay between 0 and 1", 0, 0.999999999, above=True)),
        "decay of an average of the weights, which is then evaluated and saved"),
    "precision": (_maybe(_precision),
        "mixed precision: no, bf16 or fp16; default: as Accelerate's config says, else no"),
    "monitor": (_maybe(choice("a figure of the log", tuple(MONITORS))),
        f"what the best epoch is best in: {', '.join(MONITORS)}; default: top1, of multilabel map"),
    "patience": (_maybe(_from_one), "end early, after so many epochs in which the monitor got no better"),
    "min_delta": (_from_zero, "by how much the monitor must get better to count for patience"),
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
    "track": (_maybe(_trackers),
        "tensorboard, mlflow, wandb, …, several with commas; none: not even TensorBoard's files; "
        "default: these, where it is installed"),
    "project": (words, "name that trackers put runs of one purpose together under"),
}  # fmt: skip
