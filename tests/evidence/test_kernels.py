"""Kernels over images against gradients that autograd gives image by image."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attninject as ai
from attninject.evidence import gradients
from attninject.evidence.gradients import Collector, factored_kernel, sketch


def small() -> nn.Module:
    """Two convolutions and a head, in float64, with room for an odd map (5×6)."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    ).double().eval()  # fmt: skip


def batch(images: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(images, 3, 5, 6, dtype=torch.float64, generator=generator)
    return x, torch.arange(images) % 4


def explicit(model: nn.Module, block: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """K: (n, n) from one backward pass per image."""
    zeros = [p for p in block.parameters() if not p.detach().any()]
    rows = []
    for i in range(len(x)):
        loss = F.cross_entropy(model(x[i : i + 1]), y[i : i + 1])
        found = torch.autograd.grad(loss, zeros, allow_unused=True)
        rows.append(
            torch.cat(
                [
                    (torch.zeros_like(p) if g is None else g).flatten()
                    for p, g in zip(zeros, found, strict=True)
                ]
            )
        )
    g = torch.stack(rows)
    return g @ g.T


def complain(number: int, batch: Any) -> None:
    raise AssertionError(f"batch {number} is not finite")


def collected(model: nn.Module, x: Tensor, y: Tensor, size: int = 4) -> tuple[Collector, dict[str, Tensor]]:
    collector = Collector(ai.injected(model), complain)

    def losses(b: Any) -> Tensor:
        return F.cross_entropy(model(b[0]), b[1], reduction="none")

    parts = list(zip(x.split(size), y.split(size), strict=True))
    return collector, collector.run(lambda: ((part, losses) for part in parts))


BLOCKS: list[tuple[str, dict[str, Any]]] = [
    ("se", {"reduction": 2}),
    ("se", {"reduction": 2, "bias": False}),
    ("channel_attention", {"reduction": 2}),
    ("cbam", {"reduction": 2}),
    ("cbam", {"reduction": 2, "norm": False}),
    ("eca", {}),
    ("bam", {"reduction": 2, "dilation": 1}),
    ("bam", {"reduction": 2, "dilation": 1, "mode": "sum"}),
    ("gc", {"reduction": 2}),
    ("gct", {}),
    ("nonlocal", {}),
    ("nonlocal", {"norm": True}),
    ("coord", {}),
    ("danet", {}),
    ("simam", {}),
    ("self_attention", {}),
]


@pytest.mark.parametrize(("block", "args"), BLOCKS, ids=lambda v: str(v))
def test_the_kernel_is_that_of_one_backward_pass_per_image(block: str, args: dict[str, Any]) -> None:
    """For every way a block can be the identity, K equals the Gram matrix of autograd's per-image gradients."""
    model, (x, y) = small(), batch()
    torch.manual_seed(2)
    ai.inject(model, block=block, after="[13]", args=args)
    collector, kernels = collected(model, x, y)
    assert len(kernels) == 2
    for name, injected in ai.injected(model).items():
        wanted = explicit(model, injected, x, y)
        assert wanted.abs().max() > 0
        torch.testing.assert_close(kernels[name], wanted, rtol=1e-9, atol=1e-15)
    assert collector.notes == []


def test_blocks_on_tokens_have_the_same_kernels() -> None:
    """A block whose input are tokens (B, N, C) keeps the images apart as on maps."""
    torch.manual_seed(0)

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.norm, self.mix, self.fc = (
                nn.Conv2d(3, 8, 2, 2),
                nn.LayerNorm(8),
                nn.Linear(8, 8),
                nn.Linear(8, 4),
            )

        def forward(self, x: Tensor) -> Tensor:
            t = self.norm(self.embed(x).flatten(2).transpose(1, 2))
            return self.fc(torch.relu(self.mix(t)).mean(1))

    model = Tokens().double().eval()
    x, y = torch.randn(6, 3, 8, 8, dtype=torch.float64), torch.arange(6) % 4
    ai.inject(model, block="se", after="norm", args={"reduction": 2}, example_inputs=x[:2])
    _, kernels = collected(model, x, y)
    (name,) = kernels
    torch.testing.assert_close(
        kernels[name], explicit(model, ai.injected(model)[name], x, y), rtol=1e-9, atol=1e-15
    )


def test_hand_counted_kernel_of_one_linear_gate() -> None:
    """δ = (1, 2), h = (3; 4) gives gradients 3 and 8, so K = [[9, 24], [24, 64]]."""
    delta, h = torch.tensor([[[1.0]], [[2.0]]]), torch.tensor([[[3.0]], [[4.0]]])
    assert factored_kernel(delta, h).tolist() == [[9.0, 24.0], [24.0, 64.0]]


def test_factors_of_several_positions_are_those_of_the_summed_gradient() -> None:
    """K from δ and h at P positions is the Gram matrix of Σ_p δ_p h_pᵀ."""
    delta, h = torch.randn(5, 3, 4, dtype=torch.float64), torch.randn(5, 3, 2, dtype=torch.float64)
    g = torch.einsum("npo,npi->noi", delta, h).flatten(1)
    torch.testing.assert_close(factored_kernel(delta, h), g @ g.T)


def test_a_sketch_keeps_inner_products() -> None:
    """A count sketch of 20,000 numbers in 4,096 keeps norms within a few per cent, and is the same every time."""
    g = torch.randn(4, 20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    small_g = sketch(g, 4096)
    assert torch.equal(small_g, sketch(g, 4096))
    assert ((small_g @ small_g.T - g @ g.T).abs() < 0.1 * 20_000).all()


def test_wide_gradients_are_sketched_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient wider than the limit is projected, and a note says at which site."""
    monkeypatch.setattr(gradients, "WIDEST", 8)
    model, (x, y) = small(), batch()
    ai.inject(model, block="nonlocal", after="1")
    collector, kernels = collected(model, x, y)
    assert any("projected at random" in note for note in collector.notes)
    assert all(torch.isfinite(k).all() for k in kernels.values())


class Shuffles(nn.Module):
    """A gate whose layer sees the batch behind the positions: (N, B, C), as sequence-first attention does."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc = nn.Linear(channels, channels)
        nn.init.zeros_(self.fc.weight)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        z = self.fc(x.flatten(2).permute(2, 0, 1))
        return x * (1 + z.permute(1, 2, 0).unflatten(2, x.shape[2:]))


def test_a_layer_that_sees_the_batch_elsewhere_is_found_out() -> None:
    """Where a layer's first axis is no batch, the check on the first batch sends the block the slower way."""
    model, (x, y) = small(), batch(6)
    x = x[..., :1, :]  # six positions for six images: the shapes fit, the images would not
    ai.inject(model, block=Shuffles, after="1", example_inputs=x[:2])
    collector, kernels = collected(model, x, y, size=6)
    (name,) = kernels
    assert collector.watched[0].how == "block"
    torch.testing.assert_close(
        kernels[name], explicit(model, ai.injected(model)[name], x, y), rtol=1e-9, atol=1e-15
    )


class Branches(nn.Module):
    """A gate that asks for a value of its input, which vmap refuses."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + self.weight) if float(x.detach().sum()) > 0 else x * (1 + 2 * self.weight)


def test_a_block_that_vmap_refuses_is_run_row_by_row() -> None:
    """Control flow that depends on data costs time, not correctness."""
    model, (x, y) = small(), batch()
    ai.inject(model, block=Branches, after="1")
    collector, kernels = collected(model, x, y)
    (name,) = kernels
    assert collector.watched[0].one_by_one
    torch.testing.assert_close(
        kernels[name], explicit(model, ai.injected(model)[name], x, y), rtol=1e-9, atol=1e-15
    )
