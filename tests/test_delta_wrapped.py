"""Saving a wrapped model: averages of weights, compiled and parallel ones, holders of a model, PEFT's adapters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from test_delta import X, base, inject, trained
from timm.utils import ModelEmaV2, ModelEmaV3
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import attninject as ai
from attninject import errors
from attninject.planning import support


def outputs(net: nn.Module) -> Tensor:
    """What the net gives in eval mode."""
    with torch.no_grad():
        return net.eval()(X)


def steps(model: nn.Module, after_each: Callable[[], object] = lambda: None) -> None:
    """Three steps of what requires grad, in eval mode so that batch norms stay as they are."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3):
        model(X).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        after_each()


def keys_of(path: Path) -> set[str]:
    """Names of a file's tensors."""
    with safe_open(path, framework="pt") as file:
        return set(file.keys())


# --- averages -------------------------------------------------------------------------------------

AVERAGES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "swa": AveragedModel,
    "ema": lambda net: AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True),
    "timm_v2": lambda net: ModelEmaV2(net, decay=0.5),
    "timm_v3": lambda net: ModelEmaV3(net, decay=0.5),
}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("kind", AVERAGES)
def test_an_average_of_weights_is_saved_and_comes_back(kind: str, frozen: bool, tmp_path: Path) -> None:
    """The averaged copy, not the model that it follows; whole, as an average may round what is frozen."""
    net = inject(base())
    if frozen:
        ai.freeze(net)
    average = AVERAGES[kind](net)
    follow = getattr(average, "update_parameters", None) or average.update
    steps(net, lambda: follow(net))
    path = tmp_path / "average.safetensors"
    ai.save(average, path)
    assert not any(key.startswith("module.") for key in keys_of(path))
    assert torch.equal(outputs(ai.load(base(), path)), outputs(average.module))
    assert not torch.equal(outputs(average.module), outputs(net))
    assert list(ai.injected(average)) == list(ai.injected(net))


def test_nothing_is_injected_into_an_average() -> None:
    """It would no longer be a copy of the model that it follows; the message says what to pass."""
    with pytest.raises(
        errors.UnsupportedModelError, match=r"wrapped in AveragedModel; inject into model\.module"
    ):
        inject(AveragedModel(base()))  # type: ignore[arg-type]


# --- wrappers in wrappers -------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # by torch 2.11's own compiler
@pytest.mark.parametrize(
    "wrap",
    [
        nn.DataParallel,
        lambda net: nn.DataParallel(torch.compile(net)),
        lambda net: torch.compile(nn.DataParallel(net)),
        lambda net: AveragedModel(nn.DataParallel(net)),
        lambda net: AveragedModel(torch.compile(net)),
    ],
    ids=["parallel", "parallel_compiled", "compiled_parallel", "average_parallel", "average_compiled"],
)
def test_wrappers_in_wrappers_do_not_show_in_the_file(
    wrap: Callable[[Any], nn.Module], tmp_path: Path
) -> None:
    """Whatever the order: the same bytes as of the model inside."""
    net = trained(inject(base()))
    ai.save(net, tmp_path / "a.safetensors")
    ai.save(wrap(net), tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
def test_ddp_around_a_compiled_model(tmp_path: Path) -> None:
    """The usual order of both in training; one process, over gloo."""
    net = inject(base())
    ai.save(net, tmp_path / "a.safetensors")
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1
    )
    try:
        wrapped = nn.parallel.DistributedDataParallel(torch.compile(net))
        assert support.unwrapped(wrapped) is net
        ai.save(wrapped, tmp_path / "b.safetensors")
    finally:
        torch.distributed.destroy_process_group()
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


class Holder(nn.Module):
    """A user's own module around the model, as a LightningModule is."""

    def __init__(self, net: nn.Module, more: nn.Module | None = None) -> None:
        super().__init__()
        self.net, self.more = net, more

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, 3, H, W) → what the net gives."""
        return self.net(x)


def test_a_holder_without_tensors_of_its_own_is_looked_through(tmp_path: Path) -> None:
    """Injected first, put into a holder then: the delta is the model's."""
    net = trained(inject(base()))
    path = tmp_path / "run.safetensors"
    ai.save(Holder(Holder(net)), path)
    assert torch.equal(outputs(ai.load(base(), path)), outputs(net))


