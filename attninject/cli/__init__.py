"""The command line: one file per verb, and only that of the verb named is loaded.

Exit code 0 done, 1 refused with a message, 2 usage. It stays with argparse: help and a wrong flag answer at once, and
nothing but torch's own world need be installed.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from attninject import __version__, plugins
from attninject.errors import AttnInjectError
from attninject.wording import aligned

from .usage import Parser, did_you_mean

VERBS = {  # verb: what it does; its file bears its name
    "list": "list blocks, recipes, places or models",
    "sites": "show what can be targeted in a model",
    "plan": "show what a recipe would do to a model",
    "inject": "inject a recipe into a model and write a file",
    "rank": "rank the sites of a recipe by what a block there would change on your images",
    "finetune": "fine-tune a model, with blocks or plain, and keep a small file",
    "evaluate": "measure a run's model again: per class, calibrated or not, with its blocks and without",
    "sweep": "train the arms of an experiment and their controls over seeds, at equal budget",
    "report": "say what sweeps and runs show: gain, loss, or nothing that their seeds can show",
    "predict": "say what a trained run takes image files for",
    "push": "share a trained run: weights, settings and a card, on the hub or in a folder",
    "export": "write a trained model as ONNX, torch.export or a state dict",
    "visualize": "draw what the blocks of a model do to an image, as PNG files and a page",
    "demo": "inject attention into a small pretrained net and fine-tune it, offline, in a minute or two",
    "bench": "measure injection and blocks against their peers, in one process, as ratios",
    "doctor": "say what is installed, which extras and devices there are, and what is missing",
    "zoo": "inject into every timm and torchvision model and check every guarantee",
}

DESCRIPTION = "Attention blocks injected into pretrained vision networks, without losing a weight."
EPILOG = """\
`attninject COMMAND --help` shows the flags of one command.

examples:
  attninject plan torchvision/resnet50 cbam_resnet
  attninject plan timm/convnext_tiny --block se --place residual_branch --set reduction=8
  attninject inject torchvision/resnet50 se_resnet --weights default -o resnet50_se.safetensors
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code (help and usage errors leave through SystemExit, as in argparse)."""
    args = _parse(list(sys.argv[1:] if argv is None else argv))
    try:
        for file in getattr(args, "plugins", ()):
            plugins.load(file)
        args.run(args)
        sys.stdout.flush()
        return 0
    except BrokenPipeError:  # the reader has gone: say nothing, not even at interpreter exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (AttnInjectError, OSError) as error:
        print(f"attninject: {_paragraph(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("attninject: interrupted", file=sys.stderr)
        return 1


def _parse(argv: list[str]) -> argparse.Namespace:
    name, rest = (argv[0], argv[1:]) if argv else ("", [])
    if name in VERBS:
        return parser_of(name).parse(rest)
    top = _top()
    if name.startswith("-"):
        top.parse(argv[:1])  # --help, --version, or an unknown flag
    if not name or name.startswith("-"):
        top.error(f"a COMMAND is required: {', '.join(VERBS)}")
    top.error(f"unknown command {name!r}{did_you_mean(name, VERBS)}; commands: {', '.join(VERBS)}")


def _top() -> Parser:
    """The parser of what stands in front of a verb, or of no verb at all."""
    verbs = "\n".join(f"    {line}" for line in aligned(list(VERBS.items())))
    parser = Parser("attninject", f"{DESCRIPTION}\n\ncommands:\n{verbs}", EPILOG)
    parser.add_argument("command", metavar="COMMAND", help="one of these, then its arguments and flags")
    flags = parser.add_argument_group("flags")
    flags.add_argument(
        "--version", action="version", version=f"attninject {__version__}", help="show the version and leave"
    )
    parser.add_help_to(flags)
    return parser


def parser_of(name: str) -> Parser:
    """The parser of a verb, made by its file."""
    module = importlib.import_module(f"{__name__}.{'listing' if name == 'list' else name}")  # not the builtin
    parser = Parser(f"attninject {name}", module.__doc__)
    module.add_arguments(parser)
    parser.set_defaults(run=module.run, parser=parser)
    return parser


def _paragraph(error: BaseException) -> str:
    """The message without blank lines; the faults of a recipe keep a line each."""
    return (
        "\n".join(line.rstrip() for line in str(error).splitlines() if line.strip()) or type(error).__name__
    )
