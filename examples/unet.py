"""A U-Net with attention on the way down, in the four forms that are compared: plain, channel, spatial, both.

python examples/unet.py

What to expect: all four begin with the same loss to the last bit, since blocks begin as identities; then a line for each
with its parameters and the Dice coefficient on new images, the mean over seeds. Twenty steps and one seed say nothing
about which is better: put your data, steps and seeds in.
"""

import torch
from torch import nn

import attninject as ai

STEPS, SEEDS, SIZE = 20, (0,), 32
CHANNEL, SPATIAL = "channel_attention", "spatial_attention"
FORMS = {"plain": (), "channel": (CHANNEL,), "spatial": (SPATIAL,), "both": (CHANNEL, SPATIAL)}


class Convs(nn.Sequential):
    """Two convolutions, (B, inputs, H, W) → (B, outputs, H, W)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        first, second = nn.Conv2d(inputs, outputs, 3, padding=1), nn.Conv2d(outputs, outputs, 3, padding=1)
        super().__init__(first, nn.ReLU(), second, nn.ReLU())


class UNet(nn.Module):
    """Three levels down, two up."""

    def __init__(self, classes: int = 2) -> None:
        super().__init__()
        self.down1, self.down2, self.down3 = Convs(3, 8), Convs(8, 16), Convs(16, 32)
        self.up2, self.up1 = Convs(48, 16), Convs(24, 8)
        self.head = nn.Conv2d(8, classes, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, 3, H, W) → logits (B, classes, H, W)."""
        a = self.down1(x)
        b = self.down2(nn.functional.max_pool2d(a, 2))
        c = self.down3(nn.functional.max_pool2d(b, 2))
        b = self.up2(torch.cat([b, nn.functional.interpolate(c, scale_factor=2)], 1))
        a = self.up1(torch.cat([a, nn.functional.interpolate(b, scale_factor=2)], 1))
        return self.head(a)


def discs(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (count, 3, SIZE, SIZE) with a disc each, in noise, and where it is (count, SIZE, SIZE)."""
    grid = torch.stack(torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij"))
    middle = SIZE * (0.25 + 0.5 * torch.rand(count, 2, 1, 1, generator=generator))
    masks = ((grid - middle).square().sum(1) < (SIZE / 4) ** 2).long()
    return torch.randn(count, 3, SIZE, SIZE, generator=generator) + 2 * masks[:, None], masks


def run(blocks: tuple[str, ...], seed: int) -> tuple[float, float, int]:
    """The first loss, the Dice coefficient at the end, and the net's parameters."""
    torch.manual_seed(seed)
    model, generator = UNet(), torch.Generator().manual_seed(seed)
    for block in blocks:
        ai.inject(model, block=block, after="down*", example_inputs=torch.zeros(1, 3, SIZE, SIZE))
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=1e-2), []
    for _ in range(STEPS):
        images, masks = discs(4, generator)
        losses.append(nn.functional.cross_entropy(model(images), masks))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    images, masks = discs(16, generator)
    found = model(images).argmax(1)
    dice = 2 * (found * masks).sum() / (found.sum() + masks.sum())
    return losses[0].item(), dice.item(), sum(p.numel() for p in model.parameters())


if __name__ == "__main__":
    results = {form: [run(blocks, seed) for seed in SEEDS] for form, blocks in FORMS.items()}
    same = len({tuple(loss for loss, _, _ in found) for found in results.values()}) == 1
    print(f"the same loss before training: {same}")
    for form, found in results.items():
        dice = sum(dice for _, dice, _ in found) / len(found)
        print(f"{form:8} {found[0][2]:,} parameters, Dice {dice:.2f}")
