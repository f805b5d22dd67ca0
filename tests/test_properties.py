"""Random nets, random rules: refused and untouched, or injected and everything that was promised holds."""

from __future__ import annotations

import copy
import inspect
import io
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from fingerprints import Fingerprint
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from random_nets import NetSpec, batch, build, source
from strategies import nets, rules
from torch import nn

import attninject as ai
from attninject.errors import AttnInjectError
from attninject.planning.plan import Plan
from attninject.planning.planned_site import Site

OPERATIONS = ["add", "add_1", "relu", "mul", "cat", "sigmoid", "dropout", "view", "add", "*"]
IMAGE = batch()


@ai.register_block("scaling")
class Scaling(nn.Module):
    """x times one weight per channel: the identity at first, and every weight learns at once."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


# --- the reference: hooks ----------------------------------------------------------------------


class Stack:
    """Knows, while a model runs, which module runs inside which, and the number of each call."""

    def __init__(self, model: nn.Module) -> None:
        self.running: list[tuple[nn.Module, Counter]] = []
        self.calls: Counter = Counter()  # (name of the module, name of its caller, number)
        self.names = {id(m): name for name, m in model.named_modules()}
        self.handles = []
        for module in model.modules():
            self.handles.append(module.register_forward_pre_hook(self._enter, prepend=True))
            self.handles.append(module.register_forward_hook(self._leave, always_call=True))

    def _enter(self, module: nn.Module, args: Any) -> None:
        if self.running:
            self.running[-1][1][id(module)] += 1
        self.running.append((module, Counter()))
        self.calls[self.here()] += 1

    def _leave(self, module: nn.Module, args: Any, out: Any) -> None:
        self.running.pop()

    def here(self) -> tuple[str, str, int]:
        """Name of the module that runs, of its caller, and the number of this call."""
        module, _ = self.running[-1]
        if len(self.running) == 1:
            return self.names[id(module)], "", 1
        caller, counts = self.running[-2]
        return self.names[id(module)], self.names[id(caller)], counts[id(module)]


def by_hooks(model: nn.Module, plan: Plan, weights: dict[str, torch.Tensor]) -> nn.Module:
    """The same net with each block of the plan as a hook on the site's module: what `inject` amounts to.

    The hooks multiply the site's value by the block's weights along its channels. (Weights are powers of two:
    then the result has the same bits whatever the order.)
    """
    stack = Stack(model)
    for site, location in zip(plan.sites, plan.locations, strict=True):
        module = model.get_submodule(site.path)
        operand, output = plan.recipe.rules[site.rule].input, location.insertion.output
        operand = 0 if operand is None else operand
        act = _acting(stack, module, site, operand, output, weights[site.name])
        if site.position == "after":
            module.register_forward_hook(lambda m, args, out, act=act: act(out))
        else:
            module.register_forward_pre_hook(
                lambda m, args, kwargs, act=act: act(args, kwargs), with_kwargs=True
            )
    # hooks that leave must run after those that act
    for module in model.modules():
        leave = next(h for h in module._forward_hooks.values() if h == stack._leave)
        key = next(k for k, h in module._forward_hooks.items() if h is leave)
        module._forward_hooks.move_to_end(key)
    return model


def _acting(
    stack: Stack, module: nn.Module, site: Site, operand: Any, output: Any, weight: torch.Tensor
) -> Callable:
    view = weight if site.layout.kind == "NCHW" else weight.view(-1)

    def here() -> bool:
        _, owner, number = stack.here()
        return site.mechanism == "module" or (owner == site.owner and number == site.call)

    def after(out: Any) -> Any:
        return _replaced(out, output, lambda x: x * view) if here() else None

    def before(args: tuple, kwargs: dict) -> Any:
        if not here():
            return None
        key = operand if args or operand != 0 else next(iter(kwargs))
        if isinstance(key, str) and key not in kwargs:  # passed by position
            key = list(inspect.signature(type(module).forward).parameters).index(key) - 1
        if isinstance(key, int):
            return _replaced(args, key, lambda x: x * view), kwargs
        return args, _replaced(kwargs, key, lambda x: x * view)

    return after if site.position == "after" else before


def _replaced(tree: Any, key: Any, fn: Callable) -> Any:
    if key is None:
        return fn(tree)
    if isinstance(tree, tuple):
        return tuple(fn(item) if i == key else item for i, item in enumerate(tree))
    return {k: fn(v) if k == key else v for k, v in tree.items()}


# --- looks at a model --------------------------------------------------------------------------


def forward(model: nn.Module, training: bool) -> torch.Tensor:
    """One seeded forward without gradients."""
    model.train(training)
    torch.manual_seed(5)
    with torch.no_grad():
        return model(IMAGE)


def both(model: nn.Module) -> list[torch.Tensor]:
    """Outputs in eval and train mode, then the buffers after it."""
    outs = [forward(model, False), forward(model, True), forward(model, False)]
    blocks = tuple(f"{name}." for name in ai.injected(model))
    return outs + [b for k, b in model.named_buffers() if not k.startswith(blocks)]


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    """Bit for bit (a net may overflow)."""
    same = (torch.allclose(x, y, rtol=0, atol=0, equal_nan=True) for x, y in zip(a, b, strict=False))
    return len(a) == len(b) and all(same)


@contextmanager
def counted(model: nn.Module) -> Iterator[Counter]:
    """Calls of each injected block."""
    counts: Counter = Counter()
    handles = [
        block.register_forward_hook(lambda *_, name=name: counts.update([name]))
        for name, block in ai.injected(model).items()
    ]
    yield counts
    for handle in handles:
        handle.remove()


def expected_calls(spec: NetSpec, plan: Plan, training: bool) -> Counter:
    """How often each site is executed, by hooks on a net of its own."""
    model = build(spec)
    stack = Stack(model)
    names = {id(m): n for n, m in model.named_modules()}
    forward(model, training)
    expected: Counter = Counter()
    for site in plan.sites:
        if site.mechanism == "module":
            carrier = site.name.rpartition(".")[0]
            count = sum(n for (name, _, _), n in stack.calls.items() if name == carrier)
        elif "::" in site.path:
            count = sum(n for (name, _, _), n in stack.calls.items() if name == site.owner)
        else:
            module = names[id(model.get_submodule(site.path))]
            count = stack.calls[(module, site.owner, site.call)]
        expected[site.name] = count
    return +expected


# --- the properties ----------------------------------------------------------------------------


def attempt(spec: NetSpec, recipe: dict) -> tuple[nn.Module, Plan] | str:
    """Inject, or be refused without a mark; then says by what."""
    model = build(spec)
    before = Fingerprint(model)
    try:
        plan = ai.plan(model, recipe, example_inputs=IMAGE)
    except AttnInjectError as error:
        assert not before.differences(Fingerprint(model))
        return f"refused: {type(error).__name__}"
    assert not before.differences(Fingerprint(model)), "planning left a mark"
    ai.inject(model, plan)
    assert set(ai.injected(model)) == {s.name for s in plan.sites}
    return model, plan


def check(spec: NetSpec, recipe: dict) -> str:
    """Everything that was promised; says what came out."""
    base = build(spec)
    done = attempt(spec, recipe)
    if isinstance(done, str):
        return done
    model, plan = done
    check_structure(base, model)
    pristine = copy.deepcopy(model)
    check_calls(spec, model, plan)
    assert equal(both(model), both(base)), "the function changed"
    check_copies(spec, pristine)
    check_training(spec, pristine)
    check_effect(spec, recipe, plan)
    check_ejection(base, model)
    return "injected: " + ", ".join(sorted({s.mechanism for s in plan.sites}))


def check_structure(base: nn.Module, model: nn.Module) -> None:
    """Names, classes and modes of the base are all there, its keys in their order."""
    keys = list(base.state_dict())
    assert [k for k in model.state_dict() if k in set(keys)] == keys
    found = dict(model.named_modules(remove_duplicate=False))
    for name, module in base.named_modules(remove_duplicate=False):
        assert isinstance(found[name], type(module))
        assert type(found[name]).__name__ == type(module).__name__
        assert found[name].training == module.training


def check_calls(spec: NetSpec, model: nn.Module, plan: Plan) -> None:
    """Every block runs as often as its site is executed."""
    for training in (False, True):
        expected = expected_calls(spec, plan, training)
        twin = copy.deepcopy(model)
        with counted(twin) as counts:
            forward(twin, training)
        assert counts == expected, f"blocks ran {counts}, sites {expected}"


def check_copies(spec: NetSpec, model: nn.Module) -> None:
    """A copy and a pickle compute the same and are independent."""
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for other in (copy.deepcopy(model), loaded):
        assert list(ai.injected(other)) == list(ai.injected(model))
        assert list(other.state_dict()) == list(model.state_dict())
        mine = {id(p) for p in model.parameters()} | {id(m) for m in model.modules()}
        assert not mine & ({id(p) for p in other.parameters()} | {id(m) for m in other.modules()})
        assert equal(both(copy.deepcopy(other)), both(build(spec)))
        ai.eject(other)
        base = build(spec)
        assert {n: type(m) for n, m in other.named_modules()} == {n: type(m) for n, m in base.named_modules()}
        assert equal(both(other), both(base))


def gradients(model: nn.Module, steps: int) -> list[torch.Tensor]:
    """Trains a little; the outputs on the way."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    outs = []
    for step in range(steps):
        model.train()
        torch.manual_seed(step)
        optimizer.zero_grad()
        out = model(IMAGE)
        outs.append(out.detach())
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        optimizer.step()
    return outs


