"""Networks written in ways of their own: children asked for their `forward`, slices, letters for names, odd shapes."""

from __future__ import annotations

import copy

import pytest
import torch
from small import calls_of, images, older, se, stir
from torch import Tensor, nn
from torch.nn import functional as F

import attninject as ai


class Unit(nn.Module):
    """conv, norm, activation; with a sum where the shape stays."""

    def __init__(self, inputs: int, outputs: int, stride: int | tuple[int, int] = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm, self.act = nn.BatchNorm2d(outputs), nn.ReLU()

    def forward(self, x):
        y = self.act(self.norm(self.conv(x)))
        return x + y if x.shape == y.shape else y


def planned(model: nn.Module, x: Tensor | None = None, **where: object) -> list[str]:
    """Where the blocks would go."""
    return [site.path for site in ai.plan(model.eval(), **se(**where), example_inputs=x).sites]


def holds(model: nn.Module, x: Tensor, **where: object) -> list[str]:
    """Inject, compare with the bare net in both modes, and see that each block runs once and works; the sites."""
    plan = ai.plan(model.eval(), **se(**where), example_inputs=x)
    twin = ai.inject(copy.deepcopy(model), **se(**where), example_inputs=x)
    with torch.no_grad():
        for mode in (False, True):
            torch.manual_seed(2)
            wanted = model.train(mode)(x)
            torch.manual_seed(2)
            assert torch.equal(twin.train(mode)(x), wanted)
        assert set(calls_of(twin.eval(), x).values()) == {1}
        stir(twin)
        assert not torch.equal(twin(x), model.eval()(x))
    return [site.path for site in plan.sites]


# --- children that are asked for their forward ------------------------------------------------


class Neck(nn.Module):
    """Calls one of its children by `forward`."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = Unit(3, 8, 2), Unit(8, 8), Unit(8, 8)

    def forward(self, x):
        return self.c.forward(self.b(self.a(x)))


class Direct(nn.Module):
    """Calls its parts by `forward`, as many detectors do."""

    def __init__(self) -> None:
        super().__init__()
        self.neck, self.head = Neck(), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        return self.head.forward(self.neck.forward(x))


@pytest.mark.parametrize(
    "where", ["neck", "neck.c", "neck.c.norm", "neck.{b,c}.conv", "neck.{b.norm,c.conv}"]
)
def test_a_child_that_is_asked_for_its_forward_takes_blocks(where: str) -> None:
    """`self.child.forward(x)` is a call like `self.child(x)`: it has a site, and loses no block to its caller's graph."""
    holds(Direct(), images(), after=where)


def test_the_plan_says_whose_forward_is_called_so() -> None:
    """A graph would inline the child, so the caller's is not rewritten, and the plan says why."""
    model = nn.Sequential(Neck(), nn.Conv2d(8, 4, 1))
    (site,) = ai.plan(model, **se(after="0.b"), example_inputs=images()).sites
    assert site.mechanism == "module"
    assert "calls 0.c.forward itself" in site.reason


# --- slices --------------------------------------------------------------------------------------


class Sliced(nn.Module):
    """Runs slices of one Sequential, each a new Sequential made for the call."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(Unit(3, 8), Unit(8, 8), Unit(8, 16, 2), Unit(16, 16), Unit(16, 16))

    def forward(self, x):
        low = self.features[:2](x)
        return self.features[2:](low).mean() + low.mean()


def test_slices_of_a_sequential() -> None:
    """The slices have no names and no place in the net; what they run has."""
    assert holds(Sliced(), images(), place="stage_end") == ["features.1", "features.4"]
    assert planned(Sliced(), images(), place="block_end") == [f"features.{n}" for n in range(5)]


# --- layers that are copied from a state of their own ---------------------------------------------


class Swap(nn.Module):
    """Swaps two axes, and is copied from its axes alone, as einops' layers are."""

    def __init__(self, first: int = 1, second: int = 2) -> None:
        super().__init__()
        self.axes = first, second

    def forward(self, x):
        return x.transpose(*self.axes)

    def __getstate__(self):
        return {"axes": self.axes}

    def __setstate__(self, state):
        self.__init__(*state["axes"])


@pytest.mark.parametrize("where", ["0.0", "0.1", "0", "0.2"])
def test_a_layer_that_is_copied_without_its_children_carries_no_block(where: str) -> None:
    """The block hangs beside it, so that a copy of the net has it."""
    net = nn.Sequential(nn.Sequential(Swap(), nn.Linear(3, 6), Swap()), nn.Conv1d(6, 6, 1))
    x = torch.randn(2, 3, 10, generator=torch.Generator().manual_seed(0))
    layout = "NLC" if where in ("0.0", "0.1") else "NCL"
    model = ai.inject(net.eval(), **se(after=where, layout=layout), example_inputs=x)
    stir(model)
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    assert len(ai.injected(copy.deepcopy(model))) == 1


def test_a_layer_that_is_copied_without_its_children_is_named() -> None:
    """Where nothing beside it serves, the message says what is the matter."""
    with pytest.raises(ai.errors.CannotRewriteError, match="copied and pickled without what hangs on it"):
        planned(nn.Sequential(nn.Conv1d(3, 3, 1), Swap(), Swap()), torch.zeros(2, 3, 10), after="1")


# --- forwards that go over whatever hangs on a module ----------------------------------------------


class Traced(nn.Module):
    """A part of it is a graph of torch.fx, as feature extractors are."""

    def __init__(self) -> None:
        super().__init__()
        self.body = torch.fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 8, 3), Reading(), nn.Conv2d(8, 8, 1)))
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class Reading(nn.Module):
    """A residual unit that a trace goes into."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x).relu()


def test_a_copy_of_a_graph_has_its_blocks() -> None:
    """Its class copies it in a way of its own, from the graph alone."""
    net = ai.inject(Traced().eval(), **se(after="body.1.conv"), example_inputs=images())
    stir(net)
    twin = copy.deepcopy(net)
    assert list(ai.injected(twin)) == list(ai.injected(net)) == ["body.se"]
    assert torch.equal(twin(images()), net(images()))
    again = copy.deepcopy(twin)
    assert calls_of(again, images()) == {"body.se": 1}
    ai.eject(again)
    assert torch.equal(again(images()), ai.eject(twin)(images()))


class Parallel(nn.Sequential):
    """Joins what each child makes of the input, whichever there are."""

    def forward(self, x):
        return torch.cat([child(x) for child in self._modules.values()], 1)


@pytest.mark.parametrize("where", ["0", "0.1"])
def test_a_forward_that_goes_over_all_that_hangs_on_it(where: str) -> None:
    """A block there would be one more branch: it hangs beside the module, before its reader, or in the root."""
    branches = Parallel(nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 3, padding=1))
    holds(nn.Sequential(branches, nn.Conv2d(8, 4, 1)), images(), after=where)
    assert holds(Twice(branches), images(), after="inner") == ["inner"]


class Twice(nn.Module):
    """No module reads the branches."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x).relu()


