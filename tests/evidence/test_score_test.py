"""The score test on kernels that can be counted by hand or by trying every sign."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from attninject.evidence import head, score_test
from attninject.evidence.statistics import holm


def gram(n: int, p: int, seed: int = 0, common: float = 0.0) -> Tensor:
    """K of n random gradients in p dimensions, with a common part."""
    generator = torch.Generator().manual_seed(seed)
    g = torch.randn(n, p, generator=generator, dtype=torch.float64) + common
    return g @ g.T


def every_sign(n: int) -> Tensor:
    return torch.tensor(list(itertools.product((-1.0, 1.0), repeat=n)), dtype=torch.float64)


def ones(n: int) -> Tensor:
    return torch.ones(1, n, dtype=torch.float64)


def test_moments_are_those_over_all_signs() -> None:
    """Over all 2⁸ signs, z has mean 0 and variance 1 exactly, and LM has mean tr A."""
    a = score_test.influence(gram(8, 3))
    signs = every_sign(8)
    z = score_test.z_scores(a, signs)
    assert abs(float(z.mean())) < 1e-12
    assert abs(float(z.square().mean()) - 1) < 1e-12
    lm = ((signs @ a) * signs).sum(1)
    assert abs(float(lm.mean() - a.trace())) < 1e-12


def test_the_influence_solves_what_it_says() -> None:
    """A (K + λ) = K with λ the mean eigenvalue, and a zero kernel gives zero."""
    k = gram(6, 4)
    a, lam = score_test.influence(k), score_test.ridge_of(k)
    assert lam == pytest.approx(float(torch.linalg.eigvalsh(k).mean()))
    torch.testing.assert_close(a @ (k + lam * torch.eye(6)), k)
    assert not score_test.influence(torch.zeros(6, 6)).any()


def test_a_site_that_all_images_pull_alike_is_significant() -> None:
    """A common direction in the gradients gives a large z and the smallest p; noise does not."""
    signs = torch.randint(2, (999, 64), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    pulled, noise = (score_test.influence(gram(64, 5, common=c)) for c in (0.8, 0.0))
    assert score_test.p_value(pulled, signs.double()) == 1 / 1000
    assert float(score_test.z_scores(pulled, ones(64))) > 5
    assert score_test.p_value(noise, signs.double()) > 0.05


def test_the_statistic_knows_no_units() -> None:
    """Gradients a thousand times as large score the same."""
    k = gram(16, 4, common=0.3)
    first, second = (score_test.z_scores(score_test.influence(f * k), ones(16)) for f in (1.0, 1e6))
    torch.testing.assert_close(first, second)


def test_drawing_an_image_twice_is_no_evidence() -> None:
    """Images with nothing in common have z = 0 however often one of them counts."""
    a = score_test.influence(torch.eye(5, dtype=torch.float64))
    weights = torch.tensor([[5.0, 0, 0, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.float64)
    assert score_test.z_scores(a, weights).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("given", "adjusted"),
    [
        ([0.01, 0.04, 0.03], [0.03, 0.06, 0.06]),
        ([0.5, 0.9], [1.0, 1.0]),
        ([0.02], [0.02]),
        ([float("nan"), 0.01, 0.02], [float("nan"), 0.02, 0.02]),
    ],
)
def test_holm_by_hand(given: list[float], adjusted: list[float]) -> None:
    """The smallest times n, the next times n − 1, never falling, never above 1; what is no number is no test."""
    assert holm(given) == pytest.approx(adjusted, nan_ok=True)


def test_expected_drop_by_hand() -> None:
    """One parameter, gradients 1, 1 | 1, 1: F = 1, λ = 1/4, so ḡ (F + λ)⁻¹ ḡ = 0.8; opposite halves give −0.8."""
    folds = torch.tensor([0, 0, 1, 1])
    for signs, wanted in (((1.0, 1, 1, 1), 0.8), ((1.0, 1, -1, -1), -0.8)):
        g = torch.tensor(signs, dtype=torch.float64)[:, None]
        assert score_test.expected_drop(g @ g.T, folds) == pytest.approx(wanted)


def test_forward_selection_passes_over_a_copy_of_what_it_has() -> None:
    """Of two strong sites that are the same and a weaker one of its own, the copy comes last."""
    strong, other = (score_test.influence(gram(64, 3, seed=s, common=c)) for s, c in ((1, 0.6), (2, 0.4)))
    signs = (torch.randint(2, (999, 64), generator=torch.Generator().manual_seed(0)) * 2.0 - 1).double()
    single = [float(score_test.z_scores(a, ones(64))) for a in (strong, other)]
    assert single[0] > single[1] > 1
    assert score_test.forward_selection([strong, strong.clone(), other], signs) == [0, 2, 1]
    assert score_test.forward_selection([other, strong], signs, most=0) == [1, 0]


def test_the_stretch_of_the_ones_by_hand() -> None:
    """Off one axis of four, 1 keeps 3 of 4 where signs keep 3: c = 1; off a column of sum 0, 4 of 4: 4/3; off 1: 0."""
    eye = torch.eye(4, dtype=torch.float64)
    for column, wanted in (((1.0, 0, 0, 0), 1.0), ((1.0, -1, 0, 0), 4 / 3), ((1.0, 1, 1, 1), 0.0)):
        v = torch.tensor(column, dtype=torch.float64)
        p = eye - torch.outer(v, v) / (v @ v)
        assert score_test.stretch(p) == pytest.approx(wanted, abs=1e-12)


def test_what_was_seen_is_brought_to_the_length_of_signs() -> None:
    """z of LM / c; signs are held against themselves; a statistic that is its mean times c has z = 0."""
    a = score_test.influence(gram(8, 3))
    lm, mean = float((ones(8) @ a @ ones(8).T).squeeze()), float(a.trace())
    sd = float((a - torch.diag(a.diagonal())).square().sum().mul(2).sqrt())
    assert float(score_test.z_scores(a, ones(8), 2.0)) == pytest.approx((lm / 2 - mean) / sd)
    assert float(score_test.z_scores(a, ones(8), lm / mean)) == pytest.approx(0.0, abs=1e-12)


def pulls_without_meaning(seed: int, n: int = 64, d: int = 256) -> tuple[Tensor, Tensor]:
    """K of a site whose gate knows nothing, and P, behind a ridge head that is cross-fitted to labels drawn at random."""
    g = torch.Generator().manual_seed(seed)
    scales = torch.arange(1, d + 1, dtype=torch.float64) ** -0.5
    x, labels = (
        torch.randn(n, d, generator=g, dtype=torch.float64) * scales,
        torch.randint(4, (n,), generator=g),
    )
    folds = head.divided(labels, 2, g)
    fit = head._fitted(x, labels, folds)
    back = torch.stack([fit.weights[f][0] for f in folds.tolist()])
    delta = fit.out.softmax(1) - torch.nn.functional.one_hot(labels, 4)
    at_features, gate = (delta[:, :, None] * back).sum(1), torch.rand(n, 48, generator=g, dtype=torch.float64)
    kernel = (at_features @ at_features.T) * (gate @ gate.T) * (folds[:, None] == folds)
    return kernel, head._removal(x, fit.out, labels, folds, fit.penalty)


def test_p_values_are_no_larger_with_more_features_than_images_in_a_fold() -> None:
    """Features eight times as many as a fold's images, labels that mean nothing: the mean p over 30 draws is near 1/2."""
    signs = (torch.randint(2, (499, 64), generator=torch.Generator().manual_seed(0)) * 2.0 - 1).double()
    found = []
    for seed in range(30):
        kernel, removal = pulls_without_meaning(seed)
        a = score_test.influence(removal @ kernel @ removal)
        found.append(score_test.p_value(a, signs, score_test.stretch(removal)))
    assert 0.35 < sum(found) / 30 < 0.65
    assert sum(p < 0.05 for p in found) <= 4


def test_the_head_is_taken_out_in_whole_directions() -> None:
    """P is a projection within each fold; the columns of δ are gone, and the weaker the penalty the more is gone."""
    g = torch.Generator().manual_seed(0)
    x, labels = torch.randn(40, 12, generator=g, dtype=torch.float64), torch.arange(40) % 4
    folds, logits = torch.arange(40) // 20, torch.randn(40, 4, generator=g, dtype=torch.float64)
    left = []
    for penalty in (100.0, 1.0, 0.01):
        p = head._removal(x, logits, labels, folds, penalty)
        torch.testing.assert_close(p @ p, p)
        assert not p[:20, 20:].any()
        delta = (logits.softmax(1) - torch.nn.functional.one_hot(labels, 4)) * (folds == 0)[:, None]
        assert float((p @ delta).abs().max()) < 1e-9
        left.append(float(p.trace()))
    assert left[0] == pytest.approx(40 - 2 * 4)
    assert left[0] > left[1] > left[2]
