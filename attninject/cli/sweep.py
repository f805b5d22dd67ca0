"""Train every arm of an experiment, and controls, over seeds: a fixed design, each run in a folder of its own.

FILE is an experiment file as for `finetune` with `seeds:` (a list, or their number), `grid:` (lists of recipes,
places, and any setting of `train` but budget and images) and `controls:` (bottleneck, random_sites, seed). Plain
fine-tuning, a bottleneck of the same parameters and random sites are trained beside every recipe. What is finished
is never run again; what was interrupted goes on.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .common import above_zero, add_output, path, positive, print_json, say, silent, word
from .usage import Parser

if TYPE_CHECKING:
    from attninject.evidence.sweep import Swept
    from attninject.evidence.sweep_engines import Engine

ENGINES = {
    "local": "processes of this machine",
    "ray": "tasks of Ray, here or where RAY_ADDRESS says",
    "slurm": "write a script for sbatch, start nothing",
}


def add_arguments(parser: Parser) -> None:
    """FILE, seeds, and who carries it out."""
    parser.add_argument("file", metavar="FILE", type=path, help="the sweep's file (YAML)")
    parser.add_argument("--out", metavar="FOLDER", help="folder of the sweep, in place of the file's")
    parser.add_argument("--seeds", type=_seeds, metavar="LIST",
                        help="seeds as 0,1,2, in place of the file's; more may be added later")  # fmt: skip
    parser.add_argument(
        "--plan", action="store_true", help="show the arms and what is unfinished; run nothing"
    )
    how = parser.add_argument_group("who carries it out")
    how.add_argument("--engine", type=word(ENGINES, "engine"), default="local", metavar="ENGINE",
                     help="; ".join(f"{name}: {text}" for name, text in ENGINES.items()))  # fmt: skip
    how.add_argument("--workers", type=positive, default=1, metavar="N", help="runs at a time")
    how.add_argument("--threads", type=positive, default=1, metavar="N",
                     help="torch's threads per run: the last bits of results depend on it")  # fmt: skip
    how.add_argument("--cpus", type=above_zero, default=1.0, metavar="N", help="ray: processors per run")
    how.add_argument("--gpus", type=_share, default=0.0, metavar="N", help="ray: GPUs per run, as 0.5")
    add_output(parser)


def run(args: argparse.Namespace) -> None:
    """Carry out what is unfinished; exit code 1 where a run is damaged or has failed."""
    from attninject.errors import RunError
    from attninject.evidence import sweep
    from attninject.evidence.sweep_design import design
    from attninject.evidence.sweep_file import read_sweep

    tell = silent if args.json else say
    made = design(read_sweep(args.file, out=args.out, seeds=args.seeds))
    if args.plan:
        done = sweep.standing(made)
    else:
        command = "attninject " + shlex.join(sys.argv[1:])
        show = None if args.json or not sys.stdout.isatty() else _Redrawn()
        done = sweep.carry_out(made, _engine(args, made.out), command, tell, show)
    if args.json:
        print_json(_figures(done))
    else:
        print(done)
        if args.engine == "slurm" and not args.plan and not done.finished:
            say(f"start it with: sbatch {made.out / 'sweep.sbatch'}; then this command again shows the table")
        elif done.finished:
            say(f"what it shows: attninject report {made.out}")
    left = sum(o.status != "finished" for o in done.outcomes.values())
    if left and not args.plan and args.engine != "slurm":
        raise RunError(f"{left} of {len(done.outcomes)} runs are damaged or have failed, and are left out")


def _engine(args: argparse.Namespace, out: Path) -> Engine:
    from attninject.evidence.sweep_engines import Local, Ray, Slurm

    if args.engine == "ray":
        return Ray(args.workers, args.threads, cpus=args.cpus, gpus=args.gpus)
    return (Local if args.engine == "local" else Slurm)(out, args.workers, args.threads)


def _figures(done: Swept) -> dict[str, object]:
    rows = [
        {"arm": arm, "seed": seed, "status": found.status, "top1": found.top1, "reason": found.reason}
        for (arm, seed), found in done.outcomes.items()
    ]
    return {
        "out": str(done.design.out),
        "finished": done.finished,
        "runs": rows,
        "notes": list(done.design.notes),
    }


class _Redrawn:
    """The table in a terminal, drawn over itself: two escape codes, for which rich would be one more package."""

    def __init__(self, write: Callable[[str], object] = sys.stdout.write) -> None:
        self.write, self.height = write, 0

    def __call__(self, lines: Sequence[str]) -> None:
        up = f"\x1b[{self.height}F" if self.height else ""
        self.write(up + "".join(f"\x1b[2K{line}\n" for line in lines))
        sys.stdout.flush()
        self.height = len(lines)


def _seeds(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if all(part.isdecimal() for part in parts) and len(set(map(int, parts))) == len(parts):
        return tuple(int(part) for part in parts)
    raise argparse.ArgumentTypeError(f"{text!r} is no list of seeds, such as 0,1,2")


def _share(text: str) -> float:
    return 0.0 if text == "0" else above_zero(text)
