"""What the fast forms compute on a GPU where torch's own operations would read the map more often: Triton kernels.

Tensors in, tensors out, no autograd and no choice: `blocks/fast/` differentiates, `fast/dispatch.py` chooses.
`maps` and `strips` launch the kernels of `map_kernels` and `strip_kernels`; only these four import Triton, and nobody
imports them before the kernels are wanted. Nobody has run them on a card yet: they are developed and tested in
Triton's interpreter, and no card uses them before a measurement on it has shown that they win there.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attninject.wording import first_line

if TYPE_CHECKING:
    from . import maps as maps
    from . import strips as strips

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
VARIABLE = "TRITON_INTERPRET"
_tried: dict[int, str | None] = {}
_local = threading.local()


def __getattr__(name: str) -> Any:
    """`maps` and `strips`, which import Triton, when one of them is first asked for."""
    if name in ("maps", "strips"):
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@contextmanager
def kernels(wanted: bool) -> Iterator[None]:
    """For the time of a `with`, in this thread: whether the fast forms take their kernels."""
    before, _local.wanted = by_kernels(), wanted
    try:
        yield
    finally:
        _local.wanted = before


def by_kernels() -> bool:
    """Whether the fast forms take their kernels now."""
    return getattr(_local, "wanted", False)


def serves(x: Tensor) -> bool:
    """Whether the kernels take the map x: (B, C, *S), contiguous or channels_last and of one element at least."""
    small = x.numel() // x.shape[0] < 2**31  # offsets within a sample are 32 bits wide
    return x.dtype in DTYPES and small and (interpreted() if x.is_cpu else trouble(x.device) is None)


@functools.cache
def interpreted() -> bool:
    """Whether Triton runs in its interpreter, on a CPU: TRITON_INTERPRET=1, set before anything imports Triton."""
    return os.environ.get(VARIABLE) == "1" and find_spec("triton") is not None


def interpret() -> bool:
    """From now on Triton runs in its interpreter, on a CPU; False where it is loaded for cards already, or missing."""
    if "triton" in sys.modules or find_spec("triton") is None:
        return interpreted()
    os.environ[VARIABLE] = "1"  # for good: parts of Triton are loaded later, and read it then
    interpreted.cache_clear()
    return interpreted()


def trouble(device: torch.device) -> str | None:
    """Why the kernels do not run on a CUDA device, in a line; None: they do. Tried once in a process.

    Triton may be missing, or its compiler; the driver may be too old. While a CUDA graph is captured nothing is tried.
    """
    if find_spec("triton") is None:
        return "triton is not installed"
    index = torch.cuda.current_device() if device.index is None else device.index
    if index not in _tried:
        if torch.cuda.is_current_stream_capturing():
            return "not tried while a CUDA graph is captured"
        _tried[index] = _tried_on(torch.device("cuda", index))
    return _tried[index]


def _tried_on(device: torch.device) -> str | None:
    """What went wrong in a mean and a maximum."""
    try:
        from . import maps

        mean, top, _ = maps.pooled(torch.arange(6.0, device=device).view(1, 2, 3), True, True)
        right = mean.flatten().tolist() == [1, 4] and top.flatten().tolist() == [2, 5]
        return None if right else "a mean and a maximum came out wrong"
    except Exception as error:  # a compiler, a driver, a card: whatever it is, torch's own operations serve
        return f"{type(error).__name__}: {first_line(error)}"
