"""Short answers on the meta device, where only the shape of a result counts.

torch's own answers for some operations are written in Python, and its recurrent layers go step by step.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Iterator
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


_PLAIN = frozenset({Tensor, nn.Parameter})
_META = torch.device("meta")


@functools.lru_cache(maxsize=4096)
def _row_major(shape: torch.Size) -> tuple[int, ...]:
    """Strides of a tensor of this shape that is laid out row by row."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is no subclass and lies row by row, so that what is made like it does in every torch."""
    strided = type(tensor) in _PLAIN and tensor.layout is torch.strided
    return strided and tensor.stride() == _row_major(tensor.shape)


def _is_ordinary(tensor: Tensor) -> bool:
    """Whether a tensor is plain, of floating-point numbers, and not empty."""
    return tensor.is_floating_point() and _is_plain(tensor) and 0 not in tensor.shape


def _empty(x: Tensor, shape: Iterable[int]) -> Tensor:
    """What `x.new_empty` gives on the meta device, where its way there is long."""
    return torch.empty(tuple(shape), dtype=x.dtype, device=_META)


def empty_alike(x: Tensor) -> Tensor:
    """What `torch.empty_like` gives on the meta device; see `_empty`."""
    if _is_plain(x):
        return _empty(x, x.shape)
    return torch.empty_like(x.detach(), device=_META)


def _eval_norm(x: Tensor, *rest: Any) -> Any:
    return (empty_alike(x), _empty(x, (0,)), _empty(x, (0,))) if len(rest) > 4 and rest[4] is False else None


def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    added: list[int],
    groups: int,
) -> Any:
    """Only of what every kernel takes: torch says what is wrong with the rest."""
    given = (x, weight) if bias is None else (x, weight, bias)
    if transposed or x.ndim != weight.ndim or x.ndim < 3 or not all(map(_is_ordinary, given)):
        return None
    alike = all(t.dtype == x.dtype for t in given) and (bias is None or bias.shape == weight.shape[:1])
    if not alike or x.shape[1] != weight.shape[1] * groups or weight.shape[0] % groups:
        return None
    steps, pads, spread = (
        each * (x.ndim - 2) if len(each) == 1 else each for each in (stride, padding, dilation)
    )
    if min(*steps, *spread) < 1 or min(pads) < 0:
        return None
    sizes = zip(x.shape[2:], weight.shape[2:], steps, pads, spread, strict=True)
    out = [(n + 2 * pad - far * (kernel - 1) - 1) // step + 1 for n, kernel, step, pad, far in sizes]
    return _empty(x, (x.shape[0], weight.shape[0], *out)) if min(out) > 0 else None


def _mean(x: Tensor, dims: Any, keep: bool = False, **options: Any) -> Any:
    gone = {d % x.ndim for d in dims or () if -x.ndim <= d < x.ndim}
    if options or not gone or len(gone) < len(dims) or not _is_ordinary(x):
        return None
    return _empty(x, [1 if i in gone else n for i, n in enumerate(x.shape) if keep or i not in gone])


def _one_in_place(x: Tensor, *rest: Any) -> Any:
    return x if not rest and _is_ordinary(x) else None


def _two_in_place(x: Tensor, y: Any, **options: Any) -> Any:
    alike = isinstance(y, Tensor) and y.is_meta and x.dtype == y.dtype and x.shape == y.shape
    if not alike or options or not _is_ordinary(x):
        return None
    return x if x.untyped_storage()._cdata != y.untyped_storage()._cdata else None


def _layer_norm(x: Tensor, normalized: Any, weight: Any, bias: Any, eps: float) -> Any:
    if any(isinstance(p, Tensor) and p.dtype != x.dtype for p in (weight, bias)):
        return None
    kept = x.ndim - len(normalized)
    stats = [_empty(x, (*x.shape[:kept], *(1,) * len(normalized))) for _ in range(2)]
    return torch.empty_like(x, memory_format=torch.contiguous_format), *stats


def _upsampled(x: Tensor, size: Any, *rest: Any, **options: Any) -> Any:
    last = x.stride(1) == 1 and x.shape[1] > 1
    shape = (*x.shape[:2], *size)
    return _empty(x, shape).to(memory_format=torch.channels_last) if last else _empty(x, shape)


def _sampled(x: Tensor, grid: Tensor, *options: Any) -> Any:
    fits = x.ndim == grid.ndim == 4 and grid.shape[-1] == 2 and x.shape[0] == grid.shape[0]
    return _empty(x, (*x.shape[:2], *grid.shape[1:3])) if fits and x.dtype == grid.dtype else None


def _addmm(bias: Tensor, a: Tensor, b: Tensor, **options: Any) -> Any:
    same = bias.dtype == a.dtype == b.dtype and a.shape[1] == b.shape[0] and bias.shape[-1] in (1, b.shape[1])
    return _empty(a, (a.shape[0], b.shape[1])) if same and bias.ndim == 1 else None


def _one_by_one(x: Tensor, *rest: Any, **options: Any) -> Any:
    real = not any(isinstance(a, complex) for a in rest)
    return empty_alike(x) if real and x.is_floating_point() else None


def _two(x: Tensor, y: Any, **options: Any) -> Any:
    if not isinstance(y, Tensor):
        return _one_by_one(x, y)
    if not y.is_meta or x.dtype != y.dtype:
        return None
    if x.shape == y.shape:
        return empty_alike(x) if x.stride() == y.stride() else None
    fits = all(b in (1, a) for a, b in zip(reversed(x.shape), reversed(y.shape), strict=False))
    return empty_alike(x) if fits and y.ndim <= x.ndim and x.is_contiguous() else None


def _clamped(x: Tensor, *limits: Any) -> Any:
    narrow = all(t is None or (t.ndim == 0 and t.dtype == x.dtype) for t in limits)
    return empty_alike(x) if narrow and x.is_floating_point() else None


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
    _aten.convolution.default: _convolution,
    _aten.mean.dim: _mean,
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
    **{getattr(_aten, name).default: _one_in_place for name in ("relu_", "silu_", "hardswish_", "sigmoid_")},
    **{getattr(_aten, name).Tensor: _two_in_place for name in ("add_", "mul_")},
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
