"""LoRA in the attention of a vision transformer, and SE blocks beside it, trained together; PEFT and attninject.

python examples/finetune_peft.py             (pip install peft)

What to expect: adapters and blocks are few parameters of the whole, everything else is frozen by PEFT. Adapters, blocks
and head are in PEFT's own folder; `ai.save` writes one file of the whole, the adapters merged into their layers.
"""

import copy
import tempfile

import peft
import timm
import torch

import attninject as ai

torch.manual_seed(0)
base = timm.create_model("test_vit", num_classes=4)  # pretrained=True, and a larger one
weights = copy.deepcopy(base.state_dict())
rule = {"block": "se", "after": "blocks.*.mlp", "args": {"reduction": 4}}

model = ai.inject(base, **rule)  # first the blocks, then the adapters
config = peft.LoraConfig(r=4, target_modules=["qkv"], modules_to_save=["se", "head"])
model = peft.get_peft_model(model, config)
print(f"{ai.trainable(model)} parameters learn, {len(ai.injected(model))} blocks among them")

size = base.patch_embed.img_size
images, labels = torch.randn(8, 3, *size), torch.arange(8) % 4
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
model.train()
for _ in range(4):
    loss = torch.nn.functional.cross_entropy(model(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print(f"loss {loss.item():.2f}")


def fresh() -> torch.nn.Module:
    """The base model, as it was downloaded."""
    net = timm.create_model("test_vit", num_classes=4)
    net.load_state_dict(weights)
    return net


with tempfile.TemporaryDirectory() as folder, torch.no_grad():
    wanted = model.eval()(images)
    model.save_pretrained(folder)
    again = peft.PeftModel.from_pretrained(ai.inject(fresh(), **rule), folder)
    print(f"from PEFT's folder: same logits {torch.equal(again.eval()(images), wanted)}")
    ai.save(model, f"{folder}/merged.safetensors")
    merged = ai.load(fresh(), f"{folder}/merged.safetensors")  # a plain timm net: no PEFT needed to run it
    close = torch.allclose(merged.eval()(images), wanted, atol=1e-5)
    print(f"from one merged file, a {type(merged).__name__}: same logits up to rounding {close}")
