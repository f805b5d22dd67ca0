"""timm's parts around injected blocks: layer decay, optimizer, schedule, Mixup, EMA, gradual unfreezing.

python examples/finetune_timm.py
"""

import timm
import torch
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3

import attninject as ai
from attninject.training import GradualUnfreezing, extend_optimizer

EPOCHS, STEPS = 3, 2
RATES = {"lr": 1e-4, "attn_lr": 1e-3, "head_lr": 1e-3, "layer_decay": 0.7}

torch.manual_seed(0)
model = timm.create_model("test_convnext", num_classes=4)  # pretrained=True for pretrained weights
ai.inject(model, block="se", place="residual_branch")
ai.freeze(model)
unfreezing = GradualUnfreezing(model, {1: -1, 2: "backbone"})  # the last stage, then all

optimizer = create_optimizer_v2(ai.param_groups(model, **RATES), "lamb", lr=RATES["lr"])
ema = ModelEmaV3(model, decay=0.9)
mixup = Mixup(mixup_alpha=0.2, num_classes=4)
criterion = SoftTargetCrossEntropy()

images, labels = torch.randn(8, 3, 64, 64), torch.arange(8) % 4
step = 0
for epoch in range(EPOCHS):
    if unfreezing.step(epoch):
        extend_optimizer(optimizer, model, **RATES)
    scheduler, _ = create_scheduler_v2(
        optimizer, "cosine", num_epochs=EPOCHS, step_on_epochs=False, updates_per_epoch=STEPS
    )
    print(f"epoch {epoch}: {ai.trainable(model)} parameters learn, {len(optimizer.param_groups)} groups")
    model.train()
    for _ in range(STEPS):
        scheduler.step_update(step)
        x, y = mixup(images.clone(), labels)
        loss = criterion(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ema.update(model)
        step += 1

print(f"the average carries {len(ai.injected(ema.module))} blocks of its own")
