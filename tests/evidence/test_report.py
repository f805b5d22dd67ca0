"""Reports: figures against the CSV, the sentence for gain, loss and neither, budgets apart, and the page."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
from scipy import stats

from attninject.errors import RunError
from attninject.evidence.report import Report, report
from attninject.evidence.report_classes import ClassChange, widest
from attninject.evidence.report_figures import figures
from attninject.evidence.report_tables import against_plain
from attninject.evidence.statistics import holm, least_difference, paired, power, seeds_needed
from attninject.evidence.sweep_design import Arm, Design, keep

BUDGET: dict[str, Any] = {"model": "timm/resnet10t", "train": {"epochs": 1}}


def written(out: Path, top1: dict[str, Sequence[float]], common: dict[str, Any] = BUDGET) -> Path:
    """A sweep's folder whose runs have ended at these accuracies; `plain` and arms with SE."""
    rule = {"name": "se", "rules": [{"block": "se", "place": "stage_end"}]}
    arms = tuple(
        Arm(name, "plain", {})
        if name == "plain"
        else Arm(name, "attention", {}, rule, "plain", parameters=44_000)
        for name in top1
    )
    seeds = range(max(len(values) for values in top1.values()))
    made = keep(Design(common, out, tuple(seeds), arms), f"attninject sweep {out.name}.yaml")
    for run in made.runs():
        values = top1[run.arm.name]
        if run.seed < len(values):
            run.folder.mkdir(parents=True)
            text = json.dumps(run.experiment.to_dict())
            (run.folder / "experiment.json").write_text(text, encoding="utf-8")
            moved = ",moved.layer1.0.se" if run.arm.name != "plain" else ""
            rows = [f"epoch,step,val_loss,top1,seconds{moved}"]
            for epoch in range(made.runs().__next__().experiment.train.epochs + 1):
                value = values[run.seed] if epoch else 0.1
                rows.append(f"{epoch},{epoch},1.0,{value!r},2.5" + (f",{0.25 * epoch}" if moved else ""))
            (run.folder / "log.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return out


def with_classes(folder: Path) -> Path:
    """The same, and each run says what became of two classes: what one gains the other loses."""
    for log in sorted(folder.rglob("log.csv")):
        last = log.read_text(encoding="utf-8").splitlines()[-1].split(",")
        shifts = {"plain": (3, 1, 4, 1, 5), "se": (9, 2, 6, 5, 3), "cbam": (5, 8, 9, 7, 9)}
        shift = shifts[log.parent.parent.name][int(log.parent.name[-1])]
        counts = [(50, 50, 30 + shift), (50, 50, 45 - shift)]
        named = [
            dict(zip(("images", "predicted", "right"), c, strict=True), name=n)
            for n, c in zip("ab", counts, strict=True)
        ]
        said = {
            "epoch": int(last[0]),
            "top1": float(last[3]),
            "ece": 0.01 * shift,
            "macro_f1": 0.5,
            "classes": named,
        }
        (log.parent / "measured.json").write_text(json.dumps(said), encoding="utf-8")
    return folder


class Cells(HTMLParser):
    """The cells of every table row of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.inside = True

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.rows[-1][-1] += data


NOISY = {
    "plain": [0.80, 0.82, 0.79, 0.83, 0.81],
    "se": [0.81, 0.82, 0.81, 0.82, 0.82],
    "cbam": [0.84, 0.861, 0.832, 0.868, 0.851],
}


@pytest.fixture
def noisy(tmp_path: Path) -> Report:
    return report([written(tmp_path / "a", NOISY)])


def test_figures_of_the_page_follow_from_the_csv(noisy: Report) -> None:
    """Means, spreads, paired differences, t intervals, p and Holm's p on the page are those of the CSV's runs."""
    runs: dict[str, dict[int, float]] = {}
    for row in csv.DictReader(io.StringIO(noisy.csv())):
        assert row["status"] == "finished"
        runs.setdefault(row["arm"], {})[int(row["seed"])] = 100 * float(row["top1"])
    cells = Cells(noisy.html()).rows
    for arm, values in runs.items():
        shown = next(row for row in cells if row[0] == arm and "±" in row[1])
        assert shown[1] == f"{fmean(values.values()):.2f} ± {stdev(values.values()):.2f}"
        assert shown[2] == "5 of 5"
    tests = {
        arm: stats.ttest_rel(list(values.values()), list(runs["plain"].values()))
        for arm, values in runs.items()
        if arm != "plain"
    }
    smaller, larger = sorted(tests.values(), key=lambda found: found.pvalue)
    for arm, found in tests.items():
        shown = next(row for row in cells if row[0] == arm and len(row) == 8)
        low, high = found.confidence_interval(0.95)
        mean = fmean(runs[arm][seed] - runs["plain"][seed] for seed in runs[arm])
        assert shown[1] == f"{mean:+.2f}".replace("-", "−")
        assert shown[2] == f"{low:+.2f} … {high:+.2f}".replace("-", "−")
        adjusted = min(2 * smaller.pvalue, 1) if found is smaller else max(2 * smaller.pvalue, larger.pvalue)
        for cell, p in ((shown[4], found.pvalue), (shown[5], adjusted)):
            assert cell == ("< 0.001" if p < 0.001 else f"{p:.3f}")


def test_calibration_and_classes_follow_from_the_csv(tmp_path: Path) -> None:
    """Errors, recalls and paired differences on the page are those of both CSV files; t intervals are scipy's."""
    found = report([with_classes(written(tmp_path / "a", NOISY))])
    runs, recalls = {}, {}
    for row in csv.DictReader(io.StringIO(found.csv())):
        runs.setdefault(row["arm"], []).append(100 * float(row["ece"]))
    for row in csv.DictReader(io.StringIO(found.classes_csv())):
        recalls.setdefault((row["arm"], row["class"]), []).append(
            100 * int(row["right"]) / int(row["images"])
        )
    cells = Cells(found.html()).rows
    for arm in ("se", "cbam"):
        low, high = stats.ttest_rel(runs[arm], runs["plain"]).confidence_interval(0.95)
        shown = next(row for row in cells if row[0] == arm and len(row) == 6 and "…" in row[3])
        assert shown[1] == f"{fmean(runs[arm]):.2f} ± {stdev(runs[arm]):.2f}"
        assert shown[2] == f"{fmean(runs[arm]) - fmean(runs['plain']):+.2f}".replace("-", "−")
        assert shown[3] == f"{low:+.2f} … {high:+.2f}".replace("-", "−")
        for name in "ab":
            ours, plain = recalls[arm, name], recalls["plain", name]
            shown = next(row for row in cells if row[:2] == [arm, name])
            assert shown[4:] == [f"{fmean(plain):.1f}", f"{fmean(ours):.1f}", "50"]
            assert shown[2] == f"{fmean(ours) - fmean(plain):+.2f}".replace("-", "−")
    assert "## Calibration" in found.markdown() or "### Calibration" in found.markdown()
    files = found.write(tmp_path / "out")
    assert [file.name for file in files][-1] == "report_classes.csv"
    without = report([written(tmp_path / "b", NOISY)])
    assert "Calibration" not in without.html()
    assert "Changes per class" not in without.markdown()


def test_what_a_run_says_of_its_classes_must_agree_with_its_log(tmp_path: Path) -> None:
    """A file that is torn, or of another epoch, makes the run a damaged one."""
    folder = with_classes(written(tmp_path / "a", NOISY))
    (folder / "se" / "seed-1" / "measured.json").write_text("{", encoding="utf-8")
    other = folder / "se" / "seed-2" / "measured.json"
    other.write_text(other.read_text(encoding="utf-8").replace('"epoch": 1', '"epoch": 0'), encoding="utf-8")
    text = report([folder]).markdown()
    assert "se, seed 1: damaged (measured.json is damaged (JSONDecodeError" in text
    assert "se, seed 2: damaged (measured.json says otherwise than the log of epoch 1)" in text


def test_many_classes_are_cut_to_those_that_changed_most() -> None:
    """Of each arm the widest changes, gains first."""
    changes = [
        ClassChange("se", str(d), 10, 50, 50 + d, paired([float(d), float(d) + 1])) for d in (1, -9, 4, 0, 8)
    ]
    assert [c.name for c in widest(changes, 3)] == ["8", "4", "-9"]


def test_sentence_says_gain_loss_or_neither(tmp_path: Path) -> None:
    """What the seeds show is said first, with interval; what they cannot show, with the seeds that it would take."""
    base = NOISY["plain"]
    gain = report([written(tmp_path / "gain", NOISY)]).sentence
    assert gain.startswith("Gain: cbam is +4.04 points (95 % interval +")
    assert "Of the other arm with blocks these seeds show nothing." in gain
    loss = report([written(tmp_path / "loss", {"plain": NOISY["cbam"], "se": base})]).sentence
    assert loss.startswith("Loss: se is −4.04 points")
    neither = report([written(tmp_path / "neither", {"plain": base, "se": NOISY["se"]})])
    assert neither.sentence.startswith(
        "Nothing that these 5 seeds can show: the arm with blocks does not differ"
    )
    (row,) = neither.studies[0].against_plain
    assert row.found is not None
    assert f"about {seeds_needed(row.found.mean, row.found.sd or 0)} seeds" in neither.sentence
    one = report([written(tmp_path / "one", {"plain": [0.8], "se": [0.9]})]).sentence
    assert one.startswith("Nothing can be said: with one seed")
    alone = report([written(tmp_path / "alone", {"se": [0.8, 0.9]})]).sentence
    assert alone.startswith("Nothing can be said: no arm with blocks shares")
    same = report([written(tmp_path / "same", {"plain": base, "se": base})]).sentence
    assert "on average by 0.00 points" in same


def test_budgets_are_shown_apart(tmp_path: Path) -> None:
    """Sweeps of other budgets are two studies, with the reason; of one budget they are one, seeds counted once."""
    a, b = written(tmp_path / "a", NOISY), written(tmp_path / "b", NOISY, {**BUDGET, "train": {"epochs": 2}})
    both = report([a, b])
    assert len(both.studies) == 2
    for text in (both.html(), both.markdown()):
        assert "2 studies are shown apart and not compared" in text
        assert "epochs: 1 / 2" in text
    once = report([a, written(tmp_path / "c", NOISY)])
    (study,) = once.studies
    assert len(study.study.arms["se"].finished()) == 5
    assert "counts once" in once.markdown()


def test_arms_of_one_name_and_other_settings_are_not_mixed(tmp_path: Path) -> None:
    """Sweeps, or a sweep and runs, whose `plain` learnt at another rate are refused together; other data stand apart."""
    a = written(tmp_path / "a", NOISY)
    b = written(tmp_path / "b", NOISY, {**BUDGET, "train": {"epochs": 1, "lr": 0.5}})
    with pytest.raises(RunError, match=r"its arm 'plain' is not that of .*report them apart"):
        report([a, b])
    (b / "sweep.json").unlink()  # of loose runs the name says it
    assert "plain lr=0.5" in report([a, b]).studies[0].study.arms
    with pytest.raises(RunError, match="its arm 'plain' is not that of"):
        report([written(tmp_path / "c", NOISY, {**BUDGET, "train": {"epochs": 1, "lr": 0.5}}), a])
    folders = [
        written(tmp_path / name, NOISY, {**BUDGET, "data": {"kind": "imagefolder", "root": name}})
        for name in "de"
    ]
    assert 'data root: "d" / "e"' in report(folders).markdown()


def test_runs_without_a_column_of_movement_do_no_harm(tmp_path: Path) -> None:
    """One run of an earlier version among others: the chart of movement leaves its arm out."""
    folder = written(tmp_path / "a", NOISY)
    log = folder / "se" / "seed-1" / "log.csv"
    rows = [line.rpartition(",")[0] for line in log.read_text(encoding="utf-8").splitlines()]
    log.write_text("\n".join(rows) + "\n", encoding="utf-8")
    assert "Movement of the gates" in report([folder]).html()


def test_damaged_and_unfinished_runs_are_named_and_left_out(tmp_path: Path) -> None:
    """A broken log and a run that is not there are listed, and count in no figure."""
    folder = written(tmp_path / "a", {**NOISY, "se": NOISY["se"][:4]})
    (folder / "cbam" / "seed-2" / "log.csv").write_text("epoch,val_loss,top1\n0,1.0,nan\n", encoding="utf-8")
    (folder / "cbam" / "seed-3" / "log.csv").write_text("epoch,val_loss,map\n0,1.0,0.5\n", encoding="utf-8")
    found = report([folder])
    assert "cbam, seed 3: damaged (log.csv: images with several labels each" in found.markdown()
    assert "cbam, seed 2: damaged (log.csv: epoch 0 has no finite top1 and val_loss)" in found.markdown()
    assert "se, seed 4: not begun" in found.html()
    rows = {row.arm.name: row.found for row in found.studies[0].against_plain}
    assert rows["cbam"] is not None
    assert rows["cbam"].seeds == 3


def test_runs_of_finetune_are_reported_too(tmp_path: Path) -> None:
    """Single runs below a folder become arms by their recipe; a folder with neither is refused."""
    sweep = written(tmp_path / "a", {"plain": NOISY["plain"], "se": NOISY["se"]})
    (sweep / "sweep.json").unlink()
    found = figures(report([sweep]).studies[0].study)
    assert {name: len(arm.finished()) for name, arm in found.study.arms.items()} == {"plain": 5, "se": 5}
    assert len(against_plain(found).rows) == 1
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match="holds no sweep"):
        report([tmp_path / "empty"])
    (sweep / "sweep.json").write_text("{", encoding="utf-8")
    with pytest.raises(RunError, match="missing or damaged"):
        report([sweep])


