"""A unit that parts its forward over methods and calls one drop-path twice, as some Swin blocks do."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from small import SILENT_CHECKPOINTS, Calls, images, se, stir
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import attninject as ai
from attninject.errors import CannotRewriteError
from attninject.surgery.local_graph import uncalled_forwards


class DropPath(nn.Module):
    """Leaves out a sample's branch at random while training."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if self.rate == 0.0 or not self.training:
            return x
        kept = torch.rand(x.shape[0], 1, 1, 1, device=x.device) >= self.rate
        return x * kept / (1 - self.rate)


class Mixer(nn.Module):
    """Stands for attention: two linear layers over the last axis."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(nn.functional.gelu(self.into(x)))


class Block(nn.Module):
    """A windowed mixer and an MLP, each behind the same drop-path; parts of the forward may be checkpointed."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.norm1, self.norm2, self.attn, self.mlp = nn.LayerNorm(8), nn.LayerNorm(8), Mixer(), Mixer()
        self.drop_path = DropPath(rate) if rate else nn.Identity()
        self.use_checkpoint = False

    def forward_part1(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        y = self.norm1(x).reshape(b, h // 4, 4, w // 4, 4, c).transpose(2, 3).reshape(-1, 16, c)
        y = self.attn(y).reshape(b, h // 4, w // 4, 4, 4, c)
        return y.transpose(2, 3).reshape(b, h, w, c)

    def forward_part2(self, x: Tensor) -> Tensor:
        return self.drop_path(self.mlp(self.norm2(x)))

    def forward(self, x: Tensor) -> Tensor:
        if self.use_checkpoint:
            x = x + self.drop_path(checkpoint(self.forward_part1, x, use_reentrant=False))
            return x + checkpoint(self.forward_part2, x, use_reentrant=False)
        x = x + self.drop_path(self.forward_part1(x))
        return x + self.forward_part2(x)


class Net(nn.Module):
    """Two blocks between a stem and a head."""

    def __init__(self, rate: float, checkpointed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = nn.Conv2d(3, 8, 1), nn.Linear(8, 4)
        self.blocks = nn.Sequential(Block(rate), Block(rate))
        self.checkpoint(checkpointed)

    def checkpoint(self, on: bool) -> None:
        """Switch it for all blocks."""
        for block in self.blocks:
            block.use_checkpoint = on

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x).permute(0, 2, 3, 1)).mean((1, 2)))


def output(model: nn.Module) -> Tensor:
    """With the random numbers of one seed."""
    torch.manual_seed(1)
    return model(images())


def step(model: nn.Module) -> list[Tensor | None]:
    """The gradients of one step."""
    model.zero_grad()
    output(model).square().sum().backward()
    return [p.grad for p in model.parameters()]


WHERE = {"place": "residual_branch"}


@pytest.mark.parametrize("checkpointed", [False, pytest.param(True, marks=SILENT_CHECKPOINTS)])
@pytest.mark.parametrize("rate", [0.0, 0.4])
def test_branches_end_before_the_shared_drop_path(rate: float, checkpointed: bool) -> None:
    """With the windows back in the map, and behind the MLP; the function stays, and each block runs once."""
    model = Net(rate, checkpointed).eval()
    bare, in_training = output(model), output(model.train())
    plan = ai.plan(model, **se(**WHERE), example_inputs=images())
    assert [(s.path, s.mechanism) for s in plan.sites][:2] == [
        ("blocks.0.drop_path", "graph"),
        ("blocks.0.mlp", "module"),
    ]
    ai.inject(model, plan)
    assert torch.equal(output(model), in_training)
    assert torch.equal(output(model.eval()), bare)
    with Calls(model) as calls:
        output(model)
    assert calls.order == list(ai.injected(model))
    stir(model)
    assert not torch.equal(output(model), bare)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(output(twin), output(model))
    ai.eject(model)
    assert torch.equal(output(model), bare)


@SILENT_CHECKPOINTS
@pytest.mark.parametrize("first", [False, True])
def test_checkpointing_is_switched_where_blocks_are(first: bool) -> None:
    """On or off after injection: the same gradients, and each block runs once more where it is on."""
    plain, model = Net(0.4).train(), Net(0.4, first).train()
    for net in (plain, model):
        ai.inject(net, **se(**WHERE), example_inputs=images())
        stir(net)
    for on in (not first, first):
        model.checkpoint(on)
        torch.testing.assert_close(step(model), step(plain), rtol=0, atol=0)
        with Calls(model) as calls:
            step(model)
        assert len(calls.order) == len(ai.injected(model)) * (2 if on else 1)


def test_a_forward_that_is_not_called_by_the_forward_stays_one_of_its_own() -> None:
    """Who calls it from outside would pass the block by."""

    class Offering(Block):
        def forward_features(self, x: Tensor) -> Tensor:
            return self.forward_part1(x)

    assert uncalled_forwards(Block) == ()
    assert uncalled_forwards(Offering) == ("forward_features",)
    model = Net(0.4)
    model.blocks[1] = Offering(0.4)
    with pytest.raises(
        CannotRewriteError, match=r"blocks.1.drop_path: it is called 2 times .*forward_features"
    ):
        ai.plan(model, **se(**WHERE), example_inputs=images())
