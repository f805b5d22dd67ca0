"""Faster R-CNN with CBAM in its backbone and neck, trained as torchvision's detection references do.

python examples/finetune_torchvision_detection.py

What to expect: SGD with momentum, a linear warm-up through the first epoch, `MultiStepLR`, a stop where the loss is not
finite, then boxes. `ai.param_groups` gives the blocks a rate of their own, all else is the references' loop. Here stand
four images of 64 pixels and a small net with random weights, which finds little.
"""

import math

import torch
import torchvision
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

import attninject as ai

EPOCHS, BATCH, RATE = 2, 2, 0.005
FLOATS = v2.ToDtype(torch.float32, scale=True)
TRAINING = v2.Compose([v2.RandomHorizontalFlip(0.5), FLOATS, v2.ToPureTensor()])


class Squares(Dataset):
    """One bright square in each image, as torchvision's detectors want it: boxes (N, 4) in pixels, labels from 1."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        image = torch.full((3, 64, 64), 30, dtype=torch.uint8)
        left, top = 8 * index, 10
        image[:, top : top + 24, left : left + 24] = 220
        box = [left, top, left + 24, top + 24]
        boxes = tv_tensors.BoundingBoxes([box], format="XYXY", canvas_size=(64, 64))
        return TRAINING(tv_tensors.Image(image), {"boxes": boxes.float(), "labels": torch.tensor([1])})


def one_epoch(epoch: int) -> float:
    """Train on each image once; the mean loss."""
    model.train()
    warmup = None
    if epoch == 0:
        iterations = min(1000, len(loader) - 1)
        warmup = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1e-3, total_iters=iterations)
    total = 0.0
    for images, targets in loader:
        losses = model(list(images), list(targets))  # proposals' and boxes' losses by name
        loss = sum(losses.values())
        if not math.isfinite(loss.item()):
            raise SystemExit(f"loss is {loss.item()}: {losses}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if warmup is not None:
            warmup.step()
        total += loss.item() / len(loader)
    return total


torch.manual_seed(0)
model = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn(
    weights=None, weights_backbone=None, num_classes=2, min_size=64, max_size=64, box_detections_per_img=3
)  # weights="DEFAULT" for pretrained ones
images = [Squares()[0][0]]
rules = [{"block": "cbam", "place": "stage_end"}, {"block": "eca", "after": "backbone.fpn.layer_blocks.*"}]
ai.inject(model, {"name": "detector", "rules": rules}, example_inputs=images)
print(f"{len(ai.injected(model))} blocks: {', '.join(ai.injected(model))}")

optimizer = torch.optim.SGD(ai.param_groups(model, lr=RATE, attn_lr=10 * RATE), lr=RATE, momentum=0.9)
scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[16, 22], gamma=0.1)
loader = DataLoader(Squares(), batch_size=BATCH, shuffle=True, collate_fn=lambda b: zip(*b, strict=True))
for epoch in range(EPOCHS):
    print(f"epoch {epoch}: loss {one_epoch(epoch):.2f}")
    scheduler.step()
with torch.no_grad():
    found = model.eval()(images)[0]
print(f"{len(found['boxes'])} boxes, scores {[round(score, 2) for score in found['scores'].tolist()]}")
