"""Looking at what the blocks attend to; the model stays as it is."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from attninject import api, compiling
from attninject.observe.example_inputs import Inputs
from attninject.observe.snapshot import rng_kept, undoing
from attninject.planning import support
from attninject.surgery.injected_state import FLAG

Maps = dict[str, dict[str, Tensor]]


def attention_maps(model: nn.Module, x: Any) -> Maps:
    """The attention of every injected block on an input: {qualified name of the block: {name: tensor}}.

    One run of the model in eval mode without gradients; afterwards modes, statistics and random generators are
    as they were. What a block's `attention(x)` gives is in the block's own layout, (B, C, H, W), whatever the
    model's; a gate is the factor that multiplies, 1 on a fresh model. A block that runs several times adds
    `gate_2`, `gate_3`, …; one that serves several sites (`share`) has all its runs under its first name. A block
    that is disabled, does not run on this input, or has no `attention` (a class of your own need not) has an empty
    entry; a model without blocks gives {}.

    Args:
        model: looks through DDP and torch.compile wrappers; compiled parts run uncompiled meanwhile.
        x: a tensor, a tuple of positional or a dict of keyword arguments, on the model's device.
    """
    blocks = api.injected(model)
    inner = support.unwrapped(model)
    inputs = Inputs.of(x)
    with torch.no_grad(), in_eval_uncompiled(inner), _listening(blocks) as found:
        if blocks:
            inner(*inputs.args, **inputs.kwargs)
    return found


@contextlib.contextmanager
def in_eval_uncompiled(model: nn.Module) -> Iterator[None]:
    """Modules in eval mode, run as they are written, for a while; then modes and random generators as before."""
    with rng_kept(), _in_eval(model), _uncompiled(model):
        yield


@contextlib.contextmanager
def _listening(blocks: dict[str, nn.Module]) -> Iterator[Maps]:
    """Collects the attention of each call of a block, computed from the call's input."""
    found: Maps = {name: {} for name in blocks}
    firsts = {id(block): name for name, block in reversed(blocks.items())}
    handles = [
        block.register_forward_pre_hook(_hook(found[name]))
        for name, block in blocks.items()
        if firsts[id(block)] == name and callable(getattr(block, "attention", None))
        if not block.__dict__.get(FLAG)
    ]

    def put_back() -> None:
        for handle in handles:
            handle.remove()

    with undoing(put_back):
        yield found


def _hook(entry: dict[str, Tensor]) -> Callable[[nn.Module, Any], None]:
    calls = 0

    def hook(block: nn.Module, args: Any) -> None:
        nonlocal calls
        calls += 1
        suffix = "" if calls == 1 else f"_{calls}"
        for name, tensor in block.attention(*args).items():  # type: ignore[operator]
            entry[name + suffix] = tensor

    return hook


@contextlib.contextmanager
def _in_eval(model: nn.Module) -> Iterator[None]:
    """Eval mode for a while; then each module's own mode again."""
    modes = [(module, module.training) for module in model.modules()]

    def put_back() -> None:
        for module, mode in modes:
            module.training = mode

    with undoing(put_back):
        model.eval()
        yield


@contextlib.contextmanager
def _uncompiled(model: nn.Module) -> Iterator[None]:
    """Compiled modules run as they are written: compiled code knows nothing of hooks."""
    compiled = [(m, m.__dict__.pop(compiling.IMPL)) for m in model.modules() if compiling.IMPL in m.__dict__]

    def put_back() -> None:
        for module, call in compiled:
            module.__dict__[compiling.IMPL] = call

    with undoing(put_back):
        yield
