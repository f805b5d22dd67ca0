"""Fine-tuning from outside: a model and data, or an experiment; and a finished run's model back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from attninject import api, delta, hub, models
from attninject.errors import RunError
from attninject.observe.snapshot import rng_kept

from . import runs
from .building import build
from .data.datasets import Images, classes_of
from .data.opening import open_images
from .data.preprocessing import preprocessing_of
from .experiment import Experiment, read_experiment, settings
from .job import Job, Result
from .loop import carry_out


def finetune(
    model: nn.Module,
    data: Any = "digits",
    *,
    out: Any = None,
    recipe: Any = None,
    resume: bool = False,
    base: str | None = None,
    workers: int | None = None,
    say: Callable[[str], None] | None = None,
    **train: Any,
) -> Result:
    """Fine-tune a model, with or without injected blocks; the model is trained in place.

    Args:
        model: gives logits (B, classes) for images (B, 3, H, W).
        data: a kind (`"digits"`), a mapping as in an experiment file, or a pair of data sets of (image
            tensor, label): training and validation.
        out: folder for log and checkpoints; None: nothing is written.
        recipe: injected first, as `inject` takes it; new weights follow the setting `seed`.
        resume: go on from the checkpoint in `out`.
        base: the base model's name, stored in the delta for messages.
        workers: loader processes; None: as `data` says, else none.
        say: gets lines of progress; None: `print`.
        **train: the keys of `train` in an experiment file: `epochs=10, lr=1e-4, freeze="backbone"`, …

    Raises:
        ExperimentError: a setting is wrong.
        DataError: the images cannot be had, or do not fit the model.
        RunError: the folder serves no run, the run was interrupted, or its loss is no longer finite.
        CheckpointError: the checkpoint to go on from is damaged, or of another model.
    """
    pair = data if isinstance(data, tuple | list) else None
    data_settings, train_settings = settings("digits" if pair else data, **train)
    if workers is not None:
        data_settings = replace(data_settings, workers=workers)
    with rng_kept():
        opened = Images(pair[0], pair[1], classes_of(pair[0])) if pair else open_images(data_settings)
        if recipe is not None:
            torch.manual_seed(train_settings.seed)
            api.inject(model, recipe)
        preprocessing = None if pair else preprocessing_of(model, data_settings)
        where = None if out is None else Path(out)
        job = Job(model, opened, data_settings, train_settings, preprocessing, where, base)
        return carry_out(job, say or _print, resume)


def run_experiment(
    experiment: Experiment, resume: bool = False, say: Callable[[str], None] | None = None
) -> Result:
    """Build the model, inject the recipe, train: what `attninject finetune` does."""
    with rng_kept():
        opened = open_images(experiment.data)
        torch.manual_seed(experiment.train.seed)
        model = build(experiment.model, experiment.weights, len(opened.classes))
        if experiment.recipe is not None:
            api.inject(model, experiment.recipe)
        preprocessing = preprocessing_of(model, experiment.data)
        where = Path(experiment.out)
        job = Job(
            model,
            opened,
            experiment.data,
            experiment.train,
            preprocessing,
            where,
            experiment.model,
            experiment,
        )
        return carry_out(job, say or _print, resume)


def trained(folder: Any, file: str = runs.BEST) -> nn.Module:
    """The trained model of a run of `attninject finetune`, in eval mode, from its folder or `hf-hub:user/name`.

    The base is built as the run built it (same weights, or the same seed), the file of the run goes onto it.

    Raises:
        RunError: the folder holds no such run.
        HubError: the repository cannot be had.
    """
    where = hub.folder_of(folder)
    if not (where / runs.SETTINGS).is_file() or not (where / file).is_file():
        raise RunError(f"{where} holds no run of attninject finetune ({runs.SETTINGS} and {file})")
    experiment = read_experiment(where / runs.SETTINGS)
    classes = runs.classes_in(where)
    if experiment.recipe is None:
        return models.build(experiment.model, str(where / file), num_classes=len(classes)).eval()
    with rng_kept():
        torch.manual_seed(experiment.train.seed)
        model = build(experiment.model, experiment.weights, len(classes))
    return delta.load(model, where / file).eval()


def started(folder: Any) -> nn.Module:
    """The model of a run as it was before its first step, blocks and all, in eval mode; see `trained`.

    Raises:
        RunError: the folder holds no such run.
    """
    where = hub.folder_of(folder)
    if not (where / runs.SETTINGS).is_file():
        raise RunError(f"{where} holds no run of attninject finetune ({runs.SETTINGS})")
    experiment = read_experiment(where / runs.SETTINGS)
    classes = runs.classes_in(where)
    with rng_kept():
        torch.manual_seed(experiment.train.seed)
        model = build(experiment.model, experiment.weights, len(classes))
        if experiment.recipe is not None:
            api.inject(model, experiment.recipe)
    return model.eval()


def _print(text: str) -> None:
    print(text, flush=True)
