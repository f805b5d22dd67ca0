"""What a block costs, and what a model costs: parameters and multiply-accumulates."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn

from attninject.blocks import registry
from attninject.blocks.registry import BlockLike
from attninject.errors import BlockError, IdentityError, TooFewChannelsError
from attninject.layout import Layout
from attninject.observe.example_inputs import Inputs
from attninject.observe.probe import run
from attninject.observe.record import Record
from attninject.observe.snapshot import rng_kept
from attninject.recipe.frozen import FrozenDict
from attninject.recipe.rules import Init, Rule
from attninject.surgery.injected_state import base_class, injected_blocks
from attninject.wording import name_of

from . import trial


class Cost(NamedTuple):
    """Of one block: parameters; multiply-accumulates for one sample; whether it does without the module it replaces."""

    parameters: int
    macs: int
    alone: bool = False


def injected_parameters(model: nn.Module) -> int:
    """Parameters of the blocks that are in the model already."""
    seen: dict[int, int] = {}
    for block in injected_blocks(model).values():
        seen.update({id(p): p.numel() for p in block.parameters()})
    return sum(seen.values())


class Given(NamedTuple):
    """What a block is given: the shapes (1, C, *S) of its value and, if it gets one, of a second."""

    shape: tuple[int, ...]
    other: tuple[int, ...] | None = None

    @property
    def other_channels(self) -> int | None:
        """Channels of the second value."""
        return None if self.other is None else self.other[1]


@functools.lru_cache(maxsize=1024)
def _cost(block: BlockLike, args: FrozenDict, init: Init, dims: int, given: Given) -> tuple[int, int]:
    return _tried(block, args, init, dims, given)


def _tried(block: BlockLike, args: FrozenDict, init: Init, dims: int, given: Given) -> tuple[int, int]:
    """Parameters and MACs of a block that is built and tried."""

    def build(device: str) -> nn.Module:
        with torch.device(device):
            return registry.create_block(
                block, given.shape[1], init=init, dims=dims, other_channels=given.other_channels, **args
            ).eval()

    with rng_kept():
        built, record = trial.tried(build, name_of(block), given.shape, given.other)
    return sum(p.numel() for p in built.parameters()), macs_of(record)


def site_cost(
    rule: Rule, layout: Layout, shape: tuple[int, ...], where: str, other: tuple[int, ...] | None = None
) -> Cost:
    """Parameters and MACs of a rule's block at a site, for one sample; tests the identity of a foreign class.

    Args:
        rule: names the block.
        layout: that the block sees.
        shape: of the site's tensor.
        where: how messages call the site.
        other: (B, C, *S) of the second value, as the block is given it.

    Raises:
        BlockError, TooFewChannelsError: the block cannot be built so.
        IdentityError: a foreign class changes the function, and `init` is `identity`.
    """
    with _at(where):
        second = None if other is None else (1, *other[1:])
        return Cost(*_block_cost(rule, layout.dims, Given((1, *layout.map_shape(shape)[1:]), second)))


@contextlib.contextmanager
def _at(where: str) -> Iterator[None]:
    """Errors about a block say at which site."""
    try:
        yield
    except TooFewChannelsError as error:
        raise TooFewChannelsError(f"{where}: {error}") from error
    except IdentityError as error:
        raise IdentityError(f"{where}: {error}") from error
    except BlockError as error:
        raise BlockError(f"{where}: {error}") from error


def replacement_cost(
    rule: Rule, old: nn.Module, layout: Layout, shapes: tuple[tuple[int, ...], tuple[int, ...]], where: str
) -> Cost:
    """The cost of what stands in the place of a module, which is tried on its site's shapes.

    Args:
        rule: names the block.
        old: the module.
        layout: of what it is given.
        shapes: of what it is given, and of what it makes.
        where: how messages call the site.

    Raises:
        BlockError: the block cannot be built so, or cannot take over what the module is; the message says why.
    """
    given, made = shapes
    with _at(where):
        if registry.is_form(rule.block):
            return _form_cost(rule, old, shapes)
        if given != made:
            raise BlockError(
                f"{rule.block_name} keeps its input's shape, and {type(old).__name__} makes {made} of {given}; a "
                "convolution takes a block that is one in another form, as dynamic_conv"
            )
        kept = replace(rule, init="paper" if rule.init == "paper" else "blend")
        found = _block_cost(kept, layout.dims, Given((1, *layout.map_shape(given)[1:])))
        return Cost(*found, alone=rule.init == "paper")


def _form_cost(rule: Rule, old: nn.Module, shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> Cost:
    """Of a convolution in another form, built for the one whose place it takes, and run once."""
    with rng_kept(), torch.device("meta"):
        forward = base_class(old).forward
        built = registry.create_replacement(
            rule.block, old, shapes[0][1], init=rule.init, forward=forward, **rule.args
        ).eval()
        x, y = (torch.empty((1, *shape[1:])) for shape in shapes)
        tensors = [getattr(old, name) for name in built.tensors]
        record = run(built, Inputs((x, y, *tensors)), "meta")
    out = record.calls[0].out
    if record.shape(out.value) != (1, *shapes[1][1:]):
        raise BlockError(f"{rule.block_name} makes {record.shape(out.value)} of {tuple(x.shape)}")
    parameters = sum(p.numel() for p in built.parameters())
    return Cost(parameters, macs_of(record), alone=not built.uses_result)


def _block_cost(rule: Rule, dims: int, given: Given) -> tuple[int, int]:
    spec = registry.resolve(rule.block)
    own = spec.family != "registered"
    source = (
        rule.block if own else registry.source_of(spec)
    )  # a name may be registered anew for an edited class
    kept = isinstance(source, nn.Module)  # an instance, which may change, and must not be held for ever
    failed: Exception | None = None
    try:
        found = (_tried if kept else _cost)(source, rule.args, rule.init, dims, given)
    except trial.Fails as error:
        failed = error
    if rule.init == "identity" and not own:
        (_check_foreign.__wrapped__ if kept else _check_foreign)(source, rule.args, dims, given)
    if failed is not None:
        raise BlockError(str(failed)) from failed
    return found


@functools.lru_cache(maxsize=1024)
def _check_foreign(block: BlockLike, args: FrozenDict, dims: int, given: Given) -> None:
    channels, other = given.shape[1], given.other and (2, *given.other[1:])
    with rng_kept(), torch.device("cpu"):
        built = registry.create_block(
            block, channels, init="identity", dims=dims, other_channels=given.other_channels, **args
        )
    try:
        with torch.device("cpu"):
            kept = registry.is_identity(built, channels, dims, other=other)
    except Exception as error:
        raise IdentityError(
            f"{name_of(block)} fails on a random map of {channels} channels: {type(error).__name__}: {error}"
        ) from error
    if not kept:
        raise IdentityError(
            f"{name_of(block)} changes the function at init; ask for init: blend (x + α(f(x) − x), α = 0) "
            "or init: paper (as it is)"
        )


def macs_of(record: Record) -> int:
    """Multiply-accumulates of a run for one sample: convolutions and matrix products."""
    if not record.complete or not record.input_values:
        return 0
    total = 0
    for op in record.calls[0].ops():
        shapes = [record.shape(i) for i in op.ins]
        kind = op.name.split(".")[1]
        if kind == "convolution":
            x, weight, out = shapes[0], shapes[1], record.shape(op.outs[0])
            larger = math.prod(out[2:]) > math.prod(x[2:])  # transposed: each input position is spread
            total += math.prod(x if larger else out) * math.prod(weight[1:])
        elif kind == "deform_conv2d":
            total += math.prod(record.shape(op.outs[0])) * math.prod(shapes[1][1:])
        elif kind in ("mm", "bmm"):
            total += math.prod(shapes[0]) * shapes[1][-1]
        elif kind in ("addmm", "baddbmm"):
            total += math.prod(shapes[1]) * shapes[2][-1]
        elif "scaled_dot_product" in kind:
            (*batch, n, d), keys, values = shapes[0], shapes[1][-2], shapes[2][-1]
            total += math.prod(batch) * n * keys * (d + values)
    return total // max(1, record.shape(record.input_values[0])[0])
