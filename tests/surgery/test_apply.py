"""Generated forwards live through changes, copies and files, and go away without a trace."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
from nets import image, net, pretrained
from small import Around, Through, calls_of, images, se, state, stir
from torch import nn
from torch.nn import functional as F

import attninject as ai
from attninject import errors
from attninject.surgery import apply


class Rated(Through):
    """Reads a rate and a switch from itself, as networks read their drop rates."""

    def __init__(self) -> None:
        super().__init__(None)
        self.rate, self.extra = 0.0, None

    def forward(self, x):
        y = F.dropout(self.a(x), self.rate, self.training)
        if self.extra is not None:
            y = self.extra(y)
        return self.b(y)


def rated() -> nn.Module:
    """A model around `Rated`, with the same weights each time."""
    torch.manual_seed(0)
    return Around(Rated())


def seeded(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """One forward under a fixed seed."""
    torch.manual_seed(7)
    with torch.no_grad():
        return model(x)


# --- attributes that change --------------------------------------------------------------------


def raise_rate(m: nn.Module) -> None:
    """A rate that the graph read."""
    m.inner.rate = 0.5


def add_layer(m: nn.Module) -> None:
    """A slot that was None."""
    torch.manual_seed(1)
    m.inner.extra = nn.Conv2d(8, 8, 1)


def replace_child(m: nn.Module) -> None:
    """Another child under the same name."""
    m.inner.b = nn.Identity()


@pytest.mark.parametrize("change", [raise_rate, add_layer, replace_child])
@pytest.mark.parametrize("training", [True, False])
def test_a_change_after_injection_acts_as_on_the_base(change: Callable, training: bool) -> None:
    """The graph is made anew when something it depends on changes; also changed back."""
    base, model, x = rated().train(training), rated().train(training), images()
    ai.inject(model, **se(after="inner.a"), example_inputs=x)
    assert "inner.se" in ai.injected(model)
    assert torch.equal(seeded(model, x), seeded(base, x))
    change(base)
    change(model)
    assert torch.equal(seeded(model, x), seeded(base, x))
    assert calls_of(model, x) == {"inner.se": 1}
    for m in (base, model):
        m.train(not training)
    assert torch.equal(seeded(model, x), seeded(base, x))


def test_a_change_that_removes_the_site_says_so() -> None:
    """A forward that no longer calls the site raises an error that names the block and the way out."""

    class Switch(Through):
        def __init__(self) -> None:
            super().__init__(None)
            self.on = True

        def forward(self, x):
            return self.b(self.a(x)) if self.on else self.b(x)

    model, x = Around(Switch()), images()
    ai.inject(model, **se(after="inner.a"), example_inputs=x)
    model.inner.on = False
    with pytest.raises(errors.CannotRewriteError, match=r"no longer has a .*'se'"):
        model(x)
    model.inner.on = True
    assert model(x).shape == (2, 8, 16, 16)
    ai.eject(model).inner.on = False
    assert model(x).shape == (2, 8, 16, 16)


class Switched(nn.Module):
    """A weight of its own, used as autocast would cast it, and one more sum when it is switched on."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.more = nn.Conv2d(8, 8, 3, padding=1), False
        self.weight = nn.Parameter(torch.randn(8, 8, 1, 1))

    def forward(self, x):
        if self.more:
            x = x + 1
        return x + F.conv2d(self.a(x), self.weight)


def test_a_graph_is_made_anew_under_autocast() -> None:
    """What autocast made of the inputs is no reason to find the forward changed."""
    model, x = Around(Switched()).eval(), images()
    ai.inject(model, **se(after="inner.a"), example_inputs=x)
    base = ai.eject(copy.deepcopy(model))
    model.inner.more = base.inner.more = True
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model(x), base(x))


class Config:
    """Settings as an object of their own, one within the other."""

    def __init__(self, **more: object) -> None:
        self.double = False
        self.__dict__.update(more)


def double(m: nn.Module) -> None:
    """A setting."""
    m.inner.config.double = True


def double_deeper(m: nn.Module) -> None:
    """A setting of settings."""
    m.inner.config.deeper.double = True


def exchange(m: nn.Module) -> None:
    """The whole object."""
    m.inner.config = Config(deeper=Config(double=True))


@pytest.mark.parametrize("change", [double, double_deeper, exchange])
def test_a_change_of_settings_acts_as_on_the_base(change: Callable) -> None:
    """The graph read what a config says; the config's class is as it was."""

    def configured(self, x):
        x = x * 2 if self.config.double else x
        return self.b(self.a(x)) * (3 if self.config.deeper.double else 1)

    model, x = Around(Through(configured)).eval(), images()
    model.inner.config = Config(deeper=Config())
    base = copy.deepcopy(model)
    ai.inject(model, **se(after="inner.a"), example_inputs=x)
    assert "__getattribute__" not in vars(Config)
    for m in (base, model):
        change(m)
    assert torch.equal(model(x), base(x))
    assert calls_of(model, x) == {"inner.se": 1}


