"""Scores of all sites from the training images of one seed: by methods that do not train, and by two that do."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

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


def rung(chain: Chain, runs: Sequence[Run], of: Sequence[Seeded], epochs: int) -> Iterator[Row]:
    """One row per run of one site: the validation loss after some epochs, sign changed; cosine over these."""
    began = time.process_time()
    together = Together(chain, runs, of)
    together.train(epochs=epochs)
    losses = together.judged("val")[0]
    seconds = (time.process_time() - began) / len(runs)
    for run, loss in zip(runs, losses.tolist(), strict=True):
        yield {"seed": run.seed, "site": run.sites[0], "epochs": epochs, "rung": -loss, "seconds": seconds}


FIRST_ORDER = 0.01
"""Of the loss: what the step of the differences in `curvature` would take off, were the loss straight."""


def curvature(chain: Chain, runs: Sequence[Run], of: Sequence[Seeded]) -> Iterator[Row]:
    """One row per run of one site: the lowest point of the parabola along −ḡ, as a drop of the training loss.

    ḡ is the mean gradient at what is zero, the head is held. slope² / (2 · curvature), both by central differences of
    the loss L at θ = ∓ t ḡ; at most L(0), which stands where the loss bends down.
    """
    began = time.process_time()
    together = Together(chain, runs, of)
    zeros = [
        [p for p in own[run.sites[0]].eval().parameters() if not p.detach().any()]
        for run, own in zip(runs, together.blocks, strict=True)
    ]
    here, gradients = together.gradients(zeros)
    slopes = torch.tensor([sum(float(g.square().sum()) for g in of_run) for of_run in gradients])
    steps = FIRST_ORDER * here / slopes.clamp_min(1e-20)
    ahead, behind = (_moved(together, zeros, gradients, sign * steps) for sign in (-1, 1))
    slope, bend = (behind - ahead) / (2 * steps), (ahead + behind - 2 * here) / steps**2
    drop = torch.where(bend > 0, slope**2 / (2 * bend), here).minimum(here)
    seconds = (time.process_time() - began) / len(runs)
    for run, value in zip(runs, torch.where(slopes > 0, drop, 0 * drop).tolist(), strict=True):
        yield {"seed": run.seed, "site": run.sites[0], "curvature": value, "seconds": seconds}


@torch.no_grad()
def _moved(
    together: Together,
    zeros: Sequence[Sequence[nn.Parameter]],
    gradients: Sequence[Sequence[Tensor]],
    steps: Tensor,
) -> Tensor:
    """(runs,): the training loss at θ = step · ḡ."""
    for parameters, of_run, step in zip(zeros, gradients, steps.tolist(), strict=True):
        for p, g in zip(parameters, of_run, strict=True):
            p.copy_(step * g)
    return together.judged("train")[0]
