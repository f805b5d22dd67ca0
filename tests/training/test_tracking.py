"""Trackers: what a run tells them, what becomes of one that fails, and the real ones where they are installed."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from accelerate import tracking as accelerates
from tiny import DATA, QUICK, net

from attninject import errors
from attninject.cli import main
from attninject.training import finetune


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """What trackers are told that stand in for TensorBoard's and MLflow's; `aim`, which fails at its third figure."""
    heard: dict[str, list[Any]] = {"tensorboard": [], "aim": []}

    def stand_in(name: str) -> type:
        class Tracker(accelerates.GeneralTracker):
            requires_logging_directory = False

            def __init__(self, *args: Any, **given: Any) -> None:
                heard[name].append(("made", args, given))

            @property
            def tracker(self) -> None:
                return None

            def store_init_configuration(self, values: dict[str, Any]) -> None:
                heard[name].append(("config", values))

            def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
                if name == "aim" and sum(kind == "log" for kind, *_ in heard[name]) == 2:
                    raise ConnectionError("the server\nis gone")
                heard[name].append(("log", values, step))

            def finish(self) -> None:
                heard[name].append(("finished",))

        Tracker.name = name
        return Tracker

    for name in heard:
        monkeypatch.setitem(accelerates.LOGGER_TYPE_TO_CLASS, name, stand_in(name))
    monkeypatch.setattr(accelerates, "_available_trackers", list(heard))
    return heard


def logged(told: list[Any], key: str) -> list[tuple[Any, int]]:
    """The values of a figure, with their steps."""
    return [(kept[1][key], kept[2]) for kept in told if kept[0] == "log" and key in kept[1]]


def test_a_tracker_is_told_settings_plan_figures_and_gates(
    told: dict[str, list[Any]], tmp_path: Path
) -> None:
    """Each epoch's row at its step, step losses, the spread of each block's gates; first the settings and the plan."""
    result = finetune(net(), DATA, **QUICK, out=tmp_path / "a", log_every=2, track="tensorboard")
    board = told["tensorboard"]
    assert board[0] == ("made", ("tensorboard", str(tmp_path / "a")), {"purge_step": 1})
    config = board[1][1]
    assert (config["train.lr"], config["train.track"], config["data.kind"]) == (
        0.01,
        '["tensorboard"]',
        "digits",
    )
    assert all(isinstance(value, str | int | float | bool) for value in config.values())
    assert "| after units.0.norm |" in board[2][1]["plan"]
    assert logged(board, "top1") == [(row["top1"], row["step"]) for row in result.history]
    assert [step for _, step in logged(board, "step_loss")] == [2, 4, 6, 8, 10, 12]
    assert len(logged(board, "lr/blocks_no_decay")) == 3
    (mean, _), (low, _), (high, _) = (
        logged(board, f"gates.units.0.se.{k}")[-1] for k in ("mean", "min", "max")
    )
    assert low < mean < high
    assert logged(board, "gates.units.0.se.sd")[0] == (0.0, 0)
    assert "gates.units.0.se.sd" not in result.history[0]
    assert board[-1] == ("finished",)


def test_a_resumed_run_is_not_introduced_again(told: dict[str, list[Any]], tmp_path: Path) -> None:
    """It goes on behind its last step; another tracker may be added to it, and is told the settings."""
    finetune(net(), DATA, **QUICK, out=tmp_path / "a", track=["tensorboard"])
    told["tensorboard"].clear()
    more = {**QUICK, "epochs": 3}
    finetune(net(), DATA, **more, out=tmp_path / "a", resume=True, track=["tensorboard", "aim"])
    assert told["tensorboard"][0][2] == {"purge_step": 13}
    assert [kind for kind, *_ in told["tensorboard"]] == ["made", "log", "finished"]
    assert told["aim"][1][0] == "config"
    assert "| after units.0.norm |" in told["aim"][1][1]["plan"]


def test_a_tracker_that_fails_ends_no_training(
    told: dict[str, list[Any]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A server that goes away is said once, as a warning; the others are told on."""
    result = finetune(
        net(), DATA, **QUICK, out=tmp_path / "a", log_every=1, track="tensorboard,aim", project="p"
    )
    said = [
        r.getMessage() for r in caplog.records if r.levelno == logging.WARNING and "tracker" in r.getMessage()
    ]
    assert said == ["warning: the tracker aim has failed, and is told nothing more: the server"]
    assert told["aim"][0][1] == ("p",)
    assert len(logged(told["tensorboard"], "top1")) == len(result.history) == 3


