"""When a block computes its fast form, and when the plain definition.

Both give the same values and gradients. The fast forms are `torch.autograd.Function`s with a backward written
by hand; they move fewer bytes and keep fewer of them, at the price of Python code around each. So the plain
form runs on small tensors, where that price shows, and wherever something looks through the formula:
torch.compile, torch.export, torch.jit.trace, symbolic tracing, ONNX, torch.func, forward-mode derivatives,
tensor subclasses, devices other than CPU and CUDA, and layouts that are neither contiguous nor channels_last.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as module_hooks

from attninject.blocks.gate import tracing
from attninject.blocks.options import BACKENDS, Backend

SMALL = 2**19
"""Elements from which a fast form pays for its Python, for blocks of few operations."""
SMALLER = 2**18
"""The same for blocks of many, or with maxima, whose plain backward is slow."""
_ON_CUDA = 64
"""How many times as large a map must be on a GPU, whose passes are as much shorter. An estimate, not measured."""

_KINDS = (Tensor, nn.Parameter)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_forced: str | None = None


@contextmanager
def backend(name: str) -> Iterator[None]:
    """For the time of a `with`: all blocks `plain`, or `fast` at every size that torch lets be, or `auto`.

    For measurements and tests; it outranks the blocks' own `backend`, and holds for every thread.
    """
    global _forced
    if name not in (*BACKENDS, "fast"):
        raise ValueError(f"backend: expected one of auto, plain, fast, found {name!r}")
    before, _forced = _forced, None if name == "auto" else name
    try:
        yield
    finally:
        _forced = before


def takes_fast_form(x: Tensor, chosen: Backend, least: int) -> bool:
    """Whether x: (B, C, *S) takes the fast form of a block whose `backend` is `chosen`."""
    if torch.compiler.is_compiling() or type(x) not in _KINDS or tracing():
        return False
    if _forced is None:
        if chosen == "plain" or x.numel() < (least if x.is_cpu else least * _ON_CUDA):
            return False
    elif _forced == "plain":
        return False
    return _ordinary(x)


def _ordinary(x: Tensor) -> bool:
    return (
        x.device.type in ("cpu", "cuda")
        and x.dtype in _DTYPES
        and x.numel() > 0
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and (x.is_contiguous() or x.movedim(1, -1).is_contiguous())
    )


def untouched(*children: nn.Module) -> bool:
    """Whether nobody could tell that these modules' own `forward` is passed over.

    A fast form may compute a child's formula itself. Not so if the child has hooks, was replaced or extended
    (parametrizations and adapters change its class), or if hooks hang on all modules at once.
    """
    everywhere = (
        module_hooks._global_forward_hooks, module_hooks._global_forward_pre_hooks,
        module_hooks._global_backward_hooks, module_hooks._global_backward_pre_hooks,
    )  # fmt: skip
    return not any(everywhere) and all(_bare(child) for child in children)


def _bare(child: nn.Module) -> bool:
    kind = type(child)
    own = kind.__module__.startswith(("torch.nn.modules.", "attninject.blocks."))
    hooks = (
        child._forward_hooks, child._forward_pre_hooks, child._backward_hooks, child._backward_pre_hooks
    )  # fmt: skip
    return own and not any(hooks) and "forward" not in vars(child)
