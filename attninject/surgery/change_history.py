"""What has changed since injection: version counters, batches seen, what `freeze` holds."""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from attninject.observe.walking import modules_in

from .injected_state import injected_blocks

FROZEN = "_attninject_frozen"  # of a module: its parameters that `freeze` froze → had they changed before?
HELD = "_attninject_held"  # of a norm that `freeze` keeps in eval: had its statistics changed before?


_born: MutableMapping[Tensor | nn.Module, Any] = (
    WeakIdKeyDictionary()
)  # parameter or batch norm → its state at injection


def remember(model: nn.Module) -> None:
    """Note the state of every parameter and batch norm at injection: version counters, batches seen.

    Weak and outside the model, so that nothing is added to it; a copy of a model is unknown here.
    """
    first = not injected_blocks(model)
    things: list[Tensor | nn.Module] = [*model.parameters(), *modules_in(model)]
    for thing in things:
        if first or thing not in _born:
            state = _state_now(thing)
            if state is not None:
                _born[thing] = state


def remember_blocks(blocks: Iterable[nn.Module]) -> None:
    """Note the version counters of new blocks; those that are known already stay as they are."""
    for block in blocks:
        for parameter in block.parameters():
            if parameter not in _born and not parameter.is_inference():
                _born[parameter] = (parameter._version, None)


def _state_now(thing: Tensor | nn.Module) -> Any:
    """What an optimizer's step, or a batch in train mode, changes; None: cannot tell.

    Of a parameter the version counter, and a few numbers beside it: what is written through `.data`, as PEFT
    writes merged adapters, is not counted.
    """
    if isinstance(thing, Tensor):
        return None if thing.is_inference() else (thing._version, _sample(thing))
    # the running statistics have no use for this: their version counters stay still in train mode
    batches = thing._buffers.get("num_batches_tracked")
    return None if batches is None or batches.is_meta else batches.detach().clone()


def _sample(parameter: Tensor) -> Tensor | None:
    """The first number of each of the first few rows, copied to the CPU; None where that is not a plain read."""
    plain = type(parameter) in (Tensor, nn.Parameter) and parameter.device.type in ("cpu", "cuda")
    if not plain or not parameter.numel() or parameter.layout is not torch.strided:
        return None
    firsts = parameter.detach()
    if firsts.ndim:
        firsts = firsts.as_strided((min(8, len(firsts)),), firsts.stride()[:1])
    return firsts.clone() if firsts.is_cpu else firsts.cpu()


def changed_since_injection(thing: Tensor | nn.Module, unknown: bool = True) -> bool:
    """Whether a parameter or a norm's statistics may have changed; `unknown`: the answer if nobody noted."""
    then, now = _born.get(thing), _state_now(thing)
    if then is None or now is None:
        return unknown
    if isinstance(thing, nn.Module):
        return bool(then != now.to(then.device))
    (version, before), (version_now, sample) = then, now
    if version != version_now or before is None or sample is None:
        return bool(version != version_now)
    return not torch.equal(before.to(sample.dtype), sample)


def kept_by_freeze(model: nn.Module) -> set[str]:
    """Keys of base parameters and buffers that `freeze` holds, and that were as at injection when it did."""
    kept = set()
    for path, module in model.named_modules(remove_duplicate=False):
        dot = f"{path}." if path else ""
        for name, changed in module.__dict__.get(FROZEN, {}).items():
            parameter = module._parameters.get(name)
            if parameter is not None and not parameter.requires_grad and not changed:
                kept.add(dot + name)
        if module.__dict__.get(HELD) is False:
            kept.update(dot + name for name in module._buffers)
    return kept
