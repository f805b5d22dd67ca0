"""What was chosen on the first tasks, judged on tasks on which nothing was chosen: the second part of the protocol."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from attninject.evidence.statistics import Paired, holm, paired

from . import tables
from .results import Results

JUDGED = ("rung", "gradient_rank", "first", "score", "before")
"""As the protocol names them; `before` is the score test before its correction."""
KIND: tables.Kind = ("lite0", "se", "frozen", "new tasks")


def open_tasks(group: Sequence[Results]) -> list[Results]:
    """Those with headroom in which every site and every arm was trained."""
    return [one for one in tables.complete(tables.ranked(group)) if one.headroom]


def mean_tau(group: Sequence[Results], method: str) -> Paired | None:
    """Mean τ over tasks, tasks as units."""
    found = [tables.taus(one, [method])[method] for one in open_tasks(group)]
    return paired([v for v in found if not math.isnan(v)]) if found else None


def over_random(group: Sequence[Results], arm: str) -> Paired | None:
    """Mean gain over the seeds' random sets, tasks as units."""
    found = [tables.against(one, arm, "random") for one in open_tasks(group)]
    values = [f.mean for f in found if f is not None]
    return paired(values) if len(values) == len(found) and found else None


def winners(group: Sequence[Results]) -> list[str]:
    """Methods whose mean τ and whose mean gain over random sets have intervals above 0."""

    def above(found: Paired | None) -> bool:
        return found is not None and found.interval is not None and found.interval[0] > 0

    return [m for m in JUDGED if above(mean_tau(group, m)) and above(over_random(group, m))]


def choosing_rows(group: Sequence[Results]) -> list[list[str]]:
    """One row per method: gain over random sets per task, the mean over tasks with headroom, and Holm's p of it."""
    means = [over_random(group, arm) for arm in JUDGED]
    adjusted = holm([m.p if m else None for m in means])
    return [
        [
            arm,
            *(tables.difference(tables.against(one, arm, "random"), 3) for one in tables.complete(group)),
            tables.difference(mean, 3),
            "–" if p is None else f"{p:.3f}",
        ]
        for arm, mean, p in zip(JUDGED, means, adjusted, strict=True)
    ]


def payment_rows(group: Sequence[Results]) -> list[list[str]]:
    """Per task: how many random sets the seconds of a rung would train, and gains of `rung` and of the best of these."""
    rows = []
    for one in tables.complete(group):
        seeds = [s for s in one.chosen.get("rung", {}) if s in one.seeds]
        draws = [one.affordable(s) for s in seeds]
        best = [one.best_random(s, k) for s, k in zip(seeds, draws, strict=True)]
        rung = [one.chosen["rung"][s] for s in seeds]
        pairs = [(a, b) for a, b in zip(rung, best, strict=True) if b is not None]
        if pairs:
            columns = ([a for a, _ in pairs], [b for _, b in pairs], [a - b for a, b in pairs])
            cells = [tables.difference(paired(values), 3) for values in columns]
            rows.append([one.group.task, f"{np.mean(draws):.1f}", *cells])
    return rows
