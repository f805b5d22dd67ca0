"""The data of studies: divided by source, drawn from a seed, clear about what is missing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

from attninject.errors import DataError
from attninject.evidence import tasks
from attninject.evidence.tasks import (
    cut_outs,
    damaged_photos,
    damages,
    drawn_letters,
    fonts,
    handwriting,
    photographs,
)


def test_digits_on_photos_are_drawn_from_the_seed() -> None:
    """The same seed gives the same images; another one others; all in [0, 1], ten classes, an origin and a licence."""
    first, again = (tasks.digits_on_photos(seed=3, size=32, train=40, test=20) for _ in range(2))
    assert torch.equal(first.train.images, again.train.images)
    assert torch.equal(first.test.labels, again.test.labels)
    other = tasks.digits_on_photos(seed=4, size=32, train=40, test=20)
    assert not torch.equal(first.train.images, other.train.images)
    assert first.train.images.shape == (40, 3, 32, 32)
    assert 0 <= float(first.train.images.min()) <= float(first.train.images.max()) <= 1
    assert first.classes == tuple("0123456789")
    assert "CC BY" in first.licence
    assert "scikit-learn" in first.origin


def test_digits_of_training_are_not_in_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a digit nor a part of a photograph is in both."""
    seen = []
    monkeypatch.setattr(
        handwriting, "_on_photos", lambda strokes, labels, photos, *rest: seen.append((strokes, photos))
    )
    with pytest.raises(AttributeError):
        tasks.digits_on_photos().train.images  # noqa: B018
    (train, left), (test, right) = seen
    assert len(train) + len(test) == 1797
    assert [a.shape[2] + b.shape[2] for a, b in zip(left, right, strict=True)] == [640, 640]


def test_normalised_is_per_channel() -> None:
    """(x − mean) / std, labels as they are."""
    task = tasks.digits_on_photos(size=32, train=20, test=20)
    changed = task.normalised((0.5, 0.0, 0.0), (0.5, 1.0, 1.0))
    torch.testing.assert_close(changed.train.images[:, 0], (task.train.images[:, 0] - 0.5) / 0.5)
    assert torch.equal(changed.train.images[:, 1], task.train.images[:, 1])


def test_letters_ask_for_fonts_of_several_makers(tmp_path: Path) -> None:
    """Too few makers: how many, where it looked, and what to install."""
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    with pytest.raises(DataError, match=r"at least 4 makers, found 0 \(none\).*fonts-liberation"):
        tasks.letters(folders=[tmp_path])


def test_letters_of_test_fonts_are_of_other_makers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four makers one is held out; letters are there, light or dark, each in its square."""
    fonts = sorted(Path("/usr/share/fonts").rglob("*.ttf"))
    if not fonts:
        pytest.skip("no fonts are installed")
    monkeypatch.setattr(drawn_letters, "fonts_by_maker", lambda *_: {name: [fonts[0]] for name in "wxyz"})
    groups = []
    written = drawn_letters._written
    monkeypatch.setattr(
        drawn_letters, "_written", lambda makers, *rest: groups.append(len(makers)) or written(makers, *rest)
    )
    task = tasks.letters(size=24, train=30, test=10)
    assert groups == [3, 1]
    assert task.train.images.shape == (30, 3, 24, 24)
    assert task.train.labels[:11].tolist() == [*range(10), 0]
    spread = task.train.images.flatten(2).std(2).mean()
    assert spread > 0.01
    again = tasks.letters(size=24, train=30, test=10)
    assert torch.equal(task.test.images, again.test.images)


def test_stamps_say_where_to_get_them(tmp_path: Path) -> None:
    """No folder: the package and its licence."""
    with pytest.raises(DataError, match="apt install tuxpaint-stamps-default"):
        tasks.stamps(folder=tmp_path / "none")
    with pytest.raises(DataError, match="0 folders with at least 15"):
        tasks.stamps(folder=tmp_path)


def test_stamps_are_divided_by_file(tmp_path: Path) -> None:
    """Folders are classes, drawings are left out, a quarter is for test, transparent parts are grey."""
    for folder, color in (("animals/birds", "red"), ("food/fruit", "blue"), ("food/cartoon", "green")):
        (tmp_path / folder).mkdir(parents=True)
        for n in range(8):
            image = Image.new("RGBA", (40, 20))
            ImageDraw.Draw(image).rectangle((5, 5, 20 + n, 15), fill=color)
            image.save(tmp_path / folder / f"{n}.png")
    task = tasks.stamps(folder=tmp_path, size=16, least=8)
    assert task.classes == ("animals/birds", "food/fruit")
    assert [len(task.train), len(task.test)] == [12, 4]
    reds = task.train.images[task.train.labels == 0].amax((2, 3)).mean(0)
    assert reds[0] > reds[2]
    assert torch.equal(task.test.images, tasks.stamps(folder=tmp_path, size=16, least=8).test.images)


def _photographs(folder: Path) -> None:
    """Small stand-ins for the wallpapers: a colour each, with stripes."""
    for number, name in enumerate(photographs.WALLPAPERS):
        image = Image.new("RGB", (160, 120), (15 * number, 255 - 15 * number, 128))
        ImageDraw.Draw(image).rectangle((20, 0, 40, 119), fill="black")
        image.save(folder / f"{name}.jpg")


def test_corruptions_are_divided_by_photograph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four photographs are for test, others from other seeds; scikit-learn's two are for training alone."""
    _photographs(tmp_path)
    monkeypatch.setattr(photographs, "SHORT_SIDE", 60)
    seen = []
    for seed in (0, 1):
        seen += damaged_photos.divided_photos(tmp_path, torch.Generator().manual_seed(seed))[:2]
    train, test, _, other = ([float(p.sum()) for p in photos] for photos in seen)
    assert (len(train), len(test)) == (11, 4)
    assert not set(train) & set(test)
    assert set(other) != set(test)
    assert [tuple(p.shape[1:]) for p in seen[0][-2:]] == [(427, 640)] * 2
    assert tuple(seen[1][0].shape) == (3, 60, 80)


