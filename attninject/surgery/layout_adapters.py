"""How a generated forward calls a block: any layout becomes the one that the block wants, and back."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from attninject.blocks.symbolic import stay_float
from attninject.errors import LayoutError
from attninject.layout import RANK, VECTOR

_NESTED = (
    "a block was given a nested tensor, whose samples have lengths of their own; where it comes from "
    "nn.TransformerEncoder with a padding mask, build that with enable_nested_tensor=False"
)


def run_block(
    block: nn.Module, x: Any, kind: str = "NCHW", prefix: int = 0, grid: tuple[int, ...] | None = None
) -> Any:
    """Call a block on a value of any layout; generated forwards and extended carriers call this.

    Args:
        block: takes and gives (B, C, …).
        x: the site's tensor, in the layout that the other arguments describe; see `Layout`.

    Returns:
        A tensor of x's shape; x itself while the block is disabled.

    Raises:
        LayoutError: the grid of the tokens of another input size cannot be told.
    """
    if getattr(block, "_attninject_disabled", False):  # as `passed_by`, without a call more
        return x
    if not isinstance(x, fx.Proxy) and getattr(x, "is_nested", False):
        raise LayoutError(_NESTED)
    if grid is None and kind in _AS_BLOCKS_WANT:
        return (_Leaf(block) if isinstance(x, fx.Proxy) else block)(x)
    return _adapted(block, (x,), (), kind, prefix, grid)


def run_masked(block: nn.Module, x: Any, mask: Any, *layout: Any) -> Any:
    """Call a block on tokens of which some are padding; the generated forwards of torch's encoder layers call this.

    The block is given zeros in the place of padding, and the padding passes it by. So it computes the same
    whether the encoder keeps the padding, as while training, or leaves it out of a nested tensor, as in eval mode
    without gradients.

    Args:
        block: takes and gives (B, C, …).
        x: (B, L, C), or a nested tensor of B samples of at most L tokens.
        mask: (B, L), not zero where a token is padding; None: nowhere, or x is nested.
        layout: of x: `kind`, `prefix` and `grid` of `run_block`.

    Returns:
        What x is, of the same shape; x itself while the block is disabled.
    """
    if passed_by(block):
        return x
    if not x.is_nested:
        return shown(run_block(block, hidden(x, mask), *layout), x, mask)
    samples = x.unbind()
    extent = block.__dict__.get(LENGTH)
    length = max(map(len, samples)) if extent is None or not extent.positions else extent.positions[0]
    padded = torch.nested.to_padded_tensor(x, 0.0, (len(samples), length, samples[0].shape[1]))
    made = run_block(block, padded, *layout)
    return torch.nested.as_nested_tensor([y[: len(s)] for y, s in zip(made, samples, strict=True)])


def hidden(x: Tensor, mask: Tensor | None) -> Tensor:
    """(B, L, C) tokens with zeros where they are padding."""
    assert not x.is_nested, "a nested tensor: build nn.TransformerEncoder with enable_nested_tensor=False"
    return x if mask is None else x.masked_fill((mask != 0).unsqueeze(-1), 0.0)


def shown(y: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
    """What a block made of tokens, and x itself where they are padding."""
    return y if mask is None else torch.where((mask != 0).unsqueeze(-1), x, y)


def run_replacement(
    block: Any,
    x: Any,
    y: Any,
    module: nn.Module,
    kind: str = "NCHW",
    prefix: int = 0,
    grid: tuple[int, ...] | None = None,
) -> Any:
    """Call what stands in the place of a module; generated forwards call this behind the module's own.

    Args:
        block: a `Replacement`: takes what the module takes and gives, and those of its tensors that it names.
        x: what the module is given, in the layout that the other arguments describe; see `Layout`.
        y: what it makes of x, in the same layout; None where its own forward did not run.
        module: it.

    Returns:
        A tensor of y's shape; y itself while the block is disabled.
    """
    if passed_by(block):
        return y
    tensors = [getattr(module, name) for name in block.tensors]
    if grid is None and kind in _AS_BLOCKS_WANT:
        return _in_strides_of(y, (_Leaf(block) if isinstance(x, fx.Proxy) else block)(x, y, *tensors))
    return _in_strides_of(y, _adapted(block, (x, y), tensors, kind, prefix, grid))


def _in_strides_of(y: Any, made: Any) -> Any:
    """What is made of y, in y's strides: of a map of one position torch chooses those of a sum anew, and what reads it
    chooses its kernel, and so its rounding, by them.
    """
    if not (isinstance(y, Tensor) and isinstance(made, Tensor)) or torch.compiler.is_compiling():
        return made
    if (
        (made.shape, made.dtype) != (y.shape, y.dtype)
        or made.stride() == y.stride()
        or torch.jit.is_tracing()
    ):
        return made
    return torch.empty_like(y).copy_(made)


def run_pair(block: Any, x: Any, other: Any, here: tuple[Any, ...] = (), there: tuple[Any, ...] = ()) -> Any:
    """Call a block of two inputs; generated forwards call this where both values are.

    Args:
        block: takes (B, C, …) and (B, C_other, …), gives the first shape.
        x: the site's tensor.
        other: the second one; nothing becomes of it here.
        here: the layout of x: `kind`, `prefix` and `grid` of `run_block`, as many as differ from their defaults.
        there: that of the second value, and whether its tokens are of the map that the block is told the size of.

    Returns:
        A tensor of x's shape; x itself while the block is disabled.

    Raises:
        LayoutError: the second value is missing in this run, or one of both is no batch of the other's samples.
    """
    if passed_by(block):
        return x
    _check_pair(x, other)
    kind, prefix, grid = _in_full(*here)
    second = _as_block_wants(other, getattr(block, EXTENT, None), *there)
    if grid is None and kind in _AS_BLOCKS_WANT:
        return (_Leaf(block) if isinstance(x, fx.Proxy) else block)(x, second)
    return _adapted(block, (x,), (second,), kind, prefix, grid)


def _check_pair(x: Any, other: Any) -> None:
    """Refuse what would be broadcast, or taken for a block's own input, without a word."""
    if isinstance(x, fx.Proxy) or isinstance(other, fx.Proxy) or torch.jit.is_tracing():
        return
    if x is None or other is None:
        raise LayoutError(
            "a block of two inputs was given one value alone; there were both when it was planned"
        )
    if getattr(x, "is_nested", False) or getattr(other, "is_nested", False):
        raise LayoutError(_NESTED)
    if x.shape[0] != other.shape[0]:
        raise LayoutError(
            f"a block of two inputs was given {x.shape[0]} samples, and {other.shape[0]} of its second value"
        )


