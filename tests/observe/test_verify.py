"""`verify=True` compares what the model gives, and nothing of it is seen afterwards."""

from __future__ import annotations

import pytest
import torch
from small import Around, Through, images, se
from torch import nn

import attninject as ai


class InPlace(nn.Module):
    """Writes into the image that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Around(Through(lambda self, x: self.b(self.a(x))))

    def forward(self, x):
        return self.body(x.sub_(0.5))


def test_a_forward_that_writes_into_its_input_is_given_a_copy() -> None:
    """The images of the user stay, and both runs see the same ones."""
    x = images()
    before = x.clone()
    ai.inject(InPlace(), **se(after="body.inner.a"), example_inputs=x, verify=True)
    assert torch.equal(x, before)


def test_what_is_no_number_before_and_after_is_no_difference() -> None:
    """A net that overflows is verified all the same."""
    model = Around(Through(lambda self, x: self.b(self.a(x))))
    nn.init.constant_(model.inner.b.weight, float("nan"))
    ai.inject(model, **se(after="inner.a"), example_inputs=images(), verify=True)


def test_a_seed_that_waits_for_cuda_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody has used CUDA yet: the seed that torch keeps for then is the user's."""
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail(f"{seed} waits for CUDA now"))
    model = Around(Through(lambda self, x: self.b(self.a(x))))
    ai.inject(model, **se(after="inner.a"), example_inputs=images(), verify=True)
