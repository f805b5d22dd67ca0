"""The examples run as they are, offline, and print what they promise."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pages
import pytest
import timm
from torch import nn
from torchvision import models

import attninject as ai

EXAMPLES = pages.ROOT / "examples"

EXPECTED = {
    "one_liner.py": (
        "8 blocks, the first at layer1.0.cbam",
        "same logits, bit for bit: True",
        "after eject: 0 blocks",
    ),
    "recipe_file.py": ("two_blocks", "layer4.1.cbam", "loaded model equals the trained one: True"),
    "own_block.py": ("12 blocks of our own", "same logits, bit for bit: True"),
    "own_model.py": (
        "stage1.0.norm",
        "stage1.0.se",
        "stage2.1.cbam",
        "down.bam",
        "same logits, bit for bit: True",
    ),
    "finetune_plain_torch.py": (
        "91.9 k of 11.3 M (0.8 %) parameters learn",
        "loaded model equals the trained one: True",
        "after eject the backbone is the original: True",
    ),
    "finetune_timm.py": (
        "epoch 0: 3.2 k of 210.3 k (1.5 %) parameters learn, 4 groups",
        "epoch 2: 210.3 k of 210.3 k (100.0 %) parameters learn",
        "carries 9 blocks of its own",
    ),
    "detector.py": (
        "fasterrcnn_resnet50_fpn: 16 blocks, detections unchanged: True",
        "keypointrcnn_resnet50_fpn: 16 blocks, detections unchanged: True",
        "blocks with a gradient: 16",
    ),
    "segmenter.py": ("DeepLab: classifier.0.danet, masks unchanged: True",),
    "unet.py": ("the same loss before training: True", "plain    29,770", "both     30,306"),
    "classifiers.py": (
        "stage1.2.cbam, stage2.2.cbam, stage3.2.cbam; same logits: True",
        "pool.self_attention; same logits: True",
        "every block has learnt: True",
    ),
    "finetune_torchvision_detection.py": ("7 blocks: backbone.body.1.cbam", "epoch 1: loss", "3 boxes"),
    "video.py": ("logits unchanged: True", "blocks with a gradient: 2"),
}

GUIDES = {
    "finetune_timm_task.py": ("timm.task", "4 blocks in the average; timm's checkpoint gives the same logits: True"),
    "finetune_transformers.py": (
        "transformers", "ConvNextV2ForImageClassification: 5 blocks", "Dinov2ForImageClassification: 3 blocks",
        "loaded model computes what the trained one does: True",
    ),
    "finetune_peft.py": (
        "peft", "6 blocks among them", "from PEFT's folder: same logits True",
        "a VisionTransformer: same logits up to rounding True",
    ),
    "finetune_ddp.py": ("torch.distributed", "2 processes, 91.9 k of 11.3 M", "the same in all: True"),
    "deploy.py": (
        "onnxscript", *(f"{kind}: largest difference below 1e-4: True" for kind in ("TorchScript", "ONNX")),
    ),
    "finetune_lightning.py": (
        "lightning", "epoch 0: 91.1 k of 11.3 M (0.8 %) learn, 4 groups", "epoch 1: 11.3 M of 11.3 M",
        "8 blocks come back from the checkpoint, same logits: True",
    ),
    "finetune_ultralytics.py": (
        "ultralytics", "best.pt has 4 blocks: model.2.cbam", "predicted on 4 images",
    ),
    "finetune_slurm.py": ("submitit", "seed 0: top-1", "seed 2: top-1"),
    "segmenter_smp.py": (
        "segmentation_models_pytorch", "9 blocks, masks unchanged: True", "Dice loss falls: True",
    ),
    "grad_cam.py": (
        "pytorch_grad_cam", "layer4.1.cbam: a map of (64, 96)", "the blocks change the map: True",
    ),
    "quantize.py": ("torchao", "blocks in float: within 5 %: True", "tensors in eight bits: within 5 %: True"),
}  # fmt: skip
"""Example → the package that it needs, then what it prints. In processes of their own: importing takes seconds."""
IN_TEST = {"timm.task", "transformers", "peft", "torch.distributed", "onnxscript"}  # by the extra `test`


OWN_FOLDER = "ignore:Implicitly cleaning up:ResourceWarning"
"""torch 2.6 leaves a temporary folder of its own to the end of the process."""

RUNNER = """
import os, runpy, sys, traceback
import timm, torch, torchvision

