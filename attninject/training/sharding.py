"""FSDP2: a sharded twin of the model learns, while the model itself stays whole, for the files.

`fully_shard` changes a module for good: its parameters become pieces of a whole, and its class another one. So
it is put on a copy. Whenever something is to be written or compared, all processes `gather` the pieces into
the model that the caller gave, which is a plain model on the CPU before, during and after the run.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from attninject.errors import ExperimentError, Fault
from attninject.surgery import injected_state

from .devices import fsdp_by_accelerate
from .freezing import follow


class Twin:
    """A copy of `model`, sharded over all processes."""

    def __init__(self, model: nn.Module, accelerator: Any) -> None:
        from torch.distributed.device_mesh import init_device_mesh

        self.model = model.cpu()
        plugin = _plugin(accelerator)
        self.mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
        options = {"mesh": self.mesh, "reshard_after_forward": bool(plugin.reshard_after_forward)}
        net = copy.deepcopy(model)
        parts = units(net, plugin.transformer_cls_names_to_wrap)
        self.units = len(parts)
        self.net = _sharded(net, parts, options)
        self.net.to(accelerator.device)  # buffers, which are not sharded

    @torch.no_grad()
    def gather(self) -> None:
        """All that the twin has learned into the model; every process must call it."""
        agree_on_buffers(self.net)
        for target, source in self._pairs():
            full = whole(source)
            if not torch.equal(target, full):  # a write would make a frozen tensor look changed
                target.copy_(full)

    @torch.no_grad()
    def spread(self) -> None:
        """The model's tensors into the twin; every process must call it."""
        for source, target in self._pairs():
            target.copy_(like(target, source))

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Tensors of the model and of the twin, key by key."""
        ours, theirs = self.model.state_dict(), self.net.state_dict()
        return ((ours[key].data, theirs[key]) for key in ours if isinstance(ours[key], Tensor))

    def thaw(self) -> None:
        """Let learn in the twin what learns in the model by now."""
        self.settle()
        follow(self.model, self.net)

    def settle(self) -> None:
        """Free what a forward gathered and no backward freed, so that the parameters are the pieces again."""
        from torch.distributed.fsdp import FSDPModule

        for module in self.net.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def sync(self, now: bool) -> None:
        """Whether the next backward reduces the gradients over the processes."""
        self.net.set_requires_gradient_sync(now)  # type: ignore[operator]


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor's full value (every process must ask for it); another tensor itself."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def local(tensor: Tensor) -> Tensor:
    """The piece of a sharded tensor that this process holds; another tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def like(sharded: Tensor, full: Tensor) -> Tensor:
    """`full` cut as `sharded` is, where that is cut and of the same shape."""
    if not hasattr(sharded, "device_mesh") or sharded.shape != full.shape:
        return full
    from torch.distributed.tensor import distribute_tensor

    mesh: Any = sharded.device_mesh
    return distribute_tensor(full.to(mesh.device_type), mesh, sharded.placements)  # type: ignore[attr-defined]


@torch.no_grad()
def agree_on_buffers(model: nn.Module) -> None:
    """Statistics of the first process for all, as DDP does at the next forward in any case."""
    for buffer in model.buffers():
        torch.distributed.broadcast(buffer, 0)


def units(model: nn.Module, classes: Any = None) -> list[nn.Module]:
    """What is gathered and freed together: the repeated units of a network (its residual blocks, say).

    Those are the children of a container that share their class with a sibling and have children of their own;
    of nested ones the innermost. `classes`: modules of these class names instead.
    """
    if classes:
        return [m for m in model.modules() if injected_state.base_class(m).__name__ in classes]
    found: dict[nn.Module, None] = {}
    for container in model.modules():
        if isinstance(container, injected_state.CONTAINERS):
            inside = [m for m in container.children() if any(True for _ in m.children())]
            inside = [m for m in inside if not isinstance(m, injected_state.CONTAINERS)]
            counts = Counter(injected_state.base_class(m) for m in inside)
            found |= dict.fromkeys(m for m in inside if counts[injected_state.base_class(m)] > 1)
    return [m for m in found if not any(n is not m and n in found for n in m.modules())]


def _sharded(net: nn.Module, parts: list[nn.Module], options: dict[str, Any]) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for parameter in net.parameters():  # what fully_shard takes: no other memory format
        parameter.data = parameter.data.contiguous()
    try:
        for unit in parts:
            fully_shard(unit, **options)
        fully_shard(net, **options)
    except (ValueError, NotImplementedError, AssertionError, RuntimeError) as error:
        raise ExperimentError(
            [Fault(f"train, sharding: FSDP2 does not take {type(net).__name__}: {error}")]
        ) from error
    return net


def _plugin(accelerator: Any) -> Any:
    """Accelerate's FSDP settings, or their defaults; what has no meaning here is refused, not ignored."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)  # Accelerate itself sets it on GPUs only
    if plugin is None and not fsdp_by_accelerate():
        return SimpleNamespace(reshard_after_forward=True, transformer_cls_names_to_wrap=None)
    if plugin is None:
        from accelerate import FullyShardedDataParallelPlugin

        plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    faults = []
    if plugin.cpu_offload and type(plugin.cpu_offload).__name__ != "OffloadPolicy":
        faults.append("offloading parameters to the CPU (fsdp_offload_params) is not in the engine")
    if plugin.activation_checkpointing:
        faults.append("fsdp_activation_checkpointing: use `train: {checkpointing: true}` instead")
    if faults:
        raise ExperimentError([Fault(f"sharding: {fault}") for fault in faults])
    return plugin
