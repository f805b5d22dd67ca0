"""Pairwise blocks train in memory linear in the positions, shown by what is saved and which kernel runs."""

from __future__ import annotations

import weakref

import pytest
import torch
from block_cases import build, noise
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

FUSED = [
    ("nonlocal", {}),
    ("nonlocal", {"sub_sample": True}),
    ("nonlocal", {"norm": False, "scale": True}),
    ("nonlocal", {"mode": "gaussian"}),
    ("self_attention", {}),
    ("self_attention", {"reduction": 4}),
    ("mhsa", {}),
    ("mhsa", {"residual": False}),
    ("generalized", {}),
    ("generalized", {"terms": "0101"}),
    ("danet_pam", {}),
    ("danet", {}),
    ("twins_gsa", {"sr_ratio": 2}),
    ("twins_lsa", {"window_size": 8}),
    ("twins_lsa", {}),  # masked
    ("twins", {"window_size": 8}),
]
"""Blocks whose attention must run in a fused kernel."""
SUMMED = [
    ("nonlocal", {"mode": "dot_product"}),
    ("nonlocal", {"mode": "concatenation", "sub_sample": True}),
    ("nonlocal", {"mode": "concatenation", "norm": False}),
    ("a2", {}),
    ("external", {"memory": 16}),
    ("danet_cam", {}),
    ("sca", {}),
]
"""Blocks whose mathematics needs no matrix of positions by positions."""
FORMATS = (torch.contiguous_format, torch.channels_last)
LIMITS = {"generalized": 40}
"""The largest tensor, in units of the input of 16 channels: 8 heads of 2 channels, 64 sines and cosines."""


class Largest(TorchDispatchMode):
    """Records the element count of the largest tensor that any operation returned, and the operations."""

    def __init__(self) -> None:
        super().__init__()
        self.elements, self.ops = 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.ops.add(str(func))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor):
                self.elements = max(self.elements, t.numel())
        return out


class Peak(TorchDispatchMode):
    """Records the most elements that what operations returned held at one time, each storage counted once."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, weakref.ref] = {}
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.made |= {id(t): weakref.ref(t) for t in (out if isinstance(out, (tuple, list)) else (out,))}
        alive = [t.untyped_storage() for made in self.made.values() if (t := made()) is not None]
        self.elements = max(self.elements, sum({s.data_ptr(): s.nbytes() for s in alive}.values()) // 4)
        return out


def saved_bytes(block: torch.nn.Module, x: torch.Tensor) -> int:
    """Bytes that one training forward keeps for backward, each storage counted once."""
    storages: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        block(x)
    return sum(storages.values())


def grad_fns(y: torch.Tensor) -> set[str]:
    """The names of all nodes of the autograd graph behind y."""
    names, todo = set(), [y.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in names:
            names.add(node)
            todo += [parent for parent, _ in node.next_functions]
    return {node.name() for node in names}


@pytest.mark.parametrize(("name", "args"), FUSED + SUMMED)
def test_saved_bytes_grow_linearly(name, args):
    """Four times the positions save four times the bytes, where a matrix would be sixteen times."""
    block = build(name, **args)
    for form in FORMATS:
        small, large = (noise(1, 16, n, n).to(memory_format=form).requires_grad_() for n in (16, 32))
        assert saved_bytes(block, large) <= 4.05 * saved_bytes(block, small), form


@pytest.mark.parametrize(
    ("form", "low"),
    [
        pytest.param(form, low, id=f"{form}-{low}", marks=[] if plain else [pytest.mark.slow])
        for form, low, plain in (
            (FORMATS[0], None, True),
            (FORMATS[1], torch.bfloat16, True),
            (FORMATS[0], torch.bfloat16, False),
            (FORMATS[1], None, False),
        )
    ],
)
@pytest.mark.parametrize(("name", "args"), FUSED + SUMMED)
def test_no_operation_ever_returns_the_matrix(name, args, form, low):
    """Forward and backward hold no tensor larger than a few inputs; fused kernels run where meant."""
    block = build(name, **args)
    x = noise(1, 16, 32, 32).to(memory_format=form).requires_grad_()
    with Largest() as seen, torch.autocast("cpu", low or torch.bfloat16, enabled=low is not None):
        y = block(x)
        y.float().sum().backward()
    assert seen.elements <= LIMITS.get(name, 4) * x.numel()  # the matrix: 64 times, per head, 16 sub-sampled
    if (name, args) in SUMMED:
        return
    assert any("flash_attention" in op and "backward" in op for op in seen.ops)
    assert any("FlashAttention" in fn for fn in grad_fns(y))


def test_the_matrix_would_be_noticed():
    """The same measurement on the plain formula finds the N×N matrix, so the test above can fail."""
    q = noise(1, 256, 8).requires_grad_()
    with Largest() as seen:
        torch.softmax(q @ q.transpose(1, 2), -1).sum().backward()
    assert seen.elements == 256 * 256


@torch.no_grad()
def test_an_involution_adds_its_products_up_as_they_come():
    """Of the 49 products of values and kernels, each as large as the map, two are there at a time, not all."""
    block, x = build("involution", 64, init="paper", group_channels=64), noise(1, 64, 16, 16)
    with Peak() as seen:
        block(x)
    assert seen.elements < 10 * x.numel()
