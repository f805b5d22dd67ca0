"""Training with a frozen backbone: several runs in one batch, each with its own blocks, head and images.

All runs start from the head that was fitted with a penalty, and keep the penalty: so plain training stays where it is
unless there is something to gain, and what a block gains is not what an overfitted head loses.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attninject.evidence import head as heads

from .design import BACKBONE_LR, BATCH, EPOCHS, HEAD_LR, Run
from .nets import Chain
from .splits import Parts


class Head:
    """The fitted head: logits of features (φ − mean) / scale; weight (C, d) and bias (C,), penalty α."""

    def __init__(self, features: Tensor, labels: Tensor, seed: int, classes: int) -> None:
        folds = heads.divided(labels, 2, torch.Generator().manual_seed(seed))
        fit = heads.penalised(features, labels, folds)
        missing = classes - len(fit.weight)  # a class that this split has no training image of
        self.weight = F.pad(fit.weight, (0, 0, 0, missing)).float()
        self.bias = F.pad(fit.bias, (0, missing), value=-10.0).float()
        self.mean, self.scale, self.penalty = fit.mean.float(), fit.scale.float(), fit.penalty


@dataclass(frozen=True)
class Seeded:
    """What a seed gives: images, what every unit is given for each of them, the head, and fresh blocks."""

    parts: Parts
    inputs: dict[str, list[Tensor]]
    head: Head
    blocks: list[nn.Module]


def seeded(chain: Chain, parts: Parts, seed: int) -> Seeded:
    """Everything that the runs of one seed share."""
    inputs = {name: chain.inputs(part.images) for name, part in parts.items()}
    with torch.no_grad():
        features = torch.cat([chain.leave(x) for x in inputs["train"][-1].split(64)])
    classes = max(part.classes for part in parts.values())
    return Seeded(parts, inputs, Head(features, parts["train"].labels, seed, classes), chain.blocks(seed))


@dataclass(frozen=True)
class Outcome:
    """Of one run: loss and accuracy by part, the mean movement of its blocks, and seconds of this process."""

    loss: dict[str, float]
    accuracy: dict[str, float]
    moved: float
    seconds: float


class Together:
    """Some runs trained in one batch; all of one group, so that their images are equally many."""

    def __init__(self, chain: Chain, runs: Sequence[Run], of: Sequence[Seeded]) -> None:
        """`of`: what each run's seed gives."""
        self.chain, self.runs, self.of = chain, runs, of
        self.blocks = [
            {s: copy.deepcopy(o.blocks[s]).train() for s in r.sites} for r, o in zip(runs, of, strict=True)
        ]
        for site, slot in enumerate(chain.slots):
            slot.blocks = [own.get(site) for own in self.blocks]
        self.start = min((chain.unit_of[s] for r in runs for s in r.sites), default=len(chain.units))
        self.weight = torch.stack([o.head.weight for o in of]).requires_grad_()
        self.bias = torch.stack([o.head.bias for o in of])[:, None].requires_grad_()
        self.mean = torch.stack([o.head.mean for o in of])[:, None]
        self.scale = torch.stack([o.head.scale for o in of])[:, None, None]
        self.penalty = torch.tensor([o.head.penalty for o in of])

    def logits(self, part: str, at: Sequence[Tensor]) -> Tensor:
        """(runs, B, C) of the images of a part, B for each run."""
        x = torch.cat([o.inputs[part][self.start][i] for o, i in zip(self.of, at, strict=True)])
        features = self.chain.features(x, self.start).view(len(self.runs), -1, self.mean.shape[-1])
        return (features - self.mean) / self.scale @ self.weight.mT + self.bias

    def loss(self, at: Sequence[Tensor]) -> Tensor:
        """The sum over runs of mean cross-entropy and penalty."""
        labels = torch.stack([o.parts["train"].labels[i] for o, i in zip(self.of, at, strict=True)])
        entropy = F.cross_entropy(self.logits("train", at).transpose(1, 2), labels, reduction="none").mean(1)
        return (entropy + self.penalty / 2 * self.weight.square().sum((1, 2))).sum()

    def learning(self) -> list[dict[str, Any]]:
        """Groups of parameters beside the heads, for the optimizer."""
        return [
            {"params": [p for b in own.values() for p in b.parameters()], "lr": r.lr}
            for own, r in zip(self.blocks, self.runs, strict=True)
            if own
        ]

    def train(self, epochs: int | None = None, head_lr: float = HEAD_LR) -> None:
        """Adam with a cosine to zero; each run in the order of its own seed."""
        epochs, size = epochs or EPOCHS, len(self.of[0].parts["train"])
        adam = torch.optim.Adam([*self.learning(), {"params": [self.weight, self.bias], "lr": head_lr}])
        steps = epochs * (size // BATCH)
        cosine = torch.optim.lr_scheduler.LambdaLR(adam, lambda k: 0.5 * (1 + math.cos(math.pi * k / steps)))
        for epoch in range(epochs):
            orders = [torch.randperm(size, generator=_drawn(r.seed, epoch)) for r in self.runs]
            for batch in zip(*(o.split(BATCH) for o in orders), strict=True):
                adam.zero_grad()
                self.loss(batch).backward()
                adam.step()
                cosine.step()
        for own in self.blocks:
            for block in own.values():
                block.eval()

    @torch.no_grad()
    def judged(self, part: str) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy and accuracy of each run on a part: (runs,) each."""
        samples = [o.parts[part] for o in self.of]
        found = []
        for at in torch.arange(len(samples[0])).split(32):
            found.append(self.logits(part, [at] * len(samples)))
        logits, labels = torch.cat(found, 1), torch.stack([s.labels for s in samples])
        entropy = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none").mean(1)
        return entropy, (logits.argmax(2) == labels).float().mean(1)

    def gradients(self, parameters: Sequence[Sequence[nn.Parameter]]) -> tuple[Tensor, list[list[Tensor]]]:
        """Mean cross-entropy on the training images (runs,), and its gradient at each run's parameters."""
        labels = torch.stack([o.parts["train"].labels for o in self.of])
        flat, total = [p for own in parameters for p in own], torch.zeros(len(self.runs))
        found = [torch.zeros_like(p) for p in flat]
        for at in torch.arange(labels.shape[1]).split(BATCH):
            logits = self.logits("train", [at] * len(self.of)).transpose(1, 2)
            entropy = F.cross_entropy(logits, labels[:, at], reduction="none").sum(1) / labels.shape[1]
            total += entropy.detach()
            for sum_, g in zip(found, torch.autograd.grad(entropy.sum(), flat), strict=True):
                sum_ += g
        rest = iter(found)
        return total, [[next(rest) for _ in own] for own in parameters]

    def movement(self, part: str) -> Tensor:
        """(runs, sites): ‖y − x‖ / ‖x‖ at each site, mean over a part's images; 0 where a run has no block."""
        for slot in self.chain.slots:
            slot.watch(True)
        self.judged(part)
        found = torch.zeros(len(self.runs), len(self.chain.slots))
        for s, slot in enumerate(self.chain.slots):
            for r, seen in enumerate(slot.moved):
                found[r, s] = float(torch.cat(seen).mean()) if seen else 0.0
            slot.watch(False)
        return found

    @torch.no_grad()
    def without(self, site: int, part: str) -> Tensor:
        """(runs,): cross-entropy on a part with the blocks of one site switched off."""
        slot = self.chain.slots[site]
        kept, slot.blocks = slot.blocks, [None] * len(self.runs)
        try:
            return self.judged(part)[0]
        finally:
            slot.blocks = kept


def _drawn(seed: int, epoch: int) -> torch.Generator:
    return torch.Generator().manual_seed(1000 * seed + epoch)


class Whole(Together):
    """One run in which the backbone learns too; its batch norms keep their statistics."""

    def __init__(self, chain: Chain, runs: Sequence[Run], of: Sequence[Seeded]) -> None:
        super().__init__(copy.deepcopy(chain), runs, of)
        parts = [self.chain.net.get_submodule(n) for n in ("conv_stem", "bn1", "blocks", "conv_head", "bn2")]
        own = {id(p) for b in self.blocks for block in b.values() for p in block.parameters()}
        self.backbone = [p for part in parts for p in part.parameters() if id(p) not in own]
        for p in self.backbone:
            p.requires_grad_(True)

    def learning(self) -> list[dict[str, Any]]:
        """The backbone's parameters too."""
        return [*super().learning(), {"params": self.backbone, "lr": BACKBONE_LR}]

    def logits(self, part: str, at: Sequence[Tensor]) -> Tensor:
        """(1, B, C), from the images."""
        (one,), (index,) = self.of, at
        features = self.chain.features(self.chain.enter(one.parts[part].images[index]), 0)[None]
        return (features - self.mean) / self.scale @ self.weight.mT + self.bias


def trained(
    chain: Chain, runs: Sequence[Run], of: Sequence[Seeded], kind: type[Together] = Together
) -> list[Outcome]:
    """Train some runs together and look at each: outcomes in the order of the runs."""
    began = time.process_time()
    together = kind(chain, runs, of)
    together.train()
    seconds = (time.process_time() - began) / len(runs)
    moved = together.movement("val")
    parts = {name: together.judged(name) for name in ("val", "test")}
    outcomes = []
    for i, run in enumerate(runs):
        loss = {name: float(entropy[i]) for name, (entropy, _) in parts.items()}
        accuracy = {name: float(right[i]) for name, (_, right) in parts.items()}
        mean = float(moved[i, list(run.sites)].mean()) if run.sites else 0.0
        outcomes.append(Outcome(loss, accuracy, mean, seconds))
    return outcomes
