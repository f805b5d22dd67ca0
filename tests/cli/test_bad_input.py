"""No verb shows a traceback, whatever it is given: each says in a paragraph what is wrong and what to do."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from attninject import plugins
from attninject.cli import VERBS, main, parser_of

MODEL = "timm/test_convnext"
SE = ["--block", "se", "--place", "block_end", "--set", "reduction=4"]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a trained run, its images, a delta, and a file of each bad kind."""
    root = tmp_path_factory.mktemp("good")
    for split in ("train", "val"):
        for c, name in enumerate("ab"):
            (root / "images" / split / name).mkdir(parents=True)
            for i in range(4):
                colour = (40 * i, 200 * c, 99)
                Image.new("RGB", (32, 32), colour).save(root / "images" / split / name / f"{i}.png")
    data = ["--data", str(root / "images"), "--size", "32", "--batch-size", "4", "--epochs", "1"]
    assert main(["finetune", "--model", MODEL, "--out", str(root / "run"), *data, *SE, "--json"]) == 0
    assert main(["inject", MODEL, *SE, "-o", str(root / "delta.safetensors"), "--json"]) == 0
    (root / "empty").mkdir()
    (root / "empty.yaml").write_text("")
    (root / "broken.yaml").write_text("name: [a, {b: \n\t- c: 'x\n")
    (root / "other.yaml").write_text("- 1\n- {a: b}\n")
    (root / "junk.yaml").write_bytes(bytes(range(256)) * 8)
    (root / "junk.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)))
    (root / "junk.safetensors").write_bytes(bytes(range(256)) * 64)
    (root / "junk.py").write_bytes(bytes(range(256)))
    (root / "raises.py").write_text("import math\n\nmath.sqrt(-1)\n")
    (root / "file").write_text("text\n")
    return root


@pytest.fixture
def work(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same in a folder to work in, where a bad word cannot reach the checkout."""
    shutil.copytree(good, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(plugins, "_loaded", [])
    monkeypatch.setenv(plugins.VARIABLE, "")
    return tmp_path


BAD = ("missing", "empty", "broken.yaml", "junk.safetensors", "\0", "hf-hub:no such/name")
"""What stands where a file, a folder or a name is wanted; it is never right there."""
MORE = ("empty.yaml", "other.yaml", "junk.yaml", "", "-", "é/\n", "file/below", "/dev/null", "local-dir:missing",
        "hf-hub:", "x" * 300)  # fmt: skip

IMAGE = "images/val/a/0.png"
COMMANDS = {
    "list": ["list ?", "list models --plugin ?", "list --plugin raises.py", "list --plugin junk.py"],
    "sites": ["sites ?", f"sites {MODEL} --weights ?", f"sites {MODEL} a.?"],
    "plan": ["plan ? se", f"plan {MODEL} ?", f"plan {MODEL} se --weights ?", f"plan {MODEL} se --root ?",
             f"plan {MODEL} --block ? --after stem", f"plan {MODEL} --block se --after ?"],
    "inject": ["inject ? se -o out", f"inject {MODEL} ? -o out", f"inject {MODEL} se -o ?/a/out",
               f"inject {MODEL} se -o empty"],
    "rank": [f"rank {MODEL} se --data ?", f"rank {MODEL} ? --data images --batch-size 2",
             f"rank {MODEL} se --data images -o ?/a/out"],
    "finetune": ["finetune ?", "finetune ? --out o", "finetune --model ? --out o --data images",
                 f"finetune --model {MODEL} --recipe ? --out o --data images",
                 f"finetune --model {MODEL} --out o --data ?", f"finetune --model {MODEL} --out file/a --data images",
                 f"finetune --model {MODEL} --out o --data images --weights ?", "finetune --resume --out ?"],
    "evaluate": ["evaluate ?", "evaluate run --data ?", "evaluate run --csv ?/a/out", "evaluate run --confusion empty"],
    "sweep": ["sweep ?", "sweep ? --plan"],
    "report": ["report ?", "report run ?"],
    "predict": ["predict ? images", "predict run ?", "predict run images --csv empty", "predict run junk.png"],
    "push": ["push ? local-dir:out", "push run ?", "push run local-dir:file"],
    "export": ["export ? --to state_dict", f"export ? --model {MODEL} --to state_dict",
               "export delta.safetensors --to state_dict --model ?", "export run --to state_dict -o ?/a/out"],
    "visualize": [f"visualize ? {IMAGE} -o out", "visualize run ? -o out", "visualize run junk.png -o out",
                  f"visualize run {IMAGE} -o file", f"visualize {MODEL} {IMAGE} --recipe ? -o out"],
    "demo": ["demo --epochs ?", "demo --seed ?"],
    "bench": ["bench ?", "bench inject --sites ?", "bench models --only ? --quick"],
    "doctor": ["doctor ?"],
    "zoo": ["zoo ?", "zoo --table ?", f"zoo {MODEL} --block ?", f"zoo {MODEL} --level ?"],
}  # fmt: skip
LINES = [line for lines in COMMANDS.values() for line in lines]


def said(capsys: pytest.CaptureFixture[str], line: str, bad: str = "", goes_on: bool = False) -> str:
    """What a command line says that is refused: one paragraph on standard error, exit code 1 or 2.

    `goes_on`: it may also do without what is bad, and says so.
    """
    argv = [word.replace("?", bad) for word in line.split()]
    try:
        code: Any = main(argv)
    except SystemExit as stop:
        code = stop.code
    shown = capsys.readouterr()
    if goes_on and code == 0:
        assert shown.out
        return ""
    assert code in (1, 2), (argv, code, shown.out)
    assert shown.err.startswith("attninject"), argv
    assert "Traceback" not in shown.err
    assert "\n\n" not in shown.err
    return shown.err


def test_every_verb_is_tried() -> None:
    """A new verb is tried with bad input too."""
    assert set(COMMANDS) == set(VERBS)


@pytest.mark.parametrize("line", LINES)
def test_what_is_no_file_folder_or_name(line: str, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each place where a command takes a file, a folder or a name refuses what is none in words."""
    for bad in BAD if "?" in line else [""]:
        said(capsys, line, bad)


@pytest.mark.slow
@pytest.mark.parametrize("line", [line for line in LINES if "?" in line])
def test_more_that_is_none(line: str, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same with names that are odd, empty or long."""
    right = {("--plugin", "empty.yaml"), ("push", "local-dir:missing"), ("report", ""), ("report", "-")}
    for bad in MORE:
        if not any(word in line and bad == value for word, value in right):
            said(capsys, line, bad)


OF_A_RUN = ["evaluate run", f"predict run {IMAGE}", "push run local-dir:out", "export run --to state_dict",
            f"visualize run {IMAGE} -o out", "report run", "finetune run/experiment.json --out run --resume"]  # fmt: skip
NEEDED = {
    "experiment.json": OF_A_RUN,
    "best.safetensors": OF_A_RUN[:1] + OF_A_RUN[1:2] + OF_A_RUN[3:5],
    "classes.txt": OF_A_RUN[:2] + OF_A_RUN[3:5],
    "log.csv": OF_A_RUN[5:6],
    "checkpoint.safetensors": OF_A_RUN[6:],
}
DAMAGE: dict[str, Callable[[Path], object]] = {
    "gone": lambda file: file.unlink(),
    "empty": lambda file: file.write_bytes(b""),
    "junk": lambda file: file.write_bytes(bytes(range(256)) * 4),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", NEEDED)
def test_a_damaged_run(name: str, damage: str, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run with a file that is gone, cut or overwritten is refused by every verb that reads it.

    `report` leaves such a run out, and what is resumed goes on from the checkpoint before.
    """
    DAMAGE[damage](work / "run" / name)
    for line in NEEDED[name]:
        said(capsys, line, goes_on=line.startswith("report") or name.startswith("checkpoint"))


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read and write everything"
)
@pytest.mark.parametrize(
    "line",
    [
        "predict run images",
        "report run",
        f"visualize run {IMAGE} -o shut/out",
        f"inject {MODEL} se -o shut/out",
        f"finetune --model {MODEL} --out shut/o",
    ],
)
def test_without_permission(line: str, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What may not be read or written is said like what is not there."""
    for file in [*(work / "run").iterdir(), *(work / "images").rglob("*.png")]:
        file.chmod(0)
    (work / "shut").mkdir(mode=0o500)
    said(capsys, line)


TABLES = ["list blocks", f"sites {MODEL} stem", f"plan {MODEL} {' '.join(SE)}", "evaluate run", "report run",
          f"predict run {IMAGE}", "export run --to state_dict", "push run local-dir:out", "doctor",
          f"rank {MODEL} {' '.join(SE)} --data images --batch-size 2 --images 8"]  # fmt: skip


@pytest.mark.parametrize("line", TABLES)
def test_every_table_is_json_too(line: str, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With `--json`, standard output is one JSON text and nothing else."""
    assert main([*line.split(), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)


def test_every_verb_has_json() -> None:
    """`--json` and `--help` are flags of every verb, and `--plugin` of all that may meet a block of one's own."""
    for name in VERBS:
        flags = {option for action in parser_of(name)._actions for option in action.option_strings}
        assert {"--json", "--help"} <= flags
        assert ("--plugin" in flags) is (name not in ("demo", "bench", "doctor"))
