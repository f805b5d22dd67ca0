"""timm's attention modules as blocks: `timm/<name>` for each entry of its factory that keeps the shape.

The table is static, so that names and options can be listed and checked without timm; timm is imported when
the first of its modules is built. A test holds the table against the installed timm's factory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from attninject.errors import BlockError

from .base import BlockSpec
from .gate import GATES, Blend
from .options import Bool, Check, Int, Number, Odd, OneOf, Options, Positive

PREFIX = "timm/"


@dataclass(frozen=True)
class TimmSpec(BlockSpec):
    """A row of timm's. `cls` is the base class: timm's own is not known before timm is imported.

    `options` are the keyword arguments that keep the shape; `zeros` the layers that timm starts at zero.
    """

    options: Options = field(default_factory=dict)
    zeros: tuple[str, ...] = ()

    def build(self, channels: int, init: str, args: Mapping[str, Any]) -> nn.Module:
        """timm's module as it is under `paper`, else inside `Blend`: x + α(f(x) − x), α = 0.

        Behind α = 0 a layer at zero would leave both without a gradient for ever, so those start as torch
        starts them.
        """
        module = _made(self.name, channels, args)
        if init == "paper":
            return module
        for name in self.zeros:
            module.get_submodule(name).reset_parameters()  # type: ignore[operator]
        return Blend(module)


def _made(name: str, channels: int, args: Mapping[str, Any]) -> nn.Module:
    import timm
    from timm.layers import get_attn

    entry = name.removeprefix(PREFIX)
    try:
        made: nn.Module = get_attn(entry)(channels, **args)
    except Exception as error:  # whatever timm raises, an assertion without a word included
        given = "".join(f", {k}={v!r}" for k, v in args.items())
        raise BlockError(
            f"block {name!r}: timm {timm.__version__} does not build its {entry!r} for {channels} channels"
            f"{given}: {type(error).__name__}{f': {error}' if str(error) else ''}"
        ) from error
    return made


REFUSED = {
    "timm/ge": "timm's GatherExcite raises a TypeError when it is built (as of 1.0.31); use `ge`",
    "timm/bottleneck": "it is built for one size of map (`feat_size`) and fails at every other",
    "timm/halo": "it takes only maps whose sides are multiples of its block size, 8",
    "timm/bat": "it takes only maps whose sides are multiples of its block size, 7",
}
"""Entries of timm's factory that cannot be blocks, and why."""

_WIDTH: dict[str, Check] = {
    "rd_ratio": Positive(),
    "rd_channels": Int(min=1),
    "rd_divisor": Int(min=1),
}
_GATE: dict[str, Check] = {"gate_layer": OneOf(*GATES)}
_ECA: dict[str, Check] = {"gamma": Positive(), "beta": Number(min=0), **_GATE}
_CONTEXT: dict[str, Check] = {"use_attn": Bool(), **_WIDTH, **_GATE}
_CBAM: dict[str, Check] = {**_WIDTH, "spatial_kernel_size": OneOf(3, 5, 7), "mlp_bias": Bool(), **_GATE}
_SKIP: dict[str, Check] = {"bias": Bool(), "has_skip": Bool(), **_GATE}
_COORD: dict[str, Check] = {**_WIDTH, "se_factor": Positive(), **_SKIP}
_CONV: dict[str, Check] = {"dilation": Int(min=1), "groups": Int(min=1), **_WIDTH}

_ROWS: tuple[tuple[str, str, str, Options], ...] = (
    (
        "se", "arXiv:1709.01507", "squeeze-and-excitation",
        {**_WIDTH, "add_maxpool": Bool(), "bias": Bool(), **_GATE},
    ),
    ("ese", "arXiv:1911.06667", "effective squeeze-and-excitation", {"add_maxpool": Bool(), **_GATE}),
    ("eca", "arXiv:1910.03151", "efficient channel attention", _ECA),
    ("ecam", "arXiv:1910.03151", "efficient channel attention with an MLP", {**_ECA, **_WIDTH}),
    ("ceca", "arXiv:1910.03151", "efficient channel attention, circular", _ECA),
    ("gc", "arXiv:1904.11492", "global context, multiplied", _CONTEXT),
    ("gca", "arXiv:1904.11492", "global context, added", _CONTEXT),
    ("cbam", "arXiv:1807.06521", "convolutional block attention", _CBAM),
    ("lcbam", "arXiv:1807.06521", "convolutional block attention, light", _CBAM),
    ("coord", "arXiv:2103.02907", "coordinate attention", _COORD),
    ("scoord", "arXiv:2103.02907", "coordinate attention, simple", _COORD),
    ("ela", "arXiv:2403.01123", "efficient local attention", {"kernel_size": Odd(), **_SKIP}),
    (
        "strip", "arXiv:2003.13328", "strip attention",
        {"use_conv": Bool(), "kernel_size": Odd(), **_SKIP},
    ),
    (
        "sk", "arXiv:1903.06586", "selective kernel, the channels split over its paths",
        {**_CONV, "keep_3x3": Bool(), "split_input": Bool()},
    ),
    (
        "splat", "arXiv:2004.08955", "split attention",
        {**_CONV, "kernel_size": Odd(), "bias": Bool(), "radix": Int(min=1)},
    ),
    (
        "lambda", "arXiv:2102.08602", "lambda layer",
        {
            "num_heads": Int(min=1), "dim_head": Int(min=1), "r": Odd(),
            "qk_ratio": Positive(), "qkv_bias": Bool(),
        },
    ),
    ("nl", "arXiv:1711.07971", "non-local attention", {"use_scale": Bool(), **_WIDTH}),
)  # fmt: skip

_ZEROS = {"nl": ("norm",), "gca": ("mlp_add.fc2",)}

BLOCKS = tuple(
    TimmSpec(
        name=PREFIX + name,
        cls=nn.Module,
        family="timm",
        dims=(2,),
        spatial=True,
        paper=paper,
        equation="",
        summary=f"timm's {summary}",
        options=options,
        zeros=_ZEROS.get(name, ()),
    )
    for name, paper, summary, options in _ROWS
)
