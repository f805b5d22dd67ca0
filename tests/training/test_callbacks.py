"""Who hears what a run tells: the logger `attninject`, callbacks, standard output."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import pytest
from tiny import DATA, QUICK, net

from attninject import errors
from attninject.training import Callback, finetune
from attninject.training.callbacks import LOG, printed, spoken

ONE = {**QUICK, "epochs": 1}


class Heard(Callback):
    """Notes all that it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.steps: list[tuple[int, float]] = []
        self.rows: list[Mapping[str, Any]] = []
        self.result: Any = None

    def on_line(self, text: str) -> None:
        self.lines.append(text)

    def on_step(self, step: int, loss: float) -> None:
        self.steps.append((step, loss))

    def on_epoch(self, row: Mapping[str, Any]) -> None:
        self.rows.append(row)

    def on_end(self, result: Any) -> None:
        self.result = result


def test_callbacks_hear_lines_steps_epochs_and_the_end() -> None:
    """Each step with its number and loss, each row of the log, the lines that the logger has, the result."""
    heard = Heard()
    result = finetune(net(), DATA, **QUICK, callbacks=[heard, Callback()])
    assert heard.result is not None
    assert heard.rows == result.history == heard.result.history
    assert [step for step, _ in heard.steps] == list(range(1, 13))
    losses = [loss for _, loss in heard.steps]
    assert sum(losses[:6]) / 6 == pytest.approx(result.history[1]["train_loss"])
    assert any("epoch 2/2: train loss" in line and "macro-F1" in line for line in heard.lines)


def test_an_error_of_a_callback_ends_the_run(tmp_path: Any) -> None:
    """As a trial that is pruned; the folder is free afterwards, and its checkpoint serves."""

    class Prunes(Callback):
        def on_epoch(self, row: Mapping[str, Any]) -> None:
            if row["epoch"] == 1:
                raise LookupError("pruned")

    with pytest.raises(LookupError, match="pruned"):
        finetune(net(), DATA, **QUICK, callbacks=[Prunes()], out=tmp_path / "a")
    assert len(finetune(net(), DATA, **QUICK, out=tmp_path / "a", resume=True).history) == 3
    with pytest.raises(errors.ExperimentError, match=r"instances of ai\.training\.Callback, found 3"):
        finetune(net(), DATA, **QUICK, callbacks=[3])  # type: ignore[list-item]


def test_the_logger_has_the_lines(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """Progress at INFO, what to look at at WARNING; where logging is set up, nothing is printed."""
    with caplog.at_level(logging.INFO, logger="attninject"):
        finetune(net(), DATA, **{**ONE, "lr": 1e-6})
    levels = {r.levelno: r.getMessage() for r in caplog.records if r.name == "attninject"}
    assert levels[logging.INFO].startswith("epoch 1/1: train loss")
    assert levels[logging.WARNING].startswith("warning: gates that hardly moved")
    assert capsys.readouterr().out == ""


def test_without_logging_lines_are_printed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a loop of one's own would; `setLevel` leaves only warnings, or nothing."""
    monkeypatch.setattr(LOG, "propagate", False)  # pytest has handlers of its own at the root
    with spoken():
        LOG.info("one")
    assert capsys.readouterr().out == "one\n"
    finetune(net(), DATA, **ONE)
    assert "epoch 1/1: train loss" in capsys.readouterr().out
    monkeypatch.setattr(LOG, "level", logging.ERROR)
    finetune(net(), DATA, **ONE)
    assert capsys.readouterr().out == ""
    with printed(quiet=True):
        assert LOG.hasHandlers()
    assert not LOG.handlers


def test_say_is_deprecated_and_works(capsys: pytest.CaptureFixture[str]) -> None:
    """The lines go to the function, and nowhere else."""
    said: list[str] = []
    with pytest.warns(DeprecationWarning, match="`say` is deprecated: give `callbacks`"):
        finetune(net(), DATA, **ONE, say=said.append)
    assert any("epoch 1/1" in line for line in said)
    assert capsys.readouterr().out == ""
