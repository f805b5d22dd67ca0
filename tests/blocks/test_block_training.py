"""Blocks in training: gradients, norms, precision, memory format, and what must stay untouched."""

from __future__ import annotations

import copy
import itertools
import re

import pytest
import torch
from block_cases import (
    CASES,
    CASES_BY_INIT,
    DIMS,
    JOINT_NORM,
    NAMES,
    NO_LOGITS,
    SIZES,
    build,
    gathered,
    label,
    noise,
    scrambled,
)
from small import which
from torch import nn
from torch.utils.checkpoint import checkpoint

from attninject.blocks import gate, registry
from attninject.blocks.base import Block
from attninject.blocks.fast import context as fast_context
from attninject.blocks.gate import GATES, Gate, normalize
from attninject.blocks.pairwise import halve
from attninject.blocks.windows import Twins, TwinsGSA, TwinsLSA

DEAD = gathered("DEAD", {})


def without_gradient(name: str, args: dict, block: nn.Module) -> set[str]:
    """The tensors whose gradient is zero by mathematics, in train mode, and why.

    - a bias in front of a batch norm: the norm subtracts it again;
    - what the family's own table `DEAD` names, with its reason.
    """
    dead: set[str] = DEAD[name](args) if name in DEAD else set()
    if name == "bam":
        dead = {k for k, _ in block.named_parameters() if k.endswith("conv.bias")}
    if name == "spatial_attention" and args.get("norm", True):
        dead = {"conv.bias"}
    return dead & {k for k, _ in block.named_parameters()}


@pytest.mark.parametrize(("case", "init"), CASES_BY_INIT)
def test_every_tensor_gets_a_gradient_within_two_steps(case, init):
    """Over 64 random inputs; those that mathematically cannot are named above, and really do not."""
    name, args = case
    block = build(name, 64, init=init, **args).double()
    x, target = noise(64, 64, 5, 4, dtype=torch.float64), noise(64, 64, 5, 4, seed=5, dtype=torch.float64)
    unused = torch.zeros(1, requires_grad=True)  # some published blocks have no parameter at all
    optimizer = torch.optim.Adam([*block.parameters(), unused], lr=1e-2)
    reached: dict[str, float] = dict.fromkeys(dict(block.named_parameters()), 0.0)
    for _ in range(2):
        optimizer.zero_grad()
        ((block(x) + unused) * target).sum().backward()
        for key, p in block.named_parameters():
            reached[key] = max(reached[key], 0.0 if p.grad is None else p.grad.abs().max().item())
        optimizer.step()
    dead = without_gradient(name, args, block)
    assert {k for k, g in reached.items() if g < 1e-9} == dead


@pytest.mark.parametrize(
    ("kind", "identity", "skip"), list(itertools.product(GATES, [True, False], [True, False]))
)
def test_gates_have_their_value_and_a_slope_at_zero(kind, identity, skip):
    """The identity forms are exactly 1 at 0 and pass a gradient; the published are as published."""
    z = torch.zeros(1, requires_grad=True)
    g = Gate(kind, identity=identity, skip=skip)(z)
    g.backward()
    published = {"sigmoid": 0.5, "hard_sigmoid": 0.5, "tanh": 0.0, "relu": 0.0}[kind] + skip
    assert g.item() == (1.0 if identity else published)
    slope = {"sigmoid": 0.5, "hard_sigmoid": 1 / 3, "tanh": 1.0, "relu": 1.0}
    if identity:
        assert z.grad.item() == pytest.approx(slope[kind])


def test_bam_product_zeroes_one_branch_and_the_sum_both():
    """Both factors at zero would be a saddle without any gradient."""
    product, total = build("bam"), build("bam", mode="sum")
    assert not product.spatial[-1].weight.any()
    assert product.channel[-1].weight.any()
    assert not total.spatial[-1].weight.any()
    assert not total.channel[-1].weight.any()


# --- norms ----------------------------------------------------------------------------------------

