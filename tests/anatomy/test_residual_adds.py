"""Which additions count as residual adds of the trunk, one small net for each rule, and where branches end."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from attninject.anatomy.dataflow import Spot
from attninject.anatomy.place_map import PlaceMap
from attninject.anatomy.places import spots as spots_of
from attninject.observe.probe import probe
from attninject.observe.record import Call


def layers(channels: int = 4, out: int | None = None, stride: int = 1) -> nn.Sequential:
    """Two convolutions with an activation between: what a branch is made of."""
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, stride, 1), nn.ReLU(), nn.Conv2d(channels, out or channels, 1)
    )


class Net(nn.Module):
    """A net from named children and the source of its forward's result, so that a test shows both at once."""

    def __init__(self, result: str, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)
        self.result = result

    def forward(self, x):
        return eval(self.result, {"torch": torch, **self._modules}, {"x": x})


def places(net: nn.Module, place: str = "residual_branch") -> list[str]:
    """Where the place falls when `net` is a child of a larger one, by names relative to it."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), net, nn.Flatten(), nn.LazyLinear(2))
    model(torch.zeros(1, 3, 16, 16))
    record, _ = probe(model, torch.zeros(2, 3, 16, 16))
    found = PlaceMap(record)
    names = {id(m): name for name, m in net.named_modules()}

    def path(spot: Spot) -> str:
        if isinstance(spot.event, Call):
            return names[id(spot.event.module)]
        return f"{names[id(spot.event.call.module)]}::{spot.event.name.split('.')[1]}"

    spots = {"residual_branch": lambda: [s for s in map(_end(found), found.adds) if s]}
    return [path(s) for s in (spots.get(place) or (lambda: spots_of(found, place)))()]


def _end(found: PlaceMap):
    from attninject.anatomy.residual_adds import branch_end

    return lambda add: branch_end(found.record, found.flow, add)


RESIDUAL = {
    "identity shortcut": ("x + f(x)", {"f": layers()}, ["f"]),
    "projected shortcut": ("f(x) + p(x)", {"f": layers(out=8), "p": nn.Conv2d(4, 8, 1)}, ["f"]),
    "pre-activated projection": (
        "f(x) + p(x)",
        {"f": layers(out=8), "p": nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 8, 1))},
        ["f"],
    ),
    "two branches in a row, one sum": ("x + f(x) + g(x)", {"f": layers(), "g": layers()}, ["f", "g"]),
    "a layer with its norm": (
        "x + f(x)",
        {"f": nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.BatchNorm2d(4))},
        ["f"],
    ),
    "constant scale": ("x + 0.1 * f(x)", {"f": layers()}, ["f"]),
    "part of the channels": (
        "torch.cat((x + f(x)[:, :4], f(x)[:, 4:]), 1)",
        {"f": layers(out=6)},
        ["f"],
    ),
}


@pytest.mark.parametrize("case", RESIDUAL)
def test_a_branch_with_layers_beside_a_shortcut_counts(case: str) -> None:
    """Every usual way to write a residual add is found, and the branch ends at its last module."""
    result, children, ends = RESIDUAL[case]
    assert places(Net(result, **children)) == ends


NO_RESIDUAL = {
    "parallel branches": ("f(x) + g(x)", {"f": layers(), "g": layers()}),
    "positional convolution": ("x + f(x)", {"f": nn.Conv2d(4, 4, 3, padding=1, groups=4)}),
    "re-parameterised branches": (
        "a(f(x) + g(x) + h(x))",
        {
            "f": nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)),
            "g": nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)),
            "h": nn.BatchNorm2d(4),
            "a": nn.ReLU(),
        },
    ),
    "identity beside two convolutions": (
        "x + f(x) + g(x)",
        {"f": nn.Conv2d(4, 4, 3, padding=1), "g": nn.Conv2d(4, 4, 1)},
    ),
    "gated mean of two states": ("g(x) * x + (1 - g(x)) * f(x)", {"f": layers(), "g": layers()}),
    "nodes of a cell": (
        "torch.cat((x + f(x), x + g(x)), 1)",
        {"f": layers(), "g": layers()},
    ),
    "no layers": ("x + torch.relu(x)", {}),
}


@pytest.mark.parametrize("case", NO_RESIDUAL)
def test_other_sums_do_not_count(case: str) -> None:
    """Sums that are no skip around layers get no block, or it would sit where the paper has none."""
    result, children = NO_RESIDUAL[case]
    assert places(Net(result, **children)) == []


def test_sums_inside_a_branch_do_not_count() -> None:
    """Within an attention, say, the query's own skip is no residual add of the trunk."""
    inner = Net("o(x + f(x))", f=layers(), o=nn.Conv2d(4, 4, 1))
    assert places(Net("x + f(x)", f=inner)) == ["f"]


