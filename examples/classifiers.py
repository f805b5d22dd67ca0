"""Two attention classifiers, each a plain net and one rule: CBAM in a CNN, and self-attention before its head.

python examples/classifiers.py

What to expect: the same logits before training, and a loss that falls while twelve steps learn eight random images by
heart. The net knows nothing of attention: what a paper writes into the class stands in the rule.
"""

import torch
from torch import nn

import attninject as ai

CLASSES = 4
RULES = {
    "CBAM behind each stage": {"block": "cbam", "after": "stage?", "args": {"reduction": 8}},
    "self-attention between the positions that the head pools": {"block": "self_attention", "before": "pool"},
}


class Net(nn.Module):
    """Three stages that halve the resolution, a mean, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stage1, self.stage2, self.stage3 = self.stage(3, 16), self.stage(16, 32), self.stage(32, 64)
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(64, CLASSES)

    @staticmethod
    def stage(inputs: int, outputs: int) -> nn.Sequential:
        """Convolution of stride 2, norm, ReLU."""
        convolution = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)
        return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, 3, H, W) → logits (B, CLASSES)."""
        x = self.stage3(self.stage2(self.stage1(x)))
        return self.head(self.pool(x).flatten(1))


torch.manual_seed(0)
images, labels = torch.randn(8, 3, 32, 32), torch.arange(8) % CLASSES
for name, rule in RULES.items():
    model = Net()
    with torch.no_grad():
        before = model.eval()(images)
        ai.inject(model, **rule, example_inputs=images)
        same = torch.equal(before, model(images))
    print(f"{name}: {', '.join(ai.injected(model))}; same logits: {same}")
    optimizer = torch.optim.AdamW(ai.param_groups(model, lr=1e-2, attn_lr=1e-2, head_lr=1e-2))
    losses = []
    model.train()
    for _ in range(12):
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    learnt = all(block.changed for block in ai.status(model).blocks)
    print(f"  loss {losses[0]:.2f}, at the end {losses[-1]:.2f}; every block has learnt: {learnt}")
