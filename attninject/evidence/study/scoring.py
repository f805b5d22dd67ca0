"""Scores of all sites from the training images of one seed: by methods that do not train, and by two that do."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from attninject.evidence import rank
from attninject.evidence.samples import Samples

from .design import BATCH, Run
from .nets import Chain
from .store import SCORES
from .training import Head, Seeded, Together

Row = dict[str, object]


def scored(chain: Chain, samples: Samples, seed: int) -> list[Row]:
    """One row per site: the score by each method, the place in the order of forward selection, p, seconds.

    One measurement serves all methods. The head is fitted anew, by cross-fitting, as `rank_sites` does.
    """
    return _scored(chain.model, chain, samples, seed, "fit")


def scored_at_start(chain: Chain, samples: Samples, seed: int, head: Head) -> list[Row]:
    """The same at the head that trainings start from, fitted on the very images that the gradients come from."""
    model = copy.deepcopy(chain.model)
    layer = model.get_classifier()  # type: ignore[operator]
    weight = head.weight / head.scale
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.bias = nn.Parameter(head.bias - weight @ head.mean, requires_grad=False)
    return _scored(model, chain, samples, seed, "keep")


def _scored(model: nn.Module, chain: Chain, samples: Samples, seed: int, head: str) -> list[Row]:
    began = time.process_time()
    data = (samples.images, samples.labels)
    methods = tuple(m for m in SCORES if m != "drop")
    found = rank.rankings(
        model, chain.plan, data, methods=methods, images=len(samples), batch_size=BATCH, head=head, seed=seed
    )  # fmt: skip
    seconds = (time.process_time() - began) / len(chain.slots)
    first = found["score"]
    order = {first.sites[i].number: place for place, i in enumerate(first.order)}
    by_site = {m: {row.number: row for row in ranking.sites} for m, ranking in found.items()}
    return [
        {
            "seed": seed, "site": s, **{m: by_site[m][s].score for m in methods}, "drop": by_site["score"][s].drop,
            "order": order[s], "p": by_site["score"][s].p, "seconds": seconds,
        }
        for s in range(len(chain.slots))
    ]  # fmt: skip


def permuted(chain: Chain, samples: Samples, seed: int) -> list[float]:
    """p of each site where the training labels are permuted."""
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(7000 + seed))
    mixed = samples.images, samples.labels[order]
    found = rank.rankings(
        chain.model, chain.plan, mixed, methods=["score"], images=len(samples), batch_size=BATCH, head="fit", seed=seed
    )  # fmt: skip
    return [row.p for row in sorted(found["score"].sites, key=lambda row: row.number)]


def by_training(chain: Chain, runs: Sequence[Run], of: Sequence[Seeded], whole: Together) -> Iterator[Row]:
    """One row per seed and site: two scores that need blocks at all sites, trained together.

    `warmup`: how far a block moves its input, relative to its norm, after one epoch of all blocks alone, the head held.
    `ablation`: what the loss on validation images rises by if the block is switched off in the trained net `whole`.
    """
    began = time.process_time()
    before = whole.judged("val")[0]
    ablation = torch.stack([whole.without(s, "val") - before for s in range(len(chain.slots))], 1)
    early = Together(chain, runs, of)
    early.train(epochs=1, head_lr=0.0)
    warmup = early.movement("train")
    seconds = (time.process_time() - began) / warmup.numel()
    for r, run in enumerate(runs):
        for s in range(len(chain.slots)):
            yield {
                "seed": run.seed, "site": s, "warmup": float(warmup[r, s]), "ablation": float(ablation[r, s]),
                "seconds": seconds,
            }  # fmt: skip


def first_rung(chain: Chain, runs: Sequence[Run], of: Sequence[Seeded]) -> Iterator[Row]:
    """One row per run of one site: `rung`, the validation loss after one epoch, sign changed; cosine over that epoch."""
    began = time.process_time()
    together = Together(chain, runs, of)
    together.train(epochs=1)
    losses = together.judged("val")[0]
    seconds = (time.process_time() - began) / len(runs)
    for run, loss in zip(runs, losses.tolist(), strict=True):
        yield {"seed": run.seed, "site": run.sites[0], "rung": -loss, "seconds": seconds}
