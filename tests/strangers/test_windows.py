"""Windowed blocks as Swin's authors and those after them write them: sizes in whole numbers, one drop path for two."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from small import calls_of, se, stir
from torch import Tensor, nn

import attninject as ai

WINDOW = 4
X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class DropPath(nn.Module):
    """Leaves out a sample's branch at random while training."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (torch.rand(x.shape[0], 1, 1) >= 0.5) / 0.5 if self.training else x


def windows(x: Tensor) -> Tensor:
    """(B, H, W, C) → (B·windows, 16, C)."""
    b, h, w, c = x.shape
    x = x.view(b, h // WINDOW, WINDOW, w // WINDOW, WINDOW, c)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, WINDOW * WINDOW, c)


def merged(x: Tensor, h: int, w: int) -> Tensor:
    """The way back, with the batch from a quotient."""
    b = int(x.shape[0] / (h * w / WINDOW / WINDOW))
    x = x.view(b, h // WINDOW, w // WINDOW, WINDOW, WINDOW, -1)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(b, h, w, -1)


class Block(nn.Module):
    """What a block has; where the map's size comes from is the subclass's."""

    def __init__(self, width: int, first: bool) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), nn.Sequential(nn.Linear(width, width), nn.GELU())
        self.norm2, self.mlp = nn.LayerNorm(width), nn.Sequential(nn.Linear(width, width), nn.GELU())
        self.drop_path = nn.Identity() if first else DropPath()


class Given(Block):
    """Is given the size with each call."""

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        h, w = size
        b, count, c = x.shape
        assert count == h * w
        y = merged(self.attn(windows(self.norm1(x).view(b, h, w, c))), h, w)
        x = x + self.drop_path(y.view(b, h * w, c))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Left(Block):
    """Finds the size in attributes that the layer around it sets before each call."""

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        h, w = self.H, self.W
        b, count, c = x.shape
        assert count == h * w
        y = merged(self.attn(windows(self.norm1(x).view(b, h, w, c))), h, w)
        x = x + self.drop_path(y.view(b, h * w, c))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Layer(nn.Module):
    """Two blocks, and the merging of patches behind them, but for the last."""

    def __init__(self, kind: type, width: int, first: bool, down: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([kind(width, first), kind(width, False)])
        self.down = nn.Linear(4 * width, 2 * width) if down else None

    def forward(self, x: Tensor, h: int, w: int) -> Tensor:
        for block in self.blocks:
            if isinstance(block, Left):
                block.H, block.W = h, w
            x = block(x, (h, w))
        if self.down is not None:
            x = x.view(x.shape[0], h // 2, 2, w // 2, 2, -1).transpose(2, 3).flatten(3).flatten(1, 2)
            x = self.down(x)
        return x


class Swin(nn.Module):
    """Two layers over patches of 4."""

    def __init__(self, kind: type) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.layers = nn.ModuleList([Layer(kind, 8, True, True), Layer(kind, 16, False, False)])
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x)
        h, w = x.shape[2:]
        x = x.flatten(2).transpose(1, 2)
        for n, layer in enumerate(self.layers):
            x = layer(x, h // 2**n, w // 2**n)
        return self.head(x.mean(1))


KINDS = pytest.mark.parametrize("kind", [Given, Left])
BRANCHES = [f"layers.{n}.blocks.{m}.{part}" for n in (0, 1) for m in (0, 1) for part in ("drop_path", "mlp")]


def out(net: nn.Module, x: Tensor, training: bool) -> Tensor:
    """What a net gives with one state of the generator."""
    torch.manual_seed(1)
    return net.train(training)(x)


@KINDS
def test_branches_end_before_a_drop_path_that_two_share(kind: type) -> None:
    """The attention's before its first call, put back into the map; the net computes what it did, at any size."""
    base = Swin(kind).eval()
    plan = ai.plan(copy.deepcopy(base), **se(place="residual_branch"), example_inputs=X)
    assert [site.path for site in plan.sites] == BRANCHES
    assert {str(site.layout) for site in plan.sites} == {"NLC 8×8", "NLC 4×4"}
    net = ai.inject(copy.deepcopy(base), **se(place="residual_branch"), example_inputs=X)
    for x in (X, X[:1], torch.cat([X, X], 3).repeat(1, 1, 2, 1)):
        for training in (True, False):
            assert torch.equal(out(net, x, training), out(base, x, training))
    assert set(calls_of(net, X).values()) == {1}


def on_tokens(block: nn.Module, x: Tensor) -> Tensor:
    """A block on the 8×8 tokens of a sequence."""
    return block(x.transpose(1, 2).unflatten(2, (8, 8))).flatten(2).transpose(1, 2)


@KINDS
def test_a_block_before_a_shared_drop_path_sees_one_branch(kind: type) -> None:
    """A stirred block changes the attention's branch, and what was done by hand is what comes out."""
    base = Swin(kind).eval()
    net = ai.inject(copy.deepcopy(base), **se(place="residual_branch"), example_inputs=X)
    stir(net)
    x = base.patches(X).flatten(2).transpose(1, 2)
    given, bare = net.layers[0].blocks[0], base.layers[0].blocks[0]
    first, second, *_ = ai.injected(net).values()
    given.H = given.W = 8
    y = merged(bare.attn(windows(bare.norm1(x).view(2, 8, 8, 8))), 8, 8).view(2, 64, 8)
    y = x + on_tokens(first, y)
    torch.testing.assert_close(given(x, (8, 8)), y + on_tokens(second, bare.mlp(bare.norm2(y))))


@KINDS
def test_windowed_blocks_are_copied_and_pickled(kind: type) -> None:
    """Before the first call, too, when what the layer sets is not there yet; and once more from such a copy."""
    net = ai.inject(Swin(kind).eval(), **se(place="residual_branch"), example_inputs=X)
    stir(net)
    copies = [copy.deepcopy(net), pickle.loads(pickle.dumps(net))]
    copies += [copy.deepcopy(copies[1]), pickle.loads(pickle.dumps(copies[1]))]
    wanted = net(X)
    assert all(torch.equal(made(X), wanted) for made in [*copies, pickle.loads(pickle.dumps(net))])
    bare = pickle.loads(pickle.dumps(ai.inject(Swin(kind).eval(), **se(place="shortcut"), example_inputs=X)))
    ai.eject(bare)
    assert torch.equal(bare(X), Swin(kind).eval()(X))


@KINDS
def test_blocks_are_units_though_the_first_has_no_drop_path(kind: type) -> None:
    """A layer whose blocks differ in an Identity is a row of them, whatever it does at its end."""
    plan = ai.plan(Swin(kind).eval(), **se(place="block_end"), example_inputs=X)
    assert [site.path for site in plan.sites] == [f"layers.{n}.blocks.{m}" for n in (0, 1) for m in (0, 1)]
    stages = ai.plan(Swin(kind).eval(), **se(place="stage_end"), example_inputs=X)
    assert [site.path for site in stages.sites] == ["layers.0.blocks.1", "layers.1.blocks.1"]
