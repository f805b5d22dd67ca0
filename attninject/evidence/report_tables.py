"""What a report says, as tables of cells: the page, the Markdown and the tests read the same ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from attninject.training.experiment import Experiment
from attninject.training.gate_movement import PREFIX as MOVED
from attninject.wording import human

from .report_classes import widest
from .report_data import Study, differences
from .report_figures import Against, Figures, signed
from .sweep_runs import Outcome

RUN_HEADER = (
    "study", "arm", "kind", "plain", "of", "parameters", "macs", "seed", "status", "reason", "epochs",
    "top1", "best_top1", "val_loss", "seconds", "ece", "macro_f1",
)  # fmt: skip

MOST_CLASSES = 12
"""Rows per arm of the table of classes."""


@dataclass(frozen=True)
class Table:
    """A heading, a sentence on how to read it, and cells."""

    title: str
    note: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def run_rows(studies: Sequence[Study]) -> list[dict[str, object]]:
    """A row per run, under `RUN_HEADER`: what every figure of the report can be computed from."""
    rows: list[dict[str, object]] = []
    for number, study in enumerate(studies, 1):
        for arm in study.arms.values():
            for seed, found in sorted(arm.outcomes.items()):
                values = (number, arm.name, arm.kind, arm.plain, arm.of, arm.parameters, arm.macs, seed,
                          found.status, found.reason, *_ends(found), *_beside(found))  # fmt: skip
                rows.append({k: "" if v is None else v for k, v in zip(RUN_HEADER, values, strict=True)})
    return rows


def _ends(found: Outcome) -> tuple[object, ...]:
    """Epochs, accuracies, loss and time of a run, as far as it is."""
    if not found.rows:
        return (None,) * 5
    last = found.rows[-1]
    best = max(row["top1"] for row in found.rows)
    return (
        len(found.rows) - 1,
        last["top1"],
        best,
        last["val_loss"],
        sum(r.get("seconds", 0) for r in found.rows),
    )


def arms(of: Figures) -> Table:
    """Per arm mean ± sd."""
    rows = []
    for arm in of.study.arms.values():
        mean, sd = of.means.get(arm.name, (None, None))
        accuracy = "–" if mean is None else f"{mean:.2f}" + ("" if sd is None else f" ± {sd:.2f}")
        seconds = f"{of.seconds[arm.name]:.0f} s" if arm.name in of.seconds else "–"
        costs = ["–" if n is None else human(n) for n in (arm.parameters, arm.macs)]
        rows.append((arm.name, accuracy, f"{len(arm.finished())} of {len(arm.outcomes)}", *costs, seconds))
    note = (
        "Top-1 on the validation images after the last epoch, in percent: mean ± standard deviation over seeds. "
        "Parameters and MACs (of one image) are those that the blocks add; time is one run's."
    )
    return Table("Arms", note, ("arm", "top-1", "seeds", "parameters", "MACs", "time"), rows)


def _beside(found: Outcome) -> tuple[object, ...]:
    """Calibration error and macro-F1, of runs that say them."""
    return (None, None) if found.measured is None else (found.measured.ece, found.measured.macro_f1)


PAIRED = ("arm", "difference", "95 % (t)", "95 % (bootstrap)", "p", "Holm p", "could show", "seeds needed")


def against_plain(of: Figures) -> Table:
    """Paired differences from plain fine-tuning."""
    note = (
        "Percentage points, paired over seeds. “Could show”: the smallest true difference that so many seeds find "
        "with power 0.8, at this spread and at Holm's strictest level. “Seeds needed”: for a true difference as "
        "large as the one found. The bootstrap is too narrow below some ten seeds; go by t."
    )
    return Table("Against plain fine-tuning", note, PAIRED, [_paired(row) for row in of.against_plain])


def against_controls(of: Figures) -> Table:
    """Paired differences from an arm's own controls."""
    note = (
        "The same for each arm against its controls: a 1×1 residual bottleneck with its parameters at its sites, and "
        "its own block at random sites of the same shapes and depths. Where no difference is shown here, what was "
        "gained may as well be owed to parameters, or to any place."
    )
    header = ("arm", "control", *PAIRED[1:])
    rows = [(row.arm.name, row.other.name, *_paired(row)[1:]) for row in of.against_controls]
    return Table("Against the controls", note, header, rows)


def _paired(row: Against) -> tuple[str, ...]:
    found = row.found
    if found is None:
        return (row.arm.name, "no seed in common", *["–"] * 6)
    intervals = [
        "–" if i is None else f"{signed(i[0])} … {signed(i[1])}" for i in (found.interval, found.bootstrap)
    ]
    ps = ["–" if p is None else f"{p:.3f}" if p >= 0.001 else "< 0.001" for p in (found.p, row.holm)]
    least = "–" if row.least is None else f"{row.least:.2f}"
    return (row.arm.name, signed(found.mean), *intervals, *ps, least, _needed(row))


