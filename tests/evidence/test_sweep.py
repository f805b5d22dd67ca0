"""Sweeps: what a file becomes, what is run and what not, and that interruptions change nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from sweeps import Here, pictures, quiet, settings

import attninject as ai
from attninject.blocks import registry
from attninject.blocks.controls import BOTTLENECK, hidden_for
from attninject.cli import main
from attninject.errors import ExperimentError, RunError
from attninject.evidence import sweep_engines
from attninject.evidence.sweep import Swept, carry_out, standing
from attninject.evidence.sweep_design import Arm, Design, _refuse_twins, design, keep, read
from attninject.evidence.sweep_engines import Event, Local, Slurm
from attninject.evidence.sweep_file import read_sweep
from attninject.training import runs


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def swept(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Swept:
    """Two arms × two seeds, carried out in this process."""
    made = design(read_sweep(settings(root, tmp_path_factory.mktemp("sweep"))))
    return carry_out(made, Here(), "attninject sweep FILE", quiet)


def accuracies(done: Swept) -> dict[tuple[str, int], float | None]:
    return {key: found.top1 for key, found in done.outcomes.items()}


# --- what a file becomes -----------------------------------------------------------------------


def test_grid_and_controls_become_arms(root: Path, tmp_path: Path) -> None:
    """Plain once per setting that is not of blocks; each recipe with a bottleneck and random sites of its own size."""
    grid = {"recipe": [{"block": "se", "place": "stage_end"}], "freeze": [None, "backbone"]}
    asked = settings(root, tmp_path, grid=grid, controls={"bottleneck": True, "random_sites": 1})
    del asked["recipe"]
    made = design(read_sweep(asked))
    names = [arm.name for arm in made.arms]
    assert [n for n in names if n.startswith("plain")] == ["plain freeze=None", "plain freeze=backbone"]
    assert len(names) == 2 + 2 * 3
    arms = {arm.name: arm for arm in made.arms}
    arm = arms["se at stage_end freeze=backbone"]
    assert arm.plain == "plain freeze=backbone"
    bottleneck, elsewhere = (arms[f"{kind} of {arm.name}"] for kind in ("bottleneck", "random sites 1"))
    assert bottleneck.sites == arm.sites
    assert bottleneck.parameters == arm.parameters
    assert elsewhere.parameters == arm.parameters
    assert set(elsewhere.sites).isdisjoint(arm.sites)
    assert [run.folder.name for run in made.runs()][:2] == ["seed-0", "seed-0"]
    assert len({run.folder for run in made.runs()}) == len(names) * 2
    assert Design.of(json.loads(json.dumps(made.to_dict())), made.out).to_dict() == made.to_dict()


def test_bottleneck_is_the_identity_at_first_and_in_no_list() -> None:
    """The control computes x until it learns, has 2Ch + h + C parameters, and is found by name alone."""
    block = registry.create_block(BOTTLENECK, 32, hidden=3)
    assert registry.is_identity(block, 32)
    assert sum(p.numel() for p in block.parameters()) == 2 * 32 * 3 + 3 + 32
    assert hidden_for(2 * 32 * 3 + 3 + 32, 32) == 3
    assert hidden_for(1, 32) == 1
    assert BOTTLENECK not in ai.list_blocks()
    assert ai.attention_maps(ai.inject(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3)), block=BOTTLENECK, after="0"),
                             torch.zeros(1, 3, 8, 8)) == {"0.bottleneck": {}}  # fmt: skip


def test_faults_have_their_place(tmp_path: Path) -> None:
    """Wrong keys of the grid, budgets in it, and a seed in `train` are said with line and column, all at once."""
    file = tmp_path / "sweep.yaml"
    file.write_text(
        "model: timm/resnet10t\nout: x\nseeds: [0, 0]\ntrain: {seed: 3}\n"
        "grid:\n  recipe: [se, sse]\n  attn_rl: [1]\n  epochs: [1, 2]\n  lr: 0.1\ncontrols: {plain: true}\n",
        encoding="utf-8",
    )
    with pytest.raises(ExperimentError) as caught:
        read_sweep(file)
    said = {(f.line, f.column): f.message for f in caught.value.faults}
    assert "the same seed twice" in said[3, 8]
    assert "`seeds:`" in said[4, 15]
    assert "no shipped recipe 'sse'" in said[6, 16]
    assert "unknown key of the grid 'attn_rl'; did you mean attn_lr" in said[7, 3]
    assert "same in every arm" in said[8, 3]
    assert "a list of values" in said[9, 7]
    assert "unknown key 'plain'" in said[10, 12]
    with pytest.raises(ExperimentError, match=r"no arm has a recipe"):
        read_sweep({"model": "timm/resnet10t", "out": "x", "seeds": 1})
    with pytest.raises(ExperimentError, match=r"`seeds` missing"):
        read_sweep({"model": "timm/resnet10t", "out": "x", "recipe": "se"})


# --- what is run -------------------------------------------------------------------------------


def test_arms_share_all_but_the_blocks(swept: Swept) -> None:
    """Before training, an arm's accuracy and loss are those of plain fine-tuning with the same seed; seeds differ."""
    first = {key: found.rows[0]["val_loss"] for key, found in swept.outcomes.items()}
    assert first["plain", 0] == first["se", 0]
    assert first["plain", 1] == first["se", 1]
    assert first["plain", 0] != first["plain", 1]
    assert swept.finished
    assert swept.outcomes["se", 0].rows[-1]["val_loss"] != swept.outcomes["plain", 0].rows[-1]["val_loss"]


