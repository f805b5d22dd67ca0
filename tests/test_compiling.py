"""Compiling the injected blocks: every block compiled once per mode and format, and nothing else changes."""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import attninject as ai

# torch looks at .grad of every input of a compiled region, and hides its own warning only where that is no error
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

WIDTHS = (
    4,
    6,
    8,
)  # with the carrier's, four kinds of block: in two modes and formats twice torch's limit of eight
FORMATS = (torch.contiguous_format, torch.channels_last)


class Unit(nn.Module):
    """A residual unit that widens: blocks go into its own forward."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 1)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        return y + y.relu()


class Net(nn.Module):
    """Two units of each width, and a Sequential at the end that carries a block."""

    def __init__(self, widths: tuple[int, ...] = (4, 6)) -> None:
        super().__init__()
        pairs = zip((3, *widths), widths, strict=False)
        self.units = nn.Sequential(*(u for a, b in pairs for u in (Unit(a, b), Unit(b, b))))
        self.tail = nn.Sequential(nn.Conv2d(widths[-1], widths[-1], 1), nn.Conv2d(widths[-1], 7, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.units(x))


def net(widths: tuple[int, ...] = (4, 6), block: str = "srm") -> nn.Module:
    """Two blocks of each width in rewritten forwards, one on a carrier, with gates that do something."""
    torch.manual_seed(0)
    model = ai.inject(Net(widths), block=block, after="units.*.bn", example_inputs=image())
    ai.inject(model, block=block, after="tail", example_inputs=image())
    assert {b.__dict__["_attninject_site"].mechanism for b in ai.injected(model).values()} == {
        "graph",
        "module",
    }
    with torch.no_grad():
        for one in ai.injected(model).values():
            for p in one.parameters():
                p.normal_()
    return model


class Counted:
    """A backend that runs graphs as they are and counts them."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: object) -> object:
        self.graphs += 1
        return graph.forward


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """What torch learnt of sizes in other tests would let it compile less here."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def limit_is_an_error() -> contextlib.AbstractContextManager[None]:
    """Running into torch's recompile limit raises."""
    import torch._dynamo as dynamo

    names = ("fail_on_recompile_limit_hit", "fail_on_cache_limit_hit")  # the latter in torch 2.6
    return dynamo.config.patch({next(n for n in names if hasattr(dynamo.config, n)): True})


@pytest.fixture
def limit() -> Iterator[None]:
    """Running into torch's recompile limit is an error."""
    with limit_is_an_error():
        yield


def image(size: int = 6, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, size, size - 1, generator=torch.Generator().manual_seed(size))


def agree(model: nn.Module, reference: nn.Module, x: Tensor, **tolerance: float) -> None:
    """Outputs and the input's gradients agree."""
    found = []
    for one in (model, reference):
        given = x.clone(memory_format=torch.preserve_format).requires_grad_()
        y = one(given)
        y.square().sum().backward()
        found.append((y.detach(), given.grad))
    torch.testing.assert_close(*found, **tolerance)


def test_many_widths_both_modes_and_formats_stay_under_the_limit(limit, caplog):
    """Four widths, train and eval, NCHW and channels_last: one graph each, no warning, the same numbers."""
    model, backend = net(WIDTHS), Counted()
    reference = copy.deepcopy(model)
    assert ai.compile_blocks(model, backend=backend, fullgraph=True) is model
    assert backend.graphs == 0
    with caplog.at_level(logging.WARNING):
        for done, (training, memory_format) in enumerate((t, f) for t in (True, False) for f in FORMATS):
            model.train(training), reference.train(training)
            agree(model, reference, image().to(memory_format=memory_format))
            assert backend.graphs == 4 * (done + 1)  # three widths, and the carrier's seven channels
    agree(model, reference, image())
    assert backend.graphs == 16
    assert not [r for r in caplog.records if "limit" in r.getMessage()]


def test_sizes_batches_and_no_grad_stay_under_the_limit_too(limit):
    """New sizes cost one more graph per block, whatever their number; so does running without gradients."""
    model, backend = net().eval(), Counted()
    reference = copy.deepcopy(model)
    ai.compile_blocks(model, backend=backend)
    for size in (6, 9, 12, 15):
        agree(model, reference, image(size))
    assert backend.graphs == 6
    agree(model, reference, image(batch=3))
    with torch.no_grad():
        torch.testing.assert_close(model(image()), reference(image()))
    assert backend.graphs <= 12


def torchs_own_way() -> None:
    """The same net, each block compiled by itself."""
    model = net(WIDTHS)
    for block in ai.injected(model).values():
        block.compile(backend="eager")
    with limit_is_an_error():
        model.train()(image())
        model.eval()(image())
        model(image().to(memory_format=torch.channels_last))


@pytest.mark.slow  # says something of torch, not of us
def test_torchs_own_way_runs_into_the_limit():
    """`block.compile()` does on the same net, so the tests above can fail.

    In a process of its own: torch's shared code for calling modules carries over what other tests compiled.
    """
    command = [sys.executable, "-W", "ignore", "-c", "import test_compiling; test_compiling.torchs_own_way()"]
    tests = Path(__file__).parent
    env = os.environ | {"PYTHONPATH": f"{tests.parent}{os.pathsep}{tests}"}
    done = subprocess.run(command, cwd=tests.parent, env=env, capture_output=True, text=True)
    assert done.returncode != 0
    assert "FailOnRecompileLimitHit" in done.stderr


