"""The demo: attention in a small pretrained resnet, on real images, offline, in a minute or two.

A torchvision resnet18 is trained on one part of scikit-learn's handwritten digits and stands for the
pretrained backbone. CBAM goes into it; the logits and the accuracy before any training are measured
and compared with the backbone's. Then the backbone and the backbone with attention are fine-tuned on
another part, with the same images in the same order for the same number of epochs, and tested on a
third part that neither has seen.

With `pretrained` the backbone is EfficientNet-Lite0 with real ImageNet weights, out of an installed package, under a
new head; the images are the digits on crops of scikit-learn's photographs.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from attninject import api, models
from attninject.errors import AttnInjectError

PRETRAIN, FINETUNE = 400, 697  # images; the other 700 of the 1,797 are the test split
PRETRAINED_FINETUNE, PRETRAINED_TEST, PRETRAINED_SIZE = 600, 500, 64
PRETRAIN_EPOCHS = 4
BATCH = 32
LEARNING_RATE = {"pretrain": 0.02, "finetune": 0.01}


class DemoNeedsPackage(AttnInjectError, ImportError):
    """The demo's own requirements are not installed."""


@dataclass(frozen=True)
class Digits:
    """Three parts of the digits, images (N, 1, 16, 16) or (N, 3, 64, 64) and labels (N,)."""

    pretrain: tuple[torch.Tensor, torch.Tensor]
    finetune: tuple[torch.Tensor, torch.Tensor]
    test: tuple[torch.Tensor, torch.Tensor]


