"""DANet before the head of DeepLab v3: a training step on tiny images.

python examples/segmenter.py
"""

import torch
import torchvision

import attninject as ai

torch.manual_seed(0)
images, masks = torch.randn(2, 3, 64, 64), torch.randint(0, 3, (2, 64, 64))

deeplab = torchvision.models.segmentation.deeplabv3_mobilenet_v3_large(
    weights=None, weights_backbone=None, num_classes=3
).eval()
with torch.no_grad():
    before = deeplab(images)["out"]
    ai.inject(deeplab, block="danet", before="classifier", args={"reduction": 8}, example_inputs=images)
    after = deeplab(images)["out"]
    print(f"DeepLab: {', '.join(ai.injected(deeplab))}, masks unchanged: {torch.equal(before, after)}")

ai.freeze(deeplab)
optimizer = torch.optim.SGD(ai.param_groups(deeplab, lr=1e-2), lr=1e-2)
deeplab.train()
loss = torch.nn.functional.cross_entropy(deeplab(images)["out"], masks)
loss.backward()
optimizer.step()
print(f"  {ai.trainable(deeplab)} learn, loss {loss.item():.3f}")
