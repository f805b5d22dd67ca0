"""What must be the same when a run goes on: classes, settings, precision; within an epoch images and processes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from attninject import api
from attninject.errors import CheckpointError, DataError, RunError

from . import runs
from .experiment import Data, Training
from .job import Job

MAY_CHANGE = (  # on resume
    "epochs", "log_every", "save_every", "workers", "device", "root", "labels", "sharding", "patience", "min_delta",
    "track", "project",
)  # fmt: skip


def terms(job: Job, accelerator: Any) -> dict[str, Any]:
    """What a checkpoint says of the run that it is of, in plain JSON: all settings but where it writes."""
    made = job.experiment.to_dict() if job.experiment else {}
    made.pop("out", None)
    settings = {**made, "data": asdict(job.data), "train": job.train.to_dict()}
    held = {
        "classes": list(job.images.classes),
        "images": len(job.images.train),
        "processes": accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
        "rate_of_blocks": job.train.rate_of_blocks,
    }
    found: dict[str, Any] = json.loads(json.dumps({**held, "settings": settings}))
    return found


def as_begun(job: Job) -> Job:
    """The job at the blocks' rate that its run began with, where none is given: the default may have changed since.

    A checkpoint that cannot be read is left to those who load it, and say what is wrong with it.
    """
    if job.out is None or job.train.attn_lr is not None:
        return job
    try:
        then = runs.read_meta(job.out / runs.CHECKPOINT)
    except CheckpointError:
        return job
    rate = _resolved(then)["train"]["attn_lr"]
    same = rate is None or rate == job.train.rate_of_blocks
    return job if same else replace(job, train=replace(job.train, attn_lr=rate))


def check(then: Mapping[str, Any], job: Job, accelerator: Any) -> None:
    """Refuse to go on with a checkpoint of other terms.

    Raises:
        DataError: the classes are others, or within an epoch the number of images.
        RunError: a setting is another, or within an epoch the number of processes.
    """
    now = terms(job, accelerator)
    _check_classes(then["classes"], now["classes"])
    _check_settings(_resolved(then), _resolved(now), job)
    if not then["batch"]:
        return
    if then["processes"] != now["processes"]:
        raise RunError(
            f"the checkpoint is from within an epoch on {then['processes']} processes; there are "
            f"{now['processes']} now, which would see other images: start as many as then"
        )
    images = then.get("images", now["images"])  # a checkpoint of an earlier attninject does not tell
    if images != now["images"]:
        raise DataError(
            f"the checkpoint is from within an epoch of {images} training images; there are {now['images']} now, in "
            f"another order: bring those of then back, or begin a run of its own in another `out`"
        )


def _resolved(terms: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, and what their defaults stood for: the precision, where it is told, and the blocks' rate.

    Checkpoints without that rate are of when its default was `lr`.
    """
    settings: dict[str, Any] = terms["settings"]
    train = settings["train"]
    given = train.get("attn_lr")
    rate = terms.get("rate_of_blocks", train.get("lr") if given is None else given)
    told = {"mixed_precision": terms["mixed_precision"]} if "mixed_precision" in terms else {}
    return {**settings, **told, "train": {**train, "attn_lr": rate}}


def _check_settings(then: Mapping[str, Any], now: Mapping[str, Any], job: Job) -> None:
    # a setting that is younger than the checkpoint was at its default
    held = {"data": asdict(Data()), "train": Training().to_dict()}
    held = {part: {**defaults, **then.get(part, {})} for part, defaults in held.items()}
    changed = [
        f"{key}: {held[part][key]!r} then, {value!r} now"
        for part in ("data", "train")
        for key, value in now[part].items()
        if key not in MAY_CHANGE and held[part][key] != value
        if key != "attn_lr" or api.injected(job.model)  # of a run without blocks it changes nothing
    ]
    changed += [
        f"{key}: {then[key]!r} then, {now[key]!r} now"
        for key in ("model", "weights", "recipe", "mixed_precision")
        if key in then and key in now and then[key] != now[key]
    ]
    if changed:
        raise RunError(
            f"the run in {job.out} was begun with other settings ({'; '.join(changed)}); go on with "
            f"those, or begin a run of its own in another `out`"
        )


def _check_classes(then: list[str], now: list[str]) -> None:
    gone = [c for c in then if c not in now]
    new = [c for c in now if c not in then]
    if then == now:
        return
    said = [f"gone: {', '.join(gone[:5])}"] if gone else []
    said += [f"new: {', '.join(new[:5])}"] if new else []
    raise DataError(
        f"the classes are not those that this run began with: {'; '.join(said) or 'another order'}; bring "
        f"them back, or begin a run of its own in another `out`"
    )
