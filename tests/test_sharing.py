"""Sharing: a delta or a run in a folder, or on a server that speaks the hub's protocol; and back from there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from hub_server import TOKEN, hub
from torch import nn

import attninject as ai
from attninject import errors
from attninject.cli import main

ROOT = Path(__file__).resolve().parents[1]


def net() -> nn.Module:
    """A resnet18 for four classes, always of the same weights."""
    torch.manual_seed(0)
    return torchvision.models.resnet18(num_classes=4).eval()


def trained() -> nn.Module:
    """The same with SE blocks that have learnt something."""
    model = ai.freeze(ai.inject(net(), "se_resnet"))
    with torch.no_grad():
        for block in ai.injected(model).values():
            for parameter in block.parameters():
                parameter.normal_(std=0.1)
    return model


def test_a_folder_in_place_of_the_hub(tmp_path: Path) -> None:
    """The file and a card with blocks, figures and the lines that load it; three ways to name the folder."""
    model, x = trained(), torch.randn(2, 3, 64, 64)
    where = ai.push_to_hub(model, f"local-dir:{tmp_path / 'flowers'}", base="torchvision/resnet18",
                           license="apache-2.0", description="Flowers.", metrics={"top-1": 0.9125})  # fmt: skip
    assert where == str(tmp_path / "flowers")
    card = (tmp_path / "flowers" / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\n")
    for text in (
        "library_name: attninject", "license: apache-2.0", "- attninject", "# flowers", "Flowers.", "| 0.9125 |",
        "| after layer1.0.bn2 | 64×56×56 | NCHW | layer1.0.se | graph |", "8 blocks with 89,", "Made with attninject",
    ):  # fmt: skip
        assert text in card, text
    for name in (f"local-dir:{where}", where, tmp_path / "flowers" / "attninject.safetensors"):
        assert torch.equal(ai.load(net(), name)(x), model(x))


def test_a_folder_without_a_delta_is_named(tmp_path: Path) -> None:
    """No stack of opening errors: what was looked for."""
    with pytest.raises(errors.HubError, match="holds no delta: neither"):
        ai.load(net(), tmp_path)


ON_THE_HUB = """
import sys, torch, torchvision, warnings
import attninject as ai
from attninject import errors
sys.path.insert(0, sys.argv[1])
from test_sharing import net, trained
model, x = trained(), torch.randn(2, 3, 64, 64)
assert ai.push_to_hub(model, "user/flowers", base="torchvision/resnet18").endswith("/user/flowers")
assert torch.equal(ai.load(net(), "hf-hub:user/flowers")(x), model(x))
with torch.no_grad():
    model.layer4[1].se.fc2.bias.add_(1)
ai.push_to_hub(model, "hf-hub:user/flowers", revision="second")
assert torch.equal(ai.load(net(), "hf-hub:user/flowers@second")(x), model(x))
assert not torch.equal(ai.load(net(), "hf-hub:user/flowers")(x), model(x))
ai.push_to_hub(model, "user/mine", private=True)
ai.push_to_hub(model, "user/own", private=True)
assert torch.equal(ai.load(net(), "hf-hub:user/own")(x), model(x))
import os
del os.environ["HF_TOKEN"]
for name, said in [("user/mine", "no access"), ("user/gone", "there is no repository user/gone"),
                   ("user/flowers@third", "has no revision third"), ("a/b/c", "no name of a repository")]:
    try:
        ai.load(net(), "hf-hub:" + name)
    except errors.HubError as error:
        assert said in str(error), (name, error)
    else:
        raise AssertionError(name)
try:
    ai.push_to_hub(model, "user/flowers")
except errors.HubError as error:
    print(error)
"""


def test_the_hubs_protocol(tmp_path: Path) -> None:
    """Push, load, a second revision, a private repository, and every refusal in a sentence, over HTTP."""
    with hub() as server:
        env = {**os.environ, "HF_ENDPOINT": server.address, "HF_HOME": str(tmp_path), "HF_TOKEN": TOKEN,
               "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests"))), "NO_PROXY": "127.0.0.1"}  # fmt: skip
        env.pop("HF_HUB_OFFLINE", None)
        done = subprocess.run(
            [sys.executable, "-c", ON_THE_HUB, str(ROOT / "tests")], capture_output=True, text=True, env=env
        )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "the hub refused user/flowers" in done.stdout
    assert server.private == {"user/mine", "user/own"}
    assert set(server.repos["user/flowers"]["main"]) == {"attninject.safetensors", "README.md"}


def test_a_run_is_pushed_and_comes_back_whole(tmp_path: Path, capsys) -> None:
    """`attninject push`: best weights, settings, classes, log and card; `trained` needs nothing else."""
    run, there = tmp_path / "a", f"local-dir:{tmp_path / 'b'}"
    argv = [
        "finetune",
        "--model",
        "timm/test_resnet",
        "--block",
        "se",
        "--place",
        "stage_end",
        "--out",
        str(run),
    ]
    assert main([*argv, "--epochs", "1", "--batch-size", "256", "--size", "16", "--freeze", "backbone"]) == 0
    assert main(["push", str(run), there, "--license", "mit", "--description", "Digits."]) == 0
    assert f"is at {tmp_path / 'b'}" in capsys.readouterr().out
    card = (tmp_path / "b" / "README.md").read_text(encoding="utf-8")
    for text in ("license: mit", "- timm", "Digits.", "timm/test_resnet", "| epoch | val_loss | top1 | top5 |", "| 0 |",
                 f'ai.training.trained("{there}")', "attn_lr 0.001, freeze backbone, seed 0"):  # fmt: skip
        assert text in card, text
    ours, theirs = ai.training.trained(run), ai.training.trained(there)
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(ours(x), theirs(x))
    assert main(["push", str(tmp_path), "user/name"]) == 1
    assert "holds no run of attninject finetune: best.safetensors" in capsys.readouterr().err
