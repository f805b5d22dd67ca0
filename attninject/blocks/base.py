"""The base class of the library's own blocks, and what their files share."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, fx, nn

from attninject.blocks import gpu, options, symbolic
from attninject.errors import BlockError, TooFewChannelsError

from .fast import dispatch
from .gate import blend, divided_zeros, new_alpha, scale, scale_groups, tracing
from .options import INITS, Backend, Init


@dataclass(frozen=True)
class Facts:
    """What a block's class says of itself, for lists and for planning.

    `spatial`: the geometry of positions matters, so a token sequence needs its grid; a block without it may
    run on any sequence with `dims=1`. `paper` and `equation`: where the formula is from.
    """

    name: str
    family: str
    spatial: bool
    paper: str = ""
    equation: str = ""
    summary: str = ""


class Block(nn.Module):
    """A shape-keeping attention block: `cls(channels, *, dims=2, init="identity", <options>)`.

    A subclass says what it is (`facts`), declares each option once, as an annotated keyword of its
    constructor, and defines `transform` and `attention`. The constructor begins with
    `super().__init__(**given(locals()))`, which checks the options and keeps them in `args`, builds the layers
    and ends with `self.initialise()`. `forward` is `transform`, blended with the input where `init` is `blend`
    (or where `identity` can be had no other way: `needs_blend`).

    The docstring explains the options, but for four that mean the same everywhere: `reduction` makes the
    hidden width channels / reduction, or that fraction of them, and `divisor` rounds it to a multiple
    (`hidden_width`); `gate` is the function that makes factors of logits (`gate.GATES`); `backend` is `plain`
    for the definition, `auto` for the fast form where that pays.

    `samples` says how many samples of a batch belong together, where they are frames of a clip.

    A class may add a fast form (`attninject.blocks.fast`): `fast_transform(x)` computes what `transform(x)`
    defines, and takes its place from `fast_from` elements on, unless `backend` is `plain`. A subclass that
    changes anything of the class and does not set `fast_from` anew is back at the plain form.
    """

    facts: ClassVar[Facts]
    options: ClassVar[options.Options] = {}
    supported_dims: ClassVar[tuple[int, ...]] = (1, 2, 3)
    fast_from: ClassVar[int | None] = None
    samples = 1
    __jit_unused_properties__: ClassVar[list[str]] = ["identity", "init_of_parts"]

    if TYPE_CHECKING:  # only for the reader: TorchScript takes what a class declares for its own language
        backend: Backend
        alpha: nn.Parameter | None
        __call__: Callable[..., Tensor]  # torch's own says Any

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls) and "options" not in vars(cls):
            cls.options = options.declared(cls.__init__, cls.options)
        # `forward` only chooses; FSDP's and other generated subclasses add special methods
        formula = [name for name in vars(cls) if name != "forward" and not name.startswith("__")]
        changed = [name for name in formula if callable(vars(cls)[name]) and hasattr(cls.__base__, name)]
        if "fast_from" not in vars(cls) and changed:
            cls.fast_from = None

    def __init__(self, channels: int, dims: int, init: str, **args: Any) -> None:
        self._check(channels, dims, init, args)
        super().__init__()
        self.channels, self.dims, self.args = int(channels), int(dims), dict(args)
        self.backend, self.residual = args.get("backend", "auto"), bool(args.get("residual", True))
        self.init = "blend" if init == "identity" and self.needs_blend() else init
        self.register_parameter("alpha", new_alpha() if self.init == "blend" else None)

    @classmethod
    def _check(cls, channels: int, dims: int, init: str, args: Mapping[str, Any]) -> None:
        name = cls.__name__
        found = [text for _, text in options.faults(name, cls.options, args)]
        if not options.OneOf(*cls.supported_dims).accepts(dims):
            expected = " or ".join(map(str, cls.supported_dims))
            found.append(f"block {name!r}: dims (spatial dimensions): expected {expected}, found {dims!r}")
        if not options.OneOf(*INITS).accepts(init):
            near = options.nearest(init, INITS) if isinstance(init, str) else ""
            found.append(f"block {name!r}: init: expected one of {', '.join(INITS)}, found {init!r}{near}")
        if found:
            raise BlockError("\n".join(found))
        if not options.Int(min=1).accepts(channels):
            raise TooFewChannelsError(
                f"block {name!r}: channels: expected a whole number >= 1, found {channels!r}"
            )

    def needs_blend(self) -> bool:
        """Whether, with `self.args`, neither a gate nor a zero layer can make this block the identity."""
        return False

    @property
    def identity(self) -> bool:
        """Whether gates take their identity form: not under `paper`, nor where blending does the work."""
        return self.init == "identity"

    @property
    def init_of_parts(self) -> Init:
        """The `init` of blocks inside this one: their own gates in the form of ours, and no blending."""
        return "identity" if self.identity else "paper"

    def initialise(self) -> None:
        """Set the weights that `init` asks for; the last line of a constructor."""
        {"identity": self.init_identity, "paper": self.init_paper, "blend": self.init_blend}[self.init]()

    def init_identity(self) -> None:
        """Zero the last layer or layers; the others keep torch's initialisation."""

    def init_paper(self) -> None:
        """The published initialisation, where it is not torch's."""

    def init_blend(self) -> None:
        """The published one without its zero layers: behind α = 0 they would never get a gradient in time."""
        self.init_paper()

    def transform(self, x: Tensor) -> Tensor:
        """The block's formula: x: (B, C, *S) → the same shape and dtype."""
        raise NotImplementedError

    def attention(self, x: Tensor) -> dict[str, Tensor]:
        """The gates or rows that `transform` would apply to x, before any blending; nothing is kept."""
        raise NotImplementedError

    def fast_applies(self, x: Tensor) -> bool:
        """Whether the fast form has these options, serves this x, and passes over no child with hooks."""
        return True

    def fast_transform(self, x: Tensor) -> Tensor:
        """x: (B, C, *S) → what `transform` gives, with fewer bytes moved and kept."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, *S) → the same shape and dtype."""
        if torch.jit.is_scripting():
            return self.blended(x, self.transform(x))
        if type(x) is not Tensor and isinstance(x, fx.Proxy):
            return symbolic.one_call(self, x)
        form = dispatch.form(x, self)
        if form == "plain":
            y = self.transform(x)
        else:
            with gpu.kernels(form == "kernels"):
                y = self.fast_transform(x)
        return (
            y if self.init != "blend" else self.blended(x, y)
        )  # a string is asked for sooner than a parameter

    def blended(self, x: Tensor, y: Tensor) -> Tensor:
        """x + α(y − x) where `init` is `blend`, else y."""
        return y if self.alpha is None else blend(x, y, self.alpha)

    def train(self, mode: bool = True) -> Self:
        """As every module's; says first where a norm of weights divides by the zero that makes the identity."""
        if found := self._divided_zeros():
            warnings.warn(
                f"{type(self).__name__}: the weight of {', '.join(found)} is zero, by which the block starts as the "
                "identity, and weight or spectral norm divides by it: what comes out is not finite. Take the norm "
                'off that layer, or build the block with init="blend"',
                stacklevel=2,
            )
        return super().train(mode)

    def _divided_zeros(self) -> list[str]:
        """Layers whose zero weight is divided by, but for those of blocks inside, which say so themselves."""
        if not (found := divided_zeros(self)):
            return []
        inner = tuple(f"{name}." for name, m in self.named_modules() if name and isinstance(m, Block))
        return [name for name in found if not f"{name}.".startswith(inner)]

    def extra_repr(self) -> str:
        """Channels, and whatever differs from the defaults."""
        defaults = inspect.signature(type(self)).parameters
        given = {"dims": self.dims, "init": self.init, **self.args}
        changed = {k: v for k, v in given.items() if k in defaults and defaults[k].default != v}
        return ", ".join([str(self.channels), *(f"{k}={v!r}" for k, v in changed.items())])


