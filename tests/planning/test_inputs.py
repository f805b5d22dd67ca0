"""Models and inputs that are out of the ordinary: each is handled, or refused in words, and nothing is touched."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from fingerprints import Fingerprint
from small import Around, Through, images
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import attninject as ai
from attninject import errors, wording
from attninject.observe.probe import probe


def residual(self, x):
    """A small residual block."""
    return x + self.b(torch.relu(self.a(x)))


def small() -> nn.Module:
    """A stem and one residual block, `inner`."""
    torch.manual_seed(0)
    return Around(Through(residual)).eval()


def rule(**where: Any) -> dict[str, Any]:
    """SE after the first layer of the block, unless said otherwise."""
    return {"block": "se", "args": {"reduction": 4}, "example_inputs": images(), "after": "inner.a"} | where


def refused(model: Any, error: type[Exception], words: str, **where: Any) -> None:
    """`plan` and `inject` raise, with these words, and leave no mark."""
    before = Fingerprint(model) if isinstance(model, nn.Module) else None
    for verb in (ai.plan, ai.inject):
        with pytest.raises(error, match=words):
            verb(model, **rule(**where))
    assert before is None or before == Fingerprint(model)


# --- refused -----------------------------------------------------------------------------------


class Fails(nn.Module):
    """Its forward raises."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Through(residual)

    def forward(self, x):
        self.inner(torch.zeros(1, 8, 4, 4, device=x.device))
        raise ValueError("no luck today")


class NoForward(nn.Module):
    """Children and nothing that calls them."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Through(residual)


class Wants(nn.Module):
    """Takes two keyword arguments of different shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner = nn.Conv2d(3, 8, 1), Through(residual)

    def forward(self, *, mask, pixels):
        return self.inner(self.stem(pixels)) * mask


class Complex(nn.Module):
    """A complex layer between real ones."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.wave = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1, dtype=torch.complex64)

    def forward(self, x):
        return self.wave(self.a(x).to(torch.complex64)).abs()


def quantized() -> nn.Module:
    """A layer quantized dynamically."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(8, 8)), {nn.Linear})


def changed(change: Callable[[nn.Module], Any]) -> nn.Module:
    """The small net after something was done to it."""
    model = small()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        change(model)
    return model


def compile_inner(model: nn.Module) -> None:
    """As torch.compile(model.inner) leaves it."""
    model.inner = torch.compile(model.inner, backend="eager")


def script_inner(model: nn.Module) -> None:
    """One layer is scripted."""
    model.inner.a = torch.jit.script(model.inner.a)


UNSUPPORTED = errors.UnsupportedModelError
REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str, dict[str, Any]]] = {
    "fails": (Fails, errors.ProbeError, "Fails fails its own forward .*ValueError: no luck today", {}),
    "no forward": (NoForward, UNSUPPORTED, "NoForward has no forward", {}),
    "a function": (lambda: residual, UNSUPPORTED, "expected a torch.nn.Module, found function", {}),
    "a class": (lambda: nn.Conv2d, UNSUPPORTED, "expected a torch.nn.Module, found type", {}),
    "compiled": (
        lambda: torch.compile(small(), backend="eager"),
        UNSUPPORTED,
        "compiled; inject first, then",
        {},
    ),
    "compiled inside": (
        lambda: changed(compile_inner),
        UNSUPPORTED,
        r"inner \(OptimizedModule\) is compiled",
        {},
    ),
    "scripted inside": (lambda: changed(script_inner), UNSUPPORTED, "inner.a .* is scripted", {}),
    "wrapped": (
        lambda: nn.DataParallel(small()),
        UNSUPPORTED,
        "wrapped in DataParallel; inject into model.mod",
        {},
    ),
    "quantized": (quantized, UNSUPPORTED, r"0 \(Linear\) is quantized; inject into the float model", {}),
    "quantizable": (
        lambda: torchvision.models.quantization.resnet18(weights=None, quantize=False),
        UNSUPPORTED,
        "belongs to a quantizable variant; inject into the plain float model",
        {"after": "layer1.0.bn2"},
    ),
    "lazy": (
        lambda: nn.Sequential(nn.LazyConv2d(8, 1)),
        UNSUPPORTED,
        r"0 \(LazyConv2d\) is lazy and not initialised",
        {},
    ),
    "parametrized carrier": (
        lambda: nn.Sequential(*(parametrizations.weight_norm(nn.Conv2d(3, 3, 1)) for _ in range(2))),
        errors.CannotRewriteError,
        "ParametrizedConv2d is parametrized; remove the parametrization first",
        {"after": "0"},
    ),
    "complex values": (
        Complex,
        errors.NoTensorError,
        "wave gives torch.complex64, no floating-point tensor",
        {"after": "wave"},
    ),
    "no positions": (
        small,
        errors.ProbeError,
        r"inputs of shape \(2, 3, 0, 16\)",
        {"example_inputs": torch.zeros(2, 3, 0, 16)},
    ),
    "wrong channels": (small, errors.ProbeError, "fails its own", {"example_inputs": images(channels=5)}),
    "integers": (
        lambda: nn.Sequential(nn.Embedding(10, 8)),
        errors.ProbeError,
        "give example_inputs=",
        {"example_inputs": None, "after": "0"},
    ),
    "unknown keywords": (
        Wants,
        errors.ProbeError,
        r"it takes \(\*, mask, pixels\); give example_inputs=",
        {"example_inputs": None},
    ),
    "two axes": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)),
        errors.LayoutError,
        r"the axes of 3, \(2, 5\), .*; blocks need 3 to 5 axes, so name a site before",
        {"after": "3"},
    ),
    "non-tensor": (
        lambda: Around(Through(lambda self, x: (self.a(x), "text"))),
        errors.NoTensorError,
        "the output of inner is a tuple, no tensor; choose one with output: 0",
        {"after": "inner"},
    ),
}


