"""The benchmarks of fine-tuning: that they run the engine, compare like with like, and go on. No figure is asserted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from attninject import errors
from attninject.bench import digits, finetuning
from attninject.cli import main
from attninject.training import loop

SMALL = finetuning.Task(model="torchvision/resnet18", recipe="se_resnet", batch_size=2, size=32, device="cpu")


def test_finetune_takes_the_engines_steps_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three runs of the engine on the same images; the frozen one learns blocks and head only."""
    order: list[int] = []
    real = loop.Run.one_step

    def counted(run: Any, batches: Any) -> float:
        order.append(len(run.learner.names))
        return real(run, batches)

    monkeypatch.setattr(loop.Run, "one_step", counted)
    monkeypatch.setattr(finetuning, "_peak_in_child", lambda task: 2**20)
    result = finetuning.finetune(SMALL, rounds=1)
    plain, recipe, frozen = result["rows"]
    tensors = len(list(finetuning.Step(SMALL).run.learner.names))
    assert order == [62, tensors, tensors] * 3
    assert (plain["blocks"], recipe["blocks"], frozen["blocks"]) == (0, 8, 8)
    assert plain["parameters"] < recipe["parameters"] == frozen["parameters"]
    assert frozen["learning"].startswith("94.2 k of ")
    assert plain["throughput_of_plain"] == plain["peak_of_plain"] == 1
    text = finetuning.to_markdown(result)
    assert "| se_resnet, frozen backbone | 8 |" in text
    assert "batch 2, 32×32, precision no" in text


def test_peak_memory_of_fine_tuning_comes_from_a_process_of_its_own() -> None:
    """Three steps of a resnet18 raise the high-water mark by at least its gradients."""
    assert finetuning._peak_in_child(SMALL) > 4 * 11_000_000


def record(**accuracies: list[float]) -> dict[str, Any]:
    """What the command keeps, for nets and seeds as given."""
    images = {"pretrain": 400, "finetune": 858, "test": 500}
    rows = [
        {"seed": seed, "net": net, "recipe": digits.NETS[net], "blocks": 0, "parameters": 1000, "images": images,
         "before": 0.9, "accuracy": value, "loss": 0.1, "seconds": 1.0}
        for net, values in accuracies.items() for seed, value in enumerate(values)
    ]  # fmt: skip
    settings = {"model": digits.MODEL, "pretrain": digits.FIRST, "finetune": digits.SECOND}
    return {"command": "attninject bench digits", "settings": settings, "rows": rows}


def test_mean_deviation_and_difference_seed_by_seed() -> None:
    """Hand-counted: SE gains 1 and 3 points over plain, and is not flattered by the spread between seeds."""
    found = {row["net"]: row for row in digits.summary(record(plain=[0.90, 0.96], SE=[0.91, 0.99]))}
    assert found["plain"]["accuracy"] == pytest.approx((0.93, 0.0424264), rel=1e-4)
    assert found["SE"]["gain"] == pytest.approx((0.02, 0.0141421), rel=1e-4)
    text = digits.to_markdown(record(plain=[0.90, 0.96], SE=[0.91, 0.99]))
    assert (
        "| SE | `se_resnet` | 0 | 1,000 | 2 | 90.00 | 95.00 ± 5.66 | +2.00 ± 1.41 | 0.1000 ± 0.0000 |" in text
    )
    assert "one image is 0.20 points" in text


def test_digits_trains_through_the_engine_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All nets of a seed begin at the same accuracy; a second call trains nothing; other settings are refused."""
    monkeypatch.setattr(digits, "FIRST", {**digits.FIRST, "epochs": 1})
    train, test = digits._images()
    few = train.part(torch.arange(440)), test.part(torch.arange(60))
    monkeypatch.setattr(digits, "_images", lambda: few)
    file = tmp_path / "d.json"
    found = digits.run(file, seeds=1, epochs=1, nets=("plain", "SE"), say=print)
    assert [row["net"] for row in found["rows"]] == ["plain", "SE"]
    assert found["rows"][0]["before"] == found["rows"][1]["before"]
    assert found["rows"][1]["blocks"] == 8
    assert found["rows"][1]["images"] == {"pretrain": 400, "finetune": 40, "test": 60}
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2
    assert digits.run(file, seeds=1, epochs=1, nets=("plain", "SE"), say=print) == json.loads(
        file.read_text()
    )
    assert capsys.readouterr().out == ""
    with pytest.raises(errors.RunError, match="holds runs with other settings"):
        digits.run(file, seeds=1, epochs=2)
    file.write_text("[]")
    with pytest.raises(errors.RunError, match="no file of `attninject bench digits`"):
        digits.run(file, seeds=1)


def test_the_commands_print_markdown_or_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Options reach the benchmark; both forms of output."""
    asked: list[Any] = []
    kept = record(plain=[0.9], SE=[0.95])
    monkeypatch.setattr(digits, "run", lambda *given, **more: asked.append(given) or kept)
    monkeypatch.setattr(
        finetuning, "finetune", lambda task, rounds: asked.append((task, rounds)) or {"rows": 1}
    )
    monkeypatch.setattr(finetuning, "to_markdown", str)
    assert main(["bench", "digits", "--file", str(tmp_path / "d"), "--seeds", "2", "--epochs", "3"]) == 0
    assert capsys.readouterr().out == digits.to_markdown(kept) + "\n"
    assert main(["bench", "finetune", "--precision", "bf16", "--compiled", "--rounds", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"rows": 1}
    assert asked == [
        (tmp_path / "d", 2, 3),
        (finetuning.Task(precision="bf16", compile=True), 2),
    ]
