"""timm's own training recipe around injected blocks: its task, loaders, Mixup, schedule, EMA and saver.

python examples/finetune_timm_task.py        (timm 1.0.31 or newer)

What to expect: timm's `train.py` builds these parts from its flags; the one line it lacks is `ai.inject`, behind
`create_model`. The net, its average and timm's checkpoint hold the blocks; the checkpoint goes back into a net that has
been injected alike.
"""

import tempfile
from pathlib import Path

import timm
import torch
from PIL import Image
from timm.data import Mixup, create_dataset, create_loader
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import ClassificationTask
from timm.utils import CheckpointSaver

import attninject as ai

EPOCHS, CLASSES, RATE = 2, 2, 1e-3
CPU = {"num_workers": 0, "persistent_workers": False, "use_prefetcher": False}
RULE = {"block": "eca", "place": "residual_branch"}


def loader(folder: Path, training: bool) -> torch.utils.data.DataLoader:
    """timm's loader over a folder of images, on the CPU."""
    dataset = create_dataset("", root=folder, split="train" if training else "val")
    size = {"input_size": (3, 64, 64), "batch_size": 4}
    return create_loader(dataset, **size, **CPU, device=torch.device("cpu"), is_training=training)


def train(folder: Path) -> torch.nn.Module:
    """The averaged net after the last epoch."""
    model = timm.create_model("test_resnet", num_classes=CLASSES)  # pretrained=True for pretrained weights
    ai.inject(model, **RULE)  # the one line
    task = ClassificationTask(model, criterion_kwargs={"soft_targets": True}, verbose=False)
    task.setup_ema(decay=0.9)
    optimizer = create_optimizer_v2(ai.param_groups(model, lr=RATE, attn_lr=10 * RATE), "lamb", lr=RATE)
    training, validation = loader(folder, True), loader(folder, False)
    steps = {"num_epochs": EPOCHS, "updates_per_epoch": len(training), "step_on_epochs": False}
    scheduler, _ = create_scheduler_v2(optimizer, "cosine", **steps)
    saver = CheckpointSaver(model, optimizer, task=task, checkpoint_dir=str(folder), recovery_dir=str(folder))
    mixup = Mixup(mixup_alpha=0.2, num_classes=CLASSES)
    for epoch in range(EPOCHS):
        task.train()
        for step, (images, labels) in enumerate(training):
            scheduler.step_update(epoch * len(training) + step)
            loss = task(*mixup(images, labels))["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            task.update_ema()
        evaluator = task.create_evaluator()
        with torch.no_grad():
            for images, labels in validation:
                evaluator.update(task.get_eval_model(ema=True).eval()(images), labels)
        saver.save_checkpoint(epoch, metric=evaluator.compute()["top1"])
    return task.get_trainable_module(ema=True).module


with tempfile.TemporaryDirectory() as name:
    for number in range(16):
        file = Path(name, "train" if number < 12 else "val", f"class{number % 2}", f"{number}.png")
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (80, 64), ("teal", "tomato")[number % 2]).save(file)
    torch.manual_seed(0)
    average = train(Path(name))
    fresh = ai.inject(timm.create_model("test_resnet", num_classes=CLASSES), **RULE)
    timm.models.load_checkpoint(fresh, f"{name}/last.pth.tar", use_ema=True)
    x = torch.randn(2, 3, 64, 64)
    same = torch.equal(fresh.eval()(x), average.eval()(x))
    print(
        f"{len(ai.injected(average))} blocks in the average; timm's checkpoint gives the same logits: {same}"
    )