LENIENT: dict[str, Callable[[], object]] = {
    "no positions": lambda: nn.Conv2d(1, 1, 1, device="meta")(torch.empty(1, 1, 0, 2, device="meta")),
    "integers": lambda: nn.Embedding(2, 1, device="meta")(torch.empty(1, 3, 4, 4, device="meta")),
}
"""What no kernel computes, but torch of some releases says the shape of: there a probe cannot tell."""


def says_a_shape(case: str) -> bool:
    """Whether the installed torch is one of those."""
    try:
        LENIENT[case]()
    except (RuntimeError, KeyError):
        return False
    return True


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_said_and_nothing_touched(case: str) -> None:
    """An error of its own kind, with the fix, and the model as it was to the last attribute."""
    if says_a_shape(case):
        pytest.skip("this torch says the shape of what it cannot compute")
    make, error, words, where = REFUSED[case]
    refused(make(), error, words, **where)


def test_a_model_wrapped_by_ddp_or_fsdp_is_refused() -> None:
    """Wholly or in a part: such a wrapper has counted the parameters already."""
    import torch.distributed as dist

    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        whole = nn.parallel.DistributedDataParallel(small())
        refused(whole, UNSUPPORTED, "wrapped in DistributedDataParallel; inject into model.module")
        part = small()
        part.inner = nn.parallel.DistributedDataParallel(part.inner)
        refused(part, UNSUPPORTED, r"inner \(DistributedDataParallel\) is a wrapper", after="inner.module.a")
        sharded = small()
        torch.distributed.fsdp.fully_shard(sharded.inner)
        with pytest.raises(UNSUPPORTED, match="sharded or parametrized"):
            ai.plan(sharded, **rule())
    finally:
        dist.destroy_process_group()


def test_a_root_that_is_not_there_is_said_with_the_nearest_names() -> None:
    """`sites` and `plan` alike; and nothing is promised where nothing is near."""
    for verb in (ai.sites, lambda model, **where: ai.plan(model, **rule(), **where)):
        with pytest.raises(
            errors.NoMatchError, match=r"root: no module is called 'iner'; the nearest .* inner"
        ):
            verb(small(), root="iner")
        with pytest.raises(errors.NoMatchError, match=r"no module is called 'zzz'$"):
            verb(small(), root="zzz")


def test_what_a_plan_has_settled_is_not_given_again() -> None:
    """Arguments beside a plan would be lost without a word."""
    model = small()
    plan = ai.plan(model, **rule())
    for more in ({"args": {"reduction": 2}}, {"root": "inner"}, {"after": "stem"}):
        with pytest.raises(TypeError, match=r"a plan is resolved already; .* to plan\(\)"):
            ai.inject(model, plan, **more)
    assert ai.injected(model) == {}


def test_a_block_registered_anew_is_looked_at_anew() -> None:
    """A notebook's cell that is edited and run again: cost and identity are those of the new class."""

    def define(width: int, factor: int) -> None:
        class Edited(nn.Module):
            def __init__(self, channels: int) -> None:
                super().__init__()
                self.unused = nn.Parameter(torch.zeros(width))

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x * factor

        ai.register_block("edited")(Edited)

    def plan() -> ai.Plan:
        return ai.plan(small(), block="edited", after="inner.a", example_inputs=images())

    for width in (1, 5):
        define(width, factor=1)
        assert plan().parameters == width
    define(5, factor=2)
    with pytest.raises(errors.IdentityError, match="changes the function at init"):
        plan()


