"""Ways to score a site, one small function each, all from the same kernels.

`method(site, setting, weights)`: weights (r, n) say how often each image counts; the result is (r,), one score per
row. A row of ones is the score itself, the rows of a bootstrap give its interval. K is (n, n), K_ij = ⟨g_i, g_j⟩ of
the per-image gradients at the site's zero parameters, and ḡ = Gᵀ 1 / n.

Left out, since they are zero or undefined where a parameter is zero: SNIP and SynFlow (|θ · ∂L/∂θ| = 0), PLoP
(arXiv:2506.20629: a layer's ‖W x‖ over that for random x, 0/0) and KappaTune (arXiv:2506.16289: the
condition number of W).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from attninject.planning.planned_site import Site

from . import score_test


@dataclass(frozen=True, eq=False)
class Candidate:
    """A site with its kernel K: (n, n), and A = K̃(K̃ + λ)⁻¹ of the same without what the head could do by itself.

    `stretched`: c of `score_test.stretch`.
    """

    site: Site
    number: int
    kernel: Tensor
    influence: Tensor
    stretched: float = 1.0


@dataclass(frozen=True)
class Setting:
    """What all sites share."""

    ridge: float
    batch_size: int
    seed: int
    sites: int
    usual: frozenset[int]
    """Numbers of the sites that the block's paper would take."""


Method = Callable[[Candidate, Setting, Tensor], Tensor]


def _quadratic(matrix: Tensor, weights: Tensor) -> Tensor:
    return ((weights @ matrix) * weights).sum(1)


def _constant(value: float, weights: Tensor) -> Tensor:
    return torch.full((len(weights),), float(value), dtype=weights.dtype, device=weights.device)


def score(site: Candidate, setting: Setting, weights: Tensor) -> Tensor:
    """z = (LM / c − mean) / sd of the efficient score test under random signs of the images; see `score_test`."""
    return score_test.z_scores(site.influence, weights, site.stretched)


def gradient_norm(site: Candidate, setting: Setting, weights: Tensor) -> Tensor:
    """‖ḡ‖ = √(1ᵀ K 1) / n: the norm of the mean gradient at what is zero (GradMax, arXiv:2201.05125).

    GradMax sets the outgoing weights of new neurons to zero and seeks the incoming ones for which this norm is largest;
    here the incoming ones are as they were drawn.
    """
    return _quadratic(site.kernel, weights).clamp_min(0).sqrt() / weights.sum(1)


def squared_gradients(site: Candidate, setting: Setting, weights: Tensor) -> Tensor:
    """Σ_b ‖ḡ_b‖² over batches b, per batch: squared gradients as sensitivity (SPT, arXiv:2303.08566).

    SPT adds them up for each parameter (its code: over 8 batches) and counts how many of a matrix's are among the
    largest of the whole net, which on its own weights are not zero; here they are summed over the site's new ones.
    """
    n, b = len(site.kernel), setting.batch_size
    batch = torch.arange(n, device=weights.device) // b
    same = (batch[:, None] == batch[None]).to(weights)
    return _quadratic(site.kernel * same, weights) / (b * b * (int(batch[-1]) + 1))


def natural_gradient(site: Candidate, setting: Setting, weights: Tensor) -> Tensor:
    """ḡᵀ (F + λ)⁻¹ ḡ = 1ᵀ K(K + λ)⁻¹ 1 / n, F = Gᵀ G / n: the natural expansion score (SENN, arXiv:2307.04526, eq. 3).

    With the empirical Fisher matrix, of the gradients themselves, in place of SENN's, of the outputs' Jacobians, which it
    approximates by K-FAC; and of the new parameters alone, where SENN takes what the score of all rises by.
    """
    return _quadratic(score_test.influence(site.kernel, setting.ridge), weights) / weights.sum(1)


def gradient_rank(site: Candidate, setting: Setting, weights: Tensor) -> Tensor:
    """(tr K)² / ‖K‖², the effective rank of the per-image gradients.

    After arXiv:2410.15858, where placements of adapters that do well often have a high gradient rank; by the
    participation ratio of the spectrum that Gᵀ G and K share, where that counts singular values of a weight's gradient.
    """
    trace = weights @ site.kernel.diagonal()
    squared = _quadratic(site.kernel**2, weights)
    return torch.where(squared > 0, trace**2 / squared, torch.zeros_like(trace))


def halves(site: Candidate, setting: Setting, weights: Tensor) -> Tensor:
    """Cosine between the mean gradients of two halves of the images, over 16 seeded divisions: signal to noise."""
    generator = torch.Generator().manual_seed(setting.seed)
    found = []
    for _ in range(16):
        half = torch.randperm(len(site.kernel), generator=generator) % 2
        a = weights * half.to(weights)
        b = weights - a
        across = ((a @ site.kernel) * b).sum(1)
        norms = (_quadratic(site.kernel, a) * _quadratic(site.kernel, b)).clamp_min(0).sqrt()
        found.append(torch.where(norms > 0, across / norms, torch.zeros_like(norms)))
    return torch.stack(found).mean(0)


# --- baselines, which look at no image ---------------------------------------------------------


def random(site: Candidate, setting: Setting, weights: Tensor) -> Tensor:
    """A uniform random number, by seed and site."""
    key = f"{setting.seed}:{site.number}".encode()
    return _constant(zlib.crc32(key) / 2**32, weights)


def depth(site: Candidate, setting: Setting, weights: Tensor) -> Tensor:
    """The later in the network, the higher (0 … 1)."""
    return _constant(site.number / max(1, setting.sites - 1), weights)


def parameters(site: Candidate, setting: Setting, weights: Tensor) -> Tensor:
    """The new block's number of parameters: before ZiCo (arXiv:2301.11300) no zero-cost proxy was always as good."""
    return _constant(site.site.parameters, weights)


def largest_map(site: Candidate, setting: Setting, weights: Tensor) -> Tensor:
    """Numbers per image in the tensor at the site."""
    return _constant(torch.Size(site.site.shape[1:]).numel(), weights)


def papers_places(site: Candidate, setting: Setting, weights: Tensor) -> Tensor:
    """1 at the places of the block's paper, else 0; see `PAPERS_PLACES`."""
    return _constant(site.number in setting.usual, weights)


PAPERS_PLACES = {
    "se": "residual_branch",  # arXiv:1709.01507, figure 3
    "cbam": "residual_branch",  # arXiv:1807.06521, figure 3
    "bam": "before_downsample",  # arXiv:1807.06514, figure 1
    "ge": "residual_branch",  # arXiv:1810.12348, section 3
    "eca": "residual_branch",  # arXiv:1910.03151, section 4
    "gct": "residual_branch",
    "coord": "residual_branch",  # arXiv:2103.02907, figure 4
    "gc": "block_end",  # arXiv:1904.11492, section 4
    "nonlocal": "block_end",  # arXiv:1711.07971, section 4.1: behind residual blocks
}
"""Block → the place of its paper."""

METHODS: Mapping[str, Method] = {
    "score": score,
    "gradient_norm": gradient_norm,
    "squared_gradients": squared_gradients,
    "natural_gradient": natural_gradient,
    "gradient_rank": gradient_rank,
    "halves": halves,
    "random": random,
    "depth": depth,
    "parameters": parameters,
    "largest_map": largest_map,
    "papers_places": papers_places,
}
"""Name → method; `auto` is `score`."""

FORMULAS = {name: (m.__doc__ or "").strip().splitlines()[0].rstrip(".") for name, m in METHODS.items()}
"""Name → the first sentence of its docstring, for tables."""
