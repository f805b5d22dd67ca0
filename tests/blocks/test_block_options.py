"""Every option of every block: those promised exist, and each value does what the paper's formula says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import pytest
import torch
from block_cases import NAMES, build, noise, scrambled
from test_block_formulas import formula

from attninject.blocks import registry
from attninject.blocks.channel import SE
from attninject.blocks.options import (
    Anything,
    Bool,
    Branches,
    Check,
    Int,
    Maybe,
    Odd,
    OneOf,
    Reduction,
    check_of,
    declared,
)
from attninject.errors import BlockError

BOTH = (True, False)
WIDTHS = (1, 2.5, 16, 1000, 0.25)
PROMISED: dict[str, dict[str, tuple[Any, ...]]] = {
    "se": {
        "squeeze": ("avg", "max", "both"), "gate": ("sigmoid", "tanh", "relu", "hard_sigmoid"),
        "bias": BOTH, "divisor": (1, 8), "reduction": WIDTHS,
    },
    "channel_attention": {"pool": ("avg", "max", "both"), "bias": BOTH, "reduction": WIDTHS},
    "sk": {"branches": ([[3, 1], [5, 1]], [[1, 1], [3, 1], [3, 3]]), "reduction": WIDTHS},
    "spatial_attention": {
        "kernel_size": (3, 5, 7), "bias": BOTH, "norm": BOTH, "concat": ("max_mean", "mean_max"),
    },
    "stn": {"mode": ("affine", "attention"), "reduction": WIDTHS},
    "cbam": {"residual": BOTH, "norm": BOTH, "bias": BOTH, "kernel_size": (3, 5, 7), "reduction": WIDTHS},
    "bam": {"mode": ("product", "sum"), "dilation": (1, 4), "reduction": WIDTHS},
    "sca": {"order": ("channel_first", "spatial_first")},
    "recurrent_gate": {"steps": (1, 3)},
    "dynamic_capacity": {"k": (1, 10, 0.5)},
    "nonlocal": {
        "mode": ("embedded_gaussian", "gaussian", "dot_product", "concatenation"),
        "sub_sample": BOTH, "norm": BOTH, "scale": BOTH,
    },
    "self_attention": {"scale": BOTH, "residual": BOTH},
    "mhsa": {"scale": BOTH, "residual": BOTH, "num_heads": (1, 2, 8)},
    "generalized": {"terms": tuple(f"{n:04b}" for n in range(1, 16)), "num_heads": (1, 8)},
    "twins_lsa": {"window_size": (1, 3, 7), "num_heads": (1, 8)},
    "twins_gsa": {"sr_ratio": (1, 3, 4), "num_heads": (1, 8)},
    "twins": {"window_size": (1, 3, 7), "sr_ratio": (1, 3, 4)},
    "gc": {"fusion": ("add", "multiply", "both"), "reduction": WIDTHS},
}  # fmt: skip
"""What users were promised: block → option → values."""


def samples(check: Check) -> tuple[Any, ...]:
    """All values of a finite option, and the ends and a few in between of a range."""
    if isinstance(check, OneOf):
        return check.values
    if isinstance(check, Maybe):
        return (None, *samples(check.check))
    if isinstance(check, Int):
        return tuple(value for value in (check.min or 0, 1, 2, 4) if check.accepts(value))
    return {Bool: BOTH, Odd: (1, 3, 5), Reduction: WIDTHS}.get(type(check), ())


ELSEWHERE = {
    ("ge", "feat_size"),  # only together with extent 0: test_formulas_descriptors
    ("temporal", "frames"),  # only with whole clips: test_formulas_choosing
}
VALUES = [
    (name, option, [*samples(check), *PROMISED.get(name, {}).get(option, ())])
    for name in NAMES
    for option, check in registry.get(name).cls.options.items()
    if (name, option) not in ELSEWHERE
]
NOT_ALONE = [("ge", "extent", 0, "give feat_size")]
"""Values that need another option beside them, and what the refusal advises."""


@pytest.mark.parametrize(("name", "option", "value", "advice"), NOT_ALONE)
def test_a_value_that_needs_another_option_says_so(name, option, value, advice):
    """The refusal names the option that is missing."""
    with pytest.raises(BlockError, match=advice):
        build(name, **{option: value})


def test_promised_options_are_there():
    """Each option that the library promises is one of its block's, so the test below runs its values."""
    for name, options in PROMISED.items():
        accepted = registry.get(name).cls.options
        assert set(options) <= set(accepted), name
        assert all(accepted[option].accepts(v) for option, values in options.items() for v in values), name


