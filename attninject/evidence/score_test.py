"""The efficient score test with a sign-flip null, on kernels over images.

Image i has the gradient g_i at a site's zero parameters, and K_ij = ⟨g_i, g_j⟩. What the head could do by itself is
projected out: K̃ = P K P (P in `head`). With A = K̃(K̃ + λ)⁻¹ the statistic is LM = 1ᵀ A 1, which is large where the
images pull the site's parameters in a common direction.

If a block helps nobody, an image's pull is as likely as its opposite, so LM is compared with sᵀ A s under random
signs s. Its mean there is tr A, the effective number of dimensions: this is why a raw sum ranks sites by their
number of parameters. Its variance is 2 Σ_{i≠j} A_ij². Both are exact; the tail is sampled. z = (LM − mean) / sd.

As A = P A P, what is compared is P1 with Ps, and the two differ in length for reasons that are the head's, not the
site's: Ps has tr P in the mean, which is n less what was taken out. P1 has more where the head's fit, or labels spread
evenly over the folds, make its gradients sum to 0 (P1 = 1, as with residuals of any regression); and less where a
head fitted on other images is surer than these bear out, since the ones then point along what is taken out. Given its
length, and if the site adds nothing, the direction of P1 is one like another. So LM is divided by `stretch`
c = ‖P1‖² / tr P. (De Santis, Goeman, Hemerik & Finos, arXiv:2209.13918, standardise sign-flipped scores likewise, since
projected residuals are not exchangeable under signs.)

The score test is Rao's (1948), in its efficient form for nuisance parameters Neyman's C(α) (1959); sign flips of
scores as in Hemerik, Goeman & Finos (2020, doi:10.1111/rssb.12369).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .statistics import LEVEL


def ridge_of(kernel: Tensor, ridge: float = 1.0) -> float:
    """λ: `ridge` times the mean eigenvalue of K."""
    return ridge * float(kernel.diagonal().mean())


def influence(kernel: Tensor, ridge: float = 1.0) -> Tensor:
    """A = K(K + λ)⁻¹ = I − λ(K + λ)⁻¹, with λ relative to K; zero for a kernel that is zero."""
    lam = ridge_of(kernel, ridge)
    if not lam > 0:
        return torch.zeros_like(kernel)
    eye = torch.eye(len(kernel), dtype=kernel.dtype, device=kernel.device)
    return eye - lam * _inverse(kernel + lam * eye)


def _inverse(matrix: Tensor) -> Tensor:
    return torch.cholesky_inverse(torch.linalg.cholesky(matrix))


def stretch(removal: Tensor) -> float:
    """‖P1‖² / tr P of a projection (n, n): how much longer it leaves the ones than random signs; 1 where P is zero."""
    return float(removal.sum(1).square().sum() / removal.trace()) if removal.any() else 1.0


def z_scores(a: Tensor, weights: Tensor, stretched: float = 1.0) -> Tensor:
    """(LM / c − mean) / sd for each row of weights: (r, n) → (r,); c = `stretched` for what was seen, 1 for signs.

    With weights of 1 or random signs it is the test's statistic. With how often each image was drawn it is that of
    a bootstrap sample in the metric of the full one; an image is never paired with its own copy, so that drawing it
    twice is no evidence.
    """
    off = a - torch.diag(a.diagonal())
    spread = (2 * (((weights**2) @ off**2) * weights**2).sum(1)).sqrt()
    z = ((((weights @ off) * weights).sum(1) + a.trace()) / stretched - a.trace()) / spread
    return torch.where(spread > 0, z, torch.zeros_like(z))


def p_value(a: Tensor, signs: Tensor, stretched: float = 1.0) -> float:
    """Share of the null, sampled with signs: (r, n), that is at least as large; the observed value counts too."""
    observed = float(z_scores(a, torch.ones_like(signs[:1]), stretched))
    return (1 + int((z_scores(a, signs) >= observed).sum())) / (1 + len(signs))


def expected_drop(kernel: Tensor, folds: Tensor, ridge: float = 1.0) -> float:
    """⟨ḡ_val, (F + λ)⁻¹ ḡ_train⟩: what one damped Newton step on some images takes off the loss of the others.

    To first order, averaged over the folds: Σ_v 1ᵀ K_vt (K_tt + λ)⁻¹ 1 / n. F is the empirical Fisher matrix of the
    training part. About 0 or less is expected where a site helps nobody.
    """
    lam, total = ridge_of(kernel, ridge), 0.0
    if not lam > 0:
        return 0.0
    for fold in folds.unique():
        val, train = folds == fold, folds != fold
        inner = kernel[train][:, train]
        eye = torch.eye(len(inner), dtype=kernel.dtype, device=kernel.device)
        damped = inner + lam * len(inner) / len(kernel) * eye
        step = torch.cholesky_solve(torch.ones_like(inner[:, :1]), torch.linalg.cholesky(damped))
        total += float((kernel[val][:, train] @ step).sum())
    return total / len(kernel)


def forward_selection(
    influences: Sequence[Tensor], signs: Tensor, stretched: float = 1.0, most: int = 16
) -> list[int]:
    """An order of the sites in which each is the best given those before it.

    A damped Newton step of a chosen site takes from the images' pulls v what it can express, v ← (I − A) v; what the
    others still score is that of v in place of ones, against the same null. It goes on while the best one left is
    below `LEVEL` by itself, at most `most` times; the rest follow by what they still score. signs: (r, n).
    """
    chosen: list[int] = []
    left = list(range(len(influences)))
    v = torch.ones_like(signs[:1])
    while True:
        scores = {i: _still(influences[i], v, stretched) for i in left}
        left.sort(key=lambda i: -scores[i])
        if not left or len(chosen) == most:
            return chosen + left
        a = influences[left[0]]
        if float((z_scores(a, signs) >= scores[left[0]]).double().mean()) >= LEVEL:
            return chosen + left
        v = v - v @ a
        chosen.append(left.pop(0))


def _still(a: Tensor, v: Tensor, stretched: float) -> float:
    """(vᵀ A v / c − mean) / sd under the null of random signs; v: (1, n)."""
    spread = float((a - torch.diag(a.diagonal())).square().sum().mul(2).sqrt())
    return float((v @ a @ v.T).squeeze() / stretched - a.trace()) / spread if spread > 0 else 0.0
