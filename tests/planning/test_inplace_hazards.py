"""In-place operations around a site: refused where no block could keep the function, copied where it can."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from small import Around, Through, images
from torch import nn

import attninject as ai
from attninject.errors import InPlaceHazardError


def built(body: Callable, around: Callable | None = None, **children: nn.Module) -> nn.Module:
    """A stem and one owner with this body, by default called once; the same weights every time."""
    torch.manual_seed(0)
    model = Around(Through(body, **children))
    if around is not None:
        model.forward_body = around  # type: ignore[assignment]
        model.__class__ = _Custom
    return model.eval()


class _Custom(Around):
    def forward(self, x):
        return self.forward_body(self, self.stem(x))


def kept(model: nn.Module, base: nn.Module) -> bool:
    """Equal outputs in both modes, and a backward that works."""
    for training in (False, True):
        out = model.train(training)(images())
        out.sum().backward()
        if not torch.equal(out, base.train(training)(images())):
            return False
    return True


def _writes_its_input(self, x):
    y = self.a(x)
    x *= 0.5
    return self.b(y)


def test_a_write_into_the_callers_tensor_is_refused_when_the_caller_reads_it_later() -> None:
    """The block would take the write to itself, and the caller's shortcut would keep the old values."""
    model = built(_writes_its_input, lambda self, x: self.inner(x) + x)
    with pytest.raises(InPlaceHazardError, match="inner::mul"):
        ai.plan(model, block="se", before="inner::mul", example_inputs=images())


def test_that_write_may_get_a_block_when_nobody_reads_the_tensor_later() -> None:
    """The same owner in a chain: nothing is lost."""
    body = lambda self, x: self.inner(x)  # noqa: E731
    model, base = built(_writes_its_input, body), built(_writes_its_input, body)
    ai.inject(model, block="se", before="inner::mul", example_inputs=images())
    assert kept(model, base)


def test_only_the_second_run_of_an_owner_may_be_the_hazard() -> None:
    """The first result is written to by the second run and read after it; the first run alone is harmless."""

    def twice(self, x):
        x = self.inner(x)
        return self.inner(x) + x

    with pytest.raises(InPlaceHazardError):
        ai.plan(built(_writes_its_input, twice), block="se", before="inner::mul", example_inputs=images())


@pytest.mark.parametrize("block", ["se", "cbam"])
def test_a_value_that_is_overwritten_after_the_block_read_it_can_still_be_learned_from(block: str) -> None:
    """The original's own backward does not need x; the block's does, so it is given a copy."""

    def body(self, x):
        y = self.relu(x)
        x *= 0.5
        return self.b(y)

    model, base = built(body, relu=nn.ReLU()), built(body, relu=nn.ReLU())
    ai.inject(model, block=block, before="inner.relu", args={"reduction": 1}, example_inputs=images())
    assert kept(model, base)


def test_a_view_of_a_blocks_result_sees_a_later_write() -> None:
    """`view` and the tensor stay one storage behind the block, though `+=` may not write into its result."""

    def body(self, x):
        y = self.a(x)
        view = y.view(y.shape)
        y += x
        return self.b(view)

    model, base = built(body), built(body)
    ai.inject(model, block="se", after="inner.a", example_inputs=images())
    assert kept(model, base)


def test_a_hazard_in_train_mode_only_is_refused() -> None:
    """The write happens under `if self.training`, so a look at the eval graph alone would miss it."""

    def body(self, x):
        y = self.a(x)
        view = y.view(y.shape)
        z = self.mark(view)
        if self.training:
            y += 1
        return self.b(z) + z

    with pytest.raises(InPlaceHazardError):
        ai.plan(built(body, mark=nn.Identity()), block="se", after="inner.mark", example_inputs=images())
