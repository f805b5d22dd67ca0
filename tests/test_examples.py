"""The examples run as they are, offline, and print what they promise."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"

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
    "segmenter.py": (
        "DeepLab: classifier.0.danet, masks unchanged: True",
        "U-Net: 6 blocks on the way down, masks unchanged: True",
    ),
    "video.py": ("logits unchanged: True", "blocks with a gradient: 2"),
}


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
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-W", "error", "-W", OWN_FOLDER, "-c", RUNNER, *told]
    subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, check=True)
    return found


def test_every_example_is_run_here() -> None:
    """No example lies there untested."""
    assert {file.name for file in EXAMPLES.glob("*.py")} == set(EXPECTED)


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_example(name: str, folders: dict[str, Path]) -> None:
    """The example ends well, warns of nothing, and prints its figures."""
    folder = folders[name]
    assert folder.with_suffix(".err").read_text() == ""
    printed = folder.with_suffix(".out").read_text()
    for text in EXPECTED[name]:
        assert text in printed
    assert list(folder.iterdir()) == [], "examples leave no files behind"