# --- operations that only training has -----------------------------------------------------------


class Dropping(nn.Module):
    """A residual unit whose dropped paths add something to a random number before the residual sum."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x):
        y = self.norm(self.conv(x))
        if self.training:
            mask = 0.8 + torch.rand((y.size(0), 1, 1, 1), dtype=y.dtype, device=y.device)
            y = y.div(0.8) * mask.floor()
        y += x
        return y


NO_RAND = pytest.mark.skipif(
    older(torch.__version__, "2.9"),
    reason="this torch.fx cannot trace rand of a traced size, so no operation beside it can be named",
)


@pytest.mark.parametrize(
    "where",
    [
        {"place": "shortcut"},
        pytest.param({"after": "*.*::add"}, marks=NO_RAND),
        {"place": "residual_branch"},
    ],
)
def test_a_sum_that_only_training_has_is_not_taken_for_the_residual_one(where: dict) -> None:
    """The eval graph's first sum is the training graph's second: the block stands at the same one in both."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Sequential(Dropping(), Dropping()), nn.Conv2d(8, 4, 1))
    holds(net, images(), **where)
    model = ai.inject(net.train(), **se(**where), example_inputs=images())
    model(images()).square().sum().backward()
    assert all(any(p.grad.abs().sum() > 0 for p in b.parameters()) for b in ai.injected(model).values())