@dataclass(frozen=True, kw_only=True)
class BlockSpec(Facts):
    """A row of the registry: a class, its facts, and how many spatial dimensions it can work on."""

    cls: type[nn.Module]
    dims: tuple[int, ...]

    @classmethod
    def of(cls, block: type[Block]) -> BlockSpec:
        """The row of a class that has `facts`."""
        return cls(**vars(block.facts), cls=block, dims=block.supported_dims)


class GateBlock(Block):
    """A block that multiplies its input by one factor: x · factor(x)."""

    def factor(self, x: Tensor) -> Tensor:
        """x: (B, C, *S) → what multiplies it, broadcastable to x, float32 or wider."""
        raise NotImplementedError

    def transform(self, x: Tensor) -> Tensor:
        """x: (B, C, *S) → x · factor."""
        return scale(x, self.factor(x))

    def attention(self, x: Tensor) -> dict[str, Tensor]:
        """x: (B, C, *S) → `gate`: the factor, broadcastable to x."""
        return {"gate": self.factor(x).to(x.dtype)}


class GroupGateBlock(GateBlock):
    """A block with one gate for each group of neighbouring channels: its factor is (B, G, *S)."""

    def transform(self, x: Tensor) -> Tensor:
        """x: (B, C, *S) → x · its group's factor."""
        return scale_groups(x, self.factor(x))


