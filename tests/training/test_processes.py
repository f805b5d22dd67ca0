"""Two processes on the CPU: DDP and FSDP2 train as one process does, measure exactly, write once, fail together."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from filelock import FileLock  # torch's own requirement
from safetensors.torch import load_file
from together import RUNS, go, model

import attninject as ai
from attninject import errors
from attninject.training import runs
from attninject.training.devices import cpus_average
from attninject.training.experiment import settings
from attninject.training.nets import with_shared_norms
from attninject.training.sharding import units

pytestmark = pytest.mark.skipif(
    not cpus_average(torch.__version__),
    reason="fully_shard fails on CPUs, or adds gradients up (devices.py); two processes are tested together",
)

ROOT = Path(__file__).resolve().parents[2]
EXACT = ("val_loss", "top1", "top5")


def start(out: Path) -> None:
    """Run `together.py` on two processes without a GPU; how it ended goes into a file."""
    path = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               str(ROOT / "tests" / "training" / "together.py"), str(out)]  # fmt: skip
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    (out / "end.json").write_text(json.dumps([done.returncode, done.stderr]))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """All runs on two processes, made once for all of pytest's workers: (folder, figures by rank, end)."""
    base = tmp_path_factory.getbasetemp()
    out = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "two_processes"
    with FileLock(f"{out}.lock"):
        if not (out / "end.json").exists():
            out.mkdir()
            start(out)
    end = json.loads((out / "end.json").read_text())
    assert (out / "rank1.json").exists(), end[1]
    return out, [json.loads((out / f"rank{rank}.json").read_text()) for rank in (0, 1)], end


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same on one process, on demand: name → (model, result)."""
    out, kept = tmp_path_factory.mktemp("one"), {}

    def get(name: str) -> Any:
        if name not in kept:
            kept[name] = go(name, 1, out)
        return (out / name, *kept[name])

    return get


@pytest.mark.parametrize("name", [name for name in RUNS if name != "ddp_norms"])
def test_two_processes_train_as_one(name: str, two: Any, one: Any) -> None:
    """The same global batch: the same metrics before training and, to rounding, the same weights in the file."""
    folder, result = two[0] / name, two[1][0][name]
    alone, _, expected = one(name)
    a, b = (load_file(f / runs.LAST) for f in (folder, alone))
    assert set(a) == set(b)
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-4, atol=1e-6)
    for key in EXACT:
        assert result["history"][0][key] == pytest.approx(expected.history[0][key], rel=1e-6)
        assert result["history"][-1][key] == pytest.approx(expected.history[-1][key], rel=1e-4)
    assert result["history"][-1]["train_loss"] == pytest.approx(expected.history[-1]["train_loss"], rel=1e-4)


def test_every_process_finds_the_same_figures(two: Any) -> None:
    """Metrics of 19 images on two processes are multiples of 1/19, and the same on both, statistics or not."""
    for name in RUNS:
        histories = [[{k: v for k, v in row.items() if k != "seconds"} for row in found[name]["history"]]
                     for found in two[1]]  # fmt: skip
        assert histories[0] == histories[1]
        for row in histories[0]:
            assert row["top1"] * 19 == pytest.approx(round(row["top1"] * 19), abs=1e-9)


def test_the_first_process_alone_writes(two: Any) -> None:
    """Log, checkpoint and deltas come from one process; the other does not open a file to write."""
    first, second = (found["written"] for found in two[1])
    assert first > 6 * len(RUNS)
    assert second == 0


def test_the_file_is_the_model_that_was_measured(two: Any) -> None:
    """With batch statistics, which differ from process to process, too: loss of the file = loss of the log."""
    from together import DATA

    base = ai.eject(model("norms"))
    loaded = ai.load(base, two[0] / "ddp_norms" / runs.LAST, example_inputs=torch.zeros(2, 3, 8, 8)).eval()
    x, y = (torch.stack([torch.as_tensor(DATA[1][i][j]) for i in range(19)]) for j in (0, 1))
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(loaded(x), y).item()
    assert loss == pytest.approx(two[1][0]["ddp_norms"]["history"][-1]["val_loss"], rel=1e-5)


def test_fsdp2_gives_back_a_plain_model_and_plain_files(two: Any) -> None:
    """The caller's model is of its own class, with whole parameters; checkpoint tensors have full shapes."""
    found = two[1][1]["fsdp2_all"]
    assert (found["class"], found["whole"]) == ("Layered", True)
    shares = [two[1][0][name]["share"] for name in ("ddp", "fsdp2", "fsdp2_all")]
    assert shares == [1, pytest.approx(0.5, abs=0.05), pytest.approx(0.5, abs=0.05)]
    tensors, meta = runs.read(two[0] / "fsdp2" / runs.CHECKPOINT)
    shapes = {f"model.{k}": t.shape for k, t in model("layered").state_dict().items()}
    assert {k: t.shape for k, t in tensors.items() if k.startswith("model.")} == shapes
    averages = [t for k, t in tensors.items() if k.endswith("|exp_avg")]
    assert sorted(map(tuple, shapes.values())) == sorted(tuple(t.shape) for t in averages)
    assert meta["processes"] == 2


