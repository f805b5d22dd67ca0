"""Inject into a network of your own: by pattern, at an operation, and by place.

python examples/own_model.py
"""

import torch
from torch import nn

import attninject as ai


class Block(nn.Module):
    """A residual block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, C, H, W), the same out."""
        return torch.relu(x + self.norm(self.conv(x)))


class Net(nn.Module):
    """Two stages of two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.stage1 = nn.Sequential(Block(32), Block(32))
        self.down = nn.Conv2d(32, 64, 3, stride=2, padding=1)
        self.stage2 = nn.Sequential(Block(64), Block(64))
        self.head = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, 3, H, W) to logits (B, 10)."""
        x = self.stage2(self.down(self.stage1(self.stem(x))))
        return self.head(x.mean((2, 3)))


torch.manual_seed(0)
model = Net().eval()
x = torch.randn(2, 3, 32, 32)

print(ai.sites(model, "stage1.**"))  # what can be targeted

with torch.no_grad():
    before = model(x)
    ai.inject(model, block="se", after="stage1.*.norm", args={"reduction": 8}, example_inputs=x)
    ai.inject(model, block="cbam", before="stage2.*::add", input=1, example_inputs=x)  # the branch of the sum
    ai.inject(model, block="bam", after="down", example_inputs=x)
    same = torch.equal(before, model(x))

print("\n".join(ai.injected(model)))
print(f"same logits, bit for bit: {same}")
