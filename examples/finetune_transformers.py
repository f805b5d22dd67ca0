"""The `Trainer` of transformers on ConvNeXt V2 and DINOv2, with blocks that come back by `from_pretrained`.

python examples/finetune_transformers.py     (pip install transformers accelerate)

What to expect: for each net how many parameters learn beside its frozen backbone, the mean loss of four steps, and that
the saved folder gives the same logits again, up to rounding. Tiny nets with random weights stand here; for real ones:
`ConvNextV2ForImageClassification.from_pretrained("facebook/convnextv2-tiny-1k-224", num_labels=4,
ignore_mismatched_sizes=True)`.
"""

import tempfile

import torch
from transformers import (
    ConvNextV2Config,
    ConvNextV2ForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    Trainer,
    TrainingArguments,
)

import attninject as ai
from attninject.integrations import transformers as with_blocks

CONVNEXT = ConvNextV2Config(hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 2, 1], num_labels=4, image_size=64)
DINO = Dinov2Config(
    hidden_size=32, num_hidden_layers=3, num_attention_heads=2, patch_size=14, image_size=56, num_labels=4
)
torch.manual_seed(0)
DATA = [{"pixel_values": torch.randn(3, 56, 56), "labels": i % 4} for i in range(8)]


def train(model: torch.nn.Module, folder: str) -> float:
    """Four steps with rates of their own for blocks, head and backbone; the mean loss."""
    ai.freeze(model)
    print(f"  {ai.trainable(model)} learn")
    quiet = {"report_to": [], "disable_tqdm": True, "logging_strategy": "no", "use_cpu": True, "seed": 0}
    settings = TrainingArguments(
        folder, max_steps=4, per_device_train_batch_size=4, save_strategy="no", **quiet
    )
    optimizer = torch.optim.AdamW(ai.param_groups(model, attn_lr=1e-3, head_lr=1e-3))
    trainer = Trainer(model=model, args=settings, train_dataset=DATA, optimizers=(optimizer, None))
    loss = trainer.train().training_loss
    trainer.save_model(folder)
    return loss


for kind, config, rule in (
    (ConvNextV2ForImageClassification, CONVNEXT, {"block": "cbam", "place": "residual_branch"}),
    (
        Dinov2ForImageClassification,
        DINO,
        {"block": "se", "after": "dinov2.encoder.layer*.*.mlp"},
    ),  # on tokens
):
    model = with_blocks.inject(kind(config), **rule)  # the rule goes into the model's config
    print(f"{kind.__name__}: {len(ai.injected(model))} blocks, the first at {next(iter(ai.injected(model)))}")
    with tempfile.TemporaryDirectory() as folder:
        print(f"  loss {train(model, folder):.2f}")
        loaded = with_blocks.from_pretrained(kind, folder)
    image = DATA[0]["pixel_values"][None]
    with torch.no_grad():
        same = torch.allclose(loaded.eval()(image).logits, model.eval()(image).logits, atol=1e-6)
    print(f"  loaded model computes what the trained one does: {same}")
