"""3D Non-Local blocks in r3d_18, a network for video clips.

python examples/video.py
"""

import torch
import torchvision

import attninject as ai

torch.manual_seed(0)
model = torchvision.models.video.r3d_18(num_classes=4).eval()
clips, labels = torch.randn(2, 3, 8, 32, 32), torch.tensor([0, 3])  # (batch, channels, frames, height, width)

with torch.no_grad():
    before = model(clips)
    ai.inject(model, block="nonlocal", after="layer[23].0", example_inputs=clips)
    print(f"{', '.join(ai.injected(model))}: logits unchanged: {torch.equal(before, model(clips))}")

ai.freeze(model)
print(f"{ai.trainable(model)} learn")
optimizer = torch.optim.AdamW(ai.param_groups(model, attn_lr=1e-3))
model.train()
loss = torch.nn.functional.cross_entropy(model(clips), labels)
loss.backward()
optimizer.step()
learned = [block for block in ai.injected(model).values() if any(p.grad.any() for p in block.parameters())]
print(f"blocks with a gradient: {len(learned)}")
