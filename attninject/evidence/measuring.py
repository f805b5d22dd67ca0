"""What ranking costs, and whether its p-values hold: `python -m attninject.evidence.measuring time|null`.

`time`: seconds of `rank_sites` over those of one epoch of plain training on the same images, in turns, with the
median of the ratios; of this process's own time on a CPU, which a busy machine does not change.
`null`: p-values where labels know nothing of the images, which should be uniform.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attninject import models

from . import head as heads
from .rank import rank_sites


def time_ratio(
    name: str = "timm/tf_efficientnet_lite0",
    images: int = 256,
    size: int = 160,
    repeats: int = 3,
    **rule: Any,
) -> dict[str, Any]:
    """Seconds of ranking and of an epoch of training, per repeat, and the median of their ratios.

    The head is fitted, which costs a forward pass more than one that is kept. Planning and injection count too.
    """
    rule = rule or {"block": "se", "place": "residual_branch"}
    model = models.build(name, num_classes=10)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(images, 3, size, size, generator=generator)
    y = torch.randint(10, (images,), generator=generator)
    ranked, trained, sites = [], [], 0
    for _ in range(repeats):
        trained.append(_seconds(lambda: _epoch(model, x, y)))
        started = _clock()
        sites = len(rank_sites(model, data=(x, y), images=images, head="fit", **rule).sites)
        ranked.append(_clock() - started)
    ratios = [r / t for r, t in zip(ranked, trained, strict=True)]
    return {
        "model": name, "images": images, "size": size, "rule": rule, "sites": sites,
        "ranking": ranked, "training": trained, "ratio": statistics.median(ratios),
    }  # fmt: skip


def _clock() -> float:
    """Seconds of all threads of this process: every model here runs on the CPU."""
    return time.process_time()


def _seconds(work: Callable[[], object]) -> float:
    started = _clock()
    work()
    return _clock() - started


def _epoch(model: nn.Module, x: Tensor, y: Tensor, batch_size: int = 32) -> None:
    """One epoch of plain fine-tuning by SGD, on all parameters."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    for images, labels in zip(x.split(batch_size), y.split(batch_size), strict=True):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()


def null_p_values(
    nets: int = 100, images: int = 128, head: str = "fit", block: str = "se", features: int = 16,
    penalty: float | None = None,
) -> dict[str, Any]:  # fmt: skip
    """p-values of one site per random net on random images and labels: shares below 5, 20, 50 %, and the KS distance.

    features: what the head is given, so that a fold may have fewer images; penalty: of the fitted head, None: the best.
    """
    found = []
    for seed in range(nets):
        generator = torch.Generator().manual_seed(1000 + seed)
        x = torch.randn(images, 3, 16, 16, generator=generator)
        y = torch.randint(4, (images,), generator=generator)
        with _penalty(penalty):
            r = rank_sites(
                _random_net(seed, features),
                data=(x, y),
                images=images,
                head=head,
                seed=seed,
                block=block,
                after="re:(1|3|6|8)",
            )
        found.append(next(s.p for s in r.sites if s.number == seed % 4))
    return {
        "nets": nets, "images": images, "head": head, "block": block, "features": features, "penalty": penalty,
        "below": {level: sum(p < level for p in found) / nets for level in (0.05, 0.2, 0.5)},
        "distance": kolmogorov(found), "critical_5_percent": 1.358 / nets**0.5,
    }  # fmt: skip


def kolmogorov(values: Sequence[float]) -> float:
    """The largest distance of the empirical distribution of values in [0, 1] from the uniform one.

    >>> kolmogorov([0.25, 0.75])
    0.25
    """
    n = len(values)
    return max(max((i + 1) / n - v, v - i / n) for i, v in enumerate(sorted(values)))


@contextlib.contextmanager
def _penalty(alone: float | None) -> Iterator[None]:
    """The head's penalties, for a while."""
    kept = heads.PENALTIES
    heads.PENALTIES = kept if alone is None else (alone,)
    try:
        yield
    finally:
        heads.PENALTIES = kept


def _random_net(seed: int, features: int = 16, width: int = 16) -> nn.Module:
    """Four 3×3 convolutions, two poolings, one more where there are more features, and a head; with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for depth, channels in enumerate((3, width, width, width)):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            if depth % 2:
                layers.append(nn.MaxPool2d(2))
        if features != width:
            layers += [nn.Conv2d(width, features, 1), nn.ReLU()]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(features, 4)).eval()


def main() -> None:
    """Print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("time", "null"))
    parser.add_argument("--model", default="timm/tf_efficientnet_lite0")
    parser.add_argument("--images", type=int, default=None)
    parser.add_argument("--size", type=int, default=160)
    parser.add_argument("--block", default="se")
    parser.add_argument("--place", default="residual_branch")
    parser.add_argument("--head", default="fit", choices=("fit", "keep"))
    parser.add_argument("--nets", type=int, default=100)
    parser.add_argument("--features", type=int, default=16, help="what the head is given (null)")
    parser.add_argument("--penalty", type=float, default=None, help="of the fitted head (null)")
    args = parser.parse_args()
    if args.what == "time":
        found = time_ratio(args.model, args.images or 256, args.size, block=args.block, place=args.place)
    else:
        found = null_p_values(
            args.nets, args.images or 128, args.head, args.block, args.features, args.penalty
        )
    for key, value in found.items():
        print(f"{key}: {value}")


if __name__ == "__main__":
    main()
