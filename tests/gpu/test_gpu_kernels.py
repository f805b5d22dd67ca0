"""The kernels of the fast forms: on a card, or on a CPU in Triton's interpreter, beside the definitions in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import DTYPES, FORMATS
from torch import Tensor, nn

from attninject.bench import block_speed
from attninject.blocks import gpu, registry
from attninject.blocks.fast import dispatch
from attninject.blocks.fast.function import FastFunction

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings(
        "ignore:invalid value encountered:RuntimeWarning"
    ),  # the interpreter's numpy, at nan
]

NAMES = ("se", "channel_attention", "spatial_attention", "cbam", "eca", "gc", "scse", "bam", "coord")
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "se": [{"squeeze": "both"}], "channel_attention": [{"pool": "max"}], "cbam": [{"pool": "avg"}],
    "gc": [{"fusion": "both"}, {"fusion": "both", "pool": "avg"}], "bam": [{"mode": "sum"}],
}  # fmt: skip
CASES = [(name, args) for name in NAMES for args in ({}, *VARIANTS.get(name, ()))]
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 6e-2, torch.float16: 1e-2}
"""Of the difference, as a part of the right value, both as root mean squares, beside twice the plain form's own."""


@pytest.fixture(autouse=True)
def kernels(device: str, monkeypatch) -> None:
    """Convolutions in full float32; where the kernels do not run, these tests say why and are skipped."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    if device == "cpu" and not gpu.interpreted():
        pytest.skip("on a CPU these need TRITON_INTERPRET=1")
    if device == "cuda" and (why := gpu.trouble(torch.device(device))):
        pytest.skip(why)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ties(*shape: int) -> Tensor:
    """Halves of whole numbers, zero where negative; whole channels of zeros."""
    x = (2 * noise(*shape)).round().clamp(min=0) / 2
    x[:, ::3] = 0
    return x


def block(name: str, channels: int, **args: Any) -> nn.Module:
    narrow = {"reduction": 2} if "reduction" in registry.get(name).cls.options else {}
    return block_speed.scrambled(registry.create_block(name, channels, init="paper", **narrow, **args))


def step(module: nn.Module, x: Tensor, g: Tensor, form: str) -> list[Tensor]:
    """Output, the gradient of x, those of the parameters, in float64 on the CPU."""
    x = x.detach().requires_grad_()
    module.zero_grad()
    with dispatch.backend(form):
        y = module(x)
    assert form != "kernels" or "ByKernels" in type(y.grad_fn).__name__, type(y.grad_fn).__name__
    y.backward(g)
    assert x.grad is not None
    return [t.detach().double().cpu() for t in (y, x.grad, *(p.grad for p in module.parameters()))]


def off(found: list[Tensor], right: list[Tensor]) -> float:
    """The largest difference: of output and input's gradient in units of each, of parameters' in the largest's."""
    scales = [float(t.norm()) for t in right]
    scales[2:] = [max(scales[1:])] * len(
        scales[2:]
    )  # a bias in front of a norm has a gradient of rounding errors
    return max(float((a - b).norm()) / max(s, 1e-3) for a, b, s in zip(found, right, scales, strict=True))


def check(name: str, args: dict[str, Any], size: tuple[int, ...], inputs: Any, dtype: torch.dtype, memory_format: Any,
          device: str) -> None:  # fmt: skip
    """By kernels beside the definition in float64."""
    module = block(name, size[1], **args).train(size[0] > 1)
    x, g = inputs(*size).to(dtype), noise(*size, seed=1).to(dtype)
    right = step(copy.deepcopy(module).to(dtype).double(), x.double(), g.double(), "plain")
    mine = copy.deepcopy(module).to(device=device, dtype=dtype, memory_format=memory_format)
    moved = x.to(device=device, memory_format=memory_format)
    found = step(copy.deepcopy(mine), moved, g.to(device), "kernels")
    plain = 0.0 if dtype == torch.float32 else off(step(mine, moved, g.to(device), "plain"), right)
    assert off(found, right) < BOUNDS[dtype] + 2 * plain


