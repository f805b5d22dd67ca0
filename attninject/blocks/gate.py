"""Identity gates and the few other pieces that every block shares.

**Gates.** A block scales its input by g(z), where z comes from a last layer. A fresh layer with the
published g halves the signal (σ(0) = 0.5), which wrecks a pretrained net. Under `init="identity"` the last
layer is zero and g is replaced by a function of the same family that is exactly 1 at 0:

| kind | published g(z) | identity g(z) |
|---|---|---|
| sigmoid | σ(z) | 2σ(z) |
| hard_sigmoid | h(z) = clip(z/6 + 1/2, 0, 1) | 2h(z) |
| tanh | tanh(z) | 1 + tanh(z) |
| relu | max(0, z) | max(0, 1 + z) |

Where the published factor is 1 + g(z) (BAM, residual CBAM), identity drops the 1 and keeps the doubled g.
The factor is 1.0 in every floating-point format, and x · 1.0 is x, bit for bit. The gradient at z = 0 is not
zero, so the last layer learns from the first step and everything before it from the second.

**Precision.** Gates are evaluated in float32 at least, whatever autocast made of the layers, and are rounded
once, to the dtype of the input they multiply.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

GateKind = Literal["sigmoid", "hard_sigmoid", "tanh", "relu"]
GATES: tuple[GateKind, ...] = get_args(GateKind)


def factor(z: Tensor, kind: str, identity: bool) -> Tensor:
    """g(z), the published function of a kind or its identity form, which is exactly 1 at 0."""
    if kind == "relu":
        return F.relu(1 + z) if identity else F.relu(z)
    if kind == "tanh":
        return 1 + torch.tanh(z) if identity else torch.tanh(z)
    y = torch.sigmoid(z) if kind == "sigmoid" else F.hardsigmoid(z)
    return 2 * y if identity else y


def at_least_float32(z: Tensor) -> Tensor:
    """The same values in float32 where the dtype is narrower; float32 and float64 pass through."""
    return z.float() if z.dtype in (torch.float16, torch.bfloat16) else z


class Gate(nn.Module):
    """g(z), published or in its identity form; no parameters.

    `kind` is one of `GATES`. `identity` picks the form that is 1 at z = 0. `skip`: the published factor is
    1 + g(z); its identity form is the same as without the skip.
    """

    def __init__(self, kind: GateKind = "sigmoid", *, identity: bool = True, skip: bool = False) -> None:
        super().__init__()
        self.kind, self.identity, self.skip = kind, identity, skip

    if TYPE_CHECKING:  # torch's own says Any
        __call__: Callable[..., Tensor]

    def forward(self, z: Tensor) -> Tensor:
        """z: any shape → the factor, same shape, float32 or wider."""
        y = factor(at_least_float32(z), self.kind, self.identity)
        return 1 + y if self.skip and not self.identity else y

    def extra_repr(self) -> str:
        """The formula that this gate computes."""
        return f"{self.kind}, identity={self.identity}" + (", skip=True" if self.skip else "")


def tracing() -> bool:
    """Whether torch.jit.trace is recording."""
    return bool(torch.jit.is_tracing())


def scale(x: Tensor, gate: Tensor) -> Tensor:
    """x · gate in x's dtype: `x: (B, C, *S)`, `gate` broadcastable to it."""
    return x * (
        gate if gate.dtype == x.dtype else gate.to(x.dtype)
    )  # the check is half the price of the call


LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}
"""Axes of a map → the memory format in which a position's channels lie side by side."""


def lies_last(x: Tensor) -> torch.memory_format | None:
    """The format of x: (B, C, *S) if it is one of `LAYOUTS` and not contiguous besides, else None."""
    last = LAYOUTS.get(x.ndim)
    known = last is not None and not x.is_contiguous() and x.is_contiguous(memory_format=last)
    return last if known else None


def laid_out_like(x: Tensor, y: Tensor) -> Tensor:
    """y in the memory format of x."""
    if torch.jit.is_scripting():
        return y
    last = lies_last(x)
    return y if last is None else y.contiguous(memory_format=last)


def added(tensors: list[Tensor]) -> Tensor:
    """Their sum, from the first on."""
    total = tensors[0]
    for other in tensors[1:]:
        total = total + other
    return total


