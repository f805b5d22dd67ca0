"""Nets whose own library makes them anew from a config: said at injection; a trainer of Ultralytics' kind keeps blocks.

The trainer is rebuilt by hand here; `tests/strangers/test_training_ultralytics.py` runs the real one.
"""

from __future__ import annotations

import copy
import pickle
import warnings
from types import SimpleNamespace

import pytest
import torch
from small import Around, Net, Unit, calls_of, images, se, stir
from torch import nn

import attninject as ai
from attninject import errors
from attninject.integrations.ultralytics import KeepsBlocks, trainer_for, with_blocks

X = images()


class Detector(nn.Module):
    """A net described by its layers, with as many outputs as there are classes."""

    def __init__(self, yaml: dict, classes: int) -> None:
        super().__init__()
        self.yaml = yaml
        units = [Unit(yaml["width"]) for _ in range(yaml["depth"])]
        self.model = nn.Sequential(
            nn.Conv2d(3, yaml["width"], 3, padding=1), *units, nn.Conv2d(yaml["width"], classes, 1)
        )

    def forward(self, x):
        return self.model(x).mean((2, 3))


class Trainer:
    """Makes the net anew from its layers and copies by name what fits, as detectors' trainers do."""

    def __init__(self, classes: int = 4) -> None:
        self.classes = classes

    def get_model(self, cfg=None, weights=None, verbose=True):
        model = Detector(cfg, self.classes)
        if weights:
            own = model.state_dict()
            fitting = {k: v for k, v in weights.state_dict().items() if k in own and own[k].shape == v.shape}
            model.load_state_dict(fitting, strict=False)
        return model


class Handle(nn.Module):
    """What a user holds: a net and the classes that serve its task."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.task = Detector({"width": 16, "depth": 2}, 4), "detect"
        self.task_map = {"detect": {"trainer": Trainer}}


def handle() -> Handle:
    """The same values each time."""
    torch.manual_seed(0)
    return Handle()


def test_a_net_with_the_config_of_its_trainer_is_warned_of_once() -> None:
    """The text says what to do; the block is in all the same, and a second injection says nothing more."""
    model = handle().model
    with pytest.warns(errors.RebuiltModelWarning, match=r"Detector .*\.yaml.*trainer_for\(yolo\)") as said:
        ai.inject(model, **se(after="model.1"))
    assert (len(said), said[0].filename, len(ai.injected(model))) == (1, __file__, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ai.inject(model, **se(after="model.2"))
    assert len(ai.injected(model)) == 2


def test_a_net_with_a_saved_config_is_warned_of() -> None:
    """As transformers' are: a config that is written, and a class that reads it."""

    class Pretrained(Net):
        config = SimpleNamespace(to_dict=dict)

        @classmethod
        def from_pretrained(cls, folder):
            return cls()

    with pytest.warns(errors.RebuiltModelWarning, match="Pretrained.from_pretrained makes the network anew"):
        ai.inject(Pretrained(), **se(after="units.0"))


def test_an_error_made_of_the_warning_leaves_the_model_untouched() -> None:
    """It comes before anything is changed."""
    model = handle().model
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(errors.RebuiltModelWarning):
            ai.inject(model, **se(after="model.1"))
    assert ai.injected(model) == {}


def test_loading_a_delta_says_nothing(tmp_path) -> None:
    """Whoever loads one knows."""
    model = handle().model
    base = copy.deepcopy(model)
    with pytest.warns(errors.RebuiltModelWarning):
        ai.inject(model, **se(after="model.1"))
    ai.save(model, tmp_path / "a.safetensors")
    assert list(ai.injected(ai.load(base, tmp_path / "a.safetensors"))) == list(ai.injected(model))


def test_a_handle_around_a_net_names_the_net() -> None:
    """It has no forward of its own, and one child that has."""
    with pytest.raises(errors.UnsupportedModelError, match=r"pass the network that it holds, handle\.model$"):
        ai.inject(handle(), **se(after="model.model.1"))


# --- the trainer ---------------------------------------------------------------------------------


def test_without_it_the_blocks_are_left_behind() -> None:
    """What the warning speaks of."""
    yolo = handle()
    net = with_blocks(yolo.model, None, se(after="model.1"))
    assert ai.injected(Trainer().get_model(yolo.model.yaml, net)) == {}


