"""A card where there is none: its tensors compute on the CPU and, as a GPU's, refuse to mix with those of the CPU.

For a process of its own, since torch knows one such device at a time: `with pretend_card.Card(): model.to("card")`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "card"
MIXING = ("aten._to_copy", "aten.copy_", "aten.index.", "aten.index_put")
"""Operations that take tensors of both: copies, and indices that lie on the CPU."""
_setup_privateuseone_for_python_backend(NAME)


class OnCard(Tensor):
    """A tensor that says it is on the card."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnCard:
        made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=f"{NAME}:0",
        )  # fmt: skip
        made.inner = inner
        found: OnCard = made
        return found

    def tolist(self) -> Any:
        """As any tensor's."""
        return self.inner.tolist()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        twin: Tensor = OnCard(self.inner.clone())
        if isinstance(self, nn.Parameter):
            twin = nn.Parameter(twin, self.requires_grad)
        memo[id(self)] = twin
        return twin

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(operation, args, kwargs or {})


class Card(TorchDispatchMode):
    """For the time of a `with`: tensors can be made on the card."""

    def __enter__(self) -> Any:
        self.tensor = torch.tensor  # it asks no mode
        torch.tensor = lambda data, device=None, **more: self.tensor(data, **more).to(device or "cpu")
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.tensor = self.tensor
        super().__exit__(*error)

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(operation, args, kwargs or {})


def _run(operation: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The operation on the CPU; the result is on the card where the device asked for is, or else an argument."""
    tensors = [a for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
    on_card = any(isinstance(t, OnCard) for t in tensors)
    if on_card and not str(operation).startswith(MIXING):
        strays = [t for t in tensors if not isinstance(t, OnCard) and t.ndim]
        assert not strays, f"{operation}: a tensor of the CPU among those of the card"
    if kwargs.get("device") is not None:
        on_card = torch.device(kwargs["device"]).type == NAME
        kwargs = {**kwargs, "device": torch.device("cpu")} if on_card else kwargs
    plain = tree_map(lambda a: a.inner if isinstance(a, OnCard) else a, (args, kwargs))
    result = operation(*plain[0], **plain[1])
    if operation._schema.name.endswith("_") or any(
        a.alias_info is not None and a.alias_info.is_write for a in operation._schema.arguments
    ):
        return kwargs.get("out", args[0])
    return tree_map(lambda r: OnCard(r) if on_card and isinstance(r, Tensor) else r, result)
