"""The data of studies: divided by source, drawn from a seed, clear about what is missing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

from attninject.errors import DataError
from attninject.evidence import tasks


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
        tasks, "_on_photos", lambda strokes, labels, photos, *rest: seen.append((strokes, photos))
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
    monkeypatch.setattr(tasks, "_fonts", lambda folders: {name: [fonts[0]] for name in "wxyz"})
    groups = []
    written = tasks._written
    monkeypatch.setattr(
        tasks, "_written", lambda makers, *rest: groups.append(len(makers)) or written(makers, *rest)
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
