"""Paired differences over seeds: intervals, tests, and what so many seeds could have shown.

The unit is the seed. Two arms with the same seed share weights, split, order and augmentation, so that their
difference is free of what these contribute (the paired design of Bouthillier et al. 2021, arXiv:2103.03098).
Distributions are scipy's. By hand are Holm's correction, which it has not, and the percentile bootstrap, a line of numpy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TypeVar

import numpy as np

from attninject.errors import MissingPackageError

P = TypeVar("P", float, float | None)

LEVEL = 0.05
"""Of all tests together; intervals hold 95 %."""
POWER = 0.8
DRAWS = 10_000
QUANTILES = 4_000
MOST_SEEDS = 1000


@dataclass(frozen=True)
class Paired:
    """The paired difference of one arm from another over n seeds, in the unit of what was given.

    Attributes:
        seeds: n, those that both arms have.
        mean: of the n differences.
        sd: their standard deviation (n − 1); None with one seed.
        interval: 95 % by Student's t; None with one seed, or where all differences are equal.
        bootstrap: 95 % by resampling the seeds, percentiles; narrower than it should be below ten seeds or so.
        p: two-sided, of the paired t-test; None with one seed.
    """

    seeds: int
    mean: float
    sd: float | None
    interval: tuple[float, float] | None
    bootstrap: tuple[float, float] | None
    p: float | None


def paired(differences: Sequence[float]) -> Paired:
    """What the differences of so many seeds say.

    Where all are equal but not 0, t has no meaning: p is then the sign-flip test's least, 2^(1 − n).

    >>> found = paired([1.0, 2.0, 3.0])
    >>> round(found.mean, 3), round(found.p, 4), [round(end, 2) for end in found.interval]
    (2.0, 0.0742, [-0.48, 4.48])
    """
    d = np.asarray(differences, dtype=float)
    n, mean = len(d), float(d.mean())
    if n < 2:
        return Paired(n, mean, None, None, None, None)
    sd = float(d.std(ddof=1))
    if sd <= 1e-12 * max(1.0, abs(mean)):
        p = 1.0 if abs(mean) <= 1e-12 else 2.0 ** (1 - n)
        return Paired(n, mean, 0.0, None, None, p)
    t = _stats().t(n - 1)
    error = sd / math.sqrt(n)
    reach = float(t.ppf(1 - LEVEL / 2)) * error
    p = float(2 * t.sf(abs(mean) / error))
    return Paired(n, mean, sd, (mean - reach, mean + reach), _bootstrap(d), p)


def _bootstrap(d: np.ndarray) -> tuple[float, float]:
    """Percentiles of the means of seeds drawn with replacement; the same every time."""
    drawn = np.random.default_rng(0).integers(0, len(d), size=(DRAWS, len(d)))
    low, high = np.percentile(d[drawn].mean(axis=1), [100 * LEVEL / 2, 100 * (1 - LEVEL / 2)])
    return float(low), float(high)


def holm(ps: Sequence[P]) -> list[P]:
    """Holm's step-down adjustment (1979), valid under any dependence, in the order given.

    None and nan stay what they are and count as no test.

    >>> holm([0.01, 0.04, None, 0.03])
    [0.03, 0.06, None, 0.06]
    """
    order = sorted((p, i) for i, p in enumerate(ps) if p is not None and not math.isnan(p))
    adjusted = list(ps)
    least = 0.0
    for rank, (p, i) in enumerate(order):
        least = max(least, min(1.0, (len(order) - rank) * p))
        adjusted[i] = least
    return adjusted


def power(difference: float, sd: float, n: int, level: float = LEVEL) -> float:
    """How likely a paired t-test of n seeds sees a true difference: the noncentral t distribution's two tails.

    As the mean, over quantiles of the estimated sd, of the normal tails given it: libraries' own noncentral t is
    nan far out, which with two seeds is where it is needed.

    >>> round(power(1.0, 1.0, 10), 3)
    0.803
    """
    stats = _stats()
    critical = float(stats.t.ppf(1 - level / 2, n - 1))
    shift = abs(difference) * math.sqrt(n) / sd
    quantiles = (np.arange(QUANTILES) + 0.5) / QUANTILES
    estimated = critical * np.sqrt(stats.chi2.ppf(quantiles, n - 1) / (n - 1))
    return float((stats.norm.sf(estimated - shift) + stats.norm.cdf(-estimated - shift)).mean())


def least_difference(sd: float, n: int, level: float = LEVEL) -> float:
    """The smallest true difference that n seeds show with power 0.8, at differences of that standard deviation.

    >>> round(least_difference(1.0, 10), 2)
    1.0
    """
    low, high = 0.0, sd
    while power(high, sd, n, level) < POWER:
        low, high = high, 2 * high
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if power(middle, sd, n, level) < POWER else (low, middle)
    return high


def seeds_needed(difference: float, sd: float, level: float = LEVEL) -> int | None:
    """The fewest seeds that show such a difference with power 0.8; None where a thousand are too few.

    >>> seeds_needed(1.0, 1.0), seeds_needed(0.001, 1.0)
    (10, None)
    """
    low, high = 1, 2
    while difference == 0 or power(difference, sd, high, level) < POWER:
        low, high = high, 2 * high
        if low >= MOST_SEEDS:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if power(difference, sd, middle, level) < POWER else (low, middle)
    return high if high <= MOST_SEEDS else None


def _stats() -> ModuleType:
    try:
        from scipy import stats
    except ImportError as error:
        raise MissingPackageError(
            'intervals and tests need scipy, which is not installed: pip install "attninject[report]"'
        ) from error
    found: ModuleType = stats
    return found
