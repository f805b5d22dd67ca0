"""Ultralytics trains detectors with blocks, for real: a few small images with boxes, on the CPU, without a network."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pages
import pytest
import torch
from PIL import Image
from small import calls_of
from torch import nn

import attninject as ai
from attninject import errors
from attninject.integrations.ultralytics import KeepsBlocks, trainer_for

pytestmark = [pytest.mark.strangers, pytest.mark.filterwarnings("ignore")]
os.environ.update(YOLO_OFFLINE="true", YOLO_AUTOINSTALL="false", YOLO_VERBOSE="false")
ultralytics = pytest.importorskip("ultralytics")
YOLO = ultralytics.YOLO

RULE = {"block": "cbam", "place": "stage_end"}
NAMES = ["model.2.cbam", "model.4.cbam", "model.6.cbam", "model.9.cbam"]  # of yolo11n
X = torch.rand(1, 3, 64, 64)


def written(folder: Path) -> Path:
    """A data set in YOLO's format: four images for training and four for validation, two boxes each."""
    numbers = numpy.random.default_rng(0)
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (folder / kind / split).mkdir(parents=True)
        for i in range(4):
            pixels = numbers.integers(0, 255, (64, 64, 3), dtype=numpy.uint8)
            Image.fromarray(pixels).save(folder / "images" / split / f"{i}.png")
            boxes = "0 0.5 0.5 0.4 0.4\n1 0.3 0.3 0.2 0.2\n"
            (folder / "labels" / split / f"{i}.txt").write_text(boxes)
    file = folder / "data.yaml"
    file.write_text(f"path: {folder}\ntrain: images/train\nval: images/val\nnames: {{0: a, 1: b}}\n")
    return file


