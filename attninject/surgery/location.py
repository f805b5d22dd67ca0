"""Where one block goes: an insertion with its carrier, and what carrying it out needs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attninject.observe.example_inputs import first_float
from attninject.terms import Mechanism

from .injected_state import Insertion
from .local_graph import LocalGraph


@dataclass(frozen=True, eq=False)
class Location:
    """An insertion on one carrier of one model. Only plans hold it; a model keeps the insertion alone.

    Attributes:
        insertion: how the carrier's forward will call the block.
        carrier: the module that the block hangs on.
        local: the graph of the carrier's own forward; None when the block works around that forward.
        reason: why not `graph`; empty for `graph`.
        written: something later writes into what the block gives, which matters to a block that keeps it.
        device: of the tensor there; meta where the probe did not look.
        dtype: of the tensor there, where it is another than that of the module's own weights.
        time: orders the blocks of one carrier as the dataflow does.
        source: the layer that makes the map whose positions the tokens at the site are; None: not known.
        packer: the encoder around the carrier that may pack the padded tokens at the site; None: there is none.
        old: the module whose place the block takes; None where it takes none.
    """

    insertion: Insertion
    carrier: nn.Module
    local: LocalGraph | None = None
    reason: str = ""
    written: bool = False
    device: torch.device = torch.device("meta")  # noqa: RUF009 (immutable)
    dtype: torch.dtype | None = None
    time: int = 0
    source: nn.Module | None = None
    packer: nn.Module | None = None
    old: nn.Module | None = None

    def like(self, otherwise: Tensor) -> Tensor:
        """The tensor whose device and dtype the block follows: of its module, or the given one where that has none."""
        return first_float(self.old or self.carrier, first_float(self.carrier, otherwise))

    @property
    def mechanism(self) -> Mechanism:
        """`graph` where the carrier's forward is rewritten at a node, else `module`."""
        return "module" if self.insertion.target is None else "graph"