def test_finished_runs_are_never_run_again_and_seeds_may_be_added(root: Path, swept: Swept) -> None:
    """A second call runs nothing; a third seed adds two runs; a seed or an arm taken out is refused."""
    out = swept.design.out
    idle, more = Here(), Here()
    carry_out(swept.design, idle, "", quiet)
    assert idle.begun == 0
    grown = design(read_sweep(settings(root, out, seeds=[0, 1, 5])))
    done = carry_out(grown, more, "", quiet)
    assert more.begun == 2
    assert {k: v for k, v in accuracies(done).items() if k[1] != 5} == accuracies(swept)
    assert read(out).seeds == (0, 1, 5)
    with pytest.raises(RunError, match=r"the seeds \[5\] .* are gone"):
        keep(swept.design, "")
    with pytest.raises(RunError, match=r"the arm 'se' .* is gone from the file"):
        keep(design(read_sweep(settings(root, out, seeds=[0, 1, 5], recipe="cbam"))), "")
    longer = settings(root, out, seeds=[0, 1, 5], train={"epochs": 3})
    with pytest.raises(RunError, match=r"other settings \(train: .*'epochs': 2.*'epochs': 3"):
        keep(design(read_sweep(longer)), "")


STUB = """\
#!/bin/bash
# a worker in a few lines: answers every run, but kills itself at the first so many
while read -r asked; do
  if [ "$(cat {folder}/deaths)" -gt 0 ]; then
    echo $(($(cat {folder}/deaths) - 1)) > {folder}/deaths
    echo '{{"said": "epoch 1/2: "}}'
    kill -9 $$
  fi
  echo '{{"done": true}}'
done
"""


@pytest.mark.parametrize(
    ("deaths", "kinds"), [(1, ["died", "done", "done"]), (4, ["died"] * 3 + ["failed", "done"])]
)
def test_a_worker_that_dies_is_replaced(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deaths: int, kinds: list[str]
) -> None:
    """Another takes the run up again, three times at most, and the next run is carried out all the same."""
    stub = tmp_path / "worker"
    stub.write_text(STUB.format(folder=tmp_path), encoding="utf-8")
    stub.chmod(0o755)
    (tmp_path / "deaths").write_text(str(deaths), encoding="utf-8")
    monkeypatch.setattr(sweep_engines.sys, "executable", str(stub))
    events: list[Event] = []
    two = list(design(read_sweep(settings(root, tmp_path / "a", seeds=1))).runs())
    Local(tmp_path).carry_out(two, events.append)
    assert [event.kind for event in events if event.kind != "said"] == kinds
    assert "its worker has died (signal 9): taken up again" in events[1].text
    assert [event.run.arm.name for event in events if event.kind in ("done", "failed")] == ["plain", "se"]


@pytest.mark.slow
def test_killed_workers_and_interruption_change_nothing(root: Path, swept: Swept, tmp_path: Path) -> None:
    """Interrupted, then gone on with in a process that is killed within a run: the table is the same."""
    made = design(read_sweep(settings(root, tmp_path / "a", seeds=1)))
    with pytest.raises(KeyboardInterrupt):
        carry_out(made, Here(stop=1), "", quiet)
    assert [o.status for o in standing(made).outcomes.values()].count("finished") == 1
    killed: list[str] = []

    class Killed(Local):
        def carry_out(self, waiting: Any, tell: Any) -> None:
            def kill_once(event: Event) -> None:
                if event.kind == "said" and event.text.startswith("epoch 1/2: ") and not killed:
                    killed.append(event.run.arm.name)
                    os.kill(next(h.process.pid for h in hands if h.process), signal.SIGKILL)
                tell(event)

            super().carry_out(waiting, kill_once)

    hands: list[sweep_engines._Hand] = []
    start = sweep_engines._Hand.start
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep_engines._Hand, "start", lambda self: (hands.append(self), start(self)))
        lines: list[str] = []
        done = carry_out(made, Killed(tmp_path / "a"), "", lines.append)
    assert killed
    assert any("its worker has died (signal 9): taken up again" in line for line in lines)
    before = {key: value for key, value in accuracies(swept).items() if key[1] == 0}
    assert accuracies(done) == before
    assert [o.rows[-1]["val_loss"] for o in done.outcomes.values()] == [
        swept.outcomes[key].rows[-1]["val_loss"] for key in done.outcomes
    ]


