"""Use a block of your own: registered by name, or given as a class that knows nothing of attninject.

python examples/own_block.py
"""

import torch
import torchvision
from torch import nn

import attninject as ai


@ai.register_block("pixel_gate")
class PixelGate(nn.Module):
    """One gate per pixel, which starts at exactly 1: 2σ(0)."""

    def __init__(self, channels: int, kernel_size: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 1, kernel_size, padding=kernel_size // 2)
        nn.init.zeros_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, C, H, W), the same out."""
        return x * (2 * torch.sigmoid(self.conv(x)))


class Smooth(nn.Module):
    """A 3×3 mean: keeps the shape, but is no identity; `init="blend"` makes it one that can learn."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(3, stride=1, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, C, H, W), the same out."""
        return self.pool(x)


torch.manual_seed(0)
model = torchvision.models.resnet18().eval()
x = torch.randn(1, 3, 64, 64)
with torch.no_grad():
    before = model(x)
    ai.inject(model, block="pixel_gate", after="layer[1-4].*.bn2", args={"kernel_size": 3})
    ai.inject(model, block=Smooth, place="stage_end", init="blend")
    print(f"{len(ai.injected(model))} blocks of our own: {', '.join(list(ai.injected(model))[-3:])}")
    print(f"same logits, bit for bit: {torch.equal(before, model(x))}")
