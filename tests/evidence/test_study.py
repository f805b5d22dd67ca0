"""The study of rank_sites: a miniature of it end to end, its files, its statistics, and the page that is committed."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

import attninject as ai
from attninject.evidence.samples import Samples
from attninject.evidence.study import (
    choosing,
    kendall,
    nets,
    report,
    results,
    running,
    scoring,
    tables,
    training,
)
from attninject.evidence.study.design import Group, Run
from attninject.evidence.study.store import COLUMNS, Store

# --- statistics --------------------------------------------------------------------------------


def test_tau_is_scipys() -> None:
    """τ-b with and without ties; nan where one side is constant."""
    generator = np.random.default_rng(0)
    for _ in range(20):
        x, y = generator.integers(0, 5, 9), generator.normal(size=9)
        assert kendall.tau(x, y) == pytest.approx(stats.kendalltau(x, y).statistic)
    assert np.isnan(kendall.tau([1, 1, 1], [1, 2, 3]))


def test_partial_tau_is_the_recursion() -> None:
    """One control: Kendall's formula by hand; two: the same formula on three partial ones; doubles change nothing."""
    generator = np.random.default_rng(1)
    x, y, z, w = (generator.normal(size=12).tolist() for _ in range(4))

    def given(a: float, b: float, c: float) -> float:
        return (a - b * c) / ((1 - b * b) * (1 - c * c)) ** 0.5

    one = given(kendall.tau(x, y), kendall.tau(x, z), kendall.tau(y, z))
    assert kendall.partial_tau(x, y, [z]) == pytest.approx(one)
    two = given(one, kendall.partial_tau(x, w, [z]), kendall.partial_tau(y, w, [z]))
    assert kendall.partial_tau(x, y, [z, w]) == pytest.approx(two)
    assert kendall.partial_tau(x, y, [z, [3 * v for v in z], [1.0] * 12]) == pytest.approx(one)
    assert np.isnan(kendall.partial_tau(x, z, [z]))


def test_the_ceiling_falls_with_noise() -> None:
    """Gains that repeat agree with themselves wholly, noise about not at all."""
    generator = np.random.default_rng(2)
    signal = np.arange(12.0)[None].repeat(5, 0)
    noise = generator.normal(size=(5, 12))
    assert kendall.ceiling(signal) == 1
    assert kendall.ceiling(signal + 3 * noise) < 1
    assert abs(kendall.ceiling(noise)) < 0.4


def test_the_bootstrap_keeps_a_seeds_gains_and_scores_together() -> None:
    """Scores that are each seed's own gains have τ 1 in every resample, though the seeds disagree."""
    gains = np.random.default_rng(3).normal(size=(5, 8))
    assert kendall.bootstrapped(gains, gains, kendall.tau, draws=50) == (1, 1)


# --- choices -----------------------------------------------------------------------------------

SITES = choosing.Sites((10, 20, 40, 10, 80), (1, 2, 4, 1, 8), (9, 9, 4, 4, 1), (1, 3))


def test_choices_stay_within_the_budget() -> None:
    """A quarter of 160 parameters: what does not fit is passed over, in every order; `all` and the paper are free."""
    assert SITES.budget == 40
    found = choosing.without_images(SITES, seed=0)
    assert (found["first"], found["last"], found["parameters"]) == ((0, 1, 3), (0, 1, 3), (2,))
    assert found["papers_places"] == (1, 3)
    assert found["all"] == (0, 1, 2, 3, 4)
    draws = [found[f"random_{i}"] for i in range(4)]
    assert all(sum(SITES.parameters[i] for i in draw) <= 40 for draw in draws)
    assert found == choosing.without_images(SITES, seed=0)


def test_choices_by_score_take_the_order_of_forward_selection() -> None:
    """`score` goes by `order`, `bottom` by its reverse, the others by their own column."""
    rows = [
        {
            "order": str(o),
            "gradient_norm": str(g),
            "squared_gradients": "0",
            "gradient_rank": "0",
            "score": "0",
        }
        for o, g in zip((4, 3, 0, 2, 1), (0.1, 0.2, 0.3, 0.4, 0.0), strict=True)
    ]
    found = choosing.by_scores(SITES, rows, ("score", "gradient_norm"))
    assert found == {"score": (2,), "bottom": (0, 1, 3), "gradient_norm": (0, 1, 3)}


def test_halving_by_hand() -> None:
    """Of five sites three live on, then two, who are ordered by the whole training; the others by their last rung."""
    first = {0: -1.0, 1: -5.0, 2: -2.0, 3: -3.0, 4: -4.0}
    second = {0: -3.0, 2: -1.0, 3: -2.0}
    rungs = [{"site": str(s), "epochs": "1", "rung": str(v)} for s, v in first.items()]
    rungs += [{"site": str(s), "epochs": "2", "rung": str(v)} for s, v in second.items()]
    assert choosing.halved(rungs, [0.0, 9.0, 1.0, 2.0, 9.0]) == [3, 2, 0, 4, 1]
    assert choosing.halvable(rungs, 5)
    assert not choosing.halvable(rungs[:-1], 5)  # cut off


