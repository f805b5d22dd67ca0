"""Every option of every block: those promised exist, and each value does what the paper's formula says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from block_cases import NAMES, build, noise, scrambled
from test_block_formulas import formula

from attninject.blocks import registry
from attninject.blocks.options import Bool, Check, Int, Maybe, Odd, OneOf, Reduction
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
        return (check.min or 0, 1, 2, 4)
    return {Bool: BOTH, Odd: (1, 3, 5), Reduction: WIDTHS}.get(type(check), ())


VALUES = [
    (name, option, [*samples(check), *PROMISED.get(name, {}).get(option, ())])
    for name in NAMES
    for option, check in registry.get(name).cls.options.items()
    if (name, option) != ("ge", "feat_size")  # only together with extent 0: test_formulas_descriptors
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
