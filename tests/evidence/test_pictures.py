"""Pictures show what the blocks do, of whatever image, and nobody notices that the model was looked at."""

from __future__ import annotations

import base64
import importlib.util
import random
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from small import images
from torch import Tensor, nn

import attninject as ai
from attninject.blocks import registry
from attninject.cli import main
from attninject.errors import MissingPackageError, PictureError
from attninject.evidence import pictures_cam, pictures_paint
from attninject.evidence.pictures import PAGE, RANGE
from attninject.evidence.pictures_input import eyes_of, look_at
from attninject.evidence.pictures_record import looks_of, untouched
from attninject.evidence.pictures_views import Bars, Heat, coarser, panels_of, scene_of
from attninject.layout import Layout


class Net(nn.Module):
    """A stem of stride 4, a unit that blocks hang on, and class scores."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, 8, 4, stride=4)
        self.bn = nn.BatchNorm2d(8)
        self.unit = nn.Conv2d(8, 8, 3, padding=1)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.unit(self.bn(self.stem(x))).mean((2, 3))))


def shaken(model: nn.Module) -> nn.Module:
    """The blocks' weights random, so that no gate is 1."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for block in ai.injected(model).values():
            for p in block.parameters():
                p.add_(torch.randn(p.shape, generator=generator) * 0.5)
    return model


def net(block: str = "cbam", channels: int = 3, **rule: Any) -> nn.Module:
    torch.manual_seed(0)
    return shaken(
        ai.inject(Net(channels), block=block, after="unit", example_inputs=images(2, 32, channels), **rule)
    )


