"""Networks for tests: real architectures with random weights, and random batch-norm affine and statistics.

Many nets zero their last batch norm, their layer scale or their head at init, which makes anything look like
identity; `pretrained` undoes that.
"""

from __future__ import annotations

import functools

import torch
from torch import nn


def pretrained(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights, BN affine and statistics, layer scales and heads; in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            for name, p in module.named_parameters(recurse=False):
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    p.copy_(
                        torch.empty_like(p).normal_(
                            1.0 if name == "weight" else 0.0, 0.2, generator=generator
                        )
                    )
                elif p.ndim <= 1 or p.abs().max() < 1e-3:
                    p.copy_(torch.empty_like(p).normal_(0.3, 0.2, generator=generator))
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
                module.running_mean.copy_(
                    torch.empty_like(module.running_mean).normal_(0, 0.3, generator=generator)
                )
                module.running_var.copy_(
                    torch.empty_like(module.running_var).uniform_(0.5, 1.5, generator=generator)
                )
    return model.eval()


@functools.cache
def _prototype(name: str) -> nn.Module:
    import timm
    import torchvision

    kind, _, arch = name.partition("/")
    torch.manual_seed(0)
    if kind == "timm":
        return pretrained(timm.create_model(arch))
    return pretrained(torchvision.models.get_model(arch, weights=None))


def net(name: str) -> nn.Module:
    """A fresh copy of `torchvision/resnet18`, `timm/resnet50`, …, with random "pretrained" weights."""
    import copy

    return copy.deepcopy(_prototype(name))


def image(model_name: str, batch: int = 2, seed: int = 1) -> torch.Tensor:
    """A batch of random images of a size that the model takes, as small as it may be."""
    fixed = {"vit": 224, "swin": 224}
    size = next((s for key, s in fixed.items() if key in model_name), 64)
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))