def settings(data: Path, name: str, **more: Any) -> dict[str, Any]:
    """What every run here has; the optimizer by name, since `auto` would set the rates by itself."""
    small = {
        "imgsz": 64,
        "batch": 2,
        "workers": 0,
        "device": "cpu",
        "optimizer": "SGD",
        "lr0": 0.05,
        "nbs": 2,
    }
    quiet = {"plots": False, "verbose": False, "project": str(data.parent / "runs"), "name": name}
    return {"data": str(data), "epochs": 1, "warmup_epochs": 0, **small, **quiet, **more}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data set's file."""
    return written(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def trained(data: Path) -> SimpleNamespace:
    """A finished run of two epochs: the handle, and its folder of weights."""
    yolo = YOLO("yolo11n.yaml")
    yolo.train(trainer=trainer_for(yolo, **RULE), **settings(data, "first", epochs=2))
    return SimpleNamespace(yolo=yolo, weights=Path(yolo.trainer.wdir), trainer=yolo.trainer)


def blocks_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """The blocks' tensors by key."""
    prefixes = tuple(f"{name}." for name in ai.injected(model))
    return {key: t.clone().float() for key, t in model.state_dict().items() if key.startswith(prefixes)}


def boxes(model: nn.Module) -> torch.Tensor:
    """What a detector gives, boxes and scores."""
    with torch.no_grad():
        out = model.eval()(X)
    return out[0] if isinstance(out, (tuple, list)) else out


def test_blocks_are_trained_averaged_and_saved(trained: SimpleNamespace) -> None:
    """The trainer's net, its average, `last.pt` and `best.pt` have them, moved from where they began."""
    assert list(ai.injected(trained.trainer.model)) == NAMES
    begun = blocks_of(trained.trainer.get_model("yolo11n.yaml"))
    average = blocks_of(trained.trainer.ema.ema)
    assert average.keys() == begun.keys()
    gates = [key for key in begun if begun[key].is_floating_point() and not begun[key].any()]
    assert gates
    assert any(average[key].any() for key in gates)
    for name in ("last.pt", "best.pt"):
        again = YOLO(trained.weights / name)
        assert list(ai.injected(again.model)) == NAMES
        assert calls_of(again.model, X) == dict.fromkeys(NAMES, 1)
        with ai.disabled(again.model):
            without = boxes(again.model)
        assert not torch.equal(boxes(again.model), without)
    for key, tensor in blocks_of(YOLO(trained.weights / "last.pt").model).items():
        torch.testing.assert_close(tensor, average[key], rtol=1e-3, atol=1e-3)  # written as float16


def test_it_validates_predicts_fuses_and_is_exported(trained: SimpleNamespace, data: Path) -> None:
    """With `best.pt`, as a user goes on after training."""
    yolo = YOLO(trained.weights / "best.pt")
    assert yolo.val(data=str(data), imgsz=64, device="cpu", plots=False, workers=0).box.map >= 0
    yolo = YOLO(trained.weights / "best.pt")
    wanted = boxes(copy.deepcopy(yolo.model))
    fused = copy.deepcopy(yolo.model).fuse(verbose=False)
    assert list(ai.injected(fused)) == NAMES
    torch.testing.assert_close(boxes(fused), wanted, rtol=1e-4, atol=1e-3)
    exported = torch.jit.load(yolo.export(format="torchscript", imgsz=64, device="cpu"))
    torch.testing.assert_close(exported(X), wanted, rtol=1e-4, atol=1e-3)
    assert len(yolo.predict(numpy.zeros((64, 64, 3), numpy.uint8), imgsz=64, device="cpu")) == 1


def test_a_further_run_starts_from_the_trained_blocks(trained: SimpleNamespace, data: Path) -> None:
    """`YOLO("last.pt").train(trainer=…)`; the trainer that Ultralytics itself has leaves them behind."""
    begun: list[dict[str, torch.Tensor]] = []
    yolo = YOLO(trained.weights / "last.pt")
    wanted = blocks_of(yolo.model)
    yolo.add_callback("on_train_start", lambda trainer: begun.append(blocks_of(trainer.model)))
    yolo.train(trainer=trainer_for(yolo), **settings(data, "further"))
    assert begun[0].keys() == wanted.keys()
    assert all(torch.equal(begun[0][key], wanted[key]) for key in wanted)
    assert list(ai.injected(yolo.model)) == NAMES
    base = yolo.task_map["detect"]["trainer"]
    assert ai.injected(base.get_model(yolo.trainer, yolo.model.yaml, yolo.model, verbose=False)) == {}


def test_an_interrupted_run_is_resumed(data: Path) -> None:
    """Epochs, optimizer and average go on from `last.pt`, whose blocks the resumed net has."""

    class Stopped(Exception):
        pass

    def stop(trainer: Any) -> None:
        raise Stopped

    yolo = YOLO("yolo11n.yaml")
    yolo.add_callback("on_model_save", stop)
    with pytest.raises(Stopped):
        yolo.train(trainer=trainer_for(yolo, **RULE), **settings(data, "cut", epochs=2))
    last = YOLO(yolo.trainer.last)
    wanted, seen = blocks_of(last.model), []

    def look(trainer: Any) -> None:
        moments = [s for s in trainer.optimizer.state.values() if s.get("momentum_buffer") is not None]
        seen.append((trainer.start_epoch, blocks_of(trainer.ema.ema), blocks_of(trainer.model), len(moments)))

    last.add_callback("on_train_start", look)
    last.train(resume=True, trainer=trainer_for(last, **RULE))
    ((epoch, average, begun, moments),) = seen
    assert (epoch, moments) == (1, sum(p.requires_grad for p in last.trainer.model.parameters()))
    assert all(
        torch.equal(average[key], wanted[key]) and torch.equal(begun[key], wanted[key]) for key in wanted
    )
    assert list(ai.injected(last.model)) == NAMES


def test_a_trainer_of_ones_own(data: Path) -> None:
    """The mixin in front of a class in a module of its own, as runs on several devices need; another detector."""
    from ultralytics.models.yolo.detect import DetectionTrainer

    class Own(KeepsBlocks, DetectionTrainer):
        recipe = RULE

    yolo = YOLO("yolov8n.yaml")
    yolo.train(trainer=Own, **settings(data, "own"))
    assert len(ai.injected(yolo.model)) == 4
    assert all(torch.isfinite(t).all() for t in blocks_of(yolo.model).values())


def test_a_trainer_goes_to_other_processes() -> None:
    """Runs on several devices hand the class on by cloudpickle, with its recipe."""
    cloudpickle = pytest.importorskip("cloudpickle")
    kind = cloudpickle.loads(cloudpickle.dumps(trainer_for(YOLO("yolo11n.yaml"), **RULE)))
    assert [rule.block for rule in kind.recipe.rules] == ["cbam"]
    assert issubclass(kind, KeepsBlocks)


@pytest.mark.parametrize(
    "name", ["yolo11n-cls.yaml", "yolo11n-seg.yaml", "yolo11n-pose.yaml", "rtdetr-l.yaml"]
)
def test_trainers_of_other_tasks_make_nets_with_blocks(name: str) -> None:
    """Each has a `get_model` of its own."""
    yolo = (ultralytics.RTDETR if "rtdetr" in name else YOLO)(name)
    kind = trainer_for(yolo, block="se", after="model.{2,4}", example_inputs=torch.rand(1, 3, 64, 64))
    about = {"nc": 2, "channels": 3, "names": {0: "a", 1: "b"}, "kpt_shape": [17, 3]}
    trainer = kind.__new__(kind)
    trainer.resume, trainer.data, trainer.args = (
        False,
        about,
        SimpleNamespace(cls_remap=True, pretrained=False, dropout=0.0),
    )
    net = trainer.get_model(yolo.model.yaml, yolo.model, verbose=False)
    assert list(ai.injected(net)) == ["model.2.se", "model.4.se"]


def test_inject_warns_and_names_the_net() -> None:
    """On the net of a `YOLO`, and on the `YOLO` itself."""
    yolo = YOLO("yolo11n.yaml")
    with pytest.warns(errors.RebuiltModelWarning, match=r"trainer of DetectionModel .*trainer_for\(yolo\)"):
        ai.inject(yolo.model, **RULE)
    with pytest.raises(errors.UnsupportedModelError, match=r"pass the network that it holds, yolo\.model"):
        ai.inject(yolo, **RULE)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to run a page in, with what its code names."""
    monkeypatch.chdir(tmp_path)
    YOLO("yolo11n.yaml").save("yolo11n.pt")
    written(tmp_path / "set").rename(tmp_path / "boxes.yaml")
    return tmp_path


def test_the_page_says_what_is_so(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its code for Ultralytics runs as it stands, on small images."""
    train = ultralytics.engine.model.Model.train
    few = {
        key: value for key, value in settings(here, "page").items() if key not in ("data", "project", "name")
    }
    monkeypatch.setattr(YOLO, "train", lambda self, **given: train(self, **{**given, **few}))
    marked = [f for f in pages.fences("attninject/integrations/README.md") if "Ultralytics" in f.mark]
    (fence,) = [f for f in marked if f.mark.endswith("runs it")]
    names: dict[str, Any] = {}
    exec(compile(fence.text, fence.page, "exec"), names)
    assert len(ai.injected(names["yolo"].model)) == 4
