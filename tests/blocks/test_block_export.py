"""Blocks alone under compile, export, ONNX, tracing, copying and pickling."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from block_cases import CASES, DIMS, NAMES, SIZES, SLOW_EXPORT, build, label, noise, scrambled
from small import skip_onnx_of_norms

FAST = ["se", "nonlocal"]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    """Each test compiles from scratch, so the limit on recompilations is never met."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("name", "train"),
    [
        pytest.param(n, train, id=f"{n}-{mode}", marks=[pytest.mark.slow] if slow else [])
        for n in NAMES
        for train, mode in ((True, "train"), (False, "eval"))
        for slow in [not train and n in SLOW_EXPORT]
    ],
)
def test_compile_makes_one_graph(name, train):
    """torch.compile with fullgraph gives the eager numbers and gradients, in train and in eval mode.

    Without a batch norm both modes are one graph: then eval mode belongs to the slow tier.
    """
    block = scrambled(name).train(train)
    compiled = torch.compile(copy.deepcopy(block), backend="eager", fullgraph=True)
    x = noise(2, 16, 7, 5)
    expected, y = block(x), compiled(x)
    torch.testing.assert_close(y, expected)
    expected.sum().backward()
    y.sum().backward()
    for a, b in zip(block.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.slow
@pytest.mark.parametrize("init", ["identity", "paper", "blend"])
@pytest.mark.parametrize("case", CASES, ids=label)
def test_compile_makes_one_graph_for_every_option(case, init):
    """The same for every option, in train mode at batch 1, 1×1 too, where a norm uses its statistics."""
    name, args = case
    block = scrambled(name, init=init, **args)
    compiled = torch.compile(copy.deepcopy(block), backend="eager", fullgraph=True)
    for shape in ((2, 16, 7, 5), (1, 16, 1, 1)):
        x = noise(*shape)
        torch.testing.assert_close(compiled(x), block(x))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dims"), DIMS)
def test_inductor_agrees(name, dims):
    """The default backend's generated code gives the eager numbers."""
    block = scrambled(name, dims=dims).eval()
    x = noise(2, 16, *SIZES[dims])
    torch.testing.assert_close(torch.compile(block, fullgraph=True)(x), block(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW_EXPORT else []) for n in NAMES]
)
def test_export_with_a_free_batch_and_size(name):
    """torch.export in eval mode; the program serves another batch and another size."""
    block = scrambled(name).eval()
    free = torch.export.Dim.AUTO
    x = noise(2, 16, 24, 18)  # large enough that no strided layer ends at 1, which torch would fix
    program = torch.export.export(block, (x,), dynamic_shapes=({0: free, 2: free, 3: free},))
    for shape in ((2, 16, 24, 18), (5, 16, 20, 10)):
        x = noise(*shape)
        torch.testing.assert_close(program.module()(x), block(x))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=label)
def test_export_of_every_option_in_train_and_eval_mode(case):
    """torch.export in both modes, with fixed shapes."""
    name, args = case
    for mode in (True, False):
        block = scrambled(name, **args).train(mode)
        x = noise(2, 16, 7, 5)
        expected = copy.deepcopy(block)(x)
        torch.testing.assert_close(torch.export.export(block, (x,)).module()(x), expected)


def onnx_output(block: torch.nn.Module, x: torch.Tensor, path: str) -> torch.Tensor:
    """The block's output as onnxruntime computes it."""
    import onnxruntime

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's exporter and onnxscript deprecate parts of themselves
        torch.onnx.export(block, (x,), path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


@pytest.mark.parametrize("name", FAST)
def test_onnx_parity(name, tmp_path):
    """onnxruntime computes what torch computes."""
    block, x = scrambled(name).eval(), noise(2, 16, 7, 5)
    skip_onnx_of_norms(block)
    y = onnx_output(block, x, str(tmp_path / "block.onnx"))
    torch.testing.assert_close(y, block(x).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("init", ["identity", "paper", "blend"])
@pytest.mark.parametrize("case", CASES, ids=label)
def test_onnx_parity_of_every_option(case, init, tmp_path):
    """The same for every option and init."""
    name, args = case
    block, x = scrambled(name, init=init, **args).eval(), noise(2, 16, 7, 5)
    y = onnx_output(block, x, str(tmp_path / "block.onnx"))
    torch.testing.assert_close(y, block(x).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, id=label(c), marks=[pytest.mark.slow] if c[1] else []) for c in CASES],
)
def test_jit_trace_without_a_warning_of_ours(case):
    """torch.jit.trace in eval mode gives the eager numbers; other options than the defaults: in the slow tier."""
    name, args = case
    block, x = scrambled(name, **args).eval(), noise(2, 16, 7, 5)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit.* is (deprecated|not supported)")
        traced = torch.jit.trace(block, (x,))
    torch.testing.assert_close(traced(x), block(x))


@pytest.mark.parametrize("case", CASES, ids=label)
def test_copies_are_independent(case):
    """A deepcopy and an unpickled copy compute the same, and changing them leaves the original alone."""
    name, args = case
    block, x = scrambled(name, **args).eval(), noise(2, 16, 7, 5)
    expected = block(x)
    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        torch.testing.assert_close(other(x), expected, rtol=0, atol=0)
        with torch.no_grad():
            for p in other.parameters():
                p.add_(0.3)
        assert not torch.equal(other(x), expected)
        assert torch.equal(block(x), expected)


@pytest.mark.parametrize("name", NAMES)
def test_state_dict_round_trip(name):
    """Strict loading into a fresh block reproduces the output."""
    block, x = scrambled(name).eval(), noise(2, 16, 7, 5)
    fresh = build(name).eval()
    fresh.load_state_dict(block.state_dict())
    assert torch.equal(fresh(x), block(x))
