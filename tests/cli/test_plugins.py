"""`--plugin FILE`: blocks of one's own on the command line, what a run and a delta say of them, and worker processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import attninject as ai
from attninject import errors, models, plugins
from attninject.blocks import registry
from attninject.cli import main
from attninject.evidence import sweep_engines

ROOT = Path(__file__).resolve().parents[2]
MODEL = "timm/test_convnext"
PLUGIN = """\
import torch
import attninject as ai

@ai.register_block("channel_scale")
class ChannelScale(torch.nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x):
        return x * self.scale
"""
MINE = ["--block", "channel_scale", "--place", "stage_end"]


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A plugin, in a process that knows none."""
    monkeypatch.setattr(registry, "_REGISTERED", {})
    monkeypatch.setattr(plugins, "_loaded", [])
    monkeypatch.setenv(plugins.VARIABLE, "")
    file = tmp_path / "mine.py"
    file.write_text(PLUGIN)
    return file


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a new process knows."""
    monkeypatch.setattr(registry, "_REGISTERED", {})
    monkeypatch.setattr(plugins, "_loaded", [])


def test_a_block_of_a_plugin(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A plugin's block is unknown without it, and listed and planned with it; a second `--plugin` of it is none."""
    assert main(["plan", MODEL, *MINE]) == 1
    assert "unknown block 'channel_scale'" in capsys.readouterr().err
    assert main(["list", "blocks", "--plugin", str(mine), "--plugin", str(mine)]) == 0
    assert "channel_scale" in capsys.readouterr().out
    assert main(["plan", MODEL, *MINE, "--plugin", str(mine)]) == 0


def test_a_delta_names_its_plugin(mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file made with a plugin loads where it is, and says its name where it is not."""
    out = tmp_path / "delta.safetensors"
    assert (
        main(["inject", MODEL, *MINE, "--init", "paper", "--plugin", str(mine), "-o", str(out), "--json"])
        == 0
    )
    forget(monkeypatch)
    torch.manual_seed(0)
    with pytest.raises(
        errors.DeltaError, match=r"made with the plugin mine\.py: import that file, or give it"
    ):
        ai.load(models.build(MODEL), out)
    plugins.load(mine)
    torch.manual_seed(0)
    assert ai.injected(ai.load(models.build(MODEL), out))


def test_a_run_names_its_plugin(
    mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`predict` on a run says which plugin it was made with, and takes it."""
    for split in ("train", "val"):
        for c, label in enumerate("ab"):
            (tmp_path / "images" / split / label).mkdir(parents=True)
            Image.new("RGB", (32, 32), (200 * c, 9, 9)).save(tmp_path / "images" / split / label / "0.png")
    run, own = str(tmp_path / "run"), ["--plugin", str(mine)]
    given = [
        "--data",
        str(tmp_path / "images"),
        "--size",
        "32",
        "--batch-size",
        "2",
        "--epochs",
        "1",
        "--json",
    ]
    assert main(["finetune", "--model", MODEL, "--out", run, *MINE, "--init", "paper", *given, *own]) == 0
    forget(monkeypatch)
    capsys.readouterr()
    assert main(["predict", run, str(tmp_path / "images")]) == 1
    said = capsys.readouterr().err
    assert "unknown block 'channel_scale'" in said
    assert "it was made with the plugin mine.py: import that file, or give it with --plugin" in said
    assert main(["predict", run, str(tmp_path / "images"), *own]) == 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import math\n\nmath.sqrt(-1)\n", "failed in line 3: ValueError: math domain error"),
        ("def f(:\n", "failed in line 1: SyntaxError"),
        ("raise SystemExit(3)\n", "failed in line 1: SystemExit: 3"),
        (
            "import no_such_module\n",
            "failed in line 1: ModuleNotFoundError: No module named 'no_such_module'",
        ),
    ],
)
def test_a_plugin_that_fails(mine: Path, text: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The message has the plugin's line and what it raised, and no traceback."""
    mine.write_text(text)
    assert main(["list", "--plugin", str(mine)]) == 1
    assert said in capsys.readouterr().err
    assert plugins.names() == []


def test_workers_get_the_plugins(mine: Path) -> None:
    """What a sweep starts, here, on Ray or by Slurm, is told of them; a worker loads them before its first run."""
    mine.write_text("from pathlib import Path\nPath(__file__).with_suffix('.ran').touch()\n")
    plugins.load(mine)
    (mine.with_suffix(".ran")).unlink()
    assert sweep_engines.environment(1)[plugins.VARIABLE] == str(mine)
    assert f"--plugin {mine}" in sweep_engines.Slurm(mine.parent).script(1)
    env = {**os.environ, **sweep_engines.environment(1)}
    worker = [sys.executable, "-m", "attninject.evidence.sweep_worker"]
    subprocess.run(worker, input="", env=env, check=True, text=True, timeout=300)
    assert mine.with_suffix(".ran").exists()
