"""Model names and weights: what builds, what is refused, and in which words."""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.error
from collections import OrderedDict
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from torch import nn

from attninject import models
from attninject.errors import UnknownModelError

SMALL = "torchvision/shufflenet_v2_x0_5"


def message(call: object, *args: object, **kw: object) -> str:
    """The text of the `UnknownModelError` that a call raises."""
    with pytest.raises(UnknownModelError) as caught:
        call(*args, **kw)  # type: ignore[operator]
    text = str(caught.value)
    assert "\n" not in text, "one paragraph"
    return text


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any attempt to open a URL fails the way an unplugged machine does."""

    def unplugged(*_: object, **__: object) -> None:
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(torch.hub, "download_url_to_file", unplugged)


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    """A state dict of the small net."""
    torch.manual_seed(3)
    return dict(models.build(SMALL).state_dict())


# --- names --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("torchvision/resnet18", torchvision.models.ResNet),
        ("timm/resnet18", timm.models.ResNet),
        ("shufflenet_v2_x0_5", torchvision.models.ShuffleNetV2),
        ("convnext_atto", timm.models.ConvNeXt),
        ("timm/resnet18.a1_in1k", timm.models.ResNet),
    ],
)
def test_a_name_builds_that_library_s_model(name: str, kind: type[nn.Module]) -> None:
    """A name with its library, or a bare name that one library has, builds the model."""
    assert isinstance(models.build(name), kind)


def test_keywords_go_to_the_builder() -> None:
    """`num_classes` reaches torchvision and timm alike."""
    assert models.build("torchvision/resnet18", num_classes=7).fc.out_features == 7
    assert models.build("timm/resnet18", num_classes=7).fc.out_features == 7


def test_a_bare_name_of_both_libraries_is_ambiguous() -> None:
    """`resnet50` exists twice, and the error writes both out."""
    text = message(models.build, "resnet50")
    assert "torchvision/resnet50 and timm/resnet50" in text


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("torchvision/resnet5", "torchvision/resnet50"),
        ("timm/convnext_tinny", "timm/convnext_tiny"),
        ("shufflenet_v2_x05", "torchvision/shufflenet_v2_x0_5"),
        ("tim/resnet50", "torchvision/NAME or timm/NAME"),
        ("torchvision/convnext_atto", "no model is named 'torchvision/convnext_atto'"),
    ],
)
def test_an_unknown_name_shows_the_nearest(name: str, expected: str) -> None:
    """A misspelt name is refused with the nearest one."""
    assert expected in message(models.build, name)


def test_names_are_listed_with_their_library_and_filtered() -> None:
    """`names` gives full names, sorted, by a glob over the bare or the full name."""
    everything = models.names()
    assert everything == sorted(everything)
    assert {"torchvision/resnet50", "timm/resnet50", "torchvision/raft_small"} <= set(everything)
    assert models.names("resnet18") == ["timm/resnet18", "torchvision/resnet18"]
    assert set(models.names("torchvision/vgg1?")) == {
        "torchvision/vgg11",
        "torchvision/vgg13",
        "torchvision/vgg16",
        "torchvision/vgg19",
    }
    assert models.names("no such thing") == []


@pytest.mark.parametrize(
    "name",
    [
        "torchvision/lraspp_mobilenet_v3_large",
        "torchvision/ssdlite320_mobilenet_v3_large",
        "torchvision/r2plus1d_18",
        "torchvision/raft_small",
        "torchvision/googlenet",
    ],
)
def test_every_kind_of_torchvision_model_builds_without_a_download(name: str, no_network: None) -> None:
    """Segmentation, detection, video and flow nets build with random weights, backbone included."""
    assert isinstance(models.build(name), nn.Module)


# --- published weights --------------------------------------------------------------------------


def test_a_failed_download_is_one_paragraph_with_a_way_out(
    no_network: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a network, the error names model, weights and what else can be given."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    text = message(models.build, "torchvision/resnet18", "default")
    assert "'default' of torchvision/resnet18 could not be fetched" in text
    assert "Name or service not known" in text
    assert "local file" in text


def test_a_failed_download_of_timm_reads_the_same(tmp_path: Path) -> None:
    """With the hub offline, timm's weights are refused in the same words."""
    if not timm.models._hub.has_hf_hub():
        pytest.skip("this timm does not know this huggingface_hub")
    code = (
        "from attninject import models, errors\n"
        "try: models.build('timm/resnet18', 'default')\n"
        "except errors.UnknownModelError as error: print(error)"
    )
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "TORCH_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert "'default' of timm/resnet18 could not be fetched" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("name", "tag", "expected"),
    [
        (
            "torchvision/resnet50",
            "IMAGENET1K_V3",
            ("nearest: IMAGENET1K_V", "it has: IMAGENET1K_V1, IMAGENET1K_V2"),
        ),
        ("timm/resnet18", "a1_in2k", ("nearest: a1_in1k", "tv_in1k")),
        ("timm/resnet18.nope", "none", ("no weights 'nope'",)),
        ("torchvision/mnasnet1_0", "DEFUALT", ("no weights 'DEFUALT'", "it has: IMAGENET1K_V1")),
    ],
)
def test_an_unknown_tag_shows_what_there_is(name: str, tag: str, expected: tuple[str, ...]) -> None:
    """A tag that the model does not have is refused with the nearest and the whole list."""
    text = message(models.build, name, tag)
    assert all(part in text for part in expected), text


