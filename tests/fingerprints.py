"""What a model is, down to the last attribute, and what the process around it is, to compare."""

from __future__ import annotations

import random
import types
from typing import Any

import numpy as np
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

PATCHABLE = (
    *((nn.Module, n) for n in ("__call__", "__getattr__", "__setattr__", "__delattr__", "named_children")),
    *((nn.Module, n) for n in ("children", "named_modules", "add_module", "__getattribute__")),
    *((torch._C, n) for n in ("_set_grad_enabled",)),
    *((torch, n) for n in ("is_grad_enabled", "cat", "add")),
    (torch.utils.checkpoint, "CheckpointFunction"),
    (torch.utils.checkpoint, "_checkpoint_without_reentrant_generator"),
    (torch.amp.autocast_mode.autocast, "__enter__"),
)


class Fingerprint:
    """Equal for two looks at one model between which nothing changed.

    Covers, of every module and under every name: the object, its class, `__dict__` with its order (and what
    plain containers in it hold: children, hooks, caches), and of every tensor the object, its bits, layout,
    version, `requires_grad` and grad.
    """

    def __init__(self, model: nn.Module) -> None:
        self.keep: list[Any] = []  # what lives keeps its id to itself
        self.modules = {
            name: (id(m), type(m), self._describe(m.__dict__))
            for name, m in model.named_modules(remove_duplicate=False)
        }
        self.keys = list(model.state_dict())
        self.process = process_state()

    def _describe(self, value: Any) -> Any:
        self.keep.append(value)
        if isinstance(value, Tensor):
            if isinstance(value, nn.parameter.UninitializedTensorMixin):
                return ("lazy", id(value))
            bits = b"" if value.is_meta else value.detach().cpu().contiguous().view(-1).numpy().tobytes()
            about = (value.dtype, tuple(value.shape), value.stride(), value.requires_grad, value._version)
            return ("tensor", id(value), bits, *about, self._describe(value.grad) if value.is_leaf else None)
        if isinstance(value, dict):
            return (type(value), id(value), [(k, self._describe(v)) for k, v in value.items()])
        if isinstance(value, (list, tuple)):
            return (type(value), [self._describe(v) for v in value])
        if isinstance(value, (bool, int, float, str, set, type(None))):
            return (type(value), repr(value))
        return ("object", id(value))

    def differences(self, other: Fingerprint) -> list[str]:
        """Where two fingerprints differ, in words."""
        found = [f"modules: {list(self.modules)} and {list(other.modules)}"] * (
            list(self.modules) != list(other.modules)
        )
        for name in self.modules.keys() & other.modules.keys():
            mine, its = self.modules[name], other.modules[name]
            if mine[:2] != its[:2]:
                found.append(f"{name!r}: {mine[:2]} and {its[:2]}")
            found += [f"{name!r}: {a} and {b}" for a, b in _unequal(mine[2][2], its[2][2])]
        if self.keys != other.keys:
            found.append(f"state dict: {self.keys} and {other.keys}")
        return found + [f"process: {key}" for key in self.process if self.process[key] != other.process[key]]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Fingerprint) and not self.differences(other)

    __hash__ = None  # type: ignore[assignment]


def _unequal(mine: list, its: list) -> list[tuple[Any, Any]]:
    if [k for k, _ in mine] != [k for k, _ in its]:
        return [([k for k, _ in mine], [k for k, _ in its])]
    return [(a, b) for a, b in zip(mine, its, strict=True) if a != b]


def _tracing() -> bool:
    """Whether torch.fx traces symbolically; torch 2.6 has only the older question, which later releases warn of."""
    fx = torch.fx._symbolic_trace
    return getattr(fx, "is_fx_symbolic_tracing", fx.is_fx_tracing)()


def process_state() -> dict[str, Any]:
    """What of the process a plan, a probe or a trace could leave changed."""
    name, keys, position, *rest = np.random.get_state()
    missing = types.SimpleNamespace()
    state: dict[str, Any] = {f"{h}.{n}": vars(h).get(n, missing.__class__) for h, n in PATCHABLE}
    return state | {
        "torch generator": torch.get_rng_state().numpy().tobytes(),
        "Python generator": random.getstate(),
        "NumPy generator": (name, keys.tobytes(), position, *rest),
        "grad mode": torch.is_grad_enabled(),
        "dispatch modes": torch._C._len_torch_dispatch_stack(),
        "function modes": torch._C._len_torch_function_stack(),
        "tracing": _tracing(),
        "default device": torch.get_default_device(),
    }
