"""The sweep itself: a design kept in its folder, an engine that carries out what is not finished, one table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from attninject.wording import aligned, human, listed

from .sweep_design import Design, Run, keep
from .sweep_engines import Engine, Event
from .sweep_runs import Outcome, outcome

HEADER = ("arm", "parameters", "MACs")
WIDE = 8  # seeds that still have a column each


@dataclass(frozen=True)
class Swept:
    """A sweep as it stands: what each run's folder says, and why runs failed this time."""

    design: Design
    outcomes: dict[tuple[str, int], Outcome]  # by arm's name and seed
    failed: dict[tuple[str, int], str]

    def __str__(self) -> str:
        return "\n".join([*self.lines(), *self.faults()])

    def lines(self) -> list[str]:
        """The table: a row per arm, a column per seed."""
        seeds = self.design.seeds
        columns = [f"seed {seed}" for seed in seeds] if len(seeds) <= WIDE else ["finished"]
        rows = [(*HEADER, *columns, "mean top-1")]
        for arm in self.design.arms:
            found = [self.outcomes[arm.name, seed] for seed in seeds]
            cells = [self._cell(arm.name, seed) for seed in seeds]
            if len(seeds) > WIDE:
                cells = [f"{sum(o.status == 'finished' for o in found)} of {len(seeds)}"]
            accuracies = [o.top1 for o in found if o.top1 is not None]
            mean = f"{fmean(accuracies):.2%}" if accuracies else ""
            rows.append((arm.name, human(arm.parameters), human(arm.macs), *cells, mean))
        return aligned(rows, right=range(1, len(rows[0])))

    def _cell(self, arm: str, seed: int) -> str:
        found = self.outcomes[arm, seed]
        if found.top1 is not None:
            return f"{found.top1:.2%}"
        if (arm, seed) in self.failed:
            return "failed"
        if found.status == "begun":
            epochs = next(run.experiment.train.epochs for run in self.design.runs())
            return f"epoch {max(len(found.rows) - 1, 0)}/{epochs}"
        return found.status

    def faults(self) -> list[str]:
        """What is left out and why, and what the design notes."""
        damaged = {key: o.reason for key, o in self.outcomes.items() if o.status == "damaged"}
        lines = [f"{arm}, seed {seed}: damaged, left out: {why}" for (arm, seed), why in damaged.items()]
        lines += [
            f"{arm}, seed {seed}: failed: {why}"
            for (arm, seed), why in self.failed.items()
            if (arm, seed) not in damaged
        ]
        return [*lines, *(f"note: {note}" for note in self.design.notes)]

    @property
    def finished(self) -> bool:
        """Whether every run of the design is."""
        return all(o.status == "finished" for o in self.outcomes.values())


def standing(design: Design, failed: dict[tuple[str, int], str] | None = None) -> Swept:
    """What the folders say now."""
    found = {(run.arm.name, run.seed): outcome(run.folder, run.experiment) for run in design.runs()}
    return Swept(design, found, dict(failed or {}))


def unfinished(design: Design) -> list[Run]:
    """The runs that wait or were begun, in the design's order; finished and damaged ones are left as they are."""
    return [
        run for run in design.runs() if outcome(run.folder, run.experiment).status in ("waiting", "begun")
    ]


def carry_out(
    design: Design,
    engine: Engine,
    command: str,
    say: Callable[[str], None],
    show: Callable[[Sequence[str]], None] | None = None,
) -> Swept:
    """Keep the design in its folder and carry out what is not finished.

    Args:
        design: of `sweep_design.design`.
        engine: of `sweep_engines`.
        command: how to do it again, for the report.
        say: gets a line for each run that ends.
        show: gets the table's lines whenever they change, in place of those lines.

    Raises:
        RunError: the folder holds another sweep.
    """
    keep(design, command)
    waiting = unfinished(design)
    failed: dict[tuple[str, int], str] = {}
    now = standing(design)
    count, ended = len(waiting), 0
    said = listed([run.folder.as_posix() for run in waiting], 1)
    say(f"{len(now.outcomes)} runs, {count} of them to be carried out{f' ({said})' if count else ''}")

    def tell(event: Event) -> None:
        nonlocal ended
        key = (event.run.arm.name, event.run.seed)
        if event.kind in ("done", "failed"):
            ended += 1
        if event.kind == "failed":
            failed[key] = event.text
        now.failed.update(failed)
        now.outcomes[key] = outcome(event.run.folder, event.run.experiment)
        if show is not None:
            show(now.lines())
        elif event.kind != "said":
            end = now._cell(*key) if event.kind == "done" else event.text
            say(f"{ended}/{count} {event.run.arm.name}, seed {event.run.seed}: {end}")

    if waiting:
        engine.carry_out(waiting, tell)
    return standing(design, failed)
