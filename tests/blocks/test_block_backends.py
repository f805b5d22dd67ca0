"""The fast forms of blocks: the same function and gradients as the plain definition, wherever they run."""

from __future__ import annotations

import copy
import gc
import itertools
import pickle
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from block_cases import CASES, SIZES, build, label, noise, scrambled
from small import which
from test_block_memory import grad_fns
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attninject.blocks import registry
from attninject.blocks.channel import SE
from attninject.blocks.fast import dispatch
from attninject.blocks.fast.function import FastFunction

FAST = [c for c in CASES if getattr(registry.get(c[0]).cls, "fast_from", None) is not None]
NAMES = sorted({name for name, _ in FAST})
DEFAULTS = [(name, {}) for name in NAMES]
FORMATS = (torch.contiguous_format, torch.channels_last)
NO_DOUBLE_BACKWARD = {"danet", "danet_pam", "nonlocal"}
"""Blocks whose plain form runs in torch's fused attention, which has neither that nor forward mode."""
PAIRWISE = {"danet", "danet_pam", "danet_cam", "nonlocal"}
"""Blocks whose time grows with the square of positions or channels."""
PLAIN_ONLY = {
    ("scse", "max"), ("scse", "multiply"), ("cbam", "parallel"),
    ("nonlocal", "concatenation"),
}  # fmt: skip
"""(block, mode or order) without a fast form."""


def has_fast_form(case: tuple[str, dict[str, Any]]) -> bool:
    """Whether these options have a fast form at all."""
    name, args = case
    return (name, args.get("mode", args.get("order"))) not in PLAIN_ONLY


def rounded(*shape: int, **kwargs: Any) -> Tensor:
    """Halves of whole numbers, zero where negative: many ties, whole channels of zeros after a relu."""
    x = (2 * noise(*shape, **kwargs)).round().clamp(min=0) / 2
    x[:, ::3] = 0
    return x


INPUTS: dict[str, Callable[..., Tensor]] = {
    "random": noise,
    "ties": rounded,
    "zeros": lambda *shape, **kwargs: torch.zeros(shape, dtype=kwargs.get("dtype")),
    "constant": lambda *shape, **kwargs: torch.full(shape, 0.75, dtype=kwargs.get("dtype")),
}


def is_fast(y: Tensor) -> bool:
    """Whether a fast form made y."""
    forms = (c for c in FastFunction.__subclasses__() if c.__module__.startswith("attninject.blocks.fast."))
    names = {c.__name__ + "Backward" for c in forms}
    return bool(grad_fns(y) & names)


def step(block: nn.Module, x: Tensor, backend: str, g: Tensor | None = None) -> list[Tensor | None]:
    """Output, and the gradients of the input and of every parameter, of a weighted sum of the output."""
    block.zero_grad()
    x = x.detach().requires_grad_(x.is_floating_point())
    with dispatch.backend(backend):
        y = block(x)
    y.backward(noise(*y.shape, seed=9, dtype=y.dtype) if g is None else g)
    return [y.detach(), x.grad, *(p.grad for p in block.parameters())]


def assert_equal_steps(block: nn.Module, x: Tensor, said: str = "both backends") -> None:
    """Both backends give the same values and gradients; else `said` stands before what differs."""
    plain, fast = step(block, x, "plain"), step(block, x, "fast")
    for a, b in zip(fast, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=which(said))


# --- the same numbers -----------------------------------------------------------------------------


@pytest.mark.parametrize("case", FAST, ids=label)
def test_values_and_gradients_equal_the_definitions(case):
    """In float64, with ties, zeros and constants, in both memory formats, for batch 1 and one position."""
    name, args = case
    block = scrambled(name, init="paper", **args).double()
    for kind, inputs in INPUTS.items():
        for shape in ((3, 16, 7, 5), (1, 16, 4, 6)):
            x = inputs(*shape, dtype=torch.float64)
            for layout in FORMATS:
                said = f"{kind}, {shape}, {layout}"
                assert_equal_steps(copy.deepcopy(block), x.to(memory_format=layout), said)
        one = inputs(1, 16, 1, 1, dtype=torch.float64)
        assert_equal_steps(copy.deepcopy(block).eval(), one, f"{kind}, one position")