for file, folder in zip(sys.argv[1::2], sys.argv[2::2]):
    child = os.fork()
    if child == 0:
        os.chdir(folder)
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(folder + "." + name, os.O_WRONLY | os.O_CREAT), number)
        sys.argv, sys.path[0] = [file], os.path.dirname(file)
        try:
            runpy.run_path(file, run_name="__main__")
        except BaseException:
            traceback.print_exc()
        sys.exit()
    os.waitpid(child, 0)
"""
"""Runs each example in a process of its own, split off from one that has torch already: most of their time."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Example → the folder that it ran in; beside it lies what it printed, in `.out` and `.err`."""
    base = tmp_path_factory.mktemp("examples")
    found = {name: base / name.removesuffix(".py") for name in EXPECTED}
    for folder in found.values():
        folder.mkdir()
    told = [str(part) for name, folder in found.items() for part in (EXAMPLES / name, folder)]
    command = [sys.executable, "-W", "error", "-W", OWN_FOLDER, "-c", RUNNER, *told]
    subprocess.run(command, env=pages.environment(), check=True)
    return found


def test_every_example_is_run_here() -> None:
    """No example lies there untested."""
    assert {file.name for file in EXAMPLES.glob("*.py")} == {*EXPECTED, *GUIDES}


def test_examples_are_short() -> None:
    """Each is read on two screens, and says first what to run and what to expect."""
    for file in EXAMPLES.glob("*.py"):
        text = file.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 80, file.name
        assert f" examples/{file.name}" in text.split('"""')[1], file.name
    for name in GUIDES:
        assert "What to expect:" in (EXAMPLES / name).read_text(encoding="utf-8"), name


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_example(name: str, folders: dict[str, Path]) -> None:
    """The example ends well, warns of nothing, and prints its figures."""
    folder = folders[name]
    assert folder.with_suffix(".err").read_text() == ""
    printed = folder.with_suffix(".out").read_text()
    for text in EXPECTED[name]:
        assert text in printed
    assert list(folder.iterdir()) == [], "examples leave no files behind"


def _guide(name: str) -> object:
    package = GUIDES[name][0]
    return pytest.param(name, marks=pytest.mark.slow if package in IN_TEST else pytest.mark.strangers)


@pytest.mark.parametrize("name", [_guide(name) for name in sorted(GUIDES)])
def test_guide_with_another_package(name: str, tmp_path: Path) -> None:
    """It ends well, prints its figures, and leaves nothing behind; what these packages warn of is theirs."""
    package, *texts = GUIDES[name]
    pytest.importorskip(package)
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2"] if name == "finetune_ddp.py" else []
    done = subprocess.run(
        [sys.executable, *launch, str(EXAMPLES / name)],
        env={**pages.environment(), "YOLO_CONFIG_DIR": str(tmp_path / "settings")},
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for text in texts:
        assert text in done.stdout
    assert {file.name for file in tmp_path.iterdir()} <= {"settings"}, "examples leave no files behind"


def nets() -> dict[str, Callable[[], nn.Module]]:
    """What the third column of the table of systems begins with → a small net of that kind."""
    weightless = {"weights": None, "weights_backbone": None}
    return {
        "torchvision's detectors": lambda: models.detection.fasterrcnn_resnet50_fpn(**weightless),
        "segmenters": lambda: models.segmentation.deeplabv3_mobilenet_v3_large(**weightless),
        "torchvision's mobilenet_v2": lambda: models.mobilenet_v2(width_mult=0.25),
        "timm's mobilenetv1": lambda: timm.create_model("mobilenetv1_100"),
        "U-Nets": runpy.run_path(str(EXAMPLES / "unet.py"))["UNet"],
        "": models.resnet18,
    }


SYSTEMS = [
    (cells[1].strip(), line, cells[3].strip())
    for row in pages.text_of("examples/README.md").split("| system |")[1].split("\n\n")[0].splitlines()[2:]
    for cells in [row.split("|")]
    for line in re.findall(r"`(ai\..*?)`", cells[2])
]


@pytest.mark.parametrize(("system", "line", "on"), SYSTEMS, ids=[line for _, line, _ in SYSTEMS])
def test_line_of_a_system_gives_it(system: str, line: str, on: str) -> None:
    """The line that stands beside a paper's name puts blocks into a net of the kind that stands beside it."""
    model = next(make for start, make in nets().items() if on.startswith(start))()
    exec(line, {"ai": ai, "model": model})
    assert ai.injected(model)
