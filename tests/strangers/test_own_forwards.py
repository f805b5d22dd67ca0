"""An instance gets a forward of its own after injection: the block runs on, or the assignment says what to do."""

from __future__ import annotations

import copy
import functools
import pickle
import types
from collections.abc import Callable

import pytest
import torch
from small import Around, Through, calls_of, images, se, stir
from strangers.test_shared_modules import Unit
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import attninject as ai
from attninject import errors


class Plain(nn.Module):
    """A unit with one forward, whose graph is rewritten."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        self.act = nn.SiLU()

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))


def scrambled(model: nn.Module) -> nn.Module:
    """Batch norms as training leaves them, so that a wrong fold shows."""
    generator = torch.Generator().manual_seed(3)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(generator=generator)
            m.running_var.uniform_(0.5, 2, generator=generator)
    return model.eval()


def injected(**where: object) -> nn.Module:
    """Two units with blocks that do something."""
    torch.manual_seed(0)
    model = scrambled(nn.Sequential(Unit(3, 8), Unit(8, 8)))
    ai.inject(model, **se(**where), example_inputs=images())
    stir(model)
    return model


def fuse(model: nn.Module) -> nn.Module:
    """What detectors do before inference: fold norms, and put a shorter forward over each instance."""
    for m in model.modules():
        if isinstance(m, Unit):
            m.conv = fuse_conv_bn_eval(m.conv, m.bn)
            delattr(m, "bn")
            m.forward = m.forward_fuse
    return model


def test_a_block_runs_on_around_a_forward_that_replaced_its_carriers() -> None:
    """The fused net computes what the unfused one did, blocks and all."""
    model, x = injected(after="*"), images()
    with torch.no_grad():
        before = model(x)
        torch.testing.assert_close(fuse(model)(x), before, rtol=1e-5, atol=1e-5)
        with ai.disabled(model):
            assert not torch.allclose(model(x), before, atol=1e-2)
    assert calls_of(model, x) == {"0.se": 1, "1.se": 1}


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_of_a_fused_net_is_independent_and_complete(duplicate: Callable) -> None:
    """Its forwards are bound to its own modules."""
    model, x = fuse(injected(after="*")), images()
    with torch.no_grad():
        before = model(x)
        twin = duplicate(model)
        assert torch.equal(twin(x), before)
        assert calls_of(twin, x) == {"0.se": 1, "1.se": 1}
        for p in model.parameters():
            p.zero_()
        assert torch.equal(twin(x), before)


def test_ejecting_leaves_the_assigned_forward_as_a_plain_attribute() -> None:
    """As on a net that never had blocks; deleting it gives the class's forward back."""
    model, x = fuse(injected(after="*")), images()
    with torch.no_grad(), ai.disabled(model):
        bare = model(x)
    ai.eject(model)
    assert [type(m) for m in model] == [Unit, Unit]
    assert model[0].__dict__["forward"] == model[0].forward_fuse
    assert torch.equal(model(x), bare)


def test_taking_the_assigned_forward_off_again_gives_the_carriers_own() -> None:
    """By `del`, and by putting back what was there; a part that is ejected leaves the rest as it was."""
    model, x = injected(after="*"), images()
    before, old = model(x), model[0].forward
    for undo in (lambda: delattr(model[0], "forward"), lambda: setattr(model[0], "forward", old)):
        model[0].forward = model[0].forward_fuse
        assert not torch.equal(model(x), before)
        undo()
        assert torch.equal(model(x), before)
    with pytest.raises(AttributeError):
        del model[0].forward
    model[0].forward = model[0].forward_fuse
    ai.inject(model, **se(after="1"), example_inputs=x)
    ai.eject(model, "1.*")
    assert calls_of(model, x) == {"0.se": 1}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*:DeprecationWarning")
def test_a_fused_net_is_compiled_exported_and_traced_with_its_blocks() -> None:
    """Without a graph break."""
    model, x = fuse(injected(after="*")), images()
    with torch.no_grad():
        expected = model(x)
        with ai.disabled(model):
            assert not torch.allclose(model(x), expected, atol=1e-2)
        assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(x), expected)
        for strict in (False, True):
            assert torch.equal(torch.export.export(model, (x,), strict=strict).module()(x), expected)
        assert torch.equal(torch.jit.trace(model, x)(x), expected)
    torch._dynamo.reset()


def test_a_plan_made_on_a_fused_net_sees_the_assigned_forwards() -> None:
    """The probe runs what the net runs; the norms are gone."""
    model = fuse(injected(after="*"))
    assert [s.name for s in ai.plan(model, **se(after="0"), example_inputs=images()).sites] == ["0.se_2"]
    assert "0.bn" not in {s.path for s in ai.sites(model, example_inputs=images())}


# --- forwards that call the old one ------------------------------------------------------------


def by_closure(module: nn.Module) -> Callable:
    """A function around the bound forward."""
    old = module.forward
    return lambda x: old(x) * 1


def by_partial(module: nn.Module) -> Callable:
    """As accelerate does: the old one is an attribute of the module and of the new one."""
    module._old_forward = module.forward  # type: ignore[assignment]
    new = functools.partial(lambda m, x: m._old_forward(x) * 1, module)
    return functools.update_wrapper(new, module._old_forward)


def by_method(module: nn.Module) -> Callable:
    """A method that finds the old one among the module's attributes."""
    module._old_forward = module.forward  # type: ignore[assignment]
    return types.MethodType(lambda self, x: self._old_forward(x) * 1, module)