def test_damaged_folders_are_named_and_left_out(root: Path, swept: Swept, tmp_path: Path) -> None:
    """A log that says otherwise than its checkpoint, and settings of another run: damaged, never run over."""
    import shutil

    made = design(read_sweep(settings(root, tmp_path / "a")))
    for run, whole in zip(made.runs(), swept.design.runs(), strict=False):
        shutil.copytree(whole.folder, run.folder)
    first, second, third, _ = (run.folder for run in made.runs())
    log = (first / runs.LOG).read_text(encoding="utf-8").splitlines()
    cells = log[-1].split(",")
    cells[log[0].split(",").index("top1")] = "0.99"
    (first / runs.LOG).write_text("\n".join([*log[:-1], ",".join(cells)]) + "\n", encoding="utf-8")
    other = json.loads((second / runs.SETTINGS).read_text(encoding="utf-8"))
    other["train"]["lr"] = 5.0
    (second / runs.SETTINGS).write_text(json.dumps(other), encoding="utf-8")
    (third / runs.CHECKPOINT).write_bytes(b"torn")
    idle = Here()
    done = carry_out(made, idle, "", quiet)
    assert idle.begun == 0
    assert [o.status for o in done.outcomes.values()] == ["damaged", "damaged", "damaged", "finished"]
    text = str(done)
    assert "plain, seed 0: damaged, left out: log.csv says otherwise than the checkpoint of epoch 2" in text
    assert "se, seed 0: damaged, left out: its settings are not the design's (lr)" in text
    assert "plain, seed 1: damaged, left out:" in text


