"""The benchmark: that it compares what it says it compares. No figure is asserted."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
import torch
from torch import nn

from attninject import api, models
from attninject.bench import injection
from attninject.cli import main

RESULT: dict[str, Any] = {
    "machine": {"torch": "2.0", "python": "3.11", "rounds": 3},
    "inject": {
        "sites": 16,
        "seconds": {"build": 0.2, "inject": 0.05, "plan": 0.04, "torchvision create_feature_extractor": 0.06},
        "of_build": {"build": 1.0, "inject": 0.25, "plan": 0.2, "torchvision create_feature_extractor": 0.3},
        "fastest_of_build": {
            "build": 1.0,
            "inject": 0.24,
            "plan": 0.2,
            "torchvision create_feature_extractor": 0.3,
        },
        "skipped": ["peft is not installed"],
    },
    "chain": [{"sites": 1000, "seconds": 2.0, "per_site": 0.002, "build": 0.1}],
    "step": {
        "outputs_bit_equal": True,
        "seconds": {"injected": 0.202, "by hand": 0.2},
        "ratio_of_pairs": 1.01,
        "ratio_of_minima": 1.0,
        "saved_for_backward": {"injected": 2**20, "by hand": 2**20},
    },
    "memory": {"bytes": {"injected": 3 * 2**20, "by hand": 3 * 2**20}, "ratio": 1.0},
    "import": {"seconds": 0.05, "with_inject": 0.1},
}


def test_the_network_by_hand_is_the_injected_one() -> None:
    """Same keys, shapes and, with the same weights, the same numbers, after the gates are moved as well."""
    torch.manual_seed(0)
    ours, theirs = injection.injected(), injection.by_hand()
    state = {key: torch.randn_like(t) * 0.05 if ".se." in key else t for key, t in ours.state_dict().items()}
    ours.load_state_dict(state)
    theirs.load_state_dict(state)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(ours.eval()(x), theirs.eval()(x))
    assert len(api.injected(ours)) == 16


def test_both_networks_save_the_same_for_backward() -> None:
    """The exact count of saved bytes does not differ between injection and hand."""
    counts = {name: injection.bytes_saved_for_backward(make()) for name, make in injection.NETWORKS.items()}
    assert counts["injected"] == counts["by hand"] > 2**20


def test_saved_bytes_are_counted_once_and_without_parameters() -> None:
    """A linear layer saves its input; its weight is not counted, nor is a tensor counted twice."""

    class Square(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x * self.weight
            return y * y

    elements = injection.STEP_BATCH * 3 * injection.STEP_SIZE**2
    assert injection.bytes_saved_for_backward(Square()) == 2 * 4 * elements  # the input and y


def test_counting_leaves_the_model_as_it_was() -> None:
    """Batch norm statistics and the mode are put back."""
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    injection.bytes_saved_for_backward(net)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert not net.training


def test_chain_has_one_block_per_unit() -> None:
    """The deep chain gets exactly as many blocks as it has units."""
    assert injection.time_chain(7)["sites"] == 7


def test_peers_work_on_the_same_sixteen_sites() -> None:
    """PEFT adapts sixteen convolutions, torchvision returns sixteen features."""
    adapt = injection._peft()
    assert adapt is not None
    adapted = adapt(models.build("torchvision/resnet50"))
    assert sum(name.endswith("lora_A.default") for name, _ in adapted.named_modules()) == 16
    extractor = injection._feature_extractor(models.build("torchvision/resnet50").eval())
    assert len(extractor(torch.zeros(1, 3, 32, 32))) == 16


def test_without_peft_it_is_skipped_with_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing peer is said, not an error."""
    monkeypatch.setitem(sys.modules, "peft", None)
    result = injection.time_injection(rounds=1)
    assert result["skipped"] == ["peft is not installed"]
    assert not any("peft" in name for name in result["seconds"])
    assert result["sites"] == 16


def test_peak_memory_comes_from_processes_of_their_own() -> None:
    """Each network's peak growth is positive and covers at least what it saves for backward."""
    found = injection.peak_memory(1)
    assert set(found["bytes"]) == {"injected", "by hand"}
    floor = injection.bytes_saved_for_backward(injection.by_hand())
    assert all(value > floor for value in found["bytes"].values())


def test_markdown_shows_every_figure() -> None:
    """The tables hold times, ratios, memory and what was skipped."""
    text = injection.to_markdown(RESULT)
    for part in (
        "16 SE sites on torchvision resnet50",
        "planning and checks included | 50.0 | 0.25 | 0.24 |",
        "(peft is not installed)",
        "| 1,000 | 2.00 | 2.00 |",
        "| training step, ms | 202.0 | 200.0 | 1.010 |",
        "| peak growth, MiB | 3.0 | 3.0 | 1.000 |",
        "outputs bit-equal: yes",
        "adds 0.050 s to `import torch`; with the first look at `attninject.inject`, 0.100 s",
    ):
        assert part in text


def test_the_command_prints_markdown_or_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`bench inject` prints tables, with --json the same figures as data; options reach the run."""
    asked = {}
    monkeypatch.setattr(injection, "inject", lambda **given: asked.update(given) or RESULT)
    assert main(["bench", "inject", "--rounds", "3", "--sites", "10,20"]) == 0
    assert capsys.readouterr().out == injection.to_markdown(RESULT) + "\n"
    assert asked == {"rounds": 3, "chain": [10, 20]}
    assert main(["bench", "inject", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == RESULT