def test_the_rate_is_tuned_on_validation_images() -> None:
    """The least mean loss; a rate whose loss is no number is never taken."""
    rows = [
        {"sites": "all", "lr": lr, "seed": str(s), "val_loss": v}
        for lr, v in (("0.001", "0.9"), ("0.003", "0.8"), ("0.01", "nan"))
        for s in (0, 1)
    ]
    assert choosing.tuned([*rows, {"sites": "0", "lr": "0.001", "seed": "0", "val_loss": "0.1"}]) == 0.003
    assert choosing.tuned([]) is None


# --- files -------------------------------------------------------------------------------------


def test_a_line_that_was_cut_off_is_not_read_and_goes_with_the_next(tmp_path: Path) -> None:
    """A killed process leaves half a line: it is no row, and the next rows begin on a line of their own."""
    store = Store(tmp_path)
    row = dict.fromkeys(COLUMNS["null"], "x")
    store.add("null", [row])
    file = tmp_path / "null.csv"
    file.write_text(file.read_text() + "x,x,x")
    assert store.read("null") == [row]
    store.add("null", [row])
    assert store.read("null") == [row, row]
    assert file.read_text().count("\n") == 3


def test_a_group_stands_in_its_rows_as_a_number(tmp_path: Path) -> None:
    """Read back as task, net, block and regime; a group that is known keeps its number."""
    store = Store(tmp_path)
    rows = [{**dict.fromkeys(COLUMNS["null"], "x"), "task": task} for task in ("a", "b", "a")]
    for row in rows:
        store.add("null", [row])
    assert store.read("null") == rows
    assert (tmp_path / "null.csv").read_text().splitlines() == ["group,seed,ps", "0,x,x", "1,x,x", "0,x,x"]


def test_a_file_of_another_form_is_refused(tmp_path: Path) -> None:
    """Its rows have another number of cells, would pass for cut off lines, and all would be trained again."""
    (tmp_path / "null.csv").write_text("task,net,block,regime,seed,ps\nx,x,x,x,x,x\n")
    with pytest.raises(
        ValueError, match=r"null\.csv has columns .'task'.* where .'group'.* name another folder"
    ):
        Store(tmp_path).read("null")


def test_columns_of_test_images_are_read_on_demand_alone(tmp_path: Path) -> None:
    """Without `test=True` a row has no test loss."""
    store = Store(tmp_path)
    store.add("runs", [dict.fromkeys(COLUMNS["runs"], 1.0)])
    assert "test_loss" not in store.read("runs")[0]
    assert store.read("runs", test=True)[0]["test_loss"] == "1"


# --- a miniature -------------------------------------------------------------------------------


class Unit(nn.Module):
    """One convolution and a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x).relu()


class Small(nn.Module):
    """Four units, named as EfficientNet names its parts."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_stem, self.bn1 = nn.Conv2d(3, 4, 3, padding=1), nn.ReLU()
        self.blocks = nn.Sequential(nn.Sequential(Unit(), Unit()), nn.Sequential(Unit(), Unit()))
        self.conv_head, self.bn2 = nn.Conv2d(4, 6, 1), nn.ReLU()
        self.classifier = nn.Linear(6, 3)

    def get_classifier(self) -> nn.Module:
        return self.classifier

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        features = x.mean((2, 3))
        return features if pre_logits else self.classifier(features)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.bn2(self.conv_head(self.blocks(self.bn1(self.conv_stem(x))))))


def small(*_: Any) -> nn.Module:
    torch.manual_seed(0)
    return Small().eval().requires_grad_(False)


