"""A run that is only tried: what it would cost, and which learning rate suits it."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import DATA, QUICK, net
from torch import nn

from attninject import errors
from attninject.cli import main
from attninject.training import dry_run, find_lr
from attninject.training.cost import _duration
from attninject.training.rate_test import RateTest, _steepest

MODEL = ["--model", "timm/test_convnext", "--recipe", "se", "--data", "random", "--data-images", "40"]
MODEL += ["--size", "32", "--batch-size", "16"]


def everything(model: nn.Module) -> list[Any]:
    """All that a try must not change: bits, grads, modes, classes, and the generators."""
    state = [t.clone() for t in model.state_dict().values()]
    flags = [(p.requires_grad, p.grad is None) for p in model.parameters()]
    modules = [(name, type(m), m.training) for name, m in model.named_modules()]
    return [
        state,
        flags,
        modules,
        torch.get_rng_state(),
        random.getstate(),
        np.random.get_state()[1].tolist(),
    ]


def unchanged(before: list[Any], model: nn.Module) -> bool:
    """Whether nothing of it has changed."""
    after = everything(model)
    same = all(torch.equal(a, b) for a, b in zip(before[0], after[0], strict=True))
    return same and torch.equal(before[3], after[3]) and before[1:3] == after[1:3] and before[4:] == after[4:]


@pytest.mark.parametrize("tried", [dry_run, find_lr])
def test_model_and_generators_stay(tried: Any) -> None:
    """Weights, statistics of norms, what is frozen, modes, classes, and all three generators, in train mode too."""
    model = net(None).train()
    before = everything(model)
    found = tried(model, DATA, **QUICK, freeze="backbone", ema=0.9, compile=False)
    assert unchanged(before, model)
    json.dumps(found.to_dict())


def test_a_dry_run_counts_what_the_run_would_do() -> None:
    """Steps, images, parameters by hand; memory of weights, gradients and AdamW's two moments; time that adds up."""
    model = net()
    given = {**QUICK, "epochs": 5, "freeze": "backbone", "unfreeze": [{"epoch": 2, "what": "backbone"}]}
    found = dry_run(model, DATA, **given, accumulate=2)
    assert (found.epochs, found.steps, found.images, found.classes) == (5, 3, (48, 18), 3)
    own = [p for n, p in model.named_parameters() if ".se." in n or n.startswith("head")]
    assert found.learning.learning == sum(p.numel() for p in own)
    assert found.memory["gradients"] == 4 * found.learning.learning
    steps = 4 * len(own)  # AdamW counts its steps in a tensor each
    assert found.memory["optimizer"] == 2 * found.memory["gradients"] + steps
    assert found.memory["weights"] == sum(t.nbytes for t in model.state_dict().values())
    assert found.memory["activations"] > 8 * 8 * 8 * 8 * 4  # the first map at least
    assert found.seconds > 5 * found.epoch_seconds > 15 * found.step_seconds > 0
    assert "units.0.se" in found.plan
    assert found.how.endswith("; what is unfrozen later is not in it")
    assert "5 epochs of 3 steps" in str(found)
    more = dry_run(net(), DATA, **{**QUICK, "batch_size": 16})
    assert 1.5 < more.memory["activations"] / found.memory["activations"] < 4


def test_the_rate_test_finds_where_a_loss_falls_and_where_it_explodes() -> None:
    """On a net that learns quickly: rates rise by one factor, the loss falls and then diverges, which ends the test."""
    found = find_lr(net(), DATA, **QUICK, optimizer="sgd")
    assert found.rates[0] == 1e-7
    assert all(
        b / a == pytest.approx(found.rates[1] / 1e-7)
        for a, b in zip(found.rates, found.rates[1:], strict=False)
    )
    assert len(found.rates) == len(found.losses) == len(found.smoothed)
    assert found.suggestion is not None
    assert 1e-4 < found.suggestion < 1
    assert found.ratios["blocks"] == 10
    assert f"try --lr {found.suggestion:.1e}" in str(found)
    again = find_lr(net(), DATA, **QUICK, optimizer="sgd", scheduler="none")  # a schedule has no part in it
    assert again.losses == found.losses


def test_the_suggestion_by_hand() -> None:
    """A curve that is flat, falls by a known slope and rises: the middle of the fall; one that only rises: none."""
    rates = [10.0**-i for i in range(40, 0, -1)]
    curve = [2.0] * 15 + [2.0 - 0.1 * i for i in range(10)] + [1.1 + 0.3 * i for i in range(15)]
    middle = _steepest(rates, curve)
    assert middle is not None
    assert 15 <= rates.index(middle) <= 20
    assert _steepest(rates, sorted(curve)) is None
    bad = RateTest(tuple(rates[:3]), (1.0, 2.0, 3.0), (1.0, 2.0, 3.0), None, {})
    assert "the loss never fell" in str(bad)
    assert [_duration(s) for s in (0.1234, 250, 7500)] == ["0.123 s", "4 min 10 s", "2 h 05 min"]


def test_what_cannot_be_tried() -> None:
    """A model that cannot be copied, a loss that is never finite: in words."""

    class Held(type(net())):  # type: ignore[misc]
        def __deepcopy__(self, memo: Any) -> Any:
            raise NotImplementedError("one of a kind")

    with pytest.raises(errors.RunError, match="the model cannot be copied, to be tried: one of a kind"):
        dry_run(Held(), DATA, **QUICK)
    broken = net()
    with torch.no_grad():
        broken.head.weight.fill_(float("nan"))
    with pytest.raises(errors.RunError, match="the loss has diverged after 0 steps"):
        find_lr(broken, DATA, **QUICK)


def test_the_command_tries(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """--dry-run writes nothing and needs no folder; --find-lr leaves a table, and a run may follow in the folder."""
    monkeypatch.chdir(tmp_path)
    assert main(["finetune", *MODEL, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "| after stages.0.blocks.0.mlp |" in out
    assert "10 classes, 32 training and 8 validation images" in out
    assert list(tmp_path.iterdir()) == []
    argv = ["finetune", *MODEL, "--out", "a"]
    assert main([*argv, "--find-lr", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    rows = list(csv.DictReader((tmp_path / "a" / "find_lr.csv").read_text().splitlines()))
    assert [float(row["lr"]) for row in rows] == said["rates"]
    assert main([*argv, "--epochs", "1"]) == 0
    with pytest.raises(SystemExit) as left:
        main([*argv, "--dry-run", "--find-lr"])
    assert left.value.code == 2
    assert "--resume, --dry-run and --find-lr: give one of them" in capsys.readouterr().err


def test_the_picture(tmp_path: Path) -> None:
    """Where matplotlib is installed, the curve with its suggestion."""
    pytest.importorskip("matplotlib")
    RateTest((1e-3, 1e-2, 1e-1), (2.0, 1.0, 3.0), (2.0, 1.0, 3.0), 1e-2, {}).draw(tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
