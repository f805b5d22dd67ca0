"""`RESULTS.md`: what the files of results say, written anew from them each time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from attninject.evidence.statistics import Paired, paired

from . import judged, tables
from .design import PERMUTATIONS, SEEDS, STAGES, Group
from .kendall import ceiling
from .results import EXPLORED, METHODS, Results, read
from .store import Store

FILE = Path(__file__).parents[1] / "RESULTS.md"

FIRST: tables.Kind = ("lite0", "se", "frozen")
"""Of the primary test."""

SLIGHT = 0.001
"""Cross-entropy that is called slight."""

TRAINED = ("warmup", "ablation", "rung", "halving")
UNTRAINED = tuple(
    m for m in tables.CHOICES if m not in (*TRAINED, "before", "bottom", "papers_places", "all")
)
"""Ways to choose within the budget that train nothing: what the default is chosen among."""

HEAD = """# What was measured of `rank_sites`

Written by `python -m attninject.evidence.study report` from the files in [`study/results/`](study/results/); do not
edit. What was trained and asked was fixed beforehand in [`study/PROTOCOL.md`](study/PROTOCOL.md), deviations with it.
Gains are test cross-entropy of plain training less that of the arm, paired over {seeds} seeds: above 0 is better.
Intervals are 95 %, by Student's t over seeds (or over tasks, where the mean over tasks is meant).
"""


def written(store: Store) -> str:
    """The page."""
    results = read(store)
    by_kind = tables.kinds(results)
    parts = [
        HEAD.format(seeds=len(SEEDS)),
        "## In short\n\n" + "\n".join(f"- {line}" for line in _short(by_kind, store)),
        "## Headroom\n\n" + HEADROOM + tables.table(tables.HEADROOM, tables.headroom_rows(results)),
        "## Does the order foretell what a site gains?\n\n" + RANKING + "\n\n".join(_ranking(by_kind)),
        "## Is what a method chooses better than chance?\n\n" + CHOOSING + "\n\n".join(_choosing(by_kind)),
        "## What was chosen, on tasks it was not chosen on\n\n" + _judged(by_kind),
        "## Controls\n\n" + _controls(results, store),
        "## What it costs\n\n" + COST + tables.table(COST_HEADER, tables.cost_rows(results)),
        "## What is missing\n\n" + _missing(results, store),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


HEADROOM = """Blocks at all candidate sites, at the rate with the least validation loss. *moved* is ‖y − x‖/‖x‖ per block,
in the mean. Accuracy in points.

"""

RANKING = """Kendall's τ-b between a score and what each site gains when it alone is trained, both averaged over seeds.
Means are over tasks with headroom. The last row is what no method can be expected to beat by much: the agreement of gains
over two seeds with gains over the other three. *Partial* is given depth, parameters and MACs. `warmup` and `ablation`
need a training of blocks at all sites first.

"""

CHOOSING = """Sites taken within a quarter of the parameters of all sites; `papers_places` and `all` are outside of the
budget. Each seed's sites are chosen by its own training images. A star: Holm's p over the arms of the task is below 0.05.
Behind it, in how many of the seeds the arm is better. The last column counts tasks with an interval above and below 0.

"""

COST = """Seconds of this process per seed: all scores of one measurement, the two that need training, one epoch of every
single site, one training with blocks at all sites, one with one block, and all single sites one after another.