WITH_NORM = {n for n in NAMES if any(isinstance(m, nn.BatchNorm2d) for m in build(n).modules())}


@pytest.mark.parametrize(("name", "dims"), [(n, d) for n, d in DIMS if n in WITH_NORM - JOINT_NORM])
def test_one_value_per_channel_uses_the_running_statistics(name, dims):
    """Batch 1 at 1×1 in train mode equals eval mode and leaves every statistic as it was."""
    block = scrambled(name, dims=dims)
    x = noise(1, 16, *[1] * dims)
    before = {k: v.clone() for k, v in block.named_buffers()}
    y = block.train()(x)
    assert all(torch.equal(v, before[k]) for k, v in block.named_buffers())
    torch.testing.assert_close(y, block.eval()(x))


@pytest.mark.parametrize("shape", [(2, 3, 1, 1), (1, 3, 1, 2)])
def test_two_values_per_channel_are_a_batch(shape):
    """Two values have a mean and a variance: the norm works and updates as torch's."""
    ours, theirs = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    x = noise(*shape)
    assert torch.equal(normalize(ours, x), theirs(x))
    assert torch.equal(ours.running_var, theirs.running_var)
    assert ours.num_batches_tracked == 1


@pytest.mark.parametrize("name", sorted(WITH_NORM))
def test_sync_batchnorm_conversion_keeps_the_block_working(name):
    """After conversion the same function, the same tensors, and still batch 1 at 1×1 in train mode."""
    block = scrambled(name)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(block))
    assert any(isinstance(m, nn.SyncBatchNorm) for m in converted.modules())
    assert list(converted.state_dict()) == list(block.state_dict())
    for mode, shape in itertools.product((True, False), ((2, 16, 7, 5), (1, 16, 1, 1))):
        x = noise(*shape)
        torch.testing.assert_close(converted.train(mode)(x), block.train(mode)(x))


def test_a_synchronising_norm_takes_part_in_the_exchange(monkeypatch):
    """With other ranks present a SyncBatchNorm is called even for one value: skipping it would hang them."""
    called = []
    norm = nn.SyncBatchNorm(3)
    monkeypatch.setattr(norm, "forward", lambda x: called.append(x.shape) or x)
    normalize(norm, noise(1, 3, 1, 1))
    assert not called
    monkeypatch.setattr(gate, "_synchronises", lambda norm: True)
    normalize(norm, noise(1, 3, 1, 1))
    assert len(called) == 1


# --- precision ------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=label)
def test_output_keeps_the_inputs_dtype_under_autocast(case):
    """Float32 and low-precision inputs keep their dtype, stay near the float32 result, and train."""
    name, args = case
    for low in (torch.float16, torch.bfloat16):
        block, x = scrambled(name, **args), noise(2, 16, 7, 5)
        reference = block(x)
        with torch.autocast("cpu", low):
            for dtype in (torch.float32, low):
                y = block(x.to(dtype))
                assert y.dtype == dtype, low
                y.float().sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in block.parameters()), low
        error = (y.float() - reference).norm() / reference.norm()
        assert error < 0.1, low


@pytest.mark.parametrize("case", CASES, ids=label)
def test_large_values_in_half_precision_give_no_nan(case):
    """Inputs of ten thousand in float16 stay finite in the identity form, forward and backward."""
    name, args = case
    for autocast in (True, False):
        block = build(name, **args)
        if not autocast:
            block = block.half()
        x = (1e4 * noise(2, 16, 7, 5).sign()).half().requires_grad_()
        with torch.autocast("cpu", torch.float16, enabled=autocast):
            y = block(x)
        y.backward(torch.full_like(y, 1e-3))
        assert torch.equal(y, x), autocast
        assert torch.isfinite(x.grad).all(), autocast


