"""torch's own transformer encoder: blocks behind its layers, its fast path, and padding masks."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from small import calls_of, stir
from torch import nn

import attninject as ai
from attninject import errors

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")

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


PADDED = {
    "left aligned": MASK,
    "to the left": MASK.flip(1),
    "in all samples": MASK | MASK.flip(0),
    "none": None,
}


@pytest.mark.parametrize("where", [{"after": "layers.0"}, {"before": "layers.*"}], ids=str)
@pytest.mark.parametrize("example_mask", [None, MASK], ids=["planned without mask", "planned with mask"])
def test_padding_that_the_encoder_packs_leaves_the_function_as_it_is(where, example_mask):
    """In eval mode without gradients torch packs the tokens; blocks behind layers are the identity there too."""
    model, bare, x = encoder(nested=True), encoder(nested=True), tokens()
    given = {"src": x, "src_key_padding_mask": example_mask}
    assert ai.plan(model, block="se", example_inputs=given, **where).notes == ()
    ai.inject(model, block="se", example_inputs=given, **where)
    for grad, training, mask in itertools.product((False, True), (False, True), PADDED.values()):
        with torch.set_grad_enabled(grad):
            result = model.train(training)(x, src_key_padding_mask=mask)
            assert torch.equal(result, bare.train(training)(x, src_key_padding_mask=mask))


@pytest.mark.parametrize("mask", PADDED.values(), ids=PADDED)
@pytest.mark.parametrize("position", ["after", "before"])
def test_a_trained_block_computes_the_same_whether_tokens_are_packed_or_not(position, mask):
    """With gradients, without, in training, unpacked, copied, beside more padding: padding is zero to it."""
    model, x = encoder(nested=True), tokens()
    ai.inject(model, block="se", example_inputs=x, **{position: "layers.*"})
    stir(model)
    real = torch.ones_like(MASK) if mask is None else ~mask
    with_gradients = model(x, src_key_padding_mask=mask)
    assert torch.equal(model.train()(x, src_key_padding_mask=mask), with_gradients)
    for other in (model.eval(), pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        with torch.no_grad():
            torch.testing.assert_close(other(x, src_key_padding_mask=mask)[real], with_gradients[real])
    model.use_nested_tensor = False
    with torch.no_grad():
        torch.testing.assert_close(model(x, src_key_padding_mask=mask)[real], with_gradients[real])
        noise = x.masked_fill(~real.unsqueeze(-1), 3.0)
        torch.testing.assert_close(model(noise, src_key_padding_mask=mask)[real], with_gradients[real])


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore:`torch.jit:DeprecationWarning")
def test_a_scripted_block_sees_no_padding_and_refuses_packed_tokens():
    """TorchScript has no way to say how long they were."""
    model, x = encoder(nested=True), tokens()
    ai.inject(model, block="se", after="layers.0", example_inputs=x)
    stir(model)
    scripted = torch.jit.script(model)
    assert torch.equal(scripted(x, None, MASK), model(x, src_key_padding_mask=MASK))
    with torch.no_grad(), pytest.raises(torch.jit.Error, match="enable_nested_tensor=False"):
        scripted(x, None, MASK)


def test_a_block_in_a_frozen_encoder_trains_in_eval_mode():
    """No layer of torch's takes packed tokens that need gradients, so there the padding stays."""
    model, x = encoder(nested=True).requires_grad_(False), tokens()
    ai.inject(model, block="se", after="layers.0", example_inputs=x)
    stir(model)
    with torch.no_grad():
        packed = model(x, src_key_padding_mask=MASK)
    result = model(x, src_key_padding_mask=MASK)
    torch.testing.assert_close(result[~MASK], packed[~MASK])
    result[~MASK].sum().backward()
    assert all(p.grad.any() for p in model.layers[0].se.parameters())


def test_ejecting_gives_the_encoder_its_class_back():
    """With the last block behind its layers, not before."""
    model, x = encoder(nested=True), tokens()
    ai.inject(model, block="se", after="layers.*", example_inputs=x)
    ai.eject(model, "layers.0.se")
    stir(model)
    with torch.no_grad():
        packed = model(x, src_key_padding_mask=MASK | MASK.flip(0))
    torch.testing.assert_close(
        model(x, src_key_padding_mask=MASK | MASK.flip(0))[~MASK & ~MASK.flip(0)],
        packed[~MASK & ~MASK.flip(0)],
    )
    ai.eject(model)
    assert type(model) is nn.TransformerEncoder
    assert vars(model).keys() == vars(encoder(nested=True)).keys()


class OwnForward(nn.TransformerEncoderLayer):
    """A layer whose forward is its own: the encoder packs tokens for it all the same."""

    def forward(self, src, src_mask=None, src_key_padding_mask=None, is_causal=False):
        return self.norm1(src + self.dropout1(self.linear2(self.linear1(src))))


def test_packed_tokens_within_a_layer_are_refused_with_the_setting_that_helps():
    """The plan says what a mask would do, and the forward refuses."""
    layer = OwnForward(16, 2, 32, dropout=0.0, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 2).eval(), tokens()
    (note,) = ai.plan(model, block="se", after="layers.0.linear2", example_inputs=x).notes
    assert "layers.0.se would stand inside nn.TransformerEncoder" in note
    assert "enable_nested_tensor=False" in note
    ai.inject(model, block="se", after="layers.0.linear2", example_inputs=x)
    with torch.no_grad():
        assert calls_of(model, x) == {"layers.0.se": 1}
        with pytest.raises(errors.LayoutError, match=r"enable_nested_tensor=False"):
            model(x, src_key_padding_mask=MASK)


@pytest.mark.parametrize(
    "where", [{"after": "layers.0"}, {"after": "layers.0.linear2"}, {"place": "block_end"}], ids=str
)
def test_sequences_before_the_batch_are_refused(where):
    """A block would mix the samples: torch's layers take (L, B, C) unless told otherwise."""
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32), 2, enable_nested_tensor=False)
    with pytest.raises(errors.LayoutError, match=r"positions before the batch.*batch_first=True"):
        ai.plan(model, block="se", example_inputs=tokens(), **where)


def test_tokens_that_a_model_is_given_have_their_channels_last():
    """A model of sequences: linear layers and layer norms say so, and blocks take sequences of other lengths."""
    model = nn.TransformerDecoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    given = tokens(), tokens()[:, :3]
    plan = ai.plan(model, block="se", place="residual_branch", example_inputs=given)
    assert [(s.path, s.layout.kind, s.channels) for s in plan.sites] == [
        (name, "NLC", 16) for name in ("self_attn", "multihead_attn", "linear2")
    ]
    longer = torch.cat([tokens(), tokens()], dim=1)
    bare = model(longer, tokens())
    ai.inject(model, block="se", place="residual_branch", example_inputs=given)
    assert torch.equal(model(longer, tokens()), bare)
