"""torch's fused attention, with every derivative of the formula.

The fused kernels have a backward, and nothing else: no derivative of that backward, no forward mode. The formula
has both, at the price of its N×M matrix. Forward mode, and derivatives of higher order under torch.func, are seen
when the forward runs, so the formula takes the place of the kernel. Whether somebody will differentiate an
ordinary backward (`create_graph=True`) shows only when that backward runs. So the result goes through a
Function that knows the inputs too. Its backward hands the gradient to the kernel's, as if it were not there; but
where it is recorded itself, it hands the kernel nothing, and differentiates the formula instead.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from .fast.function import FastFunction
from .gate import at_least_float32, tracing
from .precision import full_precision

FUNCTORCH = torch._C._functorch


def softmax_rows(q: Tensor, k: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """softmax(scale · q kᵀ): q: (…, N, d), k: (…, M, d) → (…, N, M), float32 or wider. Quadratic memory."""
    with full_precision(q):
        logits = scale * (at_least_float32(q) @ at_least_float32(k).transpose(-1, -2))
        if mask is not None:
            logits = logits.masked_fill(~mask, float("-inf"))
        return torch.softmax(logits, -1)


def formula(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """softmax(scale · q kᵀ) v by its matrix, in v's dtype."""
    weights = softmax_rows(q, k, scale, mask)
    with full_precision(q):
        return (weights @ at_least_float32(v)).to(v.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """softmax(scale · q kᵀ) v, fused: q: (B, h, N, d), k: (B, h, M, d), v: (B, h, M, d) → (B, h, N, d)."""
    if torch.jit.is_scripting():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    looked_through = torch.compiler.is_compiling() or tracing()
    if not looked_through and _needs_formula(q, k, v):
        return formula(q, k, v, scale, mask)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    if looked_through or not y.requires_grad or type(y) is not Tensor or _transformed():
        return y
    found: Tensor = Differentiable.apply(q, k, v, mask, y, scale)
    return found


class Differentiable(FastFunction):
    """y = softmax(scale · q kᵀ) v, computed already; for derivatives of its backward."""

    @staticmethod
    def forward(  # without `setup_context`, which costs twice as much and serves only torch.func
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, y: Tensor, scale: float
    ) -> Tensor:
        """The kernel's inputs and its result → that result; keeps what the kernel keeps too."""
        ctx.scale, ctx.dtype = scale, y.dtype
        FastFunction.keep(ctx, q, k, v, mask)
        return y.view_as(y)

    @staticmethod
    def plain(ctx: Any, *inputs: Any) -> tuple[Tensor | None, ...]:
        """The formula, in the dtype that autocast may have given the result."""
        q, k, v, mask = inputs
        return (formula(q, k, v, ctx.scale, mask).to(ctx.dtype),)

    @staticmethod
    def gradient(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """All of it to the kernel."""
        return None, None, None, None, grads[0], None


def _transformed() -> bool:
    return bool(torch._C._are_functorch_transforms_active())


def _needs_formula(*inputs: Tensor) -> bool:
    """Whether forward mode is on, or torch.func may ask for more than a first derivative of these."""
    if forward_ad._current_level >= 0:
        return True
    if not _transformed():
        return False
    kinds = [level.key() for level in FUNCTORCH.get_interpreter_stack()]
    if FUNCTORCH.TransformType.Jvp in kinds:
        return True
    outside = torch.is_grad_enabled() and any(_learns(t) for t in inputs)
    return kinds.count(FUNCTORCH.TransformType.Grad) + outside > 1


def _learns(t: Tensor) -> bool:
    """Whether ordinary autograd, outside of torch.func, wants a gradient of t."""
    while FUNCTORCH.is_functorch_wrapped_tensor(t):
        t = FUNCTORCH.get_unwrapped(t)
    return t.requires_grad
