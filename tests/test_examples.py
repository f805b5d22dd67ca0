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


def test_every_example_is_run_here() -> None:
    """No example lies there untested."""
    assert {file.name for file in EXAMPLES.glob("*.py")} == set(EXPECTED)


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_example(name: str, tmp_path: Path) -> None:
    """The example ends well, warns of nothing, and prints its figures."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-W", OWN_FOLDER, str(EXAMPLES / name)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for text in EXPECTED[name]:
        assert text in done.stdout
    assert done.stderr == ""
    assert list(tmp_path.iterdir()) == [], "examples leave no files behind"
