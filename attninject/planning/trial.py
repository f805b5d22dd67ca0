"""A block tried at plan time on the shape that it will meet: what would fail in the first forward is refused here."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from attninject.blocks.gate import Blend
from attninject.errors import AttnInjectError, BlockError
from attninject.observe.example_inputs import Inputs, first_float
from attninject.observe.probe import run
from attninject.observe.record import Record, Ref


class Fails(Exception):
    """The block's forward raises on the shape that it will meet; `cost` decides what that is called."""


def tried(
    build: Callable[[str], nn.Module], name: str, shape: tuple[int, ...], other: tuple[int, ...] | None = None
) -> tuple[nn.Module, Record]:
    """A block that is built and run once, on meta tensors where it can, else for real; on one sample, or one clip.

    Args:
        build: makes the block, in eval mode, on the device of a name.
        name: what messages call it.
        shape: (1, C, *S) of what it is given.
        other: that of a second value; None: it is given one.

    Raises:
        BlockError: it cannot be built, wants more than a tensor, or gives none of its input's shape and dtype.
        Fails: its forward raises.
    """
    try:
        block = build("meta")
        shape = (getattr(_inner(block), "samples", 1), *shape[1:])  # frames of a clip
        record = run(_inner(block), _inputs(block, shape, other), "meta")
    except AttnInjectError:
        raise
    except Exception:  # a foreign class may not know the meta device, or look at values
        block = _built(build, name, shape[1])
        record = _really_run(_inner(block), name, shape, other)
    _check_result(record, name, shape, first_float(block, torch.empty(0)).dtype)
    return block, record


def _inputs(block: nn.Module, *shapes: tuple[int, ...] | None) -> Inputs:
    dtype = first_float(block, torch.empty(0)).dtype
    return Inputs(tuple(torch.empty(s, dtype=dtype, device="meta") for s in shapes if s is not None))


def _built(build: Callable[[str], nn.Module], name: str, channels: int) -> nn.Module:
    try:
        return build("cpu")
    except AttnInjectError:
        raise
    except Exception as error:
        raise BlockError(f"{name} cannot be built for {channels} channels: {_said(error)}") from error


def _really_run(block: nn.Module, name: str, shape: tuple[int, ...], other: tuple[int, ...] | None) -> Record:
    """Raises `Fails` with what the forward raised, `BlockError` where it does not take so many tensors."""
    try:
        return run(block, _inputs(block, shape, other), "real")
    except Exception as error:
        forward: Any = block.forward
        if not _takes(forward, 1 if other is None else 2):
            given = "one tensor" if other is None else "two tensors"
            raise BlockError(
                f"{name} takes {inspect.signature(forward)}; a block is called with {given}"
            ) from error
        raise Fails(f"{name} fails on a tensor {shape}: {_said(error)}") from error


def _takes(forward: Callable[..., Any], count: int) -> bool:
    try:
        inspect.signature(forward).bind(*[None] * count)
    except (TypeError, ValueError):
        return False
    return True


def _check_result(record: Record, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    out = record.calls[0].out
    if not isinstance(out, Ref):
        found = "nothing" if out is None else f"a {type(out).__name__}"
        raise BlockError(f"{name} gives {found}; a block gives one tensor of its input's shape")
    made = record.values[out.value]
    if made.shape != shape:
        raise BlockError(f"{name} gives {made.shape} for {shape}; a block keeps the shape of its input")
    if made.dtype != dtype:
        raise BlockError(f"{name} gives {made.dtype} for {dtype}; a block keeps the dtype of its input")


def _inner(block: nn.Module) -> nn.Module:
    """What a blend would hide: a result that merely broadcasts to the input's shape."""
    return block.block if isinstance(block, Blend) else block


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
