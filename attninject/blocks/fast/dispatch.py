"""When a block computes its fast form, by torch's operations or by kernels, and when the plain definition.

All give the same values and gradients. The fast forms are `torch.autograd.Function`s with a backward written
by hand; they move fewer bytes and keep fewer of them, at the price of Python code around each. So the plain
form runs on small tensors, where that price shows, and wherever something looks through the formula:
torch.compile, torch.export, torch.jit.trace, symbolic tracing, ONNX, torch.func, forward-mode derivatives,
tensor subclasses, devices other than CPU and CUDA, and layouts that are neither contiguous nor channels_last.
On a GPU the sizes are those of `crossover.py`, and some blocks have kernels (`blocks/gpu/`) beside the lean form,
which torch's operations make up.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as module_hooks

from attninject.blocks import gpu
from attninject.blocks.gate import tracing
from attninject.blocks.options import BACKENDS, Backend

from . import crossover
from .crossover import Form

SMALL = 2**19
"""Elements from which a fast form pays for its Python, for blocks of few operations."""
SMALLER = 2**18
"""The same for blocks of many, or with maxima, whose plain backward is slow."""

_KINDS = (Tensor, nn.Parameter)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_forced: str | None = None


@contextmanager
def backend(name: str) -> Iterator[None]:
    """For the time of a `with`: all blocks `plain`, or `fast` (the lean form) or by `kernels` at every size that
    torch lets be, or `auto`. Where there are no kernels, the lean form stands for them.

    For measurements and tests; it outranks the blocks' own `backend`, and holds for every thread.
    """
    global _forced
    if name not in (*BACKENDS, "fast", "kernels"):
        raise ValueError(f"backend: expected one of auto, plain, fast, kernels, found {name!r}")
    before, _forced = _forced, None if name == "auto" else name
    try:
        yield
    finally:
        _forced = before


class Formed(Protocol):
    """What is asked of a block; see `attninject.blocks.base.Block`."""

    backend: Backend
    fast_from: ClassVar[int | None]

    def fast_applies(self, x: Tensor) -> bool:
        """Whether there is a fast form for these options and this x."""
        ...


def form(x: Tensor, block: Formed) -> Form:
    """Which form of a block x: (B, C, *S) takes."""
    least = block.fast_from
    if least is None or torch.compiler.is_compiling() or type(x) not in _KINDS or tracing():
        return "plain"
    small = block.backend == "plain" or x.numel() < least
    if _forced == "plain" or (_forced is None and small) or not _ordinary(x) or not block.fast_applies(x):
        return "plain"
    found: Form = "lean"
    if _forced == "kernels":
        found = "kernels"
    elif _forced is None and not x.is_cpu:
        found = crossover.form(x, type(block), least)
    return "lean" if found == "kernels" and not gpu.serves(x) else found


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