"""
COST_HEADER = ("kind", "scores", "warmup, ablation", "rung", "all sites", "one site", "every single site")


# --- in short ----------------------------------------------------------------------------------


def _short(by_kind: Mapping[tables.Kind, Sequence[Results]], store: Store) -> list[str]:
    groups = [one for group in by_kind.values() for one in group if one.group.block != "bottleneck"]
    known = [one for one in groups if one.headroom is not None]
    lines = [
        f"**Headroom**: blocks at all sites beat plain training, with an interval above 0, in "
        f"{sum(bool(one.headroom) for one in known)} of {len(known)} groups of task, net, block and regime."
    ]
    first = by_kind.get(FIRST, [])
    if slight := [one.group for one in known if one.headroom and _gain(one) < SLIGHT]:
        named = ", ".join(f"{g.task} on {g.net}" for g in slight)
        lines.append(
            f"By that rule {named} has headroom with a gain below {SLIGHT}, which nobody would notice."
        )
    lines += _primary(first) + _others(by_kind) + _choice(first) + _verdict(by_kind.get(judged.KIND, []))
    return lines + _null(store) + _against_bottleneck(by_kind)


def _gain(one: Results) -> float:
    found = one.over_plain(one.sites.every)
    return found.mean if found else math.nan


def _means(group: Sequence[Results], method: str) -> Paired | None:
    values = [tables.taus(one, [method])[method] for one in tables.ranked(group) if one.headroom]
    values = [v for v in values if not math.isnan(v)]
    return paired(values) if values else None


def _primary(group: Sequence[Results]) -> list[str]:
    found = _means(group, "score")
    if found is None:
        return ["**Ranking**: the primary test is not finished."]
    interval = found.interval or (math.nan, math.nan)
    said = "does not foretell"
    if interval[0] > 0:
        said = "foretells"
    elif interval[1] < 0:
        said = "runs against"
    reach = float(np.mean([ceiling(one.gains()) for one in tables.ranked(group) if one.headroom]))
    return [
        f"**Ranking** (primary test: `score`, {tables.named(FIRST)}): the order {said} what a site gains: mean τ "
        f"{tables.number(found.mean)}{tables.spread(found.interval)} over {found.seeds} tasks, where gains agree with "
        f"gains of other seeds by {tables.number(reach)}."
    ]


def _others(by_kind: Mapping[tables.Kind, Sequence[Results]]) -> list[str]:
    """The methods with the largest mean τ per kind."""
    lines = []
    for kind, group in by_kind.items():
        means = {m: found.mean for m in METHODS if (found := _means(group, m)) is not None}
        if not means:
            continue
        tasks = sum(bool(one.headroom) for one in tables.ranked(group))
        order = sorted(means, key=lambda m: -means[m])
        best = ", ".join(f"`{m}` {tables.number(means[m])}" for m in order[:3])
        own = tables.number(means["score"])
        lines.append(
            f"{tables.named(kind)}, {tasks} task{'s' * (tasks != 1)} with headroom: of {len(means)} methods the largest "
            f"mean τ have {best}; `score` has {own}."
        )
    return lines


def _choice(group: Sequence[Results]) -> list[str]:
    ready = tables.complete(group)
    if not ready:
        return ["**Choosing**: not finished."]
    over = [tables.against(one, "score", "random") for one in ready]
    plain = [tables.against(one, "score", "plain") for one in ready]
    above = sum(1 for f in over if f and f.interval and f.interval[0] > 0)
    below = sum(1 for f in over if f and f.interval and f.interval[1] < 0)
    worse = sum(1 for f in plain if f and f.interval and f.interval[1] < 0)
    met = "met" if above >= 4 and not worse else "not met"
    return [
        f"**Choosing** ({tables.named(FIRST)}, a quarter of the parameters): sites of `score` beat random sets of the "
        f"same budget with an interval above 0 on {above} of {len(ready)} tasks, and lose with one below 0 on {below}; "
        f"they are worse than plain beyond noise on {worse}. The goal (4 of 5 tasks, never worse than plain) is {met}."
    ]


def _verdict(group: Sequence[Results]) -> list[str]:
    ready = judged.open_tasks(group)
    if len(ready) < 2:
        return ["**New tasks**: not finished."]
    won = judged.winners(group)
    said = ", ".join(f"`{m}`" for m in won) + (" has" if len(won) == 1 else " have") if won else "none has"
    both = []
    for method in judged.JUDGED:
        tau, gain = judged.mean_tau(group, method), judged.over_random(group, method)
        both.append(f"`{method}` τ {tables.difference(tau, 2)}, gain {tables.difference(gain, 3)}")
    return [
        f"**New tasks** ({len(ready)} with headroom): of the methods that were chosen on the first five, {said} won "
        f"(mean τ and mean gain over random sets both with an interval above 0): {'; '.join(both)}."
    ]


def _null(store: Store) -> list[str]:
    lines = []
    for name, when in (("null", ""), ("null_before", ", before its correction,")):
        ps = [float(p) for row in store.read(name) for p in row["ps"].split()]
        if not ps:
            continue
        share, mean = float(np.mean(np.array(ps) < 0.05)), float(np.mean(ps))
        said = "too small" if share > 0.075 else "too large" if share < 0.025 else "about right"
        lines.append(
            f"**Permuted labels**: p-values of the score test{when} are {said}: {share:.1%} of {len(ps)} are below .05, "
            f"and their mean is {mean:.2f}, where 5 % and 0.50 are due."
        )
    return lines


def _against_bottleneck(by_kind: Mapping[tables.Kind, Sequence[Results]]) -> list[str]:
    blocks = {one.group.task: one for one in by_kind.get(FIRST, [])}
    found = []
    for control in by_kind.get(("lite0", "bottleneck", "frozen"), []):
        block = blocks.get(control.group.task)
        every = control.sites.every
        pairs = [(block.gain(s, every), control.gain(s, every)) for s in control.seeds] if block else []
        values = [a - b for a, b in pairs if a is not None and b is not None]
        found += [paired(values)] if values else []
    if not found:
        return []
    above = sum(1 for f in found if f.interval and f.interval[0] > 0)
    below = sum(1 for f in found if f.interval and f.interval[1] < 0)
    return [
        f"**Bottleneck**: at all sites SE gains more than as many parameters without attention, with an interval above "
        f"0, on {above} of {len(found)} tasks, and less on {below}."
    ]


# --- sections ----------------------------------------------------------------------------------


def _ranking(by_kind: Mapping[tables.Kind, Sequence[Results]]) -> list[str]:
    parts = []
    for kind, group in by_kind.items():
        ready = tables.ranked(group)
        if not ready:
            continue
        tasks = [one.group.task + ("" if one.headroom else " (nothing to rank)") for one in ready]
        header = ("method", *tasks, "mean", "p (Holm)")
        rows = [*tables.ranking_rows(group, tables.taus), tables.ceiling_row(group)]
        partial = tables.ranking_rows(group, tables.partial_taus)
        parts.append(f"### {tables.named(kind)}\n\n" + tables.table(header, rows))
        parts.append("Partial τ:\n\n" + tables.table(header, partial))
        explored = [one for one in ready if one.scored("rung") is not None]
        if explored:
            rows = tables.ranking_rows(group, tables.taus, EXPLORED)
            parts.append(EXPLORATORY + tables.table(header, rows))
        parts.append(
            "`score` by itself, with a bootstrap over seeds (rough, with five); best and worst site by number:\n\n"
            + tables.table(PRIMARY_HEADER, tables.primary_rows(group))
        )
    return parts or ["Nothing is finished."]


EXPLORATORY = """Exploratory, declared later than the others (see the protocol): scores at the head that trainings
start from (`_kept`, with the score test as it was before its correction), validation loss of each site after one epoch
(`rung`), by successive halving (`halving`) and after the whole training (`validation`), the drop to second order
(`curvature`), and the score test before its correction (`before`).

