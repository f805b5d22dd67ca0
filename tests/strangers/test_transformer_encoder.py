"""torch's own transformer encoder: blocks behind its layers, its fast path, and padding masks."""

from __future__ import annotations

import pytest
import torch
from small import calls_of, stir
from torch import nn

import attninject as ai
from attninject import errors

MASK = torch.zeros(2, 6, dtype=torch.bool)
MASK[0, 4:] = True


def encoder(*, nested: bool = False, norm_first: bool = False) -> nn.Module:
    """Two layers on 16 channels, batch first, without dropout."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=norm_first)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested).eval()


def tokens() -> torch.Tensor:
    """x: (2, 6, 16)."""
    return torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "where", [{"after": "layers.0"}, {"before": "layers.1"}, {"after": "layers.*"}], ids=str
)
@pytest.mark.parametrize("masked", [False, True])
def test_a_block_at_a_layer_runs_on_the_fast_path_too(where, masked):
    """Once per site, with the numbers of the slow path; the identity at first."""
    model, x = encoder(), tokens()
    given = {"src_key_padding_mask": MASK} if masked else {}
    with torch.no_grad():
        bare = model(x, **given)
        ai.inject(model, block="se", example_inputs={"src": x, **given}, **where)
        torch.testing.assert_close(model(x, **given), bare)
        stir(model)
        fast = model(x, **given)
    assert set(calls_of(model, x).values()) == {1}
    torch.testing.assert_close(model(x, **given), fast)
    assert not torch.allclose(fast, bare, atol=1e-3)


def test_inside_a_layer_the_fast_path_is_named():
    """A norm within is passed by in eval mode; with norm_first or the path switched off the block runs."""
    with pytest.raises(errors.CannotRewriteError, match="set_fastpath_enabled"):
        ai.plan(encoder(), block="se", after="layers.0.norm1", example_inputs=tokens())
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        model = ai.inject(
            encoder(norm_first=True), block="se", after="layers.0.norm1", example_inputs=tokens()
        )
        with torch.no_grad():
            assert calls_of(model, tokens()) == {"layers.0.se": 1}
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_nested_tensors_are_refused_with_the_setting_that_helps():
    """The plan says what a mask would do, the probe with a mask and the forward refuse; without mask all is well."""
    model, x = encoder(nested=True), tokens()
    with pytest.raises(errors.ProbeError, match=r"enable_nested_tensor=False"):
        ai.plan(model, block="se", after="layers.0", example_inputs={"src": x, "src_key_padding_mask": MASK})
    (note,) = ai.plan(model, block="se", after="layers.0", example_inputs=x).notes
    assert "layers.0.se would stand inside nn.TransformerEncoder" in note
    assert "enable_nested_tensor=False" in note
    ai.inject(model, block="se", after="layers.0", example_inputs=x)
    with torch.no_grad():
        assert calls_of(model, x) == {"layers.0.se": 1}
        with pytest.raises(errors.LayoutError, match=r"enable_nested_tensor=False"):
            model(x, src_key_padding_mask=MASK)
    model.use_nested_tensor = False
    with torch.no_grad():
        torch.testing.assert_close(
            model(x, src_key_padding_mask=MASK), encoder()(x, src_key_padding_mask=MASK)
        )
