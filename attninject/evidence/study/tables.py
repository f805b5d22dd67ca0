"""The tables of `RESULTS.md`, from results as they were read."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from attninject.evidence.statistics import Paired, holm, paired
from attninject.wording import markdown_table

from .design import NEW_TASKS, SEEDS, Group
from .kendall import bootstrapped, ceiling, partial_tau, tau
from .results import METHODS, Results

Kind = tuple[str, ...]
"""Net, block, regime: groups that differ in the task alone; those of the new tasks stand apart."""


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown; the first column to the left, the others to the right."""
    return markdown_table(header, rows, right=range(1, len(header)))


def number(value: float | None, digits: int = 2) -> str:
    """With its sign; a dash where there is none."""
    return "–" if value is None or math.isnan(value) else f"{value:+.{digits}f}"


def spread(interval: tuple[float, float] | None, digits: int = 2) -> str:
    """An interval in brackets; nothing where there is none."""
    return "" if interval is None or math.isnan(interval[0]) else (
        f" [{number(interval[0], digits)}, {number(interval[1], digits)}]"
    )  # fmt: skip


def kinds(results: Mapping[Group, Results]) -> dict[Kind, list[Results]]:
    """Results by net, block and regime, in order."""
    found: dict[Kind, list[Results]] = {}
    for group, one in results.items():
        new = ("new tasks",) if group.task in NEW_TASKS else ()
        found.setdefault((group.net, group.block, group.regime, *new), []).append(one)
    return found


def named(kind: Kind) -> str:
    """`lite0, se, frozen`."""
    return ", ".join(kind)


# --- headroom ----------------------------------------------------------------------------------

HEADROOM = (
    "task",
    "net",
    "block",
    "regime",
    "attn_lr",
    "plain",
    "gain of all",
    "accuracy",
    "moved",
    "headroom",
)


def headroom_rows(results: Mapping[Group, Results]) -> list[list[str]]:
    """One row per group: tuned rate, plain test loss, gain of all sites with interval, accuracy gained in points."""
    rows = []
    for group, one in results.items():
        gain, right = one.over_plain(one.sites.every), one.over_plain(one.sites.every, "test_acc")
        every = [r for (_, sites), r in one.runs.items() if sites == one.sites.every]
        plain = [float(r["test_loss"]) for (_, sites), r in one.runs.items() if not sites]
        said = {True: "yes", False: "nothing to rank", None: "not finished"}[one.headroom]
        moved = float(np.mean([float(r["moved"]) for r in every])) if every else math.nan
        rows.append([
            *group.key, f"{one.rate:g}", f"{np.mean(plain):.3f}" if plain else "–",
            difference(gain, 3), difference(right, 1, 100), f"{moved:.3f}", said,
        ])  # fmt: skip
    return rows


def difference(found: Paired | None, digits: int, factor: float = 1.0) -> str:
    """A mean with its interval; a dash where there is none."""
    if found is None:
        return "–"
    interval = None if found.interval is None else (found.interval[0] * factor, found.interval[1] * factor)
    return number(found.mean * factor, digits) + spread(interval, digits)


# --- ranking -----------------------------------------------------------------------------------


def taus(one: Results, methods: Sequence[str] = METHODS, column: str = "test_loss") -> dict[str, float]:
    """Method → τ between mean gain and mean score; nan where the score is constant."""
    gains, found = one.gains(column).mean(0), {}
    for method in methods:
        scores = one.scored(method)
        found[method] = math.nan if scores is None else tau(gains, scores.mean(0))
    return found


def partial_taus(one: Results, methods: Sequence[str] = METHODS) -> dict[str, float]:
    """The same, given depth, parameters and MACs."""
    gains, found = one.gains().mean(0), {}
    controls = [list(map(float, v)) for v in (one.sites.every, one.sites.parameters, one.sites.macs)]
    for method in methods:
        scores = one.scored(method)
        found[method] = (
            math.nan if scores is None else partial_tau(gains.tolist(), scores.mean(0).tolist(), controls)
        )
    return found


def ranked(group: Sequence[Results]) -> list[Results]:
    """Those in which every site was trained for all seeds."""
    return [one for one in group if len(one.ranked_seeds) >= len(SEEDS)]


