"""Short answers on the meta device, where only the shape of a result counts.

torch's own answers for some operations are written in Python, and its recurrent layers go step by step.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from attninject.terms import ProbeMode

from .snapshot import undoing


def meta_like(tensor: Tensor) -> Tensor:
    """An empty tensor on the meta device with the same shape, strides and dtype."""
    return torch.empty_strided(tuple(tensor.shape), tensor.stride(), dtype=tensor.dtype, device="meta")


def execute(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an ATen operation as recordings do: on the meta device some only say their result's shape.

    torch's own answers for these are written in Python, and take most of a probe's time.
    """
    shaped = _SHAPED.get(func)
    if shaped is not None and all(type(a) in _PLAIN and a.is_meta for a in args[:1]):
        out = shaped(*args, **kwargs)
        if out is not None:
            return out
    return func(*args, **kwargs)


_PLAIN = (Tensor, nn.Parameter)


def _eval_norm(x: Tensor, *rest: Any) -> Any:
    return (
        (torch.empty_like(x), x.new_empty(0), x.new_empty(0)) if len(rest) > 4 and rest[4] is False else None
    )


def _layer_norm(x: Tensor, normalized: Any, weight: Any, bias: Any, eps: float) -> Any:
    if any(isinstance(p, Tensor) and p.dtype != x.dtype for p in (weight, bias)):
        return None
    kept = x.ndim - len(normalized)
    stats = [x.new_empty((*x.shape[:kept], *(1,) * len(normalized))) for _ in range(2)]
    return torch.empty_like(x, memory_format=torch.contiguous_format), *stats


def _upsampled(x: Tensor, size: Any, *rest: Any, **options: Any) -> Any:
    last = x.stride(1) == 1 and x.shape[1] > 1
    shape = (*x.shape[:2], *size)
    return x.new_empty(shape).to(memory_format=torch.channels_last) if last else x.new_empty(shape)


def _sampled(x: Tensor, grid: Tensor, *options: Any) -> Any:
    fits = x.ndim == grid.ndim == 4 and grid.shape[-1] == 2 and x.shape[0] == grid.shape[0]
    return x.new_empty((*x.shape[:2], *grid.shape[1:3])) if fits and x.dtype == grid.dtype else None


def _addmm(bias: Tensor, a: Tensor, b: Tensor, **options: Any) -> Any:
    same = bias.dtype == a.dtype == b.dtype and a.shape[1] == b.shape[0] and bias.shape[-1] in (1, b.shape[1])
    return a.new_empty((a.shape[0], b.shape[1])) if same and bias.ndim == 1 else None


def _one_by_one(x: Tensor, *rest: Any, **options: Any) -> Any:
    real = not any(isinstance(a, complex) for a in rest)
    return torch.empty_like(x) if real and x.is_floating_point() else None


def _two(x: Tensor, y: Any, **options: Any) -> Any:
    if not isinstance(y, Tensor):
        return _one_by_one(x, y)
    if not y.is_meta or x.dtype != y.dtype:
        return None
    if x.shape == y.shape:
        return torch.empty_like(x) if x.stride() == y.stride() else None
    fits = all(b in (1, a) for a, b in zip(reversed(x.shape), reversed(y.shape), strict=False))
    return torch.empty_like(x) if fits and y.ndim <= x.ndim and x.is_contiguous() else None


def _clamped(x: Tensor, *limits: Any) -> Any:
    narrow = all(t is None or (t.ndim == 0 and t.dtype == x.dtype) for t in limits)
    return torch.empty_like(x) if narrow and x.is_floating_point() else None


def _softmax(x: Tensor, dim: int, *rest: Any) -> Any:
    plain = x.is_floating_point() and (not rest or rest[0] in (None, False))
    return torch.empty_like(x, memory_format=torch.contiguous_format) if plain else None


_aten = torch.ops.aten
_SHAPED: dict[Any, Callable[..., Any]] = {
    _aten.native_batch_norm.default: _eval_norm,
    _aten.native_layer_norm.default: _layer_norm,
    _aten.upsample_bilinear2d.default: _upsampled,
    _aten.upsample_bicubic2d.default: _upsampled,
    _aten.grid_sampler_2d.default: _sampled,
    _aten.addmm.default: _addmm,
    _aten.add.Tensor: _two,
    _aten.mul.Tensor: _two,
    _aten.mul.Scalar: _one_by_one,
    _aten.pow.Tensor_Scalar: _one_by_one,
    _aten.clamp.Tensor: _clamped,
    _aten._softmax.default: _softmax,
    _aten._safe_softmax.default: _softmax,
    **{
        getattr(_aten, name).default: _one_by_one
        for name in ("gelu", "relu", "silu", "sigmoid", "hardswish", "hardsigmoid", "tanh", "rsqrt")
    },
}


@contextlib.contextmanager
def short_recurrences(mode: ProbeMode) -> Iterator[None]:
    """On the meta device, let an LSTM, GRU or RNN be its matrix products: step by step it takes thousands of calls."""
    if mode != "meta":
        yield
        return
    names = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
    saved = {name: getattr(torch._VF, name) for name in names}

    def put_back() -> None:
        for name in names:
            vars(torch._VF).pop(name, None)

    with undoing(put_back):
        for name, gates in names.items():
            setattr(torch._VF, name, functools.partial(_recurrence, saved[name], gates))
        yield


def _recurrence(
    original: Callable[..., Any], gates: int, x: Tensor, hidden: Any, weights: Any, *rest: Any
) -> Any:
    """What a recurrent layer gives, for (input, hidden, flat weights, bias, layers, dropout, train, both ways, …)."""
    if not isinstance(weights, (list, tuple)) or not x.is_meta or any(w.ndim > 2 for w in weights):
        return original(x, hidden, weights, *rest)  # a packed sequence
    bias, layers, _, _, both = rest[:5]
    size = weights[1].shape[1]
    per = (4 if bias else 2) if len(weights) == layers * (1 + both) * (4 if bias else 2) else 0
    if not per:
        return original(x, hidden, weights, *rest)  # projections
    for layer in range(layers):
        ways = []
        for way in range(1 + both):
            at = (layer * (1 + both) + way) * per
            entered = nn.functional.linear(x, weights[at])
            ways.append(nn.functional.linear(entered[..., :size], weights[at + 1])[..., :size])
        x = torch.cat(ways, -1) if both else ways[0]
    last = hidden[0] if gates == 4 else hidden
    return (x, last, hidden[1]) if gates == 4 else (x, last)
