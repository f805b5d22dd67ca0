"""Measure attninject's own cost on this machine, as ratios taken side by side in one process.

`inject`: injection beside PEFT and torchvision. `blocks`: every block forward and backward beside timm's modules,
the papers' formulas, and mmcv's where installed. `models`: training steps of whole networks beside timm's.
`finetune`: steps of the training engine with a recipe beside those without. `digits`: five nets on digits, five seeds.
`gpu`: as much of all that as fits into the minutes that a card is there for, tests first, each figure kept at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .common import above_zero, add_output, path, positive, print_json, refuse_unwritable, say, silent, word
from .usage import Parser

DTYPES, FORMATS = ("float32", "bfloat16", "float16"), ("NCHW", "channels_last")
WHAT = ("inject", "blocks", "models", "finetune", "digits", "gpu")
PARTS = ("truth", "ceilings", "blocks", "networks", "engine")


def add_arguments(parser: Parser) -> None:
    """What to measure and how often."""
    parser.add_argument(
        "what", type=word(WHAT, "benchmark"), metavar="WHAT", help=f"one of: {', '.join(WHAT)}"
    )
    _add_shared(parser.add_argument_group("how"))
    inject = parser.add_argument_group("inject: injection beside PEFT and torchvision")
    inject.add_argument(
        "--sites", type=_numbers, default=[100, 1000, 10000], metavar="N,…", help="sizes of the chain"
    )
    _add_speed(parser.add_argument_group("blocks and models: time and memory beside their peers"))
    _add_finetune(parser.add_argument_group("finetune: throughput and memory beside plain fine-tuning"))
    _add_gpu(parser.add_argument_group("gpu: one command that uses a card well, by the clock"))
    _add_digits(parser.add_argument_group("digits: resnet18 with and without attention, several seeds"))
    add_output(parser, plugin=False)


def _add_shared(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--quick", action="store_true", help="three rounds, small maps and images")
    group.add_argument("--rounds", type=positive, default=9, metavar="N", help="rounds per figure")
    group.add_argument("--save", type=path, metavar="FILE", help="write the figures there as JSON too")
    group.add_argument(
        "--device",
        type=word(("auto", "cpu", "cuda"), "device"),
        default="auto",
        metavar="DEVICE",
        help="auto (a GPU where there is one), cpu, cuda",
    )
    group.add_argument("--compiled", action="store_true", help="blocks, models: our blocks compiled by inductor "
                       "too (slow); finetune: the model compiled")  # fmt: skip
    group.add_argument("--batch", type=positive, metavar="N", help="models, finetune: images per step")
    group.add_argument("--image", type=positive, metavar="N", help="models, finetune: side of an image")


def _add_speed(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--only", type=_names, metavar="NAME,…", help="these rows, as se,cbam; all by default")
    group.add_argument("--threads", type=positive, default=1, metavar="N", help="within an operation")
    group.add_argument("--dtypes", type=_among(DTYPES), metavar="TYPE,…", help=f"of {', '.join(DTYPES)}")
    group.add_argument("--formats", type=_among(FORMATS), metavar="FORMAT,…", help=f"of {', '.join(FORMATS)}")
    group.add_argument("--maps", type=_maps, metavar="BxCxHxW,…", help="blocks: maps, as 8x256x56x56")
    group.add_argument("--details", action="store_true", help="every figure, not the ratios alone")


def _add_finetune(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--model", default="torchvision/resnet50", metavar="MODEL", help="the network")
    group.add_argument(
        "--recipe", default="cbam_resnet", metavar="RECIPE", help="a shipped recipe's name or a YAML file"
    )
    group.add_argument(
        "--precision",
        type=word(("no", "bf16", "fp16"), "precision"),
        default="no",
        metavar="TYPE",
        help="mixed precision: no, bf16 or fp16",
    )
    group.add_argument("--channels-last", action="store_true", help="channels_last memory format")


def _add_gpu(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--minutes", type=above_zero, default=8.0, metavar="N", help="time to use; no task begins "
                       "that does not fit")  # fmt: skip
    group.add_argument("--out", type=path, default=Path("gpu"), metavar="FOLDER", help="where the figures go")
    group.add_argument(
        "--rehearse", action="store_true", help="tiny sizes, with --device cpu: whether all parts run"
    )
    group.add_argument("--table", type=path, metavar="FOLDER", help="measure nothing: print what is there")


def _add_digits(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--file", type=path, default=Path("digits.json"), metavar="FILE",
                       help="keeps finished runs; the same command goes on with it")  # fmt: skip
    group.add_argument("--seeds", type=positive, default=5, metavar="N", help="seeds")
    group.add_argument("--epochs", type=positive, default=10, metavar="N", help="epochs of fine-tuning")


def run(args: argparse.Namespace) -> None:
    """Print Markdown tables, or JSON."""
    makers = {
        "inject": _inject,
        "blocks": _blocks,
        "models": _models,
        "finetune": _finetune,
        "digits": _digits,
        "gpu": _gpu,
    }
    if args.quick:
        args.rounds = min(args.rounds, 3)
    if args.save:
        refuse_unwritable(args.save)
    result, words = makers[args.what](args)
    if args.save:
        import json

        args.save.write_text(json.dumps(result, indent=1), encoding="utf-8")
    if args.json:
        print_json(result)
    else:
        print(words(result))


Measured = tuple[dict[str, Any], Callable[[Any], str]]


def _inject(args: argparse.Namespace) -> Measured:
    from attninject.bench import injection

    return injection.inject(rounds=args.rounds, chain=args.sites), injection.to_markdown


def _blocks(args: argparse.Namespace) -> Measured:
    from attninject.bench import block_speed, peers

    given = _shared(args, peers.SUBJECTS)
    maps = args.maps or ([(2, 64, 28, 28), (1, 64, 14, 14)] if args.quick else None)
    result = block_speed.blocks(sizes=maps, **given)
    return result, lambda found: block_speed.to_markdown(found, details=args.details)


def _models(args: argparse.Namespace) -> Measured:
    from attninject.bench import networks

    given = _shared(args, networks.NETWORKS)
    batch, image = args.batch or (2 if args.quick else None), args.image or (64 if args.quick else None)
    result = networks.networks(batch=batch, image=image, **given)
    return result, lambda found: networks.to_markdown(found, details=args.details)


def _finetune(args: argparse.Namespace) -> Measured:
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


def _gpu(args: argparse.Namespace) -> Measured:
    """The sheet's lines, and the table made of them."""
    from attninject.bench.gpu import course, crossovers, sheet, table

    folder = args.table or args.out
    if args.table is None:
        if args.rehearse != (args.device == "cpu"):
            args.parser.error(
                "--rehearse and --device cpu go together: figures of a CPU stand under `bench blocks`"
            )
        device = "cpu" if args.rehearse else "cuda"
        if device == "cuda" and _device(args) != "cuda":
            args.parser.error(
                "no CUDA device is seen here; --device cpu --rehearse shows whether all parts run"
            )
        known = word(PARTS, "part")
        try:
            parts = [known(name) for name in args.only or ()]
        except argparse.ArgumentTypeError as error:
            args.parser.error(f"argument --only: {error}")
        course.run(device, args.rehearse, folder, args.minutes, parts, say=_progress)
    crossovers.write(folder)
    return {"figures": sheet.read(folder)}, lambda found: table.to_markdown(folder)