def _in_full(kind: str = "NCHW", prefix: int = 0, grid: Any = None) -> tuple[str, int, Any]:
    return kind, prefix, grid


def _as_block_wants(
    value: Any,
    extent: Extent | None,
    kind: str = "NCHW",
    prefix: int = 0,
    grid: Any = None,
    watched: bool = False,
) -> Any:
    """A second value as a block is given it: channels first, in rows and columns where there is a grid."""
    if grid is None and kind in _AS_BLOCKS_WANT:
        return value
    if kind in ("NHWC", "NDHWC"):
        return value.permute(0, RANK[kind] - 1, *range(1, RANK[kind] - 1))
    if kind == VECTOR:
        return value.unsqueeze(2)
    return _as_map(value, kind, prefix, grid, extent if watched else None)


def passed_by(block: nn.Module) -> bool:
    """Whether a block is disabled."""
    return bool(getattr(block, "_attninject_disabled", False))


_AS_BLOCKS_WANT = frozenset({"NCHW", "NCL", "NCDHW"})


def _adapted(
    block: nn.Module, values: Sequence[Any], rest: Sequence[Any], kind: str, prefix: int, grid: Any
) -> Any:
    """A block's call on values of one layout that it does not know, as maps, and its result in that layout."""
    x, last = values[0], values[0] if values[-1] is None else values[-1]
    call: Callable[..., Any] = _Leaf(block) if isinstance(x, fx.Proxy) else block
    if kind in ("NHWC", "NDHWC"):
        axis = x.ndim - 1 if isinstance(x, Tensor) else RANK[kind] - 1
        maps = (None if v is None else v.permute(0, axis, *range(1, axis)) for v in values)
        return call(*maps, *rest).permute(0, *range(2, axis + 1), 1)
    extent = getattr(block, EXTENT, None)
    y = call(*(None if v is None else _as_map(v, kind, prefix, grid, extent) for v in values), *rest)
    y = y.flatten(2) if grid else y
    y = y if kind == "NCL" else y.transpose(1, 2)
    return torch.cat((last[:, :prefix], y), dim=1) if prefix else y


