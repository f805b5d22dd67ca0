"""Attention along time, hard attention, crops and transformers that look twice: what no formula of one map shows."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from block_cases import build, noise, scrambled
from small import Net, images

import attninject as ai
from attninject.errors import BlockError


@pytest.mark.parametrize("train", [True, False])
def test_clips_in_the_batch_are_the_volume_of_their_frames(train):
    """(B · T, C, H, W) with `frames` gives what (B, C, T, H, W) gives with the same weights."""
    volume, clips = scrambled("temporal", dims=3), scrambled("temporal", frames=4)
    clips.load_state_dict(volume.state_dict())
    x = noise(2, 16, 4, 5, 3)
    flat = x.transpose(1, 2).flatten(0, 1)
    expected = volume.train(train)(x).transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(clips.train(train)(flat), expected)
    assert torch.equal(build("temporal", frames=4)(flat), flat)


def test_frames_that_are_no_whole_clips_are_refused():
    """In words, in a forward as in a volume, whose time is an axis."""
    with pytest.raises(ValueError, match="6 maps are no whole clips of 4 frames"):
        build("temporal", frames=4)(noise(6, 16, 2, 2))
    with pytest.raises(BlockError, match="with 3 spatial dimensions the first is time"):
        build("temporal", frames=4, dims=3)


def test_a_network_of_frames_takes_the_block():
    """The plan tries it on one clip, and counts one frame; the output stays."""
    model, x = Net().eval(), images(8, size=8)
    expected = model(x)
    ai.inject(model, block="temporal", after="units.*", args={"frames": 4}, example_inputs=x)
    assert torch.equal(model(x), expected)
    assert len(ai.injected(model)) == 2


def test_a_small_fraction_and_numpys_numbers_are_taken_as_they_are():
    """A hundred-thousandth of ten million positions are a hundred; it was one. NumPy's float32 was a TypeError."""
    chosen = [
        build("hard_attention", 4, k=k).chosen(10_000_000) for k in (1e-5, np.float32(0.25), np.int64(7))
    ]
    assert chosen == [100, 2_500_000, 7]


def test_gumbel_noise_samples_positions_by_their_scores():
    """In train mode one position is taken as often as its softmax says; in eval mode always the best."""
    block = scrambled("hard_attention", 4, init="paper", k=1, gumbel=1)
    x = noise(1, 4, 1, 3).repeat(20_000, 1, 1, 1)
    torch.manual_seed(0)
    taken = block.attention(x)["gate"]
    assert torch.equal(taken.sum((1, 2, 3)), torch.ones(len(x)))
    wanted = torch.softmax(block.score(x[:1]).flatten(), 0)
    torch.testing.assert_close(taken.mean((0, 1, 2)), wanted, rtol=0, atol=0.015)
    assert block.eval().attention(x[:1])["gate"].argmax() == wanted.argmax()


def test_the_window_lies_where_its_net_says():
    """Centre 1/2 to the right and half a side of 1/4: between 5/8 and 7/8 of the width, 3/8 and 5/8 of the height."""
    block = build("crop", init="paper", sharpness=1000)
    with torch.no_grad():
        block.fc2.weight.zero_()
        block.fc2.bias.copy_(torch.tensor([0, math.atanh(0.5), math.log(0.25 / 0.75)]))
    inside = torch.zeros(1, 1, 16, 16)
    inside[..., 6:10, 10:14] = 1
    torch.testing.assert_close(block.attention(noise(1, 16, 16, 16))["gate"], inside)


def test_a_transformer_that_looks_twice_learns_through_both_looks():
    """gradcheck through the composed transform; and two looks at a fresh one are none."""
    block = scrambled("stn", 4, steps=2, reduction=2).double()
    with torch.no_grad():
        block.fc2.weight.mul_(0.1)
    x = noise(1, 4, 4, 3, dtype=torch.float64).requires_grad_()
    torch.autograd.gradcheck(lambda x, *_: block(x), (x, *block.parameters()), fast_mode=True)
    assert not torch.equal(block(x), x)


@pytest.mark.parametrize("layers", [0, 1, 3])
def test_bams_channel_mlp_is_as_deep_as_asked(layers):
    """Hidden layers of C / r with a norm each, then one to C."""
    widths = [64, *[4] * layers]
    hidden = sum(a * b + b + 2 * b for a, b in itertools.pairwise(widths))
    found = sum(p.numel() for p in build("bam", 64, channel_layers=layers).channel.parameters())
    assert found == hidden + widths[-1] * 64 + 64