def noise(task: str, seed: int, mean: Sequence[float], std: Sequence[float]) -> dict[str, Samples]:
    """Three classes that differ in the contrast of their noise."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, count in (("train", 32), ("val", 12), ("test", 12)):
        labels = torch.arange(count) % 3
        images = torch.randn(count, 3, 8, 8, generator=generator) * (1 + labels.view(-1, 1, 1, 1))
        found[name] = Samples(images, labels)
    return found


STAGES = (
    ("rank", "lite0", "se", "frozen", ("a",)),
    ("rungs", "lite0", "se", "frozen", ("a",)),
    ("choose", "lite0", "se", "frozen", ("a",)),
    ("null", "lite0", "se", "frozen", ("a",)),
    ("explore", "lite0", "se", "frozen", ("a",)),
    ("bottleneck", "lite0", "se", "frozen", ("a",)),
)


@pytest.fixture
def miniature(monkeypatch: pytest.MonkeyPatch) -> None:
    """The study on one task of noise: a net of four units, two seeds, one rate, one epoch."""
    monkeypatch.setattr(nets, "bare", small)
    monkeypatch.setattr(nets, "normalisation", lambda model: ((0.0,) * 3, (1.0,) * 3))
    monkeypatch.setattr(running, "parts_of", noise)
    monkeypatch.setattr(running, "CANDIDATES", {"lite0": {"after": "blocks.*.*"}})
    monkeypatch.setattr(running, "PERMUTATIONS", 1)
    monkeypatch.setattr(report, "PERMUTATIONS", 1)
    monkeypatch.setattr(training, "EPOCHS", 1)
    for module in (running, choosing):
        monkeypatch.setattr(module, "ATTN_LRS", (0.01,))
    for module in (report, results, tables):
        monkeypatch.setattr(module, "SEEDS", (0, 1))
    for module in (running, results, report):
        monkeypatch.setattr(module, "STAGES", STAGES)


@pytest.mark.usefixtures("miniature")
def test_a_miniature_study_is_finished_once_and_reported_the_same_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All stages; a second run adds no line; a run that lost its last lines trains these alone; the page is stable.

    Were its task a new one, what was chosen elsewhere would be judged on it.
    """
    store = Store(tmp_path)
    running.Study(store, minutes=5, seeds=(0, 1)).go()
    files = {p.name: p.read_text() for p in tmp_path.iterdir()}
    assert set(files) == {
        "runs.csv",
        "scores.csv",
        "trained.csv",
        "sites.csv",
        "null.csv",
        "kept.csv",
        "rungs.csv",
        "curvature.csv",
        "groups.csv",
    }
    page = report.written(store)
    assert "Nothing: all stages of the design are finished." in page
    running.Study(store, minutes=5, seeds=(0, 1)).go()
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == files
    lines = files["runs.csv"].splitlines(keepends=True)
    (tmp_path / "runs.csv").write_text("".join(lines[:-3]) + lines[-3][:9])
    running.Study(store, minutes=5, seeds=(0, 1)).go()
    again = (tmp_path / "runs.csv").read_text().splitlines()
    assert [_but_time(a) for a in again] == [_but_time(line.strip()) for line in lines]
    assert report.written(store).split("## What it costs")[0] == page.split("## What it costs")[0]
    assert "Not finished." in page.split("## What was chosen, on tasks")[1].split("## Controls")[0]
    monkeypatch.setattr(tables, "NEW_TASKS", ("a",))
    judged = report.written(store).split("## What was chosen, on tasks")[1].split("## Controls")[0]
    assert judged.count("| rung |") == 2
    assert "best of k" in judged


def _but_time(line: str) -> list[str]:
    """Cells of a line of runs, without the seconds: third from the end, before those of test images."""
    cells = line.split(",")
    return cells[:-3] + cells[-2:]


@pytest.mark.usefixtures("miniature")
def test_a_study_without_time_is_reported_as_cut_off(tmp_path: Path) -> None:
    """No training begins after the time; the page names every stage that is missing."""
    store = Store(tmp_path)
    with pytest.raises(running.OutOfTime):
        running.Study(store, minutes=-1).go()
    page = report.written(store)
    assert [line for line in page.splitlines() if line.startswith("- rank, ")] == [
        "- rank, lite0, se, frozen: a"
    ]


@pytest.mark.usefixtures("miniature")
def test_runs_trained_together_are_the_runs_trained_apart() -> None:
    """What stands beside a run in its batch, and where the batch begins, change it by rounding alone."""
    chain = nets.Chain(small(), block="se", after="blocks.*.*")
    of = [training.seeded(chain, noise("a", s, (), ()), s) for s in (0, 1)]
    runs = [Run(0, (2,), 0.01), Run(1, (0, 3), 0.01)]
    both = training.trained(chain, runs, of)
    for run, one, together in zip(runs, of, both, strict=True):
        (alone,) = training.trained(chain, [run], [one])
        assert alone.loss == pytest.approx(together.loss, rel=1e-4)
        assert alone.moved == pytest.approx(together.moved, rel=1e-3)
        assert alone.moved > 0


@pytest.mark.usefixtures("miniature")
def test_the_backbone_learns_where_all_learns() -> None:
    """In a copy: with the same seed the run differs from the frozen one, and the chain is as before."""
    chain = nets.Chain(small(), block="se", after="blocks.*.*")
    of = [training.seeded(chain, noise("a", 0, (), ()), 0)]
    before = copy.deepcopy(chain.net.state_dict())
    (frozen,) = training.trained(chain, [Run(0, (1,), 0.01)], of)
    (whole,) = training.trained(chain, [Run(0, (1,), 0.01)], of, training.Whole)
    assert whole.loss != frozen.loss
    backbone = {k: v for k, v in chain.net.state_dict().items() if k in before}
    assert all(torch.equal(v, before[k]) for k, v in backbone.items())


