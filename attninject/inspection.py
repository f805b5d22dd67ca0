"""`status`: the injected blocks of a model as they stand, and how much of the model learns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from attninject import switching
from attninject.notebook import html_table
from attninject.planning.support import unwrapped
from attninject.surgery import change_history, injected_state
from attninject.wording import aligned, parameter_count

HEADER = ("block", "kind", "site", "parameters", "learns", "mode", "changed")
NUMBERS = {3}  # the columns that are set flush right


class Learning(str):
    """How much of a model learns, in a line; `learning` and `total` are the parameters that it counts."""

    learning: int
    total: int

    def __new__(cls, learning: int, total: int) -> Learning:
        """`2.5 M of 28.1 M (9.0 %)`."""
        share = 100 * learning / total if total else 0.0
        line = super().__new__(
            cls, f"{parameter_count(learning)} of {parameter_count(total)} ({share:.1f} %)"
        )
        line.learning, line.total = learning, total
        return line

    def __getnewargs__(self) -> tuple[int, int]:  # type: ignore[override]
        """A copy or a pickle counts the same."""
        return self.learning, self.total


@dataclass(frozen=True)
class BlockStatus:
    """One injected block.

    Attributes:
        name: qualified name of the module.
        kind: name of its class.
        site: where it was planned, as `after layer1.0.bn3`; empty where that is not known.
        parameters: how many it has.
        learning: how many of them require a gradient.
        training: whether it is in train mode.
        disabled: whether it is passed through at the moment.
        changed: whether a parameter may have changed since injection; None: nobody noted, as in a copy.
        shares: name under which this very block stands already, and is counted; "" where it is the first.
    """

    name: str
    kind: str
    site: str
    parameters: int
    learning: int
    training: bool
    disabled: bool
    changed: bool | None
    shares: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; `shares` where there is something to say."""
        return {name: value for name, value in asdict(self).items() if name != "shares" or value}


@dataclass(frozen=True)
class Status:
    """The injected blocks of a model, and how much of it learns; `print` it.

    `deltas`: the names of those that were loaded under one; `active`: that of the one whose blocks these are.
    """

    model: str
    blocks: tuple[BlockStatus, ...]
    trainable: Learning
    deltas: tuple[str, ...] = ()
    active: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        counts = {"learning": self.trainable.learning, "total": self.trainable.total}
        named = {"deltas": list(self.deltas), "active": self.active} if self.deltas else {}
        return {"model": self.model, "blocks": [block.to_dict() for block in self.blocks], **counts, **named}

    def __str__(self) -> str:
        rows = ["  " + line for line in aligned([HEADER, *map(_row, self.blocks)], right=NUMBERS)]
        return "\n".join([self._title(), *(rows if self.blocks else [])])

    def _repr_html_(self) -> str:
        return html_table(HEADER, map(_row, self.blocks), right=NUMBERS, above=[self._title()])

    def _title(self) -> str:
        count = len(self.blocks)
        blocks = f"{count or 'no'} injected block{'s' * (count != 1)}"
        named = (
            f"; {self.active or 'none'} of the deltas {', '.join(self.deltas)} is active"
            if self.deltas
            else ""
        )
        return f"{self.model}: {blocks}; {self.trainable} parameters learn{named}"


def status(model: nn.Module) -> Status:
    """The injected blocks of a model: what they are, whether they learn, have changed, or are passed through.

    Looks through DDP, torch.compile and averages. Nothing runs; what has moved in numbers is `attention_maps`.
    """
    model = unwrapped(model)
    deltas = switching.names(model), switching.active(model)
    return Status(type(model).__name__, tuple(_blocks(model)), learning_of(model), *deltas)


def learning_of(model: nn.Module) -> Learning:
    """How many parameters require a gradient, of how many."""
    parameters = list(model.parameters())
    return Learning(sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters))


def _blocks(model: nn.Module) -> Iterator[BlockStatus]:
    sites = injected_state.sites_of(model)
    first: dict[int, str] = {}  # id of a block -> its first name
    for name, block in injected_state.injected_blocks(model).items():
        shares = first.setdefault(id(block), name)
        site, own = sites[name], learning_of(nn.Identity() if shares != name else block)
        yield BlockStatus(
            name,
            type(block).__name__,
            "" if site is None else site.where,
            own.total,
            own.learning,
            block.training,
            bool(block.__dict__.get(injected_state.FLAG)),
            _changed(block),
            "" if shares == name else shares,
        )


def _changed(block: nn.Module) -> bool | None:
    """Whether any parameter has changed; None: of one that nobody noted, and no other has."""
    parameters = list(block.parameters())
    if any(change_history.changed_since_injection(p, unknown=False) for p in parameters):
        return True
    known = not any(change_history.changed_since_injection(p, unknown=True) for p in parameters)
    return False if known else None


def _row(block: BlockStatus) -> tuple[str, ...]:
    learns = "no" if not block.learning else "yes" if block.learning == block.parameters else "in part"
    mode = "passed through" if block.disabled else "train" if block.training else "eval"
    changed = {True: "yes", False: "no", None: "unknown"}[block.changed]
    learns = learns if block.parameters else "nothing to learn"
    count = f"{block.parameters:,}"
    if block.shares:
        count, learns = "shared", f"as {block.shares}"
    return block.name, block.kind, block.site, count, learns, mode, changed
