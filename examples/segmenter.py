"""DANet before the head of DeepLab v3, and channel and spatial attention on the way down of a U-Net.

python examples/segmenter.py
"""

import torch
import torchvision
from torch import nn

import attninject as ai

torch.manual_seed(0)
images, masks = torch.randn(2, 3, 64, 64), torch.randint(0, 3, (2, 64, 64))


def step(model: nn.Module, output: str | None = None) -> float:
    """One training step on the images; the loss."""
    optimizer = torch.optim.SGD(ai.param_groups(model, lr=1e-2), lr=1e-2)
    model.train()
    found = model(images)
    loss = nn.functional.cross_entropy(found[output] if output else found, masks)
    loss.backward()
    optimizer.step()
    return loss.item()


deeplab = torchvision.models.segmentation.deeplabv3_mobilenet_v3_large(
    weights=None, weights_backbone=None, num_classes=3
).eval()
with torch.no_grad():
    before = deeplab(images)["out"]
    ai.inject(deeplab, block="danet", before="classifier", args={"reduction": 8}, example_inputs=images)
    after = deeplab(images)["out"]
    print(f"DeepLab: {', '.join(ai.injected(deeplab))}, masks unchanged: {torch.equal(before, after)}")
ai.freeze(deeplab)
print(f"  {ai.trainable(deeplab)} learn, loss {step(deeplab, 'out'):.3f}")


class Down(nn.Module):
    """Two convolutions; the pooling comes before them."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, inputs, H, W) → (B, outputs, H, W)."""
        return torch.relu(self.conv2(torch.relu(self.conv1(x))))


class UNet(nn.Module):
    """Three levels down, two up."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.down1, self.down2, self.down3 = Down(3, 16), Down(16, 32), Down(32, 64)
        self.up2, self.up1 = Down(96, 32), Down(48, 16)
        self.head = nn.Conv2d(16, classes, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, 3, H, W) → logits (B, classes, H, W)."""
        a = self.down1(x)
        b = self.down2(nn.functional.max_pool2d(a, 2))
        c = self.down3(nn.functional.max_pool2d(b, 2))
        b = self.up2(torch.cat([b, nn.functional.interpolate(c, scale_factor=2)], 1))
        a = self.up1(torch.cat([a, nn.functional.interpolate(b, scale_factor=2)], 1))
        return self.head(a)


unet = UNet(3).eval()
with torch.no_grad():
    before = unet(images)
    for block in ("channel_attention", "spatial_attention"):
        ai.inject(unet, block=block, after="down*", example_inputs=images)
    same = torch.equal(before, unet(images))
    print(f"U-Net: {len(ai.injected(unet))} blocks on the way down, masks unchanged: {same}")
ai.freeze(unet, head="head")
print(f"  {ai.trainable(unet)} learn, loss {step(unet):.3f}")
