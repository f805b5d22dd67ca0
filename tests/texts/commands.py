"""What the command line prints: tables and plans, refusals (1), and contradictions in what was asked (2)."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import runpy
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from .files import saved
from .registry import case, cases

NET = "torchvision/resnet18"
GIVEN = ("--model", "timm/test_resnet", "--out", "a")


def run(folder: Path, *argv: str) -> str:
    """`python -m attninject …` in a folder: its exit code, unless 0, and what it printed; usage without its form."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    here = Path.cwd()
    os.chdir(folder)
    try:
        given = mock.patch.object(sys, "argv", ["attninject", *argv])
        with given, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_module("attninject", run_name="__main__", alter_sys=False)
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        os.chdir(here)
    said = err.getvalue().rpartition("error: ")[2] if code == 2 else err.getvalue()
    return f"{f'exit code {code}' if code else ''}\n{out.getvalue()}{said}".strip("\n")


def _command(line: str, folder: Path) -> str:
    return run(folder, *line.split())


SHOWN = (
    "list blocks", "list blocks --markdown", "list recipes", "list places", "list models torchvision/resnet*",
    "list recipes --json", f"plan {NET} se_resnet --set reduction=4", f"plan {NET} se --root layer3 --json",
    f"sites {NET} layer1.0.*",
    f"sites {NET} layer1.0.bn2 --input-size 3,64,64 --json",
    f"plan {NET} --block se --after layer[12].*.bn2 --exclude layer1.0.** --set bias=false --init paper --pick last "
    "--per stage --type BatchNorm2d --name gate",
    f"inject {NET} se_resnet -o se.safetensors --seed 5",
)  # fmt: skip
REFUSED = (
    "plan torchvision/resnet81 se", "plan resnet18 se", "plan torchvison/alexnet se", f"plan {NET} se_resnt",
    f"plan {NET} missing.yaml", f"plan {NET} --block see --after layer1", f"plan {NET} --block se --after layr1.*",
    f"plan {NET} --block se --after layer1.* --set redcution=8", f"plan {NET} se_resnet --weights nothing.pth",
    f"plan {NET} se_resnet --weights IMAGENET1K_V9", f"plan {NET} --block se --place stage_ends",
    f"plan {NET} se --root layr3", f"sites {NET} nothing_here", f"inject {NET} bam_mobilenet -o x.safetensors",
    "finetune missing.yaml", "finetune --resume --out gone", "finetune --model timm/test_resnet",
    " ".join(("finetune", *GIVEN, "--recipe see")), " ".join(("finetune", *GIVEN, "--data imagefolder")),
    " ".join(("finetune", *GIVEN, "--data imagefolder --data-root gone")),
    " ".join(("finetune", *GIVEN, "--epochs 0 --lr fast --data folder")),
    "export . --to pt2", f"export gone.safetensors --model {NET} --to pt2", "zoo nothing_at_all*",
    "zoo torchvision/resnet81",
)  # fmt: skip
CONTRADICTIONS = (
    f"plan {NET}", f"plan {NET} --block se", f"plan {NET} --after layer1", f"plan {NET} se --block se",
    "finetune", " ".join(("finetune", *GIVEN, "--recipe se --block se --after y")),
    " ".join(("finetune", *GIVEN, "--block se")), " ".join(("finetune", *GIVEN, "--set reduction=4")),
    "export gone.safetensors --to pt2", "zoo", "zoo timm/resnet18 --table rows", "zoo --table rows",
)  # fmt: skip

for room, lines in (("command", SHOWN), ("refused", REFUSED), ("contradiction", CONTRADICTIONS)):
    cases(room, [(line, functools.partial(_command, line)) for line in lines])


@case("refused: a recipe's faults")
def _(folder: Path) -> str:
    (folder / "bad.yaml").write_text(
        "rules:\n  - block: sse\n    after: layer1\n    pic: last\n", encoding="utf-8"
    )
    return run(folder, "plan", NET, "bad.yaml")


@case("refused: weights of another head")
def _(folder: Path) -> str:
    from torchvision.models import resnet18

    torch.save(resnet18(weights=None, num_classes=4).state_dict(), folder / "w.pth")
    return run(folder, "plan", NET, "se", "--weights", "w.pth")


@case("refused: weights that are none")
def _(folder: Path) -> str:
    torch.save({"epoch": 3}, folder / "w.pth")
    return run(folder, "plan", NET, "se", "--weights", "w.pth")


@case("refused: a delta as weights")
def _(folder: Path) -> str:
    return run(folder, "plan", NET, "se", "--weights", saved(folder).name)


@case("refused: a delta onto another base")
def _(folder: Path) -> str:
    return run(folder, "export", saved(folder).name, "--model", NET, "--to", "state_dict", "--size", "32")


@case("refused: names of timm's for torchvision's")
def _(folder: Path) -> Any:
    run(folder, "inject", NET, "se_resnet", "-o", "d.safetensors")
    return run(folder, *f"export d.safetensors --model {NET} --to state_dict --like timm --size 32".split())


@case("refused: names of timm's for another block")
def _(folder: Path) -> Any:
    name = "timm/test_resnet"
    run(folder, *f"inject {name} --block cbam --place residual_branch -o d.safetensors".split())
    return run(folder, *f"export d.safetensors --model {name} --to state_dict --like timm --size 32".split())


@case("refused: names of timm's in ONNX")
def _(folder: Path) -> Any:
    name = "timm/test_resnet"
    run(folder, *f"inject {name} --block se --place stage_end -o d.safetensors".split())
    return run(folder, *f"export d.safetensors --model {name} --to onnx --like timm --size 32".split())
