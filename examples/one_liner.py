"""Put CBAM into a resnet in one line, and see that the network still computes what it did.

python examples/one_liner.py
"""

import torch
import torchvision

import attninject as ai

torch.manual_seed(0)
model = torchvision.models.resnet18().eval()  # weights="DEFAULT" for pretrained ones
x = torch.randn(1, 3, 64, 64)

with torch.no_grad():
    before = model(x)
    model = ai.inject(model, "cbam_resnet")  # the one line
    after = model(x)

print(f"{len(ai.injected(model))} blocks, the first at {next(iter(ai.injected(model)))}")
print(f"same logits, bit for bit: {torch.equal(before, after)}")

ai.eject(model)
print(f"after eject: {len(ai.injected(model))} blocks")