def ranking_rows(
    group: Sequence[Results],
    of: Callable[[Results, Sequence[str]], dict[str, float]],
    methods: Sequence[str] = METHODS,
) -> list[list[str]]:
    """One row per method that a task has: what `of` gives, the mean over tasks with headroom, its interval, Holm's p."""
    by_task = [(one, of(one, methods)) for one in ranked(group)]
    means: list[Paired | None] = []
    for method in methods:
        values = [v[method] for one, v in by_task if one.headroom and not math.isnan(v[method])]
        means.append(paired(values) if values else None)
    adjusted = holm([m.p if m else None for m in means])
    order = sorted(range(len(methods)), key=lambda i: -(means[i].mean if means[i] else -9.0))  # type: ignore[union-attr]
    return [
        [methods[i], *(number(v[methods[i]]) for _, v in by_task), difference(means[i], 2), _p(adjusted[i])]
        for i in order
        if not all(math.isnan(v[methods[i]]) for _, v in by_task)
    ]


def ceiling_row(group: Sequence[Results]) -> list[str]:
    """The last row: what gains of some seeds say of those of the others."""
    values = [(one, ceiling(one.gains())) for one in ranked(group)]
    of = [v for one, v in values if one.headroom]
    return [
        "*gains of other seeds*",
        *(number(v) for _, v in values),
        number(float(np.mean(of)) if of else None),
        "",
    ]


def primary_rows(group: Sequence[Results], method: str = "score") -> list[list[str]]:
    """Of one method, per task: τ with its bootstrap interval, τ of accuracy, partial τ, ceiling, best and worst gain."""
    rows = []
    for one in ranked(group):
        gains, scores = one.gains(), one.scored(method)
        assert scores is not None
        mean = gains.mean(0)
        rows.append([
            one.group.task, number(tau(mean, scores.mean(0))) + spread(bootstrapped(gains, scores, tau)),
            number(taus(one, [method], "test_acc")[method]), number(partial_taus(one, [method])[method]),
            number(ceiling(gains)),
            f"{one.sites.every[int(mean.argmax())]} ({number(float(mean.max()), 3)})",
            f"{one.sites.every[int(mean.argmin())]} ({number(float(mean.min()), 3)})",
        ])  # fmt: skip
    return rows


