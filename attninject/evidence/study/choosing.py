"""Which sites an arm takes within a budget of parameters."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .design import ATTN_LRS, CHOOSERS, RANDOM_DRAWS, SHARE, TUNING_SEEDS

Rows = Sequence[Mapping[str, str]]
"""Of one seed, one per site, in order."""

TRAINED = ("warmup", "ablation")


@dataclass(frozen=True)
class Sites:
    """What is known of the candidates before any image: parameters, map sizes, and which the paper would take."""

    parameters: tuple[int, ...]
    macs: tuple[int, ...]
    numbers: tuple[int, ...]
    usual: tuple[int, ...]

    @classmethod
    def of(cls, rows: Rows) -> Sites:
        """From rows of `sites.csv`."""
        parameters, macs, numbers = (
            tuple(int(row[c]) for row in rows) for c in ("parameters", "macs", "numbers")
        )
        return cls(parameters, macs, numbers, tuple(i for i, row in enumerate(rows) if row["usual"] == "1"))

    @property
    def every(self) -> tuple[int, ...]:
        """All of them."""
        return tuple(range(len(self.parameters)))

    @property
    def budget(self) -> int:
        """Parameters that a choice may have."""
        return int(SHARE * sum(self.parameters))

    def filled(self, order: Sequence[int]) -> tuple[int, ...]:
        """Sites taken in an order while they fit; one that does not is passed over, as `Ranking.top` does.

        >>> Sites((10, 50, 20, 20), (1,) * 4, (1,) * 4, ()).filled([1, 0, 2, 3])
        (0,)
        """
        chosen, spent = [], 0
        for site in order:
            if spent + self.parameters[site] <= self.budget:
                chosen.append(site)
                spent += self.parameters[site]
        return tuple(sorted(chosen))


def tuned(rows: Rows) -> float | None:
    """The rate at which blocks at all sites have the least mean validation loss over the tuning seeds.

    rows: of a group's runs. None where none of the rates was tried.
    """
    found: dict[float, float] = {}
    for rate in ATTN_LRS:
        losses = [
            float(r["val_loss"])
            for r in rows
            if r["sites"] == "all" and float(r["lr"]) == rate and int(r["seed"]) in TUNING_SEEDS
        ]
        if losses:
            mean = sum(losses) / len(losses)
            found[rate] = mean if math.isfinite(mean) else math.inf
    return min(found, key=lambda rate: found[rate]) if found else None


def falling(scores: Sequence[float]) -> list[int]:
    """Sites by score, the best first, ties by number."""
    return sorted(range(len(scores)), key=lambda i: -scores[i])


def without_images(sites: Sites, seed: int) -> dict[str, tuple[int, ...]]:
    """Arms that look at no image: first, last, by parameters, the paper's places, all, random sets."""
    found = {
        "first": sites.filled(sites.every),
        "last": sites.filled(sites.every[::-1]),
        "parameters": sites.filled(falling(sites.parameters)),
        "papers_places": sites.usual,
        "all": sites.every,
    }
    for draw in range(RANDOM_DRAWS):
        order = list(sites.every)
        random.Random(f"{seed}/{draw}").shuffle(order)
        found[f"random_{draw}"] = sites.filled(order)
    return found


def by_scores(sites: Sites, scores: Rows, methods: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Arms that a seed's scores choose: the best by each method, and the worst by forward selection (`bottom`)."""
    found = {m: sites.filled(falling([float(row[m]) for row in scores])) for m in methods if m != "score"}
    order = sorted(sites.every, key=lambda s: int(scores[s]["order"]))
    return {"score": sites.filled(order), "bottom": sites.filled(order[::-1]), **found}


def by_training(sites: Sites, trained: Rows) -> dict[str, tuple[int, ...]]:
    """Arms by the two scores that need a training of all sites."""
    return {m: sites.filled(falling([float(row[m]) for row in trained])) for m in TRAINED}


def better_half(sites: Sequence[int], scores: Mapping[int, float]) -> list[int]:
    """Half of some sites, rounded up, the best first.

    >>> better_half([0, 1, 2], {0: 1.0, 1: 3.0, 2: 2.0})
    [1, 2]
    """
    return sorted(sites, key=lambda s: -scores[s])[: (len(sites) + 1) // 2]


def halvable(rungs: Rows, every: int) -> bool:
    """Whether all sites of a seed have their first rung, and half of them, rounded up, their second."""
    return len(rungs) == every + (every + 1) // 2


def halved(rungs: Rows, full: Sequence[float]) -> list[int]:
    """The order of successive halving: by how far a site came, then by its last validation loss.

    rungs: of one seed, in any order; after one epoch of all sites, and after two of the better half of them. full: by
    site, validation loss after the whole training, sign changed, of which the best quarter is read alone.
    """
    first, second = (
        {int(r["site"]): float(r["rung"]) for r in rungs if int(r["epochs"]) == n} for n in (1, 2)
    )
    left = better_half(sorted(first), first)
    last = better_half(left, second)
    order = sorted(last, key=lambda s: -full[s])
    order += [s for s in sorted(left, key=lambda s: -second[s]) if s not in order]
    return order + [s for s in sorted(first, key=lambda s: -first[s]) if s not in order]


def by_rungs(sites: Sites, rungs: Rows, full: Sequence[float] | None) -> dict[str, tuple[int, ...]]:
    """Arms by one epoch of every single site, and by successive halving where all its rungs are known."""
    first = {int(r["site"]): float(r["rung"]) for r in rungs if int(r["epochs"]) == 1}
    if len(first) < len(sites.every):
        return {}
    found = {"rung": sites.filled(falling([first[s] for s in sites.every]))}
    if full is not None and halvable(rungs, len(first)):
        found["halving"] = sites.filled(halved(rungs, full))
    return found


SOURCES = ("scores", "before", "trained", "rungs")
"""Files that arms are chosen by."""


def arms(
    sites: Sites, seed: int, tables: Mapping[str, Rows], full: Sequence[float] | None
) -> dict[str, tuple[int, ...]]:
    """Arm → its sites for one seed, as far as its scores are known.

    tables: of `SOURCES`, the seed's rows. full: see `halved`; None where not every site was trained.
    """
    found = without_images(sites, seed)
    if tables["scores"]:
        found |= by_scores(sites, tables["scores"], CHOOSERS)
    if tables["before"]:
        found["before"] = by_scores(sites, tables["before"], ())["score"]
    if tables["trained"]:
        found |= by_training(sites, tables["trained"])
    return found | by_rungs(sites, tables["rungs"], full)