def test_sums_on_a_side_path_do_not_count() -> None:
    """What makes a gate or a global query for later branches is not the trunk."""
    side = Net("x + f(x)", f=layers())
    net = Net("x + b(x) * s(x)", b=layers(), s=side)
    assert places(net) == ["::mul"]


def test_residual_blocks_within_a_residual_group_count() -> None:
    """A group of blocks with a skip around it: the blocks and the group, as in super-resolution nets."""
    row = nn.Sequential(*(Net("x + f(x)", f=layers()) for _ in range(2)))
    assert places(Net("x + g(x)", g=row)) == ["g.0.f", "g.1.f", "g"]


def test_a_decoders_skip_does_not_count() -> None:
    """An encoder's map added on the way up fuses resolutions; the blocks below stay."""
    down = nn.Conv2d(4, 4, 3, 2, 1)
    row = nn.Sequential(*(Net("x + f(x)", f=layers()) for _ in range(2)))
    net = Net("x + u(r(d(x)))", d=down, r=row, u=nn.Upsample(scale_factor=2))
    assert places(net) == ["r.0.f", "r.1.f"]


def test_a_pyramids_sum_does_not_count() -> None:
    """The neck's sum of a lateral and an upsampled map has its branch in the backbone, not in the neck."""

    class Neck(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lateral, self.up = nn.Conv2d(4, 4, 1), nn.Upsample(scale_factor=2)

        def forward(self, low, high):
            return self.lateral(low) + self.up(high)

    net = Net("n(x, f(d(x)))", d=nn.Conv2d(4, 4, 3, 2, 1), f=layers(), n=Neck())
    assert places(net) == []


def test_a_module_that_ends_a_branch_and_adds_counts() -> None:
    """The last layer and the sum in a module of their own, as in BERT's kin: the caller hands it both."""

    class Ending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dense = nn.Conv2d(4, 4, 1)

        def forward(self, y, x):
            return self.dense(y) + x

    assert places(Net("o(f(x), x)", f=layers(), o=Ending())) == ["o.dense"]
    assert places(Net("o(u(f(x)), x)", f=layers(stride=2), u=nn.Upsample(scale_factor=2), o=Ending())) == []


def test_a_sum_in_a_module_of_its_own_belongs_to_its_caller() -> None:
    """Quantizable nets add by a module; the branch ends where it would with a plus sign."""

    class Add(nn.Module):
        def forward(self, a, b):
            return a + b

    assert places(Net("add(x, f(x))", f=layers(), add=Add())) == ["f"]


def test_an_encoded_position_is_told_by_its_class_where_nothing_else_does() -> None:
    """A depthwise convolution with its norm and a skip is a layer, unless its class says that it encodes positions."""

    class RepCPE(Net):
        pass

    layer = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.BatchNorm2d(4))
    assert places(Net("b(x)", b=Net("x + f(x)", f=layer))) == ["b.f"]
    assert places(Net("b(x)", b=RepCPE("x + f(x)", f=layer))) == []


class Scale(nn.Module):
    """A layer scale, whose factors may lie flat, as timm's `LayerScale2d` keeps them."""

    def __init__(self, flat: bool = False) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(4) if flat else torch.ones(4, 1, 1))

    def forward(self, x):
        return x * (self.gamma.view(1, 4, 1, 1) if self.gamma.ndim == 1 else self.gamma)


def test_layer_scale_and_dropout_stay_outside_the_branch() -> None:
    """The block sees the branch before it is scaled down to nothing."""
    for scale in (Scale(), Scale(flat=True)):
        net = Net("x + d(s(f(x)))", f=layers(), s=scale, d=nn.Dropout(0.5))
        assert places(net) == ["f"]


def test_windows_put_back_are_where_a_windowed_branch_ends() -> None:
    """Behind window attention the branch's last value is the map, not the batch of windows."""

    class Windowed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4))

        def forward(self, x):
            b, c, h, w = x.shape
            y = x.permute(0, 2, 3, 1).reshape(b, h // 4, 4, w // 4, 4, c).transpose(2, 3)
            y = self.attn(y.reshape(-1, 16, c))
            y = y.reshape(b, h // 4, w // 4, 4, 4, c).transpose(2, 3).reshape(b, h, w, c)
            return x + y.permute(0, 3, 1, 2)

    assert places(Windowed()) == ["::permute"]


def test_the_shortcut_is_named_too() -> None:
    """`shortcut` is the sum's other operand."""
    assert places(Net("f(x) + p(x)", f=layers(out=8), p=nn.Conv2d(4, 8, 1)), "shortcut") == ["::add"]
