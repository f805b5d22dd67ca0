"""Blocks at the edges: batches without a sample, second derivatives, forward mode."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from block_cases import CASES, DIMS, SIZES, build, label, noise, scrambled
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jvp, vmap

from attninject.blocks import fused

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit."),  # torch's own forward mode scripts some formulas
    pytest.mark.filterwarnings("ignore:var_mean"),  # of no sample at all
    pytest.mark.filterwarnings("ignore:There is a performance drop"),  # torch.func over a kernel of the CPU
]
ATTENDING = {
    "cross_attention", "danet", "danet_pam", "generalized", "mhsa", "nonlocal", "self_attention",
    "twins", "twins_gsa", "twins_lsa",
}  # fmt: skip
"""Blocks that go through torch's fused attention, all or some of their options."""


def attends(block: nn.Module, x: Tensor) -> bool:
    """Whether a forward of the block calls the fused attention."""
    return "Differentiable" in {type(node).__name__.removesuffix("Backward") for node in nodes(block(x))}


def nodes(y: Tensor) -> set[Any]:
    """All nodes of the autograd graph behind y."""
    found, todo = set(), [y.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in found:
            found.add(node)
            todo += [before for before, _ in node.next_functions]
    return found


def double(name: str, **args: Any) -> nn.Module:
    """A scrambled block in eval mode and float64."""
    return scrambled(name, init="paper", **args).double().eval()


def map_of(seed: int, batch: int = 2) -> Tensor:
    """x: (B, 16, 3, 2) in float64."""
    return noise(batch, 16, 3, 2, seed=seed, dtype=torch.float64)


# --- no sample ------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", CASES, ids=label)
def test_an_empty_batch_goes_forward_and_backward(case: tuple[str, dict[str, Any]], training: bool) -> None:
    """A RoI head without boxes: an empty output, an empty gradient, zero or no gradient of each parameter."""
    name, args = case
    block = build(name, init="paper", **args).train(training)
    buffers = {key: t.clone() for key, t in block.named_buffers()}
    x = torch.zeros(0, 16, 7, 5, requires_grad=True)
    y = block(x)
    assert y.shape == x.shape
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape
    assert all(p.grad is None or not p.grad.any() for p in block.parameters())
    for key, t in block.named_buffers():
        assert torch.equal(t, buffers[key]) or key.endswith("num_batches_tracked"), key


@pytest.mark.parametrize(("name", "dims"), DIMS)
def test_an_empty_batch_of_any_rank_has_its_attention(name: str, dims: int) -> None:
    """Sequences, maps and volumes, under `identity`; what `attention(x)` shows has no sample either."""
    block = build(name, dims=dims)
    x = torch.zeros(0, 16, *SIZES[dims])
    assert block(x).shape == x.shape
    assert all(t.shape[0] in (0, 1) for t in block.attention(x).values())


# --- second derivatives and forward mode ----------------------------------------------------------


def test_the_blocks_that_attend_are_known() -> None:
    """Every block whose default goes through the fused attention is among those tested below."""
    x = map_of(0).requires_grad_()
    found = {name for name, args in CASES if not args and attends(double(name), x)}
    assert found == ATTENDING


@pytest.mark.parametrize("case", [case for case in CASES if case[0] in ATTENDING], ids=label)
def test_the_second_derivative_is_the_formulas(case: tuple[str, dict[str, Any]]) -> None:
    """gradgradcheck: the backward's derivative against finite differences of the backward, float64."""
    name, args = case
    block = double(name, **args)
    assert torch.autograd.gradgradcheck(block, map_of(3, batch=1).requires_grad_(), fast_mode=True)


@pytest.mark.parametrize("case", [case for case in CASES if case[0] in ATTENDING], ids=label)
def test_forward_mode_agrees_with_the_backward(case: tuple[str, dict[str, Any]]) -> None:
    """⟨u, J t⟩ by forward mode is ⟨Jᵀ u, t⟩ by the fused kernel's own backward."""
    name, args = case
    block = double(name, **args)
    x, tangent = map_of(3).requires_grad_(), map_of(4)
    y, pushed = jvp(block, (x.detach(),), (tangent,))
    out = block(x)
    torch.testing.assert_close(y, out)
    u = noise(*out.shape, seed=5, dtype=torch.float64)
    (pulled,) = torch.autograd.grad(out, x, u)
    torch.testing.assert_close((u * pushed).sum(), (pulled * tangent).sum())


@pytest.mark.parametrize("name", sorted(ATTENDING))
def test_a_gradient_penalty_trains(name: str) -> None:
    """‖∂y/∂x‖² goes back to the parameters, as where the formula stands in the place of the kernel."""

    def penalty() -> list[Tensor | None]:
        block = double(name)
        x = map_of(3).requires_grad_()
        (g,) = torch.autograd.grad(block(x).square().sum(), x, create_graph=True)
        return list(torch.autograd.grad(g.square().sum(), list(block.parameters()), allow_unused=True))

    found = penalty()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "_needs_formula", lambda *inputs: True)
        expected = penalty()
    assert any(t is not None and t.any() for t in found)
    for a, b in zip(found, expected, strict=True):
        assert (a is None) is (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["mhsa", "twins_lsa"])
