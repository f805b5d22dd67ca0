"""Lightning: a module with blocks in it, and a `BaseFinetuning` callback that thaws the backbone.

python examples/finetune_lightning.py        (pip install lightning)

What to expect: in the first epoch blocks and head learn, from the second on the backbone too, at a rate of its own;
the printed counts are parameters. The checkpoint restores blocks and weights, since `__init__` injects.
"""

import tempfile
from typing import Any

import lightning
import torch
import torchvision
from lightning.pytorch.callbacks import BaseFinetuning

import attninject as ai
from attninject.training import extend_optimizer

RATES = {"lr": 1e-4, "attn_lr": 1e-3, "head_lr": 1e-3}  # backbone, blocks, head


class Classifier(lightning.LightningModule):
    """A resnet18 with SE. Lightning makes the module anew when it loads a checkpoint: inject here."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = ai.inject(torchvision.models.resnet18(num_classes=classes), "se_resnet")

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        """The loss on images (B, 3, H, W) with labels (B,)."""
        images, labels = batch
        return torch.nn.functional.cross_entropy(self.net(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """What learns at the start; the callback adds what comes later."""
        return torch.optim.AdamW(ai.param_groups(self.net, **RATES))


class Thaw(BaseFinetuning):
    """The backbone learns from epoch `at` on. Frozen by `ai.freeze`, its batch norms keep their statistics too."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def freeze_before_training(self, pl_module: Any) -> None:
        """Once, before the optimizer is made."""
        ai.freeze(pl_module.net)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        """At the start of each epoch."""
        if epoch == self.at:
            ai.unfreeze(pl_module.net)
            extend_optimizer(optimizer, pl_module.net, **RATES)
        print(f"epoch {epoch}: {ai.trainable(pl_module.net)} learn, {len(optimizer.param_groups)} groups")


torch.manual_seed(0)
images, labels = torch.randn(8, 3, 64, 64), torch.arange(8) % 4
data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size=4)
module = Classifier(4)
with tempfile.TemporaryDirectory() as folder:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", callbacks=[Thaw(at=1)], default_root_dir=folder, **quiet
    )
    trainer.fit(module, data)
    again = Classifier.load_from_checkpoint(trainer.checkpoint_callback.best_model_path, weights_only=True)
    with torch.no_grad():
        same = torch.equal(again.eval().net(images), module.eval().net(images))
    print(f"{len(ai.injected(again.net))} blocks come back from the checkpoint, same logits: {same}")
    ai.save(module.net, f"{folder}/run.safetensors")  # the delta: any resnet18 with these weights takes it
