"""The registry: names, checked arguments, foreign classes, and what its messages say."""

from __future__ import annotations

import pickle

import pytest
import torch
from block_cases import DIMS, NAMES, PAPER_IS_IDENTITY, build, noise
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from attninject import errors
from attninject.blocks import registry
from attninject.blocks.base import hidden_width
from attninject.blocks.gate import Blend
from attninject.blocks.options import RESERVED


@pytest.fixture(autouse=True)
def _own_registrations(monkeypatch):
    """Each test starts with no third-party block and leaves none."""
    monkeypatch.setattr(registry, "_REGISTERED", {})


class Doubler(nn.Module):
    """Not the identity: 2x through a weight."""

    def __init__(self, channels: int, factor: float = 2.0, *, power: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((channels, 1, 1), factor**power))

    def forward(self, x):
        return x * self.weight


class Knowing(nn.Module):
    """Takes dims and init, and tells what it was given."""

    supported_dims = (1, 2)
    spatial = False

    def __init__(self, channels: int, dims: int = 2, init: str = "paper") -> None:
        super().__init__()
        self.given = (channels, dims, init)

    def forward(self, x):
        return x if self.given[2] == "identity" else x + 1


# --- names ----------------------------------------------------------------------------------------


def test_names_are_sorted_and_complete():
    """The blocks of the first release are there, sorted, each found again under its own name."""
    assert {"se", "channel_attention", "spatial_attention", "cbam", "bam", "nonlocal"} <= set(NAMES)
    assert registry.list_blocks() == sorted(registry.list_blocks())
    assert [registry.get(name).name for name in NAMES] == NAMES


@pytest.mark.parametrize(("wrong", "meant"), [("cbm", "cbam"), ("non_local", "nonlocal"), ("SE", "se")])
def test_an_unknown_name_brings_the_nearest(wrong, meant):
    """A misspelt block is refused with the name that was probably meant."""
    with pytest.raises(
        errors.UnknownBlockError, match=f"no block is called '{wrong}'; did you mean .*'{meant}'"
    ):
        registry.get(wrong)


@pytest.mark.parametrize("wrong", ["torch.nn.Conv2d", "", None, 3, "timm/nothing"])
def test_nothing_outside_the_registry_is_a_name(wrong):
    """No dotted path, no other type: refused as unknown, with the list of what there is."""
    with pytest.raises(errors.UnknownBlockError, match=r"there are: .*bam, .*cbam"):
        registry.get(wrong)


# --- arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "args", "argument", "text"),
    [
        ("se", {"redution": 4}, "redution", "no argument 'redution'; did you mean 'reduction'?"),
        ("se", {"xyz": 4}, "xyz", "it takes backend, bias, divisor, gate, reduction, squeeze"),
        ("se", {"reduction": 0}, "reduction", "or a fraction of the channels between 0 and 1, found 0"),
        ("se", {"reduction": -4}, "reduction", "expected a number >= 1"),
        ("se", {"reduction": "16"}, "reduction", "found '16'"),
        ("se", {"reduction": True}, "reduction", "found True"),
        ("se", {"reduction": float("nan")}, "reduction", "found nan"),
        ("se", {"reduction": float("inf")}, "reduction", "found inf"),
        ("se", {"bias": 1}, "bias", "expected true or false, found 1"),
        ("se", {"divisor": 0}, "divisor", "expected a whole number >= 1, found 0"),
        ("se", {"divisor": 8.0}, "divisor", "expected a whole number >= 1, found 8.0"),
        ("se", {"gate": "sigmod"}, "gate", "expected one of sigmoid, hard_sigmoid, tanh, relu"),
        ("se", {"squeeze": None}, "squeeze", "expected one of avg, max, both, found None"),
        ("se", {"init": "paper"}, "init", "a field of the rule"),
        ("se", {"channels": 3}, "channels", "measured at the site"),
        ("cbam", {"kernel_size": 4}, "kernel_size", "expected one of 3, 5, 7, found 4"),
        ("cbam", {"kernel_size": [7, 7]}, "kernel_size", "found [7, 7]"),
        ("cbam", {"order": "channel"}, "order", "channel_first, spatial_first, parallel"),
        ("bam", {"mode": "product form"}, "mode", "expected one of product, sum"),
        ("bam", {"num_layers": -1}, "num_layers", "expected a whole number >= 0"),
        ("nonlocal", {"mode": "gaussain"}, "mode", "embedded_gaussian"),
        ("nonlocal", {1: 2}, 1, "the name of an argument is a string, found 1"),
    ],
)
def test_a_wrong_argument_is_named_with_its_range(name, args, argument, text):
    """check_args and create_block say the same: the argument, what was found, what was expected."""
    ((found, message),) = registry.check_args(name, args)
    assert found == argument
    assert text in message
    if isinstance(argument, str) and argument not in ("init", "channels"):
        with pytest.raises(errors.BlockError) as caught:
            registry.create_block(name, 64, **args)
        assert str(caught.value) == message


