"""`attninject bench finetune` and `attninject bench digits`: the arguments that only they take, and the way in."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .common import positive, say, silent


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of the two, in groups of their own; batch, image, device and compiled are shared."""
    tuned = parser.add_argument_group("finetune: throughput and memory beside plain fine-tuning")
    tuned.add_argument("--model", default="torchvision/resnet50", help="default torchvision/resnet50")
    tuned.add_argument(
        "--recipe", default="cbam_resnet", help="a recipe's name or file (default cbam_resnet)"
    )
    tuned.add_argument("--precision", choices=("no", "bf16", "fp16"), default="no", help="mixed precision")
    tuned.add_argument("--channels-last", action="store_true", help="channels_last memory format")
    digits = parser.add_argument_group("digits: resnet18 with and without attention, several seeds")
    digits.add_argument("--file", type=Path, default=Path("digits.json"), metavar="FILE",
                        help="keeps finished runs; the same command goes on with it (default digits.json)")  # fmt: skip
    digits.add_argument("--seeds", type=positive, default=5, metavar="N", help="seeds (default 5)")
    digits.add_argument(
        "--epochs", type=positive, default=10, metavar="N", help="epochs of fine-tuning (default 10)"
    )


def finetune(args: argparse.Namespace) -> tuple[dict[str, Any], Callable[[Any], str]]:
    """The figures, and what turns them into words."""
    from attninject.bench import finetuning

    task = finetuning.Task(
        model=args.model,
        recipe=args.recipe,
        batch_size=args.batch or (2 if args.quick else 8),
        size=args.image or (64 if args.quick else 96),
        precision=args.precision,
        channels_last=args.channels_last,
        compile=args.compiled,
        device="cpu" if args.device == "cpu" else "auto",
    )
    return finetuning.finetune(task, args.rounds), finetuning.to_markdown


def digits(args: argparse.Namespace) -> tuple[dict[str, Any], Callable[[Any], str]]:
    """The same of the digits; each run is said as it ends, unless only data is wanted."""
    from attninject.bench import digits as nets

    record = nets.run(args.file, args.seeds, args.epochs, say=silent if args.json else say)
    return {**record, "summary": nets.summary(record)}, nets.to_markdown
