"""The non-local block's two orders of products: one result on both sides of the switch, the cheaper one taken."""

from __future__ import annotations

import copy

import pytest
import torch
from block_cases import macs, noise, scrambled
from test_block_backends import assert_equal_steps, is_fast, step
from test_block_memory import saved_bytes
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from attninject.blocks import pairwise
from attninject.blocks.fast import dispatch

WIDTH = 8
"""d and e of a block of 16 channels: the matrix of N positions is larger than the embeddings from 9 on."""
SIZES = {1: [(1,), (7,), (8,), (9,), (40,)], 2: [(2, 4), (3, 3), (5, 7)], 3: [(1, 2, 4), (2, 3, 4)]}
SUMS = ("dot_product", "concatenation")


@pytest.mark.parametrize("sub_sample", [False, True])
@pytest.mark.parametrize("mode", pairwise.NonLocal.options["mode"].values)
def test_both_orders_give_the_same_result(mode, sub_sample):
    """In float64, values and all gradients, around the switch, in 1D, 2D, 3D and both memory formats."""
    for dims, sizes in SIZES.items():
        block = scrambled("nonlocal", dims=dims, mode=mode, sub_sample=sub_sample, scale=True).double()
        bare = scrambled("nonlocal", dims=dims, mode=mode, sub_sample=sub_sample, bias=False).double()
        for size in sizes:
            x = noise(3, 16, *size, dtype=torch.float64)
            for given in (x, x.movedim(1, -1).contiguous().movedim(-1, 1)):
                assert_equal_steps(copy.deepcopy(block), given)
                assert_equal_steps(copy.deepcopy(bare), given)


@pytest.mark.parametrize("n", [2, 7, 8, 9, 24])
def test_the_dot_product_takes_the_order_of_fewer_multiplications(n):
    """N·M·(d+e) with the matrix against (N+M)·d·e without, counted beside the four convolutions."""
    block, x = scrambled("nonlocal", dims=1, mode="dot_product"), noise(2, 16, n)
    with dispatch.backend("fast"):
        assert macs(block, x, "real") == 4 * n * 16 * WIDTH + min(n * n * 2 * WIDTH, 2 * n * WIDTH * WIDTH)


class Seen(TorchDispatchMode):
    """Records the operations that ran, and the shapes of all tensors that they returned."""

    def __init__(self) -> None:
        super().__init__()
        self.ops, self.shapes = [], set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.ops.append(func.overloadpacket)
        self.shapes |= {tuple(t.shape) for t in tree_leaves(out) if isinstance(t, torch.Tensor)}
        return out


def test_the_concatenation_form_runs_two_of_its_four_convolutions():
    """θ and φ go into the one row each that w makes of them; sub-sampled φ cannot, as its maximum is not linear."""
    for args, count in (({}, 2), ({"sub_sample": True}, 4), ({"backend": "plain"}, 4)):
        block = scrambled("nonlocal", mode="concatenation", **args)
        with Seen() as seen, dispatch.backend("auto" if "backend" in args else "fast"):
            block(noise(2, 16, 5, 4))
        assert seen.ops.count(torch.ops.aten.convolution) == count


@pytest.mark.parametrize("layer", ["theta", "phi", "concat"])
def test_hooks_and_adapters_on_folded_layers_count(layer):
    """Where somebody watches, replaces or parametrizes a layer that would be folded away, it is called."""
    x = noise(2, 16, 5, 4, dtype=torch.float64)
    block, seen = scrambled("nonlocal", mode="concatenation").double(), []
    handle = getattr(block, layer).register_forward_hook(lambda *_: seen.append(layer))
    step(block, x, "fast")
    watched = len(seen)
    handle.remove()
    if layer != "concat":  # whose weight is all that either form uses
        assert watched == 1
        setattr(block, layer, nn.Sequential(getattr(block, layer), nn.Tanh()))
    else:
        nn.utils.parametrizations.weight_norm(block.concat)
    assert_equal_steps(block, x)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("mode", pairwise.NonLocal.options["mode"].values)
