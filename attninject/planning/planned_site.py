"""One block at one point of the dataflow, as a plan shows it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from attninject.layout import Layout
from attninject.recipe.frozen import FrozenDict
from attninject.recipe.rules import Init
from attninject.terms import Mechanism, Position
from attninject.wording import name_of


@dataclass(frozen=True)
class SecondValue:
    """What a block of two inputs is given besides; the fields mean what they mean in a `Site`."""

    path: str
    position: Position
    call: int
    shape: tuple[int, ...]
    layout: Layout
    channels: int
    input: int | str | None = None
    output: int | str | None = None

    @property
    def where(self) -> str:
        """`after up.0`, `before up.0 call 2`."""
        call = f" call {self.call}" if self.call > 1 else ""
        item = "" if self.output is None else f"[{self.output!r}]"
        return f"{self.position} {self.path}{item}{call}"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        data = {f.name: getattr(self, f.name) for f in fields(self)}
        return {**data, "shape": list(self.shape), "layout": str(self.layout)}


@dataclass(frozen=True)
class Site:
    """One block at one point of the dataflow.

    Attributes:
        path: `layer1.0.bn3`, or `layer1.0::add` for an operation.
        position: `after`, `before`, or `replace` for a block in the module's place.
        call: which call of the module within one run of its owner, from 1.
        owner: name of the module whose forward contains the site; "" for the model.
        block: the block's registered name, the class, or what makes or is the block.
        args: the block's arguments.
        init: `identity`, `paper` or `blend`.
        name: qualified name of the new module.
        shape: of the tensor there, as the probe met it (its batch is 2 unless example_inputs said otherwise).
        layout: what the tensor's axes mean.
        channels: extent of the channel axis.
        parameters: of the new block.
        macs: multiply-accumulates of the new block for one sample (convolutions and matrix products).
        mechanism: `graph` or `module`.
        reason: why the mechanism is not `graph`; "" when it is.
        rule: index of the rule in the recipe, from 0.
        input: `before`: which operand, by position or name.
        output: `after`: index or key of the tensor in a nested result.
        second: what a block of two inputs is given besides.
        shares: name of the block that serves this site too; "" where it has one of its own.
    """

    path: str
    position: Position
    call: int
    owner: str
    block: str | Callable[..., Any]
    args: FrozenDict
    init: Init
    name: str
    shape: tuple[int, ...]
    layout: Layout
    channels: int
    parameters: int
    macs: int
    mechanism: Mechanism
    reason: str
    rule: int
    input: int | str | None = None
    output: int | str | None = None
    second: SecondValue | None = None
    shares: str = ""

    @property
    def where(self) -> str:
        """`after layer1.0.bn3`, `before layer1.0::add`, `in place of layer1.0.conv2`."""
        return f"{'in place of' if self.position == 'replace' else self.position} {self.path}"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; `second` and `shares` where there is something to say."""
        data = {f.name: getattr(self, f.name) for f in fields(self)}
        second, shares = data.pop("second"), data.pop("shares")
        data |= {"second": second.to_dict()} if second else {}
        data |= {"shares": shares} if shares else {}
        data["block"] = name_of(self.block)
        data["args"] = {k: list(v) if isinstance(v, tuple) else v for k, v in self.args.items()}
        data["shape"] = list(self.shape)
        data["layout"] = str(self.layout)
        return data
