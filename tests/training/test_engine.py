"""Fine-tuning as its user sees it: figures, files, settings, and what stays as it was."""

from __future__ import annotations

import copy
import csv
import itertools
import math
import random
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import DATA, QUICK, Net, Shades, hears, net
from torch import nn

import attninject as ai
from attninject import errors, models
from attninject.training import devices, finetune, gate_movement


def said(**kw: Any) -> tuple[Any, list[str]]:
    """The result of a run and the lines that it said."""
    lines: list[str] = []
    result = finetune(kw.pop("model", None) or net(), DATA, **{**QUICK, **kw}, **hears(lines.append))
    return result, lines


def test_it_learns_and_writes_its_files(tmp_path: Path) -> None:
    """Accuracy rises; the log has a row per epoch; best.safetensors on the base is the evaluated model."""
    model = net()
    base = copy.deepcopy(ai.eject(copy.deepcopy(model)))
    result, lines = said(model=model, epochs=6, out=tmp_path / "a")
    assert [row["epoch"] for row in result.history] == list(range(7))
    assert result.best["top1"] > 0.8 > result.history[0]["top1"]
    assert {p.name for p in (tmp_path / "a").iterdir()} - {"tensorboard", "trackers.json"} == {
        ".lock", "best.safetensors", "last.safetensors", "log.csv", "classes.txt", "checkpoint.safetensors",
        "checkpoint.previous.safetensors", "measured.json",
    }  # fmt: skip
    rows = list(csv.DictReader((tmp_path / "a" / "log.csv").read_text().splitlines()))
    assert [float(r["top1"]) for r in rows] == [r["top1"] for r in result.history]
    loaded = ai.load(base, tmp_path / "a" / "last.safetensors", example_inputs=torch.zeros(2, 3, 8, 8)).eval()
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))
    assert any("epoch 6/6: train loss" in line for line in lines)


def test_step_zero_equals_the_model_without_blocks() -> None:
    """Before training, loss and accuracies with a recipe are those without, to the last digit."""
    with_blocks, without = finetune(net("cbam"), DATA, **QUICK), finetune(net(None), DATA, **QUICK)
    for key in ("val_loss", "top1", "top5"):
        assert with_blocks.history[0][key] == without.history[0][key]
    assert with_blocks.history[1]["val_loss"] != without.history[1]["val_loss"]


def test_a_frozen_backbone_stays_and_the_delta_is_small(tmp_path: Path) -> None:
    """Only blocks and head change, and only they are in the file."""
    model = net("cbam")
    before = {k: t.clone() for k, t in model.state_dict().items()}
    finetune(model, DATA, **QUICK, freeze="backbone", out=tmp_path / "a")
    moved = {k for k, t in model.state_dict().items() if not torch.equal(t, before[k])}
    assert moved
    assert all("cbam" in k or k.startswith("head") for k in moved)
    ejected = ai.eject(copy.deepcopy(model)).state_dict()
    assert set(ejected) == {k for k in before if "cbam" not in k}
    assert all(torch.equal(t, before[k]) for k, t in ejected.items() if not k.startswith("head"))
    file = load_file(tmp_path / "a" / "best.safetensors")
    assert set(file) == {k for k in before if "cbam" in k or k.startswith("head")}


def test_plain_fine_tuning_is_the_same_code(tmp_path: Path) -> None:
    """Without blocks the product is a plain state dict."""
    model = net(None)
    finetune(model, DATA, **QUICK, out=tmp_path / "a")
    Net().load_state_dict(load_file(tmp_path / "a" / "best.safetensors"))


def test_the_callers_generators_and_their_models_classes_stay() -> None:
    """A run draws no number of the caller's, and leaves the model in eval mode and of its own class."""
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = random.random(), np.random.rand(), torch.rand(1)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    with torch.random.fork_rng():
        model = net()
    kept = {n: type(m) for n, m in model.named_modules()}
    finetune(model, DATA, **QUICK)
    assert (random.random(), np.random.rand(), torch.rand(1)) == expected
    assert {n: type(m) for n, m in model.named_modules()} == kept
    assert not model.training


def test_the_same_seed_gives_the_same_bits() -> None:
    """Two runs end with equal weights; another seed gives others."""
    first, second, third = net(), net(), net()
    finetune(first, DATA, **QUICK)
    torch.rand(3)
    finetune(second, DATA, **QUICK)
    finetune(third, DATA, **QUICK, seed=1)
    a, b, c = (m.state_dict() for m in (first, second, third))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not all(torch.equal(a[k], c[k]) for k in a)


