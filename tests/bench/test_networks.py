"""The benchmark of whole networks: that it compares the same networks. No figure is asserted."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch

from attninject import api
from attninject.bench import networks
from attninject.bench.networks import BARE, NETWORKS, OURS, THEIRS
from attninject.cli import main

BLOCKS = {"resnet50 + SE": 16, "resnet50 + CBAM": 16, "resnet50 + 5 Non-Local": 5, "convnext_tiny + GC": 18}
TINY = {"only": ["resnet50 + 5 Non-Local"], "batch": 2, "image": 32, "rounds": 1, "seconds": 0.0}


@pytest.mark.parametrize("name", NETWORKS)
def test_timms_network_is_ours(name: str) -> None:
    """The same logits from the same weights, with as many blocks as said, which change the backbone's logits."""
    nets = networks.contenders(NETWORKS[name])
    assert len(api.injected(nets[OURS])) == BLOCKS[name]
    assert networks.distance(nets[OURS], nets[THEIRS], 32) < 1e-4
    assert networks.distance(nets[OURS], nets[BARE], 32) > 1e-3
    counts = [sum(p.numel() for p in nets[which].parameters()) for which in (OURS, THEIRS, BARE)]
    assert counts[0] == counts[1] > counts[2]


def test_a_network_that_differs_is_refused() -> None:
    """A slip in one of timm's sixteen blocks: no ratio to another function."""
    wrong = dataclasses.replace(NETWORKS["resnet50 + SE"], theirs=lambda: perturbed())
    data = networks.Data(2, 32, "NCHW", "float32", "cpu")
    with pytest.raises(AssertionError, match="computes something else than ours"):
        networks.measured(wrong, data, rounds=1)


def perturbed() -> torch.nn.Module:
    model = NETWORKS["resnet50 + SE"].theirs()
    model.layer3[0].se.fc2.register_forward_hook(lambda m, args, out: out + 3)
    return model


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    """A run on two small images."""
    return networks.networks(**TINY)


def test_small_run_has_every_figure(result: dict[str, Any]) -> None:
    """Times, ratios and peaks of the three networks, JSON-ready and in the tables."""
    json.dumps(result)
    (row,) = result["rows"]
    assert list(row["seconds"]) == list(row["peak"]) == [OURS, THEIRS, BARE]
    assert row["blocks"] == 5
    assert row["peak"][OURS] > row["peak"][BARE] > 2**20
    text = networks.to_markdown(result, details=True)
    assert "on 2 images of 32×32" in text
    assert "| resnet50 + 5 Non-Local | 5 | its slot of five blocks |" in text
    assert "| resnet50 + 5 Non-Local | bare |" in text


def test_prices_are_over_the_backbone() -> None:
    """Time and memory of both beside the backbone's, as percentages."""

    def same(value: float) -> dict[str, float]:
        return {"median": value, "q1": value, "q3": value}

    row: dict[str, Any] = {
        "network": "net + SE", "format": "NCHW", "dtype": "float32", "blocks": 16, "how": "attn_layer",
        "seconds": {OURS: same(1.1), THEIRS: same(1.2), BARE: same(1.0)},
        "over_theirs": {OURS: same(1.1 / 1.2), BARE: same(1 / 1.2)},
        "over_bare": {OURS: same(1.1), THEIRS: same(1.2)},
        "peak": {OURS: 150, THEIRS: 200, BARE: 100},
    }  # fmt: skip
    assert (
        "| net + SE | 16 | attn_layer | 0.917 [0.917, 0.917] | 0.750 | +10 % | +50 % | +20 % | +100 % |"
        in networks._ratios([row])
    )


def test_the_command(
    result: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Options reach the run; Markdown by default, --json the data."""
    asked: dict[str, Any] = {}
    monkeypatch.setattr(networks, "networks", lambda **given: asked.update(given) or result)
    assert main(["bench", "models", "--batch", "3", "--image", "40", "--only", "resnet50 + SE"]) == 0
    assert capsys.readouterr().out == networks.to_markdown(result) + "\n"
    assert (asked["batch"], asked["image"], asked["only"], asked["rounds"]) == (3, 40, ["resnet50 + SE"], 9)
    assert main(["bench", "models", "--json", "--quick"]) == 0
    assert json.loads(capsys.readouterr().out) == result
    assert (asked["batch"], asked["image"], asked["rounds"]) == (2, 64, 3)


@pytest.mark.slow
def test_compiled_blocks_are_measured_when_asked_for() -> None:
    """A row of their own, beside the same peers."""
    result = networks.networks(**TINY, compiled=True)
    assert networks.COMPILED in result["rows"][0]["over_theirs"]
    assert "(compiled blocks)" in networks.to_markdown(result)
