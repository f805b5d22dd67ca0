"""timm's attention modules as blocks: the table, options, identity by blending, timm's own under `paper`."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys

import pytest
import timm
import torch
from block_cases import noise
from small import older
from timm.layers import create_attn, get_attn
from torch import nn

import attninject as ai
from attninject import errors
from attninject.blocks import foreign, registry
from attninject.blocks.gate import Blend


def entry(name: str) -> str:
    """timm's own name."""
    return name.removeprefix(foreign.PREFIX)


ENTRIES = set(re.findall(r"attn_type == '(\w+)'", inspect.getsource(get_attn)))
"""What the installed timm's factory makes."""
YOUNG = {"coord", "scoord", "ela", "strip"}
"""Entries that the oldest timm allowed does not have yet."""
ABSENT = pytest.mark.skip(f"timm {timm.__version__} has no such module yet")
SPECS = [
    pytest.param(spec, id=spec.name, marks=[ABSENT] if entry(spec.name) in YOUNG - ENTRIES else [])
    for spec in foreign.BLOCKS
]
NAMES = [pytest.param(p.values[0].name, id=p.id, marks=p.marks) for p in SPECS]


# --- the table ------------------------------------------------------------------------------------


def test_the_table_is_timms_factory():
    """Every entry of the installed timm's factory is a block or refused by name, and nothing else is."""
    blocks = {entry(spec.name) for spec in foreign.BLOCKS}
    refused = {entry(name) for name in foreign.REFUSED}
    assert (blocks | refused) - ENTRIES <= YOUNG
    assert blocks | refused >= ENTRIES
    assert not blocks & refused


@pytest.mark.parametrize("spec", SPECS)
def test_options_are_timms_and_keep_the_shape(spec):
    """Each option is timm's, with a default in our range; none of them changes the shape."""
    parameters = inspect.signature(get_attn(entry(spec.name))).parameters
    for option, check in spec.options.items():
        default = parameters[option].default
        assert default is None or check.accepts(default), option
    assert not set(spec.options) & {"out_channels", "dim_out", "stride", "padding", "feat_size", "drop_rate"}


def test_listing_and_checking_need_no_timm():
    """Names, rows and options are there before timm is imported; building the first block imports it."""
    code = (
        "import sys, attninject as ai\n"
        "from attninject.blocks import registry\n"
        "assert 'timm/eca' in ai.list_blocks() and registry.get('timm/eca').family == 'timm'\n"
        "assert registry.check_args('timm/eca', {'gama': 1}) and len(registry.block_table()) > 20\n"
        "assert 'timm' not in sys.modules\n"
        "ai.create_block('timm/eca', 8)\n"
        "assert 'timm' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", foreign.REFUSED)
def test_refused_entries_are_named_with_the_reason(name):
    """`registry.get` and a recipe give the reason, and it still holds for the installed timm."""
    reason = foreign.REFUSED[name]
    with pytest.raises(errors.UnknownBlockError, match=re.escape(f"{name!r} cannot be a block: {reason}")):
        registry.get(name)
    with pytest.raises(errors.RecipeError, match=re.escape(reason)):
        ai.parse_recipe(f"rules:\n  - {{block: {name}, after: x}}")
    assert name not in ai.list_blocks()
    if (since := re.search(r"as of ([\d.]+)\)", reason)) and older(timm.__version__, since.group(1)):
        return
    with pytest.raises((TypeError, AssertionError)):
        create_attn(entry(name), 16)(noise(2, 16, 9, 5))


