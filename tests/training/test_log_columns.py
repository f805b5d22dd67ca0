"""Columns of a run's log: names that any reader of CSV takes, also where a run was begun under others."""

from __future__ import annotations

import csv
from pathlib import Path

from tiny import DATA, QUICK, net

from attninject.training import finetune
from attninject.training.log_columns import rate_column, renamed, scalar_name
from attninject.training.runs import CHECKPOINT, Folder, read


def test_names_have_neither_spaces_nor_commas() -> None:
    """A group's name becomes a column and a scalar of TensorBoard; other columns stay."""
    assert rate_column("blocks") == "lr.blocks"
    assert rate_column("backbone ×0.5, no decay") == "lr.backbone.x0.5.no_decay"
    assert scalar_name("lr.head.no_decay") == "lr/head_no_decay"
    assert scalar_name("moved.layer1.0.se") == "moved.layer1.0.se"
    assert renamed({"top1": 1.0, "lr head, no decay": 0.1}) == {"top1": 1.0, "lr.head.no_decay": 0.1}


def test_a_run_goes_on_under_the_columns_of_today(tmp_path: Path) -> None:
    """A checkpoint whose log had `lr blocks, no decay` is gone on with; its rates stand under `lr.blocks.no_decay`."""
    finetune(net(), DATA, **{**QUICK, "epochs": 1}, out=tmp_path / "a")
    tensors, meta = read(tmp_path / "a" / CHECKPOINT)
    old = [
        {k.replace("lr.", "lr ").replace(".no_decay", ", no decay"): v for k, v in row.items()}
        for row in meta["history"]
    ]
    assert "lr blocks, no decay" in old[0]
    Folder(tmp_path / "a").save(tensors, {**meta, "history": old, "best": old[-1]})
    finetune(net(), DATA, **QUICK, out=tmp_path / "a", resume=True)
    log = list(csv.DictReader((tmp_path / "a" / "log.csv").read_text(encoding="utf-8").splitlines()))
    assert not [key for key in log[0] if " " in key or "," in key]
    assert [float(row["lr.blocks.no_decay"]) for row in log] == [
        10 * float(row["lr.backbone"]) for row in log
    ]