def test_a_holder_with_tensors_of_its_own_is_refused_with_the_step_that_helps(tmp_path: Path) -> None:
    """They would be lost; the message names them, and the model to save in the holder's place."""
    holder = Holder(inject(base()), nn.Linear(2, 2))
    with pytest.raises(
        errors.DeltaError, match=r"tensors of its own \(more\.weight, more\.bias\).*ai\.save\(model\.net"
    ):
        ai.save(holder, tmp_path / "run.safetensors")
    ai.save(holder.net, tmp_path / "run.safetensors")
    assert torch.equal(outputs(ai.load(base(), tmp_path / "run.safetensors")), outputs(holder))


def test_a_holder_that_was_injected_as_a_whole_stays_whole(tmp_path: Path) -> None:
    """Where the sites' names begin at the holder, its own tensors are in the file as ever."""
    holder = Holder(base(), nn.Linear(2, 2))
    ai.inject(holder, block="se", after="net.units.*.norm", args={"reduction": 8}, example_inputs=X)
    ai.save(holder, tmp_path / "run.safetensors")
    assert "more.weight" in keys_of(tmp_path / "run.safetensors")


# --- changes that no version counter sees ---------------------------------------------------------


def test_a_frozen_tensor_that_was_written_through_data_is_in_the_file(tmp_path: Path) -> None:
    """Weights written past autograd, as merged adapters are, would else be left out as unchanged."""
    net = inject(base())
    net.requires_grad_(False)
    net.units[0].conv.weight.data += 0.5
    path = tmp_path / "run.safetensors"
    ai.save(net, path)
    keys = keys_of(path)
    assert "units.0.conv.weight" in keys
    assert "units.1.conv.weight" not in keys
    assert torch.equal(outputs(ai.load(base(), path)), outputs(net))


# --- PEFT -----------------------------------------------------------------------------------------


def adapted(targets: list[str]) -> tuple[Any, nn.Module]:
    """A PeftModel of an injected net, trained: adapters at `targets`, and every CBAM among `modules_to_save`."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    net = inject(base())
    with torch.no_grad():
        net.head.bias.add_(1.0)  # trained before the adapters came
    model = peft.get_peft_model(net, peft.LoraConfig(target_modules=targets, modules_to_save=["cbam"])).eval()
    steps(model)
    return model, net


@pytest.mark.parametrize("targets", [["conv"], ["head"], ["conv", "head"]], ids=str)
def test_a_peft_model_is_saved_with_its_adapters_merged(targets: list[str], tmp_path: Path) -> None:
    """The file gives what `merge_and_unload()` gives, bit for bit; the PEFT model itself goes on as it was."""
    model, _ = adapted(targets)
    before = outputs(model)
    path = tmp_path / "run.safetensors"
    ai.save(model, path)
    assert torch.equal(outputs(model), before)
    loaded = outputs(ai.load(base(), path))
    torch.testing.assert_close(loaded, before)
    assert not torch.allclose(loaded, outputs(inject(base())))
    assert "stem.weight" not in keys_of(path)
    assert torch.equal(loaded, outputs(model.merge_and_unload()))


@pytest.mark.parametrize("targets", [["conv"], ["head"]], ids=str)
def test_a_model_that_peft_has_merged_is_saved(targets: list[str], tmp_path: Path) -> None:
    """Merging writes frozen weights unseen by version counters; they are in the file none the less."""
    model, _ = adapted(targets)
    merged = model.merge_and_unload()
    path = tmp_path / "run.safetensors"
    ai.save(merged, path)
    assert list(ai.injected(merged)) == ["units.0.cbam", "units.1.cbam"]
    assert torch.equal(outputs(ai.load(base(), path)), outputs(merged))
    assert "stem.weight" not in keys_of(path)


def test_peft_saves_and_reloads_what_was_injected(tmp_path: Path) -> None:
    """The other direction: PEFT's own file holds the blocks, and gives them to a net injected anew."""
    model, _ = adapted(["conv"])
    peft = pytest.importorskip("peft")
    model.save_pretrained(tmp_path)
    net = inject(base())
    with torch.no_grad():
        net.head.bias.add_(1.0)
    assert torch.equal(outputs(peft.PeftModel.from_pretrained(net, tmp_path)), outputs(model))


def test_adapters_without_a_peft_model_are_refused_with_the_step_that_helps(tmp_path: Path) -> None:
    """Nobody is there to merge them: the message names them and the call; nothing is written."""
    model, net = adapted(["conv"])
    with pytest.raises(errors.DeltaError, match=r"units\.0\.conv.*merge_and_unload\(\)"):
        ai.save(net, tmp_path / "run.safetensors")
    assert list(tmp_path.iterdir()) == []
    ai.save(AveragedModel(copy.deepcopy(model)), tmp_path / "average.safetensors")
    torch.testing.assert_close(outputs(ai.load(base(), tmp_path / "average.safetensors")), outputs(model))