def test_all_faults_come_at_once():
    """Three wrong arguments, three faults, in the order given; right ones give none."""
    wrong = {"reduction": 0, "biass": True, "gate": 3}
    assert [argument for argument, _ in registry.check_args("se", wrong)] == list(wrong)
    with pytest.raises(errors.BlockError) as caught:
        registry.create_block("se", 64, **wrong)
    assert len(str(caught.value).splitlines()) == 3
    assert registry.check_args("se", {"reduction": 0.25, "bias": False, "gate": "tanh"}) == []


@pytest.mark.parametrize("name", NAMES)
def test_defaults_pass_their_own_checks(name):
    """Every constructor default is declared as an option and within its range."""
    spec = registry.get(name)
    parameters = registry._parameters(spec.cls)
    defaults = {k: p.default for k, p in parameters.items() if k not in ("channels", *RESERVED)}
    assert set(defaults) == set(spec.cls.options)
    assert registry.check_args(name, defaults) == []
    assert (parameters["dims"].default, parameters["init"].default) == (2, "identity")


@pytest.mark.parametrize("name", NAMES)
def test_constructors_check_too(name):
    """A class used alone refuses the same things as the registry."""
    cls = registry.get(name).cls
    dims = " or ".join(map(str, cls.supported_dims))
    with pytest.raises(errors.BlockError, match=rf"dims \(spatial dimensions\): expected {dims}, found 4"):
        cls(8, dims=4)
    with pytest.raises(
        errors.BlockError, match="init: expected one of identity, paper, blend, found 'papers'"
    ):
        cls(8, init="papers")
    for channels in (0, -1, 2.0, True, "8"):
        with pytest.raises(errors.TooFewChannelsError, match="channels: expected a whole number >= 1"):
            cls(channels)


@pytest.mark.parametrize(
    ("channels", "reduction", "divisor", "width"),
    [
        (64, 16, 1, 4),
        (3, 16, 1, 1),
        (30, 4, 1, 7),
        (100, 0.29, 1, 29),
        (64, 0.25, 1, 16),
        (64, 2.5, 1, 25),
        (64, 16, 8, 8),
        (192, 16, 8, 16),
        (96, 0.0625, 8, 8),
    ],
)
def test_hidden_widths(channels, reduction, divisor, width):
    """Cut to a whole number, at least 1; with a divisor, the nearest multiple as timm rounds."""
    assert hidden_width(channels, reduction, divisor) == width


@given(st.integers(1, 4096), st.integers(1, 64), st.integers(1, 16))
def test_hidden_width_is_positive_and_divisible(channels, reduction, divisor):
    """Always at least 1, a multiple of the divisor, and no further from C / r than the divisor."""
    width = hidden_width(channels, reduction, divisor)
    assert width >= 1
    assert width % divisor == 0
    assert abs(width - channels / reduction) <= divisor


@given(st.integers(1, 4096), st.sampled_from([2, 4, 8, 16, 32]), st.sampled_from([4, 8]))
def test_hidden_width_with_a_divisor_is_timms(channels, reduction, divisor):
    """timm's make_divisible without a round limit."""
    from timm.layers import make_divisible

    expected = make_divisible(channels / reduction, divisor, round_limit=0.0)
    assert hidden_width(channels, reduction, divisor) == expected


def test_repr_shows_what_was_chosen():
    """The printed block names its channels and whatever is not default."""
    text = repr(build("se", 64, gate="tanh", init="paper")).splitlines()[1].strip()
    assert text == "64, init='paper', gate='tanh'"


# --- third-party blocks ---------------------------------------------------------------------------


def test_a_registered_class_is_a_block_like_any_other():
    """Listed, found, checked by its own signature, built as cls(channels, **args)."""
    assert registry.register_block("doubler")(Doubler) is Doubler
    assert "doubler" in registry.list_blocks()
    assert registry.get("doubler").cls is Doubler
    assert registry.check_args("doubler", {"factr": 1, "power": 1})[0][0] == "factr"
    assert registry.check_args("doubler", {}) == [(None, "block 'doubler' needs the argument 'power'")]
    block = registry.create_block("doubler", 4, init="paper", factor=3.0, power=2)
    assert torch.equal(block(torch.ones(1, 4, 2, 2)), torch.full((1, 4, 2, 2), 9.0))


def test_a_class_needs_no_registration():
    """A class in place of the name; dims and init are passed where its signature has them."""
    assert registry.create_block(Knowing, 8, dims=1).given == (8, 1, "identity")
    assert registry.create_block(Knowing, 8, init="paper").given == (8, 2, "paper")
    spec = registry.resolve(Knowing)
    assert (spec.name, spec.dims, spec.spatial) == ("knowing", (1, 2), False)
    assert registry.resolve(registry.get("se").cls) is registry.get("se")


def test_blend_makes_a_foreign_class_the_identity():
    """x + α(f(x) − x) with the class inside as `block`, also where it takes init itself."""
    block = registry.create_block(Doubler, 4, init="blend", power=1)
    x = noise(2, 4, 3, 3)
    assert isinstance(block, Blend)
    assert list(block.state_dict()) == ["alpha", "block.weight"]
    assert torch.equal(block(x), x)
    with torch.no_grad():
        block.alpha.fill_(0.5)
    torch.testing.assert_close(block(x), 1.5 * x)
    knowing = registry.create_block(Knowing, 4, init="blend")
    assert isinstance(knowing, Blend)
    assert knowing.block.given[2] == "paper"
    assert torch.equal(pickle.loads(pickle.dumps(block))(x), block(x))


