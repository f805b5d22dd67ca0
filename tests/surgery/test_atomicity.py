"""Inject and eject with an exception at every single step in turn: the model stays what it was."""

from __future__ import annotations

import copy
import inspect
import os
import re
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fingerprints import Fingerprint
from torch import nn

import attninject as ai
from attninject import errors
from attninject.planning import cost
from attninject.planning.plan import Plan
from attninject.surgery import apply, generated_class, injected_state

PACKAGE = os.path.dirname(ai.__file__) + os.sep


class Fault(Exception):
    """What the tests raise."""


class Interrupt(BaseException):
    """Like KeyboardInterrupt, no `Exception`; pytest would take the real one for the user's."""


# --- raising at the n-th step ------------------------------------------------------------------


class Steps:
    """Counts every call that the library's code makes (of Python or of C) or receives; raises at one of them.

    Code counts as the library's by its file; generated forwards count as well.
    """

    def __init__(self, at: int | None = None, error: type[BaseException] = Fault) -> None:
        self.at, self.error, self.count = at, error, 0
        self.keys: list[Any] = []  # of each step: the calling line and what is called

    def __call__(self, frame: Any, event: str, arg: Any) -> None:
        if event == "call" and not _resumed(frame):
            caller, name = frame.f_back, frame.f_code.co_qualname
            if "_dynamo" in frame.f_code.co_filename or name.endswith("gc_callback"):
                return  # a weak reference's or the collector's callback, of other tests: Python ignores its errors
            if not (_ours(frame) or name.startswith("Maker.") or (_ours(caller) and not _leaves(name))):
                return
        elif event == "c_call" and _ours(frame):
            caller, name = frame, getattr(arg, "__qualname__", str(arg))
            if arg is sys.setprofile or _leaves(name):
                return
        else:
            return
        key = (caller and caller.f_code.co_qualname, caller and caller.f_lineno, name)
        self.count += 1
        self.keys.append(key)
        if self.count == self.at:
            sys.setprofile(None)
            raise self.error(f"step {self.at}: {key}")

    def run(self, operation: Callable[[], Any]) -> Any:
        """Carry out `operation` under watch."""
        sys.setprofile(self)
        try:
            return operation()
        finally:
            sys.setprofile(None)


def _ours(frame: Any) -> bool:
    return frame is not None and frame.f_code.co_filename.startswith((PACKAGE, "<attninject "))


def _resumed(frame: Any) -> bool:
    """A generator that goes on or is closed: no call."""
    return bool(frame.f_code.co_flags & inspect.CO_GENERATOR) and frame.f_lasti > 6


def _leaves(name: str) -> bool:
    """The way out of a `with` that is not ours; if `torch.no_grad` itself failed there, nobody could help."""
    return name.endswith("__exit__")


def forget() -> None:
    """Empty the library's caches, so that every run takes every step."""
    generated_class._classes.clear()
    cost._cost.cache_clear()
    cost._check_foreign.cache_clear()


# Steps at which a half-done change would show; of all others the short run takes a sample.
CRITICAL = re.compile(
    r"^(create_block|_attach|_detach|set_class|generate|edit_graph|exec|compile|setattr|set_rng_state|trace|check|run)$"
    r"|(add_module|__new__|graph_copy|Module\.to|Module\.train|Module\.__setattr__|dict\.clear|dict\.update)$"
    r"|^(Snapshot\.|Contents\.|stand_ins|calls_through|guarded|as_original|undoing|rng_kept|outputs|_build)"
)


