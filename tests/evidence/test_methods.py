"""Each method against its formula on explicit gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attninject as ai
from attninject.evidence.methods import FORMULAS, METHODS, PAPERS_PLACES, Candidate, Setting
from attninject.evidence.score_test import influence

G = torch.randn(12, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def candidate(number: int = 0, **changes: Any) -> Candidate:
    """The site after `0` of a convolution, with the gradients G."""
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), torch.nn.ReLU())
    (site,) = ai.plan(model, block="se", after="0", example_inputs=torch.zeros(2, 3, 7, 9)).sites
    return Candidate(site, number, G @ G.T, influence(G @ G.T))


def scored(method: str, number: int = 0) -> float:
    setting = Setting(1.0, 4, 3, 5, frozenset({2}))
    (value,) = METHODS[method](candidate(number), setting, torch.ones(1, 12, dtype=torch.float64)).tolist()
    return value


def test_gradient_norm() -> None:
    """GradMax: the norm of the mean gradient."""
    assert scored("gradient_norm") == pytest.approx(float(G.mean(0).norm()))


def test_squared_gradients() -> None:
    """SPT: the mean over batches of the squared mean gradient."""
    wanted = torch.stack([b.mean(0).square().sum() for b in G.split(4)]).mean()
    assert scored("squared_gradients") == pytest.approx(float(wanted))


def test_natural_gradient() -> None:
    """SENN: ḡᵀ(F + λ)⁻¹ḡ with the exact F; λ is the mean eigenvalue of K over n."""
    lam = float((G @ G.T).diagonal().mean()) / 12
    fisher = G.T @ G / 12 + lam * torch.eye(3)
    assert scored("natural_gradient") == pytest.approx(float(G.mean(0) @ fisher.inverse() @ G.mean(0)))


def test_gradient_rank() -> None:
    """(Σ σ²)² / Σ σ⁴ of the gradients' singular values."""
    squares = torch.linalg.svdvals(G) ** 2
    assert scored("gradient_rank") == pytest.approx(float(squares.sum() ** 2 / (squares**2).sum()))


def test_halves_agree_where_all_gradients_are_equal() -> None:
    """The cosine of two halves is 1 for equal gradients, and between −1 and 1 for others."""
    one = candidate()
    equal = Candidate(one.site, 0, torch.ones(12, 12, dtype=torch.float64), one.influence)
    setting = Setting(1.0, 4, 3, 5, frozenset())
    ones = torch.ones(1, 12, dtype=torch.float64)
    assert METHODS["halves"](equal, setting, ones).item() == pytest.approx(1)
    assert -1 < scored("halves") < 1


def test_baselines_look_at_no_gradient() -> None:
    """Depth, parameters, the map's size, the paper's places and chance, counted by hand."""
    assert scored("depth", 2) == 0.5
    assert scored("parameters") == 16 * 1 + 1 + 16 + 16
    assert scored("largest_map") == 16 * 5 * 7
    assert [scored("papers_places", n) for n in (1, 2)] == [0, 1]
    assert len({scored("random", n) for n in range(5)}) == 5


def test_every_method_scores_every_resample() -> None:
    """A score per row of weights, finite, whatever the method."""
    weights = torch.zeros(3, 12, dtype=torch.float64).random_(
        0, 3, generator=torch.Generator().manual_seed(1)
    )
    for name, method in METHODS.items():
        found = method(candidate(), Setting(1.0, 4, 3, 5, frozenset()), weights)
        assert found.shape == (3,), name
        assert found.isfinite().all(), name
        assert FORMULAS[name]


def test_places_on_record_exist() -> None:
    """The papers' places are places of ours, of blocks of ours."""
    assert set(PAPERS_PLACES) <= set(ai.list_blocks())
    assert set(PAPERS_PLACES.values()) <= set(ai.list_places())
