"""The figures of a report: per arm mean and spread, paired differences, and the one sentence they come to.

Accuracies and differences are in percentage points here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev

from .report_classes import ClassChange, class_changes
from .report_data import Arm, Study
from .statistics import LEVEL, POWER, Paired, holm, least_difference, paired, seeds_needed
from .sweep_design import ATTENTION

Value = Callable[[Arm], dict[int, float]]
"""What is compared: a value from 0 to 1 per seed."""


@dataclass(frozen=True)
class Against:
    """One arm compared with another, seed by seed.

    Attributes:
        arm: the one.
        other: the other; the difference is arm − other.
        found: None where they share no finished seed.
        holm: p, corrected for all rows of the same table.
        least: difference that so many seeds show with power 0.8, at this spread and Holm's strictest level.
        needed: seeds that would show the difference found; None: more than a thousand, or it is none.
    """

    arm: Arm
    other: Arm
    found: Paired | None
    holm: float | None = None
    least: float | None = None
    needed: int | None = None

    @property
    def shown(self) -> bool:
        """Whether the seeds show a difference."""
        return self.holm is not None and self.holm < LEVEL


@dataclass(frozen=True)
class Figures:
    """All of one study."""

    study: Study
    means: dict[str, tuple[float, float | None]]  # arm → mean and sd of the accuracy
    seconds: dict[str, float]  # arm → mean time of a run
    against_plain: list[Against]
    against_controls: list[Against]
    calibration: dict[str, tuple[float, float | None]]  # arm → mean and sd of the calibration error
    calibration_against: list[Against]  # the error's difference from plain
    classes: list[ClassChange]

    @property
    def sentence(self) -> str:
        """Gain, loss, or nothing that these seeds can show."""
        return _sentence(self)


def figures(study: Study) -> Figures:
    """Everything that a report of the study says in numbers."""
    means = _means(study, Arm.top1)
    seconds = {
        arm.name: fmean(sum(r.get("seconds", 0.0) for r in o.rows) for o in arm.finished().values())
        for arm in study.arms.values()
        if arm.name in means
    }
    from_plain = [(a, study.arms[a.plain]) for a in study.arms.values() if a.plain in study.arms]
    controls = [(study.arms[a.of], a) for a in study.arms.values() if a.of in study.arms]
    calibrated = [(a, b) for a, b in from_plain if a.ece().keys() & b.ece().keys()]
    return Figures(
        study, means, seconds, _compared(from_plain), _compared(controls),
        _means(study, Arm.ece), _compared(calibrated, Arm.ece), class_changes(study),
    )  # fmt: skip


def _means(study: Study, value: Value) -> dict[str, tuple[float, float | None]]:
    """Mean and standard deviation in percent, of the arms that have any."""
    found = {arm.name: [100 * v for v in value(arm).values()] for arm in study.arms.values()}
    return {name: (fmean(v), stdev(v) if len(v) > 1 else None) for name, v in found.items() if v}


def _compared(pairs: Sequence[tuple[Arm, Arm]], value: Value = Arm.top1) -> list[Against]:
    """Holm over all of them."""
    rows = [Against(arm, other, _pair(arm, other, value)) for arm, other in pairs]
    adjusted = holm([row.found.p if row.found else None for row in rows])
    tests = sum(p is not None for p in adjusted)
    return [replace(_with_reach(row, tests), holm=p) for row, p in zip(rows, adjusted, strict=True)]


def _pair(arm: Arm, other: Arm, value: Value) -> Paired | None:
    ours, theirs = value(arm), value(other)
    both = [seed for seed in ours if seed in theirs]
    return paired([100 * (ours[seed] - theirs[seed]) for seed in both]) if both else None


def _with_reach(row: Against, tests: int) -> Against:
    found = row.found
    if found is None or not found.sd:
        return row
    level = LEVEL / max(tests, 1)
    least = least_difference(found.sd, found.seeds, level)
    return replace(row, least=least, needed=seeds_needed(found.mean, found.sd, level))


# --- the sentence ------------------------------------------------------------------------------


def _sentence(of: Figures) -> str:
    rows = [row for row in of.against_plain if row.arm.kind == ATTENTION and row.found is not None]
    if not rows:
        return "Nothing can be said: no arm with blocks shares a finished seed with plain fine-tuning."
    tested = [row for row in rows if row.found is not None and row.found.p is not None]
    if not tested:
        return (
            "Nothing can be said: with one seed there is no spread to hold a difference against; "
            "two are the least, five a beginning."
        )
    shown = [row for row in tested if row.shown]
    gains, losses = (_listed([r for r in shown if sign * _mean(r) > 0]) for sign in (1, -1))
    if gains or losses:
        said = [f"{word}: {text}" for word, text in (("Gain", gains), ("Loss", losses)) if text]
        return f"{'; '.join(said)}. {_rest(len(tested) - len(shown))}".rstrip()
    return _nothing(tested)


def _mean(row: Against) -> float:
    assert row.found is not None
    return row.found.mean


def _listed(rows: Sequence[Against]) -> str:
    return ", ".join(f"{row.arm.name} is {_difference(row)} from plain fine-tuning" for row in rows)


def _difference(row: Against) -> str:
    found = row.found
    assert found is not None
    interval = (
        f"95 % interval {signed(found.interval[0])} to {signed(found.interval[1])}, "
        if found.interval
        else ""
    )
    p = "" if row.holm is None else f", Holm p = {row.holm:.2g}"
    return f"{signed(found.mean)} points ({interval}{found.seeds} seeds{p})"


def _rest(count: int) -> str:
    if not count:
        return ""
    return f"Of the other {count} arms with blocks these seeds show nothing." if count > 1 else (
        "Of the other arm with blocks these seeds show nothing."
    )  # fmt: skip


def _nothing(rows: Sequence[Against]) -> str:
    """No arm differs: what was seen at most, and how many seeds it would take."""
    most = max(rows, key=lambda row: abs(_mean(row)))
    found = most.found
    assert found is not None
    arms = "the arm with blocks" if len(rows) == 1 else f"of {len(rows)} arms with blocks none"
    head = f"Nothing that these {found.seeds} seeds can show: {arms} differs from plain fine-tuning beyond chance"
    if len(rows) == 1:
        head = head.replace("differs", "does not differ")
    if abs(found.mean) < 1e-9:
        return f"{head}, on average by 0.00 points."
    needed = "more than 1000 seeds" if most.needed is None else f"about {most.needed} seeds"
    if not found.sd:
        needed = "more seeds"
    return (
        f"{head}. The largest difference is {_difference(most)}, of {most.arm.name}; to show one of that size, if "
        f"it is there, would take {needed} (power {POWER})."
    )


def signed(value: float) -> str:
    """+1.23 or −0.45."""
    return f"{value:+.2f}".replace("-", "−")
