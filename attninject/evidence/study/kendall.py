"""Rank agreement: Kendall's τ, the part of it that controls leave, bootstrap over seeds, and what noise allows."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

SAME = 0.999
"""|τ| between controls from which on one of them says nothing that the other does not."""
DRAWS = 1000


def tau(x: Sequence[float] | Array, y: Sequence[float] | Array) -> float:
    """Kendall's τ-b, nan where x or y is constant.

    (concordant − discordant pairs) / √((pairs − ties in x)(pairs − ties in y)): Kendall (1945), "The treatment of ties
    in ranking problems", Biometrika 33.

    >>> tau([1, 2, 3, 4], [1, 2, 4, 3])
    0.6666666666666666
    """
    a, b = (np.sign(np.subtract.outer(v, v)) for v in (np.asarray(x, float), np.asarray(y, float)))
    scale = np.sqrt(float((a * a).sum()) * float((b * b).sum()))
    return float((a * b).sum() / scale) if scale > 0 else float("nan")


def partial_tau(x: Sequence[float], y: Sequence[float], controls: Sequence[Sequence[float]]) -> float:
    """Kendall's partial τ of x and y given the controls.

    With one control z it is (τxy − τxz τyz) / √((1 − τxz²)(1 − τyz²)): Kendall (1942), "Partial rank correlation",
    Biometrika 32. With several, −P_xy / √(P_xx P_yy) with P the inverse of the matrix of all τ, which is the same
    recursion carried on. Controls that are constant, or order the sites as an earlier one does, are left out; nan
    where nothing is left of x or y.

    >>> round(partial_tau([1, 2, 3, 4], [1, 2, 4, 3], [[1, 3, 2, 4]]), 4)
    0.6325
    """
    used: list[Sequence[float]] = []
    for z in controls:
        if not np.isnan(tau(z, z)) and all(abs(tau(z, other)) < SAME for other in used):
            used.append(z)
    every = [x, y, *used]
    matrix = np.array([[tau(a, b) for b in every] for a in every])
    if np.isnan(matrix).any():
        return float("nan")
    if any(abs(matrix[i, j]) >= SAME for i in (0, 1) for j in range(2, len(every))):
        return float("nan")
    inverse = np.linalg.inv(matrix)
    scale = inverse[0, 0] * inverse[1, 1]
    return float(-inverse[0, 1] / np.sqrt(scale)) if scale > 0 else float("nan")


def bootstrapped(
    gains: Array, scores: Array, statistic: Callable[[Array, Array], float], draws: int = DRAWS
) -> tuple[float, float]:
    """95 % percentiles of a statistic of mean gains and mean scores, seeds drawn with replacement.

    gains, scores: (seeds, sites); the gains and scores of a seed stay together.
    """
    generator = np.random.default_rng(0)
    drawn = generator.integers(0, len(gains), size=(draws, len(gains)))
    found = [statistic(gains[d].mean(0), scores[d].mean(0)) for d in drawn]
    low, high = np.nanpercentile(found, [2.5, 97.5]) if not np.isnan(found).all() else (np.nan, np.nan)
    return float(low), float(high)


def ceiling(gains: Array) -> float:
    """Mean τ between mean gains over some seeds and over the others, over all divisions in halves.

    gains: (seeds, sites). What one half of the trainings says of the other: no score is to be expected to agree with
    gains much better than gains with themselves.

    >>> ceiling(np.array([[1.0, 2, 3], [2, 3, 4], [0, 5, 6], [1, 2, 9]]))
    1.0
    """
    n = len(gains)
    if n < 2:
        return float("nan")
    found = []
    for half in itertools.combinations(range(n), n // 2):
        other = [i for i in range(n) if i not in half]
        found.append(tau(gains[list(half)].mean(0), gains[other].mean(0)))
    return float(np.mean(found))