def test_a_second_injection_leaves_the_first_where_it_is() -> None:
    """Switched on, the forward has another first sum: the block behind the residual one stays there."""
    model, x = Around(Switched()).eval(), images()
    ai.inject(model, **se(after="inner::add", init="paper"), example_inputs=x)
    model.inner.more = True
    before = model(x)
    ai.inject(model, **se(after="inner.a"), example_inputs=x)
    assert torch.equal(model(x), before)


def test_a_forward_assigned_since_the_plan_makes_it_stale() -> None:
    """It would win over the one with the block in it."""
    model = Around(Through(body))
    plan = ai.plan(model, **se(after="inner.a"), example_inputs=images())
    model.inner.forward = model.inner.b.forward
    with pytest.raises(errors.StalePlanError):
        ai.inject(model, plan)


# --- copies and files --------------------------------------------------------------------------


def through_pickle(m: nn.Module) -> nn.Module:
    """Bytes and back."""
    return pickle.loads(pickle.dumps(m))


def through_file(m: nn.Module) -> nn.Module:
    """torch.save and torch.load."""
    file = io.BytesIO()
    torch.save(m, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle, through_file])
@pytest.mark.parametrize(
    "where", [{"after": "layer*.*.bn2"}, {"after": "layer1"}, {"after": "layer2.0.downsample"}]
)
def test_a_duplicate_is_independent_and_complete(duplicate: Callable, where: dict) -> None:
    """A copy computes the same, has its own blocks, can be ejected, injected again and duplicated again."""
    model, x = net("torchvision/resnet18"), image("resnet")
    with torch.no_grad():
        base = model(x)
        ai.inject(model, **se(**where))
        stir(model)
        reference = model(x)
        twin = duplicate(duplicate(model))
        assert torch.equal(twin(x), reference)
        stir(twin, seed=9)
        assert not torch.equal(twin(x), reference)
        assert torch.equal(model(x), reference)
        ai.inject(twin, **se(**where))
        assert len(ai.injected(twin)) == 2 * len(ai.injected(model))
        ai.eject(twin)
        assert torch.equal(twin(x), base)
    assert {type(m) for m in twin.modules()} == {type(m) for m in net("torchvision/resnet18").modules()}


def test_a_duplicate_follows_its_own_attributes() -> None:
    """Changing a copy's rate changes the copy only."""
    model, x = rated().train(), images()
    ai.inject(model, **se(after="inner.a"), example_inputs=x)
    before = seeded(model, x)
    twin = copy.deepcopy(model)
    twin.inner.rate = 0.5
    assert not torch.equal(seeded(twin, x), before)
    assert torch.equal(seeded(model, x), before)


def test_a_shallow_copy_shares_what_a_shallow_copy_shares() -> None:
    """copy.copy of a carrier computes the same with the same tensors."""
    model, x = Around(Through(body)).eval(), images()
    ai.inject(model, **se(after="inner.a"), example_inputs=x)
    stir(model)
    twin = copy.copy(model.inner)
    y = model.stem(x)
    assert torch.equal(twin(y), model.inner(y))
    assert [id(p) for p in twin.parameters()] == [id(p) for p in model.inner.parameters()]


class Sized(nn.Module):
    """Tokens as a map, whose size the caller sets before."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.size = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), None

    def forward(self, x):
        y = x.transpose(1, 2).reshape(x.shape[0], 8, self.size[0], self.size[1])
        return x + self.norm(self.a(y)).flatten(2).transpose(1, 2)


class Sizing(nn.Module):
    """The caller."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner = nn.Conv2d(3, 8, 1), Sized()

    def forward(self, x):
        y = self.stem(x)
        self.inner.size = tuple(y.shape[2:])
        return self.inner(y.flatten(2).transpose(1, 2))


def part_ejected(model: nn.Module) -> None:
    """One of two blocks goes."""
    ai.eject(model, "inner.two")


def more_injected(model: nn.Module) -> None:
    """One more block, around the same module."""
    ai.inject(model, block="eca", after="inner", name="three")


def out_and_in(model: nn.Module) -> None:
    """As switching between deltas does."""
    apply.put_back(model, through_pickle(apply.take_out(model)))


