"""The measurement behind the default of `attn_lr`, shortened: what its columns are."""

from __future__ import annotations

import pytest
import small
import torch

import attninject as ai
from attninject.evidence import gate_rates
from attninject.evidence.gate_rates import Cell
from attninject.evidence.samples import Samples


def shades(seed: int, size: int, images: int) -> tuple[Samples, Samples]:
    """Noise whose class is its brightest channel."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for count in (images, 30):
        labels = torch.arange(count) % 3
        x = torch.randn(count, 3, 8, 8, generator=generator)
        x[torch.arange(count), labels] += 1
        made.append(Samples(x, labels))
    return made[0], made[1]


def test_a_row_has_movement_and_worth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gates move more at the larger rate; worth is top-1 less top-1 with the blocks off; plain has one row."""
    monkeypatch.setitem(gate_rates.NETS, "ours", lambda: small.Net(8, 10))
    monkeypatch.setitem(gate_rates.TASKS, "digits", shades)
    inject = ai.inject
    monkeypatch.setattr(gate_rates.api, "inject", lambda model, block, place: inject(
        model, block=block, after="units.*.norm", args={"reduction": 4}, example_inputs=torch.zeros(2, 3, 8, 8)
    ))  # fmt: skip
    cells = [Cell(block=None, images=32, epochs=1, freeze=None), Cell(images=32, epochs=1, freeze=None)]
    plain, slow, fast = gate_rates.table(cells, (1.0, 100.0), seeds=1)
    assert (plain["moved"], plain["worth"]) == (0.0, 0.0)
    assert 0 < slow["moved"] < fast["moved"]
    assert (slow["ratio"], fast["ratio"], fast["seeds"]) == (1.0, 100.0, 1)
    assert -1 <= fast["worth"] <= 1
