"""Stopping and going on: killed, interrupted, torn, foreign, full disks, two runs in one folder."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import DATA, QUICK, Shades, hears, net
from torch import nn

import attninject as ai
from attninject import errors
from attninject.training import devices, factories, finetune, resuming, runs
from attninject.training.data import loaders
from attninject.training.data.datasets import Images
from attninject.training.experiment import settings
from attninject.training.job import Job
from attninject.training.log_columns import renamed
from attninject.training.loop import Run
from attninject.training.reporting import Reporter
from attninject.training.run_files import RunFiles

HERE = Path(__file__).parent
LONG: dict[str, Any] = {
    **QUICK, "epochs": 4, "batch_size": 4, "save_every": 5, "mixup": 0.3, "ema": 0.9, "warmup_epochs": 1,
    "freeze": "backbone", "unfreeze": [{"epoch": 2, "what": "units.1"}, {"epoch": 3, "what": "units.0"}],
}  # fmt: skip


class Stops(Shades):
    """Images of which the n-th read fails, as when a process is killed there."""

    def __init__(self, count: int, after: int) -> None:
        super().__init__(count)
        self.left = after

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return super().__getitem__(index)


def same(a: nn.Module, b: nn.Module) -> bool:
    """Whether two models hold the same bits."""
    first, second = a.state_dict(), b.state_dict()
    return set(first) == set(second) and all(torch.equal(first[k], second[k]) for k in first)


@pytest.fixture(scope="module")
def whole() -> Any:
    """An uninterrupted run: (model, result)."""
    model = net("cbam")
    return model, finetune(model, DATA, **LONG)


@pytest.mark.parametrize("reads", [30, 61, 100, 142])
def test_a_resumed_run_ends_with_the_same_bits(reads: int, whole: Any, tmp_path: Path) -> None:
    """Cut off within an epoch and resumed: weights, average, log and rates equal those of a run in one go."""
    with pytest.raises(KeyboardInterrupt):
        finetune(net("cbam"), (Stops(48, reads), DATA[1]), **LONG, out=tmp_path / "a")
    model = net("cbam")
    result = finetune(model, DATA, **LONG, out=tmp_path / "a", resume=True)
    assert same(model, whole[0])
    assert same(result.model, whole[1].model)
    timeless = [
        [{k: v for k, v in row.items() if k != "seconds"} for row in r.history] for r in (result, whole[1])
    ]
    assert timeless[0] == timeless[1]


@pytest.mark.parametrize("optimizer", ["sgd", "lamb", "adan", "lookahead_adamw"])
def test_every_optimizers_state_comes_back(optimizer: str, tmp_path: Path) -> None:
    """Momenta, step counts in tensors and in groups: the resumed run ends with the same bits."""
    settings = {**QUICK, "optimizer": optimizer, "precision": "fp16", "save_every": 4}
    straight, model = net(), net()
    finetune(straight, DATA, **settings)
    with pytest.raises(KeyboardInterrupt):
        finetune(net(), (Stops(48, 70), DATA[1]), **settings, out=tmp_path / "a")
    finetune(model, DATA, **settings, out=tmp_path / "a", resume=True)
    assert same(model, straight)


def test_a_state_that_no_checkpoint_holds_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An optimizer that keeps lists, as timm's kron: refused at the checkpoint, not found out when resuming."""

    class Listing(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                for p in group["params"]:
                    self.state[p]["Q"] = [p.detach()]
            return super().step(closure)

    monkeypatch.setattr(factories, "make_optimizer", lambda model, train: Listing(ai.param_groups(model)))
    with pytest.raises(errors.RunError, match=r"keeps a list \(Q\), .*take another optimizer"):
        finetune(net(), DATA, **QUICK, save_every=1, out=tmp_path / "a")


def test_accumulation_average_and_precision_come_back(tmp_path: Path) -> None:
    """Cut off between two forwards of a step, with EMA, bfloat16, CutMix and clipping: the same bits."""
    settings = {**QUICK, "batch_size": 4, "accumulate": 3, "ema": 0.8, "precision": "bf16", "cutmix": 1.0,
                "clip": 0.5, "save_every": 1, "channels_last": True}  # fmt: skip
    straight, model = net(), net()
    expected = finetune(straight, DATA, **settings)
    with pytest.raises(KeyboardInterrupt):
        finetune(net(), (Stops(48, 78), DATA[1]), **settings, out=tmp_path / "a")
    assert runs.read_meta(tmp_path / "a" / runs.CHECKPOINT)["batch"] == 2
    found = finetune(model, DATA, **settings, out=tmp_path / "a", resume=True)
    assert same(model, straight)
    assert same(found.model, expected.model)


def test_loader_processes_change_no_bit(tmp_path: Path) -> None:
    """With loader processes, cut off in the second epoch and resumed from the first one's end: the same bits."""

    class Fails(Shades):
        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            if index == 11 and (tmp_path / "fails").exists():
                raise OSError("gone")
            return super().__getitem__(index)

    def end_of_first(text: str) -> None:
        if text.startswith("epoch 1/2: train loss"):
            (tmp_path / "fails").touch()

    images = Fails(48), DATA[1]
    straight, model = net(), net()
    finetune(straight, DATA, **QUICK)
    with pytest.raises(errors.DataError, match="image 11 of Fails cannot be read"):
        finetune(net(), images, **QUICK, **hears(end_of_first), workers=2, out=tmp_path / "a")
    (tmp_path / "fails").unlink()
    result = finetune(model, images, **QUICK, workers=1, out=tmp_path / "a", resume=True)
    assert [row["epoch"] for row in result.history] == [0, 1, 2]
    assert same(model, straight)


SCRIPT = """
import sys
sys.path[:0] = {here!r}, {tests!r}
from tiny import DATA, net
from attninject.training import finetune
often = {{"save_every": 1, "log_every": 1}}
finetune(net(), DATA, out={out!r}, epochs=500, batch_size=4, resume={resume}, **often)
"""


def test_sigkill_loses_no_more_than_the_time_since_the_last_checkpoint(tmp_path: Path) -> None:
    """Killed while writing at every step, three times: the checkpoint is whole, the run gets further."""
    out, steps = tmp_path / "a", []
    for attempt in range(3):
        text = SCRIPT.format(here=str(HERE), tests=str(HERE.parent), out=str(out), resume=attempt > 0)
        path = os.pathsep.join(filter(None, (str(HERE.parents[1]), os.environ.get("PYTHONPATH"))))
        process = subprocess.Popen(
            [sys.executable, "-c", text],
            env={**os.environ, "PYTHONPATH": path},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        told = [
            line for line, _ in zip(iter(process.stdout.readline, ""), range(12 + 5 * attempt), strict=False)
        ]
        time.sleep(0.003 * attempt)
        process.send_signal(signal.SIGKILL)
        process.stdout.close()
        process.wait()
        assert any("loss" in line for line in told), told
        _, meta = runs.Folder(out).load()
        steps.append(meta["step"])
    assert steps == sorted(set(steps))
    assert steps[0] >= 5


def test_ctrl_c_saves_first(tmp_path: Path) -> None:
    """SIGINT ends the run after its step, with a checkpoint of that step; resuming goes on from there."""

    class Impatient(Shades):
        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            if index == 40:
                os.kill(os.getpid(), signal.SIGINT)
            return super().__getitem__(index)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(
        errors.RunError, match=r"interrupted by SIGINT at step \d+; the last good checkpoint is"
    ):
        finetune(net(), (Impatient(48), DATA[1]), **QUICK, out=tmp_path / "a")
    assert signal.getsignal(signal.SIGINT) is before
    step = runs.read_meta(tmp_path / "a" / runs.CHECKPOINT)["step"]
    assert step > 0
    assert finetune(net(), DATA, **QUICK, out=tmp_path / "a", resume=True).history[-1]["step"] == 12


# --- bad checkpoints ----------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a finished short run."""
    finetune(net(), DATA, **QUICK, out=tmp_path / "a")
    return tmp_path / "a"


def resume(run: Path, **kw: Any) -> Any:
    """Go on with it, with changes."""
    data = kw.pop("data", DATA)
    model = kw.pop("model", None) or net()
    return finetune(model, data, **{**QUICK, "epochs": 3, **kw}, out=run, resume=True)


@pytest.mark.parametrize("harm", ["truncated", "one bit", "one digit", "foreign", "empty"])
def test_a_bad_checkpoint_is_refused_and_the_good_one_offered(run: Path, harm: str) -> None:
    """Named, with the other checkpoint's epoch; neither file is touched; taking the other goes on."""
    file = run / runs.CHECKPOINT
    content = bytearray(file.read_bytes())
    if harm == "one bit":
        content[-3] ^= 1
    elif harm == "one digit":
        content = content.replace(rb"\"step\": 12,", rb"\"step\": 13,", 1)
    elif harm == "foreign":
        save_file({"a": torch.zeros(2)}, file)
        content = bytearray(file.read_bytes())
    file.write_bytes({"truncated": content[: len(content) // 2], "empty": b""}.get(harm, content))
    before = {p.name: p.read_bytes() for p in run.iterdir()}
    with pytest.raises(
        errors.CheckpointError, match=rf"{file.name} is (damaged|no check).*is good \(epoch 1"
    ):
        resume(run)
    assert {p.name: p.read_bytes() for p in run.iterdir()} | {".lock": b""} == before | {".lock": b""}
    os.replace(run / runs.PREVIOUS, file)
    assert resume(run).history[-1]["epoch"] == 3


def test_a_checkpoint_runs_no_code(run: Path) -> None:
    """A pickle in its place is refused without being opened."""

    class Trap:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(run / "trapped"),)

    torch.save(Trap(), run / runs.CHECKPOINT)
    with pytest.raises(errors.CheckpointError):
        resume(run)
    assert not (run / "trapped").exists()


def test_another_model_other_classes_or_settings_are_refused(run: Path) -> None:
    """What differs is named; the checkpoint stays."""

    class More(Shades):
        classes = ("red", "green", "violet")

    before = (run / runs.CHECKPOINT).read_bytes()
    with pytest.raises(errors.DataError, match="gone: blue; new: violet; bring them back"):
        resume(run, data=(More(48), More(18)))
    with pytest.raises(
        errors.RunError, match=r"other settings \(lr: 0\.01 then, 0\.5 now; ema: None then, 0\.9 now\)"
    ):
        resume(run, lr=0.5, ema=0.9)
    with pytest.raises(errors.CheckpointError, match=r"of another model: .* tensors differ"):
        resume(run, model=net("cbam"))
    assert (run / runs.CHECKPOINT).read_bytes() == before


def test_rates_follow_the_epoch_whatever_its_steps(tmp_path: Path) -> None:
    """Resumed with half the images, as on twice the processes: the schedule still ends when the run does."""
    longer = {**QUICK, "epochs": 3}
    finetune(net(), DATA, **{**QUICK, "epochs": 1}, out=tmp_path / "a")
    found = finetune(net(), (Shades(24), DATA[1]), **longer, out=tmp_path / "a", resume=True)
    rates = [[row["lr.blocks"] for row in r.history[2:]] for r in (found, finetune(net(), DATA, **longer))]
    assert rates[0] == rates[1] == [pytest.approx(0.025), 0.0]


def test_within_an_epoch_the_images_must_be_those_of_then(tmp_path: Path) -> None:
    """Of other images nobody knows which are left: refused, with both counts."""
    often = {**QUICK, "save_every": 1, "out": tmp_path / "a"}
    with pytest.raises(KeyboardInterrupt):
        finetune(net(), (Stops(48, 60), DATA[1]), **often)
    with pytest.raises(errors.DataError, match="an epoch of 48 training images; there are 24 now"):
        finetune(net(), (Shades(24), DATA[1]), **often, resume=True)


def test_accelerates_precision_must_be_that_of_then(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Begun without `accelerate launch` and gone on with under its config: refused, as with the setting."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(errors.RunError, match="mixed_precision: 'no' then, 'bf16' now"):
        resume(run)


def test_a_run_is_not_overwritten(run: Path, tmp_path: Path) -> None:
    """A folder with a run in it is only gone on with; a folder without one cannot be."""
    before = {p.name: p.read_bytes() for p in run.iterdir() if p.name != ".lock"}
    with pytest.raises(errors.RunError, match=r"holds a run already .*go on with it"):
        finetune(net(), DATA, **QUICK, out=run)
    assert {p.name: p.read_bytes() for p in run.iterdir() if p.name != ".lock"} == before
    with pytest.raises(errors.RunError, match="nothing to resume"):
        finetune(net(), DATA, **QUICK, out=tmp_path / "b", resume=True)
    for name in (runs.CHECKPOINT, runs.PREVIOUS):
        (run / name).unlink()
    with pytest.raises(errors.RunError, match=rf"holds a run already \({runs.LAST}\): take another `out`"):
        finetune(net(), DATA, **QUICK, out=run)


def test_what_a_killed_run_left_half_written_goes(run: Path) -> None:
    """Going on clears away temporary files, each as large as a checkpoint."""
    (run / f".{runs.CHECKPOINT}.99.tmp").touch()
    resume(run)
    assert not list(run.glob(".*.tmp"))


def test_two_runs_in_one_folder(tmp_path: Path) -> None:
    """The second is refused while the first is at work, whoever holds it; afterwards it may go on."""
    first = runs.Folder(tmp_path / "a")
    first.begin(resume=False)
    with pytest.raises(errors.RunError, match=rf"another run is at work in .* \(process {os.getpid()}\)"):
        finetune(net(), DATA, **QUICK, out=tmp_path / "a")
    first.end()
    finetune(net(), DATA, **QUICK, out=tmp_path / "a")


def test_loader_processes_of_a_killed_run_hold_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loader process closes its copy of the lock and leaves the run's; with the run's gone the folder is free.

    Ctrl-C, which a terminal sends to it too, is not its to hear.
    """
    heard: dict[int, Any] = {}
    monkeypatch.setattr(signal, "signal", heard.__setitem__)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    first, second = runs.Folder(tmp_path), runs.Folder(tmp_path)
    first.begin(resume=False)
    assert first._lock is not None
    of_the_run = os.dup(first._lock.fileno())  # as after a fork, two hold one lock
    loaders._quiet_worker(0)
    assert heard == {signal.SIGINT: signal.SIG_IGN}
    with pytest.raises(errors.RunError, match="another run is at work"):
        second.begin(resume=False)
    os.close(of_the_run)
    second.begin(resume=False)
    second.end()


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No space left: an error with the last good checkpoint, which is still whole; no litter."""
    real = os.fsync

    def full(descriptor: int) -> None:
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        if runs.CHECKPOINT in name and (tmp_path / "a" / runs.PREVIOUS).exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(errors.RunError, match=r"No space left on device.*last good checkpoint is .*epoch 1"):
        finetune(net(), DATA, **QUICK, out=tmp_path / "a")
    assert not list((tmp_path / "a").glob("*.tmp")) + list((tmp_path / "a").glob(".*.tmp"))
    monkeypatch.undo()
    assert resume(tmp_path / "a", epochs=2).history[-1]["epoch"] == 2


def test_a_disk_that_takes_no_more(run: Path) -> None:
    """Real writes that fail at a size limit, of the delta and of the checkpoint: named; the old files stay."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    delta_size, checkpoint = (run / runs.BEST).stat().st_size, (run / runs.CHECKPOINT).read_bytes()
    for limit, name in ((delta_size - 100, runs.LAST), (len(checkpoint) - 100, runs.CHECKPOINT)):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
        try:
            with pytest.raises(
                errors.RunError, match=rf"a/{name} cannot be written.*last good checkpoint is"
            ):
                resume(run, epochs=4)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert (run / runs.CHECKPOINT).read_bytes() == checkpoint
        assert not list(run.glob(".*.tmp"))
    assert resume(run, epochs=4).history[-1]["epoch"] == 4


def test_an_output_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read-only place, with and without a folder there: said before training."""
    real = Path.open

    def refused(path: Path, *args: Any, **kw: Any) -> Any:
        if path.name == ".lock":
            raise OSError(errno.EROFS, "Read-only file system")
        return real(path, *args, **kw)

    with pytest.raises(errors.RunError, match=r"/proc/attninject cannot be written: .*choose another `out`"):
        finetune(net(), DATA, **QUICK, out="/proc/attninject")  # where nobody makes a folder, not even root
    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(errors.RunError, match="cannot be written: Read-only file system; choose another"):
        finetune(net(), DATA, **QUICK, out=tmp_path)


def test_an_output_that_cannot_be_made(tmp_path: Path) -> None:
    """A file where the folder should be: said before training."""
    (tmp_path / "a").write_text("")
    with pytest.raises(errors.RunError, match="a cannot be written"):
        finetune(net(), DATA, **QUICK, out=tmp_path / "a")


def test_checkpoints_are_plain_data(run: Path) -> None:
    """Tensors and JSON, with the entries that they have always had: any program reads them."""
    tensors = load_file(run / runs.CHECKPOINT)
    assert {k.split(".")[0] for k in tensors} == {"model", "optimizer"}
    meta = runs.read_meta(run / runs.CHECKPOINT)
    assert json.loads(json.dumps(meta))["classes"] == ["red", "green", "blue"]
    assert ai.__version__ == meta["version"]
    assert set(meta) == {
        "alive", "batch", "best", "checksums", "classes", "epoch", "format", "history", "loss_sum", "optimizer",
        "processes", "scaler", "settings", "skipped", "step", "version", "warnings", "forms", "rate_of_blocks",
        "images", "mixed_precision",
    }  # fmt: skip
    assert {part: type(value) for part, value in meta["settings"].items()} == {"data": dict, "train": dict}


# tests/reference/checkpoint_0.1.0.safetensors: taken by version 0.1.0 in the second of three epochs of this
OF_0_1_0: dict[str, Any] = {
    "epochs": 3, "batch_size": 8, "lr": 1e-2, "ema": 0.9, "device": "cpu", "freeze": "backbone",
    "unfreeze": [{"epoch": 2, "what": "units.1"}], "log_every": 1,
}  # fmt: skip


@pytest.fixture
def old_run(tmp_path: Path) -> Path:
    """The folder of a run that version 0.1.0 left behind in its second epoch."""
    (tmp_path / "a").mkdir()
    shutil.copy(HERE.parent / "reference" / "checkpoint_0.1.0.safetensors", tmp_path / "a" / runs.CHECKPOINT)
    return tmp_path / "a"


def test_a_checkpoint_of_the_first_version_is_taken_over_whole(old_run: Path) -> None:
    """Weights, average, momenta, counters and log: what is loaded gives the same checkpoint again."""
    data, train = settings("digits", **OF_0_1_0)
    job = resuming.as_begun(Job(net(), Images(*DATA, Shades.classes), data, train, out=old_run))
    accelerator = devices.open_accelerator(train)
    try:
        run = Run(job, accelerator, RunFiles(job, True), Reporter(main=False))
        run.resume()
        state = run.state.state_dict() | resuming.terms(job, accelerator)
    finally:
        devices.forget_accelerator()
    tensors, meta = runs.read(old_run / runs.CHECKPOINT)
    assert len(tensors) == 87
    assert all(torch.equal(state[key], tensor) for key, tensor in tensors.items())
    younger = {*tensors, "images", "mixed_precision"}
    plain = json.loads(json.dumps({key: value for key, value in state.items() if key not in younger}))
    assert plain.pop("rate_of_blocks") == plain["settings"]["train"].pop("attn_lr") == OF_0_1_0["lr"]
    assert meta["settings"]["train"].pop("attn_lr") is None
    meta |= {"best": renamed(meta["best"]), "history": [renamed(row) for row in meta["history"]]}
    for part, then in meta["settings"].items():  # settings that are younger are not in it
        plain["settings"][part] = {key: plain["settings"][part][key] for key in then}
    numbers, numbers_then = plain.pop("optimizer"), meta.pop("optimizer")
    assert all(entry in numbers for entry in numbers_then)  # another torch may keep more
    assert plain == {k: meta[k] for k in meta if k not in ("checksums", "format", "version")}


def test_a_run_of_the_first_version_goes_on(old_run: Path) -> None:
    """Its rows stay, the epoch that it stopped in is finished, and the last one follows."""
    before = runs.read_meta(old_run / runs.CHECKPOINT)
    assert (before["epoch"], before["batch"], before["step"]) == (1, 2, 8)
    result = finetune(net(), DATA, **OF_0_1_0, out=old_run, resume=True)
    assert result.history[:2] == [renamed(row) for row in before["history"]]
    assert [(row["epoch"], row["step"]) for row in result.history] == [(0, 0), (1, 6), (2, 12), (3, 18)]