def _needed(row: Against) -> str:
    if row.found is None or not row.found.sd:
        return "–"
    return "> 1000" if row.needed is None else str(row.needed)


def calibration(of: Figures) -> Table:
    """Calibration error per arm, and its paired difference from plain."""
    against = {row.arm.name: row for row in of.calibration_against}
    rows = []
    for name, (mean, sd) in of.calibration.items():
        cells = _paired(against[name]) if name in against else ("", *["–"] * 5)
        rows.append(
            (
                name,
                f"{mean:.2f}" + ("" if sd is None else f" ± {sd:.2f}"),
                cells[1],
                cells[2],
                cells[4],
                cells[5],
            )
        )
    note = (
        "Expected calibration error in percent: how far confidence is from the share of right answers, over 15 bins of "
        "equal width (Guo et al., arXiv:1706.04599), on the validation images after the last epoch. Less is better; the "
        "difference is paired over seeds."
    )
    return Table("Calibration", note, ("arm", "error", "difference", "95 % (t)", "p", "Holm p"), rows)


def classes(of: Figures) -> Table:
    """Recall per class against plain fine-tuning."""
    shown = widest(of.classes, MOST_CLASSES)
    rows = [
        (
            c.arm, c.name, signed(c.found.mean),
            "–" if c.found.interval is None else f"{signed(c.found.interval[0])} … {signed(c.found.interval[1])}",
            f"{c.plain:.1f}", f"{c.recall:.1f}", f"{c.images:g}",
        )
        for c in shown
    ]  # fmt: skip
    note = (
        "Recall on the validation images after the last epoch in percent, and its paired difference from plain "
        "fine-tuning. Not corrected for the number of classes: of twenty such intervals one leaves out 0 by chance."
    )
    if len(shown) < len(of.classes):
        note += f" The {MOST_CLASSES} classes of each arm that changed most; report_classes.csv has all."
    header = ("arm", "class", "difference", "95 % (t)", "plain", "this arm", "images")
    return Table("Changes per class", note, header, rows)


def sites(of: Figures) -> Table:
    """Where the blocks of each arm stand."""
    rows = [(arm.name, ", ".join(arm.sites)) for arm in of.study.arms.values() if arm.sites]
    return Table("Where the blocks stand", "", ("arm", "sites"), rows)


def movement(of: Figures) -> Table:
    """How far each arm's gates have moved by the last epoch."""
    rows = []
    for arm in of.study.arms.values():
        last: dict[str, list[float]] = {}
        for found in arm.finished().values():
            for key, value in found.rows[-1].items():
                if key.startswith(MOVED):
                    last.setdefault(key.removeprefix(MOVED), []).append(value)
        rows += [(arm.name, block, f"{sum(v) / len(v):.4f}") for block, v in last.items()]
    note = (
        "Mean |gate − 1| on validation images after the last epoch, over seeds. Gates that have hardly moved have "
        "not been tried: raise `attn_lr` before you read anything into the differences above."
    )
    return Table("Movement of the gates", note, ("arm", "block", "mean |gate − 1|"), rows)


def budget(study: Study) -> Table:
    """What all arms have in common, where it is not null."""
    default = Experiment("", "").to_dict()["data"]
    rows = [
        (key, str(value))
        for key, value in study.budget.items()
        if value is not None and value != default.get(key.removeprefix("data "), object())
    ]
    return Table("The same in every arm", "", ("setting", "value"), rows)


def made_with(study: Study) -> Table:
    """Commands and versions."""
    rows = [("command", command) for command in dict.fromkeys(study.commands) if command]
    rows += [("folder", str(folder)) for folder in study.folders]
    return Table("Made with", "", ("what", "value"), [*rows, *study.versions.items()])


def apart(studies: Sequence[Study]) -> str:
    """Why several studies stand apart; "" for one."""
    if len(studies) < 2:
        return ""
    return (
        f"{len(studies)} studies are shown apart and not compared, as their runs differ in more than the arms: "
        f"{'; '.join(differences(studies))}."
    )


def tables(of: Figures) -> list[Table]:
    """All of a study's, in order, without the empty ones."""
    found = [
        arms(of), against_plain(of), against_controls(of), calibration(of), classes(of), movement(of), sites(of),
        budget(of.study),
    ]  # fmt: skip
    return [table for table in [*found, made_with(of.study)] if table.rows]
