"""Which epoch is the best, and where a run ends before its last epoch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import DATA, QUICK, hears, net

from attninject import errors
from attninject.evidence.sweep_runs import outcome
from attninject.training import finetune, runs
from attninject.training.experiment import read_experiment
from attninject.training.monitors import MONITORS, monitor_of

EARLY: dict[str, Any] = {**QUICK, "epochs": 9, "patience": 2, "min_delta": 0.3, "save_every": 2, "ema": 0.9}


def test_patience_is_counted_from_what_was_better_by_enough() -> None:
    """Worked by hand: small gains add up, equal is not better, of a loss less is better, no number is worst."""
    top1, loss = MONITORS["top1"], MONITORS["val_loss"]
    rows = [{"top1": v, "val_loss": 1 - v} for v in (0.1, 0.5, 0.55, 0.5, 0.65, 0.6)]
    assert [top1.waited(rows[:n]) for n in range(1, 7)] == [0, 0, 0, 1, 0, 1]
    assert [top1.waited(rows[:n], 0.1) for n in range(1, 7)] == [0, 0, 1, 2, 0, 1]
    assert [loss.waited(rows[:n]) for n in range(1, 7)] == [0, 0, 0, 1, 0, 1]
    broken = [{"val_loss": v} for v in (float("nan"), 0.5, float("nan"), 0.4)]
    assert [loss.waited(broken[:n]) for n in range(1, 5)] == [0, 0, 1, 0]
    assert max(broken, key=loss.worth)["val_loss"] == 0.4
    assert monitor_of(None, many=False) is top1
    assert monitor_of(None, many=True) is MONITORS["map"]


def test_a_run_ends_when_its_patience_does() -> None:
    """Two epochs without a gain of 0.3 end it, which it says; without patience it goes on."""
    lines: list[str] = []
    result = finetune(net(), DATA, **EARLY, **hears(lines.append))
    top1 = [row["top1"] for row in result.history]
    assert 3 <= len(top1) < 10
    assert max(top1[-2:]) <= max(top1[:-2]) + 0.3
    best = result.best
    said = f"no better in 2 epochs than top-1 {best['top1']:.2%} at epoch {best['epoch']}: the run ends early"
    assert lines[-1] == said
    whole = finetune(net(), DATA, **{**EARLY, "patience": None, "min_delta": 0.0})
    assert whole.history[-1]["epoch"] == 9
    assert [row["top1"] for row in whole.history][: len(top1)] == top1


@pytest.mark.parametrize("left", [70, 130])
def test_cut_off_and_resumed_it_ends_at_the_same_epoch_with_the_same_bits(left: int, tmp_path: Path) -> None:
    """Weights, average and log of a run that was cut off are those of one in one go; once ended, it stays ended."""
    from test_interruption import Stops, same

    straight, model, again = net(), net(), net()
    whole = finetune(straight, DATA, **EARLY)
    with pytest.raises(KeyboardInterrupt):
        finetune(net(), (Stops(48, left), DATA[1]), **EARLY, out=tmp_path / "a")
    found = finetune(model, DATA, **EARLY, out=tmp_path / "a", resume=True)
    assert len(found.history) == len(whole.history) < 10
    assert same(model, straight)
    assert same(found.model, whole.model)
    kept = (tmp_path / "a" / runs.CHECKPOINT).read_bytes()
    assert finetune(again, DATA, **EARLY, out=tmp_path / "a", resume=True).history == found.history
    assert (tmp_path / "a" / runs.CHECKPOINT).read_bytes() == kept
    patient = {**EARLY, "patience": 3}
    assert len(finetune(net(), DATA, **patient, out=tmp_path / "a", resume=True).history) > len(found.history)


def test_the_best_is_the_monitors(tmp_path: Path) -> None:
    """By the loss another epoch may be the best than by top-1; the file that ships is of that epoch."""
    given = {**QUICK, "epochs": 4}
    by_loss, by_top1 = (
        finetune(net(), DATA, **given, monitor=m, out=tmp_path / str(m)) for m in ("val_loss", None)
    )
    losses, shares = ([row[key] for row in by_loss.history] for key in ("val_loss", "top1"))
    assert by_loss.best["epoch"] == losses.index(min(losses))
    assert by_top1.best["epoch"] == shares.index(max(shares))
    assert by_loss.best["epoch"] != by_top1.best["epoch"], (losses, shares)
    files = [load_file(tmp_path / name / runs.BEST) for name in ("val_loss", "None")]
    assert any(not torch.equal(tensor, files[1][key]) for key, tensor in files[0].items())
    with pytest.raises(
        errors.ExperimentError, match="one class each have val_loss, top1, top5, macro_f1, not map"
    ):
        finetune(net(), DATA, **QUICK, monitor="map")
    with pytest.raises(errors.ExperimentError, match="`min_delta` counts for `patience`"):
        finetune(net(), DATA, **QUICK, min_delta=0.1)


def test_a_run_that_ended_early_is_finished_for_a_sweep(tmp_path: Path) -> None:
    """Its status does not depend on the epochs that were left."""
    import json

    from attninject.training import run_experiment

    given = {"model": "timm/test_convnext", "out": str(tmp_path / "a"), "data": {"kind": "random", "images": 20,
             "size": 32}, "train": {"epochs": 5, "batch_size": 8, "patience": 1, "min_delta": 0.9}}  # fmt: skip
    experiment = read_experiment(None, json.loads(json.dumps(given)))
    assert len(run_experiment(experiment).history) == 2
    assert outcome(tmp_path / "a", experiment).status == "finished"
    for name in (runs.CHECKPOINT, runs.PREVIOUS):
        (tmp_path / "a" / name).unlink()
    assert outcome(tmp_path / "a", experiment).status == "finished"
