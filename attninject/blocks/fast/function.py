"""The base of the fast forms, and how two of them pass each other what one of them can use.

**The letter.** The gradient of x in y = x · f(d(x)) (d a pooled descriptor, f a small network) has two parts,
g · f and what comes back through d. Written as two separate Functions they would write a map each, and
autograd would add them: two more writes and three more reads than are needed. Written as one Function, the
small network would have to be run and differentiated inside it, out of sight of hooks, adapters, DDP and
FSDP. So there are two Functions, with the network between them as ordinary modules, and the first hands the
second some *conduits*: tensors of one element, expanded to a shape, that hold no values. In the backward the
second returns for a conduit not a derivative but a letter to the first, such as g itself or the factor f,
from which the first forms the gradient of x in one pass. Nothing but these two Functions ever sees a conduit.
Autograd delivers the letters in the right order, frees them, and keeps several backward passes apart.

**Double backward.** Where somebody may differentiate the backward (`create_graph=True`), or runs it under
torch.func, no letters are written: each Function differentiates its plain formula by autograd.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attninject.blocks.precision import full_precision


def conduit(x: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of that shape without values, which carries a letter back."""
    return x.new_zeros((), dtype=dtype).expand(shape)


def _batched(g: Tensor | None) -> bool:
    """Whether several gradients run through the backward at once: under torch.func, or `is_grads_batched`."""
    inside = torch._C._are_functorch_transforms_active()
    return g is not None and (inside or torch._C._functorch.is_legacy_batchedtensor(g))


class FastFunction(torch.autograd.Function):
    """A formula with a backward of its own.

    A subclass defines `forward` and `setup_context`, which ends with `cls.keep(ctx, …)`; `plain`, the same
    formula in differentiable operations, of the tensors kept, with None for each conduit among its results;
    and `gradient`, the backward. The tensors kept are the first arguments of `forward`, in order, None for one
    whose gradient needs nothing of it.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        forward: Any = cls.forward
        forward.__signature__ = inspect.signature(forward)  # torch asks for it at every call: 50 µs without

    @staticmethod
    def keep(ctx: Any, *inputs: Tensor | None, extra: Sequence[Tensor] = ()) -> None:
        """Save the formula's inputs, and results that `gradient` wants beside them."""
        ctx.set_materialize_grads(False)
        ctx.inputs = len(inputs)
        ctx.save_for_backward(*inputs, *extra)

    @staticmethod
    def plain(ctx: Any, *inputs: Any) -> tuple[Tensor | None, ...]:
        """The formula, by differentiable operations of torch's."""
        raise NotImplementedError

    @staticmethod
    def gradient(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """The backward: gradients (and letters) of the results → those of the arguments."""
        raise NotImplementedError

    @classmethod
    def backward(cls, ctx: Any, *grads: Tensor | None) -> Any:
        """Autograd's entry: one of the two ways."""
        if all(g is None for g in grads):
            return (None,) * len(ctx.needs_input_grad)
        if torch.is_grad_enabled() or any(_batched(g) for g in grads):
            return cls.differentiate(ctx, grads)
        with full_precision(next(g for g in grads if g is not None)):
            return cls.gradient(ctx, *grads)

    @classmethod
    def differentiate(cls, ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        """The gradients by autograd, themselves differentiable where asked for; no letters."""
        inputs = ctx.saved_tensors[: ctx.inputs]
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad(), full_precision(inputs[0]):
            # views, because one input may have been computed from another: they end the paths between them
            views: list[Any] = [None if t is None else t.view_as(t) for t in inputs]
            results = zip(cls.plain(ctx, *views), grads, strict=True)
            reached = [(y, g) for y, g in results if y is not None and g is not None]
            pairs = zip(views, ctx.needs_input_grad, strict=False)
            wanted = [i for i, (v, needed) in enumerate(pairs) if needed and v is not None]
            found: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
            if reached and wanted:
                gradients = torch.autograd.grad(
                    [y for y, _ in reached],
                    [views[i] for i in wanted],
                    [g for _, g in reached],
                    create_graph=create_graph,
                    allow_unused=True,
                )
                for i, gradient in zip(wanted, gradients, strict=True):
                    found[i] = gradient
        return tuple(found)