@pytest.mark.parametrize(
    ("name", "channels", "args", "text"),
    [
        ("timm/sk", 7, {}, "does not build its 'sk' for 7 channels: AssertionError"),
        ("timm/lambda", 6, {"dim_head": 8}, "for 6 channels, dim_head=8: AssertionError:"),
        ("timm/eca", 8, {"kernel_size": 3}, "block 'timm/eca' has no argument 'kernel_size'"),
        ("timm/sk", 8, {"out_channels": 4}, "has no argument 'out_channels'"),
        ("timm/ela", 8, {"kernel_size": 4}, "kernel_size: expected an odd whole number >= 1, found 4"),
        ("timm/se", 8, {"rd_ratio": 0}, "rd_ratio: expected a number > 0, found 0"),
        ("timm/se", 8, {"gate_layer": "os.system"}, "gate_layer: expected one of sigmoid"),
        ("timm/se", 8, {"dims": 1}, "dims (spatial dimensions): expected 2, found 1"),
        ("timm/se", 8, {"init": "papers"}, "init: expected one of identity, paper, blend, found 'papers'"),
        ("timm/se", 0, {}, "channels: expected a whole number >= 1, found 0"),
        ("timm/ecaa", 8, {}, "did you mean 'timm/eca'"),
    ],
)
def test_refusals(name, channels, args, text):
    """Whatever cannot be built is refused by an error of the library's that says what is wrong."""
    with pytest.raises(errors.AttnInjectError) as caught:
        ai.create_block(name, channels, **args)
    assert text in str(caught.value)


# --- what is built --------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["identity", "blend"])
@pytest.mark.parametrize("name", NAMES)
def test_identity_is_exact_by_blending(name, init):
    """x comes back bit for bit, in train and eval mode, in three dtypes and under autocast, at odd sizes."""
    block = ai.create_block(name, 16, init=init)
    assert isinstance(block, Blend)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        block = block.to(dtype)
        for shape in ((2, 16, 7, 5), (2, 16, 1, 7), (3, 16, 2, 2)):
            x = noise(*shape, dtype=dtype)
            outputs = [block.train(mode)(x) for mode in (True, False)]
            assert all(y.dtype == dtype and torch.equal(y, x) for y in outputs), (dtype, shape)
    block, x = block.float(), noise(2, 16, 7, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(block(x), x)


@pytest.mark.parametrize("name", NAMES)
def test_paper_is_timms_own_module(name):
    """Bare: timm's class, timm's keys, and with the same seed timm's numbers."""
    torch.manual_seed(0)
    theirs = create_attn(entry(name), 16).eval()
    torch.manual_seed(0)
    ours = ai.create_block(name, 16, init="paper").eval()
    assert type(ours) is type(theirs)
    x = noise(2, 16, 7, 5)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert torch.equal(ours(x), theirs(x))


# biases that the mathematics leaves without a gradient: of a softmax's keys, and in front of a batch norm
DEAD = {
    "timm/gc": {"block.conv_attn.bias"},
    "timm/gca": {"block.conv_attn.bias"},
    "timm/nl": {"block.p.bias", "block.g.bias", "block.z.bias"},
}


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_gets_a_gradient_within_two_steps(name):
    """α learns in the first step, timm's tensors in the second: none is stuck behind a zero of its own."""
    torch.manual_seed(0)
    block = ai.create_block(name, 64).double()
    x, target = noise(64, 64, 6, 5, dtype=torch.float64), noise(64, 64, 6, 5, seed=5, dtype=torch.float64)
    optimizer = torch.optim.Adam(block.parameters(), lr=1e-2)
    for step in range(2):
        optimizer.zero_grad()
        (block(x) * target).sum().backward()
        moved = {k for k, p in block.named_parameters() if p.grad is not None and p.grad.abs().max() > 1e-9}
        assert step or moved == {"alpha"}
        optimizer.step()
    assert moved == {k for k, _ in block.named_parameters()} - DEAD.get(name, set())


def test_options_reach_timm():
    """`rd_channels` makes the width that was asked for."""
    assert ai.create_block("timm/se", 64, rd_channels=5).block.fc1.out_channels == 5


def test_injected_under_the_part_behind_the_slash():
    """In a model, `timm/eca` is the child `eca`, and the model computes what it did."""
    torch.manual_seed(0)
    net = nn.Sequential()
    net.add_module("body", nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)))
    x = noise(2, 3, 12, 10)
    expected = net(x)
    ai.inject(net, block="timm/eca", after="body.0", example_inputs=x)
    (name,) = ai.injected(net)
    assert name.endswith("eca")
    assert torch.equal(net(x), expected)