def _as_map(x: Any, kind: str, prefix: int, grid: Any, extent: Extent | None) -> Any:
    """Tokens without those in front, channels first, in rows and columns where there is a grid."""
    tokens = x[:, prefix:] if prefix else x
    return _to_map(tokens if kind == "NCL" else tokens.transpose(1, 2), grid, extent)


class _Leaf:
    """A block that somebody else's torch.fx tracer is to see as one call, as it sees torch's own layers."""

    def __init__(self, block: nn.Module) -> None:
        self.block = block

    def __call__(self, x: fx.Proxy, *rest: Any) -> Any:
        tracer: Any = x.tracer
        stay_float(self.block, tracer)
        usual = tracer.is_leaf_module
        tracer.is_leaf_module = lambda m, name: m is self.block or usual(m, name)
        try:
            return self.block(x, *rest)
        finally:
            del tracer.is_leaf_module


def _to_map(sequence: Any, grid: tuple[int, ...] | None, extent: Extent | None) -> Any:
    """(B, C, H·W) → (B, C, H, W); unchanged without a grid."""
    if grid is None:
        return sequence
    if not isinstance(sequence, fx.Proxy):
        seen = None if extent is None or _side_effects_count() else extent.positions
        grid = fit_grid(sequence.shape[2], grid, seen)
    return sequence.unflatten(2, grid)


def fit_grid(count: int, grid: tuple[int, ...], seen: tuple[int, ...] | None = None) -> tuple[int, ...]:
    """The grid of `count` tokens: that of the map they were made of, else the measured one or its aspect ratio.

    Args:
        count: how many there are.
        grid: measured when the plan was made.
        seen: what the layer that made the map gave last; None where no such layer could be watched.

    Raises:
        LayoutError: none of them fits.
    """
    if seen is not None and count == math.prod(seen):
        return seen
    if count == math.prod(grid):
        return grid
    if len(grid) == 2:
        height, width = grid
        rows = round((count * height / width) ** 0.5)
        if rows and count % rows == 0 and rows * width == height * (count // rows):
            return rows, count // rows
    raise LayoutError(
        f"{count} tokens form no grid of the aspect ratio {':'.join(map(str, grid))} that the plan measured; "
        "plan again with example_inputs of this size"
    )


EXTENT = "_attninject_extent"  # attribute of a block on tokens, and of the layer that makes their map
LENGTH = (
    "_attninject_length"  # attribute of a block: the extent of an encoder around it that may pack its tokens
)


class Extent:
    """Rows and columns of the map that tokens come from, as the running forward met them.

    One object is shared by the layer that makes the map, which writes, and the blocks behind it, which read: so
    a block knows a 2 × 8 map from a 4 × 4 one. A copy begins empty, since it belongs to another network.
    """

    def __init__(self) -> None:
        self.positions: tuple[int, ...] | None = None

    def __reduce__(self) -> tuple[type[Extent], tuple[()]]:
        return Extent, ()


def note_extent(layer: nn.Module, out: Any) -> None:
    """Write down the extents of the (B, C, H, W) that a layer gives; its generated forward calls this."""
    extent = getattr(layer, EXTENT, None)
    if extent is not None and isinstance(out, Tensor) and not _side_effects_count():
        extent.positions = tuple(out.shape[2:])


def before_packing(encoder: nn.Module, src: Tensor) -> Tensor:
    """Write down how long the (B, L, C) are that an encoder of torch's is given, before it may pack them.

    None of its layers takes packed tokens that need gradients, so it packs none where its first layer does. Here
    any part that does counts, by way of what is given back: a block in a frozen encoder trains in eval mode, too.
    """
    extent = getattr(encoder, EXTENT, None)
    if extent is None or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return src
    extent.positions = None if src.is_nested else tuple(src.shape[1:2])
    trains = torch.is_grad_enabled() and any(p.requires_grad for p in encoder.parameters())
    return src.detach().requires_grad_() if trains and not src.requires_grad else src


def _side_effects_count() -> bool:
    """Under jit.trace and strict export, which complain of a write, a block takes the measured grid."""
    compiler: Any = torch.compiler  # both are partly untyped
    jit: Any = torch.jit
    strict = compiler.is_dynamo_compiling() and getattr(compiler, "is_exporting", bool)()
    return bool(jit.is_tracing() or strict)
