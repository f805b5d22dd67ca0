"""Fine-tuning from outside: a model and data, or an experiment; and a finished run's model back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
from .callbacks import Callback, printed, spoken, with_say
from .cost import DryRun, estimate
from .data.opening import open_images, paired
from .data.preprocessing import preprocessing_of
from .experiment import Experiment, read_experiment, settings
from .job import Job, Result
from .loop import carry_out
from .rate_test import RateTest, try_rates


def finetune(
    model: nn.Module,
    data: Any = "digits",
    *,
    out: Any = None,
    recipe: Any = None,
    resume: bool = False,
    base: str | None = None,
    workers: int | None = None,
    callbacks: Sequence[Callback] = (),
    say: Callable[[str], None] | None = None,
    **train: Any,
) -> Result:
    """Fine-tune a model, with or without injected blocks; the model is trained in place.

    Lines of progress go to the logger `attninject`; where no logging is set up they are printed.

    Args:
        model: gives logits (B, classes) for images (B, 3, H, W).
        data: a kind (`"digits"`), a mapping as in an experiment file, or a pair of data sets of (image
            tensor, label): training and validation. Labels are rows of zeros and ones, (classes,), where the first
            data set has a true attribute `multilabel`.
        out: folder for log and checkpoints; None: nothing is written.
        recipe: injected first, as `inject` takes it; new weights follow the setting `seed`.
        resume: go on from the checkpoint in `out`.
        base: the base model's name, stored in the delta for messages.
        workers: loader processes; None: as `data` says, else none.
        callbacks: told of lines, steps, epochs and the end; see `Callback`.
        say: deprecated: a function that gets the lines, in place of the logger.
        **train: the keys of `train` in an experiment file: `epochs=10, lr=1e-4, freeze="backbone"`, …

    Raises:
        ExperimentError: a setting is wrong.
        DataError: the images cannot be had, or do not fit the model.
        RunError: the folder serves no run, the run was interrupted, or its loss is no longer finite.
        CheckpointError: the checkpoint to go on from is damaged, or of another model.
    """
    heard = with_say(callbacks, say)
    with rng_kept(), spoken() if say is None else printed(quiet=True):
        job = _job(model, data, train, None if out is None else Path(out), base, workers)
        if recipe is not None:
            torch.manual_seed(job.train.seed)
            api.inject(model, recipe)
        return carry_out(job, heard, resume)


def _job(
    model: nn.Module, data: Any, train: Mapping[str, Any], out: Path | None = None, base: str | None = None,
    workers: int | None = None,
) -> Job:  # fmt: skip
    """What `finetune` is asked for."""
    pair = data if isinstance(data, tuple | list) else None
    data_settings, train_settings = settings("digits" if pair else data, **train)
    if workers is not None:
        data_settings = replace(data_settings, workers=workers)
    if pair:
        opened = paired(pair[0], pair[1], many=bool(getattr(pair[0], "multilabel", False)))
    else:
        opened = open_images(data_settings)
    preprocessing = None if pair else preprocessing_of(model, data_settings)
    return Job(model, opened, data_settings, train_settings, preprocessing, out, base)


def find_lr(model: nn.Module, data: Any = "digits", *, workers: int | None = None, **train: Any) -> RateTest:
    """Try learning rates from 1e-7 to 1 on a copy of the model, and suggest one; nothing else is changed.

    Takes what `finetune` takes. Method: see `rate_test.try_rates`.

    Raises:
        As `finetune`.
    """
    with rng_kept():
        return try_rates(_job(model, data, train, workers=workers))


def dry_run(model: nn.Module, data: Any = "digits", *, workers: int | None = None, **train: Any) -> DryRun:
    """What `finetune` would take of time and memory, by a few steps on a copy of the model; nothing is changed.

    Raises:
        As `finetune`.
    """
    with rng_kept():
        return estimate(_job(model, data, train, workers=workers))


def run_experiment(
    experiment: Experiment,
    resume: bool = False,
    say: Callable[[str], None] | None = None,
    callbacks: Sequence[Callback] = (),
) -> Result:
    """Build the model, inject the recipe, train: what `attninject finetune` does.

    `say` is deprecated; see `finetune`.
    """
    heard = with_say(callbacks, say)
    with rng_kept(), spoken() if say is None else printed(quiet=True):
        return carry_out(_job_of(experiment), heard, resume)


def find_lr_of(experiment: Experiment) -> RateTest:
    """What `attninject finetune --find-lr` does; see `find_lr`."""
    with rng_kept():
        return try_rates(_job_of(experiment))


def dry_run_of(experiment: Experiment) -> DryRun:
    """What `attninject finetune --dry-run` does; see `dry_run`."""
    with rng_kept():
        return estimate(_job_of(experiment))


def _job_of(experiment: Experiment) -> Job:
    """The model built, its recipe injected, the images opened."""
    opened = open_images(experiment.data)
    model = _begun(experiment, len(opened.classes))
    return Job(
        model, opened, experiment.data, experiment.train, preprocessing_of(model, experiment.data),
        Path(experiment.out), experiment.model, experiment,
    )  # fmt: skip


def _base(experiment: Experiment, classes: int) -> nn.Module:
    """The network that blocks go into: same weights, or the same seed, in every process and whenever it is built."""
    torch.manual_seed(experiment.train.seed)
    return build(experiment.model, experiment.weights, classes)


def _begun(experiment: Experiment, classes: int) -> nn.Module:
    """The model before its first step, blocks and all."""
    model = _base(experiment, classes)
    return model if experiment.recipe is None else api.inject(model, experiment.recipe)


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
    classes = len(runs.classes_in(where))
    if experiment.recipe is None:
        return models.build(experiment.model, str(where / file), num_classes=classes).eval()
    with rng_kept():
        base = _base(experiment, classes)
    return delta.load(base, where / file).eval()


def started(folder: Any) -> nn.Module:
    """The model of a run as it was before its first step, blocks and all, in eval mode; see `trained`.

    Raises:
        RunError: the folder holds no such run.
    """
    where = hub.folder_of(folder)
    if not (where / runs.SETTINGS).is_file():
        raise RunError(f"{where} holds no run of attninject finetune ({runs.SETTINGS})")
    with rng_kept():
        return _begun(read_experiment(where / runs.SETTINGS), len(runs.classes_in(where))).eval()
