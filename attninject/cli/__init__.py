"""The command line: one file per verb. Exit code 0 done, 1 refused with a message, 2 usage."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from attninject import __version__
from attninject.errors import AttnInjectError

from .common import nearest

VERBS = {  # verb: its module here
    "list": "listing",  # a module named `list` would hide the builtin
    "sites": "sites",
    "plan": "plan",
    "inject": "inject",
    "finetune": "finetune",
    "export": "export",
    "demo": "demo",
    "bench": "bench",
    "zoo": "zoo",
}

DESCRIPTION = "Attention blocks injected into pretrained vision networks, without losing a weight."
EPILOG = """\
examples:
  attninject plan torchvision/resnet50 cbam_resnet
  attninject plan timm/convnext_tiny --block se --place residual_branch --set reduction=8
  attninject inject torchvision/resnet50 se_resnet --weights default -o resnet50_se.safetensors
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code (usage errors exit with 2 through argparse)."""
    args = _parse(list(sys.argv[1:] if argv is None else argv))
    try:
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
    parser, verbs = _parsers()
    if not argv or argv[0].startswith("-"):
        parser.parse_args(argv)  # --help, --version, or an error
    name, rest = argv[0], argv[1:]
    if name not in verbs:
        parser.error(f"unknown command {name!r}{nearest(name, VERBS)}; commands: {', '.join(VERBS)}")
    verb = verbs[name]
    args, extra = verb.parse_known_intermixed_args(rest)  # options may stand between positionals
    if extra:
        options = [option for action in verb._actions for option in action.option_strings]
        verb.error(f"unknown argument {extra[0]!r}{nearest(extra[0].partition('=')[0], options)}")
    return args


def _parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    parser = argparse.ArgumentParser(
        prog="attninject",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"attninject {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    verbs = {}
    for name, module_name in VERBS.items():
        module = importlib.import_module(f"attninject.cli.{module_name}")
        verb = commands.add_parser(name, help=module.HELP, description=module.__doc__, allow_abbrev=False)
        module.add_arguments(verb)
        verb.set_defaults(run=module.run, parser=verb)
        verbs[name] = verb
    return parser, verbs


def _paragraph(error: BaseException) -> str:
    """The message without blank lines; the faults of a recipe keep a line each."""
    return (
        "\n".join(line.rstrip() for line in str(error).splitlines() if line.strip()) or type(error).__name__
    )
