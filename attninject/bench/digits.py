"""`attninject bench digits`: does attention help a small resnet on handwritten digits? Five nets, five seeds.

For each seed a torchvision resnet18 learns one part of scikit-learn's digits (32×32) and stands for the
pretrained backbone. Plain, and with SE, CBAM, BAM and Non-Local blocks injected, it is then fine-tuned on
another part, by `ai.training.finetune`, with the same images in the same order, the same rates and the same
number of epochs, and tested once, after the last epoch, on images that no training has seen. Nothing is tuned
and no epoch is chosen.

A finished run is kept in a file at once: the same command goes on where it was stopped.
"""

from __future__ import annotations

import copy
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attninject import __version__, api, models
from attninject.errors import RunError
from attninject.files import replacing
from attninject.training import finetune
from attninject.training.callbacks import printed
from attninject.training.data.datasets import InMemory
from attninject.training.data.opening import open_images
from attninject.training.data.preprocessing import TensorTransform, preprocessing_of
from attninject.training.experiment import Data

MODEL = "torchvision/resnet18"
NETS: dict[str, str | None] = {
    "plain": None,
    "SE": "se_resnet",
    "CBAM": "cbam_resnet",
    "BAM": "bam_resnet",
    "Non-Local": "nonlocal_resnet_5",
}
PRETRAIN = 400  # images; the rest of the training split is for fine-tuning
SHARED: dict[str, Any] = {"batch_size": 32, "optimizer": "sgd", "weight_decay": 5e-4, "device": "cpu"}
FIRST: dict[str, Any] = {**SHARED, "epochs": 6, "lr": 0.02}
SECOND: dict[str, Any] = {**SHARED, "epochs": 10, "lr": 0.01}


class Enlarged(InMemory):
    """Digits as the model takes them, made once."""

    classes = tuple(str(n) for n in range(10))

    def part(self, indices: Tensor) -> Enlarged:
        """Some of them."""
        return Enlarged(self.images[indices], self.labels[indices])


