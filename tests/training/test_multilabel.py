"""Images with several labels each: from CSV files and folders of labels to a run that is measured and predicts."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import TensorDataset

from attninject import errors
from attninject.cli import main
from attninject.training import finetune
from attninject.training.data.datasets import Images
from attninject.training.data.opening import open_images
from attninject.training.experiment import Data, settings
from attninject.training.multilabel_metrics import LabelTally, average_precision

NAMES = ("blue", "green", "red")


def images_in(root: Path) -> dict[str, list[str]]:
    """16 images of every mixture of three colours; file → its colours."""
    table = {}
    for split, count in (("train", 2), ("val", 1)):
        (root / split).mkdir(parents=True, exist_ok=True)
        for number in range(8 * count):
            has = [bool(number >> bit & 1) for bit in range(3)]
            colour = tuple(230 if one else 20 for one in reversed(has))
            Image.new("RGB", (32, 32), colour).save(root / split / f"{number}.png")
            table[f"{split}/{number}.png"] = [n for n, one in zip(NAMES, has, strict=True) if one]
    return table


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Such images with a CSV file that has a column per class."""
    folder = tmp_path_factory.mktemp("several")
    rows = [[file, *(int(n in names) for n in NAMES)] for file, names in images_in(folder).items()]
    with (folder / "labels.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([["file", *NAMES], *rows])
    return folder


def same(a: Images, b: Images) -> bool:
    """Whether two openings give the same files with the same labels."""
    pairs = [
        (one.whole.files, one.whole.targets.tolist(), one.indices) for i in (a, b) for one in (i.train, i.val)
    ]
    return a.classes == b.classes and pairs[:2] == pairs[2:]


def test_three_ways_to_write_labels_down(root: Path, tmp_path: Path) -> None:
    """A column per class, a column of names, a text file per image: the same images with the same rows."""
    table = images_in(tmp_path)
    wide = open_images(Data("multilabel", root=str(root)))
    assert (len(wide.train), len(wide.val), wide.classes, wide.many) == (16, 8, NAMES, True)
    image, row = wide.val[5]
    assert (image.size, row.tolist()) == ((32, 32), [1, 0, 1])
    (tmp_path / "long.csv").write_text(
        "\n".join(["file,labels", *(f"{f},{';'.join(n)}" for f, n in table.items())])
    )
    assert same(open_images(Data("multilabel", root=str(tmp_path), labels=str(tmp_path / "long.csv"))), wide)
    for file, names in table.items():
        text = tmp_path / "labels" / Path(file).with_suffix(".txt")
        text.parent.mkdir(parents=True, exist_ok=True)
        text.write_text("\n".join(names) + "\n")
    found = open_images(Data("multilabel", root=str(tmp_path)))
    order = sorted(range(24), key=wide.train.whole.files.__getitem__)
    assert found.train.whole.files == [wide.train.whole.files[i] for i in order]
    assert torch.equal(found.train.whole.targets, wide.train.whole.targets[order])
    assert settings({"kind": str(root), "labels": "x"})[0] == Data("multilabel", root=str(root), labels="x")
    held = open_images(Data("multilabel", root=str(root), val_fraction=0.25))
    assert (len(held.train), len(held.val)) == (18, 6)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, r"there is no .*labels\.csv and no .*labels: labels are a CSV file with"),
        ("file\na.png\n", "expected a head of the image's file and different classes"),
        ("", "expected a head"),
        ("file,cat,dog\na.png,1\n", "row 2: expected 3 cells"),
        ("file,cat,dog\na.png,1,yes\n", "row 2: expected 0 or 1, found 'yes'"),
        ("file,cat,dog\nb.png,1,0\n", r"1 images of .*labels\.csv are not in .*: b\.png"),
        ("file,cat,dog\na.png,1,0\na.png,0,1\n", r"names images more than once: a\.png"),
        ("file,labels\na.png,\n", "holds no label"),
        ("file,cat,dog\na.png,1,0\n", "no labelled image is in .*train; name the folders .*val_fraction"),
    ],
)
def test_labels_that_are_refused(text: str | None, said: str, tmp_path: Path) -> None:
    """What is wrong, and in which row; before an image is read."""
    (tmp_path / "a.png").write_bytes(b"")
    if text is not None:
        (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(errors.DataError, match=said):
        open_images(Data("multilabel", root=str(tmp_path)))


def test_text_files_that_are_refused(tmp_path: Path) -> None:
    """A text of no image, and one that is no text."""
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(errors.DataError, match="is of no image"):
        open_images(Data("multilabel", root=str(tmp_path)))
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(errors.DataError, match="cannot be read as text"):
        open_images(Data("multilabel", root=str(tmp_path)))


def test_average_precision_is_scikit_learns() -> None:
    """With ties and without; None where no image has the class."""
    from sklearn.metrics import average_precision_score, f1_score

    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(40, 4, generator=generator)
    scores[:, 1] = scores[:, 1].round()  # many alike
    true = torch.rand(40, 4, generator=generator) < 0.3
    true[:, 3] = False
    for column in range(3):
        expected = average_precision_score(true[:, column], scores[:, column])
        assert average_precision(scores[:, column], true[:, column]) == pytest.approx(expected)
    assert average_precision(scores[:, 3], true[:, 3]) is None
    tally = LabelTally()
    for part in (slice(0, 15), slice(15, 40)):
        padded = torch.cat([true[part].float(), torch.full((2, 4), -1.0)])
        tally.add(torch.cat([scores[part], torch.zeros(2, 4)]), padded, torch.zeros(len(padded)))
    found = tally.metrics("abcd")
    assert found.images == 40
    assert found.map == pytest.approx(average_precision_score(true[:, :3], scores[:, :3]))
    f1 = f1_score(true, scores > 0, average=None, zero_division=0)
    assert found.macro_f1 == pytest.approx(f1.mean())
    loss = nn.functional.binary_cross_entropy_with_logits(scores.double(), true.double())
    assert found.loss == pytest.approx(float(loss))


def test_from_python_and_what_does_not_go(tmp_path: Path) -> None:
    """A pair of data sets says that it has several labels; Mixup, other rows and top-1 are refused."""
    torch.manual_seed(0)
    x, y = torch.randn(16, 3, 8, 8), (torch.rand(16, 3) < 0.5).float()
    pair = TensorDataset(x, y), TensorDataset(x[:8], y[:8])
    pair[0].classes, pair[0].multilabel = NAMES, True  # type: ignore[attr-defined]
    quick = {"epochs": 2, "batch_size": 8, "lr": 1e-2}
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
    )
    result = finetune(model, pair, **quick)
    assert [key for key in result.history[0] if not key.startswith("lr.")] == [
        "epoch", "step", "val_loss", "map", "macro_f1", "seconds",
    ]  # fmt: skip
    assert result.best["map"] == max(row["map"] for row in result.history)
    with pytest.raises(errors.ExperimentError, match="they mix images of one class each"):
        finetune(model, pair, **quick, mixup=0.2)
    with pytest.raises(
        errors.ExperimentError, match="several labels each have val_loss, map, macro_f1, not top1"
    ):
        finetune(model, pair, **quick, monitor="top1")
    pair[0].tensors = (x, y + 1)
    with pytest.raises(errors.DataError, match="expected 3 zeros and ones"):
        finetune(model, pair, **quick)