def run(
    epochs: int = 4, seed: int = 0, say: Callable[[object], None] = print, pretrained: bool = False
) -> dict[str, Any]:
    """Run the demo; `say` prints, the returned dictionary holds every figure.

    Raises:
        DemoNeedsPackage, MissingPackageError: what to install.
    """
    tqdm = _tqdm()
    began = time.perf_counter()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if pretrained:
            backbone, digits = lite0(), load_digits_on_photos(seed)
            say("1. EfficientNet-Lite0 with ImageNet weights, and a new head for ten digits on photographs.")
        else:
            digits = load_digits(seed)
            say(f"1. A torchvision resnet18 learns {PRETRAIN} handwritten digits: the pretrained backbone.")
            backbone = small_resnet()
            train(backbone, digits.pretrain, PRETRAIN_EPOCHS, "pretrain", seed, tqdm)

        say("\n2. The plan for CBAM on every residual branch:\n")
        attentive = copy.deepcopy(backbone)
        plan = api.plan(attentive, block="cbam", place="residual_branch", example_inputs=digits.test[0][:2])
        say(plan)
        api.inject(attentive, plan)

        say("\n3. Before any training, backbone against backbone with CBAM:")
        step_zero = compare(backbone, attentive, digits.test[0], digits.test[1])
        say(_step_zero_text(step_zero))

        count = len(digits.finetune[1])
        say(f"\n4. Both are fine-tuned on the same {count} digits, {epochs} epochs, the same batches:")
        rows = [_row("backbone, not fine-tuned", backbone, digits, 0.0, 0)]
        plain = copy.deepcopy(backbone)
        for name, model in (("fine-tuned, plain", plain), ("fine-tuned, with CBAM", attentive)):
            seconds = train(model, digits.finetune, epochs, name, seed + 1, tqdm)
            rows.append(_row(name, model, digits, seconds, epochs * (count // BATCH) * BATCH))
    result = {
        "seed": seed,
        "epochs": epochs,
        "images": {"pretrain": len(digits.pretrain[1]), "finetune": count, "test": len(digits.test[1])},
        "plan": plan.to_dict(),
        "step_zero": step_zero,
        "table": rows,
        "seconds": round(time.perf_counter() - began, 1),
    }
    say("\n" + table(rows))
    say("\n" + verdict(result))
    return result


# --- parts --------------------------------------------------------------------------------------


def load_digits(seed: int) -> Digits:
    """Scikit-learn's 1,797 digits, scaled to [0, 1], enlarged to 16×16, shuffled and cut in three."""
    try:
        from sklearn import datasets
    except ImportError as error:
        raise _needs("scikit-learn") from error
    raw = datasets.load_digits()
    images = torch.tensor(raw.images, dtype=torch.float32).unsqueeze(1) / 16
    images = functional.interpolate(images, size=(16, 16), mode="bilinear", align_corners=False)
    labels = torch.tensor(raw.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    cuts = torch.tensor_split(order, (PRETRAIN, PRETRAIN + FINETUNE))
    first, second, third = ((images[cut], labels[cut]) for cut in cuts)
    return Digits(first, second, third)


def load_digits_on_photos(seed: int) -> Digits:
    """Digits in ink on crops of photographs, 64×64 in [−1, 1], none for pretraining; test photographs are others."""
    from attninject.evidence.tasks import digits_on_photos

    task = digits_on_photos(seed, PRETRAINED_SIZE, PRETRAINED_FINETUNE, PRETRAINED_TEST)
    task = task.normalised((0.5,) * 3, (0.5,) * 3)  # as EfficientNet-Lite was trained
    train, test = ((part.images, part.labels) for part in (task.train, task.test))
    return Digits((train[0][:0], train[1][:0]), train, test)


def lite0() -> nn.Module:
    """EfficientNet-Lite0 with the ImageNet weights of an installed package, and a random head for ten classes.

    Raises:
        DemoNeedsPackage: timm is not installed.
        MissingPackageError: the package of weights is not.
    """
    try:
        return models.build("timm/tf_efficientnet_lite0", "package", num_classes=10)
    except ModuleNotFoundError as error:
        if error.name != "timm":
            raise
        raise DemoNeedsPackage("the demo with --pretrained needs timm: pip install timm") from error


def small_resnet() -> nn.Module:
    """Torchvision's resnet18 for ten classes with the usual stem for small images: 3×3, no pooling."""
    from torchvision.models import resnet18

    model = resnet18(num_classes=10)
    model.conv1 = nn.Conv2d(1, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    made: nn.Module = model
    return made


def train(
    model: nn.Module, data: tuple[torch.Tensor, torch.Tensor], epochs: int, stage: str, seed: int, tqdm: Any
) -> float:
    """Train with SGD and a cosine schedule; the same seed gives the same batches. Returns seconds."""
    images, labels = data
    began = time.perf_counter()
    rate = LEARNING_RATE["pretrain" if stage == "pretrain" else "finetune"]
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, nesterov=True, weight_decay=5e-4)
    steps = epochs * (len(labels) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    model.train()
    with tqdm(
        total=steps, desc=f"   {stage:<22}", unit="step", disable=None
    ) as bar:  # a bar in a terminal alone
        for batch in _batches(len(labels), epochs, seed):
            loss = functional.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.set_postfix(loss=f"{loss.item():.3f}")
            bar.update()
    model.eval()
    return time.perf_counter() - began


def _batches(count: int, epochs: int, seed: int) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = torch.randperm(count, generator=generator)
        yield from order[: count - count % BATCH].split(BATCH)


@torch.no_grad()
def logits_of(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Logits (N, 10) in eval mode, a hundred images at a time."""
    model.eval()
    return torch.cat([model(part) for part in images.split(100)])


def accuracy(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """The fraction of right answers."""
    return (logits.argmax(1) == labels).double().mean().item()


def compare(
    before: nn.Module, after: nn.Module, images: torch.Tensor, labels: torch.Tensor
) -> dict[str, Any]:
    """Run both and compare the logits bit by bit."""
    old, new = logits_of(before, images), logits_of(after, images)
    return {
        "logits": old.numel(),
        "bit_identical": torch.equal(old.view(torch.int32), new.view(torch.int32)),
        "largest_difference": (old - new).abs().max().item(),
        "accuracy_before": accuracy(old, labels),
        "accuracy_after": accuracy(new, labels),
    }


def _row(name: str, model: nn.Module, digits: Digits, seconds: float, seen: int) -> dict[str, Any]:
    images, labels = digits.test
    logits = logits_of(model, images)
    return {
        "name": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "images_seen": seen,
        "seconds": round(seconds, 1),
        "test_accuracy": accuracy(logits, labels),
        "test_errors": int((logits.argmax(1) != labels).sum()),
        "test_loss": functional.cross_entropy(logits, labels).item(),
    }


# --- words --------------------------------------------------------------------------------------


def _step_zero_text(found: dict[str, Any]) -> str:
    same = (
        "bit-identical"
        if found["bit_identical"]
        else f"NOT identical, by up to {found['largest_difference']:.3g}"
    )
    return (
        f"   {found['logits']:,} logits on the test split: {same}\n"
        f"   test accuracy: {found['accuracy_before']:.2%} before injection, "
        f"{found['accuracy_after']:.2%} after"
    )


def table(rows: list[dict[str, Any]]) -> str:
    """The table of results, one line per network."""
    lines = [
        f"{'network':<26}{'parameters':>12}{'images':>8}{'time':>8}{'test accuracy':>15}{'test loss':>11}"
    ]
    for row in rows:
        lines.append(
            f"{row['name']:<26}{row['parameters']:>12,}{row['images_seen']:>8,}{row['seconds']:>7.1f}s"
            f"{row['test_accuracy']:>15.2%}{row['test_loss']:>11.4f}"
        )
    return "\n".join(lines)


def verdict(result: dict[str, Any]) -> str:
    """What the table says, and how much noise is in it."""
    _, plain, attentive = result["table"]
    count = result["images"]["test"]
    difference = plain["test_errors"] - attentive["test_errors"]
    # a paired difference of two error counts: its variance is at most the number of errors of both
    noise = math.sqrt(max(1, plain["test_errors"] + attentive["test_errors"]))
    word = {0: "as many errors as", 1: "fewer errors than", -1: "more errors than"}[
        (difference > 0) - (difference < 0)
    ]
    size = "within" if abs(difference) <= 2 * noise else "beyond"
    return (
        f"With CBAM: {attentive['test_errors']} errors on {count} test images, {word} plain fine-tuning "
        f"({plain['test_errors']}).\nOne seed, one small data set: the difference is {size} what chance "
        f"alone gives (two standard errors: {2 * noise:.0f} images).\nWhole demo: {result['seconds']:.0f} s."
    )


# --- requirements -------------------------------------------------------------------------------


def _tqdm() -> Any:
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise _needs("tqdm") from error
    return tqdm


def _needs(package: str) -> DemoNeedsPackage:
    return DemoNeedsPackage(
        f'the demo needs {package}, which is not installed: pip install "attninject[demo]"'
    )