@pytest.mark.parametrize("name", NAMES)
def test_sequences_and_volumes_too(name):
    """One and three dimensions, in both layouts: a token sequence lies as a transposed (B, N, C)."""
    for dims in (1, 3):
        block = scrambled(name, dims=dims).double()
        x = noise(2, 16, *SIZES[dims], dtype=torch.float64)
        last = x.movedim(1, -1).contiguous().movedim(-1, 1)
        for given in (x, last):
            assert_equal_steps(block, given, f"{dims} dimensions, strides {given.stride()}")
            with dispatch.backend("fast"):
                assert block(given).stride() == given.stride()


@pytest.mark.parametrize("case", FAST, ids=label)
def test_the_fast_form_is_what_ran(case):
    """The graph holds a Function of the fast forms when asked for, and none under `backend="plain"`."""
    name, args = case
    block, plain = scrambled(name, **args), scrambled(name, backend="plain", **args)
    x = noise(2, 16, 7, 5).requires_grad_()
    assert not is_fast(block(x))  # small
    with dispatch.backend("fast"):
        assert is_fast(block(x)) is has_fast_form(case)
    large = torch.zeros(1, 16, 200, 200).requires_grad_()  # not run by those that compare all positions
    if name not in PAIRWISE:
        assert is_fast(block(large)) is has_fast_form(case)
        assert not is_fast(plain(large))


