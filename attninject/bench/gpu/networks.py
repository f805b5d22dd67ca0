"""Training steps of whole networks: ours, timm's modules, the bare backbone; bf16 and channels_last first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from attninject import api, models
from attninject.bench import measure, networks, peers
from attninject.bench.networks import BARE, NETWORKS, OURS, THEIRS, Data, Network

from .sheet import Figures, Setting, Task

PART = "networks"
STEPS = 18.0  # seconds of one network, by estimate
COMPILING = 120.0
BYTES_PER_IMAGE = 350 * 2**20
"""What a training step of resnet50 with blocks takes per image of 224×224 in float32, and some more."""


def _vit_se() -> nn.Module:
    args = {"rd_ratio": 1 / 16, "rd_divisor": 1}
    return api.inject(
        models.build("timm/vit_small_patch16_224"),
        block="timm/se", place="block_end", name="se", init="paper", args=args,
    )  # fmt: skip


ALL: Mapping[str, Network] = {
    **NETWORKS,
    "vit_small + SE": Network(
        "timm/vit_small_patch16_224",
        {"block": "se", "place": "block_end"},
        _vit_se,
        "hung where ours hang",
        peers.SUBJECTS["se"].peers["timm"].weights,
        side=224,
    ),
}
"""Those of `bench models`, and a transformer."""


def tasks(setting: Setting) -> Iterator[Task]:
    """Eager in bf16 and float32, then whole networks compiled."""
    names = ("resnet50 + SE",) if setting.rehearse else tuple(ALL)
    for dtype in ("float32",) if setting.rehearse else setting.dtypes:  # bf16 is slow on most processors
        for name in names:
            rank = 1 if name in ("resnet50 + SE", "resnet50 + CBAM") else 3
            rank += 0 if dtype == setting.dtypes[0] else 3
            data = data_of(setting, dtype)
            yield Task(PART, f"{name} {dtype}", rank, STEPS, partial(_eager, name, data))
    if not setting.rehearse:
        for name in ("resnet50 + SE", "resnet50 + CBAM", "vit_small + SE"):
            data = data_of(setting, setting.dtypes[0])
            yield Task(PART, f"{name} compiled", 7, COMPILING, partial(_compiled, name, data))


def data_of(setting: Setting, dtype: str) -> Data:
    """128 images of 224×224, fewer where memory is short."""
    if setting.rehearse:
        return Data(1, 64, "channels_last", dtype, setting.device)
    batch = 128
    while batch > 1 and batch * BYTES_PER_IMAGE > setting.memory:
        batch //= 2
    return Data(batch, 224, "channels_last", dtype, setting.device)


def _eager(name: str, data: Data, left: float) -> Figures:
    rounds = 1 if data.device == "cpu" else 5
    return _row(name, data, networks.measured(ALL[name], data, rounds, enough=6.0))


def _compiled(name: str, data: Data, left: float) -> Figures:
    """Whole networks through inductor; in train mode, one graph."""
    nets = networks.contenders(ALL[name])
    works = {}
    for kind in (OURS, THEIRS, BARE):
        net = nets[kind]
        net.to(data.device)
        works[kind] = networks.step(torch.compile(net), data)  # type: ignore[arg-type]
    times = measure.interleaved(works, 5, data.device, enough=6.0)
    return {
        "network": name, "batch": data.batch, "format": data.format, "dtype": data.dtype,
        "blocks": len(api.injected(nets[OURS])),
        "seconds": {kind: measure.spread(taken)["median"] for kind, taken in times.items()},
    }  # fmt: skip


def _row(name: str, data: Data, found: Mapping[str, Any]) -> Figures:
    return {
        "network": name, "batch": data.batch, "format": data.format, "dtype": data.dtype, "blocks": found["blocks"],
        "seconds": {kind: value["median"] for kind, value in found["seconds"].items()},
        "peak": found["peak"], "over_bare": found["over_bare"], "over_theirs": found["over_theirs"],
    }  # fmt: skip
