"""An optimizer's state by names of parameters, as whole tensors and plain numbers, and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from attninject.errors import CheckpointError, RunError

from .sharding import like, whole

Named = Sequence[tuple[str, Tensor]]  # an optimizer's parameters, in its own order


def optimizer_state(
    optimizer: torch.optim.Optimizer, parameters: Named, name: str
) -> tuple[dict[str, Tensor], list[tuple[str, str, Any]]]:
    """Tensors by `optimizer.PARAMETER|ENTRY` or `group.NUMBER|ENTRY`; what is no tensor as triples.

    Raises:
        RunError: it keeps something else; `name` is the optimizer's.
    """
    state = optimizer.state_dict()
    owners = [(f"optimizer.{key}", state["state"].get(i, {})) for i, (key, _) in enumerate(parameters)]
    owners += [(f"group.{i}", group) for i, group in enumerate(state["param_groups"])]
    tensors, numbers = {}, []
    for owner, entries in owners:
        for key, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{owner}|{key}"] = whole(value)
            elif isinstance(value, int | float | str | None):
                numbers.append((owner, key, value))
            elif owner.startswith("optimizer."):  # a group's lists are its parameters and settings
                raise RunError(
                    f"the optimizer {name!r} keeps a {type(value).__name__} ({key}), which no "
                    f"checkpoint here can hold: take another optimizer, or leave `out` away"
                )
    return tensors, numbers


def load_optimizer_state(
    optimizer: torch.optim.Optimizer,
    parameters: Named,
    tensors: Mapping[str, Tensor],
    numbers: Iterable[Sequence[Any]],
) -> None:
    """Fill an optimizer that has its groups already; other tensors of a checkpoint are passed over.

    Raises:
        CheckpointError: the state is of a parameter or a group that this optimizer has not.
    """
    state, of = optimizer.state_dict(), dict(parameters)
    owners = {f"group.{i}": group for i, group in enumerate(state["param_groups"])}
    for i, (name, _) in enumerate(parameters):
        owners[f"optimizer.{name}"] = state["state"].setdefault(i, {})
    entries = [(*key.rpartition("|")[::2], tensor) for key, tensor in tensors.items() if "|" in key]
    for owner, key, value in [*entries, *numbers]:
        if owner not in owners:
            raise CheckpointError(f"the checkpoint holds {owner}, which this run's optimizer has not")
        parameter = of.get(owner.removeprefix("optimizer."))
        if parameter is not None and isinstance(value, Tensor):
            value = like(parameter, value)
        owners[owner][key] = value
    state["state"] = {i: entries for i, entries in state["state"].items() if entries}
    optimizer.load_state_dict(state)
