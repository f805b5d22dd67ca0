"""Trackers of experiments, through Accelerate's: TensorBoard, MLflow, Weights & Biases and their like.

A run keeps the names under which its trackers know it in `trackers.json` of its folder, and goes on under them.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from torch import nn

from attninject.errors import ExperimentError, Fault, MissingPackageError, RunError
from attninject.planning.table import HEADER, row
from attninject.surgery import injected_state
from attninject.wording import first_line, markdown_table

from . import runs
from .job import Job
from .log_columns import scalar_name

BOARD = "tensorboard"  # the tracker, and its folder within the run's
NAMES = "trackers.json"
_OF_THE_EXTRA = (BOARD, "mlflow", "wandb")
_ID_OF: dict[str, Callable[[Any], str]] = {
    BOARD: lambda _: BOARD,
    "mlflow": lambda run: run.info.run_id,
    "wandb": lambda run: run.id,
}
"""Trackers whose runs can be gone on with, and what names one."""


class Trackers:
    """The trackers of one run, in its first process. One that fails is left out from then on."""

    def __init__(self, names: Sequence[str], folder: runs.Folder | None = None, project: str = "") -> None:
        """Nothing is begun yet.

        Args:
            names: of Accelerate's trackers.
            folder: the run's; it may be missing, and then no run is gone on with.
            project: what the runs of one purpose are put together under.

        Raises:
            MissingPackageError: a tracker's package is not installed.
            ExperimentError: TensorBoard has no folder to write into.
        """
        self.names, self.folder, self.project = names, folder, project
        self.open: list[Any] = []
        if names:
            _refuse_missing(names)
        if BOARD in names and folder is None:
            raise ExperimentError([Fault("train, track: tensorboard writes into `out`, which is not given")])

    def begin(self, step: int, resumed: bool, config: Mapping[str, Any], plan: str) -> None:
        """Begin, or go on after a step; who does not know the run is told its settings and plan first.

        Raises:
            RunError: a tracker cannot begin, as without a login.
        """
        known = self._known() if resumed else {}
        for name in self.names:
            try:
                tracker = self._begun(name, step, known.get(name))
                self.open.append(tracker)
                if name not in known:
                    _introduce(tracker, config, plan)
                if name in _ID_OF:
                    known[name] = _ID_OF[name](tracker.tracker)
            except Exception as error:  # whatever a tracker's package raises
                offline = "; WANDB_MODE=offline keeps the run on this machine" if name == "wandb" else ""
                raise RunError(f"the tracker {name} cannot begin: {first_line(error)}{offline}") from error
        if self.folder is not None and self.open:
            self.folder.write(NAMES, json.dumps(known) + "\n")

    def log(self, values: Mapping[str, Any], step: int) -> Iterator[str]:
        """Figures of a step; yields a sentence for each tracker that fails."""
        named = {re.sub(r"[^\w/.-]+", "_", scalar_name(key)): value for key, value in values.items()}
        for tracker in list(self.open):
            try:
                tracker.log(named, step=step)
            except Exception as error:  # a server that is gone must not end the training
                self.open.remove(tracker)
                yield f"the tracker {tracker.name} has failed, and is told nothing more: {first_line(error)}"

    def end(self) -> None:
        """Close what is open."""
        for tracker in self.open:
            with suppress(Exception):
                tracker.finish()
        self.open = []

    def _known(self) -> dict[str, str]:
        """Under which names trackers know the run."""
        with suppress(OSError, ValueError):
            return dict(json.loads((self.folder / NAMES).read_text(encoding="utf-8"))) if self.folder else {}
        return {}

    def _begun(self, name: str, step: int, known: str | None) -> Any:
        """Accelerate's tracker, at work; `known`: the run to go on with."""
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        given: dict[str, Any] = {}
        title = self.folder.path.resolve().name if self.folder else None
        if name == BOARD:
            assert self.folder is not None
            # what an interrupted run wrote beyond this step is dropped from view
            tracker = LOGGER_TYPE_TO_CLASS[name](BOARD, str(self.folder.path), purge_step=step + 1)
        else:
            if name == "mlflow":
                given = {"run_name": title, "run_id": known}
            elif name == "wandb":
                given = {"name": title, **({"id": known, "resume": "allow"} if known else {})}
            tracker = LOGGER_TYPE_TO_CLASS[name](self.project, **given)
        getattr(tracker, "start", lambda: None)()  # older ones begin when they are made
        return tracker


def _introduce(tracker: Any, config: Mapping[str, Any], plan: str) -> None:
    """Settings, and the plan where the tracker has a place for texts."""
    if tracker.name == BOARD:
        tracker.store_init_configuration(dict(config))
        tracker.log({"plan": plan}, step=0)
    elif tracker.name == "mlflow":
        import mlflow

        tracker.store_init_configuration(dict(config))
        mlflow.log_text(plan, "plan.md")
    else:
        tracker.store_init_configuration({**config, "plan": plan})


def _refuse_missing(names: Sequence[str]) -> None:
    from accelerate.tracking import get_available_trackers

    there = [str(name) for name in get_available_trackers()]
    missing = [name for name in names if name not in there]
    if missing:
        ours = all(name in _OF_THE_EXTRA for name in missing)
        fix = 'pip install "attninject[track]"' if ours else f"pip install {' '.join(missing)}"
        raise MissingPackageError(
            f"{', '.join(missing)}: not installed, or unknown to this accelerate: {fix}"
        )


def names_of(job: Job) -> tuple[str, ...]:
    """The trackers of a run; where none are named, TensorBoard if it is installed and there is a folder."""
    if job.train.track is not None:
        return job.train.track
    return (BOARD,) if job.out is not None and _board_runs() else ()


def _board_runs() -> bool:
    if importlib.util.find_spec("tensorboard") is None:
        return False
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError:
        return False
    return True


def config_of(job: Job) -> dict[str, Any]:
    """All settings of a run as texts and numbers under dotted names: `train.lr`, `data.kind`, `recipe`."""
    parts = {"data": asdict(job.data), "train": job.train.to_dict()}
    made = job.experiment.to_dict() if job.experiment else {"model": type(job.model).__name__}
    flat = {key: value for key, value in made.items() if key not in parts}
    flat |= {f"{part}.{key}": value for part, values in parts.items() for key, value in values.items()}
    return {key: v if isinstance(v, bool | int | float | str) else json.dumps(v) for key, v in flat.items()}


def plan_of(model: nn.Module) -> str:
    """The injected blocks and their sites, as a table in Markdown."""
    sites = [site for site in injected_state.sites_of(model).values() if site is not None]
    return markdown_table(HEADER, map(row, sites)) if sites else "no injected blocks"