def test_a_trainer_with_a_recipe_gives_every_net_its_blocks() -> None:
    """From layers alone, and from weights without blocks, whose function stays."""
    yolo = handle()
    trainer = trainer_for(yolo, **se(after="model.{1,2}"))
    assert issubclass(trainer, Trainer)
    assert trainer.__name__ == "Trainer"
    for weights in (None, yolo.model):
        net = trainer().get_model(cfg=yolo.model.yaml, weights=weights, verbose=False).eval()
        assert calls_of(net, X) == {"model.1.se": 1, "model.2.se": 1}
    assert torch.equal(net(X), yolo.model.eval()(X))
    assert ai.injected(yolo.model) == {}


@pytest.mark.parametrize("as_checkpoint", [False, True])
def test_weights_with_blocks_give_theirs(as_checkpoint: bool) -> None:
    """A second run from a checkpoint goes on where the first ended, also one that was pickled; with a recipe or not."""
    yolo = handle()
    stir(
        with_blocks(
            yolo.model, None, {"rules": [se(after="model.1"), {"block": "cbam", "before": "model.2"}]}
        )
    )
    yolo.model = pickle.loads(pickle.dumps(yolo.model)).eval()
    weights = {"ema": yolo.model, "model": None} if as_checkpoint else yolo.model

    class Own(KeepsBlocks, Trainer):
        pass

    class Lenient(Trainer):
        def get_model(self, cfg=None, weights=None, verbose=True):
            return super().get_model(cfg, weights["ema"] if as_checkpoint else weights)

    for kind in (trainer_for(yolo, base=Lenient), type("OwnLenient", (KeepsBlocks, Lenient), {})):
        net = kind().get_model(yolo.model.yaml, weights).eval()
        assert list(net.state_dict()) == list(yolo.model.state_dict())
        assert [n for n, _ in net.named_parameters()] == [n for n, _ in yolo.model.named_parameters()]
        assert torch.equal(net(X), yolo.model(X))
    assert Own.recipe is None


def test_blocks_of_a_net_that_never_reaches_the_trainer() -> None:
    """A net made from layers is not passed on; the trainer remembers its blocks, and gives them anew."""
    yolo = handle()
    with_blocks(yolo.model, None, se(after="model.1"))
    assert list(ai.injected(trainer_for(yolo)().get_model(yolo.model.yaml))) == ["model.1.se"]


def test_a_trainer_that_knows_of_no_block_is_refused() -> None:
    """When it is made, or when it is to make a net."""
    yolo = handle()
    with pytest.raises(
        errors.UnsupportedModelError, match=r"Handle carries no blocks .*: trainer_for\(yolo, recipe\)"
    ):
        trainer_for(yolo)
    with pytest.raises(errors.UnsupportedModelError, match=r"no recipe, and the weights .* carry no blocks"):
        type("Own", (KeepsBlocks, Trainer), {})().get_model(yolo.model.yaml, yolo.model)
    with pytest.raises(errors.RecipeError, match="unknown block"):
        trainer_for(yolo, block="nothing", after="model.1")
    with pytest.raises(TypeError, match="exclude each other"):
        trainer_for(yolo, "cbam", after="model.1")


def test_a_recipe_that_gives_others_than_the_weights_is_refused() -> None:
    """Blocks that were trained are not replaced in silence."""
    yolo = handle()
    with_blocks(yolo.model, None, se(after="model.1"))
    for rule in (
        se(after="model.2"),
        {"block": "cbam", "after": "model.1", "name": "se"},
        {"block": "se", "after": "model.1"},
    ):
        with pytest.raises(
            errors.PlanError, match=r"carry other blocks than the recipe .*model\.[12]\.se.*ai\.eject"
        ):
            trainer_for(yolo, **rule)().get_model(yolo.model.yaml, yolo.model)


def test_a_block_in_a_head_for_other_classes_starts_anew_and_is_named() -> None:
    """Its channels are others; those in the trunk keep their values."""
    yolo = handle()
    stir(with_blocks(yolo.model, None, se(after="model.{1,3}")))
    with pytest.warns(UserWarning, match=r"model\.3\.se\.fc1\.weight.* start untrained"):
        net = trainer_for(yolo)(classes=8).get_model(yolo.model.yaml, yolo.model)
    old, new = ai.injected(yolo.model), ai.injected(net)
    assert torch.equal(new["model.1.se"].fc1.weight, old["model.1.se"].fc1.weight)
    assert new["model.3.se"].fc1.weight.shape != old["model.3.se"].fc1.weight.shape


def test_a_carrier_inside_another_net_is_no_net_of_a_trainer() -> None:
    """Only the net that carries the config is rebuilt: a part of it is injected without a word."""
    ai.inject(Around(handle().model.model, channels=3), **se(after="inner.1"))