def test_page_stands_alone(noisy: Report, tmp_path: Path) -> None:
    """Nothing is fetched or executed, names are escaped, all charts are there, and the files are whole."""
    page = noisy.html()
    assert not re.search(r"<script|<link|src=|@import|url\(|https?:", page)
    assert page.count('<svg viewBox="0 0 360') == 5
    assert "prefers-color-scheme: dark" in page
    assert "width=device-width" in page
    assert "Movement of the gates" in page
    assert "nan" not in page
    files = noisy.write(tmp_path / "out")
    assert [file.name for file in files] == ["report.html", "report.md", "report.csv"]
    assert files[0].read_text(encoding="utf-8") == page
    odd = written(tmp_path / "odd", {"plain": [0.8, 0.9], "<b>&": [0.7, 0.9]})
    assert "<b>" not in report([odd]).html()
    assert "&lt;b&gt;&amp;" in report([odd]).html()


def test_statistics_by_hand() -> None:
    """Paired t, Holm, power and the seeds that it takes, against values from formulas and tables."""
    found = paired([1.0, 2.0, 3.0, 6.0])
    reach = stats.t.ppf(0.975, 3) * stdev([1.0, 2.0, 3.0, 6.0]) / 2
    assert found.interval == pytest.approx((3 - reach, 3 + reach))
    assert found.bootstrap is not None
    assert 1 <= found.bootstrap[0] < 3 < found.bootstrap[1] <= 6
    assert found == paired([1.0, 2.0, 3.0, 6.0])
    assert paired([0.5]).p is None
    assert paired([0.5, 0.5, 0.5]).p == 0.25
    assert paired([0.0, 0.0]).p == 1.0
    assert holm([0.01, 0.04, None, 0.03]) == pytest.approx([0.03, 0.06, None, 0.06])
    for n, shift in ((3, 3.0), (10, 1.0), (30, 0.5)):
        critical, lambda_ = stats.t.ppf(0.975, n - 1), shift * math.sqrt(n)
        exact = stats.nct.sf(critical, n - 1, lambda_) + stats.nct.cdf(-critical, n - 1, lambda_)
        assert power(shift, 1.0, n) == pytest.approx(exact, abs=1e-3)
        least = least_difference(2.0, n)
        assert power(least, 2.0, n) == pytest.approx(0.8, abs=1e-6)
    needed = seeds_needed(1.0, 1.5)
    assert needed is not None
    assert power(1.0, 1.5, needed) >= 0.8 > power(1.0, 1.5, needed - 1)
    assert seeds_needed(0.0, 1.0) is None