def _digits(args: argparse.Namespace) -> Measured:
    """Each run is said as it ends, unless only data is wanted."""
    from attninject.bench import digits as nets

    record = nets.run(args.file, args.seeds, args.epochs, say=silent if args.json else say)
    return {**record, "summary": nets.summary(record)}, nets.to_markdown


def _shared(args: argparse.Namespace, rows: Any) -> dict[str, Any]:
    """The arguments that both take; those not given are left to their defaults."""
    if args.only:
        known = word(rows, "row")
        try:
            args.only = [known(name) for name in args.only]
        except argparse.ArgumentTypeError as error:
            args.parser.error(f"argument --only: {error}")
    given: dict[str, Any] = {
        "device": _device(args),
        "only": args.only,
        "rounds": args.rounds,
        "threads": args.threads,
        "compiled": args.compiled,
        "dtypes": args.dtypes,
        "progress": _progress,
    }
    return {**given, **({"formats": args.formats} if args.formats else {})}


def _device(args: argparse.Namespace) -> str:
    import torch

    found = torch.cuda.is_available()
    if args.device == "cuda" and not found:
        args.parser.error("argument --device: torch finds no CUDA device here")
    return "cuda" if found and args.device != "cpu" else "cpu"


def _progress(line: str) -> None:
    if sys.stderr.isatty():
        print(line, file=sys.stderr, flush=True)


def _numbers(text: str) -> list[int]:
    return [positive(part) for part in _names(text)]


def _names(text: str) -> list[str]:
    found = [part.strip() for part in text.split(",") if part.strip()]
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} names nothing")
    return found


def _among(choices: tuple[str, ...]) -> Callable[[str], list[str]]:
    """An argparse type: a list of some of `choices`."""
    known = word(choices, "name")
    return lambda text: [known(name) for name in _names(text)]


def _maps(text: str) -> list[tuple[int, ...]]:
    try:
        found = [tuple(int(n) for n in part.split("x")) for part in _names(text)]
    except ValueError:
        found = []
    if not found or any(len(size) != 4 or min(size) < 1 for size in found):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of maps, such as 8x256x56x56,8x1024x14x14")
    return found
