"""Other forms of a convolution: each a new part that is added to one, in its place in a model or alone."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from attninject.errors import BlockError

from .base import CONV, Block, he_init
from .geometry import Geometry
from .options import Init
from .replacement import Replacement


class ConvForm(Block):
    """A convolution in another form: `conv`, and the new part, which is given what `conv` is given and makes.

    A subclass says which class the `part` is, built as part(geometry, init, **options). In the place of a
    convolution of a model (`in_place_of`) there is only the part; alone, as any block, the class has a size-keeping
    convolution of its own (unless `reads_conv` is false: the part does without), to which the options in `ALONE`
    belong, and `init="identity"` means `blend`.
    """

    part: ClassVar[type[Replacement]]
    reads_conv: ClassVar[bool] = True
    ALONE: ClassVar[tuple[str, ...]] = ("kernel_size", "groups", "bias")

    def __init__(self, channels: int, dims: int, init: Init, **args: Any) -> None:
        super().__init__(channels, dims, init, **args)
        size, groups = args["kernel_size"], math.gcd(channels, args.get("groups", 1))
        conv = CONV[dims](
            channels, channels, size, padding=size // 2, groups=groups, bias=args.get("bias", False),
            device=None if self.reads_conv else "meta",
        )  # fmt: skip
        self.conv: Any = conv if self.reads_conv else None
        own = {name: value for name, value in args.items() if name not in self.ALONE}
        self.new = self.part(Geometry.of(conv), "paper", **own)
        self.initialise()

    def needs_blend(self) -> bool:
        """Always: a convolution of its own never returns x."""
        return True

    def init_paper(self) -> None:
        """He by fan-out, as in residual networks; the part has its own."""
        if self.conv is not None:
            he_init(self.conv, mode="fan_out")

    def transform(self, x: Tensor) -> Tensor:
        """x: (B, C, *S) → the same shape."""
        y = self.conv(x) if self.new.uses_result else None
        return self.new(x, y, *self._tensors()).to(x.dtype)

    def attention(self, x: Tensor) -> dict[str, Tensor]:
        """x: (B, C, *S) → what the part attends to."""
        y = self.conv(x) if self.new.uses_result else None
        return self.new.attention(x, y, *self._tensors())

    def _tensors(self) -> list[Tensor | None]:
        return [getattr(self.conv, name) for name in self.new.tensors]

    @classmethod
    def in_place_of(cls, geometry: Geometry, init: Init, args: Mapping[str, Any]) -> Replacement:
        """The new part for a convolution of this geometry; `identity` and `blend` both begin as it was.

        Raises:
            BlockError: an option is that of the convolution, or the part cannot lie on it.
        """
        name = cls.facts.name
        for option in cls.ALONE:
            if option in args:
                raise BlockError(f"block {name!r}: {option} is that of the convolution whose place it takes")
        parameters = inspect.signature(cls).parameters
        own = {n: parameters[n].default for n in cls.options if n not in cls.ALONE}
        return cls.part(geometry, init, **{**own, **args})
