"""A U-Net of segmentation_models_pytorch: CBAM in its encoder, scSE in its decoder, trained with its own losses.

python examples/segmenter_smp.py             (pip install segmentation-models-pytorch)

What to expect: the masks are the same before training, then the Dice loss falls within a few steps. `stage_end` is the
encoder's, `decoder_end` the decoder's, for every encoder and decoder of the package. `save_pretrained` has no room for
blocks: keep a delta (`ai.save`), which goes back into a net with the same weights.
"""

import segmentation_models_pytorch as smp
import torch

import attninject as ai

torch.manual_seed(0)
images = torch.randn(4, 3, 64, 64)
masks = (images.mean(1, keepdim=True) > 0).long()
images += 2 * masks

model = smp.Unet("resnet18", encoder_weights=None, classes=1).eval()  # encoder_weights="imagenet"
with torch.no_grad():
    before = model(images)
    ai.inject(model, block="cbam", place="stage_end", example_inputs=images)
    ai.inject(model, block="scse", place="decoder_end", args={"reduction": 4}, example_inputs=images)
    print(f"{len(ai.injected(model))} blocks, masks unchanged: {torch.equal(before, model(images))}")

ai.freeze(model, "encoder")  # its weights are ImageNet's; blocks and decoder learn
print(f"{ai.trainable(model)} parameters learn")
criterion = smp.losses.DiceLoss("binary")
optimizer = torch.optim.AdamW(ai.param_groups(model, lr=1e-3, attn_lr=1e-2, head_lr=1e-3))
model.train()
losses = []
for _ in range(8):
    loss = criterion(model(images), masks)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
print(f"Dice loss falls: {losses[-1] < losses[0]}")

with torch.no_grad():
    found = model.eval()(images).sigmoid()
counts = smp.metrics.get_stats(found, masks, mode="binary", threshold=0.5)
print(f"IoU {smp.metrics.iou_score(*counts, reduction='micro').item():.2f}")