@pytest.mark.parametrize(
    "settings",
    [
        {"mixup": 0.2, "cutmix": 0.5, "smoothing": 0.1},
        {"loss": "bce", "optimizer": "sgd", "scheduler": "step"},
        {"precision": "bf16", "clip": 1.0, "channels_last": True},
        {"accumulate": 3, "ema": 0.5, "warmup_epochs": 1, "layer_decay": 0.7},
        {"optimizer": "lamb", "scheduler": "none", "smoothing": 0.1, "precision": "fp16"},
    ],
)
def test_timms_parts_fit_together(settings: dict[str, Any]) -> None:
    """Each group of settings trains, with finite losses and weights that move."""
    model = net()
    before = {k: t.clone() for k, t in model.state_dict().items()}
    result = finetune(model, DATA, **QUICK, **settings)
    assert all(np.isfinite(row["val_loss"]) for row in result.history)
    assert not torch.equal(model.units[0].se.fc2.weight, before["units.0.se.fc2.weight"])


def compiled_with(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiled run ends with the weights of a plain one, up to rounding."""
    real, used = torch.compile, []
    monkeypatch.setattr(torch, "compile", lambda m, **kw: used.append(m) or real(m, backend=backend, **kw))
    plain, compiled = net(drop=0.0), net(drop=0.0)  # a compiled dropout draws other numbers
    settings = {**QUICK, "optimizer": "sgd"}
    finetune(plain, DATA, **settings)
    assert used == []
    finetune(compiled, DATA, **settings, compile=True)
    assert used == [compiled]
    for a, b in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """`compile` trains through torch.compile (here with its quick backend) to the weights of a plain run."""
    compiled_with("aot_eager", monkeypatch)


@pytest.mark.slow
def test_compiled_by_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same with the backend that users get."""
    compiled_with("inductor", monkeypatch)


def test_checkpointing_trades_memory_for_time_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """timm's gradient checkpointing is switched on, and the run ends with the weights of a plain one."""
    vits, calls = [], []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        vit = models.build("timm/test_vit", num_classes=3, img_size=8, patch_size=4)
        real = vit.blocks[0].attn.forward
        vit.blocks[0].attn.register_forward_hook(lambda *_, on=checkpointing: calls.append(on))
        finetune(
            ai.inject(vit, "se"), DATA, **{**QUICK, "epochs": 1}, optimizer="sgd", checkpointing=checkpointing
        )
        assert vit.blocks[0].attn.forward == real
        vits.append(vit)
    for a, b in zip(*(v.parameters() for v in vits), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert calls.count(True) > calls.count(False)  # each forward of a checkpointed block runs twice


def test_clipping_bounds_the_step() -> None:
    """With plain SGD no step is longer than rate times bound; without clipping one is."""

    def longest(**more: Any) -> float:
        model, found = net(), [0.0]
        before = [p.detach().clone() for p in model.parameters()]

        def step(module: nn.Module, args: Any) -> None:
            moved = sum(
                (p.detach() - b).square().sum() for p, b in zip(module.parameters(), before, strict=True)
            )
            found.append(float(moved) ** 0.5)
            before[:] = [p.detach().clone() for p in module.parameters()]

        model.register_forward_pre_hook(step)
        plain = {**QUICK, "optimizer": "momentum", "momentum": 0.0, "scheduler": "none", "weight_decay": 0.0}
        finetune(model, DATA, **{**plain, "lr": 0.1, "attn_lr": 0.1, **more})
        return max(found)

    assert longest(clip=0.01) <= 0.1 * 0.01 * (1 + 1e-4) < longest()


def test_channels_last_and_bf16_reach_the_layers() -> None:
    """Weights and images lie in channels_last, convolutions compute in bfloat16, weights stay float32."""
    model, seen = net(), set()

    def look(module: nn.Module, args: Any, out: torch.Tensor) -> None:
        last = torch.channels_last
        seen.add(
            (
                out.dtype,
                args[0].is_contiguous(memory_format=last),
                module.weight.is_contiguous(memory_format=last),
            )
        )

    model.units[1].conv.register_forward_hook(look)
    finetune(model, DATA, **QUICK, precision="bf16", channels_last=True)
    assert seen == {(torch.bfloat16, True, True)}
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_accelerates_precision_counts_where_none_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """`accelerate launch --mixed_precision bf16` is heard; a precision in the settings comes first."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    for given, expected in (({}, torch.bfloat16), ({"precision": "no"}, torch.float32)):
        model, seen = net(), set()
        model.units[1].conv.register_forward_hook(lambda m, a, out, seen=seen: seen.add(out.dtype))
        finetune(model, DATA, **{**QUICK, "epochs": 1}, **given)
        assert seen == {expected}


def test_accelerates_accumulation_does_not_divide_the_loss_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """A number of steps in an Accelerate config changes nothing: `accumulate` is the setting here."""
    plain, configured = net(), net()
    finetune(plain, DATA, **QUICK, optimizer="sgd")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    finetune(configured, DATA, **QUICK, optimizer="sgd")
    assert torch.equal(plain.head.weight, configured.head.weight)


def test_a_window_that_the_caller_left_open_stops_no_step() -> None:
    """A loop of one's own under Accelerate ended between two steps of its optimizer: this run takes its own."""
    from accelerate.state import GradientState

    plain, after = net(), net()
    finetune(plain, DATA, **QUICK)
    GradientState()._set_sync_gradients(False)
    finetune(after, DATA, **QUICK)
    assert torch.equal(plain.head.weight, after.head.weight)


def test_mixup_and_cutmix_mix_images_and_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The net sees mixed images in training and plain ones in validation; the loss gets soft labels."""
    from attninject.training import factories

    shapes: list[tuple[int, ...]] = []
    real = factories.make_loss

    def listening(*args: Any) -> Any:
        criterion, mixup = real(*args)
        criterion.register_forward_pre_hook(lambda _, given: shapes.append(tuple(given[1].shape)))
        return criterion, mixup

    monkeypatch.setattr(factories, "make_loss", listening)
    one, other, plain = net(), net(), net()
    finetune(plain, DATA, **QUICK)
    assert set(shapes) == {(8,)}
    shapes.clear()
    finetune(one, DATA, **QUICK, mixup=0.5)
    finetune(other, DATA, **QUICK, cutmix=1.0)
    assert set(shapes) == {(8, 3)}
    weights = [m.head.weight for m in (plain, one, other)]
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(weights))


def test_accumulation_is_the_larger_batch() -> None:
    """Two forwards of 4 per step give the weights of one forward of 8, up to rounding."""
    model, other = (ai.freeze(net(drop=0.0)) for _ in range(2))
    rates = {**QUICK, "optimizer": "sgd"}
    finetune(model, DATA, **rates)
    finetune(other, DATA, **{**rates, "batch_size": 4, "accumulate": 2})
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_ema_is_what_is_measured_and_shipped(tmp_path: Path) -> None:
    """With an average of the weights, result.model and the files hold it, not the last step's weights."""
    model = net()
    result = finetune(model, DATA, **QUICK, ema=0.9, out=tmp_path / "a")
    assert not torch.equal(result.model.head.weight, model.head.weight)
    shipped = load_file(tmp_path / "a" / "last.safetensors")
    assert torch.equal(shipped["head.weight"], result.model.head.weight)


def test_gradual_unfreezing_in_a_run() -> None:
    """The second unit moves from epoch 2 on, at its rate; the first never does."""
    model = net()
    before = {k: t.clone() for k, t in model.state_dict().items()}
    _, lines = said(
        model=model, freeze="backbone", unfreeze=[{"epoch": 2, "what": "units.1"}], scheduler="none"
    )
    assert torch.equal(model.units[0].conv.weight, before["units.0.conv.weight"])
    assert not torch.equal(model.units[1].conv.weight, before["units.1.conv.weight"])
    assert not torch.equal(model.units[1].norm.running_mean, before["units.1.norm.running_mean"])
    assert any(line.startswith("epoch 2: ") and "parameters learn" in line for line in lines)


def test_two_parts_unfrozen_in_one_epoch() -> None:
    """Two lines of `unfreeze` for the same epoch both count."""
    model = net()
    before = {k: t.clone() for k, t in model.state_dict().items()}
    both = [{"epoch": 1, "what": "units.0"}, {"epoch": 1, "what": ["units.1", "head"]}]
    finetune(model, DATA, **{**QUICK, "epochs": 1}, freeze="backbone", unfreeze=both)
    for unit in ("units.0", "units.1"):
        assert not torch.equal(model.state_dict()[f"{unit}.conv.weight"], before[f"{unit}.conv.weight"])


def test_an_average_ships_what_was_unfrozen(tmp_path: Path) -> None:
    """With EMA and gradual unfreezing the delta holds all that moved: on the base it is the measured model."""
    model = net()
    base = ai.eject(copy.deepcopy(model))
    unfreeze = [{"epoch": 2, "what": "units.1"}]
    result = finetune(model, DATA, **QUICK, freeze="backbone", unfreeze=unfreeze, ema=0.5, out=tmp_path / "a")
    loaded = ai.load(base, tmp_path / "a" / "last.safetensors", example_inputs=torch.zeros(2, 3, 8, 8)).eval()
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(loaded(x), result.model(x))


def test_a_head_can_be_named_without_freezing() -> None:
    """Where the head is not found, `head` alone says it, and `head_lr` is its rate."""

    class Convolved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.final = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 3, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.final(torch.relu(self.stem(x))).mean((2, 3))

    result = finetune(Convolved(), DATA, **{**QUICK, "epochs": 1}, head="final", head_lr=0.5)
    assert result.history[0]["lr.head"] == 0.5
    with pytest.raises(errors.NoHeadError, match="was not found"):
        finetune(Convolved(), DATA, **QUICK)


@pytest.mark.parametrize("scheduler", ["step", "multistep"])
def test_steps_of_the_rate_come_within_the_run(scheduler: str) -> None:
    """Stepped schedules fall by ten after 0.3 of the epochs, as timm's do after 90 of 300."""
    rows = finetune(net(), DATA, **{**QUICK, "epochs": 5}, scheduler=scheduler).history
    assert [row["lr.backbone"] for row in rows] == pytest.approx([1e-2, 1e-2, 1e-3, 1e-4, 1e-4, 1e-5])


def test_new_weights_follow_the_runs_seed() -> None:
    """A recipe given to `finetune` starts from `seed`, whatever the caller drew before."""
    recipe = {"name": "se", "rules": [{"block": "se", "after": "units.*.conv", "args": {"reduction": 4}}]}
    heads = []
    for drawn, seed in ((1, 0), (2, 0), (2, 1)):
        model = net(None)
        torch.manual_seed(drawn)
        finetune(model, DATA, **{**QUICK, "epochs": 1}, recipe=recipe, seed=seed)
        heads.append(model.units[0].se.fc1.weight)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[1], heads[2])


def test_data_sets_as_a_list() -> None:
    """[training, validation] is as good as a tuple."""

    class Ends(Shades):
        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            if index >= self.count:
                raise IndexError(index)
            return super().__getitem__(index)

    assert len(finetune(net(), [Ends(48), Ends(18)], **{**QUICK, "epochs": 1}).history) == 2


def test_files_are_readable_by_whom_the_umask_allows(tmp_path: Path) -> None:
    """A plain run's state dict has the rights of any other file in the folder."""
    finetune(net(None), DATA, **{**QUICK, "epochs": 1}, out=tmp_path / "a")
    assert len({(tmp_path / "a" / name).stat().st_mode for name in ("log.csv", "best.safetensors")}) == 1


def test_dead_gates_are_named() -> None:
    """A block that no gradient reaches is warned of, once; blocks that learn are not."""

    class Cut(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.zeros(channels, 1, 1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * (1 + self.scale.relu() * self.scale.relu())

    model = net()
    ai.inject(model, block=Cut, after="stem", name="cut", example_inputs=torch.zeros(2, 3, 8, 8))
    result, lines = said(model=model)
    dead = [text for text in result.warnings if text.startswith("dead gates")]
    assert len(dead) == 1
    assert "dead gates: 1 of 3 blocks have had no gradient so far (cut)" in dead[0].replace("stem.", "")
    assert sum("dead gates" in line for line in lines) == 1
    assert not any("dead gates" in text for text in said()[0].warnings)


def test_movement_of_gates_is_in_the_log_and_gates_that_stay_are_warned_of(tmp_path: Path) -> None:
    """The log has mean |gate − 1| per block: 0 before training, 0.1 where logits make it so; at a tiny rate a warning."""
    model = net()
    with torch.no_grad():
        model.units[0].se.fc2.bias.fill_(math.log(1.1 / 0.9))  # 2σ(z) = 1.1, whatever the image
    slow = finetune(model, DATA, **{**QUICK, "lr": 1e-9, "epochs": 1}, out=tmp_path / "a")
    assert slow.history[0]["moved.units.0.se"] == pytest.approx(0.1, abs=1e-6)
    assert slow.history[0]["moved.units.1.se"] == 0
    assert slow.history[1]["moved.units.0.se"] == pytest.approx(0.1, abs=1e-3)
    (text,) = slow.warnings
    assert "gates that hardly moved: 1 of 2 blocks" in text
    assert "(units.1.se)" in text
    header = (tmp_path / "a" / "log.csv").read_text(encoding="utf-8").splitlines()[0].split(",")
    assert "moved.units.1.se" in header
    fast = finetune(net(), DATA, **{**QUICK, "attn_lr": 0.5, "epochs": 2})
    assert fast.warnings == []
    assert fast.history[-1]["moved.units.1.se"] > 0.05
    assert not any(key.startswith("moved") for key in finetune(net(None), DATA, **QUICK).history[-1])


def test_images_that_gates_are_looked_at_with_keep_no_batch_alive() -> None:
    """One image of each of the first 32 batches, padding passed over, and no memory but theirs."""
    x, y = (
        torch.arange(8.0).view(8, 1, 1, 1).expand(8, 3, 2, 2).contiguous(),
        torch.tensor([-1, -1, *range(6)]),
    )
    sample = gate_movement.Sample(batches=64)
    assert sum(1 for _ in sample.of((x, y) for _ in range(64))) == 64
    assert torch.equal(torch.cat(list(sample.chunks())), x[2:3].expand(32, 3, 2, 2))
    assert sum(t.untyped_storage().nbytes() for t in sample.kept) == 32 * x[0].nbytes


def test_a_bar_in_a_terminal_lines_in_a_log(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Where standard error is a terminal, steps are shown by a bar; else by a line now and then."""
    import sys

    lines = said(log_every=2)[1]
    assert sum("epoch 1/2, step " in line for line in lines) == 3
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    lines = said(log_every=2)[1]
    assert not any(", step " in line for line in lines)
    assert "epoch 2/2: 100%" in capsys.readouterr().err


# --- what is refused ----------------------------------------------------------------------------


def test_faults_in_settings_come_together() -> None:
    """Unknown and wrong settings in one report, with the nearest names."""
    with pytest.raises(errors.ExperimentError) as caught:
        finetune(net(), "digits", epchs=3, lr=-1)
    assert [str(fault) for fault in caught.value.faults] == [
        "train: unknown key 'epchs'; did you mean epochs?",
        "train, lr: expected a rate above 0, found the number -1",
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "sgd", "momentum": 0.0}, "timm refuses 'sgd': Nesterov momentum requires a momentum"),
        ({"optimizer": "adahessian"}, "'adahessian' needs second derivatives"),
        ({"optimizer": "adamx"}, "timm has no 'adamx'; the nearest names are "),
        ({"scheduler": "cosin"}, "'cosin'"),
        ({"mixup": 1.0, "batch_size": 7}, "must be even, it is 7"),
        ({"freeze": ["backbone", "head", "injected"]}, "nothing would learn"),
        ({"checkpointing": True}, "Net offers none"),
        ({"unfreeze": [{"epoch": 1, "what": "units"}]}, "nothing to undo without `freeze`"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    """Refused before the first step, with the setting named."""
    with pytest.raises(errors.ExperimentError, match=message):
        finetune(net(), DATA, **{**QUICK, **settings})


def test_wrong_number_of_classes() -> None:
    """Said before training, with what to give the model."""
    with pytest.raises(
        errors.DataError, match=r"images have 3 classes: expected \(batch, 3\).*num_classes=3"
    ):
        finetune(net(classes=5), DATA, **QUICK)


def test_images_of_a_size_that_the_model_refuses() -> None:
    """The digits' 32 pixels are no size for this ViT: said before training, with the setting that changes it."""
    torch.manual_seed(0)
    vit = models.build("timm/vit_tiny_patch16_224", num_classes=10, depth=1, embed_dim=6, num_heads=1)
    with pytest.raises(errors.DataError, match=r"\(8, 3, 32, 32\): Input height .*--data-size"):
        finetune(vit, "digits", **QUICK)


def test_auxiliary_heads_are_named() -> None:
    """A model whose training output is no tensor is refused in words."""
    aux = namedtuple("aux", "logits aux")

    class Auxiliary(Net):
        def forward(self, x: torch.Tensor) -> Any:
            logits = super().forward(x)
            return aux(logits, logits) if self.training else logits

    with pytest.raises(
        errors.DataError, match=r"gives a aux instead of logits .*\(batch, 3\).*aux_logits=False"
    ):
        finetune(Auxiliary(), DATA, **QUICK)


def test_too_few_images_for_one_step() -> None:
    """Named with the numbers, and where a batch as small as all images could not be mixed in pairs."""
    with pytest.raises(
        errors.DataError, match="7 training images on 1 processes make a batch of 7: give an even"
    ):
        finetune(net(), (Shades(7), Shades(3)), **QUICK, mixup=0.5)
    with pytest.raises(errors.DataError, match="2 training images do not fill one step of 8 × 9 forwards"):
        finetune(net(), (Shades(2), Shades(3)), **QUICK, accumulate=9)


def test_a_nan_loss_stops_with_the_last_good_checkpoint(tmp_path: Path) -> None:
    """The step and the checkpoint are named, and the checkpoint is as it was."""

    class Poisoned(Shades):
        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            image, label = super().__getitem__(index)
            return (image * float("nan") if index == 40 else image), label

    model = net()
    with pytest.raises(
        errors.NonFiniteError, match=r"became nan at step \d; the last good checkpoint is .*step 0\)"
    ):
        finetune(model, (Poisoned(48), DATA[1]), **QUICK, out=tmp_path / "a")
    saved = load_file(tmp_path / "a" / "checkpoint.safetensors")
    assert all(t.isfinite().all() for t in saved.values() if t.is_floating_point())


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    """A step that breaks a weight leaves the checkpoint before it."""
    model = net()
    with pytest.raises(errors.NonFiniteError, match=r"(loss became|no longer finite).*step 0\)"):
        finetune(model, DATA, **{**QUICK, "lr": 1e30}, optimizer="sgd", out=tmp_path / "a")


def test_blocks_learn_ten_times_faster_unless_told_otherwise(tmp_path: Path) -> None:
    """`attn_lr` is ten times `lr` by default; a run begun when it was `lr` goes on with that alone."""
    from attninject.training.runs import CHECKPOINT, Folder, read

    first = finetune(net(), DATA, **{**QUICK, "epochs": 1}, out=tmp_path / "a").history[0]
    assert (first["lr.backbone"], first["lr.blocks"]) == (1e-2, pytest.approx(1e-1))
    assert finetune(net(), DATA, **{**QUICK, "epochs": 1}, attn_lr=0.5).history[0]["lr.blocks"] == 0.5
    tensors, meta = read(tmp_path / "a" / CHECKPOINT)
    del meta["rate_of_blocks"]
    Folder(tmp_path / "a").save(tensors, meta)
    with pytest.raises(errors.RunError, match=r"attn_lr: 0.01 then, 0.2 now"):
        finetune(net(), DATA, **QUICK, attn_lr=0.2, out=tmp_path / "a", resume=True)
    for epochs in (2, 3):  # and again from what that wrote
        gone_on = finetune(net(), DATA, **{**QUICK, "epochs": epochs}, out=tmp_path / "a", resume=True)
        assert (gone_on.history[-1]["epoch"], gone_on.history[-1]["lr.blocks"]) == (
            epochs,
            pytest.approx(1e-2, rel=1),
        )


def test_fsdp_on_cpus_is_refused_where_gradients_are_added_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch 2.8 does; where it gives their mean, the test of two processes trains with it."""
    assert [devices.cpus_average(v) for v in ("2.6.0+cu124", "2.8.0", "2.9.1", "2.14.1+cu130", "3.0")] == [
        False, False, True, True, True,
    ]  # fmt: skip
    monkeypatch.setattr(devices, "cpus_average", lambda version: False)
    with pytest.raises(errors.ExperimentError, match=r"sharding: torch .* adds gradients up on CPUs"):
        finetune(net(), DATA, **QUICK, sharding="fsdp2")