def photo(width: int = 60, height: int = 40) -> Image.Image:
    """Two smooth colours and a bright square at the upper left."""
    y, x = np.mgrid[:height, :width]
    made = np.stack([x * 255 // width, y * 255 // height, np.full_like(x, 90)], 2).astype(np.uint8)
    made[: height // 4, : width // 4] = 250
    return Image.fromarray(made)


def read_back(file: Path) -> np.ndarray:
    """The values of a heat map from its file: colours to levels, levels to values."""
    image = Image.open(file)
    low, high = map(float, image.text[RANGE].split())
    code = [65536, 256, 1]
    level = {int(c): i for i, c in enumerate(pictures_paint.palette().astype(int) @ code)}
    colours = np.asarray(image.convert("RGB")).astype(int) @ code
    return low + np.vectorize(level.__getitem__)(colours) / 255 * (high - low)


def cells(values: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """The value in the middle of each square."""
    down, across = (n // g for n, g in zip(values.shape, grid, strict=True))
    return values[down // 2 :: down, across // 2 :: across]


def seen(model: nn.Module, image: Any, size: int = 32) -> Any:
    return look_at([image], eyes_of(model, None, size), None)[0]


# --- what is drawn -------------------------------------------------------------------------------


def test_heat_map_is_the_gate(tmp_path: Path) -> None:
    """The squares of a spatial gate's file are the gate's values, to half a level of 255."""
    model = net()
    ai.visualize(model, photo(), tmp_path, size=32, cam=False)
    gate = ai.attention_maps(model, seen(model, photo()).x)["unit.cbam"]["spatial"][0, 0].numpy()
    shown = cells(read_back(tmp_path / "image" / "unit.cbam.spatial.png"), gate.shape)
    assert np.ptp(gate) > 0.01
    assert np.abs(shown - gate).max() <= np.ptp(gate) / 255 * 0.51


def test_maps_before_and_after_share_their_scale(tmp_path: Path) -> None:
    """Both channel means are there with one range, and what the block gave is the second."""
    model = net("se")
    ai.visualize(model, photo(), tmp_path, size=32, cam=False)
    files = [tmp_path / "image" / f"unit.se.features.{when}.png" for when in ("before", "after")]
    given: list[Tensor] = []
    model.unit.se.register_forward_hook(lambda block, args, y: given.extend((args[0], y)))
    with torch.no_grad():
        model.eval()(seen(model, photo()).x)
    assert Image.open(files[0]).text[RANGE] == Image.open(files[1]).text[RANGE]
    for file, tensor in zip(files, given, strict=True):
        expected = tensor[0].mean(0).numpy()
        level = np.ptp(torch.stack(given)[:, 0].mean(1).numpy()) / 255
        assert np.abs(cells(read_back(file), expected.shape) - expected).max() <= 0.51 * level


def test_bars_are_as_high_as_their_values() -> None:
    """From the line of 1, a value of 3 reaches twice as far up as 2, and 0 as far down as 2 up."""
    image = np.asarray(pictures_paint.bars(torch.tensor([3.0, 2.0, 0.0]), base=1.0))
    blue = (image == pictures_paint.FILL).all(2)
    left = np.linspace(124, 896, 4)[:3].astype(int) + 40
    heights = [int(blue[:, x].sum()) for x in left]
    assert heights[0] == pytest.approx(2 * heights[1], abs=4)
    assert heights[1] == pytest.approx(heights[2], abs=4)
    assert np.flatnonzero(blue[:, left[2]]).min() > np.flatnonzero(blue[:, left[1]]).max() - 4


def test_start_is_drawn_beside_bars(tmp_path: Path) -> None:
    """Given the model before training, bars have a second colour and maps say what they were."""
    torch.manual_seed(0)
    start = ai.inject(Net(), block="cbam", after="unit", example_inputs=images(2, 32))
    ai.visualize(net(), photo(), tmp_path, size=32, start=start, cam=False)
    bars = np.asarray(Image.open(tmp_path / "image" / "unit.cbam.channel.png"))
    assert (bars == pictures_paint.BEFORE).all(2).any()
    assert "before training 1 everywhere" in (tmp_path / PAGE).read_text()


def test_palette_rises_in_lightness_and_can_be_read_back() -> None:
    """Grey print keeps the order of the values, in even steps, and no two colours are the same."""
    colours = pictures_paint.palette()
    assert len(np.unique(colours, axis=0)) == 256
    linear = ((colours / 255 + 0.055) / 1.055) ** 2.4
    lightness = np.cbrt(linear @ [0.2126, 0.7152, 0.0722])
    smooth = lightness[8:] - lightness[:-8]
    assert smooth.min() > 0
    assert smooth.max() < 3 * np.median(smooth)


@pytest.mark.parametrize("name", [name for name in ai.list_blocks() if not name.startswith("timm/")])
@pytest.mark.parametrize(
    ("dims", "size", "layout"), [(2, (8, 12), None), (2, (7, 7), None), (1, (96,), Layout("NLC", 1, (8, 12)))]
)
def test_every_block_has_pictures(name: str, dims: int, size: tuple[int, ...], layout: Layout | None) -> None:
    """Whatever a block's `attention` returns is drawn, on maps and on tokens, in finite numbers."""
    torch.manual_seed(0)
    if dims not in registry.get(name).dims:
        pytest.skip(f"{name} works on other numbers of dimensions")
    block = ai.create_block(name, 32, dims=dims, init="paper").eval()
    x = torch.randn(1, 32, *size)
    scene = scene_of(block, x, layout, (0.6, 0.3))
    with torch.no_grad():
        attention = block.attention(x)
    for key, tensor in attention.items():
        panels = panels_of(key, tensor, scene)
        assert panels, f"nothing is drawn of {key}"
        for panel in panels:
            assert bool(panel.values.isfinite().all())
            assert panel.values.ndim == (2 if isinstance(panel, Heat) else 1)
            assert not isinstance(panel, Heat) or not panel.over or panel.values.shape == scene.grid or (
                coarser(scene.grid, panel.values.numel()) == tuple(panel.values.shape)
            )  # fmt: skip


def test_row_is_that_of_the_position(tmp_path: Path) -> None:
    """Of Non-Local's rows the one is drawn whose cell holds the pixel asked for, in the file's own pixels."""
    model = net("nonlocal", init="paper")
    image = photo(320, 320)
    given = look_at([image], eyes_of(model, None, 32), (100, 250))[0]
    ai.visualize(model, image, tmp_path, size=32, at=(100, 250), cam=False)
    left = (320 - 320 * 32 / 36) / 2  # timm resizes to 32 / 0.875 and crops
    row, column = int((250.5 - left) / (320 * 32 / 36) * 8), int((100.5 - left) / (320 * 32 / 36) * 8)
    rows = ai.attention_maps(model, given.x)["unit.nonlocal_"]["rows"][0, row * 8 + column].reshape(8, 8)
    shown = cells(read_back(tmp_path / "image" / "unit.nonlocal_.rows.png"), (8, 8))
    assert np.abs(shown - rows.numpy()).max() <= float(rows.max() - rows.min()) / 255 * 0.51 + 1e-9


def test_window_is_placed_where_it_is() -> None:
    """Windowed attention: the row's weights stand in the window of the position, 0 elsewhere, and sum to 1."""
    torch.manual_seed(0)
    block = ai.create_block("twins_lsa", 8, init="paper", window_size=3, num_heads=2)
    x = torch.randn(1, 8, 7, 8)
    scene = scene_of(block, x, None, (4.5 / 7, 7.5 / 8))
    with torch.no_grad():
        (panel,) = panels_of("rows", block.attention(x)["rows"], scene)
    window = torch.zeros(7, 8, dtype=torch.bool)
    window[3:6, 6:8] = True
    assert bool((panel.values[~window] == 0).all())
    assert float(panel.values.sum()) == pytest.approx(1, abs=1e-5)


@pytest.fixture(scope="module")
def vit() -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("test_vit").eval()
    ai.inject(model, block="se", after="blocks.2")
    ai.inject(model, block="nonlocal", after="blocks.3", init="paper")
    return shaken(model)


def test_tokens_are_drawn_on_their_grid(vit: nn.Module, tmp_path: Path) -> None:
    """A vision transformer: a map per patch, the class token left out; rows and rollout on the same grid."""
    files = ai.visualize(vit, photo(), tmp_path, cam=False)
    names = {file.name for file in files}
    assert {"blocks.2.se.gate.png", "blocks.3.nonlocal_.rows.over.png", "rollout.over.png"} <= names
    rows = read_back(tmp_path / "image" / "blocks.3.nonlocal_.rows.png")
    assert cells(rows, (10, 10)).sum() == pytest.approx(1, abs=0.02)


def test_rollout_is_the_product_of_the_layers(vit: nn.Module) -> None:
    """With all attention uniform, each layer mixes half of what is there: every patch reaches the class token alike."""
    for layer in vit.blocks:
        with torch.no_grad():
            layer.attn.qkv.weight[: 2 * layer.attn.qkv.in_features].zero_()
            layer.attn.qkv.bias[: 2 * layer.attn.qkv.in_features].zero_()
    with untouched(vit) as inner:
        heat = pictures_cam.rollout(inner, torch.randn(1, 3, 160, 160))
    depth, count = len(vit.blocks), 101
    assert heat is not None
    expected = torch.full((10, 10), (1 - 0.5**depth) / count)
    torch.testing.assert_close(heat.values, expected, rtol=1e-4, atol=1e-7)


def test_rollout_of_torchs_attention() -> None:
    """torch's own attention layers count too, wherever the network calls them without asking for weights."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.MultiheadAttention(8, 2, batch_first=True) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = x + layer(x, x, x, need_weights=False)[0]
            return x

    heat = pictures_cam.rollout(Two().eval(), torch.randn(1, 17, 8))
    assert heat is not None
    assert heat.values.shape == (4, 4)
    assert 0.2 < float(heat.values.sum()) < 1


# --- images --------------------------------------------------------------------------------------


def grey16() -> Image.Image:
    return Image.fromarray(np.asarray(photo().convert("L")).astype(np.uint16) * 257)


MODES: dict[str, Callable[[], Image.Image]] = {
    "grey": lambda: photo().convert("L"),
    "grey and alpha": lambda: photo().convert("LA"),
    "RGBA": lambda: photo().convert("RGBA"),
    "palette": lambda: photo().convert("P"),
    "black and white": lambda: photo().convert("1"),
    "CMYK": lambda: photo().convert("CMYK"),
    "16 bits": grey16,
    "floats": lambda: Image.fromarray(np.asarray(photo().convert("L")).astype(np.float32) / 255),
    "one pixel": lambda: photo().resize((1, 1)),
    "a strip": lambda: photo().resize((3000, 2)),
    "a column": lambda: photo().resize((2, 3000)),
}


@pytest.mark.parametrize("kind", MODES)
@pytest.mark.parametrize("channels", [1, 3])
def test_any_image_enters(kind: str, channels: int, tmp_path: Path) -> None:
    """Images of every mode and shape become what the model takes, of one channel or three."""
    file = tmp_path / ("a.tiff" if kind in ("CMYK", "floats", "16 bits") else "a.png")
    MODES[kind]().save(file)
    x = seen(Net(channels), file).x
    assert x.shape == (1, channels, 32, 32)
    assert bool(x.isfinite().all())


def test_sixteen_bits_are_the_same_picture(tmp_path: Path) -> None:
    """An image of 16 bits enters as its twin of 8 does, and so does one of floats: nothing is cut off at 255."""
    grey16().save(tmp_path / "a.png")
    expected = seen(Net(1), photo().convert("L")).x
    for image in (tmp_path / "a.png", MODES["floats"]()):
        torch.testing.assert_close(seen(Net(1), image).x, expected, atol=0.02, rtol=0)


def test_camera_held_upright(tmp_path: Path) -> None:
    """A file that says it was taken on its side is turned, and positions count in the upright image."""
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 270°
    photo().save(tmp_path / "a.png", exif=exif)
    upright = photo().transpose(Image.Transpose.ROTATE_270)
    eyes = eyes_of(Net(), None, 32)
    turned = look_at([tmp_path / "a.png"], eyes, (20, 35))[0]
    expected = look_at([upright], eyes, (20, 35))[0]
    assert turned.pixel == (20, 35)
    assert torch.equal(turned.x, expected.x)


def test_preprocessing_is_timms() -> None:
    """What enters is what timm's evaluation transform makes, but for a few hundredths at edges."""
    from timm.data import create_transform, resolve_model_data_config

    model = timm.create_model("test_vit")
    config = resolve_model_data_config(model)
    expected = create_transform(**config, is_training=False)(photo(640, 480))
    given = seen(model, photo(640, 480), size=None).x[0]
    assert given.shape == expected.shape
    assert float((given - expected).abs().mean()) < 0.02


def test_tensor_enters_as_it_is(tmp_path: Path) -> None:
    """A tensor, of as many channels as the model takes, is given to it unchanged."""
    model, x = net(channels=4), torch.randn(4, 32, 40)
    assert torch.equal(seen(model, x).x[0], x)
    assert (tmp_path / "image" / "image.png") in ai.visualize(model, x, tmp_path, cam=False)


# --- the files -----------------------------------------------------------------------------------


def test_files_are_all_that_is_in_the_folder(tmp_path: Path) -> None:
    """The list names every file, the page first; images of one name get folders of their own."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        photo().save(tmp_path / folder / "x.png")
    out = tmp_path / "new" / "maps"
    given = [tmp_path / "a" / "x.png", tmp_path / "b" / "x.png"]
    files = ai.visualize(net(), given, str(out), size=32, cam=False)
    assert files[0] == out / PAGE
    assert sorted(files) == sorted(p for p in out.rglob("*") if p.is_file())
    assert {file.parent.name for file in files[1:]} == {"x", "x-2"}


def test_page_needs_no_network(tmp_path: Path) -> None:
    """Every picture stands in the page itself; it asks for nothing else, and what it says is escaped."""
    source = tmp_path / "<b>&.png"
    photo().save(source)
    files = ai.visualize(net(), source, tmp_path / "out", size=32, cam=False)
    page = files[0].read_text(encoding="utf-8")
    assert "http:" not in page
    assert "https:" not in page
    assert set(re.findall(r'src="([^,"]*),', page)) == {"data:image/png;base64"}
    assert re.findall(r"url\(|@import|<script|<link", page) == []
    assert "<b>&.png" not in page
    assert "&lt;b&gt;&amp;" in page
    inside = {base64.b64decode(data) for data in re.findall(r'base64,([^"]*)"', page)}
    assert inside == {file.read_bytes() for file in files[1:]}
    assert "prefers-color-scheme:dark" in page
    assert 'name="viewport"' in page


# --- the model -----------------------------------------------------------------------------------


class Counting(Net):
    """A network that notices each run: in a buffer, in an attribute, in a random generator."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("runs", torch.zeros(()))
        self.last: Any = None
        self.broken = False

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        self.last = x
        torch.rand(1)
        random.random()
        if self.broken:
            raise RuntimeError("out of order")
        return super().forward(x)


@pytest.mark.parametrize("broken", [False, True])
def test_model_is_as_it_was(broken: bool, tmp_path: Path) -> None:
    """Weights, buffers, gradients, modes, hooks, attributes and generators: nothing has changed, not even in failure."""
    model = shaken(ai.inject(Counting(), block="cbam", after="unit", example_inputs=images(2, 32)))
    model.train()
    model.stem.eval()
    model(images(2, 32)).sum().backward()
    model.unit.weight.requires_grad_(False)
    model.broken = broken

    def state() -> tuple[Any, ...]:
        return (
            {k: (id(v), v.clone()) for k, v in model.state_dict(keep_vars=True).items()},
            {
                k: (id(p.grad), None if p.grad is None else p.grad.clone())
                for k, p in model.named_parameters()
            },
        )

    def rest() -> tuple[Any, ...]:
        modes = [m.training for m in model.modules()]
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
        return modes, hooks, id(model.last), random.getstate(), torch.get_rng_state().tolist()

    tensors, others = state(), rest()
    if broken:
        with pytest.raises(RuntimeError, match="out of order"):
            ai.visualize(model, photo(), tmp_path, size=32)
    else:
        ai.visualize(model, photo(), tmp_path, size=32)
    assert rest() == others
    for before, after in zip(tensors, state(), strict=True):
        for key, (identity, value) in before.items():
            assert after[key][0] == identity
            assert (value is None and after[key][1] is None) or torch.equal(after[key][1], value)


def test_block_that_runs_twice_or_not_at_all_is_told() -> None:
    """Each call has pictures; a disabled block has a sentence in their place."""

    class Twice(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.unit(self.unit(self.bn(self.stem(x)))).mean((2, 3)))

    model = ai.inject(Twice(), block="se", after="unit", call="all", example_inputs=images(2, 32))
    looks, _ = looks_of(model.eval(), images(1, 32), (0.5, 0.5))
    assert len(looks) == 2
    assert all(any(isinstance(p, Bars) for p in look.panels) for look in looks)
    with ai.disabled(model):
        looks, _ = looks_of(model, images(1, 32), (0.5, 0.5))
    assert {look.note for look in looks} == {"the block is disabled"}


def test_block_without_attention_shows_its_maps(tmp_path: Path) -> None:
    """A class of one's own that does not say what it attends to has the maps before and after it."""
    model = ai.inject(Net(), block="timm/se", after="unit", example_inputs=images(2, 32))
    files = ai.visualize(model, photo(), tmp_path, size=32, cam=False)
    assert sum("features" in file.name for file in files) == 2
    assert "does not say what it attends to" in files[0].read_text()


# --- Grad-CAM ------------------------------------------------------------------------------------


def test_missing_package_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without grad-cam the page says how to get it, and asking for it is refused before any work."""
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == pictures_cam.PACKAGE else found(name)
    )
    with pytest.raises(MissingPackageError, match=r"grad-cam, which is not installed: pip install"):
        ai.visualize(net(), photo(), tmp_path / "a", size=32, cam=True)
    assert not (tmp_path / "a").exists()
    page = ai.visualize(net(), photo(), tmp_path / "b", size=32)[0].read_text()
    assert "pip install &quot;attninject[pictures]&quot;" in page


def test_grad_cam_is_its_formula(tmp_path: Path) -> None:
    """relu of the maps behind the block, weighted by the class score's mean gradients, the largest 1."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("pytorch_grad_cam")
    model = net()
    for p in model.parameters():
        p.requires_grad_(False)  # a frozen model has a map, too
    x = seen(model, photo()).x
    with untouched(model) as inner:
        heat = pictures_cam.grad_cam(inner, x, "unit.cbam", (0.5, 0.5))
    kept: list[Tensor] = []
    model.eval().unit.cbam.register_forward_hook(lambda block, args, y: kept.append(y))
    scores = model(x.clone().requires_grad_())
    (gradient,) = torch.autograd.grad(scores[0, scores.argmax()], kept[0])
    map_ = (gradient.mean((2, 3), keepdim=True) * kept[0]).sum(1).relu()[0].detach()
    assert heat is not None
    least, most = map_.min(), map_.max()
    shown = heat.values[2::4, 2::4]  # enlarged to the image's size
    assert (
        torch.corrcoef(torch.stack([shown.flatten(), ((map_ - least) / (most - least)).flatten()]))[0, 1]
        > 0.95
    )
    assert "grad-cam.over.png" in {f.name for f in ai.visualize(model, photo(), tmp_path, size=32, cam=True)}


# --- the command line, runs, and what is refused --------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = main(argv)
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_command_draws(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """`attninject visualize MODEL IMAGE` builds, injects and draws, and says where."""
    photo().save(tmp_path / "a.png")
    given = ("visualize", "timm/test_resnet", str(tmp_path / "a.png"), "-o", str(tmp_path / "out"))
    code, out, err = run(capsys, *given, "--recipe", "se", "--size", "64", "--at", "30,20", "--no-cam")
    assert (code, err) == (0, "")
    count = len(list((tmp_path / "out" / "a").glob("*.png")))
    assert out == f"wrote {tmp_path / 'out' / PAGE} and {count} pictures in {tmp_path / 'out'}\n"


REFUSED = {
    "no blocks": ({"model": Net()}, "Net has no injected blocks; inject a recipe first"),
    "no image": ({"image": []}, "no image was given"),
    "missing file": ({"image": "gone.png"}, "gone.png cannot be read as an image: No such file"),
    "no image file": ({"image": __file__}, "cannot be read as an image: it is none that Pillow knows"),
    "outside": ({"at": (60, 10)}, "the position 60,10 lies outside image, an image of 60×40 pixels"),
    "outside the crop": (
        {"at": (2, 20)},
        "2,20 lies outside what the model sees of image: x 12 to 47, y 2 to 37",
    ),
    "many channels": (
        {"model": net(channels=4)},
        "takes 4 channels: give a tensor (C, H, W) in place of image",
    ),
    "a batch": ({"image": torch.zeros(2, 3, 32, 32)}, "found (2, 3, 32, 32)"),
    "a file's place": ({"out": __file__}, "cannot be written: File exists"),
    "below a file": ({"out": f"{__file__}/maps"}, "cannot be written: Not a directory"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_in_a_sentence(kind: str, tmp_path: Path) -> None:
    """Bad input is told in one sentence, before anything is written."""
    given, text = REFUSED[kind]
    wanted = {"model": net(), "image": photo(), "out": tmp_path / "out", "size": 32, "cam": False, **given}
    with pytest.raises(PictureError) as told:
        ai.visualize(**wanted)
    assert text in str(told.value)
    assert "\n" not in str(told.value)
    assert not (tmp_path / "out").exists()


def test_truncated_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Half a file is told as that, with exit code 1."""
    photo(300, 300).save(tmp_path / "a.jpg")
    content = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(content[: len(content) // 2])
    given = ("visualize", "timm/test_resnet", str(tmp_path / "a.jpg"), "-o", str(tmp_path / "out"))
    code, out, err = run(capsys, *given, "--recipe", "se")
    assert (code, out) == (1, "")
    assert err.startswith(f"attninject: {tmp_path / 'a.jpg'} cannot be read as an image: ")
    assert err.count("\n") == 1