# --- what the axes mean --------------------------------------------------------------------------


class Spectral(nn.Module):
    """Waveforms, cut into frames: the convolutions see (batch, channels, frames), the input is (batch, samples)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(16, 12, 1)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Conv1d(12, 12, 3, padding=1), nn.ReLU()) for _ in range(2)
        )

    def forward(self, x):
        y = self.first(x.unflatten(1, (-1, 16)).transpose(1, 2))
        for layer in self.layers:
            y = y + layer(y) * 1
        return y


class Skeleton(nn.Module):
    """(batch, channels, frames, joints, people) in, people folded into the batch, frames halved."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Unit(3, 16), Unit(16, 128, (2, 1))

    def forward(self, x):
        b, c, t, v, m = x.shape
        y = x.permute(0, 4, 1, 2, 3).reshape(b * m, c, t, v)
        return self.second(self.first(y))


def test_a_convolution_says_which_axis_holds_the_channels() -> None:
    """Where the model's input has other axes than its maps, what a convolution gave is channels first all the same."""
    frames = torch.randn(2, 16 * 20, generator=torch.Generator().manual_seed(0))
    sites = ai.plan(Spectral(), **se(after="layers.*"), example_inputs=frames).sites
    assert [(str(s.layout), s.channels) for s in sites] == [("NCL", 12)] * 2
    skeleton = torch.randn(2, 3, 16, 18, 1, generator=torch.Generator().manual_seed(0))
    (site,) = ai.plan(Skeleton(), **se(after="second"), example_inputs=skeleton).sites
    assert (str(site.layout), site.channels) == ("NCHW", 128)


def test_a_pixel_shuffle_makes_a_finer_map() -> None:
    """Blocks that look at neighbours stand behind it too."""
    net = nn.Sequential(nn.Conv2d(3, 16, 3, 2, padding=1), nn.PixelShuffle(2), Unit(4, 4), nn.Conv2d(4, 4, 1))
    plan = ai.plan(net, block="cbam", args={"reduction": 2}, after="{1,2.conv,2}", example_inputs=images())
    assert {str(s.layout) for s in plan.sites} == {"NCHW"}


# --- places ----------------------------------------------------------------------------------------


class Inception(nn.Module):
    """Two parallel branches, joined."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.p, self.q = nn.Conv2d(inputs, outputs // 2, 1), nn.Conv2d(inputs, outputs // 2, 3, padding=1)

    def forward(self, x):
        return F.relu(torch.cat([self.p(x), self.q(x)], 1))


class Lettered(nn.Module):
    """Its units are told apart by letters, the stages by numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.a3, self.b3 = Inception(3, 8), Inception(8, 8)
        self.a4, self.b4, self.c4 = Inception(8, 8), Inception(8, 8), Inception(8, 8)
        self.pool = nn.MaxPool2d(2)

    def forward(self, x):
        x = self.pool(self.b3(self.a3(x)))
        return self.c4(self.b4(self.a4(x)))


def test_units_that_are_told_apart_by_letters() -> None:
    """`a3`, `b3`, `a4`, … of one class play one role, though their names differ in more than numbers."""
    assert planned(Lettered(), images(), place="block_end") == ["a3", "b3", "a4", "b4", "c4"]
    assert planned(Lettered(), images(), place="stage_end") == ["b3", "c4"]


