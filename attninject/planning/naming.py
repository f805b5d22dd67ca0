"""Names for blocks among the children of their carriers."""

from __future__ import annotations

from torch import nn

from attninject.errors import UnusableNameError
from attninject.terms import Slot


class Names:
    """Gives out names on carriers; one object serves a whole plan, so that no name is given twice."""

    def __init__(self) -> None:
        self.taken: dict[int, set[str]] = {}  # id of a carrier -> names given out there

    def take(self, carrier: nn.Module, wanted: str, around: bool, label: str) -> tuple[str, Slot]:
        """A free name on the carrier, the wanted one or the first of wanted_2, wanted_3, …; and what held it.

        Args:
            carrier: gets the child.
            wanted: what the rule calls the block.
            around: whether the carrier's own forward still runs; it would call what fills a slot.
            label: how messages call the rule.

        Raises:
            UnusableNameError: the carrier's class has an attribute of this name.
        """
        cls = type(carrier)
        if hasattr(cls, wanted):
            raise UnusableNameError(
                f"{label}: {cls.__name__} has an attribute {wanted!r} of its own; give the rule another name:"
            )
        taken = self.taken.setdefault(id(carrier), set())
        for number in range(1, 10_000):
            name = wanted if number == 1 else f"{wanted}_{number}"
            slot = _slot(carrier, name)
            if slot is None or name in taken or (around and slot != "free"):
                continue
            taken.add(name)
            return name, slot
        raise UnusableNameError(f"{label}: no free name like {wanted!r} on {cls.__name__}")


def _slot(carrier: nn.Module, name: str) -> Slot | None:
    """What a name holds: nothing, or a None in one of two places; None where it holds something."""
    if name in carrier._modules:
        return "module" if carrier._modules[name] is None else None
    if name in carrier.__dict__:
        return "attribute" if carrier.__dict__[name] is None else None
    return None if name in carrier._parameters or name in carrier._buffers else "free"
