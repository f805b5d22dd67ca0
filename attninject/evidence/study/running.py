"""Carries out the stages of the design, skips what stands in the files, and stops when its time is up."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from attninject.evidence.sweep_controls import bottlenecks

from . import choosing, nets, scoring, training
from .design import ATTN_LRS, CANDIDATES, PERMUTATIONS, SEEDS, STAGES, TUNING_SEEDS, Group, Run
from .nets import Chain
from .scoring import Row
from .splits import Parts, parts_of
from .store import GROUP, Store, sites_of, sites_text

Loader = Callable[[str, int], Parts]


class OutOfTime(Exception):
    """The time that was given is over; what is finished stands in the files."""


class Study:
    """Runs of all groups, with the nets and images that were used last."""

    def __init__(
        self, store: Store, minutes: float, vit: Path | None = None, seeds: Sequence[int] = SEEDS
    ) -> None:
        self.store, self.vit, self.seeds = store, vit, tuple(seeds)
        self.until = time.monotonic() + 60 * minutes
        self.chains: dict[tuple[str, ...], Chain] = {}
        self.images: tuple[object, dict[int, Parts]] = (None, {})
        self.held: tuple[object, dict[int, training.Seeded]] = (None, {})

    def go(self) -> None:
        """All stages in order."""
        for stage, net, block, regime, tasks in STAGES:
            for task in tasks:
                began = time.monotonic()
                STEPS[stage](self, Group(task, net, block, regime))
                print(f"{stage} {task} {net} {block} {regime}: {time.monotonic() - began:.0f} s", flush=True)

    # what runs share

    def chain(self, group: Group) -> Chain:
        """The net with slots; the candidates' costs are written down when it is made."""
        key = group.key[1:]
        if key not in self.chains:
            self.held = None, {}
            self.chains = {key: self._chain(group)}
            self._describe(group)
        return self.chains[key]

    def _chain(self, group: Group) -> Chain:
        model = nets.bare(group.net, self.vit)
        if group.net == "lite0_random":
            nets.calibrate(model, self.parts(group, self.seeds[0], model)["train"].images)
        if group.regime == "frozen":
            nets.fold_norms(model)
        rule = CANDIDATES.get(group.net, {"place": "block_end"})
        if group.block != "bottleneck":
            return Chain(model, block=group.block, **rule)
        return Chain(model, bottlenecks(Chain(model, block="se", **rule).plan))

    def _describe(self, group: Group) -> None:
        known = {(row["net"], row["block"]) for row in self.store.read("sites")}
        if (group.net, group.block) in known:
            return
        chain = self.chains[group.key[1:]]
        usual = chain.usual()
        self.store.add("sites", [
            {
                "net": group.net, "block": group.block, "site": i, "path": site.path, "parameters": site.parameters,
                "macs": site.macs, "numbers": torch.Size(site.shape[1:]).numel(), "usual": int(i in usual),
            }
            for i, site in enumerate(chain.plan.sites)
        ])  # fmt: skip

    def sites(self, group: Group) -> choosing.Sites:
        """Of the candidates of a group."""
        rows = [r for r in self.store.read("sites") if (r["net"], r["block"]) == (group.net, group.block)]
        return choosing.Sites.of(rows)

    def parts(self, group: Group, seed: int, model: torch.nn.Module | None = None) -> Parts:
        """The images of a seed."""
        mean, std = nets.normalisation(self.chain(group).model if model is None else model)
        key = group.task, tuple(mean), tuple(std)
        if self.images[0] != key:
            self.images = key, {}
        if seed not in self.images[1]:
            self.images[1][seed] = parts_of(group.task, seed, mean, std)
        return self.images[1][seed]

    def seeded(self, group: Group, seed: int) -> training.Seeded:
        """What the runs of a seed share; kept for the group that is at work."""
        chain = self.chain(group)
        if self.held[0] != group:
            self.held = group, {}
        if seed not in self.held[1]:
            self.held[1][seed] = training.seeded(chain, self.parts(group, seed), seed)
        return self.held[1][seed]

    # trainings

    def train(self, group: Group, runs: Iterable[Run]) -> None:
        """Those that are not in the file, as many together as there are seeds, those that begin late together."""
        every = len(self.chain(group).slots)
        done = {
            (int(r["seed"]), sites_of(r["sites"], every), float(r["lr"])) for r in self.rows("runs", group)
        }
        missing = [r for r in dict.fromkeys(runs) if (r.seed, r.sites, r.lr) not in done]
        missing.sort(key=lambda r: r.sites or (every,))
        size = len(self.seeds) if group.regime == "frozen" else 1
        for i in range(0, len(missing), size):
            self._together(group, missing[i : i + size])

    def _together(self, group: Group, runs: Sequence[Run]) -> None:
        self.check_time()
        chain, of = self.chain(group), [self.seeded(group, r.seed) for r in runs]
        kind = training.Together if group.regime == "frozen" else training.Whole
        outcomes = training.trained(chain, runs, of, kind)
        every = len(chain.slots)
        self.store.add("runs", [
            {
                **dict(zip(GROUP, group.key, strict=True)), "seed": run.seed, "sites": sites_text(run.sites, every),
                "lr": run.lr, "val_loss": o.loss["val"], "val_acc": o.accuracy["val"],
                "moved": o.moved, "seconds": o.seconds, "test_loss": o.loss["test"], "test_acc": o.accuracy["test"],
            }
            for run, o in zip(runs, outcomes, strict=True)
        ])  # fmt: skip

    def rows(self, name: str, group: Group) -> list[dict[str, str]]:
        """Rows of a file that are of a group."""
        return [r for r in self.store.read(name) if tuple(r[c] for c in GROUP) == group.key]

    def add(self, name: str, group: Group, rows: Iterable[dict[str, object]]) -> None:
        """Append rows of a group."""
        own = dict(zip(GROUP, group.key, strict=True))
        self.store.add(name, [{**own, **row} for row in rows])

    def check_time(self) -> None:
        """Raise when the time is over."""
        if time.monotonic() > self.until:
            raise OutOfTime

    # stages

    def attn_lr(self, group: Group) -> float:
        """The rate that the group was tuned to."""
        rate = choosing.tuned(self.rows("runs", group))
        assert rate is not None
        return rate

    def headroom(self, group: Group) -> None:
        """Tune the rate with blocks at all sites; these and plain training for all seeds."""
        every = tuple(range(len(self.chain(group).slots)))
        self.train(group, [Run(s, every, lr) for lr in ATTN_LRS for s in TUNING_SEEDS if s in self.seeds])
        lr = self.attn_lr(group)
        self.train(group, [Run(s, every, lr) for s in self.seeds])
        self.train(group, [Run(s, (), 0.0) for s in self.seeds])

    def rank(self, group: Group) -> None:
        """Headroom, scores, and every site by itself."""
        self.headroom(group)
        self._score(group)
        if group.regime == "frozen":
            self._score_by_training(group)
        lr, every = self.attn_lr(group), range(len(self.chain(group).slots))
        self.train(group, [Run(seed, (site,), lr) for site in every for seed in self.seeds])

    def _score(self, group: Group) -> None:
        scored = {int(r["seed"]) for r in self.rows("scores", Group(*group.key[:3]))}
        for seed in (s for s in self.seeds if s not in scored):
            self.check_time()
            train = self.parts(group, seed)["train"]
            self.add("scores", Group(*group.key[:3]), scoring.scored(self.chain(group), train, seed))

    def _score_by_training(self, group: Group) -> None:
        have = {int(r["seed"]) for r in self.rows("trained", group)}
        lr, every = self.attn_lr(group), tuple(range(len(self.chain(group).slots)))
        runs = [Run(s, every, lr) for s in self.seeds if s not in have]
        if runs:
            self.check_time()
            chain, of = self.chain(group), [self.seeded(group, r.seed) for r in runs]
            together = training.Together(chain, runs, of)
            together.train()
            self.add("trained", group, scoring.by_training(chain, runs, of, together))

    def choose(self, group: Group) -> None:
        """What the methods choose within the budget, and what they are compared with."""
        self.headroom(group)
        self._score(group)
        lr = self.attn_lr(group)
        self.train(
            group, [Run(seed, sites, lr) for seed in self.seeds for sites in self._chosen(group, seed)]
        )

    def _chosen(self, group: Group, seed: int) -> list[tuple[int, ...]]:
        return list(dict.fromkeys(self.arms(group, seed).values()))

    def arms(self, group: Group, seed: int) -> dict[str, tuple[int, ...]]:
        """Arm → its sites, by the scores that stand in the files."""
        frozen = Group(*group.key[:3])  # scores are of the net at rest
        of = {name: frozen if name in ("scores", "before") else group for name in choosing.SOURCES}
        tables = {name: _of_seed(self.rows(name, own), seed) for name, own in of.items()}
        return choosing.arms(self.sites(group), seed, tables, self._validated(group).get(seed))

    def _validated(self, group: Group) -> dict[int, list[float]]:
        """Seed → by site, validation loss of the site alone, sign changed; seeds of which every site was trained."""
        lr, every = self.attn_lr(group), len(self.sites(group).every)
        found: dict[int, dict[int, float]] = {}
        for r in self.rows("runs", group):
            if r["sites"].isdigit() and float(r["lr"]) == lr:
                found.setdefault(int(r["seed"]), {})[int(r["sites"])] = -float(r["val_loss"])
        return {seed: [of[s] for s in range(every)] for seed, of in found.items() if len(of) == every}

    def bottleneck(self, group: Group) -> None:
        """In place of attention, at the sites that the score chose, at its own tuned rate; all sites, too."""
        control = Group(group.task, group.net, "bottleneck", group.regime)
        self.headroom(control)
        chosen = {s: self.arms(group, s)["score"] for s in self.seeds}
        self.train(control, [Run(seed, sites, self.attn_lr(control)) for seed, sites in chosen.items()])

    def explore(self, group: Group) -> None:
        """Scores at the head that trainings start from."""
        known = {int(r["seed"]) for r in self.rows("kept", group)}
        for seed in (s for s in self.seeds if s not in known):
            self.check_time()
            one = self.seeded(group, seed)
            rows = scoring.scored_at_start(self.chain(group), one.parts["train"], seed, one.head)
            self.add("kept", group, rows)

    def rungs(self, group: Group) -> None:
        """What a search by training sees first: one epoch of every site, two of each seed's better half; curvature."""
        every = range(len(self.chain(group).slots))
        self._rung(group, 1, [(seed, site) for site in every for seed in self.seeds])
        first: dict[int, dict[int, float]] = {seed: {} for seed in self.seeds}
        for r in self.rows("rungs", group):
            if int(r["epochs"]) == 1:
                first[int(r["seed"])][int(r["site"])] = float(r["rung"])
        halves = {seed: choosing.better_half(every, of) for seed, of in first.items()}
        self._rung(group, 2, [(seed, site) for site in every for seed in self.seeds if site in halves[seed]])
        if group.block == "se":
            known = {(int(r["seed"]), int(r["site"])) for r in self.rows("curvature", group)}
            wanted = [(seed, site) for site in every for seed in self.seeds if (seed, site) not in known]
            self._each(group, "curvature", wanted, scoring.curvature)

    def _rung(self, group: Group, epochs: int, wanted: Sequence[tuple[int, int]]) -> None:
        rows = [r for r in self.rows("rungs", group) if int(r["epochs"]) == epochs]
        known = {(int(r["seed"]), int(r["site"])) for r in rows}
        missing = [pair for pair in wanted if pair not in known]
        self._each(group, "rungs", missing, lambda chain, runs, of: scoring.rung(chain, runs, of, epochs))

    def _each(
        self, group: Group, name: str, pairs: Sequence[tuple[int, int]], measure: Callable[..., Iterable[Row]]
    ) -> None:
        """Rows of a file from runs of one site, as many together as there are seeds; pairs: (seed, site)."""
        for i in range(0, len(pairs), len(self.seeds)):
            self.check_time()
            runs = [Run(seed, (site,), self.attn_lr(group)) for seed, site in pairs[i : i + len(self.seeds)]]
            of = [self.seeded(group, r.seed) for r in runs]
            self.add(name, group, measure(self.chain(group), runs, of))

    def null(self, group: Group) -> None:
        """p-values under permuted labels, of the images of the first seed."""
        done = {int(r["seed"]) for r in self.rows("null", group)}
        for number in (n for n in range(PERMUTATIONS) if n not in done):
            self.check_time()
            seed = self.seeds[number % len(self.seeds)]
            ps = scoring.permuted(self.chain(group), self.parts(group, seed)["train"], number)
            self.add("null", group, [{"seed": number, "ps": " ".join(f"{p:.4g}" for p in ps)}])


def _of_seed(rows: Iterable[dict[str, str]], seed: int) -> list[dict[str, str]]:
    return sorted((r for r in rows if int(r["seed"]) == seed), key=lambda r: int(r["site"]))


STEPS: dict[str, Callable[[Study, Group], None]] = {
    "rank": Study.rank,
    "choose": Study.choose,
    "explore": Study.explore,
    "rungs": Study.rungs,
    "headroom": Study.headroom,
    "bottleneck": Study.bottleneck,
    "null": Study.null,
}