def test_blend_gives_the_inner_blocks_attention():
    """`attention` of a wrapped block is the block's own, and empty where it has none."""
    x = noise(2, 16, 3, 3)
    inner = build("se", init="paper")
    assert torch.equal(Blend(inner).attention(x)["gate"], inner.attention(x)["gate"])
    assert Blend(nn.ReLU()).attention(x) == {}


@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16], ids=str)
def test_blend_keeps_the_inputs_dtype(low):
    """A wrapped module that answers in another precision under autocast is the identity all the same."""
    block, x = Blend(nn.Conv2d(4, 4, 1)), noise(2, 4, 3, 3)
    with torch.autocast("cpu", low):
        for dtype in (torch.float32, low):
            y = block(x.to(dtype))
            assert y.dtype == dtype
            assert torch.equal(y, x.to(dtype))


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: registry.register_block("se"), "'se' is a built-in block"),
        (lambda: registry.register_block("timm/mine"), "kept for timm's own"),
        (lambda: registry.register_block("a.b"), "a word of letters, digits and _"),
        (lambda: registry.register_block("__class__"), "a word of letters, digits and _"),
        (lambda: registry.register_block("forward"), "attribute of every torch module"),
        (lambda: registry.register_block("x/train"), "attribute of every torch module"),
        (lambda: registry.register_block(None), "found None"),
        (lambda: registry.register_block("fine")(len), "decorates a torch.nn.Module class"),
        (lambda: registry.create_block(len, 4), "a name or a class derived from torch.nn.Module"),
        (lambda: registry.create_block(Doubler, 4), "needs the argument 'power'"),
        (lambda: registry.create_block(Doubler, 4, power=1, pwer=2), "did you mean 'power'"),
        (lambda: registry.create_block(Doubler, 4, power=1, dims=3), "expected 2, found 3"),
        (lambda: registry.create_block(Doubler, 4, power=1, init="pape"), "found 'pape'"),
        (lambda: registry.create_block(Doubler, 0, power=1), "channels: expected a whole number >= 1"),
    ],
)
def test_refusals_about_foreign_blocks(call, text):
    """Each refusal is a BlockError that says what is wrong."""
    with pytest.raises(errors.BlockError) as caught:
        call()
    assert text in str(caught.value)


def test_a_name_is_kept_by_its_first_class_but_may_be_defined_again():
    """Another class under a taken name is refused; the same class, as when a cell is run again, is not."""

    def define():
        class Mine(nn.Identity):
            """A class that is defined twice."""

        return Mine

    first, again = define(), define()
    registry.register_block("mine")(first)
    registry.register_block("mine")(again)
    assert registry.get("mine").cls is again
    with pytest.raises(errors.BlockError, match=r"'mine' is taken by .*Mine"):
        registry.register_block("mine")(Doubler)


# --- is_identity ----------------------------------------------------------------------------------


class TrainsDifferently(nn.Module):
    """The identity in eval mode only."""

    def forward(self, x):
        return x + 1 if self.training else x


class Rounds(nn.Module):
    """Nearly the identity: one unit in the last place."""

    def forward(self, x):
        return torch.nextafter(x, torch.full_like(x, 1e9))


class WritesInput(nn.Module):
    """Returns its input, which it has overwritten."""

    def forward(self, x):
        return x.mul_(0)


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.Identity(), True),
        (nn.Dropout(0.0), True),
        (nn.Dropout(0.5), False),
        (nn.ReLU(), False),
        (nn.BatchNorm2d(4), False),
        (nn.Conv2d(4, 8, 1), False),
        (TrainsDifferently(), False),
        (Rounds(), False),
        (WritesInput(), False),
        (Blend(nn.BatchNorm2d(4)), True),
    ],
    ids=repr,
)
def test_is_identity_wants_every_bit_in_both_modes(module, expected):
    """Equal to the last bit in eval and in train mode, else False."""
    assert registry.is_identity(module, 4) is expected


def test_is_identity_leaves_no_mark():
    """Buffers, modes, gradients and the random generator are as before."""
    block = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm2d(4)).train()
    block[1].eval()
    buffers = {k: v.clone() for k, v in block.named_buffers()}
    state = torch.get_rng_state()
    registry.is_identity(block, 4)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, buffers[k]) for k, v in block.named_buffers())
    assert [m.training for m in block.modules()] == [True, True, False]
    assert all(p.grad is None for p in block.parameters())


@pytest.mark.parametrize(("name", "dims"), DIMS)
def test_built_in_blocks_pass_is_identity(name, dims):
    """The test that foreign blocks must pass holds for our own, and fails for the published gates."""
    assert registry.is_identity(build(name, dims=dims), 16, dims)
    assert registry.is_identity(build(name, dims=dims, init="paper"), 16, dims) is (name in PAPER_IS_IDENTITY)