@pytest.mark.parametrize("case", [c for c in FAST if has_fast_form(c)], ids=label)
def test_pieces_do_not_show(case, monkeypatch):
    """A map cut into one sample a piece, or into several, gives the numbers of a map in one."""
    from attninject.blocks.fast import affinity, primitives

    name, args = case
    block, x = scrambled(name, **args).double(), noise(5, 16, 6, 7, dtype=torch.float64)
    found = []
    for size in (1, 2 * x[0].numel(), 10 * x.numel()):
        monkeypatch.setattr(primitives, "_PIECE", size)
        monkeypatch.setattr(affinity, "_BLOCK", size)
        found.append(step(copy.deepcopy(block), x, "fast"))
    for other in found[1:]:
        for a, b in zip(other, found[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_odd_strides_take_the_plain_form(name):
    """Slices, expanded and reversed maps give the definition's gradients."""
    block = scrambled(name).double()
    base = noise(2, 16, 7, 10, dtype=torch.float64)
    for x in (base[..., ::2], base[:, :, :, :5], base[:1].expand(3, -1, -1, -1), base.transpose(2, 3)):
        assert_equal_steps(copy.deepcopy(block), x)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_any_layout_come_in(name):
    """An expanded, transposed or differently laid out gradient is read right and never written."""
    block = scrambled(name).double()
    g = noise(2, 16, 7, 5, dtype=torch.float64).transpose(2, 3)
    one = torch.ones((), dtype=torch.float64).expand_as(g)
    for layout in FORMATS:
        x = noise(2, 16, 5, 7, dtype=torch.float64).to(memory_format=layout)
        for given in (g, g.contiguous(), g.contiguous(memory_format=torch.channels_last), one):
            before = given.clone()
            plain, fast = (step(copy.deepcopy(block), x, backend, given) for backend in ("plain", "fast"))
            assert torch.equal(given, before)
            for a, b in zip(fast, plain, strict=True):
                said = which(layout, given.stride())
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=said)


def bias_terms(block: nn.Module) -> dict[str, float]:
    """Filled by a backward: a bias's key → the norm over the channels of Σ|∂/∂(layer output)| over samples and positions.

    The gradient of a bias is the sum of these without the |·|. In front of a batch norm, or added to all keys of
    a softmax, it is zero by mathematics, and what is computed is the rounding errors of terms that cancel:
    their size is that of the terms, and says nothing relative to the sum.
    """
    found: dict[str, float] = {}
    for name, layer in block.named_modules():
        if getattr(layer, "bias", None) is not None:
            axis = -1 if isinstance(layer, (nn.Linear, nn.LayerNorm)) else 1

            def note(
                layer: nn.Module, given: Any, grads: Any, key: str = f"{name}.bias", axis: int = axis
            ) -> None:
                found[key] = float(grads[0].abs().movedim(axis, -1).flatten(0, -2).sum(0).norm())

            layer.register_full_backward_hook(note)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", DEFAULTS, ids=label)
def test_low_precision_stays_near_the_float64_formula(case, dtype):
    """In float32, bfloat16 and float16 the fast form is no further from the truth than twice the plain."""
    name, args = case
    block, x = scrambled(name, **args), 0.5 * noise(2, 16, 12, 9)
    exact = copy.deepcopy(block).double()
    terms = bias_terms(exact)
    truth = step(exact, x.to(dtype).double(), "plain")
    keys = ["", "", *(key for key, _ in block.named_parameters())]  # output and input come first
    sizes = [max(float(t.norm()), terms.get(key, 0.0)) for key, t in zip(keys, truth, strict=True)]
    errors = {}
    for backend in ("plain", "fast"):
        found = step(copy.deepcopy(block).to(dtype), x.to(dtype), backend)
        assert all(t.dtype == dtype for t in found if t is not None)
        errors[backend] = [float((a.double() - b).norm()) for a, b in zip(found, truth, strict=True)]
    # Pairwise, the sum of the 216 positions rounds log2(216) < 8 times, each by half an eps of Σ|terms|; the
    # terms have been rounded before, which is given as much again.
    slack = 8 * torch.finfo(dtype).eps
    for key, size, plain, fast in zip(keys, sizes, errors["plain"], errors["fast"], strict=True):
        assert fast <= 2 * plain + slack * size, key


@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_autocast(name, low):
    """Under autocast the fast form is as near the truth as the plain, backward outside and inside of it."""
    block, x = scrambled(name), noise(2, 16, 7, 5)
    for dtype in (torch.float32, low):
        found = {}
        for backend in ("truth", "plain", "fast"):
            inner, given = copy.deepcopy(block), x.clone().to(dtype)
            if backend == "truth":
                inner, given = inner.double(), given.double()
            given.requires_grad_()
            with (
                torch.autocast("cpu", low, enabled=backend != "truth"),
                dispatch.backend("fast" if backend == "fast" else "plain"),
            ):
                y = inner(given)
                assert y.dtype == given.dtype
                y.double().square().sum().backward(retain_graph=True)
            y.double().square().sum().backward()
            found[backend] = [
                t.detach().double() for t in (y, given.grad, *(p.grad for p in inner.parameters()))
            ]
        least = 1e-2 * max(float(t.norm()) for t in found["truth"])
        for truth, plain, fast in zip(*found.values(), strict=True):
            errors = [float((t - truth).norm() / (least + truth.norm())) for t in (plain, fast)]
            assert errors[1] <= 2 * errors[0] + 8 * torch.finfo(low).eps


@pytest.mark.parametrize("case", FAST, ids=label)
def test_identity_is_exact(case):
    """Fresh, the fast form returns its input bit for bit in every dtype, in train and in eval mode."""
    name, args = case
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        block = build(name, **args).to(dtype)
        for shape, layout in itertools.product(((1, 16, 1, 1), (2, 16, 7, 5)), FORMATS):
            x = noise(*shape, dtype=dtype).to(memory_format=layout)
            with dispatch.backend("fast"):
                same = [torch.equal(block.train(mode)(x), x) for mode in (True, False)]
            assert all(same), (dtype, shape, layout)


# --- autograd ---------------------------------------------------------------------------------------


def functional(block: nn.Module) -> Callable[..., Tensor]:
    """The block as a function of x and all its parameters."""
    names = [n for n, _ in block.named_parameters()]

    def call(x: Tensor, *values: Tensor) -> Tensor:
        with dispatch.backend("fast"):
            return torch.func.functional_call(block, dict(zip(names, values, strict=True)), (x,))

    return call


def check_inputs(name: str, args: dict[str, Any], layout: torch.memory_format) -> tuple[nn.Module, list]:
    """A tiny block in eval mode, and what gradcheck varies."""
    block = scrambled(name, 4, **{"reduction": 2, **args} if "reduction" in options(name) else args)
    block = block.double().eval()
    x = noise(2, 4, 3, 2, dtype=torch.float64).to(memory_format=layout)
    return block, [t.detach().clone().requires_grad_() for t in (x, *block.parameters())]


def options(name: str) -> Any:
    """A block's table of options."""
    return registry.get(name).cls.options


@pytest.mark.parametrize("case", [c for c in FAST if has_fast_form(c)], ids=label)
def test_gradcheck(case):
    """Numerical derivatives agree in both memory formats, with respect to x and every parameter."""
    for layout in FORMATS:
        block, inputs = check_inputs(*case, layout)
        torch.autograd.gradcheck(functional(block), inputs, fast_mode=True)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(c, id=label(c), marks=[pytest.mark.slow] if c[1] else [])
        for c in FAST
        if has_fast_form(c) and c[1].get("gate") != "hard_sigmoid"  # torch has no second derivative of it
    ],
)
def test_gradgradcheck(case):
    """Derivatives of the backward agree too."""
    block, inputs = check_inputs(*case, torch.contiguous_format)
    torch.autograd.gradgradcheck(functional(block), inputs, fast_mode=True)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in NO_DOUBLE_BACKWARD])