@pytest.mark.usefixtures("miniature")
def test_a_chain_with_blocks_is_the_injected_model() -> None:
    """From the images or from what a unit is given; and with empty slots it is the model that was given."""
    model = small()
    chain = nets.Chain(model, block="se", after="blocks.*.*")
    images = torch.randn(4, 3, 8, 8)
    inputs = chain.inputs(images)
    torch.testing.assert_close(model.classifier(chain.leave(inputs[-1])), model(images))
    torch.testing.assert_close(model.classifier(chain.features(inputs[2], 2)), model(images))
    blocks = chain.blocks(seed=1)
    for p in (p for b in blocks for p in b.parameters()):
        nn.init.normal_(p, std=0.3)
    twin = ai.inject(copy.deepcopy(model), chain.plan.recipe, example_inputs=images)
    for site, block in zip(chain.plan.sites, blocks, strict=True):
        ai.injected(twin)[site.name].load_state_dict(block.state_dict())
    for slot, block in zip(chain.slots, blocks, strict=True):
        slot.blocks = [block]
    found = model.classifier(chain.features(inputs[0], 0))
    assert not torch.allclose(found, model(images), atol=1e-3)
    torch.testing.assert_close(found, twin(images))


@pytest.mark.usefixtures("miniature")
def test_curvature_is_that_of_the_loss() -> None:
    """The drop by differences is slope² / (2 · curvature) by autograd, twice, in float64."""
    chain = nets.Chain(small(), block="se", after="blocks.*.*")
    of = [training.seeded(chain, noise("a", s, (), ()), s) for s in (0, 1)]
    found = list(scoring.curvature(chain, [Run(s, (1,), 0.01) for s in (0, 1)], of))
    for row, one in zip(found, of, strict=True):
        together = training.Together(chain, [Run(0, (1,), 0.01)], [one])
        block = together.blocks[0][1].eval()
        zeros = [p for p in block.parameters() if not p.any()]
        images = torch.arange(32)
        loss = torch.nn.functional.cross_entropy(
            together.logits("train", [images])[0], one.parts["train"].labels
        )
        g = torch.autograd.grad(loss, zeros, create_graph=True)
        slope = sum(v.square().sum() for v in g)
        hg = torch.autograd.grad(slope, zeros)
        bend = sum((a * b).sum() for a, b in zip(g, hg, strict=True)) / 2
        assert bend > 0
        assert row["curvature"] == pytest.approx((slope**2 / (2 * bend)).item(), rel=0.05)


def test_norms_are_folded_into_the_convolutions_before_them() -> None:
    """The same function, and no batch norm left."""
    timm = pytest.importorskip("timm")
    model = timm.create_model("tf_efficientnet_lite0", num_classes=3).eval()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.running_mean, std=0.1)
            nn.init.uniform_(m.weight, 0.5, 1.5)
    x = torch.randn(2, 3, 32, 32)
    before = model(x)
    nets.fold_norms(model)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    torch.testing.assert_close(model(x), before, rtol=1e-3, atol=1e-4)


@pytest.mark.usefixtures("miniature")
def test_scores_come_from_one_measurement() -> None:
    """A row per site with every method, the same as `rank_sites` gives it."""
    chain = nets.Chain(small(), block="se", after="blocks.*.*")
    train = noise("a", 0, (), ())["train"]
    rows = scoring.scored(chain, train, seed=4)
    ranking = ai.rank_sites(
        small(), data=(train.images, train.labels), images=32, batch_size=16, head="fit", seed=4, block="se",
        after="blocks.*.*",
    )  # fmt: skip
    assert [r["site"] for r in rows] == [0, 1, 2, 3]
    assert [r["score"] for r in rows] == [s.score for s in sorted(ranking.sites, key=lambda s: s.number)]
    assert sorted(range(4), key=lambda i: rows[i]["order"]) == [
        ranking.sites[i].number for i in ranking.order
    ]


# --- what is committed -------------------------------------------------------------------------


def test_the_page_is_what_the_files_say() -> None:
    """`RESULTS.md` is the report of the committed files."""
    assert report.FILE.read_text() == report.written(Store())


def test_the_files_are_small() -> None:
    """Results stay below 700 kB."""
    assert sum(p.stat().st_size for p in Store().folder.glob("*.csv")) < 700_000


def test_a_group_is_read_back() -> None:
    """Every committed group has its tuned rate, and no gain that is no number."""
    for group, one in results.read(Store()).items():
        assert isinstance(group, Group)
        assert not np.isnan(one.gains()).any()
