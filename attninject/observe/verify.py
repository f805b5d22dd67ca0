"""A model's outputs before and after, compared."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .example_inputs import Inputs, first_float
from .record import map_tensors
from .snapshot import rng_kept, stand_ins


def outputs(model: nn.Module, inputs: Inputs) -> list[Any]:
    """Outputs in eval and in train mode on random inputs; the model's own buffers, modes and caches are spared."""
    like = first_float(model)
    # CUDA, while nobody has used it, remembers a seed and not a state: there is nothing to put back
    seed = torch.random.default_generator.manual_seed if like.is_cpu else torch.manual_seed
    results: list[Any] = []
    with rng_kept(), torch.no_grad(), stand_ins(model, _own_buffer):
        for training in (False, True):
            seed(0)
            real = _real_inputs(inputs, like)
            model.train(training)
            try:
                results.append(model(*real.args, **real.kwargs))
            except Exception as error:  # some models take targets in train mode
                results.append(repr(error))
    return results


def _own_buffer(tensor: Tensor) -> Tensor:
    """Parameters are shared with the run, everything that it may write to is not."""
    return tensor.detach() if isinstance(tensor, nn.Parameter) else tensor.detach().clone()


def _real_inputs(inputs: Inputs, like: Tensor) -> Inputs:
    def real(t: Tensor) -> Tensor:
        if not t.is_meta:
            return t.detach().clone()  # a forward may write into it
        if t.is_floating_point():
            return torch.randn(t.shape, device=like.device).to(t.dtype)
        return torch.zeros(t.shape, dtype=t.dtype, device=like.device)

    return Inputs(*map_tensors((inputs.args, inputs.kwargs), real))


def equal(a: Any, b: Any) -> bool:
    """Whether two nested results hold the same tensors, value for value; what is no number equals its like."""
    flat_a: list[Tensor] = []
    flat_b: list[Tensor] = []
    map_tensors(a, flat_a.append)
    map_tensors(b, flat_b.append)
    same = len(flat_a) == len(flat_b)
    return same and all(map(_alike, flat_a, flat_b))


def _alike(x: Tensor, y: Tensor) -> bool:
    if (x.shape, x.dtype) != (y.shape, y.dtype):
        return False
    return torch.equal(x, y) or bool(((x == y) | ((x != x) & (y != y))).all())
