"""`bench gpu` without a card: the clock, figures that are kept whatever happens, the table and its verdict."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from attninject import errors
from attninject.bench import block_speed
from attninject.bench.block_speed import Case
from attninject.bench.gpu import blocks, course, crossovers, networks, sheet, table
from attninject.bench.gpu.sheet import Setting, Task
from attninject.blocks.fast import crossover
from attninject.cli import main


def setting(folder: Path, **more: Any) -> Setting:
    """A rehearsal's."""
    return Setting(
        **{"device": "cpu", "rehearse": True, "memory": 2**30, "bf16": True, "folder": folder, **more}
    )


def gone_through(given: Setting, seconds: float, *tasks: Task) -> list[dict[str, Any]]:
    """The lines that just these tasks leave, behind that of the machine."""
    part = SimpleNamespace(tasks=lambda given: iter(tasks))
    with pytest.MonkeyPatch.context() as patched, sheet.Sheet(given.folder) as made:
        patched.setattr(course, "PARTS", {"a": part})
        ordered = course.ordered(given)
        made.write("about", "machine", course._about(given, 1, ordered))
        assert course.carry_out(given, ordered, made, time.time() + seconds) == len(tasks)
    return sheet.read(given.folder)


def hangs(left: float) -> dict[str, Any]:
    """Never ends by itself, and takes an error for a matter of one figure."""
    while True:
        with suppress(Exception):
            time.sleep(0.01)


def test_the_most_valuable_first_and_a_fault_ends_nothing(tmp_path: Path) -> None:
    """Tasks run by rank; what raises is a line; a task that gives several figures has several lines."""

    def fails(left: float) -> dict[str, Any]:
        raise ValueError("first line\nsecond")

    def several(left: float) -> Iterator[tuple[str, dict[str, Any]]]:
        yield "x", {"value": 1}
        yield "y", {"value": 2}

    rows = gone_through(
        setting(tmp_path), 60, Task("a", "late", 3, 1, lambda left: {"value": 3}), Task("a", "bad", 1, 1, fails),
        Task("a", "several", 2, 1, several),
    )  # fmt: skip
    assert [r["name"] for r in rows] == ["machine", "bad", "x", "y", "late"]
    assert rows[1]["error"] == "ValueError: first line"
    assert [r.get("value") for r in rows[2:]] == [1, 2, 3]
    text = table.to_markdown(tmp_path)
    assert "Missing, 2 of 3:" in text
    assert "- a: bad: ValueError: first line" in text


def test_the_clock(tmp_path: Path, monkeypatch) -> None:
    """A task that hangs is cut off at the end; one that does not fit is not begun; both are said to be missing."""
    given = setting(tmp_path, rehearse=False)
    rows = gone_through(
        given, 0.6, Task("a", "hangs", 0, 0.1, hangs), Task("a", "later", 1, 100, lambda left: {})
    )
    assert [r.get("error", r.get("left_out")) for r in rows[1:]] == [
        "OutOfTime: the clock ran out", "0 s were left"
    ]  # fmt: skip


def test_a_task_that_hangs_leaves_time_for_the_others(tmp_path: Path, monkeypatch) -> None:
    """It is cut off at twice its estimate, long before the end."""
    monkeypatch.setattr(course, "LEAST", 0.1)
    given = setting(tmp_path, rehearse=False)
    rows = gone_through(
        given, 600, Task("a", "hangs", 0, 0.1, hangs), Task("a", "later", 1, 1, lambda left: {"value": left})
    )
    assert rows[1]["error"] == "OutOfTime: the clock ran out"
    assert rows[2]["value"] == 2


WORKER = """
import json, os, sys, time
given = json.loads(sys.argv[1])
for number in range(given["first"], 5):
    print(json.dumps({"number": number, "part": "a", "name": f"task {number}", "seconds": 0.2}), flush=True)
    if number == 0:
        os.kill(os.getpid(), 11)
    if number == 1:  # its card is lost, which it has written down
        os._exit(3)
    if number == 2:
        time.sleep(600)
print(given["folder"], file=sys.stderr)
"""


