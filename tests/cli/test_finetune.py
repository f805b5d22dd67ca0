"""`attninject finetune` as a user meets it: files, flags, figures, refusals, several processes."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import attninject as ai
from attninject import errors, models
from attninject.cli import main
from attninject.training import read_experiment
from attninject.training.building import build
from attninject.training.experiment import Data, settings

ROOT = Path(__file__).resolve().parents[2]
MODEL = "timm/test_convnext"  # layer norms only: no statistics of batches
GIVEN = ["--model", MODEL, "--out", "x"]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]):
    """Run a command line in this process: (exit code, standard output, standard error)."""

    def call(*argv: str) -> tuple[int, str, str]:
        try:
            code = main(["finetune", *argv])
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return call


def test_settings_are_read_without_torch(tmp_path: Path) -> None:
    """The tables behind the flags, and an experiment file without a recipe load no torch."""
    (tmp_path / "e.yaml").write_text("model: timm/resnet18\nout: x\ntrain: {freeze: backbone}\n")
    code = (
        "import sys\n"
        "from attninject.training.experiment import TRAIN, read_experiment\n"
        "assert read_experiment(sys.argv[1]).train.freeze == 'backbone' and 'lr' in TRAIN\n"
        "print([name for name in ('torch', 'numpy', 'timm') if name in sys.modules])"
    )
    given = [sys.executable, "-c", code, str(tmp_path / "e.yaml")]
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
    }
    done = subprocess.run(given, capture_output=True, text=True, env=env)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image folder of three colours: 24 training and 9 validation images."""
    root = tmp_path_factory.mktemp("images")
    for split, count in (("train", 8), ("val", 3)):
        for c, name in enumerate(("blue", "green", "red")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                colour = [20 * i, 20 * i, 20 * i]
                colour[c] = 250
                Image.new("RGB", (48, 40), tuple(colour)).save(root / split / name / f"{i}.png")
    return root


def experiment(images: Path, folder: Path, **more: Any) -> Path:
    """An experiment file."""
    train = {"epochs": 2, "batch_size": 8, "lr": 0.001, "attn_lr": 0.01, "optimizer": "sgd", **more}
    text = f"""\
# One-page experiment of the tests.
model: {MODEL}
recipe: se
data: {{kind: imagefolder, root: "{images}", size: 32}}
train: {json.dumps(train)}
out: "{folder / "a"}"
"""
    file = folder / "experiment.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def log(folder: Path) -> list[dict[str, float]]:
    """The rows of a run's log."""
    rows = csv.DictReader((folder / "log.csv").read_text().splitlines())
    return [{k: float(v) for k, v in row.items() if v and k != "seconds"} for row in rows]


def test_a_file_a_run_a_delta(run, images: Path, tmp_path: Path) -> None:
    """The run says its figures; its delta loads into a fresh base; its own settings file repeats it."""
    code, out, err = run(str(experiment(images, tmp_path)))
    assert (code, err) == (0, "")
    assert "24 training and 9 validation images" in out
    assert "epoch 2/2: train loss" in out
    assert f"see {tmp_path / 'a'}" in out
    torch.manual_seed(0)
    base = models.build(MODEL, num_classes=3)
    model = ai.load(base, tmp_path / "a" / "last.safetensors")
    assert ai.injected(model)
    assert "NaN" not in (tmp_path / "a" / "log.csv").read_text()
    again = json.loads(
        run(str(tmp_path / "a" / "experiment.json"), "--out", str(tmp_path / "b"), "--json")[1]
    )
    assert log(tmp_path / "b") == log(tmp_path / "a")
    assert again["best"] == max(again["history"], key=lambda row: row["top1"])


def test_step_zero_of_the_command(run, images: Path, tmp_path: Path) -> None:
    """Blocks that all of the network passes through: epoch 0 with them is epoch 0 without, to the last digit."""
    rows, rules = [], ["--block se --place stage_end", "--block cbam --place stage_end", "--recipe null"]
    for number, rule in enumerate(rules):
        folder = tmp_path / str(number)
        argv = [*rule.split(), "--epochs", "1", "--out", str(folder)]
        assert run(str(experiment(images, tmp_path)), *argv)[0] == 0
        rows.append([{k: row[k] for k in ("val_loss", "top1", "top5")} for row in log(folder)])
    assert rows[0][0] == rows[1][0] == rows[2][0]
    assert rows[0][1] != rows[2][1]


def test_flags_lie_over_the_file(run, images: Path, tmp_path: Path) -> None:
    """A flag of every kind: numbers, words, null for the recipe, true or false, a stage, a data key."""
    file = experiment(images, tmp_path)
    code, out, _ = run(
        str(file), "--epochs", "1", "--recipe", "null", "--freeze", "[1, 2]", "--channels-last",
        "--lr", "1e-2", "--data-hflip", "0", "--json",
    )  # fmt: skip
    assert code == 0
    said = json.loads(out)["experiment"]
    assert (said["recipe"], said["train"]["epochs"], said["train"]["lr"]) == (None, 1, 0.01)
    assert (said["train"]["freeze"], said["train"]["channels_last"]) == ([1, 2], True)
    assert (said["data"]["hflip"], said["train"]["attn_lr"]) == (0.0, 0.01)
    shipped = load_file(tmp_path / "a" / "best.safetensors")
    assert set(shipped) == set(models.build(MODEL, num_classes=3).state_dict())


def test_null_and_no_as_flags(images: Path, tmp_path: Path) -> None:
    """`--freeze null` takes back what the file says; `no` is a precision, though YAML reads it as false."""
    file = experiment(images, tmp_path, freeze="backbone", ema=0.9, precision="bf16")
    nulls = {"freeze": None, "ema": None}
    assert read_experiment(file).train.freeze == "backbone"
    found = read_experiment(file, {"train": {**nulls, "precision": False}, "data": {"size": None}})
    assert (found.train.freeze, found.train.ema, found.train.precision, found.data.size) == (
        None,
        None,
        "no",
        None,
    )
    with pytest.raises(
        errors.ExperimentError, match=r"train, epochs: expected a number from 1, found nothing"
    ):
        read_experiment(file, {"train": {"epochs": None}})
    plain = tmp_path / "plain.yaml"
    plain.write_text(f"model: {MODEL}\nout: x\ntrain: {{precision: no}}\n")
    assert read_experiment(plain).train.precision == "no"


def test_one_rule_in_flags_and_resume(run, images: Path, tmp_path: Path) -> None:
    """--block and --place stand for a recipe; --resume --out goes on with the run's own settings."""
    out_folder = tmp_path / "a"
    argv = ["--model", MODEL, "--block", "se", "--place", "stage_end", "--set", "reduction=4"]
    argv += ["--data", str(images), "--size", "32"]
    argv += ["--epochs", "1", "--out", str(out_folder)]
    assert run(*argv, "--batch-size", "8")[0] == 0
    code, out, _ = run("--resume", "--out", str(out_folder), "--epochs", "2")
    assert code == 0
    assert "going on from epoch 1" in out
    assert [row["epoch"] for row in log(out_folder)] == [0, 1, 2]
    code, _, err = run(*argv)
    assert code == 1
    assert "holds a run already" in err


def test_data_may_be_a_folder(images: Path, tmp_path: Path) -> None:
    """A folder in place of a kind is an image folder; a fifth is held out where it has no splits; it may be a text."""
    file = experiment(images, tmp_path)
    classes = images / "train"
    laid_over = read_experiment(file, {"data": {"kind": str(classes)}}).data
    assert (laid_over.kind, laid_over.root, laid_over.size) == ("imagefolder", str(classes), 32)
    assert (laid_over.val_fraction, read_experiment(file).data.val_fraction) == (0.2, None)
    file.write_text(f"model: {MODEL}\nout: x\ndata: {images}\n")
    assert read_experiment(file).data == Data("imagefolder", root=str(images))
    assert settings(str(images))[0] == read_experiment(file).data


@pytest.mark.parametrize(
    ("argv", "code", "expected"),
    [
        ([], 2, "give an experiment FILE, or --model and --out"),
        ([*GIVEN, "--epchs", "3"], 2, "did you mean --epochs?"),
        (
            [*GIVEN, "--recipe", "se", "--block", "se", "--after", "y"],
            2,
            "give one of the two",
        ),
        ([*GIVEN, "--block", "se"], 2, "--block se needs --after, --before, --place or --replace"),
        ([*GIVEN, "--data-auto-augment", "augmx-m3"], 2, "found 'augmx-m3'; did you mean augmix?"),
        ([*GIVEN, "--data-auto-augment", "rand-mtsd0.5"], 2, "sections such as m1, n1, p0.5"),
        ([*GIVEN, "--data-augment", "non"], 2, "did you mean none?"),
        ([*GIVEN, "--recipe", "see"], 2, "no shipped recipe 'see'; did you mean se"),
        (["--model", MODEL], 1, "`out` missing"),
        (["missing.yaml"], 1, "missing.yaml: no such file"),
        (["--resume", "--out", "gone"], 1, "gone holds no run to go on with"),
        ([*GIVEN, "--data", "imagefolder"], 1, "needs `root`"),
        (
            [*GIVEN, "--track", "tensorboard,tensorbord"],
            2,
            "no tracker 'tensorbord'; did you mean tensorboard?",
        ),
        ([*GIVEN, "--class-weights", "gone.csv"], 2, "expected balanced, or a CSV file"),
        ([*GIVEN, "--patience", "0"], 2, "patience: expected a number from 1"),
        ([*GIVEN, "--monitor", "top11"], 2, "did you mean top1"),
        (
            [*GIVEN, "--monitor", "map"],
            1,
            "images of one class each have val_loss, top1, top5, macro_f1, not map",
        ),
        ([*GIVEN, "--min-delta", "0.1"], 1, "`min_delta` counts for `patience`, which is not given"),
        ([*GIVEN, "--data", "multilabel"], 1, "needs `root`"),
        ([*GIVEN, "--data-labels", "x.csv"], 1, "data kind multilabel, not 'digits'"),
        ([*GIVEN, "--data", "random", "--data-classes", "1"], 2, "expected a number from 2"),
        ([*GIVEN, "--data", "random", "--data-images", "1"], 1, "there are no training images in random"),
        ([*GIVEN, "--dry-run", "--resume"], 2, "--resume, --dry-run and --find-lr: give one of them"),
        ([*GIVEN, "--find-lr", "--data", "timm", "--data-root", "gone"], 1, "needs `name`"),
        (
            [*GIVEN, "--data", "imagefolder", "--data-root", "gone"],
            1,
            "there is no folder gone",
        ),
        ([*GIVEN, "--data", "photos"], 2, "a folder of images that is there"),
        ([*GIVEN, "--data", "/", "--data-root", "/"], 1, "give one of the two"),
    ],
)
def test_refusals(argv: list[str], code: int, expected: str, run, tmp_path: Path, monkeypatch) -> None:
    """Usage is 2, everything else 1, always one paragraph without a traceback, and no folder is left."""
    monkeypatch.chdir(tmp_path)
    found, out, err = run(*argv)
    assert (found, out) == (code, "")
    assert expected in err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_all_faults_of_a_file_with_their_lines(run, tmp_path: Path) -> None:
    """Unknown keys, wrong values and unknown words in one report."""
    file = tmp_path / "bad.yaml"
    file.write_text(
        "modl: timm/resnet18\nmodel: timm/resnet18\ndata: {kind: folder}\ntrain:\n  epochs: 0\n  lr: fast\n"
        "  optimiser: sgd\nout: !!python/object:os.system x\n",
        encoding="utf-8",
    )
    code, _, err = run(str(file))
    assert code == 1
    expected = {
        1: "unknown key 'modl'; did you mean model",
        3: "found 'folder'; did you mean imagefolder",
        5: "epochs: expected a number from 1, found the number 0",
        6: "found 'fast'",
        7: "unknown key 'optimiser'; did you mean optimizer",
        8: "tags are not allowed",
    }
    for line, text in expected.items():
        assert any(f"{file}:{line}:" in row and text in row for row in err.splitlines()), (line, err)


def test_the_contracts_own_example_is_read(tmp_path: Path) -> None:
    """The experiment file of the documentation, comments and all."""
    file = tmp_path / "e.yaml"
    file.write_text("""\
model: timm/resnet50
weights: default
recipe: cbam              # null: plain fine-tuning
data: {kind: imagefolder, root: data}     # or {kind: digits}, the offline default
train: {epochs: 10, batch_size: 64, lr: 1e-4, attn_lr: 1e-3, freeze: backbone, seed: 0}
out: runs/a               # --resume goes on
""")
    found = read_experiment(file)
    assert (found.model, found.weights, found.recipe, found.out) == (
        "timm/resnet50",
        "default",
        "cbam",
        "runs/a",
    )
    assert (found.train.lr, found.train.attn_lr, found.train.freeze) == (1e-4, 1e-3, "backbone")
    again = tmp_path / "again.json"
    again.write_text(json.dumps(found.to_dict()))
    assert read_experiment(again) == found


def test_a_recipe_file_may_move_once_the_run_has_begun(tmp_path: Path) -> None:
    """The settings that a run keeps hold the rules of the file, and say so when the file has changed since."""
    file, kept = tmp_path / "mine.yaml", tmp_path / "kept.json"
    text = "name: mine\nrules:\n  - {block: se, place: stage_end, args: {reduction: 4}, stages: [1, 2]}\n"
    file.write_text(text)
    given = {"model": MODEL, "out": "x", "recipe": str(file)}
    found = read_experiment(None, given)
    kept.write_text(json.dumps(found.to_dict()))
    file.write_text(text.replace("4", "8"))
    assert read_experiment(None, given) != found
    file.unlink()
    assert read_experiment(kept) == found


def test_pretrained_weights_with_another_number_of_classes(run, images: Path, tmp_path: Path) -> None:
    """A file with ten classes serves three: the head is new, all else is the file's."""
    for name, head in (("timm/test_resnet", "fc."), ("torchvision/shufflenet_v2_x0_5", "fc.")):
        base = models.build(name, num_classes=10)
        weights = tmp_path / "w.pth"
        torch.save(base.state_dict(), weights)
        model = build(name, str(weights), 3)
        state = model.state_dict()
        assert state[f"{head}weight"].shape[0] == 3
        assert all(torch.equal(t, state[k]) for k, t in base.state_dict().items() if not k.startswith(head))


def test_export_finds_the_base_of_another_number_of_classes(tmp_path: Path) -> None:
    """A delta on weights of ten classes, trained for three, is exported with the weights that it was made from."""
    weights, file = tmp_path / "w.pth", tmp_path / "d.safetensors"
    torch.manual_seed(0)
    torch.save(models.build(MODEL, num_classes=10).state_dict(), weights)
    ai.save(ai.inject(build(MODEL, str(weights), 3), block="se", place="stage_end"), file)
    argv = ["export", str(file), "--model", MODEL, "--weights", str(weights), "--num-classes", "3"]
    assert main([*argv, "--size", "32", "--to", "state_dict", "-o", str(tmp_path / "s.safetensors")]) == 0
    assert load_file(tmp_path / "s.safetensors")["head.fc.weight"].shape[0] == 3


# --- several processes --------------------------------------------------------------------------


def together(launcher: list[str], file: Path) -> str:
    """Run an experiment on two CPU processes; what they said."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    env = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *launcher, "-m", "attninject", "finetune", str(file)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ACCELERATE = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
              "--mixed_precision", "no", "--dynamo_backend", "no"]  # fmt: skip


FSDP = [*ACCELERATE[:1], "--use_fsdp", "--fsdp_version", "2", *ACCELERATE[2:]]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "manner"),
    [(TORCHRUN, "DDP"), (ACCELERATE, "DDP"), (FSDP, "FSDP2 in 10 units")],
    ids=["torchrun", "accelerate", "accelerate_fsdp"],
)
def test_two_processes_train_as_one(
    launcher: list[str], manner: str, run, images: Path, tmp_path: Path
) -> None:
    """Half the batch on each of two processes: the same metrics before, the same weights after training."""
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir(), two.mkdir()
    unfreeze = {"freeze": "backbone", "unfreeze": [{"epoch": 2, "what": "stages.3"}]}
    assert run(str(experiment(images, one, batch_size=8, **unfreeze)), "--device", "cpu")[0] == 0
    out = together(launcher, experiment(images, two, batch_size=4, device="cpu", **unfreeze))
    assert out.count("epoch 2/2: train loss") == out.count("best: epoch") == 1
    assert f"; 2 processes, {manner}\n" in out
    first, second = log(one / "a"), log(two / "a")
    assert first[0] == pytest.approx(second[0], rel=1e-6)
    assert [row["top1"] for row in first] == [row["top1"] for row in second]
    a, b = (load_file(folder / "a" / "last.safetensors") for folder in (one, two))
    assert set(a) == set(b)
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("flag", "word"), [("FSDP", "FSDP 1"), ("DEEPSPEED", "DeepSpeed")])
def test_other_engines_of_accelerate_are_refused(
    flag: str, word: str, run, images: Path, tmp_path: Path, monkeypatch
) -> None:
    """What `accelerate launch` hands down of the older FSDP, or of DeepSpeed, is named and not passed over."""
    monkeypatch.setenv(f"ACCELERATE_USE_{flag}", "true")
    code, _, err = run(str(experiment(images, tmp_path, device="cpu")))
    assert code == 1
    assert f"asks for {word}; the engine has DDP and FSDP 2 (fsdp_version: 2)" in err
    assert not (tmp_path / "a").exists()


# --- export -------------------------------------------------------------------------------------


def test_a_run_is_exported_from_its_folder(run, images: Path, tmp_path: Path, capsys) -> None:
    """`export FOLDER --to pt2` finds base, blocks and size by itself and prints the parity."""
    assert run(str(experiment(images, tmp_path, epochs=1)))[0] == 0
    folder = tmp_path / "a"
    assert main(["export", str(folder), "--to", "pt2"]) == 0
    out = capsys.readouterr().out
    assert f"wrote {folder / 'exported.pt2'}" in out
    assert "2×3×32×32: largest difference" in out
    # at 32 its last map is 1×1, which torch.export fixes; not so torch 2.6
    assert re.search("3×3×(32×32|64×96): largest difference", out)
    assert torch.export.load(folder / "exported.pt2").module()(torch.zeros(4, 3, 32, 32)).shape == (4, 3)
    argv = [
        "export",
        str(folder / "best.safetensors"),
        "--model",
        MODEL,
        "--num-classes",
        "3",
        "--to",
        "state_dict",
    ]
    assert main([*argv, "--size", "32", "-o", str(tmp_path / "s.safetensors"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parity"][0]["difference"] == 0
    assert main(["export", str(tmp_path), "--to", "pt2"]) == 1
    assert "holds no run of attninject finetune" in capsys.readouterr().err


# --- pictures -----------------------------------------------------------------------------------


def test_a_run_is_drawn_with_its_start(run, images: Path, tmp_path: Path, capsys) -> None:
    """`visualize FOLDER` takes model, blocks and image size from the run, and shows where the gates began."""
    assert run(str(experiment(images, tmp_path, epochs=1)))[0] == 0
    capsys.readouterr()
    out, image = tmp_path / "maps", str(images / "val" / "red" / "0.png")
    assert main(["visualize", str(tmp_path / "a"), image, "-o", str(out), "--no-cam", "--json"]) == 0
    files = json.loads(capsys.readouterr().out)["files"]
    assert files[0] == str(out / "index.html")
    page = (out / "index.html").read_text(encoding="utf-8")
    assert "orange: before training" in page
    assert "given to the model as 32×32" in page
    assert f" of {tmp_path / 'a'}</h1>" in page
    assert main(["visualize", str(tmp_path), image, "-o", str(out)]) == 1
    assert "holds no run of attninject finetune" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["visualize", str(tmp_path / "a"), image, "-o", str(out), "--recipe", "se"])
    assert stop.value.code == 2
    assert "is a run, which has its blocks: leave the recipe and its flags out" in capsys.readouterr().err


def test_start_of_a_run_is_its_first_epochs(run, images: Path, tmp_path: Path) -> None:
    """The start is built anew as the run built it: weights before training, gates of 1."""
    from attninject.training.engine import started, trained

    assert run(str(experiment(images, tmp_path, epochs=1)))[0] == 0
    start, end = started(tmp_path / "a"), trained(tmp_path / "a")
    assert start.state_dict().keys() == end.state_dict().keys()
    x = torch.zeros(1, 3, 32, 32)
    assert all((gate == 1).all() for maps in ai.attention_maps(start, x).values() for gate in maps.values())
    seed = read_experiment(tmp_path / "a" / "experiment.json").train.seed
    torch.manual_seed(seed)
    base = build(MODEL, "none", 3)
    assert all(torch.equal(start.state_dict()[key], value) for key, value in base.state_dict().items())
    assert any(not torch.equal(start.state_dict()[key], value) for key, value in end.state_dict().items())


def test_policies_are_those_of_timm() -> None:
    """Whatever policy passes the check, timm builds; an unknown one does not get that far."""
    from timm.data import create_transform

    from attninject.recipe.report import BAD, Node, Report
    from attninject.training.finetune_settings import DATA

    check = DATA["auto_augment"][0]
    good = ("rand-m9-n3-mstd0.5-inc1", "rand-m9-tweights", "rand-t3a-p0.5-mmax12", "augmix-m5-w4-d2", "v0",
            "original-mstd0.5", "v0r", "originalr", "3a")  # fmt: skip
    for policy in good:
        assert check(Node(policy), Report()) == policy
        create_transform(32, is_training=True, auto_augment=policy)
    for policy in ("nope", "rand-nope", "rand-m", "rand-mx", "v0-m3", "original-", "rand-tnope", ""):
        assert check(Node(policy), Report()) is BAD, policy
