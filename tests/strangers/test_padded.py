"""Sums of sizes that only some inputs ask for, beside the sums that blocks stand at: padding to whole windows."""

from __future__ import annotations

import copy
import io

import torch
import torch.nn.functional as F
from small import calls_of, images, se, stir
from torch import Tensor, nn

import attninject as ai


class Padded(nn.Module):
    """A residual part that makes its map a whole number of windows first, where it is not, as timm's TinyViT does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 4, 4), nn.BatchNorm2d(8)
        self.up = nn.Upsample(scale_factor=4)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, 8, H, W) → the same shape."""
        _, _, h, w = x.shape
        below, right = (4 - h % 4) % 4, (4 - w % 4) % 4
        padded = below > 0 or right > 0
        y = x
        if padded:
            tall, wide = h + below, w + right
            y = F.pad(y, (0, right, 0, below)) + 0.1
            y = y + 1.0 / (tall + wide)
        y = self.up(self.norm(self.conv(y)))
        if padded:
            y = y[:, :, :h, :w]
        return x + y


def net() -> nn.Module:
    """Two of them behind a stem."""
    torch.manual_seed(0)
    made = nn.Sequential(nn.Conv2d(3, 8, 1), Padded(), Padded(), nn.Conv2d(8, 4, 1))
    for part in made[1:3]:
        nn.init.normal_(part.norm.running_mean)
        nn.init.uniform_(part.norm.running_var, 0.5, 1.5)
    return made.eval()


def test_a_block_stands_at_the_same_sum_whatever_the_size_asks_for() -> None:
    """The sum that was planned at one size is another one in number at the other; by copies and files, too."""
    base, sizes = net(), (32, 30, 31, 32)
    made = {}
    for planned in (32, 30):
        where = se(place="shortcut")
        model = ai.inject(copy.deepcopy(base), **where, example_inputs=images(size=planned))
        for size in sizes:
            assert torch.equal(model(images(size=size)), base(images(size=size)))
        assert set(calls_of(model, images(size=30)).values()) == {1}
        stir(model)
        made[planned] = model
    expected = {size: made[32](images(size=size)) for size in sizes}
    assert not torch.allclose(expected[30], base(images(size=30)))
    file = io.BytesIO()
    torch.save(made[32], file)
    file.seek(0)
    twins = made[30], copy.deepcopy(made[32]), torch.load(file, weights_only=False)
    for twin in twins:
        twin.load_state_dict(made[32].state_dict())
        for size, wanted in expected.items():
            assert torch.equal(twin(images(size=size)), wanted)
