"""Regional compilation: `torch.compile` for the injected blocks alone.

torch keeps what it compiled per *code object*, and gives up on one after eight variants. All modules share the
code of `nn.Module.__call__`, so that blocks of five widths, in train and eval mode, already exceed the limit,
and the rest runs uncompiled. Here each kind of block gets code of its own: blocks of equal class, tensors and
site share what is compiled, and train and eval mode and the two memory formats count apart, so that a limit
is left to what users vary: the size of the input, its dtype, whether a gradient is wanted.
"""

from __future__ import annotations

import itertools
import types
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from attninject import api
from attninject.surgery import injected_state

IMPL = "_compiled_call_impl"  # where `nn.Module.compile` hangs its result; torch leaves it out of copies
_serial = itertools.count()


def compile_blocks(model: nn.Module, **options: Any) -> nn.Module:
    """Compile the injected blocks, each kind once; the rest of the model stays as it is. Returns the model.

    Structure, keys and classes stay. As with `nn.Module.compile`, copies and files hold the blocks uncompiled.
    Compilation itself happens as the blocks run. Inside a compiled whole, and while a model is exported or
    traced, the blocks are as they were. A compiled block has no double backward.

    Args:
        model: see `inject`; looks through DDP and torch.compile wrappers. A clean one is returned as it is.
        **options: those of `torch.compile`: `mode="max-autotune-no-cudagraphs"`, `dynamic=True`, …;
            `disable=True` takes an earlier compilation back.
    """
    regions: dict[Any, _Region] = {}
    for block in api.injected(model).values():
        block.__dict__.pop(IMPL, None)
        if not options.get("disable"):
            kind = _kind(block)
            if kind not in regions:
                regions[kind] = _Region(options)
            block.__dict__[IMPL] = _caller(block, regions[kind])
    return model


def _kind(block: nn.Module) -> Any:
    """Equal for blocks that can share compiled code. A coarse answer costs a recompilation, no result."""
    tensors = itertools.chain(block.named_parameters(), block.named_buffers())
    site = block.__dict__.get(injected_state.SITE)
    site = site[0] if isinstance(site, tuple) else site  # of those that a block serves
    size = None if site is None or site.shape is None else tuple(site.shape[1:])
    return type(block), block.extra_repr(), size, tuple((n, t.shape, t.dtype) for n, t in tensors)


class _Region:
    """What one kind of block is compiled to: a function with code of its own for each mode and format."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options
        self.compiled: dict[tuple[bool, bool], Callable[..., Any]] = {}

    def function(self, training: bool, channels_last: bool) -> Callable[..., Any]:
        """Compiled when it is first called."""
        key = training, channels_last
        if key not in self.compiled:
            self.compiled[key] = torch.compile(_fresh(_call), **self.options)
        return self.compiled[key]


def _call(block: Any, *args: Any, **kwargs: Any) -> Any:
    return block._call_impl(*args, **kwargs)


def _fresh(function: Any) -> types.FunctionType:
    """The same function with a code object of its own, and a name of its own: torch remembers sizes by name."""
    name = f"compiled_block_{next(_serial)}"
    return types.FunctionType(function.__code__.replace(co_name=name), function.__globals__, name)


def _caller(block: nn.Module, region: _Region) -> Callable[..., Any]:
    """What `block(…)` runs from now on."""

    def call(*args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else None
        if not isinstance(x, Tensor) or torch.compiler.is_compiling() or cast(Any, torch.jit).is_tracing():
            return _call(block, *args, **kwargs)
        channels_last = x.ndim > 2 and x.stride(1) == 1
        return region.function(block.training, channels_last)(block, *args, **kwargs)

    return call
