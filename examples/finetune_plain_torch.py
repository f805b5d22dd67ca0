"""Fine-tune blocks and head of a frozen backbone in a loop of your own, and keep a small file.

python examples/finetune_plain_torch.py
"""

import tempfile
from pathlib import Path

import torch
import torchvision

import attninject as ai

torch.manual_seed(0)
base = torchvision.models.resnet18(num_classes=4)  # weights="DEFAULT" for pretrained ones
weights = {key: tensor.clone() for key, tensor in base.state_dict().items()}

model = ai.inject(base, "cbam_resnet")
ai.freeze(model)  # backbone out of training; its batch norms stay in eval through .train()
print(f"{ai.trainable(model)} parameters learn")

optimizer = torch.optim.AdamW(ai.param_groups(model, attn_lr=1e-3, head_lr=1e-3, weight_decay=0.05))
print(f"groups: {' | '.join(group['name'] for group in optimizer.param_groups)}")

images = torch.randn(8, 3, 64, 64)
labels = torch.arange(8) % 4
model.train()
for step in range(6):
    loss = torch.nn.functional.cross_entropy(model(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step in (0, 5):
        print(f"step {step}: loss {loss.item():.3f}")

with tempfile.TemporaryDirectory() as folder:
    file = Path(folder, "run.safetensors")
    ai.save(model, file)
    print(f"the delta holds {file.stat().st_size / 2**20:.1f} MiB, the network {4 * 11.3e6 / 2**20:.0f} MiB")
    fresh = torchvision.models.resnet18(num_classes=4)
    fresh.load_state_dict(weights)
    loaded = ai.load(fresh, file)

with torch.no_grad():
    print(f"loaded model equals the trained one: {torch.equal(loaded.eval()(images), model.eval()(images))}")

ai.eject(model)
same = all(torch.equal(t, weights[k]) for k, t in model.state_dict().items() if not k.startswith("fc."))
print(f"after eject the backbone is the original: {same}")
