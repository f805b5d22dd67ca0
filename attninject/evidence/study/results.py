"""What stands in the files, as gains and scores: the only place that reads the columns of test images."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from attninject.evidence.statistics import Paired, paired

from . import choosing
from .design import NEW_TASKS, RANDOM_DRAWS, SEEDS, STAGES, TASKS, Group
from .kendall import Array
from .store import GROUP, SCORES, Store, sites_of

Row = Mapping[str, str]

BARE = ("random", "depth", "parameters", "largest_map", "papers_places")
"""Methods that look at no image."""
KEPT = tuple(f"{m}_kept" for m in SCORES)
"""Exploratory: the same methods at the head that trainings start from."""
METHODS = (*SCORES, *choosing.TRAINED, *BARE)
EXPLORED = (*KEPT, "rung", "halving", "curvature", "validation", "before")
"""Declared later than the others; see the protocol's deviations."""


@dataclass(frozen=True)
class Results:
    """One group with everything that was measured in it.

    Attributes:
        group: which.
        sites: its candidates.
        rate: the tuned `attn_lr`.
        runs: (seed, sites) → row, at that rate, plain among them.
        tables: file of scores → seed → rows of sites in order.
    """

    group: Group
    sites: choosing.Sites
    rate: float
    runs: Mapping[tuple[int, tuple[int, ...]], Row]
    tables: Mapping[str, Mapping[int, Sequence[Row]]]

    @cached_property
    def seeds(self) -> list[int]:
        """Those with a plain run."""
        return sorted(seed for seed, sites in self.runs if not sites)

    def gain(self, seed: int, sites: tuple[int, ...], column: str = "test_loss") -> float | None:
        """Of blocks at some sites over plain: loss that is taken off, or accuracy that is added; None: not run."""
        run, plain = self.runs.get((seed, sites)), self.runs.get((seed, ()))
        if run is None or plain is None:
            return None
        change = float(plain[column]) - float(run[column])
        return change if column.endswith("loss") else -change

    def over_plain(self, sites: tuple[int, ...], column: str = "test_loss") -> Paired | None:
        """The paired gain of one set of sites."""
        gains = [g for s in self.seeds if (g := self.gain(s, sites, column)) is not None]
        return paired(gains) if gains else None

    @cached_property
    def headroom(self) -> bool | None:
        """Whether blocks at all sites gain, with an interval above 0; None where they were not run for all seeds."""
        found = self.over_plain(self.sites.every)
        if found is None or found.interval is None or found.seeds < len(SEEDS):
            return None
        return found.interval[0] > 0

    @cached_property
    def ranked_seeds(self) -> list[int]:
        """Seeds for which every single site was trained and scored."""
        return [
            s
            for s in self.seeds
            if s in self.tables["scores"] and all((s, (i,)) in self.runs for i in self.sites.every)
        ]

    def gains(self, column: str = "test_loss") -> Array:
        """(seeds, sites): what each site gains alone."""
        rows = [[self.gain(s, (i,), column) for i in self.sites.every] for s in self.ranked_seeds]
        return np.array(rows, dtype=float).reshape(len(rows), len(self.sites.every))

    def scored(self, method: str) -> Array | None:
        """(seeds, sites): a method's scores; None where it was not measured."""
        rows = [self._scores(method, seed) for seed in self.ranked_seeds]
        return None if not rows or any(r is None for r in rows) else np.array(rows, dtype=float)

    def _scores(self, method: str, seed: int) -> list[float] | None:
        every = self.sites.every
        bare = {
            "random": [zlib.crc32(f"{seed}:{i}".encode()) / 2**32 for i in every],
            "depth": [float(i) for i in every],
            "first": [-float(i) for i in every],
            "parameters": [float(p) for p in self.sites.parameters],
            "largest_map": [float(n) for n in self.sites.numbers],
            "papers_places": [float(i in self.sites.usual) for i in every],
        }
        if method in bare:
            return bare[method]
        if method == "validation":
            return self._validated(seed)
        if method == "halving":
            rungs, full = self.tables["rungs"].get(seed, ()), self._validated(seed)
            if not full or not choosing.halvable(rungs, len(every)):
                return None
            order = choosing.halved(rungs, full)
            return [-float(order.index(site)) for site in every]
        column = {"before": "score"}.get(method, method.removesuffix("_kept"))
        rows = [r for r in self.tables[_file(method)].get(seed, ()) if r.get("epochs", "1") == "1"]
        return [float(row[column]) for row in rows] if len(rows) == len(every) else None

    def _validated(self, seed: int) -> list[float] | None:
        """By site, the validation loss of the site alone, sign changed; None where not all were trained."""
        found = [self.runs.get((seed, (i,))) for i in self.sites.every]
        known = [-float(r["val_loss"]) for r in found if r is not None]
        return known if len(known) == len(found) else None

    def arms(self, seed: int) -> dict[str, tuple[int, ...]]:
        """Arm → its sites, as they were chosen."""
        own = {name: self.tables[name].get(seed, ()) for name in choosing.SOURCES}
        return choosing.arms(self.sites, seed, own, self._validated(seed))

    def best_random(self, seed: int, draws: int) -> float | None:
        """Gain over plain of the best by validation loss among the seed's first random sets."""
        arms = self.arms(seed)
        sets = [arms[f"random_{d}"] for d in range(draws)]
        if any((seed, sites) not in self.runs for sites in sets):
            return None
        return self.gain(seed, min(sets, key=lambda sites: float(self.runs[seed, sites]["val_loss"])))

    def affordable(self, seed: int) -> int:
        """How many random sets are trained in the seconds of one epoch of every site, rounded up; at most all."""
        rungs = [r for r in self.tables["rungs"].get(seed, ()) if r["epochs"] == "1"]
        arms = self.arms(seed)
        found = [self.runs.get((seed, arms[f"random_{d}"])) for d in range(RANDOM_DRAWS)]
        each = np.mean([float(r["seconds"]) for r in found if r is not None])
        return min(RANDOM_DRAWS, math.ceil(sum(float(r["seconds"]) for r in rungs) / each))

    @cached_property
    def chosen(self) -> dict[str, dict[int, float]]:
        """Arm → seed → gain over plain; `random` is the mean of the seed's random sets."""
        found: dict[str, dict[int, float]] = {}
        for seed in self.seeds:
            draws = []
            for arm, sites in self.arms(seed).items():
                gain = self.gain(seed, sites)
                if arm.startswith("random_"):
                    draws.append(gain)
                elif gain is not None:
                    found.setdefault(arm, {})[seed] = gain
            whole = [d for d in draws if d is not None]
            if whole and len(whole) == len(draws):
                found.setdefault("random", {})[seed] = sum(whole) / len(whole)
        return found


