"""Nets with two values that one block can see: U-Nets, a Siamese pair, a tower of images beside one of texts."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Step(nn.Module):
    """A convolution, its norm, and an activation in place."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm = nn.BatchNorm2d(outputs)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, inputs, H, W) → (B, outputs, H, W)."""
        return self.act(self.norm(self.conv(x)))


class Join(nn.Module):
    """A decoder's step: what comes from below, twice as large, beside what was skipped."""

    def __init__(self, below: int, skipped: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(below, skipped, 2, 2)
        self.step = Step(2 * skipped, skipped)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """x: (B, below, H, W), skip: (B, skipped, 2H, 2W) → the shape of skip."""
        return self.step(torch.cat([skip, self.up(x)], 1))


class UNet(nn.Module):
    """Three resolutions, written by hand."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        widths = [width, 2 * width, 4 * width]
        self.down = nn.ModuleList(Step(a, b) for a, b in zip([3, *widths[:-1]], widths, strict=True))
        self.pool = nn.MaxPool2d(2)
        self.up = nn.ModuleList(Join(b, a) for a, b in itertools.pairwise(widths))
        self.head = nn.Conv2d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, 3, H, W) → (B, 2, H, W)."""
        a = self.down[0](x)
        b = self.down[1](self.pool(a))
        y = self.down[2](self.pool(b))
        return self.head(self.up[0](self.up[1](y, b), a))


class CheckpointedUNet(UNet):
    """The same, each step of its decoder checkpointed."""

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, 3, H, W) → (B, 2, H, W)."""
        a = self.down[0](x)
        b = self.down[1](self.pool(a))
        y = checkpoint(self.up[1], self.down[2](self.pool(b)), b, use_reentrant=False)
        return self.head(checkpoint(self.up[0], y, a, use_reentrant=False))


class PartedUNet(UNet):
    """The same in two forwards, so that its own is not rewritten."""

    def forward_features(self, x: Tensor) -> Tensor:
        """x: (B, 3, H, W) → (B, width, H, W)."""
        a = self.down[0](x)
        b = self.down[1](self.pool(a))
        return self.up[0](self.up[1](self.down[2](self.pool(b)), b), a)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, 3, H, W) → (B, 2, H, W)."""
        return self.head(self.forward_features(x))


class FlatUNet(nn.Module):
    """The same, all in one forward, the skips in the lists that are concatenated."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.down = nn.ModuleList([Step(3, width), Step(width, 2 * width), Step(2 * width, 4 * width)])
        self.pool = nn.MaxPool2d(2)
        self.up = nn.ModuleList(nn.ConvTranspose2d(2 * n * width, n * width, 2, 2) for n in (1, 2))
        self.join = nn.ModuleList(Step(2 * n * width, n * width) for n in (1, 2))

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, 3, H, W) → (B, width, H, W)."""
        a = self.down[0](x)
        b = self.down[1](self.pool(a))
        y = self.join[1](torch.cat([b, self.up[1](self.down[2](self.pool(b)))], 1))
        return self.join[0](torch.cat([a, self.up[0](y)], 1))


class Siamese(nn.Module):
    """One encoder for two images; what they differ in is classified."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.encoder = nn.Sequential(Step(3, width), nn.MaxPool2d(2), Step(width, width))
        self.head = nn.Linear(width, 3)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """left, right: (B, 3, H, W) → (B, 3)."""
        first = self.encoder(left)
        return self.head((self.encoder(right) - first).mean((2, 3)))


class Words(nn.Module):
    """Tokens of a text, each with its neighbours."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, width)
        self.mix = nn.Linear(width, width)

    def forward(self, text: Tensor) -> Tensor:
        """text: (B, L) → (B, L, width)."""
        x = self.embed(text)
        return self.mix(x + x.roll(1, 1))


class Patches(nn.Module):
    """An image in patches, as tokens with one in front."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.mlp = nn.Linear(width, width)

    def forward(self, image: Tensor) -> Tensor:
        """image: (B, 3, H, W) → (B, 1 + H W / 16, width)."""
        x = self.patch(image).flatten(2).transpose(1, 2)
        return self.mlp(torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1))


class Towers(nn.Module):
    """A tower of images, as a map or as tokens, beside one of texts; how well they fit."""

    def __init__(self, tokens: bool = False) -> None:
        super().__init__()
        self.image: nn.Module = Patches(16) if tokens else nn.Sequential(Step(3, 8), Step(8, 16))
        self.axes = (1,) if tokens else (2, 3)
        self.text = Words(24)
        self.proj = nn.Linear(24, 16)

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        """image: (B, 3, H, W), text: (B, L) → (B,)."""
        words = self.text(text)
        seen = self.image(image).mean(self.axes)
        return (seen * self.proj(words).mean(1)).sum(1)


class Asked(nn.Module):
    """A map, and a question as one vector: the state of what read its words."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.state = nn.Embedding(50, 24), nn.Linear(24, 12)
        self.image, self.pool = nn.Sequential(Step(3, 8), Step(8, 16)), nn.AdaptiveAvgPool2d(1)
        self.before, self.head = nn.Conv2d(3, 3, 1), nn.Linear(28, 5)

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        """image: (B, 3, H, W), text: (B, L) → (B, 5)."""
        state = self.state(self.embed(text).mean(1))
        seen = self.image(image + self.pool(self.before(image)))
        return self.head(torch.cat([seen.mean((2, 3)), state], 1))
