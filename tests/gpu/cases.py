"""Networks, blocks and number formats that the tests on a card go through; a few of each in a rehearsal."""

from __future__ import annotations

import os

import torch

DEVICE = os.environ.get("ATTNINJECT_TEST_DEVICE", "cuda")
REHEARSE = bool(os.environ.get("ATTNINJECT_REHEARSE"))

NETS = (
    "torchvision/resnet18", "timm/convnext_tiny", "timm/vit_tiny_patch16_224", "torchvision/mobilenet_v3_small",
    "timm/efficientnet_b0", "torchvision/densenet121", "timm/swin_tiny_patch4_window7_224", "timm/regnety_002",
    "torchvision/vgg11_bn", "timm/maxvit_rmlp_pico_rw_256", "timm/mixnet_s", "torchvision/googlenet",
)[: 2 if REHEARSE else 12]  # fmt: skip
BLOCKS = ("se", "cbam", "gc", "nonlocal")[: 2 if REHEARSE else 4]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMATS = (torch.contiguous_format, torch.channels_last)
LEAN = (
    "se", "channel_attention", "spatial_attention", "cbam", "bam", "eca", "gc", "coord", "scse", "nonlocal", "danet_pam",
    "danet_cam",
)[: 3 if REHEARSE else 12]  # fmt: skip


def place(name: str) -> str:
    """Where the blocks go: on residual branches, or behind the stages of a network that has none."""
    return "stage_end" if any(w in name for w in ("vgg", "densenet", "googlenet")) else "residual_branch"


def images(name: str, device: str, batch: int = 4) -> torch.Tensor:
    """Random images of a size that the network takes."""
    size = 256 if "_256" in name else 224 if any(w in name for w in ("vit", "swin")) else 96
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1)).to(device)