def test_corruptions_are_drawn_from_the_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same seed gives the same images, in [0, 1], with each damage as often as the others."""
    _photographs(tmp_path)
    monkeypatch.setattr(photographs, "SHORT_SIDE", 60)
    first, again = (tasks.corruptions(2, size=32, train=16, test=8, folder=tmp_path) for _ in range(2))
    assert torch.equal(first.train.images, again.train.images)
    assert first.train.labels.bincount().tolist() == [2] * len(first.classes)
    assert 0 <= float(first.test.images.min()) <= float(first.test.images.max()) <= 1
    assert first.test.images.shape == (8, 3, 32, 32)
    assert "CC0" in first.licence


def test_corruptions_say_where_to_get_photographs(tmp_path: Path) -> None:
    """No wallpapers: how many are missing, and the package."""
    with pytest.raises(DataError, match=r"13 of 13 photographs.*apt install lomiri-wallpapers-16.04"):
        tasks.corruptions(folder=tmp_path)


@pytest.mark.parametrize("name", [name for name in damages.DAMAGES if name != "none"])
def test_a_damage_grows_with_its_strength(name: str) -> None:
    """The photograph keeps its shape and mean, and is farther from what it was the stronger the damage."""
    x = photographs.scikit_learns()["china.jpg"][:, 100:164, 200:264]
    changed = [damages.DAMAGES[name](x, s, torch.Generator().manual_seed(0)) for s in (0.0, 1.0)]
    mild, strong = (float((c.clamp(0, 1) - x).square().mean()) for c in changed)
    assert [c.shape for c in changed] == [x.shape] * 2
    assert 0 < mild < strong < 0.05
    assert abs(float(changed[1].mean() - x.mean())) < 0.02


def test_undamaged_is_undamaged() -> None:
    """The class `none` is the photograph, bit for bit."""
    x = photographs.scikit_learns()["flower.jpg"][:, :64, :64]
    assert torch.equal(damages.damaged(x, damages.none, torch.Generator()), x)


def test_rotations_turn_files_that_stand_upright(tmp_path: Path) -> None:
    """Red is on top, left, below or right by label; a file is in training or test; what may lie is left out."""
    for folder in ("animals/birds", "sports/balls"):
        (tmp_path / folder).mkdir(parents=True)
        for n in range(8):
            image = Image.new("RGBA", (16, 16), (0, 0, 20 * n, 255))
            ImageDraw.Draw(image).rectangle((0, 0, 15, 3), fill="red")
            image.save(tmp_path / folder / f"{n}.png")
    task = tasks.rotations(size=16, train=24, test=8, folder=tmp_path)
    reds = task.train.images[:, 0]
    edges = torch.stack(
        [reds[:, 0].mean(1), reds[:, :, 0].mean(1), reds[:, -1].mean(1), reds[:, :, -1].mean(1)], 1
    )
    assert torch.equal(edges.argmax(1), task.train.labels)
    assert task.train.labels.bincount().tolist() == [6, 6, 6, 6]
    blues = [set(part.images[:, 2, 8, 8].tolist()) for part in (task.train, task.test)]
    assert [len(b) for b in blues] == [6, 2]
    assert not blues[0] & blues[1]


def test_rotations_say_where_to_get_photographs(tmp_path: Path) -> None:
    """No folder: the package; nothing that stands upright: where it looked."""
    with pytest.raises(DataError, match="apt install tuxpaint-stamps-default"):
        tasks.rotations(folder=tmp_path / "none")
    with pytest.raises(DataError, match="0 photographs in animals, food"):
        tasks.rotations(folder=tmp_path)
    assert cut_outs.WITH_AN_UP[0] == "animals"


def test_fonts_drawn_after_another_count_as_that(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Arimo is Liberation under another name, so both are on one side of the border."""

    class Font:
        def __init__(self, file: str) -> None:
            self.file = file

        def getname(self) -> tuple[str, str]:
            return Path(self.file).stem, "Regular"

    for name in ("Arimo", "Liberation Sans", "Lobster"):
        (tmp_path / f"{name}.ttf").touch()
    monkeypatch.setattr("PIL.ImageFont.truetype", lambda file, size: Font(file))
    monkeypatch.setattr(drawn_letters, "_has_letters", lambda *_: True)
    found = drawn_letters.fonts_by_maker([tmp_path], "A")
    assert {maker: len(files) for maker, files in found.items()} == {"Liberation": 2, "Lobster": 1}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Ten makers of one font each, whose letters are full squares; (letter, maker) as they are drawn."""
    seen = []

    def square(which: str, file: Path, size: int, generator: torch.Generator) -> torch.Tensor:
        seen.append((which, file.stem))
        return torch.ones(1, size, size)

    makers = {f"maker{n}": [Path(f"maker{n}.ttf")] for n in range(10)}
    monkeypatch.setattr(drawn_letters, "fonts_by_maker", lambda folders, letters: makers)
    monkeypatch.setattr(fonts, "letter", square)
    return seen


def test_numerals_share_no_font(
    drawn: list[tuple[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The digit is the label; makers of training draw nothing for test; the origin names fonts and photographs."""
    _photographs(tmp_path)
    monkeypatch.setattr(photographs, "SHORT_SIDE", 60)
    task = tasks.numerals(size=16, train=40, test=20, folder=tmp_path)
    labels = [*task.train.labels.tolist(), *task.test.labels.tolist()]
    assert [int(which) for which, _ in drawn] == labels
    assert not {maker for _, maker in drawn[:40]} & {maker for _, maker in drawn[40:]}
    assert "10 installed fonts" in task.origin
    assert "lomiri" in task.origin
    assert 0 <= float(task.train.images.min()) <= float(task.train.images.max()) <= 1


