"""Units that are no modules: the runs of a loop over residual parts in one forward."""

from __future__ import annotations

import copy

import pytest
import torch
from small import calls_of, se, stir
from torch import Tensor, nn

import attninject as ai

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class Mixer(nn.Sequential):
    """Stands for attention or a feed-forward layer."""

    def __init__(self) -> None:
        super().__init__(nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))


class Transformer(nn.Module):
    """Goes over pairs in a list, and adds in its own forward."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList([Mixer(), Mixer()]) for _ in range(depth))
        self.norm = nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        for attn, ff in self.layers:
            x = attn(x) + x
            x = ff(x) + x
        return self.norm(x)


class Zipped(nn.Module):
    """Goes over two lists side by side."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.attns, self.ffs = (nn.ModuleList(Mixer() for _ in range(depth)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for attn, ff in zip(self.attns, self.ffs, strict=True):
            x = x + attn(x)
            x = x + ff(x)
        return x


class ViT(nn.Module):
    """Patches of 8, a transformer, a linear head on their mean."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.patches, self.transformer, self.head = nn.Conv2d(3, 16, 8, 8), transformer, nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.transformer(self.patches(x).flatten(2).transpose(1, 2)).mean(1))


class Watching(nn.Module):
    """Keeps what the transformer gives, by a hook that its first forward registers."""

    def __init__(self, vit: nn.Module) -> None:
        super().__init__()
        self.vit, self.kept, self.hooked = vit, None, False

    def _keep(self, module: nn.Module, given: object, out: Tensor) -> None:
        self.kept = out.clone().detach()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if not self.hooked:
            self.hooked = bool(self.vit.transformer.register_forward_hook(self._keep))
        return self.vit(x), self.kept


def paths(model: nn.Module, place: str) -> list[str]:
    """Where a place is."""
    return [site.path for site in ai.plan(model, **se(place=place), example_inputs=X).sites]


@pytest.mark.parametrize(("kind", "last"), [(Transformer, "transformer::add_5"), (Zipped, "transformer")])
def test_each_run_over_a_list_is_a_unit(kind: type, last: str) -> None:
    """A run of both parts, not all of them and not each; the last ends with the loop where that gives the result."""
    net = ViT(kind(3)).eval()
    ends = ["transformer::add_1", "transformer::add_3", last]
    assert paths(net, "block_end") == paths(net, "stage_end") == ends
    assert paths(net, "block_start") == ["transformer", *ends[:2]]


def test_blocks_at_the_runs_of_a_loop_compute_what_they_should() -> None:
    """Between one run and the next, each once, in both modes; untrained ones change nothing."""
    torch.manual_seed(0)
    base = ViT(Transformer(3))
    net = ai.inject(copy.deepcopy(base).eval(), **se(place="block_end"), example_inputs=X)
    for mode in (True, False):
        assert torch.equal(net.train(mode)(X), base.train(mode)(X))
    assert set(calls_of(net, X).values()) == {1}
    stir(net)
    x = base.patches(X).flatten(2).transpose(1, 2)
    for (attn, ff), block in zip(base.transformer.layers, ai.injected(net).values(), strict=True):
        x = attn(x) + x
        x = block((ff(x) + x).transpose(1, 2).unflatten(2, (4, 4))).flatten(2).transpose(1, 2)
    torch.testing.assert_close(net(X), base.head(base.transformer.norm(x).mean(1)))


def test_a_hook_on_a_loop_keeps_its_runs() -> None:
    """What a hook does with the result is no part of the forward; it sees what the blocks made."""
    torch.manual_seed(0)
    base = Watching(ViT(Transformer(2))).eval()
    net = ai.inject(copy.deepcopy(base), **se(place="block_end"), example_inputs=X)
    assert list(ai.injected(net)) == ["vit.transformer.se", "vit.transformer.se_2"]
    assert all(torch.equal(a, b) for a, b in zip(net(X), base(X), strict=True))
    stir(net)
    assert not torch.equal(net(X)[1], base(X)[1])


# --- parts told apart by the numbers in their names ---------------------------------------------


def layers(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """An activation that overwrites its input, as in Xception, and two convolutions."""
    return nn.Sequential(
        nn.ReLU(inplace=True),
        nn.Conv2d(inputs, outputs, 3, padding=1),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
        nn.Conv2d(outputs, outputs, 3, stride, padding=1),
        nn.BatchNorm2d(outputs),
    )


class Entry(nn.Module):
    """Three residual parts in one forward; the shortcuts read what the branches' activations wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2_residual, self.conv2_shortcut = layers(8, 8, 2), nn.Conv2d(8, 8, 1, 2)
        self.conv3_residual, self.conv3_shortcut = layers(8, 16, 2), nn.Conv2d(8, 16, 1, 2)
        self.conv4_residual, self.conv4_shortcut = layers(16, 16, 1), nn.Conv2d(16, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        x = self.conv2_residual(x) + self.conv2_shortcut(x)
        x = self.conv3_residual(x) + self.conv3_shortcut(x)
        return self.conv4_residual(x) + self.conv4_shortcut(x)


class Middle(nn.Module):
    """A residual unit."""

    def __init__(self) -> None:
        super().__init__()
        self.body = layers(16, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Xception(nn.Module):
    """An entry flow, two units and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.entry, self.middle, self.head = Entry(), nn.Sequential(Middle(), Middle()), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.entry(x)).mean((2, 3)))


def test_numbered_parts_of_an_entry_flow_are_units() -> None:
    """`conv2`, `conv3` and `conv4` are units like the modules behind them; their sums are in the forward's graph."""
    torch.manual_seed(0)
    base = Xception().eval()
    for norm in (m for m in base.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.normal_(norm.running_mean, 0, 0.2)
    assert paths(base, "block_end") == ["entry::add", "entry::add_1", "entry", "middle.0", "middle.1"]
    assert paths(base, "stage_end") == ["entry::add", "middle.1"]
    assert paths(base, "block_start")[:3] == ["entry.conv1", "entry::add", "entry::add_1"]
    net = ai.inject(copy.deepcopy(base), **se(place="block_end"), example_inputs=X)
    for mode in (True, False):
        assert torch.equal(net.train(mode)(X), base.train(mode)(X))
    assert set(calls_of(net, X).values()) == {1}
    stir(net)
    first, second, third, *_ = ai.injected(net).values()
    entry = base.entry
    x = entry.conv1(X)
    x = first(entry.conv2_residual(x) + entry.conv2_shortcut(x))
    x = second(entry.conv3_residual(x) + entry.conv3_shortcut(x))
    wanted = third(entry.conv4_residual(x) + entry.conv4_shortcut(x))
    torch.testing.assert_close(net.entry(X), wanted)


class Exit(nn.Module):
    """A last residual part, two more layers and the pooling in one forward."""

    def __init__(self) -> None:
        super().__init__()
        self.shortcut, self.residual, self.conv = (
            nn.Conv2d(16, 16, 1, 2),
            layers(16, 16, 2),
            layers(16, 16, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.shortcut(x)
        return self.conv(self.residual(x) + shortcut).mean((2, 3), keepdim=True)


def test_a_tail_that_pools_behind_its_residual_part() -> None:
    """The part is a unit and ends a stage; the head's input is the last map."""
    base = Xception()
    base.middle.append(Exit())
    assert paths(base.eval(), "block_end")[-2:] == ["middle.1", "middle.2::add"]
    assert paths(base, "block_start")[-2:] == ["middle.1", "middle.2"]
    assert paths(base, "stage_end") == ["entry::add", "middle.1", "middle.2::add"]
    assert paths(base, "head_input") == ["middle.2.conv.5"]
