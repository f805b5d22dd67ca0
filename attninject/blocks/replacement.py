"""What stands in the place of a module: it is given what the module is given, and what the module makes of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

from torch import Tensor, nn

from attninject.errors import BlockError

from .gate import attention_of, blend, new_alpha


class Replacement(nn.Module):
    """The new part of a module that was made another: forward(x, y, *tensors) → what the module gives from now on.

    x is what the module is given, y what it makes of x by itself. So its weights stay where they are, and a new
    part that begins at zero changes nothing.

    Attributes:
        tensors: names of the module's own tensors that the new part is given besides, as `weight`.
        uses_result: whether it reads y; where not, the module's own forward need not run, and y is None.
    """

    tensors: tuple[str, ...] = ()
    uses_result: bool = True

    if TYPE_CHECKING:  # torch's own says Any
        __call__: Callable[..., Tensor]

    def __prepare_scriptable__(self) -> NoReturn:
        """What torch.jit.script asks for first."""
        raise BlockError(
            f"{type(self).__name__}: TorchScript cannot compile what takes the place of a module, or a convolution in "
            "another form; trace the model (torch.jit.trace) or export it (torch.export)"
        )

    def attention(self, x: Tensor, *rest: Tensor | None) -> dict[str, Tensor]:
        """What it attends to; called with what `forward` is called with."""
        return {}


class Blended(Replacement):
    """f in the place of a module: y + α(f(x) − y), α = 0 at init; with `init="paper"` f(x) alone.

    Exact while f(x) and f(x) − y are finite. At α = 0 only α learns of the new part; f follows from the second
    step. The module goes on to run and to learn, unless f stands alone.
    """

    alpha: nn.Parameter | None

    def __init__(self, block: nn.Module, *, alone: bool = False) -> None:
        super().__init__()
        self.block = block
        self.uses_result = not alone
        self.register_parameter("alpha", None if alone else new_alpha())

    def forward(self, x: Tensor, y: Tensor | None) -> Tensor:
        """x, y: (B, C, *S) → the same shape and dtype."""
        f: Tensor = self.block(x)
        return f if self.alpha is None or y is None else blend(y, f, self.alpha)

    def attention(self, x: Tensor, *rest: Tensor | None) -> dict[str, Tensor]:
        """What f would apply; empty where it cannot tell."""
        return attention_of(self.block, x)