# --- handled -----------------------------------------------------------------------------------


def doubled(module: nn.Module, args: Any, out: Any) -> Any:
    """A hook that changes values."""
    return out * 2


def wider(model: nn.Module) -> None:
    """A hook that doubles the channels, and a layer that needs it."""
    model.inner.b = nn.Conv2d(16, 8, 1)
    model.inner.a.register_forward_hook(lambda m, i, out: torch.cat([out, out], 1))


def wider_before(model: nn.Module) -> None:
    """The same by a hook before the layer."""
    model.inner.b = nn.Conv2d(16, 8, 1)
    model.inner.b.register_forward_pre_hook(lambda m, i: (torch.cat([i[0], i[0]], 1),))


class Doubled(nn.Module):
    """A parametrization."""

    def forward(self, x):
        return x * 2


class Own(nn.Module):
    """An owner with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.a = nn.Parameter(torch.eye(8)), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        return torch.einsum("bchw,cd->bdhw", self.a(x), self.w)


def parametrized_owner() -> nn.Module:
    """The owner's own parameter is parametrized."""
    model = Around(Own())
    parametrize.register_parametrization(model.inner, "w", Doubled())
    return model


HANDLED: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "compiled in place inside": (
        lambda: changed(lambda m: m.inner.b.compile(backend="eager")),
        {},
    ),
    "weight norm": (lambda: changed(lambda m: parametrizations.weight_norm(m.inner.a)), {}),
    "spectral norm": (lambda: changed(lambda m: parametrizations.spectral_norm(m.inner.a)), {}),
    "old weight norm": (lambda: changed(lambda m: nn.utils.weight_norm(m.inner.a)), {}),
    "old weight norm on the carrier": (
        lambda: changed(lambda m: nn.utils.weight_norm(m.stem)),
        {"after": "stem"},
    ),
    "pruned": (lambda: changed(lambda m: prune.l1_unstructured(m.inner.a, "weight", 0.5)), {}),
    "parametrized owner": (parametrized_owner, {}),
    "class of a file called fsdp_net": (
        lambda: type("Net", (Around,), {"__module__": "fsdp_net"})(Through(residual)),
        {},
    ),
    "hook that changes values": (lambda: changed(lambda m: m.inner.a.register_forward_hook(doubled)), {}),
    "hook on the carrier": (
        lambda: changed(lambda m: m.stem.register_forward_hook(doubled)),
        {"after": "stem"},
    ),
    "hook on the owner": (lambda: changed(lambda m: m.inner.register_forward_hook(doubled)), {}),
    "hook that changes the shape": (lambda: changed(wider), {}),
    "hook that changes the shape before": (
        lambda: changed(wider_before),
        {"before": "inner.b", "after": None},
    ),
    "double precision": (lambda: small().double(), {"example_inputs": images().double()}),
    "empty batch": (small, {"example_inputs": torch.zeros(0, 3, 16, 16)}),
}


@pytest.mark.parametrize("case", HANDLED)
def test_what_is_out_of_the_ordinary_computes_what_it_did(case: str) -> None:
    """Planning leaves no mark; after injection the outputs are bit-equal; eject gives every module back."""
    make, where = HANDLED[case]
    model, given = make().eval(), rule(**where)
    given = {k: v for k, v in given.items() if v is not None}
    x = images().to(next(model.parameters()).dtype)
    with torch.no_grad():
        expected = model(x)
        before = Fingerprint(model)
        plan = ai.plan(model, **given)
        assert not Fingerprint(model).differences(before)
        classes = [type(m) for m in model.modules()]
        ai.inject(model, plan)
        assert torch.equal(model(x), expected)
        ai.eject(model)
        assert [type(m) for m in model.modules()] == classes
        assert torch.equal(model(x), expected)
    torch._dynamo.reset()


def test_a_plan_says_which_hooks_it_did_not_run() -> None:
    """A logging hook stays silent while planning, and the plan tells so; a pruned net needs no such note."""
    seen: list[str] = []
    model = changed(lambda m: m.inner.register_forward_hook(lambda *_: seen.append("ran")))
    assert "the hooks of inner were not run" in str(ai.plan(model, **rule()))
    assert seen == []
    assert ai.plan(changed(lambda m: prune.identity(m.inner.a, "weight")), **rule()).notes == ()