@pytest.mark.parametrize("memory_format", FORMATS, ids=["NCHW", "channels_last"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join([case[0], *map(str, case[1].values())]))
def test_values_and_gradients(case, memory_format, device: str) -> None:
    """The definition's in float64: odd sides, ties in the maxima, a gradient of another layout."""
    for inputs in (noise, ties):
        check(*case, (2, 10, 5, 7), inputs, torch.float32, memory_format, device)


@pytest.mark.parametrize("name", NAMES)
def test_low_precision(name: str, device: str) -> None:
    """In bfloat16 and float16 no further from the definition in float64 than twice the plain form."""
    check(name, {}, (2, 10, 5, 7), noise, torch.bfloat16, torch.channels_last, device)
    check(name, {}, (2, 10, 5, 7), noise, torch.float16, torch.contiguous_format, device)


@pytest.mark.parametrize("name", ["se", "channel_attention", "cbam", "coord"])
def test_one_of_everything(name: str, device: str) -> None:
    """A single element, a single row, a single channel."""
    for size in ((1, 1, 1, 1), (1, 3, 1, 70), (2, 1, 3, 4)):
        check(name, {}, size, noise, torch.float32, torch.contiguous_format, device)


def test_many_tiles(device: str) -> None:
    """More channels and positions than one tile has, in both layouts."""
    for name in ("cbam", "coord"):
        module, x, g = block(name, 140), noise(1, 140, 3, 70), noise(1, 140, 3, 70, seed=1)
        right = step(copy.deepcopy(module).double(), x.double(), g.double(), "plain")
        for memory_format in FORMATS:
            mine = copy.deepcopy(module).to(device=device, memory_format=memory_format)
            found = step(mine, x.to(device=device, memory_format=memory_format), g.to(device), "kernels")
            assert off(found, right) < BOUNDS[torch.float32], (name, memory_format)


@pytest.mark.parametrize("dims", [1, 3])
def test_sequences_and_volumes(dims: int, device: str) -> None:
    """One and three dimensions; coordinate attention stays lean there."""
    shape = (2, 6, *{1: (9,), 3: (2, 3, 4)}[dims])
    for name in NAMES[:-1]:
        module = block_speed.scrambled(registry.create_block(name, 6, init="paper", dims=dims))
        x, g = noise(*shape), noise(*shape, seed=1)
        right = step(copy.deepcopy(module).double(), x.double(), g.double(), "plain")
        last = x.to(device).movedim(1, -1).contiguous().movedim(-1, 1)
        for given in (x.to(device), last):
            assert (
                off(step(copy.deepcopy(module).to(device), given, g.to(device), "kernels"), right) < 1e-4
            ), name


@pytest.mark.parametrize("name", NAMES)
def test_identity(name: str, device: str) -> None:
    """Fresh, x comes back bit for bit, the smallest and largest numbers and both zeros too."""
    for dtype in DTYPES:
        least = torch.finfo(dtype)
        module = registry.create_block(name, 16).to(device=device, dtype=dtype)
        x = noise(2, 16, 3, 5).to(dtype)
        flushed = device == "cpu" and dtype == torch.bfloat16  # by the interpreter
        subnormal = least.smallest_normal / (1 if flushed else 4)
        x[0, :4, 0, 0] = torch.tensor([0.0, -0.0, subnormal, least.smallest_normal], dtype=dtype)
        if name not in ("bam", "gc"):  # which multiply or exponentiate them on the way
            x[1, 0, 0, 0] = least.max / 64
        for memory_format in FORMATS:
            given = x.to(device=device, memory_format=memory_format)
            with dispatch.backend("kernels"):
                y = module(given.requires_grad_())
            bits = [t.detach().cpu().contiguous().view(torch.uint8) for t in (given, y)]
            signed = name != "gc"  # x + 0 has no negative zero, in the definition either
            assert torch.equal(*bits) if signed else torch.equal(y.detach().cpu(), x), dtype
            assert y.stride() == given.stride()


def same(found: Tensor, right: Tensor) -> bool:
    """Equal but for rounding; nan at the same places."""
    return torch.allclose(found.cpu().float(), right.cpu().float(), rtol=1e-2, atol=1e-2, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinity(dtype: torch.dtype, device: str) -> None:
    """Means and maxima are torch's: nan wins, infinities are maxima; their ties are counted."""
    from attninject.blocks.gpu import maps

    x = noise(2, 5, 3, 4).to(dtype)
    x[0, 0, 0, 0], x[0, 1, 1, 1], x[0, 2, 0, :2] = float("nan"), -float("inf"), float("inf")
    x[0, 3], x[1, 4] = -float("inf"), 2.0
    for memory_format in FORMATS:
        given = x.to(device=device, memory_format=memory_format)
        mean, top, count = maps.pooled(given, True, True)
        assert same(mean, x.mean((2, 3), keepdim=True))
        assert torch.equal(top.cpu().nan_to_num(7), x.amax((2, 3), keepdim=True).nan_to_num(7))
        assert count[0].flatten().tolist() == [0, 1, 2, 12, 1]
        assert count[1, 4].item() == 12
        mean, top, count = maps.pooled_across(given)
        assert same(mean, x.mean(1, keepdim=True))
        assert torch.equal(top.cpu().nan_to_num(7), x.amax(1, keepdim=True).nan_to_num(7))
        assert count[0, 0, 0].tolist() == [0, 1, 1, 1]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_spreads_as_in_the_definition(value: float, device: str) -> None:
    """Outputs and gradients are nan where the definition's are."""
    for name in ("channel_attention", "spatial_attention", "cbam", "scse", "gc"):
        module, x = block(name, 6).eval(), noise(2, 6, 3, 4)
        x[0, 1, 2, 3] = value
        g = noise(2, 6, 3, 4, seed=1)
        right, found = (
            step(copy.deepcopy(module).to(device), x.to(device), g.to(device), form)
            for form in ("plain", "kernels")
        )
        for mine, theirs in zip(found[:2], right[:2], strict=True):
            assert torch.equal(mine.isfinite(), theirs.isfinite()), name


@pytest.mark.parametrize("name", NAMES)
def test_second_derivatives_and_batched_gradients(name: str, device: str) -> None:
    """A gradient's gradient, and several gradients at once, are the definition's."""
    module, x = block(name, 6).eval().to(device), ties(2, 6, 3, 4).to(device)
    found = []
    for form in ("plain", "kernels"):
        given = x.clone().requires_grad_()
        with dispatch.backend(form):
            y = module(given)
        (g,) = torch.autograd.grad(y.square().sum(), given, create_graph=True)
        (twice,) = torch.autograd.grad(g.square().sum(), given, retain_graph=True)
        several = torch.stack([y.detach(), torch.ones_like(y)])
        (batch,) = torch.autograd.grad(y, given, several, is_grads_batched=True)
        found.append([g.detach(), twice, batch])
    for mine, right in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-3, atol=1e-3)


def test_gradients_that_do_not_come(device: str) -> None:
    """A loss of a descriptor alone, without the output; a map that wants no gradient; parameters that want none."""
    for name, part in (
        ("cbam", "spatial.conv"),
        ("se", "fc2"),
        ("spatial_attention", "conv"),
        ("scse", "conv"),
    ):
        module, x = block(name, 6).to(device), noise(2, 6, 3, 4).to(device)
        if part not in dict(module.named_modules()):
            part = next(n for n, m in module.named_modules() if isinstance(m, nn.Conv2d))
        grads = []
        for form in ("plain", "kernels"):
            heard: list[Tensor] = []
            inner, given = copy.deepcopy(module), x.clone().requires_grad_()
            inner.get_submodule(part).register_forward_hook(
                lambda m, args, out, heard=heard: heard.append(out)
            )
            with dispatch.backend(form):
                y = inner(given)
                heard[0].square().sum().backward()
                alone = given.grad.clone()
                fixed = copy.deepcopy(inner)
                fixed(x).sum().backward()
                for p in fixed.parameters():
                    p.requires_grad_(False)
                (of_x,) = torch.autograd.grad(fixed(given).sum(), given)
            assert y.shape == x.shape
            grads.append([alone, of_x, *(p.grad for p in fixed.parameters() if p.grad is not None)])
        for mine, right in zip(grads[1], grads[0], strict=True):
            torch.testing.assert_close(mine, right, rtol=1e-3, atol=1e-3)


def test_where_the_kernels_do_not_serve(device: str) -> None:
    """Float64 takes the lean form, odd strides and an empty batch the plain one, and so does torch.func."""
    module, other = block("cbam", 6).eval().to(device), block("se", 6).to(device)

    def form_of(call: Callable[[], Tensor]) -> str:
        with dispatch.backend("kernels"):
            return type(call().grad_fn).__name__

    x = noise(2, 6, 4, 8).to(device).requires_grad_()
    assert form_of(lambda: module(x)) == "RescaleByKernelsBackward"
    assert form_of(lambda: copy.deepcopy(module).double()(x.double())) == "RescaleBackward"
    assert form_of(lambda: other(x[..., ::2])) == "MulBackward0"
    assert module(x[:0]).shape == (0, 6, 4, 8)
    with dispatch.backend("kernels"):
        found = torch.func.grad(lambda t: module(t).square().sum())(x.detach())
    assert torch.equal(found, torch.autograd.grad(module(x).square().sum(), x)[0])
    one = torch.zeros((), device=device)
    assert not gpu.serves(one.expand(1, 2**16, 2**8, 2**8))
    assert gpu.serves(one.expand(2**17, 64, 2**8, 2**3))


def test_every_kernel_form_is_tried_here(device: str) -> None:
    """Each Function by kernels is one that a block above runs."""

    def below(kind: type) -> set[type]:
        return {kind}.union(*(below(k) for k in kind.__subclasses__()))

    def nodes(node: Any) -> set[str]:
        return {type(node).__name__}.union(*(nodes(n) for n, _ in node.next_functions if n is not None))

    ran: set[str] = set()
    for name in NAMES:
        with dispatch.backend("kernels"):
            y = block(name, 6).to(device)(noise(2, 6, 3, 4).to(device).requires_grad_())
        ran |= nodes(y.grad_fn)  # y is kept: a Function's node of older torch lives no longer than its result
    forms = {k.__name__ for k in below(FastFunction) if k.__name__.endswith("ByKernels")}
    assert forms <= {name.removesuffix("Backward") for name in ran}


@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(low: torch.dtype, device: str) -> None:
    """Under autocast a float32 map stays float32, and the gradients near the definition's."""
    for name in ("cbam", "bam"):
        module, x = block(name, 6).to(device), noise(2, 6, 5, 4).to(device)
        found = []
        for form in ("plain", "kernels"):
            inner, given = copy.deepcopy(module), x.clone().requires_grad_()
            with torch.autocast(device, low), dispatch.backend(form):
                y = inner(given)
                assert y.dtype == torch.float32
                y.square().sum().backward()
            found.append([y.detach(), given.grad])
        for mine, right in zip(found[1], found[0], strict=True):
            assert (mine - right).norm() < 3e-2 * right.norm()