def test_accelerates_fsdp_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its classes to wrap are the units; offloading and its own checkpointing are refused, not ignored."""
    from attninject.training import sharding

    nothing = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=None))
    assert sharding._plugin(nothing).reshard_after_forward is True
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP")
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "Residual")
    monkeypatch.setenv("FSDP_RESHARD_AFTER_FORWARD", "false")
    plugin = sharding._plugin(nothing)
    assert plugin.reshard_after_forward is False
    found = units(model("layered"), plugin.transformer_cls_names_to_wrap)
    assert [type(unit).__name__ for unit in found] == ["Residual"] * 4
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "true")
    monkeypatch.setenv("FSDP_ACTIVATION_CHECKPOINTING", "true")
    with pytest.raises(errors.ExperimentError, match=r"(?s)fsdp_offload_params.*checkpointing: true"):
        sharding._plugin(nothing)


def test_fsdp2_goes_on_where_it_was_cut_off(two: Any) -> None:
    """Within an epoch, with average, accumulation and unfreezing: the bits of a run in one go, on both."""
    assert [found["resumed equals uninterrupted"] for found in two[1]] == [True, True]
    assert not list(two[0].glob("*/.*.tmp"))


def test_one_process_goes_on_with_what_two_began(two: Any, tmp_path: Path) -> None:
    """A checkpoint of two sharded processes holds no trace of them: one process takes it for a third epoch."""
    shutil.copytree(two[0] / "fsdp2", tmp_path / "fsdp2")
    saved = load_file(two[0] / "fsdp2" / runs.LAST)
    with pytest.raises(errors.RunError, match="batch_size: 4 then, 8 now"):
        go("fsdp2", 1, tmp_path, resume=True)
    made, result = go("fsdp2", 1, tmp_path, resume=True, batch_size=4, epochs=2, sharding="none")
    assert all(torch.equal(t, saved[k]) for k, t in made.state_dict().items())
    _, result = go("fsdp2", 1, tmp_path, resume=True, batch_size=4, epochs=3)
    assert [row["epoch"] for row in result.history] == [0, 1, 2, 3]


def test_sync_bn_keeps_blocks_and_function(tmp_path: Path) -> None:
    """Norms become SyncBatchNorm for several GPUs: blocks run on, the delta fits the base of before; no CPU."""
    gpus = SimpleNamespace(num_processes=2, device=torch.device("cuda"))
    _, train = settings("digits", sync_bn=True)
    made, x = model("norms").eval(), torch.randn(2, 3, 8, 8)
    base = ai.eject(model("norms"))
    with torch.no_grad():
        for p in made.units[0].se.parameters():
            p.add_(0.3)
        before = made(x)
        made = with_shared_norms(made, train, gpus)
        assert isinstance(made.units[0].norm, torch.nn.SyncBatchNorm)
        assert torch.equal(made(x), before)
        ai.save(made, tmp_path / "d.safetensors")
        loaded = ai.load(base, tmp_path / "d.safetensors", example_inputs=x).eval()
        assert torch.equal(loaded(x), before)
    assert with_shared_norms(made, settings("digits")[1], gpus) is made
    with pytest.raises(errors.ExperimentError, match="sync_bn: torch's SyncBatchNorm runs on GPUs only"):
        with_shared_norms(made, train, SimpleNamespace(num_processes=2, device=torch.device("cpu")))


def test_units_of_sharding_are_the_repeated_ones() -> None:
    """Residual blocks, not whole stages, and not the parts of a block; with or without attention in them."""
    from attninject import models

    for name, kind, count in (
        ("torchvision/resnet18", "BasicBlock", 8),
        ("timm/convnext_atto", "ConvNeXtBlock", 12),
        ("torchvision/mobilenet_v3_small", "InvertedResidual", 11),
        ("timm/test_vit", "Block", 6),
    ):
        net = models.build(name)
        for _ in range(2):
            found = [type(unit).__name__ for unit in units(net)]
            assert (set(found), len(found)) == ({kind}, count)
            ai.inject(net, block="se", place="stage_end")


def test_one_process_fails_and_the_others_end(two: Any) -> None:
    """An image that only the second process reads is broken: the error names it, and nobody hangs."""
    out, _, (code, said) = two
    assert code != 0
    assert "image 1 of Broken cannot be read as an image (OSError: broken)" in said
    assert "rank      : 1" in said  # torchrun's own report of who was first
    assert not (out / "broken" / runs.CHECKPOINT).exists()
