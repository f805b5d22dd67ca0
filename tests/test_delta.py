"""Delta files: what is in them, what load checks, and that a refused file leaves the model alone."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small import Net
from torch import nn

import attninject as ai
from attninject import delta_file, errors, models

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def base(seed: int = 0, **kw: Any) -> Net:
    """A base model with weights, and norms that are not trivial."""
    torch.manual_seed(seed)
    net = Net(**kw)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.running_mean, -1, 1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return net.eval()


def inject(net: Net, **kw: Any) -> nn.Module:
    """CBAM behind both norms."""
    given = {"block": "cbam", "after": "units.*.norm", "args": {"reduction": 8}, "example_inputs": X, **kw}
    return ai.inject(net, **given)


def trained(net: nn.Module, only: Callable[[str], bool] = lambda name: True) -> nn.Module:
    """The net after three steps in train mode on the parameters that require grad."""
    torch.manual_seed(7)
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(only(name))
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    net.train()
    for _ in range(3):
        net(X).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return net.eval()


def state_of(net: nn.Module) -> list[tuple[str, int, bytes]]:
    """Everything that a refused load must leave alone: classes, keys, tensor objects, values."""
    classes = [(name, id(type(module)), b"") for name, module in net.named_modules()]
    state = net.state_dict(keep_vars=True)
    return classes + [(key, id(t), t.detach().numpy().tobytes()) for key, t in state.items()]


def edited(file: Path, change: Callable[[dict[str, torch.Tensor], dict[str, Any]], Any]) -> Path:
    """The file with its tensors and record changed by hand, and sealed anew, as a forger would."""
    with safe_open(file, framework="pt") as opened:
        record = json.loads(opened.metadata()["attninject"])
    tensors = load_file(file)
    change(tensors, record)
    record.pop("sha256")
    save_file(tensors, file, metadata=delta_file.metadata(record, tensors))
    return file


def refused(net: nn.Module, file: Path, **kw: Any) -> str:
    """The message of a load that must be refused, after which the model must be as before."""
    before = state_of(net)
    with pytest.raises(errors.DeltaError) as caught:
        ai.load(net, file, **kw)
    assert state_of(net) == before
    assert ai.injected(net) == {}
    return str(caught.value)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A delta of a trained net, everything trainable."""
    path = tmp_path / "run.safetensors"
    ai.save(trained(inject(base())), path)
    return path


@pytest.fixture
def frozen_file(tmp_path: Path) -> Path:
    """A delta of a net of which only blocks and head were trained."""
    path = tmp_path / "frozen.safetensors"
    ai.save(trained(inject(base()), only=lambda name: "cbam" in name or "head" in name), path)
    return path


# --- the round trip -----------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [False, True])
def test_a_trained_model_comes_back_from_its_base(frozen: bool, tmp_path: Path) -> None:
    """Base plus file equals the trained model bit for bit, batch norm statistics included."""
    only = (lambda name: "cbam" in name or "head" in name) if frozen else (lambda name: True)
    model = trained(inject(base()), only)
    ai.save(model, tmp_path / "run.safetensors")
    fresh = base()
    loaded = ai.load(fresh, tmp_path / "run.safetensors")
    assert loaded is fresh
    with torch.no_grad():
        assert torch.equal(loaded(X), model(X))
        assert not torch.equal(loaded(X), base()(X))
    assert list(ai.injected(loaded)) == list(ai.injected(model)) == ["units.0.cbam", "units.1.cbam"]


def test_loading_keeps_tensor_objects_and_memory_format(file: Path) -> None:
    """Values are copied into the base's own tensors; channels_last stays channels_last."""
    net = base().to(memory_format=torch.channels_last)
    before = {key: id(t) for key, t in net.state_dict(keep_vars=True).items()}
    ai.load(net, file)
    after = net.state_dict(keep_vars=True)
    assert {key: id(after[key]) for key in before} == before
    assert net.units[0].conv.weight.is_contiguous(memory_format=torch.channels_last)