@pytest.mark.parametrize("wrap", [by_closure, by_partial, by_method])
@pytest.mark.parametrize("where", ["0", "0.conv"])
def test_a_wrapper_of_the_forward_runs_the_block_once(wrap: Callable, where: str) -> None:
    """It calls the block's forward itself; the block cannot be taken from under it."""
    torch.manual_seed(0)
    model = Around(nn.Sequential(Plain(8, 8)))
    ai.inject(model.eval(), **se(after=f"inner.{where}"), example_inputs=images())
    stir(model)
    x, (name,) = images(), ai.injected(model)
    before, carrier = model(x), model.inner[0]
    carrier.forward = wrap(carrier)
    assert calls_of(model, x) == {name: 1}
    assert torch.equal(model(x), before)
    with pytest.raises(errors.CannotRewriteError, match="take it off first"):
        ai.eject(model)
    del carrier.forward
    assert torch.equal(model(x), before)
    assert not ai.injected(ai.eject(model))


# --- what cannot run on ------------------------------------------------------------------------


def test_a_forward_that_would_replace_a_rewritten_one_is_refused() -> None:
    """The block stands within the old forward; nothing has changed after the error."""
    model = Around(Through(lambda self, x: self.b(self.a(x)))).eval()
    ai.inject(model, **se(after="inner.a"), example_inputs=images())
    before = model(images())
    with pytest.raises(
        errors.CannotRewriteError, match=r"would replace the one that se stands in.*eject it first"
    ):
        model.inner.forward = types.MethodType(lambda self, x: self.b(x), model.inner)
    assert torch.equal(model(images()), before)
    assert calls_of(model, images()) == {"inner.se": 1}


def test_a_forward_without_the_operand_of_a_block_is_refused() -> None:
    """A block before a module works on one of its parameters."""
    model = injected(before="1")
    with pytest.raises(errors.CannotRewriteError, match="takes no 'x'"):
        model[1].forward = lambda image: image
    model[1].forward = lambda x: x
    assert calls_of(model, images()) == {"1.se": 1}


# --- folding a norm across a block --------------------------------------------------------------


@pytest.mark.parametrize("cls", [Unit, Plain])
@pytest.mark.parametrize("where", [{"after": "*.conv"}, {"before": "*.bn"}])
def test_a_plan_says_that_a_block_parts_a_layer_and_its_norm(cls: Callable, where: dict) -> None:
    """Not so after the norm."""
    model = nn.Sequential(cls(3, 8), cls(8, 8)).eval()
    found = ai.plan(model, **se(**where), example_inputs=images())
    assert len([n for n in found.notes if "between a layer and its batch norm" in n]) == 1
    assert ai.plan(model, **se(after="*"), example_inputs=images()).notes == ()


def test_folding_across_a_carried_block_is_refused() -> None:
    """torch's own helper folds into a copy, so the net is as it was."""
    model, x = injected(after="*.conv"), images()
    before = model(x)
    with pytest.raises(errors.CannotRewriteError, match="would reach across it"):
        fuse(model)
    assert torch.equal(model(x), before)
    ai.eject(model)
    with torch.no_grad():
        base = model(x)
        torch.testing.assert_close(fuse(model)(x), base, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layer", [nn.Conv2d(8, 8, 3, padding=1), nn.ConvTranspose2d(8, 8, 3, padding=1)])
def test_folding_into_a_layer_with_bias_is_refused_too(layer: nn.Module) -> None:
    """It is known by its factors, one per channel; weights that are loaded or trained are not of that kind."""
    model = scrambled(nn.Sequential(nn.Sequential(layer, nn.BatchNorm2d(8)), nn.ReLU()))
    x = torch.randn(2, 8, 6, 6)
    ai.inject(model, **se(after="0.0"), example_inputs=x)
    stir(model)
    before, carrier = model(x), model[0][0]
    assert ai.injected(carrier)
    with pytest.raises(errors.CannotRewriteError, match="would reach across it"):
        fuse_conv_bn_eval(carrier, model[0][1], transpose=isinstance(layer, nn.ConvTranspose2d))
    assert torch.equal(model(x), before)
    state = {
        k: v + torch.randn_like(v) if v.is_floating_point() else v for k, v in model.state_dict().items()
    }
    for again in (model.state_dict(), state):
        model.load_state_dict(again, assign=True)
    carrier.weight = nn.Parameter(carrier.weight * 2 + 1)
    assert calls_of(model, x) == {"0.0.se": 1}


@pytest.mark.filterwarnings("ignore")
def test_folding_across_a_block_in_a_graph_is_refused() -> None:
    """By torch's helper for lists of names, and by taking the norm away."""
    model = scrambled(nn.Sequential(Plain(3, 8)))
    ai.inject(model, **se(after="0.conv"), example_inputs=images())
    stir(model)
    before = model(images())
    with pytest.raises(errors.CannotRewriteError, match="would reach across it"):
        torch.ao.quantization.fuse_modules(model[0], ["conv", "bn"], inplace=True)
    with pytest.raises(errors.CannotRewriteError, match="would reach across it"):
        del model[0].bn
    assert torch.equal(model(images()), before)
    model[0].bn = nn.SyncBatchNorm.convert_sync_batchnorm(model[0].bn)
    model[0].conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