def scale_groups(x: Tensor, gate: Tensor) -> Tensor:
    """x · gate where each of G groups of channels has its own: x: (B, C, *S), `gate`: (B, G, *S)."""
    return scale(torch.unflatten(x, 1, (gate.shape[1], -1)), gate.unsqueeze(2)).flatten(1, 2)


def blend(x: Tensor, y: Tensor, alpha: Tensor) -> Tensor:
    """x + α(y − x) in x's dtype; exactly x at α = 0 while y − x is finite."""
    return x + (alpha * (y - x)).to(x.dtype)


def new_alpha() -> nn.Parameter:
    """The zero that `blend` starts from: one element, not a 0-d tensor, which FSDP2 refuses to shard."""
    return nn.Parameter(torch.zeros(1))


class Blend(nn.Module):
    """x + α(f(x) − x) around any shape-keeping module f, α = 0 at init: the identity, but for α.

    Exact while f(x) and f(x) − x are finite. At α = 0 only α learns; f follows from the second step.
    `attention(x)` is f's own, where f has one.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.alpha = new_alpha()

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, *S) → the same shape and dtype."""
        return blend(x, self.block(x), self.alpha)

    def attention(self, *inputs: Tensor) -> dict[str, Tensor]:
        """What the inner block would apply before blending; empty where it cannot tell."""
        return attention_of(self.block, *inputs)


def attention_of(block: nn.Module, *inputs: Tensor) -> dict[str, Tensor]:
    """What any module shows of its attention to these inputs; empty where it has no such method."""
    of = getattr(block, "attention", None)
    return dict(of(*inputs)) if callable(of) else {}


def zero(*layers: nn.Module | None) -> None:
    """Set weight and bias of each layer to 0 (None is passed over): its output is 0 whatever comes in."""
    with torch.no_grad():
        for layer in layers:
            for p in () if layer is None else layer.parameters(recurse=False):
                p.zero_()


_DIVIDING = {"_WeightNorm", "_SpectralNorm"}  # torch's parametrizations


def divided_zeros(module: nn.Module) -> list[str]:
    """Layers in a module whose weight is zero and stands under weight or spectral norm, which divides by it."""
    found = []
    for name, layer in module.named_modules():
        if not (
            "weight_g" in layer._parameters
            or "weight_u" in layer._buffers
            or "parametrizations" in layer._modules
        ):
            continue
        g, whole = getattr(layer, "weight_g", None), None
        if hasattr(layer, "weight_u"):
            whole = getattr(layer, "weight_orig", None)
        for held in getattr(layer, "parametrizations", {}).values():
            if any(type(p).__name__ in _DIVIDING for p in held):
                g, whole = getattr(held, "original0", g), getattr(held, "original", whole)
        divided = (g is not None and not g.is_meta and not bool(g.all())) or (
            whole is not None and not whole.is_meta and not bool(whole.any())
        )
        found += [name] * divided
    return found


def normalize(norm: nn.Module, x: Tensor) -> Tensor:
    """`norm(x)`, also where a batch norm in train mode has one value per channel.

    Batch statistics of a single value do not exist (torch raises). For such a call the running statistics
    are used and left unchanged, as in eval mode. Blocks call their norms through this function rather than
    through a subclass, because SyncBN conversion and norm freezing replace the module and would lose it. A
    SyncBatchNorm that really synchronises sees the other ranks' values and must take part in the exchange, so
    it is called in every case.
    """
    if (
        not (isinstance(norm, _BatchNorm) and norm.training)
        or tracing()
        or x.shape[0] * x.shape[2:].numel() != 1
        or norm.running_mean is None
        or _synchronises(norm)
    ):
        y: Tensor = norm(x)
        return y
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps)


class Normed(nn.Module):
    """What a module does with its `norm`: through `normalize`, in a form that TorchScript can compile."""

    if TYPE_CHECKING:
        norm: Any  # a norm, or None

    def normed(self, z: Tensor) -> Tensor:
        """The norm's result, or z where there is none."""
        if self.norm is None:
            return z
        y: Tensor = self.norm(z) if torch.jit.is_scripting() else normalize(self.norm, z)
        return y


def _synchronises(norm: nn.Module) -> bool:
    dist = torch.distributed
    return (
        isinstance(norm, nn.SyncBatchNorm)
        and dist.is_available()
        and dist.is_initialized()
        and dist.get_world_size(norm.process_group) > 1
    )