@pytest.mark.parametrize("change", [part_ejected, more_injected, out_and_in])
def test_a_model_read_from_a_file_keeps_blocks_whose_graph_waits_for_a_call(change: Callable) -> None:
    """What the forward reads is set by a run alone, and the model is changed before there was one."""
    model, x = Sizing().eval(), images()
    rules = [{**se(after="inner.norm", init="paper"), "name": name} for name in ("one", "two")]
    ai.inject(model, {"rules": rules}, example_inputs=x)
    twin = through_pickle(model)
    for m in (model, twin):
        change(m)
    assert twin.load_state_dict(model.state_dict()).missing_keys == []
    assert torch.equal(twin(x), model(x))
    assert set(calls_of(twin, x).values()) == {1}
    assert ai.eject(twin)(x).shape == (2, 256, 8)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_protocol_of_pickle_does(protocol: int) -> None:
    """The oldest ones know no way to make an object without its constructor."""
    model, x = rated(), images()
    ai.inject(model, **se(after="inner.a"), example_inputs=x)
    twin = pickle.loads(pickle.dumps(model, protocol))
    assert torch.equal(seeded(twin, x), seeded(model, x))


def body(self, x):
    """Two layers."""
    return self.b(self.a(x))


# --- taking out --------------------------------------------------------------------------------


def test_ejecting_restores_the_model_to_the_identity_of_every_part() -> None:
    """Deep state before injection and after ejection is equal: classes, attributes, tensors, slots."""
    model = net("timm/resnet14t")
    before = state(model)
    order = [list(m.__dict__) for m in model.modules()]
    ai.inject(model, **se(after="layer*.*.bn3"))
    ai.inject(model, block="cbam", after="layer1")
    assert state(model) != before
    ai.eject(model)
    after = state(model)
    assert [sorted(m.__dict__) for m in model.modules()] == [sorted(o) for o in order]
    for (name, *then, attributes), (_, *now, found) in zip(before["modules"], after["modules"], strict=True):
        assert (then, sorted(map(str, attributes[2]))) == (now, sorted(map(str, found[2]))), name
    assert {k: v for k, v in after.items() if k != "modules"} == {
        k: v for k, v in before.items() if k != "modules"
    }


def test_a_part_is_ejected_by_pattern_and_the_rest_runs_on() -> None:
    """By stage, by block name, and one of two at a site; trained values of the others stay."""
    model, x = net("torchvision/resnet18"), image("resnet")
    ai.inject(model, "se_resnet")
    ai.inject(model, block="cbam", after="layer1.*.bn2")
    stir(model)
    kept = {k: v.clone() for k, v in model.state_dict().items() if ".se." in k and "layer4" not in k}
    ai.eject(model, "layer4.**")
    assert not any(k.startswith("layer4") for k in ai.injected(model))
    ai.eject(model, "**.cbam")
    assert set(ai.injected(model)) == {f"layer{n}.{i}.se" for n in (1, 2, 3) for i in (0, 1)}
    now = model.state_dict()
    assert all(torch.equal(now[k], v) for k, v in kept.items())
    assert set(calls_of(model, x).values()) == {1}
    with pytest.raises(errors.NoMatchError, match="no injected block matches 'layer4'"):
        ai.eject(model, "layer4")


def test_disabled_gives_the_base_and_ends_also_when_something_raises() -> None:
    """Trained blocks are passed through inside, and back afterwards; nested too."""
    base, model, x = net("torchvision/resnet18"), net("torchvision/resnet18"), image("resnet")
    ai.inject(model, "se_resnet")
    stir(model)
    with torch.no_grad():
        trained = model(x)
        with ai.disabled(model):
            with ai.disabled(model):
                assert torch.equal(model(x), base(x))
            assert torch.equal(model(x), base(x))
        assert torch.equal(model(x), trained)
        with pytest.raises(RuntimeError), ai.disabled(model):
            model(x[0, 0, 0])
        assert torch.equal(model(x), trained)


# --- gradients ---------------------------------------------------------------------------------


class Saves(torch.autograd.Function):
    """x ↦ eˣ/eˣ·x written so that the result itself is kept for the backward."""

    @staticmethod
    def forward(ctx, x):
        y = x * 1
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, grad):
        (y,) = ctx.saved_tensors
        return grad + 0 * y


class Keeps(nn.Module):
    """A block whose backward needs its own output."""

    def __init__(self, channels: int) -> None:
        super().__init__()

    def forward(self, x):
        return Saves.apply(x)


def test_in_place_code_behind_a_block_that_kept_its_output_trains() -> None:
    """`+=`, `.mul_` and `F.relu(inplace=True)` right behind a block do not break the backward."""

    def owner(self, x):
        y = self.a(x)
        y += x
        z = self.b(y)
        z.mul_(2)
        w = F.relu(self.c(z), inplace=True)
        return self.d(w)

    layers = {"c": nn.Conv2d(8, 8, 1), "d": nn.Conv2d(8, 8, 1)}
    torch.manual_seed(0)
    base, x = Around(Through(owner, **layers)), images()
    model = copy.deepcopy(base)
    ai.inject(model, block=Keeps, after="inner.{a,b,c,d}", example_inputs=x)
    assert len(ai.injected(model)) == 4
    for m in (base, model):
        m(x).square().sum().backward()
    for name, p in base.named_parameters():
        assert torch.equal(p.grad, model.get_parameter(name).grad), name