def test_a_worker_that_is_lost_costs_one_task(tmp_path: Path, monkeypatch) -> None:
    """After a crash, a lost card and a wait without end the next task has a worker of its own; each is a line."""
    monkeypatch.setattr(course, "GRACE", 2.0)
    said: list[str] = []
    course.run("cpu", True, tmp_path, 1, say=said.append, worker=(sys.executable, "-c", WORKER))
    assert [line.rpartition(": ")[2] for line in said] == [f"task {n}" for n in range(5)]
    assert {r["name"]: r["error"] for r in sheet.read(tmp_path)} == {
        "task 0": "its process was lost (signal 11)", "task 2": "its process was lost (it did not end in time)",
    }  # fmt: skip
    with pytest.raises(errors.RunError, match=r"ended before its first task \(exit code 7\)"):
        course.run("cpu", True, tmp_path, 1, worker=(sys.executable, "-c", "raise SystemExit(7)"))


def test_a_sheet_that_was_cut_off_keeps_what_it_had(tmp_path: Path) -> None:
    """Half a last line does no harm, nor to what comes behind it; without a sheet the message says what makes one."""
    for rate in (3e12, 4e12):
        with sheet.Sheet(tmp_path) as made:
            made.write("ceilings", "copy", {"bytes_per_second": rate})
        with (tmp_path / sheet.FILE).open("a") as file:
            file.write('{"part": "blo')
        assert f"Ceilings: a copy moves {rate / 1e9:,.0f} GB/s." in table.to_markdown(tmp_path)
    with pytest.raises(errors.DataError, match=r"has no figures.jsonl"):
        table.to_markdown(tmp_path / "elsewhere")


def row(block: str, ours: float, timm: float, **more: Any) -> dict[str, Any]:
    """A line of the part blocks: a map of 100 MB that is to be moved three times."""
    return {
        "part": "blocks", "name": block, "block": block, "size": [128, 256, 56, 56], "format": "channels_last",
        "dtype": "bfloat16", "seconds": {"ours": ours, "timm": timm, **more}, "floor_bytes": 3e8, "map_bytes": 1e8,
        "saved": {"ours": 1e8, "timm": 2e8},
    }  # fmt: skip


def test_the_verdict_by_hand() -> None:
    """3e8 bytes in 1e-4 s are 3 TB/s, of 3 TB/s all; 2.5 times timm's time meets its goal, 1.5 misses it."""
    good = [
        row("se", 1e-4, 2.5e-4), row("cbam", 2e-4, 3e-4, **{"timm compiled": 2.2e-4, "ours compiled": 1.9e-4}),
        {"part": "networks", "name": "n", "network": "resnet50 + SE", "dtype": "bfloat16",
         "over_bare": {"ours": {"median": 1.04}}},
        {"part": "engine", "name": "e", "busy": 0.5},
    ]  # fmt: skip
    said = list(table.verdict(good, 3e12))
    assert said[0].startswith("share of copy bandwidth of se, channel_attention")
    assert (
        "mean 71%, worst 50% (cbam 128×256×56×56 channels_last bfloat16): missed in 1 of 2 cases" in said[0]
    )
    assert said[1].endswith("not measured")
    assert "mean 1.94, worst 1.50" in said[2]
    assert "mean 1.16, worst 1.16" in said[3]
    assert said[3].endswith(": met")
    assert said[4].endswith("+4.0%, met")
    assert said[5].endswith("not measured")
    assert said[6].endswith("50%, missed")


def test_sizes_shrink_to_the_memory_that_is_there(tmp_path: Path) -> None:
    """Halved until sixteen maps fit, and batches of networks likewise."""
    case = Case("se", (128, 256, 56, 56), "NCHW", "float32", "cuda")
    assert blocks.fitting(case, 80 * 2**30).size[0] == 128
    assert blocks.fitting(case, 2**30).size[0] == 16
    assert networks.data_of(setting(tmp_path, rehearse=False, memory=80 * 2**30), "float32").batch == 128
    assert networks.data_of(setting(tmp_path, rehearse=False, memory=8 * 2**30), "float32").batch == 16


