"""`attninject predict`: any folder or file through a trained run, as its validation images went."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from attninject import errors
from attninject.cli import main
from attninject.training import trained
from attninject.training.predicting import predict

COLOURS = {"blue": (20, 20, 240), "green": (20, 240, 20), "red": (240, 20, 20)}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that tells three colours apart."""
    root = tmp_path_factory.mktemp("colours")
    generator = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (root / "photos" / name).mkdir(parents=True)
        for number in range(10):
            noise = generator.integers(-15, 15, (40, 48, 3))
            Image.fromarray((np.array(colour) + noise).astype("uint8")).save(
                root / "photos" / name / f"{number}.png"
            )
    argv = [
        "finetune",
        "--model",
        "timm/test_resnet",
        "--block",
        "se",
        "--place",
        "stage_end",
        "--size",
        "32",
    ]
    argv += ["--data", str(root / "photos"), "--epochs", "4", "--batch-size", "8", "--lr", "5e-3"]
    assert main([*argv, "--data-augment", "none", "--out", str(root / "run")]) == 0
    return root / "run"


def test_files_of_every_mode_and_size(run: Path, tmp_path: Path) -> None:
    """Grey, transparent, CMYK, palette, tiny and long images have an answer each; shares sum to one."""
    red = Image.new("RGB", (60, 44), COLOURS["red"])
    for mode in ("RGB", "RGBA", "CMYK", "P", "L"):
        red.convert(mode).save(tmp_path / f"{mode}.{'tif' if mode == 'CMYK' else 'png'}")
    red.resize((1, 1)).save(tmp_path / "tiny.png")
    red.resize((900, 20)).save(tmp_path / "wide.png")
    found = predict(run, [tmp_path], topk=3)
    by_name = {Path(row.file).name: row for row in found.rows}
    assert set(by_name) == {"RGB.png", "RGBA.png", "CMYK.tif", "P.png", "L.png", "tiny.png", "wide.png"}
    for name, row in by_name.items():
        assert sum(row.probabilities) == pytest.approx(1, abs=1e-5)
        assert sorted(row.classes) == sorted(COLOURS)
        assert name == "L.png" or row.classes[0] == "red", row
    assert found.unreadable == {}


def test_the_answer_is_the_models_own(run: Path, tmp_path: Path) -> None:
    """What the run's model gives for the image, resized and normalised as timm's evaluation does."""
    from timm.data import create_transform, resolve_model_data_config

    image = Image.new("RGB", (32, 32), COLOURS["green"])
    image.save(tmp_path / "g.png")
    model = trained(run)
    config = {**resolve_model_data_config(model), "input_size": (3, 32, 32)}
    x = create_transform(**config, is_training=False)(image)
    row = predict(run, [tmp_path / "g.png"], topk=1).rows[0]
    share = torch.softmax(model(x[None]), 1)[0].max().item()
    assert (row.classes[0], row.probabilities[0]) == ("green", pytest.approx(share, abs=1e-3))


def test_the_command(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A line per image, a CSV, JSON; unreadable files are refused, or counted."""
    (tmp_path / "a").mkdir()
    Image.new("RGB", (32, 32), COLOURS["blue"]).save(tmp_path / "a" / "b.png")
    (tmp_path / "a" / "broken.png").write_bytes(b"no image")
    table = tmp_path / "out.csv"
    argv = ["predict", str(run), str(tmp_path / "a")]
    assert main(argv) == 1
    assert "broken.png cannot be read as an image" in capsys.readouterr().err
    assert main([*argv, "--skip", "--topk", "2", "--csv", str(table)]) == 0
    said = capsys.readouterr().out
    assert f"{tmp_path / 'a' / 'b.png'}  blue " in said
    assert "1 could not be read: " in said
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert [(r["class_1"], set(r)) for r in rows] == [
        ("blue", {"file", "class_1", "probability_1", "class_2", "probability_2"})
    ]
    assert main([*argv, "--skip", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["predictions"][0]["classes"][0] == "blue"


@pytest.mark.parametrize(
    ("images", "said"),
    [(["gone.png"], "there is no file or folder gone.png"), (["."], "there is no image file in .")],
)
def test_refusals(run: Path, images: list[str], said: str, tmp_path: Path, monkeypatch) -> None:
    """A name that is not there, and a folder without images."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(errors.DataError, match=said):
        predict(run, images)