"""
PRIMARY_HEADER = (
    "task",
    "τ",
    "τ of accuracy",
    "partial τ",
    "other seeds",
    "best site (gain)",
    "worst site (gain)",
)


def _choosing(by_kind: Mapping[tables.Kind, Sequence[Results]]) -> list[str]:
    parts = []
    for kind, group in by_kind.items():
        ready = tables.complete(group)
        if not ready:
            continue
        header = ("arm", *(one.group.task for one in ready), "mean", "above / below")
        parts.append(f"### {tables.named(kind)}")
        parts.append(
            "Over the seed's random sets:\n\n" + tables.table(header, tables.choosing_rows(group, "random"))
        )
        parts.append("Over plain:\n\n" + tables.table(header, tables.choosing_rows(group, "plain")))
        left = tables.left_out_rows(group, UNTRAINED)
        parts.append(
            "One task left out: the arm without training that gains most over random on the other tasks, and what it "
            "gains on this one:\n\n" + tables.table(LEFT_HEADER, left)
        )
    return parts or ["Nothing is finished."]


LEFT_HEADER = ("task left out", "arm", "on the others", "on this one", "seeds won")


def _judged(by_kind: Mapping[tables.Kind, Sequence[Results]]) -> str:
    group = by_kind.get(judged.KIND, [])
    ready = tables.complete(tables.ranked(group))
    if not ready:
        return "Not finished."
    tasks = [one.group.task + ("" if one.headroom else " (nothing to rank)") for one in ready]
    header = ("method", *tasks, "mean", "p (Holm)")
    parts = [
        "τ:\n\n" + tables.table(header, tables.ranking_rows(ready, tables.taus, judged.JUDGED)),
        "Gain over the seed's random sets of the same budget:\n\n"
        + tables.table(header, judged.choosing_rows(ready)),
    ]
    old = tables.complete(by_kind.get(FIRST, []))
    paid = judged.payment_rows([*ready, *old])
    parts.append(PAYMENT + tables.table(PAYMENT_HEADER, paid))
    return JUDGED + "\n\n".join(parts)


JUDGED = """Tasks as units, those with headroom alone. `before` is the score test before its correction.

