"""Images: kinds of data, what is refused, and samples that depend on nothing but seed, epoch and number."""

from __future__ import annotations

import os
import signal
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import QUICK, Shades, hears, net

from attninject import errors
from attninject.training import finetune
from attninject.training.data.loaders import Schedule, loader
from attninject.training.data.opening import open_images
from attninject.training.data.preprocessing import preprocessing_of, transforms
from attninject.training.data.samples import Samples
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
    opened = open_images(Data("imagefolder", root=str(tmp_path)))
    assert opened.classes == ("blue", "green", "red")
    held_out = open_images(Data("imagefolder", root=str(tmp_path), val_fraction=0.25))
    assert (len(held_out.train), len(held_out.val)) == (14, 4)


def test_samples_depend_on_seed_epoch_and_number_only(tmp_path: Path) -> None:
    """An augmented image is the same whenever and by whomever it is read, and differs from epoch to epoch."""
    opened = open_images(Data("imagefolder", root=str(folder(tmp_path))))
    data = Data("imagefolder", root=str(tmp_path), size=16)
    transform, _ = transforms(data, preprocessing_of(None, data))
    samples = Samples(opened.train, transform, seed=0, skip=False)
    first = samples[(0, 3)][0]
    torch.manual_seed(99)
    assert torch.equal(samples[(0, 3)][0], first)
    assert not torch.equal(samples[(1, 3)][0], first)
    order = Schedule(18, 6)
    batches = [list(loader(samples, order.at(1), workers, pin=False)) for workers in (0, 2)]
    for (a, y, _), (b, z, _) in zip(*batches, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(y, z)


def test_the_schedule_cuts_one_permutation_for_all_ranks() -> None:
    """Two ranks together load what one loads with twice the batch; a resumed pass loads the rest."""
    one = [sorted(b) for b in Schedule(30, 8, seed=1).at(2)]
    ranks = [list(Schedule(30, 4, rank, 2, seed=1).at(2)) for rank in (0, 1)]
    assert [sorted(a + b) for a, b in zip(*ranks, strict=True)] == one
    assert len(one) == 3
    assert list(Schedule(30, 8, seed=1).at(2, 1)) == list(Schedule(30, 8, seed=1).at(2))[1:]
    assert list(Schedule(30, 8, seed=1).at(3)) != list(Schedule(30, 8, seed=1).at(2))
    held = [list(Schedule(5, 2, rank, 2, train=False)) for rank in (0, 1)]
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
    with pytest.raises(errors.DataError, match=r"blue/0\.png cannot be read") as caught:
        finetune(net(), {**data, "workers": 1}, **settings)
    assert "\n" not in str(caught.value)  # a loader process's word, without its traceback
    result = finetune(net(), {**data, "unreadable": "skip"}, **settings)
    assert result.history[-1]["skipped"] == 1
    assert result.history[-1]["val_skipped"] == 1
    assert result.history[-1]["top1"] * 17 == pytest.approx(round(result.history[-1]["top1"] * 17))


def test_unreadable_images_are_counted_across_an_interruption(tmp_path: Path) -> None:
    """Images passed over before a run was cut off within an epoch are in that epoch's row of the log."""
    root = folder(tmp_path / "images")
    bomb = bytearray(54)  # a bitmap's header that claims 100,000 × 100,000 pixels
    struct.pack_into("<2sIHHIIiiHHI", bomb, 0, b"BM", 54, 0, 0, 54, 40, 10**5, 10**5, 1, 24, 0)
    for number, content in ((0, b""), (2, b"not an image"), (4, bomb)):
        for name in ("blue", "green", "red"):
            (root / "train" / name / f"{number}.png").write_bytes(content)
    data = {"kind": "imagefolder", "root": str(root), "size": 16, "unreadable": "skip"}
    settings = {**QUICK, "batch_size": 3, "epochs": 1, "log_every": 1, "out": tmp_path / "a"}

    def impatient(text: str) -> None:
        if ", step 3/6" in text:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(errors.RunError, match="interrupted by SIGINT"):
        finetune(net(), data, **settings, **hears(impatient))
    assert finetune(net(), data, **settings, resume=True).history[-1]["skipped"] == 9


def test_folders_that_do_not_serve(tmp_path: Path) -> None:
    """Missing, empty, without splits, or with other classes for validation: each is said."""
    with pytest.raises(errors.DataError, match=r"there is no folder .*nowhere"):
        open_images(Data("imagefolder", root=str(tmp_path / "nowhere")))
    with pytest.raises(errors.DataError, match=r"no folder .*train \(.* has no folders\).*val_fraction"):
        open_images(Data("imagefolder", root=str(tmp_path)))
    for split in ("train", "val"):
        (tmp_path / "empty" / split).mkdir(parents=True)
    with pytest.raises(errors.DataError, match=r"empty/train is no image folder.*each class is a folder"):
        open_images(Data("imagefolder", root=str(tmp_path / "empty")))
    with pytest.raises(errors.DataError, match=r"timm cannot open 'folder', split 'train', in .*empty"):
        open_images(Data("timm", root=str(tmp_path / "empty"), name="folder"))
    with pytest.raises(errors.DataError, match="0 training images do not fill one step"):
        finetune(net(), (Shades(0), Shades(3)), **QUICK)
    with pytest.raises(errors.DataError, match="not one validation image"):
        finetune(net(), (Shades(8), Shades(0)), **QUICK)
    root = folder(tmp_path / "a")
    (root / "val" / "violet").mkdir()
    with pytest.raises(errors.DataError, match=r"violet"):
        open_images(Data("imagefolder", root=str(root)))
    Image.new("RGB", (8, 8)).save(root / "val" / "violet" / "0.png")
    with pytest.raises(errors.DataError, match="differ between training and validation: violet"):
        open_images(Data("imagefolder", root=str(root)))


def test_timms_and_torchvisions_data_sets(tmp_path: Path) -> None:
    """Opened by name from the disk; unknown and absent ones are refused, nothing is downloaded."""
    root = str(folder(tmp_path))
    opened = open_images(Data("timm", root=root, name="torch/image_folder"))
    assert (len(opened.train), opened.classes) == (18, ("blue", "green", "red"))
    held_out = open_images(Data("timm", root=root, name="torch/image_folder", val_fraction=0.25))
    assert (len(held_out.train), len(held_out.val), held_out.classes) == (14, 4, opened.classes)
    with pytest.raises(errors.DataError, match="no data set 'CIFAR1'; nearest: CIFAR10"):
        open_images(Data("torchvision", root=root, name="CIFAR1"))
    with pytest.raises(errors.DataError, match=r"CIFAR10 cannot be opened in .*nothing is downloaded"):
        open_images(Data("torchvision", root=root, name="CIFAR10"))
    with pytest.raises(errors.DataError, match="timm cannot open 'torch/cifar10'"):
        open_images(Data("timm", root=root, name="torch/cifar10"))


@pytest.mark.parametrize("name", ["folder", "torch/image_folder"])
def test_training_on_timms_data_sets(name: str, tmp_path: Path) -> None:
    """By create_dataset's names: a folder data set of timm's and one of torchvision's learn the colours."""
    data = {"kind": "timm", "name": name, "root": str(folder(tmp_path)), "size": 16, "augment": "none"}
    result = finetune(net(), data, **{**QUICK, "batch_size": 6, "epochs": 4})
    assert result.best["top1"] > result.history[0]["top1"]
    assert result.history[-1]["train_loss"] < result.history[1]["train_loss"]


def test_training_on_torchvisions_data_sets(tmp_path: Path) -> None:
    """A data set of grey images on the disk (MNIST's files) trains in colour; its own split is used."""

    def idx(array: np.ndarray) -> bytes:
        head = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
        return head + array.astype(np.uint8).tobytes()

    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for split, count in (("train", 30), ("t10k", 20)):
        labels = np.arange(count) % 10
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(idx(labels))
        (raw / f"{split}-images-idx3-ubyte").write_bytes(
            idx(np.ones((count, 28, 28)) * labels[:, None, None] * 25)
        )
    data = {"kind": "torchvision", "name": "MNIST", "root": str(tmp_path), "size": 16, "augment": "none"}
    result = finetune(net(classes=10), data, **{**QUICK, "batch_size": 10, "epochs": 3})
    assert result.history[-1]["step"] == 9
    assert result.history[-1]["train_loss"] < result.history[1]["train_loss"]
    assert result.history[-1]["top1"] * 20 == pytest.approx(round(result.history[-1]["top1"] * 20))


def test_timm_puts_no_other_image_in_the_place_of_a_broken_one(tmp_path: Path) -> None:
    """timm's own data sets pass over unreadable images unasked; here they are refused, or counted."""
    root = folder(tmp_path)
    (root / "train" / "red" / "2.png").write_bytes(b"not an image")
    data = {"kind": "timm", "name": "folder", "root": str(root), "size": 16}
    settings = {**QUICK, "batch_size": 6, "epochs": 1}
    with pytest.raises(errors.DataError, match=r"red/2\.png cannot be read as an image.*unreadable: skip"):
        finetune(net(), data, **settings)
    assert finetune(net(), {**data, "unreadable": "skip"}, **settings).history[-1]["skipped"] == 1


def test_classes_that_do_not_fit_are_named(tmp_path: Path) -> None:
    """Other classes for validation in timm's folders; a label beyond the classes of a data set of one's own."""
    root = folder(tmp_path)
    (root / "val" / "red").rename(root / "val" / "violet")
    with pytest.raises(errors.DataError, match="differ between training and validation: red, violet"):
        open_images(Data("timm", root=str(root), name="folder"))

    class Four(Shades):
        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            return super().__getitem__(index)[0], index % 4

    with pytest.raises(errors.DataError, match=r"image \d+ of Four has label 3; there are 3 classes"):
        finetune(net(), (Four(24), Shades(6)), **QUICK)

    class Turned(Shades):
        classes = ("green", "red", "blue")

    with pytest.raises(errors.DataError, match=r"classes differ between .*: another order"):
        finetune(net(), (Shades(24), Turned(6)), **QUICK)


def test_one_class_alone_is_refused(tmp_path: Path) -> None:
    """A folder too high or too low: every answer would be right, and nothing learnt."""
    folder(tmp_path / "photos")
    with pytest.raises(errors.DataError, match=r"one class only \(photos\)"):
        open_images(Data("imagefolder", root=str(tmp_path), val_fraction=0.2))


def test_images_of_sixteen_bits_keep_their_greys(tmp_path: Path) -> None:
    """Read as their twin of 8 bits, where Pillow makes all above 255 white."""
    root = folder(tmp_path, per_class=1)
    greys = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(greys.astype(np.uint16) * 257).save(root / "train" / "red" / "0.png")
    for data in (Data("imagefolder", root=str(root)), Data("timm", root=str(root), name="folder")):
        found = np.asarray(open_images(data).train[2][0])
        assert np.array_equal(found, np.repeat(greys[:, :, None], 3, 2))


def test_digits_are_the_offline_default() -> None:
    """1,797 images, ten classes, three channels at 32×32."""
    opened = open_images(Data())
    assert (len(opened.train), len(opened.val), len(opened.classes)) == (1258, 539, 10)
    transform, _ = transforms(Data(), preprocessing_of(None, Data()))
    assert Samples(opened.train, transform, 0, False)[(0, 0)][0].shape == (3, 32, 32)


def test_data_sets_without_classes_are_named() -> None:
    """A data set of one's own needs the names, or labels to count."""

    class Bare(Shades):
        classes = ()

    with pytest.raises(errors.DataError, match="Bare does not tell its classes"):
        finetune(net(), (Bare(6), Bare(3)), **QUICK)


def test_random_images_are_of_their_seed() -> None:
    """As many as asked for, of so many classes, a fifth for validation; the same from a seed, others from another."""
    first, again, other = (open_images(Data("random", images=50, classes=4, seed=s)) for s in (0, 0, 1))
    assert (len(first.train), len(first.val), first.classes) == (40, 10, ("0", "1", "2", "3"))
    assert torch.equal(first.train.images, again.train.images)
    assert torch.equal(first.val.labels, again.val.labels)
    assert not torch.equal(first.train.images, other.train.images)
    image, label = first.train[0]
    assert (image.shape, 0 <= label < 4) == ((3, 32, 32), True)
    transform, _ = transforms(Data("random"), preprocessing_of(None, Data("random")))
    assert transform(image).shape == (3, 224, 224)
