"""Images: kinds of data, what is refused, and samples that depend on nothing but seed, epoch and number."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny import QUICK, Shades, net

from attninject import errors
from attninject.training import data as images_of
from attninject.training import finetune
from attninject.training.experiment import Data


def folder(root: Path, splits: tuple[str, ...] = ("train", "val"), per_class: int = 6) -> Path:
    """An image folder of three colours."""
    for split in splits:
        for c, name in enumerate(("blue", "green", "red")):
            (root / split / name).mkdir(parents=True)
            for i in range(per_class):
                colour = [20 * i, 20 * i, 20 * i]
                colour[c] = 250
                Image.new("RGB", (40, 32), tuple(colour)).save(root / split / name / f"{i}.png")
    return root


def test_folders_train_through_timms_transforms(tmp_path: Path) -> None:
    """An image folder at a size of one's own; the classes are the folders."""
    data = {"kind": "imagefolder", "root": str(folder(tmp_path)), "size": 16}
    result = finetune(net(), data, **{**QUICK, "batch_size": 6})
    assert len(result.history) == 3
    opened = images_of.open_images(Data("imagefolder", root=str(tmp_path)))
    assert opened.classes == ("blue", "green", "red")
    held_out = images_of.open_images(Data("imagefolder", root=str(tmp_path), val_fraction=0.25))
    assert (len(held_out.train), len(held_out.val)) == (14, 4)


def test_samples_depend_on_seed_epoch_and_number_only(tmp_path: Path) -> None:
    """An augmented image is the same whenever and by whomever it is read, and differs from epoch to epoch."""
    opened = images_of.open_images(Data("imagefolder", root=str(folder(tmp_path))))
    data = Data("imagefolder", root=str(tmp_path), size=16)
    transform, _ = images_of.transforms(data, images_of.look_of(None, data))
    samples = images_of.Samples(opened.train, transform, seed=0, skip=False)
    first = samples[(0, 3)][0]
    torch.manual_seed(99)
    assert torch.equal(samples[(0, 3)][0], first)
    assert not torch.equal(samples[(1, 3)][0], first)
    order = images_of.Schedule(18, 6)
    batches = [list(images_of.loader(samples, order.at(1), workers, pin=False)) for workers in (0, 2)]
    for (a, y, _), (b, z, _) in zip(*batches, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(y, z)


def test_the_schedule_cuts_one_permutation_for_all_ranks() -> None:
    """Two ranks together load what one loads with twice the batch; a resumed pass loads the rest."""
    one = [sorted(b) for b in images_of.Schedule(30, 8, seed=1).at(2)]
    ranks = [list(images_of.Schedule(30, 4, rank, 2, seed=1).at(2)) for rank in (0, 1)]
    assert [sorted(a + b) for a, b in zip(*ranks, strict=True)] == one
    assert len(one) == 3
    assert (
        list(images_of.Schedule(30, 8, seed=1).at(2, 1)) == list(images_of.Schedule(30, 8, seed=1).at(2))[1:]
    )
    assert list(images_of.Schedule(30, 8, seed=1).at(3)) != list(images_of.Schedule(30, 8, seed=1).at(2))
    held = [list(images_of.Schedule(5, 2, rank, 2, train=False)) for rank in (0, 1)]
    assert held == [[[(0, 0), (0, 2)], [(0, 4), (0, -1)]], [[(0, 1), (0, 3)], [(0, -1), (0, -1)]]]


def test_unreadable_images_are_refused_or_skipped_and_counted(tmp_path: Path) -> None:
    """Refused with the file's name; with `skip` the run goes on and the log counts them."""
    root = folder(tmp_path)
    (root / "train" / "red" / "2.png").write_bytes(b"not an image")
    (root / "val" / "blue" / "0.png").write_bytes(b"")
    data = {"kind": "imagefolder", "root": str(root), "size": 16}
    settings = {**QUICK, "batch_size": 6, "epochs": 1}
    with pytest.raises(errors.DataError, match=r"blue/0\.png cannot be read as an image.*unreadable: skip"):
        finetune(net(), data, **settings)
    result = finetune(net(), {**data, "unreadable": "skip"}, **settings)
    assert result.history[-1]["skipped"] == 1
    assert result.history[-1]["val_skipped"] == 1
    assert result.history[-1]["top1"] * 17 == pytest.approx(round(result.history[-1]["top1"] * 17))


def test_folders_that_do_not_serve(tmp_path: Path) -> None:
    """Missing, empty, without splits, or with other classes for validation: each is said."""
    with pytest.raises(errors.DataError, match=r"there is no folder .*nowhere"):
        images_of.open_images(Data("imagefolder", root=str(tmp_path / "nowhere")))
    with pytest.raises(errors.DataError, match=r"no folder .*train \(.* has no folders\).*val_fraction"):
        images_of.open_images(Data("imagefolder", root=str(tmp_path)))
    root = folder(tmp_path / "a")
    (root / "val" / "violet").mkdir()
    with pytest.raises(errors.DataError, match=r"violet"):
        images_of.open_images(Data("imagefolder", root=str(root)))
    Image.new("RGB", (8, 8)).save(root / "val" / "violet" / "0.png")
    with pytest.raises(errors.DataError, match="differ between training and validation: violet"):
        images_of.open_images(Data("imagefolder", root=str(root)))


def test_timms_and_torchvisions_data_sets(tmp_path: Path) -> None:
    """Opened by name from the disk; unknown and absent ones are refused, nothing is downloaded."""
    root = str(folder(tmp_path))
    opened = images_of.open_images(Data("timm", root=root, name="torch/image_folder"))
    assert (len(opened.train), opened.classes) == (18, ("blue", "green", "red"))
    with pytest.raises(errors.DataError, match="no data set 'CIFAR1'; nearest: CIFAR10"):
        images_of.open_images(Data("torchvision", root=root, name="CIFAR1"))
    with pytest.raises(errors.DataError, match=r"CIFAR10 cannot be opened in .*nothing is downloaded"):
        images_of.open_images(Data("torchvision", root=root, name="CIFAR10"))
    with pytest.raises(errors.DataError, match="timm cannot open 'torch/cifar10'"):
        images_of.open_images(Data("timm", root=root, name="torch/cifar10"))


def test_digits_are_the_offline_default() -> None:
    """1,797 images, ten classes, three channels at 32×32."""
    opened = images_of.open_images(Data())
    assert (len(opened.train), len(opened.val), len(opened.classes)) == (1258, 539, 10)
    transform, _ = images_of.transforms(Data(), images_of.look_of(None, Data()))
    assert images_of.Samples(opened.train, transform, 0, False)[(0, 0)][0].shape == (3, 32, 32)


def test_data_sets_without_classes_are_named() -> None:
    """A data set of one's own needs the names, or labels to count."""

    class Bare(Shades):
        classes = ()

    with pytest.raises(errors.DataError, match="Bare does not tell its classes"):
        finetune(net(), (Bare(6), Bare(3)), **QUICK)