def test_a_model_without_published_weights_says_so() -> None:
    """`default` on a model that nobody has trained names the two things that work."""
    pretrained = {name.partition(".")[0] for name in timm.list_pretrained()}
    name = next(name for name in timm.list_models("convnext_*") if name not in pretrained)
    assert "no published weights, 'default' was asked for" in message(models.build, f"timm/{name}", "default")


def test_a_builder_s_own_refusal_is_passed_on() -> None:
    """An argument that the library does not take is named, in one paragraph."""
    text = message(models.build, "torchvision/resnet18", nonsense=3)
    assert "nonsense=3" in text
    assert "unexpected keyword" in text


# --- local files --------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
def test_a_local_file_is_loaded(suffix: str, weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """A state dict in a pickle or safetensors file becomes the model's weights."""
    file = tmp_path / f"net{suffix}"
    if suffix == ".safetensors":
        safetensors.torch.save_file(weights, file)
    else:
        torch.save(weights, file)
    built = models.build(SMALL, str(file)).state_dict()
    assert all(torch.equal(built[key], value) for key, value in weights.items())


@pytest.mark.parametrize("nest", ["state_dict", "model"])
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_wrappings_of_training_scripts_are_taken_off(
    nest: str, prefix: str, weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """`{'state_dict': …}` and the prefixes of DDP and torch.compile do not matter."""
    file = tmp_path / "run.pth"
    torch.save({nest: {prefix + key: value for key, value in weights.items()}, "epoch": 3}, file)
    built = models.build(SMALL, str(file)).state_dict()
    assert all(torch.equal(built[key], value) for key, value in weights.items())


def test_another_class_count_is_said_with_its_fix(tmp_path: Path) -> None:
    """A head of ten classes does not go into one of a thousand; the error says what to do."""
    file = tmp_path / "ten.pth"
    torch.save(models.build(SMALL, num_classes=10).state_dict(), file)
    text = message(models.build, SMALL, str(file))
    assert "head has 10 classes (fc.bias), the model's has 1000" in text
    assert "num_classes=10" in text
    assert models.build(SMALL, str(file), num_classes=10).fc.out_features == 10


def test_loading_is_strict_and_counts_what_differs(weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """Missing and surplus keys are refused with counts and examples, never skipped."""
    file = tmp_path / "part.pth"
    part = {key: value for key, value in weights.items() if key != "conv1.0.weight"}
    torch.save({**part, "extra.weight": torch.zeros(1)}, file)
    text = message(models.build, SMALL, str(file))
    assert "1 keys of the model are missing (conv1.0.weight)" in text
    assert "1 keys are unknown to the model (extra.weight)" in text


class Evil:
    """Runs code when unpickled carelessly."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("false",)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "no weights file at"),
        (b"\x80not a pickle", "cannot be read as weights"),
        ([torch.zeros(1)], "holds list, not a state dict"),
        ({"optimizer": {"lr": 0.1}}, "'optimizer' holds dict, not a tensor"),
        ({}, "holds dict, not a state dict"),
        ({"weight": Evil()}, "cannot be read as weights"),
    ],
)
def test_files_that_are_no_weights_are_refused(content: object, expected: str, tmp_path: Path) -> None:
    """Whatever a file holds instead of a state dict, it is named; no code in it runs."""
    file = tmp_path / "odd.pth"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        torch.save(content, file)
    assert expected in message(models.build, SMALL, str(file))


def test_a_model_that_asks_for_its_version_takes_safetensors(tmp_path: Path) -> None:
    """MnasNet's state dict has a version that safetensors cannot hold; its weights load all the same."""
    wanted = torchvision.models.mnasnet0_5().state_dict()
    safetensors.torch.save_file(dict(wanted), tmp_path / "m.safetensors")
    found = models.build("torchvision/mnasnet0_5", str(tmp_path / "m.safetensors")).state_dict()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_a_delta_file_is_no_base(tmp_path: Path) -> None:
    """A file of `ai.save` given as base weights is refused with the call that reads it."""
    file = tmp_path / "run.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(1)}, file, metadata={"attninject": "{}"})
    assert "ai.load(base" in message(models.build, SMALL, str(file))


def test_old_checkpoints_are_upgraded_by_their_versions(tmp_path: Path) -> None:
    """A state dict of before `num_batches_tracked`, wrapped by DDP, still loads: its versions are kept."""
    torch.manual_seed(0)
    old = models.build(SMALL).state_dict()
    versions = old._metadata  # type: ignore[attr-defined]
    for key in [key for key in old if key.endswith("num_batches_tracked")]:
        del old[key]
    wrapped = OrderedDict((f"module.{key}", value) for key, value in old.items())
    wrapped._metadata = OrderedDict(  # type: ignore[attr-defined]
        (f"module.{key}".rstrip("."), {"version": 1}) for key in versions
    )
    torch.save(wrapped, tmp_path / "old.pth")
    built = models.build(SMALL, str(tmp_path / "old.pth")).state_dict()
    assert all(torch.equal(built[key], value) for key, value in old.items())