def _p(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


# --- choosing ----------------------------------------------------------------------------------

CHOICES = (
    "score", "before", "gradient_norm", "squared_gradients", "gradient_rank", "warmup", "ablation", "rung", "halving",
    "parameters", "first", "last", "bottom", "papers_places", "all",
)  # fmt: skip


def complete(group: Sequence[Results]) -> list[Results]:
    """Those in which the arms were trained for all seeds."""
    return [
        one
        for one in group
        if all(len(one.chosen.get(arm, {})) >= len(SEEDS) for arm in ("random", "score", "gradient_rank"))
    ]


def differences(one: Results, arm: str, other: str) -> list[float]:
    """By seed, an arm's gain less another's (`plain` has none)."""
    a, b = one.chosen.get(arm, {}), one.chosen.get(other, {})
    if other == "plain":
        b = dict.fromkeys(a, 0.0)
    return [a[s] - b[s] for s in sorted(a) if s in b]


def against(one: Results, arm: str, other: str) -> Paired | None:
    """The paired difference of an arm's gain from another's."""
    found = differences(one, arm, other)
    return paired(found) if found else None


def wins(one: Results, arm: str, other: str) -> str:
    """P(A > B) over seeds: in how many of them the arm is better."""
    found = differences(one, arm, other)
    return f"{sum(d > 0 for d in found)}/{len(found)}"


def choosing_rows(group: Sequence[Results], other: str) -> list[list[str]]:
    """One row per arm that a task has: difference with interval, a star where Holm's p over arms is below 0.05, wins."""
    ready = complete(group)
    by_task: list[dict[str, tuple[Paired | None, float | None]]] = []
    names = CHOICES if other == "random" else ("random", *CHOICES)
    for one in ready:
        found = [against(one, arm, other) for arm in names]
        adjusted = holm([f.p if f else None for f in found])
        by_task.append(dict(zip(names, zip(found, adjusted, strict=True), strict=True)))
    rows = []
    for arm in names:
        cells = [t[arm] for t in by_task]
        means = [f.mean for f, _ in cells if f]
        if not means:
            continue
        above = sum(1 for f, _ in cells if f and f.interval and f.interval[0] > 0)
        below = sum(1 for f, _ in cells if f and f.interval and f.interval[1] < 0)
        stars = [
            f"{difference(f, 3)}{'*' if p is not None and p < 0.05 else ''} {wins(one, arm, other)}"
            for one, (f, p) in zip(ready, cells, strict=True)
        ]
        rows.append([arm, *stars, number(float(np.mean(means)), 3), f"{above} / {below}"])
    return rows


def left_out_rows(group: Sequence[Results], among: Sequence[str]) -> list[list[str]]:
    """Per task: the arm that gains most over random on the other tasks, and what it gains over random on this one."""
    ready, rows = complete(group), []
    for one in ready:
        means: dict[str, float] = {}
        for arm in among:
            found = [against(o, arm, "random") for o in ready if o is not one]
            if found and all(found):
                means[arm] = float(np.mean([f.mean for f in found if f]))
        if means:
            best = max(means, key=lambda arm: means[arm])
            mine = against(one, best, "random")
            rows.append(
                [
                    one.group.task,
                    best,
                    number(means[best], 3),
                    difference(mine, 3),
                    wins(one, best, "random"),
                ]
            )
    return rows


# --- controls and costs ------------------------------------------------------------------------


def null_rows(rows: Sequence[Mapping[str, str]]) -> list[list[str]]:
    """Per group: permutations, sites, share of p below .05 and below .5, mean p, share with any Holm p < .05."""
    by: dict[tuple[str, ...], list[list[float]]] = {}
    for row in rows:
        by.setdefault((row["task"], row["net"], row["block"]), []).append(
            [float(p) for p in row["ps"].split()]
        )
    found = []
    for names, lists in by.items():
        every = np.concatenate([np.array(ps) for ps in lists])
        family = np.mean([min(p for p in holm(ps) if p is not None) < 0.05 for ps in lists])
        found.append([
            *names, str(len(lists)), str(len(lists[0])), f"{np.mean(every < 0.05):.3f}", f"{np.mean(every < 0.5):.2f}",
            f"{every.mean():.2f}", f"{family:.2f}",
        ])  # fmt: skip
    return found


def bottleneck_rows(results: Mapping[Group, Results]) -> list[list[str]]:
    """Per task: gain of the block and of the bottleneck at all sites and at those of `score`, and their differences."""
    rows = []
    for group, control in results.items():
        block = results.get(Group(group.task, group.net, "se", group.regime))
        if group.block != "bottleneck" or block is None:
            continue
        cells = [group.task]
        for arm in ("all", "score"):
            pairs = [
                (a, b)
                for s in block.seeds
                if (a := block.gain(s, block.arms(s)[arm])) is not None
                and (b := control.gain(s, block.arms(s)[arm])) is not None
            ]
            for values in ([a for a, _ in pairs], [b for _, b in pairs], [a - b for a, b in pairs]):
                cells.append(difference(paired(values), 3) if values else "–")
        rows.append(cells)
    return rows


def cost_rows(results: Mapping[Group, Results]) -> list[list[str]]:
    """Per kind: mean seconds per seed of all scores, of `warmup` and `ablation`, of one training at all and at one."""
    rows = []
    for kind, group in kinds(results).items():
        scores, late, rungs = (
            [
                sum(float(r["seconds"]) for r in rows_ if r.get("epochs", "1") == "1")
                for one in group
                for rows_ in one.tables[name].values()
            ]
            for name in ("scores", "trained", "rungs")
        )
        every, single, total = [], [], []
        for one in group:
            every += [float(r["seconds"]) for (_, s), r in one.runs.items() if s == one.sites.every]
            own = [float(r["seconds"]) for (_, s), r in one.runs.items() if len(s) == 1]
            single += own
            total += [sum(own) / len(one.ranked_seeds)] if one.ranked_seeds else []
        rows.append([named(kind), *(_mean(v) for v in (scores, late, rungs, every, single, total))])
    return rows


def _mean(values: Sequence[Any]) -> str:
    return f"{np.mean(values):.1f}" if values else "–"