def hidden_width(channels: int, reduction: float, divisor: int = 1) -> int:
    """Width of a bottleneck: channels / reduction (or · reduction, if a fraction), at least 1.

    With `divisor` above 1, the nearest multiple of it and at least one (timm's SE rounds so, with 8).

    >>> hidden_width(256, 16), hidden_width(3, 16), hidden_width(64, 0.25), hidden_width(64, 16, divisor=8)
    (16, 1, 16, 8)
    """
    width = channels * reduction if reduction < 1 else channels / reduction
    if divisor > 1:
        return max(divisor, int(width + divisor / 2) // divisor * divisor)
    return max(1, math.floor(width + 1e-9))  # 0.29 · 100 is 28.999999999999996


CONV: dict[int, type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d]] = {
    1: nn.Conv1d,
    2: nn.Conv2d,
    3: nn.Conv3d,
}
"""Spatial dimensions → convolution."""

BATCH_NORM: dict[int, type[nn.BatchNorm1d] | type[nn.BatchNorm2d] | type[nn.BatchNorm3d]] = {
    1: nn.BatchNorm1d,
    2: nn.BatchNorm2d,
    3: nn.BatchNorm3d,
}
"""Spatial dimensions → batch norm; call it through `gate.normalize`."""


def positions(x: Tensor) -> list[int]:
    """The axes of x: (B, C, *S) that are spatial."""
    return list(range(2, x.ndim))


def pool(x: Tensor, kind: str) -> Tensor:
    """Global `avg` or `max`: (B, C, *S) → (B, C, 1, …); reductions, which export everywhere."""
    axes = positions(x)
    return x.mean(axes, keepdim=True) if kind == "avg" else x.amax(axes, keepdim=True)


def column(z: Tensor, x: Tensor) -> Tensor:
    """z: (B, C) → (B, C, 1, …), to stand beside x: (B, C, *S)."""
    return z.reshape(list(z.shape) + [1] * (x.ndim - 2))


def count(x: Tensor) -> int:
    """How many positions x: (B, C, *S) has."""
    n = 1
    for side in static_shape(x)[2:]:
        n *= side
    return n


def static_shape(x: Tensor) -> list[int]:
    """x.shape as plain integers, also under torch.jit.trace, which fixes whatever they decide."""
    if not torch.jit.is_scripting() and tracing():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", torch.jit.TracerWarning)
            return [int(n) for n in x.shape]
    return list(x.shape)


def he_init(*layers: nn.Conv1d | nn.Conv2d | nn.Conv3d, mode: str = "fan_in") -> None:
    """Normal weights of variance 2 / fan, zero biases."""
    for layer in layers:
        nn.init.kaiming_normal_(layer.weight, mode=mode, nonlinearity="relu")  # type: ignore[arg-type]
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