"""
PAYMENT = """A rung has to be paid for: in its seconds k of the seed's random sets could be trained, of which the best by
validation loss is taken. Gains over plain; new tasks first.

"""
PAYMENT_HEADER = ("task", "k", "`rung`", "best of k", "difference")


def _controls(results: Mapping[Group, Results], store: Store) -> str:
    parts = []
    for name in ("null", "null_before"):
        rows = store.read(name)
        parts.append(tables.table(NULL_HEADER, tables.null_rows(rows)) if rows else "Not reached.")
    null = "\n\nBefore the correction:\n\n".join(parts)
    bottleneck = tables.bottleneck_rows(results)
    return (
        "Permuted labels: p-values of the score test where labels mean nothing. They should be uniform: 5 % below .05, "
        f"mean 0.50.\n\n{null}\n\nA 1×1 residual bottleneck with as nearly the block's parameters as a width can have, "
        "at the same sites, tuned by itself: gains over plain, and the block less the bottleneck.\n\n"
        + (tables.table(BOTTLENECK_HEADER, bottleneck) if bottleneck else "Not reached.")
        + "\n\nThe random backbone is `lite0_random` in the tables above."
    )


NULL_HEADER = (
    "task",
    "net",
    "block",
    "permutations",
    "sites",
    "p < .05",
    "p < .5",
    "mean p",
    "any Holm p < .05",
)
BOTTLENECK_HEADER = (
    "task",
    "SE, all",
    "bottleneck, all",
    "difference",
    "SE, `score`",
    "bottleneck, same",
    "difference",
)


def _missing(results: Mapping[Group, Results], store: Store) -> str:
    """The stages of the design that are not finished."""
    permuted = [(r["task"], r["net"], r["block"]) for r in store.read("null")]
    lines = []
    for stage, net, block, regime, tasks in STAGES:
        left = [t for t in tasks if not _done(stage, Group(t, net, block, regime), results, permuted)]
        if left:
            lines.append(f"- {stage}, {net}, {block}, {regime}: {', '.join(left)}")
    return "\n".join(lines) or "Nothing: all stages of the design are finished."


def _done(
    stage: str, group: Group, results: Mapping[Group, Results], permuted: Sequence[tuple[str, ...]]
) -> bool:
    if stage == "null":
        return permuted.count((group.task, group.net, group.block)) >= PERMUTATIONS
    if stage == "bottleneck":
        one = results.get(Group(group.task, group.net, "bottleneck", group.regime))
        block = results.get(group)
        return bool(
            one and block and all(one.gain(s, block.arms(s).get("score", ())) is not None for s in SEEDS)
        )
    one = results.get(group)
    if one is None:
        return False
    checks = {
        "headroom": one.headroom is not None,
        "rank": bool(tables.ranked([one])),
        "explore": one.scored("score_kept") is not None,
        "rungs": one.scored("halving") is not None,
        "choose": bool(tables.complete([one])),
    }
    return checks[stage]