def test_which_trackers(told: dict[str, list[Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a word TensorBoard's files, where it is installed and there is a folder; `none` leaves them out."""
    from attninject.training import tracking

    monkeypatch.setattr(tracking, "_board_runs", lambda: True)
    quick = {**QUICK, "epochs": 1}
    finetune(net(), DATA, **quick)
    finetune(net(), DATA, **quick, out=tmp_path / "none", track="none")
    assert told["tensorboard"] == []
    finetune(net(), DATA, **quick, out=tmp_path / "default")
    assert told["tensorboard"]


def test_refusals(told: dict[str, list[Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unknown name, a package that is missing, no folder, a tracker that cannot begin: before any training."""
    for given, error, said in (
        ("tensorbord", errors.ExperimentError, "no tracker 'tensorbord'; did you mean tensorboard"),
        (3, errors.ExperimentError, "expected trackers, as tensorboard,mlflow"),
        ("mlflow,tensorboard", errors.MissingPackageError, r'^mlflow: .*pip install "attninject\[track\]"'),
        ("swanlab", errors.MissingPackageError, "pip install swanlab"),
        ("tensorboard", errors.ExperimentError, "tensorboard writes into `out`, which is not given"),
    ):
        with pytest.raises(error, match=said):
            finetune(net(), DATA, **QUICK, track=given)

    def no_login(*_: Any, **__: Any) -> None:
        raise PermissionError("no login")

    monkeypatch.setitem(accelerates.LOGGER_TYPE_TO_CLASS, "aim", no_login)
    with pytest.raises(errors.RunError, match="the tracker aim cannot begin: no login"):
        finetune(net(), DATA, **QUICK, track="tensorboard,aim", out=tmp_path / "a")
    assert told["tensorboard"][-1] == ("finished",)


# --- the real ones ------------------------------------------------------------------------------


def begin_and_resume(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two epochs of the command, and one more after them; standard output stays JSON."""
    argv = ["--model", "timm/test_convnext", "--recipe", "se", "--data", "random", "--size", "32", "--json"]
    argv += ["--data-images", "20", "--batch-size", "8", "--out", str(folder), "--track", name]
    for more in (["--epochs", "2"], ["--resume", "--epochs", "3"]):
        capsys.readouterr()
        assert main(["finetune", *argv, *more]) == 0
        assert json.loads(capsys.readouterr().out)["experiment"]["train"]["track"] == [name]


@pytest.mark.strangers
@pytest.mark.filterwarnings("default")
def test_tensorboard(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One curve over both parts of a resumed run, the plan as a text, the settings as hyperparameters."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    begin_and_resume("tensorboard", tmp_path / "a", capsys)
    board = EventAccumulator(str(tmp_path / "a" / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("val_loss")] == [0, 2, 4, 6]
    assert "gates.stages.0.blocks.0.se.sd" in board.Tags()["scalars"]
    assert b"stages.0.blocks.0.se" in board.Tensors("plan/text_summary")[0].tensor_proto.string_val[0]
    assert "train.lr: 0.0001" in next((tmp_path / "a" / "tensorboard").rglob("hparams.yml")).read_text()


@pytest.mark.strangers
@pytest.mark.filterwarnings("default")
def test_mlflow(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A local store: one run over both parts, with its settings, its plan as an artifact, and every figure."""
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path / 'mlflow.db'}")
    begin_and_resume("mlflow", tmp_path / "a", capsys)
    (run,) = mlflow.search_runs(search_all_experiments=True, output_format="list")
    assert (run.info.run_name, run.info.status) == ("a", "FINISHED")
    assert (run.data.params["recipe"], run.data.params["data.kind"]) == ("se", "random")
    client = mlflow.MlflowClient()
    assert [m.step for m in client.get_metric_history(run.info.run_id, "val_loss")] == [0, 2, 4, 6]
    assert "stages.0.blocks.0.se" in mlflow.artifacts.load_text(f"{run.info.artifact_uri}/plan.md")


@pytest.mark.strangers
@pytest.mark.filterwarnings("default")
def test_weights_and_biases(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offline: both parts are of one run, whose files lie here to be synchronised later."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    begin_and_resume("wandb", tmp_path / "a", capsys)
    name = json.loads((tmp_path / "a" / "trackers.json").read_text())["wandb"]
    parts = sorted((tmp_path / "wandb").glob("offline-run-*"))
    assert [part.name.rpartition("-")[2] for part in parts] == [name, name]
    assert all(next(part.glob("*.wandb")).stat().st_size > 0 for part in parts)