def test_gradient_penalty_equals_the_plain_one(name):
    """The gradient of the gradient's norm, ties included, reaches x and the parameters alike."""
    block = scrambled(name).double()
    found = {}
    for backend in ("plain", "fast"):
        inner, x = copy.deepcopy(block), rounded(2, 16, 4, 3, dtype=torch.float64).requires_grad_()
        with dispatch.backend(backend):
            y = inner(x)
        (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        g.square().sum().backward()
        found[backend] = [g, x.grad, *(p.grad for p in inner.parameters())]
    for a, b in zip(found["fast"], found["plain"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_only_some_tensors_want_a_gradient(name):
    """Frozen inputs and frozen parameters get none, the others the same as ever."""
    block = scrambled(name).double()
    chosen = list(block.parameters())
    wanted = {"input": [], "parameters": chosen, "first": chosen[:1], "last": chosen[-1:]}
    for who, learning in wanted.items():
        for p in chosen:
            p.requires_grad_(any(p is w for w in learning))
        found = {}
        for backend in ("plain", "fast"):
            inner = copy.deepcopy(block)
            x = noise(2, 16, 5, 4, dtype=torch.float64).requires_grad_(who == "input")
            with dispatch.backend(backend):
                y = inner(x)
            y.backward(noise(2, 16, 5, 4, seed=3, dtype=torch.float64))
            found[backend] = [x.grad, *(p.grad for p in inner.parameters())]
        for a, b in zip(found["fast"], found["plain"], strict=True):
            assert (a is None) == (b is None), who
            if a is not None:
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=which(who))


@pytest.mark.parametrize("name", NAMES)
def test_backward_twice_and_in_parts(name):
    """A graph that is kept gives the same gradients again, and parts of them one by one."""
    block, x = scrambled(name).double(), noise(2, 16, 5, 4, dtype=torch.float64).requires_grad_()
    with dispatch.backend("fast"):
        y = block(x)
    g = noise(2, 16, 5, 4, seed=3, dtype=torch.float64)
    wanted = [x, *block.parameters()]
    whole = torch.autograd.grad(y, wanted, g, retain_graph=True)
    again = torch.autograd.grad(y, wanted, g, retain_graph=True)
    single = [torch.autograd.grad(y, t, g, retain_graph=True)[0] for t in wanted]
    for a, b, c in zip(whole, again, single, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(c, a, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_several_gradients_at_once_are_those_one_by_one(name):
    """`is_grads_batched`, as `torch.autograd.functional.jacobian(vectorize=True)` uses it."""
    block, x = scrambled(name).double(), noise(1, 16, 3, 2, dtype=torch.float64).requires_grad_()
    with dispatch.backend("fast"):
        y = block(x)
    g = noise(3, 1, 16, 3, 2, seed=3, dtype=torch.float64)
    (batched,) = torch.autograd.grad(y, x, g, is_grads_batched=True, retain_graph=True)
    for i in range(3):
        (one,) = torch.autograd.grad(y, x, g[i], retain_graph=True)
        torch.testing.assert_close(batched[i], one, rtol=1e-9, atol=1e-9)


def test_a_loss_on_an_inner_value_adds_its_share():
    """A hooked layer inside a block may have a loss of its own, alone or beside the block's."""
    for weights in ((1.0, 1.0), (0.0, 1.0)):
        found = {}
        for backend in ("plain", "fast"):
            block, seen = scrambled("cbam").double(), []
            block.channel.fc1.register_forward_hook(lambda *a, seen=seen: seen.append(a[2]))
            x = noise(2, 16, 5, 4, dtype=torch.float64).requires_grad_()
            with dispatch.backend(backend):
                y = block(x)
            inner = sum(t.square().sum() for t in seen)
            (weights[0] * y.square().sum() + inner if weights[0] else inner).backward()
            found[backend] = [x.grad, block.channel.fc1.weight.grad]
        for a, b in zip(found["fast"], found["plain"], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_checkpointing_changes_nothing_and_counts_once(name):
    """Recomputed activations give the same gradients; batch norms see the batch as often as without."""
    found = {}
    for backend in ("plain", "fast"):
        block, x = scrambled(name).double(), noise(2, 16, 5, 4, dtype=torch.float64).requires_grad_()
        with dispatch.backend(backend):
            y = checkpoint(block, x, use_reentrant=False)
            y.square().sum().backward()
        found[backend] = [x.grad, *(p.grad for p in block.parameters()), *block.buffers()]
    for a, b in zip(found["fast"], found["plain"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_writing_on_the_input_before_the_backward_is_an_error():
    """As with torch's own operations, never a silently wrong gradient."""
    block, x = scrambled("se"), noise(2, 16, 5, 4).requires_grad_()
    inner = x * 1
    with dispatch.backend("fast"):
        y = block(inner)
    inner.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("name", NAMES)
def test_deterministic_algorithms(name):
    """Two runs are bit-equal, and nothing is refused."""
    torch.use_deterministic_algorithms(True)
    try:
        first, again = (step(scrambled(name), rounded(2, 16, 7, 5), "fast") for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


# --- who looks through the formula gets the plain form ---------------------------------------------


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated")  # in torch's own jvp rules
@pytest.mark.parametrize("name", [n for n in NAMES if n not in NO_DOUBLE_BACKWARD])
def test_functorch_forward_mode_and_tracing_see_the_definition(name):
    """vmap, grad, jvp, forward-mode AD and jit.trace work at any size, on the plain form."""
    block = scrambled(name).eval()
    x, v = noise(2, 16, 5, 4), noise(2, 16, 5, 4, seed=4)
    with dispatch.backend("plain"):
        y, tangent = torch.func.jvp(block, (x,), (v,))
        gradient = torch.func.grad(lambda x: block(x).square().sum())(x)
    with dispatch.backend("fast"):
        torch.testing.assert_close(torch.func.jvp(block, (x,), (v,))[1], tangent)
        torch.testing.assert_close(torch.func.grad(lambda x: block(x).square().sum())(x), gradient)
        torch.testing.assert_close(torch.func.vmap(lambda x: block(x[None])[0])(x), y)
        with torch.autograd.forward_ad.dual_level():
            dual = block(torch.autograd.forward_ad.make_dual(x, v))
            torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, tangent)


def test_proxies_of_symbolic_tracing_take_the_plain_form():
    """A torch.fx proxy has no size to decide by."""
    proxy = torch.fx.Proxy(torch.fx.Graph().placeholder("x"))
    with dispatch.backend("fast"):
        assert dispatch.form(proxy, SE(4)) == "plain"


@pytest.mark.parametrize("name", NAMES)
def test_export_holds_no_python_function(name):
    """An exported program is made of torch's operators, and serves large maps."""
    block = scrambled(name).eval()
    with dispatch.backend("fast"):
        program = torch.export.export(block, (noise(2, 16, 6, 5),))
    assert all("autograd" not in str(node.target) for node in program.graph.nodes)
    x = noise(2, 16, 6, 5)
    torch.testing.assert_close(program.module()(x), block(x))


def test_compiled_graphs_are_the_definitions():
    """fullgraph compilation of a large map meets no Function and no size check."""
    torch.compiler.reset()
    block = scrambled("cbam")
    compiled = torch.compile(copy.deepcopy(block), backend="eager", fullgraph=True)
    x = noise(1, 16, 200, 200).requires_grad_()
    y = compiled(x)
    assert not is_fast(y)
    torch.testing.assert_close(y, block(x), rtol=1e-4, atol=1e-5)
    torch.compiler.reset()


def test_tensor_subclasses_take_the_plain_form():
    """A subclass that counts its operations sees all of them."""

    class Mine(torch.Tensor):
        pass

    x = noise(2, 16, 5, 4).as_subclass(Mine)
    with dispatch.backend("fast"):
        assert not is_fast(scrambled("se")(x))


# --- modules stay modules ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_layers_hooks_run_as_often_as_in_the_plain_form(name):
    """Forward hooks on any submodule are called, so adapters and pruning see every layer."""
    counts = {}
    for backend in ("plain", "fast"):
        block, seen = scrambled(name), []
        for key, module in block.named_modules():
            module.register_forward_hook(lambda *_, key=key, seen=seen: seen.append(key))
        with dispatch.backend(backend):
            block(noise(2, 16, 5, 4))
        counts[backend] = sorted(seen)
    assert counts["fast"] == counts["plain"]


def test_hooks_on_all_modules_see_every_layer():
    """A profiler's global hook counts the halves of CBAM too."""
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module)))
    try:
        with dispatch.backend("fast"):
            scrambled("cbam")(noise(2, 16, 5, 4))
    finally:
        handle.remove()
    assert {registry.get(n).cls for n in ("cbam", "channel_attention", "spatial_attention")} <= set(seen)


def test_replaced_and_parametrized_layers_are_used():
    """An adapter in place of fc1, a spectral norm on the layer that reads the map: both count."""

    class Adapter(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer, self.extra = layer, nn.Parameter(torch.full((1,), 0.5, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + self.extra

    x = noise(2, 16, 5, 4, dtype=torch.float64)
    block = scrambled("se").double()
    block.fc1 = Adapter(block.fc1)
    assert_equal_steps(block, x)
    for name, layer in (("gc", "conv_attn"), ("scse", "spatial")):
        block = scrambled(name, reduction=4).double()
        before = step(block, x, "fast")[0]
        torch.nn.utils.parametrizations.weight_norm(getattr(block, layer))
        with torch.no_grad():
            getattr(block, layer).parametrizations.weight.original0.mul_(3)
        assert_equal_steps(block, x)
        assert not torch.allclose(step(block, x, "fast")[0], before)


def test_a_subclass_with_its_own_formula_is_never_bypassed():
    """Whoever overrides a method of a block gets what it says, at every size."""

    class Louder(SE):
        def merged(self, descriptors):
            return super().merged(descriptors) + 1

    class Twice(SE):
        def transform(self, x):
            return 2 * super().transform(x)

    x = noise(2, 16, 5, 4)
    generated = type("FSDPSE", (SE,), {"__deepcopy__": lambda self, memo: self})
    assert generated.fast_from == SE.fast_from  # which changes no formula
    for cls in (Louder, Twice):
        block = cls(16)
        plain = step(block, x, "plain")
        assert torch.equal(step(block, x, "fast")[0], plain[0])
        assert not torch.equal(plain[0], x)


@pytest.mark.parametrize("name", NAMES)
def test_copies_keep_the_backend(name):
    """`backend` survives deepcopy and pickling, is in the repr, and is no key of the state dict."""
    block = scrambled(name, backend="plain")
    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert other.backend == "plain"
    assert "backend='plain'" in repr(block)
    assert list(block.state_dict()) == list(scrambled(name).state_dict())
    halves = [m for m in block.modules() if hasattr(m, "fast_from") and m.fast_from is not None]
    x = torch.zeros(1, 16, 200, 200).requires_grad_()
    if name not in {*PAIRWISE, "scse"}:
        assert all(half.backend == "plain" for half in halves)
        assert not is_fast(block(x))


def test_backend_is_checked():
    """A misspelt backend is refused with the choices."""
    with pytest.raises(Exception, match="backend: expected one of auto, plain"):
        build("se", backend="quick")
    with pytest.raises(ValueError, match="found 'quick'"), dispatch.backend("quick"):
        pass


# --- what a forward keeps ---------------------------------------------------------------------------

KEPT = {"se": 1.05, "eca": 1.05, "cbam": 1.1, "bam": 1.5, "gc": 1.1, "coord": 1.4, "scse": 1.1}
"""Block → the most that one training forward keeps, in sizes of the map."""


@pytest.mark.parametrize("name", KEPT)
def test_bytes_kept_for_backward(name):
    """What the forward keeps, the block's own parameters apart, with the default reduction."""
    for shape, layout in itertools.product(((1, 256, 56, 56), (4, 1024, 14, 14)), FORMATS):
        x = torch.randn(shape).to(memory_format=layout).requires_grad_()
        most = KEPT[name] * x.untyped_storage().nbytes()
        assert kept_bytes(build(name, shape[1]), x) <= most, (shape, layout)


def kept_bytes(block: nn.Module, x: Tensor) -> int:
    """Bytes that a fast forward keeps for its backward, the block's own parameters apart."""
    own = {p.untyped_storage().data_ptr() for p in block.parameters()}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = block(x)
    assert is_fast(y)
    return sum(kept.values())


@pytest.mark.parametrize("name", NAMES)
def test_a_forward_that_is_never_differentiated_frees_its_maps(name):
    """No cycle keeps the input alive once the output is gone, garbage collection or not."""
    block = scrambled(name)
    gc.disable()
    try:
        leaf = noise(2, 16, 5, 4).requires_grad_()
        x = leaf * 1
        gone = weakref.ref(x)
        with dispatch.backend("fast"):
            y = block(x)
        del x, y
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("name", NAMES)
def test_backward_in_several_threads(name):
    """Two threads that run the same kept graph at once do not read each other's gradients."""
    block, x = scrambled(name).double(), noise(2, 16, 5, 4, dtype=torch.float64).requires_grad_()
    with dispatch.backend("fast"):
        y = block(x)
    seeds = [noise(*y.shape, seed=seed, dtype=torch.float64) for seed in range(8)]

    def gradient(g: Tensor) -> Tensor:
        return torch.autograd.grad(y, x, g, retain_graph=True)[0]

    expected = [gradient(g) for g in seeds]
    with ThreadPoolExecutor(4) as pool:
        for found, alone in zip(pool.map(gradient, seeds), expected, strict=True):
            assert torch.equal(found, alone)