def _file(method: str) -> str:
    """The file that a method's scores stand in."""
    if method in choosing.TRAINED:
        return "trained"
    if method in KEPT:
        return "kept"
    return {"rung": "rungs", "curvature": "curvature", "before": "before"}.get(method, "scores")


def read(store: Store) -> dict[Group, Results]:
    """All groups that were begun, in the order of the design."""
    runs = _grouped(store.read("runs", test=True))
    files = {name: _grouped(store.read(name)) for name in (*choosing.SOURCES, "kept", "curvature")}
    sites: dict[tuple[str, str], list[Row]] = {}
    for row in store.read("sites"):
        sites.setdefault((row["net"], row["block"]), []).append(row)
    found = {}
    for key in sorted(runs, key=_place):
        group, rate = Group(*key), choosing.tuned(runs[key])
        if rate is None:
            continue
        known = choosing.Sites.of(sites[group.net, group.block])
        every = len(known.every)
        own = {
            (int(r["seed"]), sites_of(r["sites"], every)): r
            for r in runs[key]
            if r["sites"] == "none" or float(r["lr"]) == rate
        }
        frozen = Group(*key[:3]).key  # scores are of the net at rest
        keys = {name: frozen if name in ("scores", "before") else key for name in files}
        scores = {name: _by_seed(rows.get(keys[name], [])) for name, rows in files.items()}
        found[group] = Results(group, known, rate, own, scores)
    return found


def _place(key: tuple[str, ...]) -> tuple[int, int]:
    """Order of the groups: as the stages come, tasks as the design has them; the control last."""
    kinds: list[tuple[str, ...]] = [stage[1:4] for stage in STAGES]
    return kinds.index(key[1:]) if key[1:] in kinds else len(kinds), _index((*TASKS, *NEW_TASKS), key[0])


def _index(names: Sequence[str], name: str) -> int:
    return names.index(name) if name in names else len(names)


def _grouped(rows: Sequence[Row]) -> dict[tuple[str, str, str, str], list[Row]]:
    found: dict[tuple[str, str, str, str], list[Row]] = {}
    for row in rows:
        task, net, block, regime = (row[c] for c in GROUP)
        found.setdefault((task, net, block, regime), []).append(row)
    return found


def _by_seed(rows: Sequence[Row]) -> dict[int, list[Row]]:
    found: dict[int, list[Row]] = {}
    for row in sorted(rows, key=lambda r: int(r["site"])):
        found.setdefault(int(row["seed"]), []).append(row)
    return found
