"""Forwards that decide by what they are given: a number, a tuple, the size of a map."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from small import Calls, calls_of, images, se, stir
from torch import Tensor, nn
from torch.nn import functional as F

import attninject as ai


def drop_connect(x: Tensor, rate: float, training: bool) -> Tensor:
    """Drop whole samples, as the older EfficientNets do: the size is looked up, the number counted up."""
    assert 0 <= rate <= 1
    if not training:
        return x
    keep = 1 - rate
    kept = keep
    kept += torch.rand([x.shape[0], 1, 1, 1], dtype=x.dtype, device=x.device)
    return x / keep * torch.floor(kept)


def by_rate(unit: nn.Module, x: Tensor, given: float | None) -> Tensor:
    """Decides by a number that differs from unit to unit."""
    y = unit.norm(unit.conv(x))
    if given:
        y = drop_connect(y, given, unit.training)
    return y + x


def by_tuple(unit: nn.Module, x: Tensor, given: tuple[int, int]) -> Tensor:
    """Decides by a small tuple."""
    height, width = given
    y = unit.norm(unit.conv(x))
    if height == width:
        y = y * 2
    return y + x


def by_size(unit: nn.Module, x: Tensor, given: object) -> Tensor:
    """Decides by the size of the map."""
    y = x
    if x.shape[-1] % 4 != 0 or x.size(2) > 100:
        y = F.pad(x, (0, 4 - x.shape[-1] % 4))
    y = unit.norm(unit.conv(y))
    return y[..., : x.shape[-1]] + x


class Unit(nn.Module):
    """conv, norm, and whatever `body` decides."""

    def __init__(self, body: Callable) -> None:
        super().__init__()
        self.conv, self.norm, self.body = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), body

    def forward(self, x, given=None):
        return self.body(self, x, given)


class Net(nn.Module):
    """Three units, each with what it is given."""

    def __init__(self, body: Callable, given: list) -> None:
        super().__init__()
        self.stem, self.given = nn.Conv2d(3, 8, 1), given
        self.units = nn.ModuleList(Unit(body) for _ in given)

    def forward(self, x):
        x = self.stem(x)
        for unit, given in zip(self.units, self.given, strict=True):
            x = unit(x, given)
        return x


def run(model: nn.Module, x: Tensor, training: bool) -> Tensor:
    """The output, whatever random numbers there are."""
    torch.manual_seed(0)
    return model.train(training)(x)


CASES = {
    "number": (by_rate, [0.1, 0.2, 0.0], [0.0, 0.3, None]),
    "integer": (by_rate, [0, 0.25, 0.5], [0.5, None, 0]),
    "tuple": (by_tuple, [(2, 2), (2, 3), (1, 1)], [(2, 1), (3, 3), (1, 1)]),
    "size": (by_size, [None, 1, (2, 3)], [None, None, 0.5]),
}


@pytest.mark.parametrize("case", CASES)
def test_what_a_forward_decides_by_is_asked_at_every_call(case: str) -> None:
    """Places inside are reached; other values, modes and sizes give what the bare net gives, also unpickled."""
    body, first, second = CASES[case]
    base = Net(body, first).eval()
    model = copy.deepcopy(base)
    plan = ai.plan(model, **se(after="units.*.norm"), example_inputs=images())
    assert [s.mechanism for s in plan.sites] == ["graph"] * 3
    ai.inject(model, plan)
    model = pickle.loads(pickle.dumps(model))
    for given in (first, second, first):
        for size in (16, 15, 18):
            for training in (True, False):
                base.given = model.given = given
                x = images(size=size)
                assert torch.equal(run(model, x, training), run(base, x, training))
            assert calls_of(model, x) == {f"units.{n}.se": 1 for n in range(3)}


def test_units_that_decide_alike_share_a_class() -> None:
    """Another rate is no other graph, as long as the forward takes the same way."""
    model = Net(by_rate, [0.1, 0.2, 0.3])
    ai.inject(model, **se(after="units.*.norm"), example_inputs=images())
    first = type(model.units[0])
    assert all(type(unit) is first for unit in model.units)
    stir(model)
    model.given = [0.4, 0.5, 0.0]
    model(images())
    assert [type(unit) is first for unit in model.units] == [True, True, False]


def test_a_decision_by_what_a_child_made_goes_by_module() -> None:
    """The size of a value inside is not known before the call."""

    def body(unit, x, given):
        y = unit.conv(x)
        return unit.norm(y) if y.shape[-1] > 3 else y

    model = Net(body, [None]).eval()
    site = ai.plan(model, **se(after="units.0.conv"), example_inputs=images()).sites[0]
    assert (site.mechanism, "control flow" in site.reason) == ("module", True)


class Handing(nn.Module):
    """Hands whatever it is given by name on to a child that may not use it, as transformers' layers do."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mixer = nn.BatchNorm2d(8), Mixer()

    def forward(self, x, **options):
        y, _ = self.mixer(self.norm(x), **options)
        return x + y


