"""Every built-in block in every layout: the same numbers as by hand, or an error that names both."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from nets import pretrained
from small import calls_of, stir
from torch import Tensor, nn

import attninject as ai
from attninject import errors
from attninject.blocks import registry
from attninject.layout import Layout
from attninject.surgery import layout_adapters

C, H, W = 16, 4, 6
NAMES = [n for n in registry.list_blocks() if registry.get(n).family not in ("registered", "timm")]


class As(nn.Module):
    """Brings a map into a layout, by a layer and a function of its result."""

    def __init__(self, form: Callable[[Tensor], Any], nd: int) -> None:
        super().__init__()
        self.conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[nd - 1](3, C, 1)
        self.extra = nn.Parameter(torch.randn(1, 3, C))
        self.form = form

    def forward(self, x):
        return self.form(self, self.conv(x))


class Owner(nn.Module):
    """Calls the layer under test and hands its result on."""

    def __init__(self, form: Callable[[Tensor], Any], nd: int) -> None:
        super().__init__()
        self.a = As(form, nd)
        self.b = nn.Identity()

    def forward(self, x):
        return self.b(self.a(x))


class Net(nn.Module):
    """A root around the owner."""

    def __init__(self, form: Callable[[Tensor], Any], nd: int) -> None:
        super().__init__()
        self.inner = Owner(form, nd)

    def forward(self, x):
        return self.inner(x)


def last(x: Tensor) -> Tensor:
    """(B, C, …) → (B, …, C), a tensor of its own."""
    return x.movedim(1, -1).contiguous()


def tokens(x: Tensor) -> Tensor:
    """(B, C, …) → (B, N, C)."""
    return x.flatten(2).transpose(1, 2)


def windows(x: Tensor) -> Tensor:
    """(B, C, H, W) → (B, H/2, W/2, 2, 2, C)."""
    b = x.shape[0]
    return x.view(b, C, H // 2, 2, W // 2, 2).permute(0, 2, 4, 3, 5, 1)


FORMS: dict[str, tuple[int, Callable[[nn.Module, Tensor], Any], str]] = {
    "NCHW": (2, lambda self, x: x, "NCHW"),
    "NHWC": (2, lambda self, x: last(x), "NHWC"),
    "NLC": (2, lambda self, x: tokens(x), f"NLC {H}×{W}"),
    "prefix": (
        2,
        lambda self, x: torch.cat((self.extra.expand(x.shape[0], -1, -1), tokens(x)), 1),
        f"NLC 3+{H}×{W}",
    ),
    "NCL": (1, lambda self, x: x, "NCL"),
    "channels first": (2, lambda self, x: x.flatten(2), f"NCL {H}×{W}"),
    "NCDHW": (3, lambda self, x: x, "NCDHW"),
    "NDHWC": (3, lambda self, x: last(x), "NDHWC"),
    "video": (3, lambda self, x: tokens(x), f"NLC 3×{H}×{W}"),
    "tuple": (2, lambda self, x: (1, x), "NCHW"),
    "list": (2, lambda self, x: [x, None], "NCHW"),
    "dict": (2, lambda self, x: {"size": 3, "map": last(x)}, "NHWC"),
    "unrolled": (2, lambda self, x: windows(x).reshape(x.shape[0], H * W, C), "NLC unordered"),
    "windows": (2, lambda self, x: windows(x).reshape(-1, 4, C), "NLC unordered"),
    "windows beside": (2, lambda self, x: windows(x).reshape(x.shape[0], -1, 4, C), "NHWC unordered"),
}
OUTPUT = {"tuple": 1, "list": 0, "dict": "map"}
INPUT = {1: (2, 3, 20), 2: (2, 3, H, W), 3: (2, 3, 3, H, W)}


def value(form: str, out: Any) -> Tensor:
    """The tensor that the site is about."""
    return out[OUTPUT[form]] if form in OUTPUT else out


def by_hand(form: str, x: Tensor, block: nn.Module) -> Tensor:
    """The block on a tensor of a layout, written out anew."""
    kind = {"dict": "NHWC", "tuple": "NCHW", "list": "NCHW"}.get(form, form)
    if kind in ("NCHW", "NCL", "NCDHW"):
        return block(x)
    if kind in ("NHWC", "NDHWC", "windows beside"):
        return block(x.movedim(-1, 1)).movedim(1, -1)
    if kind == "channels first":
        return block(x.unflatten(2, (H, W))).flatten(2)
    front = 3 if kind == "prefix" else 0
    sequence = x[:, front:].transpose(1, 2)
    grid = {"video": (3, H, W), "NLC": (H, W), "prefix": (H, W)}.get(kind)
    y = block(sequence.unflatten(2, grid)).flatten(2) if grid else block(sequence)
    return torch.cat((x[:, :front], y.transpose(1, 2)), 1)


@pytest.mark.parametrize(
    ("form", "names"),
    [
        *(pytest.param(form, NAMES[at % 3 :: 3], id=form) for at, form in enumerate(FORMS)),
        *(pytest.param(form, NAMES, id=f"{form}-all", marks=pytest.mark.slow) for form in FORMS),
    ],
)
def test_every_block_runs_in_a_layout_or_says_why_not(form: str, names: list[str]) -> None:
    """Identity bit for bit, one call, and with other weights the same result as by hand; else both are named.

    Every third block in each layout, each block in several; every block in every layout in the slow tier.
    """
    nd, function, expected = FORMS[form]
    torch.manual_seed(0)
    base = Net(function, nd).eval()
    x = torch.randn(INPUT[nd])
    where = {"after": "inner.a", "output": OUTPUT.get(form), "example_inputs": x}
    is_map = "unordered" not in expected
    with torch.no_grad():
        before = base(x)
        for name in names:
            model = copy.deepcopy(base)
            if registry.get(name).spatial and not is_map:
                with pytest.raises(
                    errors.LayoutError, match=f"inner.a holds .*, and {name} works on positions"
                ):
                    ai.plan(model, block=name, **where)
                continue
            if (nd if is_map else 1) not in registry.get(name).dims:
                with pytest.raises(errors.LayoutError, match=f"{name} works on .*D maps; inner.a is"):
                    ai.plan(model, block=name, **where)
                continue
            plan = ai.plan(model, block=name, **where)
            assert str(plan.sites[0].layout) == expected
            ai.inject(model, plan)
            assert torch.equal(value(form, model(x)), value(form, before)), name
            assert set(calls_of(model, x).values()) == {1}, name
            stir(model)
            (block,) = ai.injected(model).values()
            found = value(form, model(x))
            torch.testing.assert_close(found, by_hand(form, value(form, before), block), msg=name)


def test_channels_last_goes_in_as_a_view() -> None:
    """The block reads the very memory of an NHWC tensor, as channels_last, and gives NHWC strides back."""
    model = Net(FORMS["NHWC"][1], 2).eval()
    ai.inject(model, block="se", after="inner.a", example_inputs=torch.randn(2, 3, H, W))
    (block,) = ai.injected(model).values()
    seen: dict[str, Tensor] = {}
    model.inner.a.register_forward_hook(lambda m, i, out: seen.update(made=out))
    block.register_forward_pre_hook(lambda m, i: seen.update(given=i[0]))
    with torch.no_grad():
        out = model(torch.randn(2, 3, H, W))
    assert seen["given"].data_ptr() == seen["made"].data_ptr()
    assert seen["given"].is_contiguous(memory_format=torch.channels_last)
    assert out.is_contiguous()


def test_a_layout_can_be_said_in_the_rule() -> None:
    """What was measured is overridden: windows become a batch of maps, when the user says so."""
    model = Net(FORMS["windows beside"][1], 2).eval()
    x = torch.randn(2, 3, H, W)
    plan = ai.plan(model, block="cbam", after="inner.a", layout="NHWC", example_inputs=x)
    assert plan.sites[0].layout == Layout("NHWC")
    with pytest.raises(errors.LayoutError, match=r"layout NCDHW has 5 axes; inner\.a has \(2, 6, 4, 16\)"):
        ai.plan(model, block="cbam", after="inner.a", layout="NCDHW", example_inputs=x)


# --- tokens of other inputs --------------------------------------------------------------------

SIZES = ((64, 64), (32, 128), (64, 48), (128, 32), (16, 16))


def grids(model: nn.Module, sizes: Any = SIZES) -> list[tuple[int, ...]]:
    """The map that the first block sees, for each size of the image."""
    seen: list[tuple[int, ...]] = []
    block = next(iter(ai.injected(model).values()))
    handle = block.register_forward_pre_hook(lambda m, i: seen.append(tuple(i[0].shape[2:])))
    with torch.no_grad():
        for size in sizes:
            model(torch.randn(1, 3, *size))
    handle.remove()
    return seen


def vit(**more: Any) -> nn.Module:
    """A small ViT that takes images of any size."""
    torch.manual_seed(0)
    return pretrained(timm.create_model("test_vit", img_size=64, dynamic_img_size=True, **more))


@pytest.mark.parametrize("place", ["block_end", "residual_branch"])
def test_a_vit_takes_images_of_any_size_and_shape(place: str) -> None:
    """With dynamic_img_size the outputs stay bit-equal; 2 × 8 tokens are told from 4 × 4."""
    base = vit()
    model = ai.inject(copy.deepcopy(base), block="cbam", place=place)
    with torch.no_grad():
        for size in SIZES:
            x = torch.randn(1, 3, *size)
            assert torch.equal(model(x), base(x)), size
    assert grids(model) == [(4, 4), (2, 8), (4, 3), (8, 2), (1, 1)]


def test_class_and_register_tokens_are_no_positions() -> None:
    """One class and four register tokens stay outside the grid."""
    plan = ai.plan(vit(reg_tokens=4), block="cbam", place="block_end")
    assert {str(s.layout) for s in plan.sites} == {"NLC 5+4×4"}


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_blocks_at_positions_that_nobody_reads_are_announced(pool: str) -> None:
    """Behind a class-token head's last attention the plan's note names just the blocks that get no gradient."""
    base = vit(global_pool=pool)
    plan = ai.plan(base, block="cbam", place="residual_branch")
    notes = [n for n in plan.notes if "nothing reads the positions" in n]
    model = ai.inject(base, plan).train()
    model(torch.randn(2, 3, 64, 64)).square().sum().backward()
    idle = [
        name
        for name, block in ai.injected(model).items()
        if all(p.grad is None or not p.grad.any() for p in block.parameters())
    ]
    assert idle == (["blocks.5.cbam", "blocks.5.cbam_2"] if pool == "token" else [])
    assert [n.partition("behind ")[2].partition(", only")[0] for n in notes] == (
        [", ".join(idle)] if idle else []
    )


def test_copies_of_a_net_on_tokens_know_their_own_size() -> None:
    """After deepcopy and pickle, each copy tells grids by its own layer; eject leaves that layer as it was."""
    import pickle

    model = ai.inject(vit(), block="cbam", place="block_end")
    kind, state = type(model.patch_embed.proj), list(model.patch_embed.proj.__dict__)
    twin = copy.deepcopy(model)
    again = pickle.loads(pickle.dumps(model))
    grids(model, [(32, 128)])
    for other in (twin, again):
        assert grids(other, [(64, 64), (128, 32)]) == [(4, 4), (8, 2)]
    assert kind is not nn.Conv2d
    names = list(ai.injected(model))
    ai.eject(model, names[0])
    assert grids(model, [(32, 128)]) == [(2, 8)]
    ai.eject(model)
    assert type(model.patch_embed.proj) is nn.Conv2d
    assert [k for k in state if k != layout_adapters.EXTENT] == list(model.patch_embed.proj.__dict__)


def test_a_compiled_or_exported_vit_tells_sizes_apart() -> None:
    """No graph break by us; an export with free height and width takes images of other shapes."""
    free, bare = torch.export.Dim.AUTO, vit(depth=1)
    program = torch.export.export(bare, (torch.randn(1, 3, *SIZES[1]),), dynamic_shapes=({2: free, 3: free},))
    try:
        program.module()(torch.randn(1, 3, *SIZES[0]))
    except RuntimeError:
        pytest.skip("this torch fixes the sizes of the bare network")
    model = ai.inject(bare, block="cbam", after="blocks.0")
    stir(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        images = [torch.randn(1, 3, *size) for size in SIZES[:2]]
        expected = [model(x) for x in images]
        assert all(torch.equal(compiled(x), y) for x, y in zip(images, expected, strict=True))
        program = torch.export.export(model, (images[1],), dynamic_shapes=({2: free, 3: free},)).module()
        for x, y in zip(images, expected, strict=True):
            torch.testing.assert_close(program(x), y)
    torch._dynamo.reset()


def test_swin_takes_another_oblong_size() -> None:
    """NHWC needs no grid: a changed, oblong size works as the base does."""
    torch.manual_seed(0)
    base = pretrained(
        timm.models.SwinTransformer(
            img_size=64, patch_size=4, window_size=4, embed_dim=16, depths=(1, 1), num_heads=(2, 2),
            num_classes=3, strict_img_size=False,
        )
    )  # fmt: skip
    model = ai.inject(copy.deepcopy(base), block="cbam", place="block_end")
    x = torch.randn(1, 3, 32, 96)
    with torch.no_grad():
        assert torch.equal(model(x), base(x))


@pytest.mark.parametrize(
    ("count", "grid", "seen", "expected"),
    [
        (16, (4, 4), None, (4, 4)),
        (16, (4, 4), (2, 8), (2, 8)),
        (36, (4, 4), None, (6, 6)),
        (36, (4, 4), (2, 8), (6, 6)),  # what was seen last is of another forward
        (8, (4, 8), None, (2, 4)),
        (24, (2, 3, 4), None, (2, 3, 4)),
    ],
)
def test_a_grid_is_what_was_seen_else_measured_else_alike(
    count: int, grid: tuple, seen: tuple | None, expected: tuple
) -> None:
    """The order in which the grid of a number of tokens is looked for."""
    assert layout_adapters.fit_grid(count, grid, seen) == expected


@pytest.mark.parametrize(("count", "grid"), [(12, (4, 4)), (0, (4, 4)), (25, (2, 3, 4))])
def test_tokens_that_fit_no_grid_are_an_error(count: int, grid: tuple) -> None:
    """Nothing is guessed."""
    with pytest.raises(errors.LayoutError, match=f"{count} tokens form no grid"):
        layout_adapters.fit_grid(count, grid)


# --- real architectures ------------------------------------------------------------------------

ARCHITECTURES = [
    ("hiera_tiny_224", "blocks.0", "NLC unordered"),  # unrolled
    ("nest_tiny", "levels.0.transformer_encoder.1", "NHWC unordered"),  # windows beside the positions
    ("pit_ti_224", "transformers.0.blocks.1", "NLC 1+27×27"),  # patches overlap: 27 = (224 − 16) / 8 + 1
    ("crossvit_tiny_240", "blocks.0.blocks.1.3", "NLC 1+14×14"),  # resized inside
    ("mobilevit_xxs", "stages.2.1.transformer.0", "NLC unordered"),  # patches in the batch
    ("levit_128s", "stages.1.blocks.1", "NLC 7×7"),  # sub-sampled tokens
    ("swin_tiny_patch4_window7_224", "layers.0.blocks.1", "NHWC"),
    ("swin_tiny_patch4_window7_224", "layers.0.blocks.1.attn", "NLC unordered"),  # windows in the batch
    ("tnt_s_legacy_patch16_224", "blocks.0.mlp_in", "NLC unordered"),  # pixels of a patch
    ("tnt_s_patch16_224", "blocks.0.mlp_in", "NLC unordered"),  # the same, cut out before the convolution
    ("mvitv2_tiny", "stages.1.blocks.0.mlp", "NLC 28×28"),  # pooled within the attention
]


@pytest.mark.parametrize(("name", "path", "expected"), ARCHITECTURES)
def test_positions_are_followed_through_a_real_network(name: str, path: str, expected: str) -> None:
    """Grids and orders that no shape tells: read off the source of each network."""
    if not timm.is_model(name):
        pytest.skip("this timm has no such model")
    try:
        with torch.device("meta"):
            model = timm.create_model(name)
    except RuntimeError:  # timm 1.0.15 reads drop rates off a tensor
        model = timm.create_model(name)
    plan = ai.plan(model, block="se", after=path)
    assert str(plan.sites[0].layout) == expected
    if "unordered" in expected:
        with pytest.raises(errors.LayoutError, match="cbam works on positions"):
            ai.plan(model, block="cbam", after=path)


def test_where_tensors_are_made_by_default_does_not_matter() -> None:
    """Under `torch.device("meta")` tokens keep their grid, and blocks of a network with numbers have theirs."""
    model, x = pretrained(timm.create_model("test_vit", num_classes=3)), torch.randn(2, 3, 160, 160)
    outside = ai.plan(model, block="se", place="block_end")
    with torch.device("meta"):
        assert ai.plan(model, block="se", place="block_end").sites == outside.sites
        injected = ai.inject(copy.deepcopy(model), block="se", place="block_end")
    assert str(outside.sites[0].layout) == "NLC 1+10×10"
    assert torch.equal(injected(x), model(x))