class Reader(nn.Module):
    """Columns of a text line, read by two recurrent layers."""

    def __init__(self) -> None:
        super().__init__()
        pools = nn.MaxPool2d(2), nn.MaxPool2d((2, 2), (2, 1), (0, 1)), nn.MaxPool2d((2, 2), (2, 1), (0, 1))
        self.cnn = nn.Sequential()
        for n, (inputs, pool) in enumerate(zip((3, 8, 8), pools, strict=True)):
            self.cnn.extend([nn.Conv2d(inputs, 8, 3, padding=1), nn.ReLU(), pool])
            assert len(self.cnn) == 3 * n + 3
        self.rnn = nn.Sequential(Recurrent(8), Recurrent(8))

    def forward(self, x):
        return self.rnn(self.cnn(x).mean(2).permute(2, 0, 1))


class Recurrent(nn.Module):
    """An LSTM and a projection, over (columns, batch, channels)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.rnn, self.out = nn.LSTM(width, 6, bidirectional=True), nn.Linear(12, width)

    def forward(self, x):
        return self.out(self.rnn(x)[0])


def test_stages_of_strides_that_differ_by_axis() -> None:
    """A text recogniser keeps its columns while it halves its rows: each is a stage; recurrent layers are no units."""
    lines = torch.zeros(2, 3, 32, 64)
    assert planned(Reader(), lines, place="stage_end") == ["cnn.1", "cnn.4", "cnn.7"]
    with pytest.raises(ai.errors.NoSuchPlaceError):
        planned(Reader(), lines, place="block_end")


class Causal(nn.Module):
    """A residual unit of a temporal network: each dilates more than the one before."""

    def __init__(self, inputs: int, outputs: int, dilation: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv1d(inputs, outputs, 3, padding=dilation, dilation=dilation), nn.ReLU()
        )
        self.down = nn.Conv1d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x):
        return F.relu(self.net(x) + self.down(x))


def test_dilation_without_a_stride_ends_no_stage() -> None:
    """At the input's own resolution no stride was traded for it: the stages are thirds of the depth."""
    net = nn.Sequential(Causal(8, 8, 1), Causal(8, 16, 2), Causal(16, 16, 4))
    assert planned(net, torch.zeros(2, 8, 20), place="stage_end") == ["0", "1", "2"]


class Pair(nn.Module):
    """One trunk without sums, called for each of two images."""

    def __init__(self) -> None:
        super().__init__()
        layers = (
            nn.Conv2d(3, 8, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.ReLU(),
        )
        self.net = Trunk(*layers)

    def forward(self, x):
        return self.net(x) - self.net(x.flip(3))


class Trunk(nn.Sequential):
    """A Sequential with a name of its own."""

    def forward(self, x):
        return super().forward(x)


def test_a_net_that_is_called_twice_is_no_unit() -> None:
    """The stages are those of the net, which runs once for each image."""
    assert planned(Pair(), images(), place="stage_end") == ["net.1", "net.4"]


class Detector(nn.Module):
    """A module that holds backbone and neck and gives the neck's maps; a head behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = Body(), nn.ModuleList(nn.Conv2d(8, 4, 1) for _ in range(2))

    def forward(self, x):
        return [layer(v) for layer, v in zip(self.head, self.body(x), strict=True)]


class Body(nn.Module):
    """Two stages, and a pyramid on top of them."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = (
            nn.Sequential(Unit(3, 8, 2), Unit(8, 8)),
            nn.Sequential(Unit(8, 8, 2), Unit(8, 8)),
        )
        self.low, self.high = nn.Conv2d(8, 8, 1), nn.Conv2d(16, 8, 1)

    def forward(self, x):
        one = self.one(x)
        low = self.low(self.two(one)).relu()
        return self.high(torch.cat([one, F.interpolate(low, scale_factor=2.0)], 1)).relu(), low


def test_a_stage_ends_before_the_neck_in_the_same_module() -> None:
    """What backbone and neck give together is no stage's end."""
    assert planned(Detector(), images(), place="stage_end") == ["body.one.1", "body.two.1"]