def chosen(keys: list[Any], every: bool) -> list[int]:
    """The steps to raise at: the first of each kind, or only of the critical kinds and a few others.

    A kind is a calling line and what it calls; in the short run, what is called.
    """
    if every:
        return sorted({key: n for n, key in reversed(list(enumerate(keys, 1)))}.values())
    first = {key[2]: n for n, key in reversed(list(enumerate(keys, 1))) if CRITICAL.search(key[2])}
    return sorted({*first.values(), *range(1, len(keys) + 1, len(keys) // 2)})


# --- a small net with a bit of everything ------------------------------------------------------


class Maker(type):
    """Makes and changes classes by Python code of its own, so that these steps can fail too."""

    def __new__(cls, name: str, bases: tuple, attributes: dict) -> Maker:
        return super().__new__(cls, name, bases, attributes)


class Unit(nn.Module, metaclass=Maker):
    """A residual block with an empty slot, a plain cache and a train mode of its own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.bn = nn.BatchNorm2d(width)
        self.se = None
        self.relu = nn.ReLU(inplace=True)
        self.register_module("spare", None)
        self.notes = {"sizes": [1, 2]}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn(self.conv(x))
        if self.se is not None:
            y = self.se(y)
        y = nn.functional.dropout(y, 0.3, self.training)
        y += x
        return self.relu(y)


class Net(nn.Module):
    """Units in a Sequential, one of them under two names, behind a stem and before a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        self.body = nn.Sequential(Unit(4), Unit(4))
        self.again = self.body[1]
        self.act = nn.Identity()
        self.head = nn.Linear(4, 2)
        self.register_buffer("scale", torch.ones(4, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.act(self.again(self.body(self.stem(x)))).mean((2, 3)) * 2)


class Scaling(nn.Module):
    """A foreign block that is the identity at first."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels, 1, 1))
        self.register_buffer("mark", torch.randn(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


RECIPE = {
    "name": "all",
    "rules": [
        {"block": "se", "after": "body.*.bn", "args": {"reduction": 1}},  # graph, fills an empty slot
        {"block": "cbam", "after": "body.0::add", "name": "spare", "args": {"reduction": 1}},
        {"block": "se", "before": "act", "args": {"reduction": 1}},  # at the module
        {"block": "se", "after": "stem", "args": {"reduction": 1}, "name": "extra", "init": "blend"},
    ],
}
IMAGE = torch.linspace(-1, 1, 2 * 3 * 6 * 6).view(2, 3, 6, 6)


def fresh() -> Net:
    """The same net every time, with hooks, grads, mixed modes and a frozen parameter."""
    torch.manual_seed(0)
    model = Net()
    model(IMAGE).sum().backward()
    model.eval()
    model.body[1].train()
    model.stem[0].bias.requires_grad_(False)
    model.head.register_forward_hook(_hook)
    return model


def _hook(module: nn.Module, args: Any, out: torch.Tensor) -> None:
    assert out.device.type == "cpu", "a user's hook saw the probe"


def inject(model: Net, recipe: Any = RECIPE, **more: Any) -> nn.Module:
    """With a seed of its own, and the image as example."""
    torch.manual_seed(7)
    return ai.inject(model, recipe, **({} if isinstance(recipe, Plan) else {"example_inputs": IMAGE}), **more)


def outputs(model: nn.Module) -> list[torch.Tensor]:
    """In eval and in train mode, on a copy."""
    found = []
    for training in (False, True):
        torch.manual_seed(3)
        with torch.no_grad():
            found.append(copy.deepcopy(model).train(training)(IMAGE))
    return found


def same(a: nn.Module, b: nn.Module) -> bool:
    """Equal keys, tensors, modes, classes and outputs of two different models."""
    mine, its = a.state_dict(), b.state_dict()
    return (
        list(mine) == list(its)
        and all(torch.equal(mine[k], its[k]) for k in mine)
        and [(n, type(m).__name__, m.training) for n, m in a.named_modules()]
        == [(n, type(m).__name__, m.training) for n, m in b.named_modules()]
        and list(ai.injected(a)) == list(ai.injected(b))
        and all(torch.equal(x, y) for x, y in zip(outputs(a), outputs(b), strict=True))
    )


# --- every step --------------------------------------------------------------------------------

Preparation = Callable[[Net], Any]


def injection(model: Net) -> Callable[[], Any]:
    """Plan before, carry out under watch."""
    torch.manual_seed(7)
    plan = ai.plan(model, RECIPE, example_inputs=IMAGE)
    forget()
    return lambda: ai.inject(model, plan)


def verified(model: Net) -> Callable[[], Any]:
    """The same, looking at outputs before and after."""
    torch.manual_seed(7)
    plan = ai.plan(model, RECIPE, example_inputs=IMAGE)
    forget()
    return lambda: ai.inject(model, plan, verify=True)


def second(model: Net) -> Callable[[], Any]:
    """Onto a model that has blocks, some in the same carriers."""
    inject(model)
    rules = {"rules": [{"block": "se", "after": "**.bn", "args": {"reduction": 2}, "name": "more"}]}
    torch.manual_seed(8)
    plan = ai.plan(model, rules, example_inputs=IMAGE)
    forget()
    return lambda: ai.inject(model, plan)


def ejection(model: Net) -> Callable[[], Any]:
    """Everything out."""
    inject(model)
    forget()
    return lambda: ai.eject(model)


def part(model: Net) -> Callable[[], Any]:
    """Out of a carrier that keeps another block."""
    inject(model)
    forget()
    return lambda: ai.eject(model, "body.0.se")


def planned(model: Net) -> Callable[[], Any]:
    """Probe, traces and costs."""
    forget()
    return lambda: ai.plan(model, RECIPE, example_inputs=IMAGE)


def seen(model: Net) -> Callable[[], Any]:
    """The table of sites."""
    forget()
    return lambda: ai.sites(model, "**", example_inputs=IMAGE)


def planned_again(model: Net) -> Callable[[], Any]:
    """A plan for a model that has blocks."""
    inject(model)
    forget()
    return lambda: ai.plan(
        model, {"rules": [{"block": "se", "place": "residual_branch"}]}, example_inputs=IMAGE
    )


OPERATIONS = [injection, verified, second, ejection, part, planned, planned_again, seen]


def count(prepare: Callable[[Net], Callable[[], Any]]) -> list[Any]:
    """The steps of an operation that is left in peace."""
    prepare(fresh())()  # torch fills caches of its own
    steps = Steps()
    steps.run(prepare(fresh()))
    return steps.keys


def check(prepare: Callable[[Net], Callable[[], Any]], kinds: list[type[BaseException]], every: bool) -> int:
    """Raise at each chosen step in turn; afterwards nothing has changed, and the operation succeeds."""
    keys = count(prepare)
    reference = fresh()
    prepare(reference)()
    raised = 0
    for turn, n in enumerate(chosen(keys, every)):
        model = fresh()
        operation = prepare(model)
        before = Fingerprint(model)
        steps = Steps(n, kinds[turn % len(kinds)])
        try:
            steps.run(operation)
        except BaseException as caught:
            if not isinstance(caught, (steps.error, errors.AttnInjectError)):
                raise
            raised += 1
            found = before.differences(Fingerprint(model))
            assert not found, f"after a fault at step {n} of {len(keys)}, {steps.keys[-1]}: {found}"
            operation()
        if every or turn % 4 == 0:
            assert same(model, reference), f"after a fault at step {n}, {steps.keys[-1]}"
    return raised


@pytest.mark.parametrize("prepare", OPERATIONS, ids=lambda f: f.__name__)
def test_a_fault_at_any_critical_step_leaves_everything_as_it_was(prepare: Any) -> None:
    """Whatever fails, and wherever: model, generators and torch itself are untouched, and a retry works."""
    assert check(prepare, [Fault, Interrupt], every=False) > 5


@pytest.mark.slow
@pytest.mark.parametrize("error", [Fault, Interrupt])
@pytest.mark.parametrize("prepare", OPERATIONS, ids=lambda f: f.__name__)
def test_a_fault_at_any_step_leaves_everything_as_it_was(prepare: Any, error: Any) -> None:
    """The same at every kind of step there is."""
    assert check(prepare, [error], every=True) > 30


@pytest.mark.parametrize("verify", [False, True])
def test_a_block_that_cannot_be_built_at_the_second_site_leaves_none_at_the_first(verify: bool) -> None:
    """All sites or none, also when a foreign constructor fails only once the model is being changed."""
    model = fresh()
    left = [6]

    class Failing(Scaling):
        def __init__(self, channels: int) -> None:
            super().__init__(channels)
            left[0] -= 1
            if not left[0]:
                raise Fault("no memory")

    plan = ai.plan(model, block=Failing, after="body.*.bn", example_inputs=IMAGE)
    left[0] = 2
    before = Fingerprint(model)
    with pytest.raises(Fault):
        ai.inject(model, plan, verify=verify)
    assert not before.differences(Fingerprint(model))


def test_verification_that_fails_puts_the_model_back() -> None:
    """A block that is no identity under `paper` is found out by `verify`, and the model is as it was."""
    model = fresh()
    before = Fingerprint(model)
    with pytest.raises(errors.VerificationError):
        ai.inject(model, block="se", after="body.*.bn", init="paper", verify=True, example_inputs=IMAGE)
    assert not before.differences(Fingerprint(model))


def test_an_interrupt_while_things_are_put_back_is_waited_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C during the restoring after a failure: the model is as it was all the same."""
    model, left = fresh(), [2]
    plan = ai.plan(model, block="se", after="body.*.bn", init="paper", example_inputs=IMAGE)
    before, restore = Fingerprint(model), injected_state.Contents.restore

    def interrupted(contents: injected_state.Contents) -> None:
        left[0] -= 1
        if not left[0]:
            raise Interrupt
        restore(contents)

    def fails(carrier: nn.Module, cls: type) -> None:
        raise Fault("no class today")

    monkeypatch.setattr(apply, "set_class", fails)
    monkeypatch.setattr(injected_state.Contents, "restore", interrupted)
    with pytest.raises(Interrupt):
        ai.inject(model, plan)
    assert left[0] < 0
    assert not before.differences(Fingerprint(model))


def test_verification_leaves_no_mark() -> None:
    """`verify` runs the model in train mode, and neither buffers nor modes nor generators show it."""
    plain, verified = inject(fresh()), inject(fresh(), verify=True)
    assert same(plain, verified)


def test_a_model_that_fails_in_the_probe_is_left_alone() -> None:
    """A forward that raises half-way, having written attributes and drawn numbers, leaves no mark."""

    class Raising(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.cache = self.body[0].notes["sizes"]
            self.cache.append(torch.rand(3))
            self.scale.mul_(2)
            raise Fault("a forward that fails")

    torch.manual_seed(0)
    model = Raising()
    before = Fingerprint(model)
    with pytest.raises(errors.ProbeError, match="a forward that fails"):
        ai.plan(model, block="se", after="stem", example_inputs=IMAGE)
    assert not before.differences(Fingerprint(model))


def test_the_fault_injector_is_no_dummy() -> None:
    """The steps that matter most are among those that the other tests raise at."""
    names = {key[2] for key in count(injection)}
    assert names >= {"Module.add_module", "Maker.__new__", "exec", "set_class", "Module.to", "Module.train"}
    assert "_detach" in {key[2] for key in count(ejection)}