# --- timm's own verbs --------------------------------------------------------------------------


def test_timm_resnet_verbs_work_as_on_the_base() -> None:
    """reset_classifier, forward_features, forward_intermediates, set_grad_checkpointing; before and after."""
    for early in (True, False):
        base, model, x = net("timm/resnet14t"), net("timm/resnet14t"), image("resnet")
        if early:
            model.set_grad_checkpointing(True)
        ai.inject(model, block="cbam", place="residual_branch")
        base.set_grad_checkpointing(True)
        if not early:
            model.set_grad_checkpointing(True)
        with torch.no_grad():
            for b, m in zip(base.forward_intermediates(x)[1], model.forward_intermediates(x)[1], strict=True):
                assert torch.equal(b, m)
            assert torch.equal(base.forward_features(x), model.forward_features(x))
        for m in (base, model):
            torch.manual_seed(0)
            m.reset_classifier(5)
        assert torch.equal(base(x), model(x))
        names = list(ai.injected(model))
        counts = dict.fromkeys(names, 0)

        def count(name: str, counts: dict = counts) -> Callable:
            return lambda *_: counts.__setitem__(name, counts[name] + 1)

        handles = [b.register_forward_hook(count(n)) for n, b in ai.injected(model).items()]
        model.train()(x).sum().backward()
        assert set(counts.values()) == {2}, "checkpointed blocks run again in the backward"
        for h in handles:
            h.remove()


def swin() -> nn.Module:
    """A small Swin transformer with windows."""
    torch.manual_seed(0)
    return pretrained(
        timm.models.SwinTransformer(
            img_size=56,
            patch_size=4,
            embed_dim=16,
            depths=(2, 2),
            num_heads=(2, 2),
            window_size=7,
            num_classes=4,
        )
    )


@pytest.mark.filterwarnings("ignore")  # timm's resizing of the bias table
def test_a_swin_given_another_input_size_later_works_as_the_base() -> None:
    """set_input_size after injection: attributes that the graph read have changed, so it is made anew."""
    base, model = swin(), swin()
    ai.inject(model, block="cbam", place="residual_branch", args={"reduction": 4})
    assert torch.equal(model(images(size=56)), base(images(size=56)))
    for m in (base, model):
        m.set_input_size((112, 112), window_size=14)
    x = images(size=112)
    assert torch.equal(model(x), base(x))
    assert set(calls_of(model, x).values()) == {1}


def test_a_vit_given_another_input_size_later_works_as_the_base() -> None:
    """Tokens of another image, square or not, find their grid by the map that they were made of."""
    kwargs = {"img_size": 64, "patch_size": 16, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 4}
    torch.manual_seed(0)
    base = pretrained(timm.models.VisionTransformer(**kwargs))
    model = copy.deepcopy(base)
    ai.inject(model, block="cbam", place="residual_branch", args={"reduction": 4})
    for m in (base, model):
        m.set_input_size((96, 96))
    assert torch.equal(model(images(size=96)), base(images(size=96)))
    for m in (base, model):
        m.set_input_size((32, 96))
    x = torch.randn(1, 3, 32, 96)
    assert torch.equal(model(x), base(x))


@pytest.mark.parametrize("name", ["resnet14t", "convnext_atto"])
def test_features_only_before_and_after(name: str) -> None:
    """A feature extractor can be injected; and a feature list made of an injected net runs its blocks."""
    torch.manual_seed(0)
    base = pretrained(timm.create_model(name, features_only=True))
    model, x = copy.deepcopy(base), images(size=64)
    ai.inject(model, block="cbam", place="residual_branch")
    with torch.no_grad():
        for a, b in zip(model(x), base(x), strict=True):
            assert torch.equal(a, b)
    assert set(calls_of(model, x).values()) == {1}


def test_a_torchvision_checkpoint_loads_before_and_after() -> None:
    """The original keys are all there; the new ones are the only missing ones."""
    weights = net("torchvision/resnet18").state_dict()
    model = torchvision.models.resnet18(weights=None)
    ai.inject(model, "cbam_resnet")
    result = model.load_state_dict(weights, strict=False)
    assert result.unexpected_keys == []
    new = {k for k in model.state_dict() if ".cbam." in k}
    counters = {k for k in new if k.endswith("num_batches_tracked")}  # torch itself fills these in
    assert set(result.missing_keys) == new - counters
    assert torch.equal(model.eval()(image("resnet")), net("torchvision/resnet18")(image("resnet")))
