"""Models that PEFT has put adapters into, as the plain models that they amount to."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from torch import nn

from attninject.errors import UnsupportedModelError
from attninject.surgery.change_history import changed_since_injection
from attninject.wording import listed


@dataclass(frozen=True)
class Merged:
    """`model`: plain, computing what the adapted one did; `changed`: keys of its tensors that may have changed."""

    model: nn.Module
    changed: frozenset[str]


def merged(model: nn.Module) -> Merged | None:
    """A copy of a `PeftModel`, every adapter merged into its layer and `modules_to_save` put in their places.

    None: PEFT has no part in the model. What the adapted model computes, the copy does, but for the rounding of
    the merge. The model itself stays as it is.

    Raises:
        UnsupportedModelError: its adapters cannot be merged, or PEFT's modules are in it without a `PeftModel`.
    """
    adapted = [name for name, module in model.named_modules() if _of_peft(module)]
    if not adapted:
        return None
    whole: Any = model
    if not (_of_peft(model) and callable(getattr(model, "merge_and_unload", None))):
        raise UnsupportedModelError(
            f"PEFT's modules are in the model ({listed(adapted)}), and {type(model).__name__} cannot merge them: "
            f"call merge_and_unload() of the PeftModel around it, and pass the model that it returns"
        )
    inner = whole.get_base_model()
    try:
        plain = copy.deepcopy(whole).merge_and_unload()
    except Exception as error:
        raise UnsupportedModelError(f"the adapters of PEFT cannot be merged: {error}") from error
    return Merged(plain, _changed(inner, plain))


def _of_peft(module: nn.Module) -> bool:
    return type(module).__module__.partition(".")[0] == "peft"


def _changed(inner: nn.Module, plain: nn.Module) -> frozenset[str]:
    """Keys of the plain model under an adapted layer, and of what was trained before the adapters came."""
    layers = tuple(f"{n}." for n, m in inner.named_modules() if _of_peft(m) and "base_layer" in m._modules)
    trained = {
        key.replace(".base_layer.", ".")
        for key, parameter in inner.named_parameters()
        if changed_since_injection(parameter, unknown=False)
    }
    return frozenset(key for key in plain.state_dict() if key.startswith(layers) or key in trained)