def test_script_for_slurm_resumes_what_was_begun(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bash takes the script; a task calls `finetune` on its own run, and with --resume where there is a checkpoint."""
    echo = tmp_path / "python"
    echo.write_text('#!/bin/bash\necho "$@"\n', encoding="utf-8")
    echo.chmod(0o755)
    monkeypatch.setattr(sweep_engines.sys, "executable", str(echo))
    made = design(read_sweep(settings(root, tmp_path / "with a space", seeds=1)))
    waiting = list(made.runs())
    Slurm(made.out, workers=2).carry_out(waiting, quiet)
    (waiting[1].folder / runs.PREVIOUS).touch()
    script = str(made.out / "sweep.sbatch")
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    assert "#SBATCH --array=1-2%2" in Path(script).read_text(encoding="utf-8")
    for number, (run, more) in enumerate(zip(waiting, ("", " --resume"), strict=True), 1):
        env = {**os.environ, "SLURM_ARRAY_TASK_ID": str(number)}
        done = subprocess.run(["bash", script], env=env, capture_output=True, text=True, check=True)
        folder = run.folder.resolve()
        assert done.stdout.strip() == f"-m attninject finetune {folder}/{runs.SETTINGS} --out {folder}{more}"


SBATCH = """\
#!/bin/bash
# stands for Slurm's: reads the array from the script, and runs its tasks one after the other
last=$(sed -n 's/^#SBATCH --array=1-\\([0-9]*\\)%.*/\\1/p' "$1")
for task in $(seq 1 "$last"); do SLURM_ARRAY_TASK_ID=$task bash "$1" || exit 1; done
"""


@pytest.mark.slow
def test_script_for_slurm_carries_runs_out(root: Path, swept: Swept, tmp_path: Path) -> None:
    """Under a stand-in for `sbatch` the array's tasks leave the same figures; then nothing is waiting."""
    made = design(read_sweep(settings(root, tmp_path / "a", seeds=1)))
    done = carry_out(made, Slurm(tmp_path / "a", workers=2), "", quiet)
    assert [o.status for o in done.outcomes.values()] == ["waiting"] * 2
    sbatch = tmp_path / "sbatch"
    sbatch.write_text(SBATCH, encoding="utf-8")
    sbatch.chmod(0o755)
    env = {**os.environ, **sweep_engines.environment(1)}
    ended = subprocess.run([sbatch, made.out / "sweep.sbatch"], env=env, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    found = accuracies(standing(made))
    assert found == {key: value for key, value in accuracies(swept).items() if key[1] == 0}


# --- the commands ------------------------------------------------------------------------------


def test_commands_show_and_report(
    root: Path, swept: Swept, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`sweep --plan` runs nothing; `sweep` of what is finished shows the table; `report` writes three files."""
    file = tmp_path / "sweep.yaml"
    file.write_text(json.dumps(settings(root, swept.design.out, seeds=list(read(swept.design.out).seeds))))
    assert main(["sweep", str(file), "--out", str(tmp_path / "new"), "--plan"]) == 0
    assert capsys.readouterr().out.count("waiting") >= 4
    assert not (tmp_path / "new").exists()
    assert main(["sweep", str(file), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["finished"]
    assert {row["arm"] for row in said["runs"]} == {"plain", "se"}
    assert main(["report", str(swept.design.out), "-o", str(tmp_path / "report")]) == 0
    out = capsys.readouterr().out
    assert out.startswith(("Nothing", "Gain", "Loss"))
    assert sorted(p.name for p in (tmp_path / "report").iterdir()) == [
        "report.csv",
        "report.html",
        "report.md",
        "report_classes.csv",
    ]
    assert "movement" in (tmp_path / "report" / "report.md").read_text(encoding="utf-8").lower()
    assert main(["report", str(tmp_path / "nothing")]) == 1
    assert "holds no sweep" in capsys.readouterr().err


# --- the slow tier -----------------------------------------------------------------------------

WIDE = {"seeds": 3, "recipe": None, "grid": {"recipe": ["se", "cbam"]}}


@pytest.fixture(scope="module")
def wide(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Swept:
    """Three arms × three seeds under two workers."""
    made = design(read_sweep(settings(root, tmp_path_factory.mktemp("wide"), **WIDE)))
    return carry_out(made, Local(made.out, workers=2), "attninject sweep FILE --workers 2", quiet)


@pytest.mark.slow
def test_two_workers_find_what_one_finds(root: Path, wide: Swept, tmp_path: Path) -> None:
    """Three arms × three seeds: the table of two workers is that of one process."""
    alone = carry_out(design(read_sweep(settings(root, tmp_path, **WIDE))), Here(), "", quiet)
    assert wide.finished
    assert wide.lines() == alone.lines()


@pytest.mark.slow
def test_ray_finds_the_same(root: Path, wide: Swept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under Ray, two tasks at a time, of which one is killed: the table is the same."""
    pytest.importorskip("ray")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    made = design(read_sweep(settings(root, tmp_path, **WIDE)))
    killed: list[int] = []

    def kill_one(event: Event) -> None:
        for lock in made.out.rglob(".lock"):
            pid = lock.read_text(encoding="utf-8").strip()
            busy = not (lock.parent / runs.LAST).exists()
            if pid and busy and not killed and Path(f"/proc/{pid}").exists():
                killed.append(int(pid))
                os.kill(int(pid), signal.SIGKILL)

    class Watched(sweep_engines.Ray):
        def carry_out(self, waiting: Any, tell: Any) -> None:
            super().carry_out(waiting, lambda event: (kill_one(event), tell(event)))

    done = carry_out(made, Watched(workers=2), "", quiet)
    assert done.failed == {}
    assert done.lines() == wide.lines()


@pytest.mark.slow
def test_a_cluster_that_is_not_there(monkeypatch: pytest.MonkeyPatch, swept: Swept) -> None:
    """The message names the address and what to do instead."""
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(RunError, match=r"RAY_ADDRESS=127.0.0.1:1 cannot be reached .*--engine local"):
        sweep_engines.Ray().carry_out(list(swept.design.runs()), lambda event: None)


@pytest.mark.parametrize(
    ("name", "folder"),
    [("se at stage_end lr=0.01", "se_at_stage_end_lr=0.01"), ("..", "_"), ("a/b: c.", "a_b_c"), ("aux", "_aux"),
     ("Con.se", "_Con.se"), ("connect", "connect")],
)  # fmt: skip
def test_an_arm_has_a_folder_on_every_system(name: str, folder: str) -> None:
    """Letters, digits and a few signs; no device of Windows, no dots alone, and never too long."""
    assert Arm(name, "plain", {}).slug == folder
    long = {Arm(f"{'layer' * 60} {n}", "plain", {}).slug for n in range(2)}
    assert len(long) == 2
    assert max(map(len, long)) < 100


def test_arms_that_differ_in_case_alone_are_refused() -> None:
    """They would share a folder where the system knows no case."""
    with pytest.raises(ExperimentError, match="two arms are called 'SE'"):
        _refuse_twins([Arm("SE", "attention", {}), Arm("se", "attention", {})])