def test_the_command_trains_measures_and_predicts(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It learns colours; `evaluate` finds the log's figures again; `predict` gives each class its own probability."""
    run, argv = tmp_path / "run", ["--model", "timm/test_convnext", "--recipe", "se", "--size", "32"]
    argv += ["--data", "multilabel", "--data-root", str(root), "--epochs", "8", "--batch-size", "8"]
    assert main(["finetune", *argv, "--lr", "3e-3", "--class-weights", "balanced", "--out", str(run)]) == 0
    out = capsys.readouterr().out
    assert "mAP" in out
    assert "top-1" not in out
    log = list(csv.DictReader(io.StringIO((run / "log.csv").read_text())))
    best = max(log, key=lambda row: float(row["map"]))
    assert float(best["map"]) > 0.9
    assert main(["evaluate", str(run), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["map"], said["macro_f1"], said["loss"]) == tuple(
        float(best[key]) for key in ("map", "macro_f1", "val_loss")
    )
    assert {"name", "images", "ap", "precision", "recall"} <= set(said["classes"][0])
    assert (
        main(
            ["evaluate", str(run), "--data", str(root), "--without-blocks", "--csv", str(tmp_path / "c.csv")]
        )
        == 0
    )
    assert "mAP" in capsys.readouterr().out
    assert "without_ap" in (tmp_path / "c.csv").read_text()
    assert main(["evaluate", str(run), "--confusion", str(tmp_path / "m.csv")]) == 1
    assert "a confusion matrix is of one class per image" in capsys.readouterr().err
    assert (
        main(["predict", str(run), str(root / "val" / "7.png"), str(root / "val" / "0.png"), "--json"]) == 0
    )
    all_of_them, none = (row["probabilities"] for row in json.loads(capsys.readouterr().out)["predictions"])
    assert sum(all_of_them) > 1.5 > sum(none)
    assert main(["push", str(run), f"local-dir:{tmp_path / 'hub'}"]) == 0
    assert "| epoch | val_loss | map | macro_f1 |" in (tmp_path / "hub" / "README.md").read_text()
    capsys.readouterr()
    assert main(["report", str(run), "--json"]) == 0
    assert "several labels each" in capsys.readouterr().out
