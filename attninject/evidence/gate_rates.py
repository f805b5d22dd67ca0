"""At which rate should blocks that begin as the identity learn? `python -m attninject.evidence.gate_rates`.

Short fine-tunings at one rate of the backbone and one of the head, with the blocks' rate 1, 3, 10, 30 and 100 times
the backbone's: how far the gates move, the accuracy, and what the blocks are worth at the end, which is accuracy less
that with them switched off. Beside each, the same without blocks.

`ours` is timm's resnet10t, trained here for a minute on the letters K to Z on photographs (`source_net`); `lite0` is
EfficientNet-Lite0 with packaged ImageNet weights. Training and test images share neither digit nor photograph.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from attninject import api, models
from attninject.training.callbacks import printed
from attninject.training.engine import finetune

from . import source_net
from .samples import Samples
from .tasks import digits_on_photos
from .tasks.drawn_letters import FONT_FOLDERS, fonts_by_maker
from .tasks.photographs import scikit_learns

RATIOS = (1, 3, 10, 30, 100)
CLASSES = tuple("0123456789")


@dataclass(frozen=True)
class Cell:
    """What is the same for all ratios: net, task, block (None: plain), what is frozen, optimizer and rate."""

    net: str = "ours"
    task: str = "digits"
    block: str | None = "se"
    freeze: str | None = "backbone"
    optimizer: str = "adamw"
    lr: float = 1e-4
    head_lr: float = 1e-3
    images: int = 400
    epochs: int = 8


def measured(cell: Cell, ratio: float, seed: int) -> dict[str, float]:
    """One fine-tuning: top-1 on the test images, the same without blocks, and mean |gate − 1| over the blocks."""
    size = {"ours": 16, "lite0": 64}[cell.net]
    train, test = TASKS[cell.task](seed, size, cell.images)
    torch.manual_seed(seed)
    model = NETS[cell.net]()
    if cell.block is not None:
        api.inject(model, block=cell.block, place="residual_branch")
    with printed(quiet=True):
        result = finetune(
            model, (_data_set(train), _data_set(test)), epochs=cell.epochs, batch_size=32, lr=cell.lr,
            attn_lr=cell.lr * ratio, head_lr=cell.head_lr, freeze=cell.freeze, optimizer=cell.optimizer, seed=seed,
            log_every=10**6,
        )  # fmt: skip
    last = result.history[-1]
    moved = [value for key, value in last.items() if key.startswith("moved.")]
    with api.disabled(model):
        without = source_net.accuracy(model, test)
    return {"top1": last["top1"], "without": without, "moved": statistics.mean(moved) if moved else 0.0}


def table(cells: Sequence[Cell], ratios: Sequence[float], seeds: int) -> Iterator[dict[str, Any]]:
    """Rows as they are done: a cell's settings and ratio, means over seeds, and the seconds of this process."""
    for cell in cells:
        for ratio in ratios if cell.block is not None else (1.0,):
            began = time.process_time()
            runs = [measured(cell, ratio, seed) for seed in range(seeds)]
            top1 = [run["top1"] for run in runs]
            yield {
                **asdict(cell), "ratio": ratio, "seeds": seeds,
                "top1": statistics.mean(top1), "sd": statistics.stdev(top1) if seeds > 1 else 0.0,
                "worth": statistics.mean(run["top1"] - run["without"] for run in runs),
                "moved": statistics.mean(run["moved"] for run in runs),
                "seconds": time.process_time() - began,
            }  # fmt: skip


# --- nets and images ---------------------------------------------------------------------------


def _ours() -> nn.Module:
    model = models.build("timm/resnet10t", num_classes=10)
    state = model.state_dict()
    state.update({k: v for k, v in _trained().items() if not k.startswith("fc.")})
    model.load_state_dict(state)
    return model


@cache
def _trained() -> Mapping[str, Tensor]:
    """resnet10t after 200 batches of 64 letters on photographs, 16 pixels."""
    torch.manual_seed(0)
    model = models.build("timm/resnet10t", num_classes=len(source_net.LETTERS)).train()
    fonts = list(fonts_by_maker(FONT_FOLDERS, source_net.LETTERS).values())
    photos = [p[:, :, : p.shape[2] * 2 // 3] for p in scikit_learns().values()]
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 200)
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        drawn = source_net.images(fonts, photos, 64, generator)
        loss = F.cross_entropy(model(F.avg_pool2d(drawn.images, 4)), drawn.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


NETS: dict[str, Callable[[], nn.Module]] = {
    "ours": _ours,
    "lite0": lambda: models.build("timm/tf_efficientnet_lite0", "package", num_classes=10),
}


def _digits(seed: int, size: int, images: int) -> tuple[Samples, Samples]:
    from sklearn.datasets import load_digits

    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(seed))
    small = torch.from_numpy(found.images).float()[order, None].expand(-1, 3, -1, -1) / 8 - 1
    x = F.interpolate(small, size=(size, size), mode="bilinear", align_corners=False)
    y = torch.from_numpy(found.target).long()[order]
    return Samples(x[:images], y[:images]), Samples(x[-200:], y[-200:])


def _on_photos(seed: int, size: int, images: int) -> tuple[Samples, Samples]:
    task = digits_on_photos(seed, size, images, 200).normalised(source_net.MEAN, source_net.STD)
    return task.train, task.test


TASKS: dict[str, Callable[[int, int, int], tuple[Samples, Samples]]] = {
    "digits": _digits,
    "digits_on_photos": _on_photos,
}


def _data_set(samples: Samples) -> TensorDataset:
    made = TensorDataset(samples.images, samples.labels)
    made.classes = CLASSES  # type: ignore[attr-defined]
    return made


# --- the table ---------------------------------------------------------------------------------


def main() -> None:
    """Print a Markdown table, row by row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--net", nargs="+", default=["ours"], choices=tuple(NETS))
    parser.add_argument("--task", nargs="+", default=list(TASKS), choices=tuple(TASKS))
    parser.add_argument("--block", nargs="+", default=["none", "se", "cbam"])
    parser.add_argument("--freeze", nargs="+", default=["backbone", "none"])
    parser.add_argument("--optimizer", default="adamw")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--head-lr", type=float, default=1e-3)
    parser.add_argument("--ratio", type=float, nargs="+", default=list(RATIOS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--epochs", type=int, default=8)
    args = parser.parse_args()
    torch.set_num_threads(1)
    cells = [
        Cell(net, task, _or_none(block), _or_none(freeze), args.optimizer, args.lr, args.head_lr,
             args.images, args.epochs)
        for net in args.net for task in args.task for freeze in args.freeze for block in args.block
    ]  # fmt: skip
    print("| net | task | frozen | block | attn_lr / lr | top-1 | sd | worth of the blocks | moved | s |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for row in table(cells, args.ratio, args.seeds):
        print(
            f"| {row['net']} | {row['task']} | {row['freeze'] or '–'} | {row['block'] or 'plain'} | "
            f"{row['ratio']:g} | {row['top1']:.1%} | {row['sd']:.1%} | {row['worth']:+.1%} | {row['moved']:.3f} | "
            f"{row['seconds']:.0f} |",
            flush=True,
        )


def _or_none(word: str) -> str | None:
    return None if word == "none" else word


if __name__ == "__main__":
    main()