def test_a_block_is_not_put_on_the_inner_side_of_a_hook_that_a_net_needs() -> None:
    """Around the carrier's forward the block would see the shape before the hook."""

    def change(model: nn.Module) -> None:
        model.stem = nn.Conv2d(3, 4, 1)
        model.stem.register_forward_hook(lambda m, i, out: torch.cat([out, out], 1))

    refused(changed(change), errors.CannotRewriteError, "on the inner side of a hook", after="stem")


@pytest.mark.parametrize("where", ["whole", "half"])
def test_a_model_without_memory_is_planned_and_injected(where: str) -> None:
    """Wholly on the meta device, or one layer there: blocks go to the device of their neighbours."""
    model = small()
    (model if where == "whole" else model.inner.b).to("meta")
    before = Fingerprint(model)
    plan = ai.plan(model, **rule())
    assert before == Fingerprint(model)
    ai.inject(model, plan)
    devices = {p.device.type for b in ai.injected(model).values() for p in b.parameters()}
    assert devices == {"meta" if where == "whole" else "cpu"}


def test_keyword_arguments_in_any_order_leave_the_image_the_image() -> None:
    """A mask that comes first is not taken for the map."""
    given = {"mask": torch.ones(1), "pixels": images()}
    plan = ai.plan(Wants(), **rule(example_inputs=given))
    assert [str(s.layout) for s in plan.sites] == ["NCHW"]


def test_integer_inputs_are_fine_where_the_site_is_floating_point() -> None:
    """An embedding of token numbers."""
    model = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 8)).eval()
    numbers = torch.arange(10).reshape(2, 5)
    expected = model(numbers)
    ai.inject(model, **rule(after="0", example_inputs=numbers))
    assert torch.equal(model(numbers), expected)


def test_a_forward_that_returns_no_tensors_beside_some_is_served() -> None:
    """Text, numbers and None in a nested result stay what they are."""
    model = Around(Through(lambda self, x: {"text": "t", "map": self.a(x), "none": None, "n": [1, 2]})).eval()
    base, x = copy.deepcopy(model), images()
    ai.inject(model, **rule(after="inner", output="map"))
    found, expected = model(x), base(x)
    assert torch.equal(found.pop("map"), expected.pop("map"))
    assert found == expected


def test_a_recurrent_layer_is_probed_by_its_products() -> None:
    """An LSTM over 400 steps takes as many operations as one over 4; shapes and MACs are those of the layer."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv1d(3, 8, 1)
            self.rnn = nn.LSTM(8, 5, num_layers=2, bidirectional=True, batch_first=True)
            self.b = nn.GRU(10, 6)

        def forward(self, x):
            y, (h, c) = self.rnn(self.a(x).transpose(1, 2))
            return self.b(y)[0] + h.sum() + c.sum()

    torch.manual_seed(0)
    base = Net().eval()
    model = copy.deepcopy(base)
    x = torch.randn(2, 3, 400)
    plan = ai.plan(model, block="eca", after="rnn", output=0, example_inputs=x)
    assert plan.sites[0].shape == (2, 400, 10)
    assert plan.base_macs == 400 * (24 + 2 * 20 * (8 + 5) + 2 * 20 * (10 + 5) + 18 * (10 + 6))
    operations = len(list(probe(model, x)[0].calls[0].ops()))
    assert operations < 100
    ai.inject(model, plan)
    assert torch.equal(model(x), base(x))


def test_an_unknown_operation_is_answered_with_those_that_are_there() -> None:
    """`layer1.0::ad` is refused with `add`, since nothing else lists the operations of a forward."""
    model = torchvision.models.resnet18()
    with pytest.raises(errors.NoMatchError, match=r"no operation matches .*; the operations there are add$"):
        ai.plan(model, block="se", after="layer1.0::ad")
    with pytest.raises(errors.AllExcludedError, match=r"pick: \[9\] chooses none of the 8 sites"):
        ai.plan(model, block="se", place="residual_branch", pick=[9])


def test_one_site_is_one_site() -> None:
    """The plan's table counts in English, and figures keep three digits."""
    shown = str(ai.plan(torchvision.models.resnet18(), block="se", after="layer1.0.bn2"))
    assert "1 site\n" in shown
    assert "1 sites" not in shown
    assert [wording.human(n) for n in (999, 1000, 18_000, 4_096_000_000)] == [
        "999",
        "1.00 k",
        "18.0 k",
        "4.10 G",
    ]
