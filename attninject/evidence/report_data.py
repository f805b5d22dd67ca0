"""From folders to studies: runs of one model, data and budget, as arms over seeds. Nothing is computed here."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attninject.errors import AttnInjectError, RunError
from attninject.recipe.loading import load_recipe
from attninject.training import runs
from attninject.training.experiment import Experiment, read_experiment

from .sweep_design import ATTENTION, DESIGN, PLAIN, Design, plain_data, read_raw
from .sweep_file import BUDGET, MACHINE
from .sweep_runs import Outcome, outcome


@dataclass
class Arm:
    """One way of training, and what its runs have come to, by seed."""

    name: str
    kind: str
    plain: str | None = None
    of: str | None = None
    parameters: int | None = None
    macs: int | None = None
    sites: tuple[str, ...] = ()
    settings: str = ""  # recipe, and what of `train` may differ between arms
    outcomes: dict[int, Outcome] = field(default_factory=dict)

    def finished(self) -> dict[int, Outcome]:
        """Those that count."""
        return {seed: o for seed, o in sorted(self.outcomes.items()) if o.status == "finished"}

    def top1(self) -> dict[int, float]:
        """Seed → accuracy after the last epoch."""
        return {seed: o.top1 for seed, o in self.finished().items() if o.top1 is not None}

    def ece(self) -> dict[int, float]:
        """Seed → expected calibration error after the last epoch, of the runs that say it."""
        return {seed: o.measured.ece for seed, o in self.finished().items() if o.measured is not None}


@dataclass
class Study:
    """Arms that may be compared: one model, the same weights, data and budget."""

    budget: Mapping[str, Any]
    arms: dict[str, Arm] = field(default_factory=dict)
    folders: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)

    def left_out(self) -> list[str]:
        """A line for each run that does not count."""
        return [
            f"{arm.name}, seed {seed}: {_why(found)}"
            for arm in self.arms.values()
            for seed, found in sorted(arm.outcomes.items())
            if found.status != "finished"
        ]


def _why(found: Outcome) -> str:
    if found.status == "damaged":
        return f"damaged ({found.reason})"
    return "not begun" if found.status == "waiting" else f"not finished (epoch {max(len(found.rows) - 1, 0)})"


def collect(folders: Iterable[str | Path]) -> list[Study]:
    """The studies in some folders, each of a sweep, of a run, or with runs somewhere below.

    Raises:
        RunError: a folder holds neither.
    """
    studies: list[Study] = []
    for folder in map(Path, folders):
        if (folder / DESIGN).exists():
            _add_sweep(studies, folder)
        else:
            _add_runs(studies, folder)
    return studies


def differences(studies: Sequence[Study]) -> list[str]:
    """What keeps the studies apart: the settings that are not the same in all of them."""
    keys = dict.fromkeys(key for study in studies for key in study.budget)
    found = []
    for key in keys:
        values = [json.dumps(study.budget.get(key)) for study in studies]
        if len(set(values)) > 1:
            found.append(f"{key}: {' / '.join(values)}")
    return found


def _budget(experiment: Experiment) -> dict[str, Any]:
    """What must be the same for runs to be compared."""
    data = {f"data {k}": v for k, v in experiment.to_dict()["data"].items() if k != "workers"}
    train = experiment.train.to_dict()
    return {"model": experiment.model, "weights": experiment.weights, **data, **{k: train[k] for k in BUDGET}}


def _study(studies: list[Study], budget: Mapping[str, Any]) -> Study:
    for study in studies:
        if study.budget == budget:
            return study
    studies.append(Study(budget))
    return studies[-1]


def _add_sweep(studies: list[Study], folder: Path) -> None:
    raw = read_raw(folder)
    design = Design.of(raw, folder)
    every = list(design.runs())
    study = _study(studies, _budget(every[0].experiment))
    study.folders.append(folder)
    study.notes += [note for note in design.notes if note not in study.notes]
    study.commands.append(raw.get("command", ""))
    study.versions.update(raw.get("versions", {}))
    for run in every:
        arm = run.arm
        settings = _settings(run.experiment)
        made = Arm(arm.name, arm.kind, arm.plain, arm.of, arm.parameters, arm.macs, arm.sites, settings)
        _take(study, _held(study, made, folder), run.seed, outcome(run.folder, run.experiment), folder)


def _settings(experiment: Experiment) -> str:
    """What makes an arm, as text: runs of one name that differ in it are not to be taken for one arm's."""
    train = {k: v for k, v in experiment.train.to_dict().items() if k not in (*BUDGET, *MACHINE, "seed")}
    recipe = None if experiment.recipe is None else load_recipe(experiment.recipe).to_dict()
    return json.dumps(plain_data({"recipe": recipe, **train}), sort_keys=True)


def _held(study: Study, made: Arm, folder: Path) -> Arm:
    """The study's arm of that name.

    Raises:
        RunError: it is another: other settings, or blocks at other sites.
    """
    held = study.arms.setdefault(made.name, made)
    known = None not in (held.parameters, made.parameters)
    if held.settings != made.settings or (
        known and (held.kind, held.sites, held.parameters) != (made.kind, made.sites, made.parameters)
    ):
        raise RunError(
            f"{folder}: its arm {made.name!r} is not that of {study.folders[0]}; report them apart"
        )
    return held


def _take(study: Study, arm: Arm, seed: int, found: Outcome, folder: Path) -> None:
    """A seed of an arm counts once, from the first folder that has it finished."""
    held = arm.outcomes.get(seed)
    if held is None or (held.status != "finished" and found.status == "finished"):
        arm.outcomes[seed] = found
    elif found.status == "finished":
        study.notes.append(f"{arm.name}, seed {seed} is in {folder} too and counts once")


def _add_runs(studies: list[Study], folder: Path) -> None:
    """Runs of `finetune`: an arm is a recipe with settings."""
    found = sorted(file.parent for file in folder.rglob(runs.SETTINGS)) if folder.is_dir() else []
    if not found:
        raise RunError(
            f"{folder} holds no sweep ({DESIGN}) and no run of attninject finetune ({runs.SETTINGS})"
        )
    for place in found:
        try:
            experiment = read_experiment(place / runs.SETTINGS)
        except AttnInjectError as error:
            study = studies[-1] if studies else _study(studies, {})
            study.notes.append(f"{place} is damaged and left out: {' '.join(str(error).split())}")
            continue
        study = _study(studies, _budget(experiment))
        if folder not in study.folders:
            study.folders.append(folder)
        name, plain = _names(experiment)
        kind = PLAIN if experiment.recipe is None else ATTENTION
        made = Arm(name, kind, None if kind == PLAIN else plain, settings=_settings(experiment))
        _take(study, _held(study, made, place), experiment.train.seed, outcome(place, experiment), place)


def _names(experiment: Experiment) -> tuple[str, str]:
    """What an arm of loose runs is called: its recipe and the settings that are not default; and its plain one."""
    default = Experiment("", "").train.to_dict()
    given = {
        key: value
        for key, value in experiment.train.to_dict().items()
        if key not in (*BUDGET, *MACHINE, "seed") and value != default[key]
    }
    plain = " ".join([PLAIN, *(f"{k}={plain_data(v)}" for k, v in given.items() if k != "attn_lr")])
    if experiment.recipe is None:
        return plain, plain
    recipe = load_recipe(experiment.recipe).name
    return " ".join([recipe, *(f"{k}={plain_data(v)}" for k, v in given.items())]), plain