@pytest.mark.parametrize("case", CASES, ids=label)
def test_gates_and_softmax_run_in_float32_under_autocast(case, monkeypatch):
    """Whatever precision the layers ran in, logits reach the gate (or the softmax) in float32."""
    name, args = case
    block = scrambled(name, **args)
    seen: set[torch.dtype] = set()

    def spy(function):
        return lambda z, *rest: seen.add(z.dtype) or function(z, *rest)

    monkeypatch.setattr(gate, "factor", spy(gate.factor))
    monkeypatch.setattr(torch, "softmax", spy(torch.softmax))
    with torch.autocast("cpu", torch.bfloat16):
        block.attention(noise(2, 16, 7, 5).bfloat16())
    assert seen == (set() if label(case) in NO_LOGITS else {torch.float32})


@pytest.mark.parametrize(
    ("name", "args", "mean"),
    [
        ("a2", {"bias": False}, lambda block, x: block.branch(x)),
        ("category_attention", {"classes": 2}, lambda block, x: block.weights(x)[1]),
        ("gc", {}, lambda block, x: block.context(x)),
        ("gc", {}, lambda block, x: fast_context.context(x, block.conv_attn)[1]),
    ],
)
def test_means_of_many_positions_survive_float16(name, args, mean):
    """Weights of one in a million and a half, as a volume has them, which float16 rounds by 2 %."""
    block = build(name, 2, dims=1, init="paper", **args).eval().requires_grad_(False)
    x = torch.ones(1, 2, 1_500_000)
    torch.testing.assert_close(
        mean(block.half(), x.half()).float(), mean(block.float(), x), rtol=4e-3, atol=0
    )


# --- what must stay as it is ----------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=label)
def test_input_is_never_written(case):
    """Forward and backward, in train and in eval mode, leave the input's values alone."""
    name, args = case
    block = scrambled(name, **args)
    x = noise(2, 16, 7, 5).requires_grad_()
    before = x.detach().clone()
    for mode in (True, False):
        block.train(mode)(x).sum().backward()
        block.attention(x)
    assert torch.equal(x.detach(), before)


@pytest.mark.parametrize("case", CASES, ids=label)
def test_memory_format_is_kept(case):
    """channels_last in, channels_last out; contiguous in, contiguous out; the same numbers."""
    name, args = case
    x = noise(2, 16, 7, 5)
    last = x.contiguous(memory_format=torch.channels_last)
    for init, mode in itertools.product(("identity", "paper", "blend"), (True, False)):
        said = f"{init} {'train' if mode else 'eval'}"
        block = scrambled(name, init=init, **args).train(mode)
        y, z = block(x), block(last)
        assert y.is_contiguous(), said
        assert z.is_contiguous(memory_format=torch.channels_last), said
        torch.testing.assert_close(y, z, rtol=1e-4, atol=1e-5, msg=which(said))
        moved = block.to(memory_format=torch.channels_last)
        assert moved(last).is_contiguous(memory_format=torch.channels_last), said


@pytest.mark.parametrize("name", [n for n, d in DIMS if d == 3])
def test_memory_format_of_volumes_is_kept(name):
    """The same in three dimensions."""
    block, x = scrambled(name, dims=3), noise(2, 16, 3, 5, 4)
    y = block(x.contiguous(memory_format=torch.channels_last_3d))
    assert y.is_contiguous(memory_format=torch.channels_last_3d)
    assert block(x).is_contiguous()


@pytest.mark.parametrize("case", CASES, ids=label)
def test_blocks_can_be_planned_on_meta(case):
    """Built and run on the meta device, as a plan does to count: shapes only, no memory, no number."""
    name, args = case
    with torch.device("meta"):
        block = registry.create_block(name, 16, **args)
        y = block(torch.empty(2, 16, 7, 5))
    assert y.is_meta
    assert y.shape == (2, 16, 7, 5)