class Mixer(nn.Module):
    """Returns a pair; the second item on demand. A mask and a rate count where they are given."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)

    def forward(self, x, weights=False, mask=None, rate=None, **options):
        y = self.conv(x)
        if mask is not None:
            y = y * mask
        if rate is not None:
            y = y * rate
        return y, y.mean() if weights else None


class Options(nn.Module):
    """A model that hands its options on."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.layer = nn.Conv2d(3, 8, 1), Handing()

    def forward(self, x, **options):
        return self.layer(self.stem(x), **options)


OPTIONS: list[dict] = [
    {"weights": True}, {}, {"weights": False, "other": 3}, {"mask": torch.rand(2, 1, 1, 1)}, {"rate": 2},
    {"mask": torch.rand(2, 1, 1, 1), "rate": 0.5, "weights": True}, {"rate": 0.5, "mask": None},
]  # fmt: skip


@pytest.mark.parametrize("planned", OPTIONS, ids=lambda given: ",".join(given) or "none")
def test_options_by_name_are_handed_on(planned: dict) -> None:
    """Tensors and numbers vary from call to call; others than the plan saw make the graph anew."""
    base = Options().eval()
    model, x = copy.deepcopy(base), images()
    plan = ai.plan(model, **se(place="residual_branch"), example_inputs={"x": x, **planned})
    assert [(s.path, s.mechanism) for s in plan.sites] == [("layer.mixer", "graph")]
    ai.inject(model, plan)
    model = pickle.loads(pickle.dumps(model))
    for given in OPTIONS:
        assert torch.equal(model(x, **given), base(x, **given))
        with Calls(model) as calls:
            model(x, **given)
        assert calls.order == list(ai.injected(model))


def test_another_number_or_tensor_among_the_options_is_no_other_graph() -> None:
    """A trainer hands a count on that differs from step to step (`num_items_in_batch`)."""
    base = Options().eval()
    model, x = copy.deepcopy(base), images()
    ai.inject(model, **se(place="residual_branch"), example_inputs=x)
    kinds = set()
    for step in range(4):
        given = {"mask": torch.rand(2, 1, 1, 1), "rate": 2 + step}
        assert torch.equal(model(x, **given), base(x, **given))
        kinds.add(type(model.layer))
    assert len(kinds) == 1


def test_an_option_whose_name_is_none_is_refused_in_words() -> None:
    """Generated code could not hold it."""
    model = Options().eval()
    ai.inject(model, **se(place="residual_branch"), example_inputs=images())
    with pytest.raises(ai.errors.CannotRewriteError, match="is given an option 'a-b'"):
        model(images(), **{"a-b": 1})


class Exits(nn.Module):
    """Leaves early in eval mode, where a classifier is sure."""

    def __init__(self) -> None:
        super().__init__()
        widths = [(3, 4), (4, 8), (8, 16)]
        self.stages = nn.ModuleList(nn.Sequential(nn.Conv2d(i, o, 3, 2, 1), nn.ReLU()) for i, o in widths)
        self.exits = nn.ModuleList(nn.Linear(width, 2) for _, width in widths)

    def forward(self, x):
        for stage, leave in zip(self.stages, self.exits, strict=True):
            x = stage(x)
            y = leave(x.mean((2, 3)))
            if not self.training and y.softmax(1).min() > 1:
                break
        return y


class Experts(nn.Module):
    """Each image goes to one expert, which a router chooses."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, 2)
        self.experts = nn.ModuleList(nn.Conv2d(width, width, 1) for _ in range(2))

    def forward(self, x):
        chosen = self.router(x.mean((2, 3))).argmax(1)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows = (chosen == number).nonzero().flatten()
            out = out.index_copy(0, rows, expert(x[rows])) if len(rows) else out
        return out


class Routed(nn.Module):
    """A unit with experts."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv, self.act, self.experts = nn.Conv2d(inputs, outputs, 3, 2, 1), nn.ReLU(), Experts(outputs)

    def forward(self, x):
        x = self.act(self.conv(x))
        return x + self.experts(x)


@pytest.mark.parametrize(
    ("net", "sites"),
    [
        (Exits, ["stages.0.1", "stages.1.1", "stages.2.1"]),
        (lambda: nn.Sequential(Routed(3, 4), Routed(4, 8)), ["0", "1"]),
    ],
)
def test_a_run_that_asks_for_values_half_way_sees_the_layers_behind(net, sites: list[str]) -> None:
    """A plan ended, without a word, with the first exit, or with the first unit that has experts."""
    plan = ai.plan(net(), **se(place="stage_end"), example_inputs=torch.randn(2, 3, 32, 32))
    assert [site.path for site in plan.sites] == sites
