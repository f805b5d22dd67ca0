"""Which models are open to surgery, and what to pass instead of those that are not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from attninject.errors import NoMatchError, UnsupportedModelError
from attninject.observe.walking import named_modules_in
from attninject.surgery.injected_state import extended_since
from attninject.wording import nearest_hint

_WRAPPERS = (nn.parallel.DistributedDataParallel, nn.DataParallel)


def refuse_unsupported(model: Any) -> None:
    """Refuse what is not open to surgery, with what to pass instead.

    Raises:
        UnsupportedModelError: wrapped, scripted, compiled, quantized, lazy or no module at all.
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"expected a torch.nn.Module, found {type(model).__name__}")
    if type(model).__name__ == "OptimizedModule" or model.__dict__.get("_compiled_call_impl") is not None:
        raise UnsupportedModelError("the model is compiled; inject first, then torch.compile it")
    if isinstance(model, _WRAPPERS) or averages(model) or type(model).__name__ == "FullyShardedDataParallel":
        raise UnsupportedModelError(
            f"the model is wrapped in {type(model).__name__}; inject into model.module first"
        )
    for name, module in named_modules_in(model):
        if (why := _not_open(module, name == "")) is not None:
            raise UnsupportedModelError(f"{name or 'the model'} ({type(module).__name__}) {why}")


def _not_open(module: nn.Module, is_model: bool) -> str | None:
    """Why a model with this module in it is not open to surgery; None if the module does not forbid it."""
    home = type(module).__module__
    if extended_since(module) or type(module).__name__.startswith("FSDP"):
        return "was sharded or parametrized (its class was extended); inject and eject before that"
    if isinstance(module, torch.jit.ScriptModule):
        return "is scripted; inject into the original, then script or trace it"
    if isinstance(module, torch.fx.GraphModule):
        return "is a torch.fx GraphModule; inject into the original model" if is_model else None
    if type(module).__name__ == "OptimizedModule":
        return "is compiled; inject first, then compile it"
    if isinstance(module, nn.parallel.DistributedDataParallel) or home.startswith("torch.distributed.fsdp"):
        return "is a wrapper that has counted its parameters already; inject before it is made"
    if home.startswith("torch.ao.nn.quantized.modules.functional_modules"):
        return "belongs to a quantizable variant; inject into the plain float model"
    if home.startswith(("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")):
        return "is quantized; inject into the float model, then quantize it"
    if isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params():
        return "is lazy and not initialised; run the model once first"
    return None


def rebuilt_from_config(model: nn.Module) -> str | None:
    """What becomes of blocks where the model's own library makes it anew from its config, and what to do; or None.

    Two kinds are told by what they carry: `.yaml`, the layers as Ultralytics and the YOLOs before it describe them,
    from which `train` builds the net that it trains; and `.config` beside `from_pretrained`, as in transformers.
    """
    name = type(model).__name__
    if isinstance(getattr(model, "yaml", None), Mapping):
        return (
            f"the trainer of {name} makes the network anew from its config (.yaml), without the blocks: train with "
            f"yolo.train(..., trainer=attninject.integrations.ultralytics.trainer_for(yolo)); a loop of your own keeps "
            f"them"
        )
    configured = callable(getattr(getattr(model, "config", None), "to_dict", None))
    if configured and callable(getattr(type(model), "from_pretrained", None)):
        return (
            f"{name}.from_pretrained makes the network anew from its config, without the blocks: inject and load with "
            f"attninject.integrations.transformers, or save and load with ai.save and ai.load"
        )
    return None


def check_root(model: nn.Module, root: str) -> None:
    """Refuse a root that the model does not have.

    Raises:
        NoMatchError: with the nearest names.
    """
    if not root:
        return
    names = [n for n, _ in model.named_modules(remove_duplicate=False)]
    if root not in names:
        raise NoMatchError(f"root: no module is called {root!r}{nearest_hint(root, names[1:])}")


def averages(model: nn.Module) -> bool:
    """Whether the model keeps an average of another one's weights: torch's `AveragedModel`, timm's `ModelEmaV3`."""
    of_timm = any(kind.__module__ == "timm.utils.model_ema" for kind in type(model).__mro__)
    return isinstance(model, AveragedModel) or of_timm


def wrapped(model: nn.Module) -> Iterator[nn.Module]:
    """The model and what is inside it, wrapper by wrapper, down to the one that computes."""
    inner: nn.Module | None = model
    while inner is not None:
        yield (model := inner)
        inner = model._modules.get("_orig_mod")
        if inner is None and (isinstance(model, _WRAPPERS) or averages(model)):
            inner = model._modules.get("module")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DDP, DataParallel and torch.compile wrappers, and the copy inside one that averages."""
    *_, inner = wrapped(model)
    return inner