@pytest.mark.parametrize(("name", "option", "values"), VALUES, ids=[f"{n}-{o}" for n, o, _ in VALUES])
def test_every_value_of_an_option_equals_its_formula_and_starts_as_the_identity(name, option, values):
    """One option changed at a time, in float64, published and identity gates; fresh, it is exactly x."""
    exact, x = noise(2, 16, 7, 6, dtype=torch.float64), noise(2, 16, 7, 6)
    for value in [v for i, v in enumerate(values) if v not in values[:i]]:
        args = {option: value}
        if (name, option, value) in [row[:3] for row in NOT_ALONE]:
            continue
        for init in ("identity", "paper"):
            block = scrambled(name, init=init, **args).double()
            expected = formula(block, name, exact, args, init == "identity")
            torch.testing.assert_close(block(exact), expected, rtol=1e-9, atol=1e-9)
        assert torch.equal(build(name, **args)(x), x)


# --- how options are declared ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("annotation", "check"),
    [
        (bool, Bool()),
        (Literal["avg", "max"], OneOf("avg", "max")),
        (Literal[3, 5, 7], OneOf(3, 5, 7)),
        (Annotated[int, Odd()], Odd()),
        (Annotated[int, "a remark", Int(min=1)], Int(min=1)),
        (Annotated[bool, "a remark"], Bool()),
        (Annotated[int, Odd()] | None, Maybe(Odd())),
        (None | Literal[1, 2], Maybe(OneOf(1, 2))),
        (Annotated[Sequence[Sequence[int]], Branches()], Branches()),
        (int, Anything()),
        (int | str, Anything()),
        (None, Anything()),
    ],
    ids=str,
)
def test_an_annotation_says_what_is_accepted(annotation, check):
    """Types, words, checks and None; of any other annotation nothing is known, so nothing is refused."""
    assert check_of(annotation) == check


def test_options_are_a_constructors_arguments_behind_the_channels():
    """`dims` and `init` are no options; `*args` and `**kwargs` are none either."""

    def constructor(self, width, dims, *args, init, a: Literal[1, 2], b: bool = True, **kwargs):
        pass

    assert declared(constructor) == {"a": OneOf(1, 2), "b": Bool()}


class Wider(SE):
    """A block of somebody else's: its own option, one narrowed, one only given another default."""

    def __init__(self, channels, *, extra: bool = False, reduction: Literal[2, 4] = 2, divisor=8, **kwargs):
        super().__init__(channels, reduction=reduction, divisor=divisor, **kwargs)
        self.extra = extra


def test_a_class_inherits_options_and_adds_its_own():
    """What the annotations of a subclass say holds; where they say nothing, the base class's check does."""
    assert Wider.options == {**SE.options, "extra": Bool(), "reduction": OneOf(2, 4)}
    block = registry.create_block(Wider, 16, extra=True, gate="tanh")
    assert (block.extra, block.fc1.out_channels, block.args["gate"]) == (True, 8, "tanh")
    with pytest.raises(BlockError, match="reduction: expected one of 2, 4, found 16"):
        registry.create_block(Wider, 16, reduction=16)
    with pytest.raises(BlockError, match="divisor: expected a whole number >= 1, found 0"):
        registry.create_block(Wider, 16, divisor=0)


def test_a_table_of_options_given_by_hand_holds():
    """A class that sets `options` itself is taken at its word, as before there were annotations to read."""

    class Strict(SE):
        options = {"reduction": OneOf(4)}  # noqa: RUF012

        def __init__(self, channels, *, dims=2, init="identity", reduction=4):
            super(SE, self).__init__(channels, dims, init, reduction=reduction)

    assert Strict.options == {"reduction": OneOf(4)}
    assert Strict(8).args == {"reduction": 4}


def test_annotations_that_cannot_be_followed_refuse_nothing():
    """A class may annotate with names that only a type checker knows; it is a block all the same."""

    class Foreign(SE):
        def __init__(self, channels: int, mode: Unheard = 1, dims: int = 2, init: str = "identity"):  # noqa: F821
            super().__init__(channels, dims=dims, init=init)

    assert Foreign.options == {**SE.options, "mode": Anything()}
    assert torch.equal(registry.create_block(Foreign, 8, mode=3)(noise(1, 8, 2, 2)), noise(1, 8, 2, 2))