@pytest.mark.parametrize("case", CASES, ids=label)
def test_checkpointing_recomputes_the_same_gradients(case):
    """Under activation checkpointing the gradients are those without it."""
    name, args = case
    grads = []
    for checkpointed in (False, True):
        block, x = scrambled(name, **args), noise(2, 16, 7, 5).requires_grad_()
        y = checkpoint(block, x, use_reentrant=False) if checkpointed else block(x)
        y.sum().backward()
        grads.append([x.grad, *(p.grad for p in block.parameters())])
    for plain, again in zip(*grads, strict=True):
        torch.testing.assert_close(again, plain, rtol=0, atol=0)


@pytest.mark.parametrize("case", CASES, ids=label)
def test_forward_draws_no_random_number_and_is_deterministic(case):
    """The generator's state stays, and deterministic algorithms are never refused, backward included."""
    name, args = case
    for mode in ("train", "eval"):
        block = scrambled(name, **args).train(mode == "train")
        state = torch.get_rng_state()
        torch.use_deterministic_algorithms(True)
        try:
            runs = []
            for _ in range(2):
                block.zero_grad()
                x = noise(2, 16, 7, 5).requires_grad_()
                block(x).sum().backward()
                runs.append([x.grad, *(p.grad for p in block.parameters())])
        finally:
            torch.use_deterministic_algorithms(False)
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True)), mode
        assert torch.equal(torch.get_rng_state(), state), mode


@pytest.mark.parametrize(("name", "dims"), DIMS)
def test_any_size_down_to_one_position(name, dims):
    """Every combination of sides 1, 2 and 3 keeps its shape, also where pooling by 2 would vanish."""
    block = scrambled(name, dims=dims)
    variants = [block, scrambled(name, dims=dims, sub_sample=True)] if name == "nonlocal" else [block]
    for size in itertools.product((1, 2, 3), repeat=dims):
        for b in variants:
            assert b(noise(2, 16, *size)).shape == (2, 16, *size)
    assert block(noise(1, 16, *SIZES[dims])).shape == (1, 16, *SIZES[dims])


def test_sub_sampling_keeps_a_lone_position_and_drops_an_odd_last_one():
    """A side of 1 stays, of 2 and 3 becomes 1, of 5 becomes 2; the depth of a volume is not pooled."""
    for size, pooled in (
        ((1,), (1,)),
        ((3,), (1,)),
        ((1, 1), (1, 1)),
        ((1, 5), (1, 2)),
        ((2, 1), (1, 1)),
        ((5, 1, 4), (5, 1, 2)),
    ):
        x = noise(2, 3, *size)
        assert halve(x).shape == (2, 3, *pooled)
    assert torch.equal(halve(x)[..., 0], x[..., :2].amax(-1))
    rows = scrambled("nonlocal", sub_sample=True).attention(noise(1, 16, 1, 1))["rows"]
    assert torch.equal(rows, torch.ones(1, 1, 1))


def test_registry_rows_agree_with_their_classes():
    """A row's dimensions are those that its class accepts, and paper, equation and summary are there."""
    for name in NAMES:
        spec = registry.get(name)
        assert set(spec.dims) <= set(spec.cls.supported_dims)
        assert spec.paper
        assert spec.equation
        assert spec.summary
        assert spec.paper in (spec.cls.__doc__ or "")


@pytest.mark.parametrize("name", NAMES)
def test_docstrings_name_formula_source_options_and_deviations(name):
    """Whoever reads `help(block)` finds paper and equation, deviations, every option (here or at `Block`), and shapes."""
    cls = registry.get(name).cls
    text = cls.__doc__ or ""
    assert re.search(r"\b(eq\.|section|figure)", text)
    assert "Deviations: " in text
    source = "".join(c.__doc__ or "" for c in (cls, Block, *((TwinsLSA, TwinsGSA) if cls is Twins else ())))
    assert [option for option in cls.options if f"`{option}`" not in source] == []
    for method in (cls.forward, cls.transform, cls.attention):
        assert method.__doc__
        assert re.search(r"\(B, C, \*S\).*→", method.__doc__), method
