"""Which charts a study has, and what stands on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from attninject.training.gate_movement import PREFIX as MOVED

from .report_data import Arm
from .report_figures import Figures
from .report_svg import Bar, Line, bars, lines, points
from .sweep_design import ATTENTION, BOTTLENECK, PLAIN, RANDOM
from .sweep_runs import Outcome

COLOURS = 8
DASHES = {BOTTLENECK: " dashed", RANDOM: " dotted"}
MOST = 10  # arms on one chart; a longer list is cut to plain and attention


@dataclass(frozen=True)
class Chart:
    """An SVG under a heading; `legend`: (name, classes) of what is drawn."""

    title: str
    svg: str
    legend: Sequence[tuple[str, str]] = ()


def charts(of: Figures) -> list[Chart]:
    """All that the study has data for."""
    if not of.means:
        return []
    styles = _styles(of)
    found = [_differences(of, styles), _curves(of, styles), _movement(of, styles)]
    found += [
        _against(of, styles, "Accuracy against parameters", "parameters of the blocks", _parameters),
        _against(of, styles, "Accuracy against time", "seconds of a run", lambda arm: of.seconds[arm.name]),
    ]
    return [chart for chart in found if chart is not None]


def _styles(of: Figures) -> dict[str, str]:
    """A colour for each attention arm, its controls in the same, dashed or dotted; plain in the page's ink."""
    attention = [arm.name for arm in of.study.arms.values() if arm.kind == ATTENTION]
    colours = {name: f"c{number % COLOURS}" for number, name in enumerate(attention)}
    found = {}
    for arm in of.study.arms.values():
        colour = "plain" if arm.kind == PLAIN else colours.get(arm.of or arm.name, "plain")
        found[arm.name] = colour + DASHES.get(arm.kind, "")
    return found


def _drawn(of: Figures) -> list[Arm]:
    """The arms on a chart."""
    arms = [arm for arm in of.study.arms.values() if arm.name in of.means]
    return arms if len(arms) <= MOST else [arm for arm in arms if arm.kind in (PLAIN, ATTENTION)]


def _legend(arms: Sequence[Arm], styles: dict[str, str]) -> list[tuple[str, str]]:
    return [(arm.name, styles[arm.name]) for arm in arms]


def _differences(of: Figures, styles: dict[str, str]) -> Chart | None:
    rows = [
        Bar(row.arm.name, row.found.mean, row.found.interval, styles[row.arm.name])
        for row in of.against_plain
        if row.found is not None
    ]
    if not rows:
        return None
    return Chart("Difference from plain fine-tuning", bars(rows, "percentage points, 95 % intervals (t)"))


def _curves(of: Figures, styles: dict[str, str]) -> Chart:
    arms = _drawn(of)
    series = [
        Line(a.name, _mean_by_epoch(a, lambda o, e: 100 * o.rows[e]["top1"]), styles[a.name]) for a in arms
    ]
    return Chart("Learning curves", lines(series, "epoch", "top-1, mean over seeds"), _legend(arms, styles))


def _movement(of: Figures, styles: dict[str, str]) -> Chart | None:
    arms = [
        arm
        for arm in _drawn(of)
        if all(_moved(o, e) for o in arm.finished().values() for e in range(len(o.rows)))
    ]
    if not arms:
        return None
    series = [Line(a.name, _mean_by_epoch(a, lambda o, e: fmean(_moved(o, e))), styles[a.name]) for a in arms]
    svg = lines(series, "epoch", "mean |gate − 1|")
    return Chart("Movement of the gates", svg, _legend(arms, styles))


def _moved(found: Outcome, epoch: int) -> list[float]:
    return [value for key, value in found.rows[epoch].items() if key.startswith(MOVED)]


def _mean_by_epoch(arm: Arm, value: Callable[[Outcome, int], float]) -> list[tuple[float, float]]:
    found = list(arm.finished().values())
    count = min(len(o.rows) for o in found)
    return [(epoch, fmean(value(o, epoch) for o in found)) for epoch in range(count)]


def _parameters(arm: Arm) -> float | None:
    return arm.parameters


def _against(
    of: Figures, styles: dict[str, str], title: str, x: str, value: Callable[[Arm], float | None]
) -> Chart | None:
    arms = [(arm, value(arm)) for arm in _drawn(of)]
    series = [Line(a.name, [(x, of.means[a.name][0])], styles[a.name]) for a, x in arms if x is not None]
    if not series:
        return None
    return Chart(title, points(series, x, "top-1, mean over seeds"), [(s.name, s.style) for s in series])