def test_hessians_of_both_kinds_agree(name: str) -> None:
    """torch.func.hessian (forward over reverse) and torch.autograd.functional.hessian (twice reverse)."""
    block = double(name)
    x = noise(1, 16, 2, 1, dtype=torch.float64)

    def loss(x: Tensor) -> Tensor:
        return block(x).pow(3).sum()

    ours = hessian(loss)(x)
    torch.testing.assert_close(ours, torch.autograd.functional.hessian(loss, x))
    assert torch.autograd.functional.hvp(loss, x, x)[1].shape == x.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_second_derivatives_under_autocast_and_checkpointing(dtype: torch.dtype) -> None:
    """Autocast narrows the kernel's result, and checkpointing keeps its inputs elsewhere; both still work."""
    block = scrambled("mhsa", init="paper")
    x = noise(2, 16, 3, 2).requires_grad_()

    def twice(forward: Any) -> Tensor:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            y = forward(x)
        (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        (h,) = torch.autograd.grad(g.square().sum(), x)
        return h

    kept = twice(lambda x: torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False))
    torch.testing.assert_close(kept, twice(block), rtol=1e-3, atol=1e-3)
    assert twice(block).isfinite().all()


# --- what is not paid for -------------------------------------------------------------------------


def test_an_ordinary_backward_never_meets_the_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a training step nor per-sample gradients by torch.func evaluate the formula."""

    def unwanted(*args: Any) -> Tensor:
        raise AssertionError("the formula was evaluated")

    block, x = double("mhsa"), map_of(3).requires_grad_()
    weights = {key: p.detach() for key, p in block.named_parameters()}

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(block, weights, x.unsqueeze(0)).square().sum()

    monkeypatch.setattr(fused, "formula", unwanted)
    block(x).square().sum().backward()
    each = vmap(grad(loss), (None, 0))(weights, x.detach())
    for key, p in block.named_parameters():
        torch.testing.assert_close(each[key].sum(0), p.grad)


def test_torch_func_over_parameters_that_learn_takes_the_formula() -> None:
    """A first derivative by torch.func, then `backward` through it to the block's own parameters."""
    block, x = double("mhsa"), map_of(3)
    grad(lambda x: block(x).square().sum())(x).square().sum().backward()
    by_func = [p.grad.clone() for p in block.parameters() if p.grad is not None]
    block.zero_grad()
    x.requires_grad_()
    (g,) = torch.autograd.grad(block(x).square().sum(), x, create_graph=True)
    g.square().sum().backward()
    by_hand = [p.grad for p in block.parameters() if p.grad is not None]
    assert by_hand
    for a, b in zip(by_func, by_hand, strict=True):
        torch.testing.assert_close(a, b)


# --- other sizes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_traced_coordinate_attention_serves_other_sizes(dims: int) -> None:
    """Its strips are parted by the sizes of the map at hand, so converters that trace keep them free."""
    block = scrambled("coord", dims=dims, init="paper").eval()
    traced = torch.jit.trace(block, noise(2, 16, *SIZES[dims]))
    x = noise(3, 16, *(n + 2 for n in SIZES[dims]))
    torch.testing.assert_close(traced(x), block(x))