def test_memory_format_does_not_change_the_file(tmp_path: Path) -> None:
    """A channels_last model saves the same bytes as a contiguous one."""
    plain, last = (inject(base()) for _ in range(2))
    last.load_state_dict(plain.state_dict())
    ai.save(plain, tmp_path / "a.safetensors")
    ai.save(last.to(memory_format=torch.channels_last), tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_several_rules_blocks_and_arguments_come_back(tmp_path: Path) -> None:
    """Two blocks at one site, an operation, another init and a name of one's own: all where they were."""
    model = inject(base())
    ai.inject(model, block="se", after="units.*.norm", name="gate", args={"reduction": 4}, example_inputs=X)
    ai.inject(
        model, block="spatial_attention", before="units.1::add", input=0, init="paper", example_inputs=X
    )
    ai.inject(model, block="channel_attention", after="stem", args={"reduction": 8}, example_inputs=X)
    model = trained(model)
    ai.save(model, tmp_path / "run.safetensors")
    loaded = ai.load(base(), tmp_path / "run.safetensors")
    assert list(ai.injected(loaded)) == list(ai.injected(model))
    with torch.no_grad():
        assert torch.equal(loaded(X), model(X))


def test_recipe_by_name_on_a_torchvision_net(tmp_path: Path) -> None:
    """resnet18 with cbam_resnet: saved, loaded into a fresh base that has the original checkpoint."""
    torch.manual_seed(0)
    original = torchvision.models.resnet18(num_classes=3).eval()
    fresh = torchvision.models.resnet18(num_classes=3).eval()
    fresh.load_state_dict(original.state_dict())
    model = ai.inject(original, "cbam_resnet")
    with torch.no_grad():
        for block in ai.injected(model).values():
            for parameter in block.parameters():
                parameter.add_(0.05)
    ai.save(model, tmp_path / "run.safetensors")
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(ai.load(fresh, tmp_path / "run.safetensors")(x), model(x))


@pytest.mark.parametrize(
    ("name", "rule", "first"),
    [
        ("torchvision/resnet18", {"before": "layer*.*::add", "input": 1}, "layer1.0.se"),
        ("torchvision/resnet18", {"after": "layer2.*.relu", "call": "all"}, "layer2.0.se"),
        ("torchvision/fcn_resnet50", {"place": "stage_end", "root": "backbone"}, "backbone.layer1.2.se"),
        ("torchvision/densenet121", {"place": "stage_end"}, "features.denseblock1.se"),
        ("timm/vit_tiny_patch16_224", {"place": "stage_end"}, "blocks.3.se"),
        ("timm/resnet18", {"place": "before_downsample"}, "layer1.1.se_2"),
    ],
)
def test_blocks_of_every_kind_of_site_come_back(
    name: str, rule: dict[str, Any], first: str, tmp_path: Path
) -> None:
    """Operations, several calls, roots, containers, tokens: the same blocks, the same numbers."""
    torch.manual_seed(0)
    clean = models.build(name).eval()
    fresh = copy.deepcopy(clean)
    model = ai.inject(clean, block="se", **rule)
    with torch.no_grad():
        for block in ai.injected(model).values():
            for parameter in block.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
    ai.save(model, tmp_path / "run.safetensors")
    loaded = ai.load(fresh, tmp_path / "run.safetensors")
    assert list(ai.injected(loaded)) == list(ai.injected(model))
    assert next(iter(ai.injected(loaded))) == first
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        ours, theirs = model(x), loaded(x)
    assert torch.equal(ours["out"], theirs["out"]) if isinstance(ours, dict) else torch.equal(ours, theirs)


def test_an_operand_of_a_module_in_the_root_comes_back(tmp_path: Path) -> None:
    """`before` a call with two operands, the second one: hung on the module, found again by its position."""

    class Sum(nn.Module):
        def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
            return left + right

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.sum = nn.Conv2d(3, 16, 1), nn.Conv2d(3, 16, 1), Sum()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.sum(self.a(x), self.b(x))

    torch.manual_seed(0)
    clean = Two().eval()
    fresh = copy.deepcopy(clean)
    model = ai.inject(clean, block="se", before="sum", input=1, init="paper", example_inputs=X)
    ai.save(model, tmp_path / "run.safetensors")
    loaded = ai.load(fresh, tmp_path / "run.safetensors")
    with torch.no_grad():
        assert torch.equal(loaded(X), model(X))
        assert not torch.equal(model(X), clean.a(X) + clean.b(X))


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # by torch 2.11's own compiler
def test_a_wrapped_model_is_saved_like_the_model_inside(tmp_path: Path) -> None:
    """DataParallel-like and torch.compile wrappers do not show in the file."""
    model = inject(base())
    ai.save(model, tmp_path / "a.safetensors")
    ai.save(torch.compile(model), tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


# --- what is in a file --------------------------------------------------------------------------


def test_an_all_trainable_model_is_saved_whole(file: Path) -> None:
    """Every parameter requires grad, so every tensor is in the file and none needs a hash."""
    with safe_open(file, framework="pt") as opened:
        keys = set(opened.keys())
        record = json.loads(opened.metadata()["attninject"])
    assert keys == set(inject(base()).state_dict())
    assert record["fingerprint"]["values"] == {}
    assert set(record["fingerprint"]["tensors"]) == set(base().state_dict())


def test_frozen_parameters_stay_out_and_buffers_stay_in(frozen_file: Path) -> None:
    """The file holds blocks, trainable parameters and buffers; the rest is there as a hash."""
    with safe_open(frozen_file, framework="pt") as opened:
        keys = set(opened.keys())
        record = json.loads(opened.metadata()["attninject"])
    assert "units.0.norm.running_mean" in keys
    assert "head.weight" in keys
    assert "units.0.conv.weight" not in keys
    assert {key for key in keys if ".cbam." in key} == {
        key for key in inject(base()).state_dict() if ".cbam." in key
    }
    assert set(record["fingerprint"]["values"]) == set(base().state_dict()) - keys
    assert all(len(digest) == 64 for digest in record["fingerprint"]["values"].values())


def test_the_record_names_versions_sites_and_base(tmp_path: Path) -> None:
    """Metadata: format, versions, the base's name, and mechanism and name of every site."""
    ai.save(inject(base()), tmp_path / "run.safetensors", base="mine/net")
    with safe_open(tmp_path / "run.safetensors", framework="pt") as opened:
        record = json.loads(opened.metadata()["attninject"])
    assert record["format"] == 1
    assert record["base"] == "mine/net"
    assert record["versions"]["torch"] == torch.__version__.partition("+")[0] or record["versions"]["torch"]
    assert [(site["qualified"], site["mechanism"]) for site in record["sites"]] == [
        ("units.0.cbam", "graph"),
        ("units.1.cbam", "graph"),
    ]


def test_tied_parameters_are_saved_under_both_names(tmp_path: Path) -> None:
    """Two names of one parameter: both are in the file, and both come back."""

    def tied() -> Net:
        net = base()
        net.units[1].conv.weight = net.units[0].conv.weight
        return net

    model = trained(inject(tied()))
    ai.save(model, tmp_path / "run.safetensors")
    loaded = ai.load(tied(), tmp_path / "run.safetensors")
    assert loaded.units[1].conv.weight is loaded.units[0].conv.weight
    with torch.no_grad():
        assert torch.equal(loaded(X), model(X))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_dtype_comes_back_exactly(dtype: torch.dtype, tmp_path: Path) -> None:
    """Half, bfloat16 and double models round-trip bit for bit."""
    model = inject(base()).to(dtype)
    ai.save(model, tmp_path / "run.safetensors")
    loaded = ai.load(base().to(dtype), tmp_path / "run.safetensors")
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key


def test_a_clean_model_has_nothing_to_save(tmp_path: Path) -> None:
    """Without blocks there is no delta, and no file appears."""
    with pytest.raises(errors.DeltaError, match="no injected blocks"):
        ai.save(base(), tmp_path / "run.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When writing breaks off, the file of before is still there whole, and nothing else."""
    before = file.read_bytes()

    def broken(tensors: Any, path: Path, metadata: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", broken)
    with pytest.raises(errors.DeltaError, match="disk full"):
        ai.save(inject(base(seed=1)), file)
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


def test_nested_arguments_come_back(tmp_path: Path) -> None:
    """Lists and mappings among a block's arguments survive the file."""

    @ai.register_block("delta_test_nested")
    class Nested(nn.Module):
        def __init__(self, channels: int, sizes: Any = (), more: Any = None) -> None:
            super().__init__()
            self.given = (sizes, more)
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.weight

    given = {"sizes": [1, [2, 3]], "more": {"a": {"b": 1.5}}}
    model = ai.inject(base(), block="delta_test_nested", after="stem", args=given, example_inputs=X)
    ai.save(model, tmp_path / "run.safetensors")
    loaded = ai.load(base(), tmp_path / "run.safetensors")
    assert loaded.stem.delta_test_nested.given == model.stem.delta_test_nested.given
    assert loaded.stem.delta_test_nested.given[0] == (1, (2, 3))


def test_a_folder_that_does_not_exist_is_named(tmp_path: Path) -> None:
    """Writing into a missing folder says which file could not be written."""
    with pytest.raises(errors.DeltaError, match=r"no/run\.safetensors cannot be written"):
        ai.save(inject(base()), tmp_path / "no" / "run.safetensors")


def test_a_file_is_as_readable_as_any_other(file: Path) -> None:
    """The file has the permissions that the user's umask gives, not those of a temporary file."""
    other = file.with_name("other")
    other.touch()
    assert file.stat().st_mode == other.stat().st_mode


def test_a_class_with_the_name_of_another_block_is_not_saved(tmp_path: Path) -> None:
    """A class that is not registered and is called like a block would come back as that block: refused."""

    class se(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.weight

    model = ai.inject(base(), block=se, after="stem", example_inputs=X)
    with pytest.raises(errors.DeltaError, match=r"stem\.se: its class se is not registered"):
        ai.save(model, tmp_path / "run.safetensors")


# --- another base -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (lambda: base(classes=7), ("head.weight", "float32 5x32 in the file, float32 7x32 here")),
        (lambda: base().half(), ("float32 32x3x3x3 in the file, float16 32x3x3x3 here",)),
        (lambda: nn.Sequential(base()), ("are not in this model (stem.weight",)),
        (lambda: torchvision.models.resnet18(), ("tensors of this model are unknown to it (conv1.weight",)),
    ],
)
def test_another_base_is_refused_with_what_differs(
    other: Callable[[], nn.Module], expected: tuple[str, ...], file: Path
) -> None:
    """Other shapes, dtypes or keys: the message counts and shows them."""
    text = refused(other(), file)
    assert "was made from another base model" in text
    assert all(part in text for part in expected), text


def test_frozen_weights_of_another_training_are_noticed(frozen_file: Path) -> None:
    """Same shapes, other values of a tensor outside the file: refused by its hash."""
    net = base()
    with torch.no_grad():
        net.units[1].conv.weight[0, 0, 0, 0] += 1e-6
    text = refused(net, frozen_file)
    assert (
        "1 of 6 frozen tensors have other values (units.1.conv.weight)" in text
        or "(units.1.conv.weight)" in text
    )
    assert "strict_base=False" in text


def test_strict_base_false_takes_other_values(frozen_file: Path) -> None:
    """On request the blocks go into a base with other weights, which keeps them."""
    net = base(seed=9)
    own = net.units[1].conv.weight.clone()
    loaded = ai.load(net, frozen_file, strict_base=False)
    assert torch.equal(loaded.units[1].conv.weight, own)
    assert len(ai.injected(loaded)) == 2


def test_strict_base_false_still_needs_shapes_that_fit(file: Path) -> None:
    """What is in the file must fit even then."""
    assert "head.bias: 5 in the file, 7 here" in refused(base(classes=7), file, strict_base=False)


def test_the_base_name_is_in_the_message(tmp_path: Path) -> None:
    """A file that knows its base says so when another is given."""
    ai.save(inject(base()), tmp_path / "run.safetensors", base="mine/net")
    assert "another base model (mine/net)" in refused(base(classes=7), tmp_path / "run.safetensors")


def test_an_injected_model_is_no_clean_base(file: Path) -> None:
    """Loading on top of blocks is refused, and they stay."""
    net = inject(base())
    with pytest.raises(errors.DeltaError, match="already carries injected blocks"):
        ai.load(net, file)
    assert list(ai.injected(net)) == ["units.0.cbam", "units.1.cbam"]


# --- damaged and hostile files ------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1, -1000])
def test_truncated_files_are_refused(keep: int, file: Path) -> None:
    """Cut anywhere, the file is refused as damaged and the model stays as it was."""
    whole = file.read_bytes()
    file.write_bytes(whole[:keep])
    assert "damaged or no safetensors file" in refused(base(), file)


@pytest.mark.parametrize(
    "content",
    [
        b"not a safetensors file at all",
        (2**63 - 1).to_bytes(8, "little") + b"{}",
        (10**9).to_bytes(8, "little") + b"{" * 100,
        (2).to_bytes(8, "little") + b"[]",
    ],
)
def test_files_that_are_no_safetensors_are_refused(content: bytes, file: Path) -> None:
    """Text, and headers that claim absurd lengths, are refused without reading on."""
    file.write_bytes(content)
    assert "damaged or no safetensors file" in refused(base(), file)


def test_a_pickle_is_refused(file: Path) -> None:
    """A torch.save file is not read, whatever it is called."""
    torch.save(base().state_dict(), file)
    assert "damaged or no safetensors file" in refused(base(), file)


def test_a_missing_file_and_a_plain_state_dict_are_told_apart(tmp_path: Path) -> None:
    """No file, and a safetensors file without a recipe, have messages of their own."""
    assert "no delta file at" in refused(base(), tmp_path / "none.safetensors")
    save_file(base().state_dict(), tmp_path / "plain.safetensors")
    assert "no delta of attninject" in refused(base(), tmp_path / "plain.safetensors")


def _set(record: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for part in parents:
        record = record[int(part)] if isinstance(record, list) else record[part]
    record[last] = value


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("format", 99, "has delta format 99, this attninject reads 1"),
        ("sites", [], "its metadata is damaged"),
        ("sites", "abc", "its metadata is damaged"),
        ("sites", [1, 2], "its metadata is damaged"),
        ("fingerprint", None, "its metadata is damaged"),
        ("fingerprint.values", {"stem.weight": 3}, "its metadata is damaged"),
        ("fingerprint.values", {"stem.weight": "0" * 64}, "does not cover"),
        ("sites.0.rule.block", "os.system", "os.system"),
        ("sites.0.rule.after", "units.7.norm", "units.7.norm"),
        ("sites.0.rule.after", "re:(a+)+$", ""),
        ("sites.0.rule.args", {"reduction": 10**12}, ""),
        ("sites.0.rule.args", {"nonsense": 1}, "nonsense"),
        ("sites.0.rule.name", "forward", "forward"),
        ("sites.0.qualified", "head", ""),
        ("sites.0.qualified", "units.0.other", ""),
        ("sites.0.layout", "NHWC", "was NHWC when it was saved and is NCHW in this model"),
    ],
)
def test_metadata_that_was_tampered_with_is_refused(path: str, value: Any, expected: str, file: Path) -> None:
    """A record that does not say what `save` writes raises a DeltaError and changes nothing."""
    edited(file, lambda tensors, record: _set(record, path, value))
    assert expected in refused(base(), file)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t: t.pop("units.0.cbam." + _first(t)), "cbam"),
        (lambda t: t.update({"units.0.cbam.extra": torch.zeros(1)}), "units.0.cbam.extra"),
        (lambda t: t.update({"backdoor": torch.zeros(1)}), "backdoor"),
        (lambda t: t.update({"head.weight": torch.zeros(5, 31)}), "head.weight"),
        (lambda t: t.update({"head.weight": torch.zeros(5, 32, dtype=torch.float64)}), "head.weight"),
        (lambda t: t.update({"units.0.cbam." + _first(t): torch.zeros(1, 1)}), "units.0.cbam"),
        (lambda t: t.pop("head.weight"), "does not cover"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change: Callable[[Any], Any], expected: str, file: Path) -> None:
    """Missing, surplus and misshapen tensors are named, and nothing is loaded."""
    edited(file, lambda tensors, record: change(tensors))
    assert expected in refused(base(), file)


def _first(tensors: dict[str, torch.Tensor]) -> str:
    start = "units.0.cbam."
    return next(key.removeprefix(start) for key in sorted(tensors) if key.startswith(start))


def test_deeply_nested_metadata_is_refused(file: Path) -> None:
    """A JSON bomb is damage like any other."""
    tensors = load_file(file)
    save_file(tensors, file, metadata={"attninject": "[" * 100_000})
    assert "its metadata is damaged" in refused(base(), file)


def test_an_unregistered_block_is_refused_until_it_is_registered(tmp_path: Path) -> None:
    """A class given as a block is stored by its name; load needs that name registered."""

    class DeltaTestGate(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1, channels, 1, 1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.weight

    model = ai.inject(base(), block=DeltaTestGate, after="units.0.norm", example_inputs=X)
    with torch.no_grad():
        model.units[0].deltatestgate.weight.mul_(0.5)
    ai.save(model, tmp_path / "run.safetensors")
    text = refused(base(), tmp_path / "run.safetensors")
    assert "DeltaTestGate" in text
    assert "register_block" in text
    ai.register_block("DeltaTestGate")(DeltaTestGate)
    loaded = ai.load(base(), tmp_path / "run.safetensors")
    with torch.no_grad():
        assert torch.equal(loaded(X), model(X))


def test_a_copy_of_an_injected_model_saves_the_same(tmp_path: Path) -> None:
    """What is recorded survives deepcopy."""
    model = trained(inject(base()))
    ai.save(model, tmp_path / "a.safetensors")
    ai.save(copy.deepcopy(model), tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_a_block_that_was_replaced_is_not_saved(tmp_path: Path) -> None:
    """Nobody could make the module in its place again; the message names it."""
    model = inject(base())
    model.units[0].cbam = nn.Identity()
    with pytest.raises(errors.DeltaError, match=r"units\.0\.cbam was replaced .* eject it first"):
        ai.save(model, tmp_path / "run.safetensors")
    assert list(tmp_path.iterdir()) == []