def test_typefaces_share_no_letter(drawn: list[tuple[str, str]]) -> None:
    """The label is the maker; A to J in training, K to T in test."""
    task = tasks.typefaces(size=16, train=60, test=60)
    labels = [*task.train.labels.tolist(), *task.test.labels.tolist()]
    assert [maker for _, maker in drawn] == [task.classes[label] for label in labels]
    assert {which for which, _ in drawn[:60]} <= set("ABCDEFGHIJ")
    assert {which for which, _ in drawn[60:]} <= set("KLMNOPQRST")


def test_counts_are_what_is_there(drawn: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """As many of nine cells are inked as the label says; all of an image in one font."""
    monkeypatch.setattr(fonts, "coloured", lambda ink, generator: ink.expand(3, -1, -1))
    task = tasks.counts(size=24, train=12, test=6)
    cells = task.train.images[:, 0].sum((1, 2)) / 8**2
    assert cells.tolist() == (task.train.labels + 1).tolist()
    assert len({maker for _, maker in drawn[15:21]}) == 1  # the six of the sixth image


def test_channels_are_in_the_order_of_the_label(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a photograph of one colour each class has another order of its three values."""
    _photographs(tmp_path)
    monkeypatch.setattr(photographs, "SHORT_SIDE", 60)
    colour = torch.tensor([0.1, 0.5, 0.9]).view(3, 1, 1)
    monkeypatch.setattr(damaged_photos, "crop", lambda photos, size, generator: colour.expand(3, size, size))
    task = tasks.channels(size=8, train=6, test=6, folder=tmp_path)
    values = dict(zip("RGB", (0.1, 0.5, 0.9), strict=True))
    for image, label in zip(task.train.images, task.train.labels.tolist(), strict=True):
        assert image[:, 0, 0].tolist() == pytest.approx([values[c] for c in task.classes[label]])


@pytest.mark.slow
@pytest.mark.parametrize("name", list(tasks.TASKS))
def test_installed_tasks_can_be_learnt(name: str) -> None:
    """Where the packages are, a linear classifier of colours and edges tells test images apart better than chance."""
    try:
        task = tasks.TASKS[name](seed=0, size=32)
    except DataError as error:
        pytest.skip(str(error))
    x, z = (_features(part.images) for part in (task.train, task.test))
    mean, spread = x.mean(0), x.std(0) + 1e-3
    x, z = ((f - mean) / spread for f in (x, z))
    y = torch.nn.functional.one_hot(task.train.labels).float()
    weight = torch.linalg.solve(x.T @ x + 300 * torch.eye(x.shape[1]), x.T @ (y - y.mean(0)))
    right = ((z @ weight + y.mean(0)).argmax(1) == task.test.labels).float().mean()
    chance = 1 / len(task.classes)
    assert right > chance + 4 * (chance * (1 - chance) / len(z)) ** 0.5
    assert set(task.test.labels.tolist()) == set(range(len(task.classes)))


def _features(images: torch.Tensor) -> torch.Tensor:
    """Colour and steepness on a grid of 8 × 8: (n, 3, 32, 32) → (n, 320)."""
    grey = images.mean(1, keepdim=True)
    steep = torch.cat([grey.diff(dim=2).abs()[..., :31], grey.diff(dim=3).abs()[..., :31, :]], 1)
    return torch.cat([torch.nn.functional.adaptive_avg_pool2d(p, 8).flatten(1) for p in (images, steep)], 1)