def check_training(spec: NetSpec, model: nn.Module) -> None:
    """Where the base trains the injected net trains, and blocks that the loss depends on get gradients."""
    base = build(spec)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            gradients(base, 1)
        except RuntimeError:  # in-place operations on what the backward needs
            return
    model = copy.deepcopy(model)
    reach: Counter = Counter()
    handles = []
    for name, block in ai.injected(model).items():
        handles.append(
            block.register_forward_hook(lambda b, a, out, name=name: _watch(out, a[0], name, reach))
        )
    first = gradients(model, 1)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(first, gradients(build(spec), 1), rtol=0, atol=0)
    for name, p in base.named_parameters():
        mine = model.get_parameter(name).grad
        assert (mine is None) == (p.grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(mine, p.grad, rtol=1e-4, atol=1e-5)
    learned = {n: any(_nonzero(p) for p in b.parameters()) for n, b in ai.injected(model).items()}
    assert not [n for n in learned if reach[n] and not learned[n]], "no gradient reaches a block"


def _nonzero(p: nn.Parameter) -> bool:
    return p.grad is not None and bool(p.grad.abs().sum() > 0)


def _watch(out: torch.Tensor, x: torch.Tensor, name: str, reach: Counter) -> None:
    x = x.detach().clone()
    if out.requires_grad:
        out.register_hook(lambda grad: reach.update({name: int((grad * x).abs().sum() > 1e-6)}))


def check_effect(spec: NetSpec, recipe: dict, plan: Plan) -> None:
    """With blocks that do something, the net computes what hooks at the same sites compute."""
    if any("::" in s.path for s in plan.sites):
        return
    bare = [{k: v for k, v in rule.items() if k not in ("args", "init")} for rule in recipe["rules"]]
    recipe = {"rules": [rule | {"block": "scaling"} for rule in bare]}
    model = build(spec)
    try:
        plan = ai.plan(model, recipe, example_inputs=IMAGE)
    except AttnInjectError:
        return
    ai.inject(model, plan)
    generator = torch.Generator().manual_seed(2)
    weights = {}
    for name, block in ai.injected(model).items():
        weights[name] = 2.0 ** torch.randint(-1, 3, block.weight.shape, generator=generator)
        block.weight.data.copy_(weights[name])
    reference = by_hooks(build(spec), plan, weights)
    assert equal(both(model), both(reference)), "blocks at work give something else than hooks do"


def check_ejection(base: nn.Module, model: nn.Module) -> None:
    """One block out, then all: the function stays, and in the end attributes and classes are the base's."""
    names = list(ai.injected(model))
    ai.eject(model, names[-1])
    assert set(ai.injected(model)) == set(names[:-1])
    assert equal(both(model), both(base))
    if ai.injected(model):
        ai.eject(model)
    assert [(n, type(m)) for n, m in model.named_modules()] == [(n, type(m)) for n, m in base.named_modules()]
    assert list(model.state_dict()) == list(base.state_dict())
    for name, module in base.named_modules():
        assert set(model.get_submodule(name).__dict__) == set(module.__dict__)
        assert list(model.get_submodule(name)._modules) == list(module._modules)
    assert equal(both(model), both(base))


def draw_recipe(data: st.DataObject, spec: NetSpec) -> dict:
    """One to three rules that speak of this net."""
    names = [n for n, _ in build(spec).named_modules() if n not in ("", "head")]
    chosen = data.draw(st.lists(rules(names, OPERATIONS, ai.list_places()), min_size=1, max_size=3))
    return {"rules": chosen}


def explain(spec: NetSpec, recipe: dict) -> None:
    """Print what fails, as text to run."""
    try:
        event(check(spec, recipe))
    except BaseException:
        print(source(spec), spec, recipe, sep="\n")
        raise


@settings(
    max_examples=120,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
    database=None,
)
@given(spec=nets, data=st.data())
def test_random_rules_on_random_nets(spec: NetSpec, data: st.DataObject) -> None:
    """Whatever the net and the rules: refused without a mark, or injected with every promise kept."""
    explain(spec, draw_recipe(data, spec))


@pytest.mark.slow
@settings(max_examples=1500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(spec=nets, data=st.data())
def test_many_random_rules_on_random_nets(spec: NetSpec, data: st.DataObject) -> None:
    """The same at length, other nets at every run."""
    explain(spec, draw_recipe(data, spec))
