"""What stands for a foreign block besides a name or a class: a function that makes it, a partial, an instance."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any

from torch import nn

from attninject.errors import BlockError

from .base import BlockSpec


@dataclass(frozen=True, kw_only=True)
class MadeSpec(BlockSpec):
    """A row of what makes a block. `cls` is the base class: the real one is not known before a block is made.

    `source` is called as source(channels, **args); an instance is copied instead, for each site one.
    """

    source: Any

    def make(self, channels: int, args: Mapping[str, Any]) -> nn.Module:
        """A new module.

        Raises:
            BlockError: the function gives something else.
        """
        if isinstance(self.source, nn.Module):
            return copy.deepcopy(self.source)
        made = self.source(channels, **args)
        if not isinstance(made, nn.Module):
            raise BlockError(f"block {self.name!r}: it made a {type(made).__name__}, no torch.nn.Module")
        return made


def is_source(block: Any) -> bool:
    """Whether it is an instance, or a function, method, or partial of one or of a class."""
    return isinstance(block, (nn.Module, FunctionType, MethodType, functools.partial))


def spec_of(name: str, source: Any) -> MadeSpec:
    """The row of a source, which may say what it supports as a class may: `supported_dims`, `spatial`."""
    says = made_by(source)
    dims, spatial = tuple(getattr(says, "supported_dims", (2,))), bool(getattr(says, "spatial", True))
    text = (getattr(says, "__doc__", None) or "").strip().split("\n")[0]
    return MadeSpec(
        name=name, family="registered", spatial=spatial, summary=text, cls=nn.Module, dims=dims, source=source
    )


def made_by(source: Any) -> Any:
    """What is behind partials: a class, a function; of an instance its class."""
    while isinstance(source, functools.partial):
        source = source.func
    return type(source) if isinstance(source, nn.Module) else source