def test_saved_bytes_stay_linear_when_positions_are_many(mode, layout):
    """Above the switch four times the positions save four times the bytes; below, a few times the map's."""
    block = scrambled("nonlocal", mode=mode)
    few, small, large = (
        noise(2, 16, *size).to(memory_format=layout).requires_grad_() for size in ((2, 4), (16, 16), (32, 32))
    )
    with dispatch.backend("fast"):
        assert saved_bytes(block, large) <= 4.05 * saved_bytes(block, small)
        parameters = sum(p.numel() for p in block.parameters())
        assert saved_bytes(block, few) <= 4 * (5 * few.numel() + 2 * parameters)


@pytest.mark.parametrize("mode", SUMS)
def test_no_matrix_beyond_the_switch(mode):
    """Up to 8 positions the matrix of all pairs is formed, from 9 on no tensor of that shape is made."""
    block = scrambled("nonlocal", dims=1, mode=mode, norm=False)
    for n in (7, 8, 9, 40):
        with Seen() as seen, dispatch.backend("fast"):
            block(noise(3, 16, n).requires_grad_())
        assert ((3, n, n) in seen.shapes) is (n <= WIDTH)


@pytest.mark.parametrize("mode", pairwise.SOFTMAX_MODES)
def test_double_backward_of_few_positions(mode):
    """Derivatives of the backward agree with numerical ones, through the whole softmax."""
    block = scrambled("nonlocal", 4, dims=1, mode=mode, scale=True).double().eval()
    x = noise(2, 4, 2, dtype=torch.float64).requires_grad_()
    with dispatch.backend("fast"):
        assert is_fast(block(x))
        torch.autograd.gradcheck(block, (x,))
        torch.autograd.gradgradcheck(block, (x,))


@pytest.mark.parametrize("mode", SUMS)
@pytest.mark.parametrize("size", [(2, 3), (7, 5)], ids=str)
def test_sums_stay_finite_in_half_precision(mode, size):
    """In float16 both orders saturate where the sums leave its range, and gradients are numbers."""
    block, x = scrambled("nonlocal", mode=mode, norm=False), 1e3 * noise(2, 16, *size).sign()
    with dispatch.backend("fast"):
        assert block(x).abs().max() > 65504
        y = block.half()(x.half())
    assert not torch.isnan(y).any()
    y.backward(torch.zeros_like(y))
    assert all(torch.isfinite(p.grad).all() for p in block.parameters())


@pytest.mark.parametrize("mode", SUMS)
@pytest.mark.parametrize("size", [(2, 3), (7, 5)], ids=str)
def test_autocast_changes_no_more_than_in_the_definition(mode, size):
    """Under autocast to bfloat16 both orders are within its rounding of the float32 block."""
    block, x = scrambled("nonlocal", mode=mode, norm=False).eval(), noise(2, 16, *size)
    with dispatch.backend("fast"):
        exact = block(x)
        with torch.autocast("cpu", torch.bfloat16):
            low = block(x)
    assert low.dtype == torch.float32
    assert (low - exact).norm() <= 0.03 * exact.norm()


@pytest.mark.parametrize("mode", ["embedded_gaussian", "dot_product"])
def test_compiled_graphs_do_not_depend_on_the_switch(mode):
    """One full graph with a free number of positions serves both sides of it."""
    torch.compiler.reset()
    block = scrambled("nonlocal", dims=1, mode=mode).eval()
    compiled = torch.compile(copy.deepcopy(block), backend="eager", fullgraph=True, dynamic=True)
    with dispatch.backend("fast"), torch._dynamo.config.patch(error_on_recompile=True):
        for n in (6, 8, 9, 40):
            torch.testing.assert_close(
                compiled(noise(2, 16, n)), block(noise(2, 16, n)), rtol=1e-4, atol=1e-4
            )
    torch.compiler.reset()
