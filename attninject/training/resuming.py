"""From a run to its checkpoint and back: everything that training has changed, and what must not have."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from attninject.errors import CheckpointError, DataError, RunError

from .sharding import like, whole

if TYPE_CHECKING:
    from .loop import Run

MAY_CHANGE = (  # on resume
    "epochs", "log_every", "save_every", "workers", "device", "root", "sharding",
)  # fmt: skip


def state(run: Run) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All that training has changed, as whole tensors and as JSON; every process must ask for it."""
    tensors = {f"model.{k}": t for k, t in run.model.state_dict().items()}
    if run.nets.average is not None:
        tensors |= {f"ema.{k}": t for k, t in run.nets.average.state_dict().items()}
    of_optimizer, numbers = optimizer_state(run)
    tensors |= of_optimizer
    scaler = getattr(run.accelerator, "scaler", None)
    meta = {
        "epoch": run.epoch, "batch": run.batch, "step": run.step, "loss_sum": run.loss_sum,
        "skipped": run.skipped,
        "history": run.result.history, "best": run.result.best, "warnings": run.result.warnings,
        "alive": sorted(run.watch.alive), "classes": list(run.images.classes),
        "processes": run.accelerator.num_processes, "settings": settings(run),
        "optimizer": numbers, "scaler": scaler.state_dict() if scaler else None,
    }  # fmt: skip
    return tensors, json.loads(json.dumps(meta))  # what cannot be JSON is found here, not in the file


def settings(run: Run) -> dict[str, Any]:
    """The settings of a run, but where it writes."""
    made = run.experiment.to_dict() if run.experiment else {}
    made.pop("out", None)
    return {**made, "data": asdict(run.data), "train": run.train.to_dict()}


def check(run: Run, meta: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of other classes, settings, or (within an epoch) of other processes."""
    _check_classes(meta["classes"], list(run.images.classes))
    then, now = meta["settings"], json.loads(json.dumps(settings(run)))
    changed = [
        f"{key}: {then.get(part, {}).get(key)!r} then, {value!r} now"
        for part in ("data", "train")
        for key, value in now[part].items()
        if key not in MAY_CHANGE and then.get(part, {}).get(key) != value
    ]
    changed += [
        f"{key}: {then[key]!r} then, {now[key]!r} now"
        for key in ("model", "weights", "recipe")
        if key in then and key in now and then[key] != now[key]
    ]
    if changed:
        raise RunError(
            f"the run in {run.result.out} was begun with other settings ({'; '.join(changed)}); go on with "
            f"those, or begin a run of its own in another `out`"
        )
    if meta["batch"] and meta["processes"] != run.accelerator.num_processes:
        raise RunError(
            f"the checkpoint is from within an epoch on {meta['processes']} processes; there are "
            f"{run.accelerator.num_processes} now, which would see other images: start as many as then"
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


def restore(run: Run, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Fill model, average, optimizer and counters; the optimizer's groups are there already."""
    assert run.folder is not None
    run.epoch, run.batch, run.step = meta["epoch"], meta["batch"], meta["step"]
    run.loss_sum, run.skipped, run.watch.alive = meta["loss_sum"], meta["skipped"], set(meta["alive"])
    run.result.history, run.result.best = meta["history"], meta["best"]
    run.result.warnings = meta["warnings"]
    _fill(run.model, "model.", tensors, run.folder.path)
    if run.nets.average is not None:
        _fill(run.nets.average, "ema.", tensors, run.folder.path)
    run.nets.spread()
    _restore_optimizer(run, tensors, meta)
    scaler = getattr(run.accelerator, "scaler", None)
    if scaler and meta["scaler"]:
        scaler.load_state_dict(meta["scaler"])
    if run.scheduler is not None:
        run.scheduler.step_update(run.step)


def _fill(model: nn.Module, prefix: str, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Copy a checkpoint's tensors into a model's own, every key and shape compared."""
    held = model.state_dict()
    saved = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
    odd = [k for k in {**held, **saved} if k not in held or k not in saved or held[k].shape != saved[k].shape]
    if odd:
        raise CheckpointError(
            f"the checkpoint in {path} is of another model: {len(odd)} tensors differ ({odd[0]})"
        )
    with torch.no_grad():
        for key, tensor in held.items():
            tensor.copy_(saved[key])


# --- the optimizer ------------------------------------------------------------------------------


def optimizer_state(run: Run) -> tuple[dict[str, Tensor], list[tuple[str, str, Any]]]:
    """Tensors by `optimizer.PARAMETER|ENTRY` or `group.NUMBER|ENTRY`; what is no tensor as triples."""
    held = run.raw_optimizer.state_dict()
    owners = [(f"optimizer.{name}", held["state"].get(i, {})) for i, name in enumerate(_learning(run))]
    owners += [(f"group.{i}", group) for i, group in enumerate(held["param_groups"])]
    tensors, numbers = {}, []
    for owner, entries in owners:
        for key, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{owner}|{key}"] = whole(value)
            elif isinstance(value, int | float | str | None):
                numbers.append((owner, key, value))
            elif owner.startswith("optimizer."):  # a group's lists are its parameters and settings
                raise RunError(
                    f"the optimizer {run.train.optimizer!r} keeps a {type(value).__name__} ({key}), which no "
                    f"checkpoint here can hold: take another optimizer, or leave `out` away"
                )
    return tensors, numbers


def _learning(run: Run) -> list[str]:
    """Names of the optimizer's parameters, in its own order."""
    return [run.names[id(p)] for group in run.raw_optimizer.param_groups for p in group["params"]]


def _restore_optimizer(run: Run, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    held = run.raw_optimizer.state_dict()
    parameters = dict(zip(_learning(run), _parameters(run), strict=True))
    owners = {f"group.{i}": group for i, group in enumerate(held["param_groups"])}
    for i, name in enumerate(parameters):
        owners[f"optimizer.{name}"] = held["state"].setdefault(i, {})
    entries = [(*key.rpartition("|")[::2], t) for key, t in tensors.items() if "|" in key]
    for owner, key, value in [*entries, *meta["optimizer"]]:
        if owner not in owners:
            raise CheckpointError(f"the checkpoint holds {owner}, which this run's optimizer has not")
        parameter = parameters.get(owner.removeprefix("optimizer."))
        if parameter is not None and isinstance(value, Tensor):
            value = like(parameter, value)
        owners[owner][key] = value
    held["state"] = {i: entries for i, entries in held["state"].items() if entries}
    run.raw_optimizer.load_state_dict(held)


def _parameters(run: Run) -> list[Tensor]:
    return [p for group in run.raw_optimizer.param_groups for p in group["params"]]
