"""`attninject evaluate` as a user meets it: the run's own figures, other images, blocks off, refusals."""

from __future__ import annotations

import csv
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import attninject as ai
from attninject import models
from attninject.cli import main
from attninject.delta_file import detached, save_tensors
from attninject.training import trained
from attninject.training.evaluation import evaluate_run
from attninject.training.runs import MEASURED

MODEL = "timm/test_convnext"
COLOURS = ("blue", "green", "red")


def colours(root: Path, count: int, names: tuple[str, ...] = COLOURS) -> Path:
    """A folder per colour with noisy pictures."""
    generator = torch.Generator().manual_seed(count)
    for number, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = torch.randint(0, 255, (32, 32, 3), generator=generator, dtype=torch.uint8)
            pixels[..., number] = 200
            Image.fromarray(pixels.numpy()).save(root / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with SE blocks that have moved."""
    root = tmp_path_factory.mktemp("colours")
    colours(root / "train", 6)
    colours(root / "val", 4)
    file = root / "experiment.json"
    file.write_text(json.dumps({
        "model": MODEL, "recipe": "se", "data": {"kind": "imagefolder", "root": str(root), "size": 32},
        "train": {"epochs": 2, "batch_size": 6, "lr": 1e-3, "attn_lr": 0.3}, "out": str(root / "run"),
    }))  # fmt: skip
    assert main(["finetune", str(file), "--json"]) == 0
    return root / "run"


def rows(folder: Path) -> list[dict[str, str]]:
    """The run's log."""
    return list(csv.DictReader((folder / "log.csv").read_text(encoding="utf-8").splitlines()))


def test_it_finds_what_the_run_found(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Loss and accuracies of the best and of the last epoch are the log's, to the digit; --json says them."""
    capsys.readouterr()
    log = rows(run)
    best = max(log, key=lambda row: float(row["top1"]))
    for file, row in (("best", best), ("last", log[-1])):
        assert main(["evaluate", str(run), "--file", file, "--json"]) == 0
        said = json.loads(capsys.readouterr().out)
        assert [said["loss"], said["top1"]] == [float(row["val_loss"]), float(row["top1"])]
        assert said["images"] == 12
        assert [c["name"] for c in said["classes"]] == list(COLOURS)
        assert "without_blocks" not in said
    kept = json.loads((run / MEASURED).read_text(encoding="utf-8"))
    assert kept["epoch"] == 2
    assert {k: kept[k] for k in ("ece", "macro_f1", "classes")} == {
        k: said[k] for k in ("ece", "macro_f1", "classes")
    }


def test_without_blocks_is_the_model_with_them_off(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The second column is the accuracy under `ai.disabled`; the third the difference; the model is not changed."""
    found = evaluate_run(run, without_blocks=True, file="last")
    assert found.without is not None
    assert found.without.loss != found.metrics.loss
    assert main(["evaluate", str(run), "--file", "last", "--without-blocks"]) == 0
    out = capsys.readouterr().out
    assert "without blocks" in out
    assert f"{found.metrics.loss:.4f}" in out
    assert f"{found.metrics.loss - found.without.loss:+.4f}" in out
    assert "change nothing" not in out
    untrained = str(replace(found, file="best", without=found.metrics))
    assert (
        "the blocks of this file change nothing: they stand as before training (see what the last"
        in untrained
    )
    model = trained(run, "last.safetensors")
    x = torch.zeros(1, 3, 32, 32)
    with torch.no_grad():
        on = model(x)
        with ai.disabled(model):
            assert not torch.equal(model(x), on)


def test_tables_add_up(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The CSV has a row per class, the matrix's rows are its images and its columns its predictions."""
    files = tmp_path / "classes.csv", tmp_path / "confusion.csv"
    argv = ["--csv", str(files[0]), "--confusion", str(files[1]), "--without-blocks", "--batch-size", "5"]
    assert main(["evaluate", str(run), *argv]) == 0
    assert f"wrote {files[0]}, {files[1]}" in capsys.readouterr().out
    classes = list(csv.DictReader(io.StringIO(files[0].read_text(encoding="utf-8"))))
    lines = csv.reader(io.StringIO(files[1].read_text(encoding="utf-8")))
    matrix = [[int(cell) for cell in row[1:]] for row in lines if row[0] != "class"]
    assert [sum(row) for row in matrix] == [int(c["images"]) for c in classes] == [4, 4, 4]
    assert [sum(column) for column in zip(*matrix, strict=True)] == [int(c["predicted"]) for c in classes]
    assert {"recall", "without_recall"} <= set(classes[0])


def test_other_images_by_the_names_of_their_classes(run: Path, tmp_path: Path) -> None:
    """Some of the classes, in a folder or under its `val`, get the run's numbers; unread ones do not count."""
    root = colours(tmp_path / "some", 5, ("green", "red"))
    found = evaluate_run(run, root)
    assert {c.name: c.images for c in found.metrics.classes} == {"blue": 0, "green": 5, "red": 5}
    assert found.metrics.classes[0].recall is None
    colours(tmp_path / "other" / "val", 2)
    assert evaluate_run(run, tmp_path / "other").metrics.images == 6


def test_refusals_take_one_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No run, no folder, unknown classes, a run without blocks, a folder in the CSV's place: what, and why."""
    colours(tmp_path / "odd", 1, ("green", "pink"))
    plain = tmp_path / "plain"
    shutil.copytree(run, plain)
    settings = json.loads((plain / "experiment.json").read_text(encoding="utf-8"))
    settings["recipe"] = None
    (plain / "experiment.json").write_text(json.dumps(settings), encoding="utf-8")
    state = models.build(MODEL, num_classes=3).state_dict()
    save_tensors(detached(state), plain / "best.safetensors", {"format": "pt"})
    for argv, text in (
        ([str(tmp_path)], "holds no run of attninject finetune"),
        ([str(run), "--data", str(tmp_path / "none")], "there is no folder"),
        ([str(run), "--data", str(tmp_path / "odd")], "does not know: pink; the run's are blue, green, red"),
        ([str(plain), "--without-blocks"], "there are no blocks to switch off"),
        ([str(run), "--csv", str(tmp_path)], "it is a folder"),
    ):  # fmt: skip
        assert main(["evaluate", *argv]) == 1
        err = capsys.readouterr().err
        assert text in err
        assert len(err.strip().splitlines()) == 1
    with pytest.raises(SystemExit):
        main(["evaluate", str(run), "--file", "first"])