def test_structure_copies_and_files_are_those_of_an_uncompiled_model(tmp_path: Path):
    """Keys, classes, pickles, copies, deltas: as before; a copy is independent and runs uncompiled."""
    model, backend = net().eval(), Counted()
    keys, classes = list(model.state_dict()), [type(m) for m in model.modules()]
    ai.compile_blocks(model, backend=backend)
    expected = model(image())
    assert list(model.state_dict()) == keys
    assert [type(m) for m in model.modules()] == classes
    assert ai.compile_blocks(nn.Sequential(model), backend=backend)[0] is model  # below another module
    graphs = backend.graphs
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(copied(image()), expected)
        with torch.no_grad():
            for block in ai.injected(copied).values():
                block.cfc.zero_()
        assert not torch.equal(copied(image()), expected)
    assert backend.graphs == graphs
    torch.testing.assert_close(model(image()), expected)
    ai.save(model, tmp_path / "delta.safetensors")
    torch.manual_seed(0)
    loaded = ai.load(Net().eval(), tmp_path / "delta.safetensors", example_inputs=image())
    torch.testing.assert_close(loaded(image()), expected)


def test_disabled_and_eject_work_on_compiled_blocks():
    """`disabled` measures the baseline, and `eject` gives the original back."""
    model = net().eval()
    baseline = ai.eject(copy.deepcopy(model))(image())
    ai.compile_blocks(model, backend="eager")
    assert not torch.equal(model(image()), baseline)
    with ai.disabled(model):
        assert torch.equal(model(image()), baseline)
    assert not torch.equal(model(image()), baseline)
    ai.eject(model, "units.3.*")
    assert len(ai.injected(model)) == 4
    assert torch.equal(ai.eject(model)(image()), baseline)


def test_the_way_back():
    """`disable=True` takes the compilation back; a clean model is returned as it is."""
    model, backend = net(), Counted()
    ai.compile_blocks(model, backend=backend)
    assert ai.compile_blocks(model, disable=True) is model
    model(image())
    assert backend.graphs == 0
    clean = Net()
    assert ai.compile_blocks(clean) is clean


def test_blocks_injected_later_are_compiled_by_a_second_call():
    """New blocks run as they are until `compile_blocks` is called again."""
    model, backend = net().eval(), Counted()
    ai.compile_blocks(model, backend=backend)
    ai.inject(model, block="se", after="units.0.conv", example_inputs=image())
    model(image())
    assert backend.graphs == 3
    ai.compile_blocks(model, backend=backend)
    model(image())
    assert backend.graphs == 3 + 4


def test_a_trained_step_equals_the_uncompiled_one():
    """A step of SGD leaves the same weights and statistics."""
    model = net().train()
    plain = copy.deepcopy(model)
    ai.compile_blocks(model, backend="aot_eager")
    for one in (model, plain):
        optimizer = torch.optim.SGD(one.parameters(), lr=0.1)
        one(image()).square().mean().backward()
        optimizer.step()
    torch.testing.assert_close(model.state_dict(), plain.state_dict())


def test_within_a_compiled_whole_exported_or_traced():
    """The whole model compiles without a break, exports and traces as if its blocks were not compiled."""
    model = net().eval()
    expected = model(image())
    inner, outer = Counted(), Counted()
    ai.compile_blocks(model, backend=inner)
    whole = torch.compile(model, backend=outer, fullgraph=True)
    torch.testing.assert_close(whole(image()), expected)
    assert (inner.graphs, outer.graphs) == (0, 1)
    assert ai.compile_blocks(whole, backend=inner) is whole
    torch.testing.assert_close(torch.export.export(model, (image(),)).module()(image()), expected)
    traced = torch.fx.symbolic_trace(model)
    assert [n.name for n in traced.graph.nodes if n.op == "call_module" and "srm" in n.target] != []
    torch.testing.assert_close(traced(image()), expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*:DeprecationWarning")
def test_traced_by_jit():
    """torch.jit.trace sees plain blocks."""
    model = ai.compile_blocks(net().eval(), backend="eager")
    torch.testing.assert_close(torch.jit.trace(model, image())(image()), model(image()))


class Breaking(nn.Module):
    """A block that no graph can hold whole."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = x * self.scale
        torch._dynamo.graph_break()
        return y.clone()


def test_a_foreign_block_that_breaks_the_graph_still_runs():
    """Options are torch's: without `fullgraph` such a block is compiled in pieces, with it refused."""
    import torch._dynamo as dynamo

    model = ai.inject(Net().eval(), block=Breaking, after="units.*.bn", example_inputs=image())
    expected = model(image())
    torch.testing.assert_close(ai.compile_blocks(model, backend="eager")(image()), expected)
    with pytest.raises(dynamo.exc.Unsupported):
        ai.compile_blocks(model, backend="eager", fullgraph=True)(image())


@pytest.mark.slow
@pytest.mark.parametrize("block", ["se", "cbam"])
def test_inductor(block, limit):
    """The default backend gives the same numbers in train and eval mode, in both formats."""
    model = net(block=block)
    reference = copy.deepcopy(model)
    ai.compile_blocks(model)
    for training in (True, False):
        model.train(training), reference.train(training)
        for memory_format in FORMATS:
            agree(model, reference, image().to(memory_format=memory_format), rtol=1e-4, atol=1e-4)