def run(
    file: Path,
    seeds: int = 5,
    epochs: int = SECOND["epochs"],
    nets: Sequence[str] = tuple(NETS),
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Train what is not in `file` yet, one run after the other; returns all that the file then holds.

    Raises:
        RunError: the file is of other settings, or no file of this command.
    """
    record = _opened(file, {"model": MODEL, "pretrain": FIRST, "finetune": {**SECOND, "epochs": epochs}})
    train, test = _images()
    for seed in range(seeds):
        held = {row["net"] for row in record["rows"] if row["seed"] == seed}
        missing = [net for net in nets if net not in held]
        if not missing:
            continue
        first, second = _cut(train, seed)
        backbone = _backbone(first, test, seed)
        for net in missing:
            row = _row(net, backbone, (second, test), seed, epochs)
            record["rows"].append(row)
            _write(file, record)
            say(
                f"seed {seed}, {net}: test accuracy {row['before']:.2%} before, {row['accuracy']:.2%} after "
                f"{epochs} epochs, {row['seconds']:.0f} s"
            )
    return record


# --- the runs -----------------------------------------------------------------------------------


def _images() -> tuple[Enlarged, Enlarged]:
    data = Data()
    opened = open_images(data)
    transform = TensorTransform(preprocessing_of(None, data))

    def enlarged(part: InMemory) -> Enlarged:
        return Enlarged(torch.stack([transform(image) for image in part.images]), part.labels)

    return enlarged(opened.train), enlarged(opened.val)


def _cut(train: Enlarged, seed: int) -> tuple[Enlarged, Enlarged]:
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    return train.part(order[:PRETRAIN]), train.part(order[PRETRAIN:])


def _backbone(first: Enlarged, test: Enlarged, seed: int) -> nn.Module:
    """A resnet18 from random weights, trained on the first part."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = models.build(MODEL, num_classes=10)
    with printed(quiet=True):
        finetune(model, (first, test), seed=seed, **FIRST)
    return model


def _row(
    net: str, backbone: nn.Module, data: tuple[Enlarged, Enlarged], seed: int, epochs: int
) -> dict[str, Any]:
    model = copy.deepcopy(backbone)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if NETS[net] is not None:
            api.inject(model, NETS[net])
    one_rate = {**SECOND, "attn_lr": SECOND["lr"]}  # of the blocks too: the page has been measured so
    with printed(quiet=True):
        result = finetune(model, data, seed=seed, **{**one_rate, "epochs": epochs})
    start, end = result.history[0], result.history[-1]
    return {
        "seed": seed,
        "net": net,
        "recipe": NETS[net],
        "blocks": len(api.injected(model)),
        "parameters": sum(p.numel() for p in model.parameters()),
        "images": {"pretrain": PRETRAIN, "finetune": len(data[0]), "test": len(data[1])},
        "before": start["top1"],
        "accuracy": end["top1"],
        "loss": end["val_loss"],
        "seconds": round(sum(row["seconds"] for row in result.history), 1),
    }


# --- the file -----------------------------------------------------------------------------------


def _opened(file: Path, settings: dict[str, Any]) -> dict[str, Any]:
    fresh = {
        "command": "attninject bench digits",
        "version": __version__,
        "torch": torch.__version__,
        "settings": settings,
        "rows": [],
    }
    if not file.exists():
        return fresh
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        ours = record["command"] == fresh["command"] and isinstance(record["rows"], list)
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{file} is no file of `attninject bench digits`; give another one") from error
    if not ours or record["settings"] != settings:
        raise RunError(f"{file} holds runs with other settings; give another file, or the settings of then")
    made: dict[str, Any] = record
    return made


def _write(file: Path, record: dict[str, Any]) -> None:
    """Whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


# --- words --------------------------------------------------------------------------------------


def summary(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Per net: mean and standard deviation over seeds, and of the difference from plain seed by seed."""
    plain = {row["seed"]: row["accuracy"] for row in record["rows"] if row["net"] == "plain"}
    found = []
    for net in NETS:
        rows = [row for row in record["rows"] if row["net"] == net]
        if not rows:
            continue
        gains = [row["accuracy"] - plain[row["seed"]] for row in rows if row["seed"] in plain]
        found.append(
            {
                "net": net,
                "recipe": rows[0]["recipe"],
                "blocks": rows[0]["blocks"],
                "parameters": rows[0]["parameters"],
                "seeds": len(rows),
                "before": _spread([row["before"] for row in rows]),
                "accuracy": _spread([row["accuracy"] for row in rows]),
                "loss": _spread([row["loss"] for row in rows]),
                "gain": _spread(gains),
            }
        )
    return found


def _spread(values: Sequence[float]) -> tuple[float, float] | None:
    """Mean and standard deviation (that of a sample; 0 for a single one)."""
    if not values:
        return None
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def to_markdown(record: dict[str, Any]) -> str:
    """The table, and what was done."""
    rows = summary(record)
    lines = [
        "| net | recipe | blocks | parameters | seeds | before | after, % | difference from plain | test loss |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        before, after, gain, loss = (row[key] for key in ("before", "accuracy", "gain", "loss"))
        recipe = f"`{row['recipe']}`" if row["recipe"] else "–"
        change = _change(gain) if gain and row["net"] != "plain" else "–"
        lines.append(
            f"| {row['net']} | {recipe} | {row['blocks']} | {row['parameters']:,} | {row['seeds']} | "
            f"{100 * before[0]:.2f} | {100 * after[0]:.2f} ± {100 * after[1]:.2f} | {change} | "
            f"{loss[0]:.4f} ± {loss[1]:.4f} |"
        )
    return "\n".join([*lines, "", _what(record)])


def _change(gain: tuple[float, float]) -> str:
    """In points, with a sign, but none before 0."""
    mean = round(100 * gain[0], 2)
    return f"{mean:+.2f} ± {100 * gain[1]:.2f}" if mean else f"0.00 ± {100 * gain[1]:.2f}"


def _what(record: dict[str, Any]) -> str:
    images, tuned = record["rows"][0]["images"], record["settings"]["finetune"]
    return (
        f"{record['settings']['model']} from random weights learns {images['pretrain']} digits (32×32, "
        f"{record['settings']['pretrain']['epochs']} epochs) and stands for the pretrained backbone, one for "
        f"each seed. All nets start from it and are fine-tuned on {images['finetune']} other digits: "
        f"{tuned['epochs']} epochs, {tuned['optimizer']}, rate {tuned['lr']:g}, batches of "
        f"{tuned['batch_size']}, the same images in the same order. Test accuracy on {images['test']} digits "
        f"after the last epoch; mean ± standard deviation over seeds; one image is "
        f"{100 / images['test']:.2f} points."
    )
