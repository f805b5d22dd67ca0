"""A trained model or run for others: the delta, and a card that says what it is and how to load it."""

from __future__ import annotations

import csv
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from attninject import delta, hub, plugins
from attninject.errors import RunError
from attninject.files import installed_versions
from attninject.inspection import status
from attninject.planning.support import unwrapped
from attninject.training import runs
from attninject.training.experiment import Experiment, read_experiment
from attninject.training.monitors import MONITORS, monitor_of
from attninject.training.tracking import plan_of
from attninject.wording import markdown_table

PACKAGES = ("attninject", "torch", "torchvision", "timm")
FIGURES = ("epoch", *MONITORS)


def push_to_hub(
    model: nn.Module, name: str, *, base: str | None = None, description: str = "", license: str | None = None,
    metrics: Mapping[str, float] | None = None, private: bool | None = None, revision: str | None = None,
    token: str | None = None,
) -> str:  # fmt: skip
    """Share the blocks of a model, and what training changed beside them; returns the address.

    What goes there is the file of `ai.save` and a card. `ai.load(base_model, "hf-hub:user/name")` reads it, after the
    digests in the file were checked.

    Args:
        model: with injected blocks.
        name: `user/name` on the Hugging Face hub, or `local-dir:FOLDER`.
        base: the base model's name, for the card and for messages, as `timm/resnet18`.
        description: what it was trained for, in Markdown.
        license: of the weights, as the hub writes it: `apache-2.0`.
        metrics: name → figure, for the card.
        private: of a new repository.
        revision: a branch.
        token: None: the one that `hf auth login` or HF_TOKEN left.

    Raises:
        DeltaError: the model has no injected blocks.
        HubError: no access, no such name, or the hub cannot be reached.
    """
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        delta.save(model, folder / hub.DELTA, base=base)
        card = [_title(name, base), description, *_usage(name, base), *_table(metrics or {}), *_blocks(model)]
        _write_card(folder, card, base, license)
        return hub.publish(folder, name, private=private, revision=revision, token=token)


def push_run(
    run: Path, name: str, *, description: str = "", license: str | None = None, private: bool | None = None,
    revision: str | None = None, token: str | None = None,
) -> str:  # fmt: skip
    """Share the folder of a run of `attninject finetune`: its best weights, settings, classes, log, and a card.

    Raises:
        RunError: the folder holds no such run.
        HubError: see `push_to_hub`.
    """
    missing = [
        file for file in (runs.BEST, runs.SETTINGS, runs.CLASSES, runs.LOG) if not (run / file).is_file()
    ]
    if missing:
        raise RunError(f"{run} holds no run of attninject finetune: {', '.join(missing)} missing")
    experiment = read_experiment(run / runs.SETTINGS)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        for file in (runs.BEST, runs.SETTINGS, runs.CLASSES, runs.LOG):
            shutil.copyfile(run / file, folder / file)
        if (run / plugins.RECORD).is_file():
            shutil.copyfile(run / plugins.RECORD, folder / plugins.RECORD)
        card = [
            _title(name, experiment.model),
            description,
            *_run_usage(name, experiment),
            *_run_figures(run, experiment),
        ]
        _write_card(folder, [*card, *_settings(experiment)], experiment.model, license)
        return hub.publish(folder, name, private=private, revision=revision, token=token)


# --- the card ----------------------------------------------------------------------------------


def _write_card(folder: Path, parts: Iterable[str], base: str | None, license: str | None) -> None:
    """README.md with the hub's front matter; `huggingface_hub` writes that as the hub reads it."""
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        library_name="attninject",
        pipeline_tag="image-classification",
        license=license,
        tags=["attninject", *(["timm"] if (base or "").startswith("timm/") else [])],
    )
    versions = ", ".join(f"{name} {found}" for name, found in installed_versions(PACKAGES).items())
    body = "\n\n".join(part for part in (*parts, f"Made with {versions}.") if part)
    (folder / "README.md").write_text(f"---\n{data.to_yaml()}\n---\n\n{body}\n", encoding="utf-8")


def _title(name: str, base: str | None) -> str:
    short = name.removeprefix(hub.HUB).removeprefix(hub.LOCAL).rstrip("/").rpartition("/")[2]
    return f"# {short}\n\nAttention blocks in {base or 'a pretrained network'}, put there with attninject."


def _usage(name: str, base: str | None) -> list[str]:
    return [
        "## How to load it",
        _code(
            "import attninject as ai",
            f"base = ...  # {base or 'the network'}, with the weights that it had before",
            f'model = ai.load(base, "{_address(name)}")',
        ),
    ]


def _run_usage(name: str, experiment: Experiment) -> list[str]:
    return [
        "## How to load it",
        _code(
            "import attninject as ai",
            f'model = ai.training.trained("{_address(name)}")  # on {experiment.model}, weights {experiment.weights}',
        ),
    ]


def _address(name: str) -> str:
    return name if name.startswith((hub.HUB, hub.LOCAL)) else hub.HUB + name


def _code(*lines: str) -> str:
    return "\n".join(["```python", *lines, "```"])


def _blocks(model: nn.Module) -> list[str]:
    """A row per block, and how much the blocks add."""
    plain = unwrapped(model)
    counts = status(plain)
    added = sum(block.parameters for block in counts.blocks)
    total = counts.trainable.total
    line = f"{len(counts.blocks)} blocks with {added:,} parameters, beside {total - added:,} of the network."
    return ["## Blocks", line, plan_of(plain)]


def _table(metrics: Mapping[str, float]) -> list[str]:
    if not metrics:
        return []
    return ["## Figures", markdown_table(tuple(metrics), [[f"{value:.4g}" for value in metrics.values()]])]


def _run_figures(run: Path, experiment: Experiment) -> list[str]:
    """The best epoch by the run's monitor, and the model before training."""
    with (run / runs.LOG).open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        return []
    monitor = monitor_of(experiment.train.monitor, experiment.data.kind == "multilabel")
    best = max(rows, key=monitor.worth)
    shown = [rows[0], best] if best is not rows[0] else [best]
    columns = [name for name in FIGURES if name in rows[0]]
    cells = [[_figure(r.get(column, "")) for column in columns] for r in shown]
    return [
        "## Figures",
        "On the validation images; epoch 0 is the model before training.",
        markdown_table(columns, cells),
    ]


def _figure(text: str) -> str:
    return f"{float(text):.4g}" if text else ""


def _settings(experiment: Experiment) -> list[str]:
    recipe: Any = experiment.recipe
    said = "none: plain fine-tuning" if recipe is None else f"`{recipe}`"
    train = experiment.train
    rates = f"lr {train.lr:g}, attn_lr {train.rate_of_blocks:g}, freeze {train.freeze or 'nothing'}"
    return [
        "## How it was made",
        f"Recipe: {said}. {train.epochs} epochs of batches of {train.batch_size}, {train.optimizer}, {rates}, seed "
        f"{train.seed}. `experiment.json` has every setting: `attninject finetune experiment.json --out a` repeats it.",
    ]