def test_every_task_has_a_name_of_its_own(tmp_path: Path) -> None:
    """A missing figure is told from one that is there, on a card and in a rehearsal."""
    for given in (setting(tmp_path), setting(tmp_path, device="cuda", rehearse=False, memory=80 * 2**30)):
        names = [(task.part, task.name) for task in course.ordered(given)]
        assert len(set(names)) == len(names)
        assert {part for part, _ in names} == set(course.PARTS)
    first = [t.part for t in course.ordered(given)[:6]]
    assert first[0] == "ceilings"
    assert "truth" in first


def test_ceilings_in_a_rehearsal(tmp_path: Path, capsys) -> None:
    """The command writes lines and prints the table; without a card or with wrong words it says so in a line."""
    argv = [
        "bench",
        "gpu",
        "--device",
        "cpu",
        "--rehearse",
        "--only",
        "ceilings",
        "--out",
        str(tmp_path / "g"),
    ]
    assert main(argv) == 0
    assert "Ceilings: a copy moves" in capsys.readouterr().out
    assert main(["bench", "gpu", "--table", str(tmp_path / "g"), "--json"]) == 0
    assert [f["name"] for f in json.loads(capsys.readouterr().out)["figures"]][:2] == ["machine", "copy"]
    assert [file.name for file in (tmp_path / "g").iterdir()] == [sheet.FILE]
    for wrong, said in (
        (
            ["--only", "celings", "--rehearse", "--device", "cpu"],
            "unknown part 'celings'; did you mean ceilings?",
        ),
        (["--rehearse"], "--rehearse and --device cpu go together"),
        (["--minutes", "0"], "is no number above 0"),
        *(
            []
            if torch.cuda.is_available()
            else [([], "no CUDA device is seen here; --device cpu --rehearse")]
        ),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["bench", "gpu", *wrong])
        assert stop.value.code == 2
        assert said in capsys.readouterr().err


def test_thresholds_from_figures(tmp_path: Path) -> None:
    """Times by size become the card's entry of the dispatch's data file, and lines of the table; a rehearsal's do not."""
    sizes = [
        {"elements": n, "plain": 2.0, "lean": lean, "kernels": 1.5} for n, lean in ((64, 3.0), (256, 1.0))
    ]
    for device in ("cpu, a rehearsal", "Card"):
        with sheet.Sheet(tmp_path) as made:
            about = {"device": device, "versions": {}, "python": "3", "minutes": 1, "tasks": []}
            made.write("about", "machine", about)
            figures = {"block": "cbam", "dtype": "bfloat16", "format": "NCHW", "sizes": sizes}
            made.write("blocks", "cbam crossover NCHW bfloat16", figures)
        assert (crossovers.write(tmp_path) is None) == (device != "Card")
    found = crossover._read(tmp_path / "crossover.json")
    assert found == {"Card": {"cbam bfloat16 NCHW": crossover.Thresholds(256, None)}}
    assert "| cbam | NCHW | bfloat16 | 256 | 256 | never |" in table.to_markdown(tmp_path)


def test_without_bf16_and_little_memory(tmp_path: Path) -> None:
    """A card without bf16 is measured in float32 alone; where little memory is free the maps are smaller, by name."""
    old = setting(tmp_path, device="cuda", rehearse=False, memory=2**29, bf16=False)
    names = [task.name for task in course.ordered(old, ["blocks"])]
    assert not any("bfloat16" in name for name in names)
    assert "se 8×256×56×56 channels_last float32" in names


def test_a_wrong_kernel_takes_no_part_in_the_thresholds(tmp_path: Path, monkeypatch) -> None:
    """Nor does one that fails: the plain and the lean form are timed without it, and the line says why."""

    def with_a_wrong_one(modules, skipped, x):
        real(modules, skipped, x)
        modules[block_speed.KERNELS] = torch.nn.Identity() if x.shape[0] == 1 else torch.nn.Bilinear(1, 1, 1)

    real = block_speed.take_forms
    monkeypatch.setattr(block_speed, "take_forms", with_a_wrong_one)
    found = crossovers._crossover("se", "float32", "NCHW", setting(tmp_path), 10)
    assert [set(row) for row in found["sizes"]] == [{"elements", "plain", "lean"}] * 2
    assert "TypeError" in found["skipped"][block_speed.KERNELS]
