"""Inject by a recipe file, save what training may change, and load it into a fresh base model.

python examples/recipe_file.py
"""

import tempfile
from pathlib import Path

import torch
import torchvision

import attninject as ai

RECIPE = Path(__file__).with_name("two_blocks.yaml")

torch.manual_seed(0)
base = torchvision.models.resnet18().eval()
weights = base.state_dict()

plan = ai.plan(base, RECIPE)  # touches nothing
print(plan)

model = ai.inject(base, plan)
with torch.no_grad():  # what training would do
    for block in ai.injected(model).values():
        for parameter in block.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))

with tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / "run.safetensors"
    ai.save(model, file)

    fresh = torchvision.models.resnet18().eval()
    fresh.load_state_dict(weights)  # the original checkpoint
    loaded = ai.load(fresh, file)

x = torch.randn(1, 3, 64, 64)
with torch.no_grad():
    print(f"loaded model equals the trained one: {torch.equal(model(x), loaded(x))}")
