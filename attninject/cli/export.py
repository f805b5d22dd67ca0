"""Write a trained model as ONNX, torch.export or a state dict, and print how far the copy is from it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from attninject import hub

from .common import add_output, file_or_run, path, positive, print_json, refuse_unwritable, seed, whole, word
from .usage import Parser

SUFFIX = {"onnx": ".onnx", "pt2": ".pt2", "state_dict": ".safetensors"}


def add_arguments(parser: Parser) -> None:
    """FILE, its base, and the target."""
    parser.add_argument(
        "file",
        metavar="FILE",
        type=file_or_run,
        help="a run's folder or hf-hub:user/name; a delta file with --model",
    )
    copy = parser.add_argument_group("the copy")
    copy.add_argument(
        "--to", required=True, type=word(SUFFIX, "target"), metavar="TO", help=", ".join(SUFFIX)
    )
    copy.add_argument(
        "-o", "--out", "--output", type=path, metavar="OUT", help="the file to write; default: beside FILE"
    )
    copy.add_argument("--like", type=word(("timm",), "naming"), metavar="timm",
                      help="with state_dict: as timm's own attention network loads it")  # fmt: skip
    copy.add_argument(
        "--size", type=positive, metavar="N", help="side of the images; default: the run's, or the model's"
    )
    base = parser.add_argument_group("the base of a delta file, where FILE is no run's folder")
    base.add_argument("--model", metavar="MODEL", help="torchvision/resnet50, timm/convnext_tiny, …")
    base.add_argument(
        "--weights", default="none", metavar="WEIGHTS", help="none, default, a tag, or a local file"
    )
    base.add_argument("--num-classes", type=whole, metavar="N", help="size of the head")
    base.add_argument("--seed", type=seed, default=0, metavar="N", help="seed of random weights")
    add_output(parser)


def run(args: argparse.Namespace) -> None:
    """Load, export, compare."""
    if args.model is None and not hub.names_folder(args.file):
        args.parser.error(f"{args.file} is no run's folder: give --model, the base of the delta file")
    output = args.out or _beside(args.file) / f"exported{SUFFIX[args.to]}"
    refuse_unwritable(output)
    from attninject.training.exporting import export

    model, name, size = _from_run(args) if args.model is None else _from_delta(args)
    found = export(model, output, args.to, size=args.size or size, like=args.like, name=name)
    if args.json:
        rows = [{"shape": list(p.shape), "difference": p.difference, "scale": p.scale} for p in found]
        print_json({"file": str(output), "bytes": output.stat().st_size, "parity": rows})
        return
    print(f"wrote {output} ({output.stat().st_size / 2**20:.1f} MiB)")
    for parity in found:
        print(f"  {parity}")


def _beside(file: str) -> Path:
    """The folder where a copy goes: that of the run or the file; the current one, where that is a repository's."""
    if file.startswith(hub.HUB):
        return Path()
    return hub.folder_of(file) if hub.names_folder(file) else Path(file).parent


def _from_run(args: argparse.Namespace) -> tuple[Any, str, int]:
    from attninject.training import read_experiment, trained
    from attninject.training.data.preprocessing import preprocessing_of
    from attninject.training.runs import SETTINGS

    folder = hub.folder_of(args.file)
    model = trained(folder)
    experiment = read_experiment(folder / SETTINGS)
    return model, experiment.model, preprocessing_of(model, experiment.data).size


def _from_delta(args: argparse.Namespace) -> tuple[Any, str, int]:
    import torch

    from attninject import delta, models
    from attninject.training.building import build
    from attninject.training.data.preprocessing import preprocessing_of
    from attninject.training.experiment import Data

    torch.manual_seed(args.seed)
    if args.num_classes is None:
        base = models.build(args.model, args.weights)
    else:  # as a run makes it, where the weights have other classes
        base = build(args.model, args.weights, args.num_classes)
    model = delta.load(base, args.file)
    return model, args.model, preprocessing_of(model, Data("imagefolder")).size
