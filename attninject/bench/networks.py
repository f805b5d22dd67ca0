"""`attninject bench models`: training steps of whole networks, ours beside timm's modules and the bare backbone.

Both networks are the same function with the same weights, which is checked before anything is measured: timm's
modules stand in timm's own slot behind the last batch norm of a residual block, through `attn_layer` or set by
hand where only some blocks have one; on a network without such a slot they hang where ours hang.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from attninject import api, compiling, models
from attninject.bench import measure, peers

from .block_speed import DTYPES, FORMATS, machine_line, scrambled
from .measure import Work

BATCH = {"cpu": (8, 128), "cuda": (128, 224)}
"""Samples and side of the images, by device."""
OURS, THEIRS, BARE, COMPILED = "ours", "timm", "bare", "ours compiled"
AGREEMENT = 1e-3


@dataclass(frozen=True)
class Network:
    """One network with blocks: our rule, timm's form, and our block's weights in timm's words."""

    backbone: str
    rule: Mapping[str, Any]
    theirs: Callable[[], nn.Module]
    how: str
    weights: Callable[[peers.State], peers.State] = dict
    side: int = 64
    """Of the images on which ours and timm's are compared before they are measured."""

    def ours(self) -> nn.Module:
        """Our blocks in the backbone."""
        return api.inject(models.build(self.backbone), init="paper", **self.rule)


def _attn_layer(name: str) -> Callable[[], nn.Module]:
    return lambda: models.build("timm/resnet50", block_args={"attn_layer": name})


def _five_nonlocal() -> nn.Module:
    model: Any = models.build("timm/resnet50")
    for stage, channels, numbers in ((model.layer2, 512, (1, 3)), (model.layer3, 1024, (1, 3, 5))):
        for number in numbers:
            stage[number].se = peers.SUBJECTS["nonlocal"].peers["timm"].build(channels)
    made: nn.Module = model
    return made


def _convnext_gc() -> nn.Module:
    args = {"rd_ratio": 1 / 16}
    return api.inject(
        models.build("timm/convnext_tiny"),
        block="timm/gca", place="residual_branch", name="gc", init="paper", args=args,
    )  # fmt: skip


LAST_NORM = "layer[1-4].*.bn3"
NETWORKS: dict[str, Network] = {
    "resnet50 + SE": Network(
        "timm/resnet50",
        {"block": "se", "after": LAST_NORM},
        _attn_layer("se"),
        "attn_layer",
    ),
    "resnet50 + CBAM": Network(
        "timm/resnet50",
        {"block": "cbam", "after": LAST_NORM, "name": "se", "args": {"bias": False}},
        _attn_layer("cbam"),
        "attn_layer",
        peers.SUBJECTS["cbam"].peers["timm"].weights,
    ),
    "resnet50 + 5 Non-Local": Network(
        "timm/resnet50",
        {"block": "nonlocal", "after": ["layer2.[13].bn3", "layer3.[135].bn3"], "name": "se"},
        _five_nonlocal,
        "its slot of five blocks",
        peers.SUBJECTS["nonlocal"].peers["timm"].weights,
    ),
    "convnext_tiny + GC": Network(
        "timm/convnext_tiny",
        {"block": "gc", "place": "residual_branch"},
        _convnext_gc,
        "hung where ours hang",
    ),
}
"""Row → network."""


def networks(
    *,
    device: str = "cpu",
    only: Iterable[str] | None = None,
    batch: int | None = None,
    image: int | None = None,
    formats: Sequence[str] = ("NCHW",),
    dtypes: Sequence[str] | None = None,
    rounds: int = 9,
    threads: int = 1,
    compiled: bool = False,
    seconds: float = 45.0,
    progress: Callable[[str], Any] = lambda line: None,
) -> dict[str, Any]:
    """Measure; see `bench_blocks.blocks` for the arguments. A dtype below float32 is autocast's."""
    began = time.perf_counter()
    samples, side = batch or BATCH[device][0], image or BATCH[device][1]
    dtypes = dtypes or (("float32", "bfloat16") if device == "cuda" else ("float32",))
    with measure.threads(threads):
        about = {**measure.machine(device), "rounds": rounds, "batch": samples, "image": side}
        rows = []
        for dtype in dtypes:
            for memory_format in formats:
                for name in NETWORKS if only is None else only:
                    data = Data(samples, side, memory_format, dtype, device)
                    rows.append(
                        {"network": name, **measured(NETWORKS[name], data, rounds, compiled, seconds)}
                    )
                    progress(_progress(rows[-1]))
    return {"machine": about, "rows": rows, "took": time.perf_counter() - began}


@dataclass(frozen=True)
class Data:
    """What the networks are trained on, and how."""

    batch: int
    image: int
    format: str
    dtype: str
    device: str

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Fixed random images, and labels."""
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(self.batch, 3, self.image, self.image, generator=generator)
        labels = torch.arange(self.batch)
        return images.to(self.device).to(memory_format=FORMATS[self.format]), labels.to(self.device)


# --- one network --------------------------------------------------------------------------------


def measured(
    network: Network, data: Data, rounds: int, compiled: bool = False, enough: float = 45.0
) -> dict[str, Any]:
    """All figures of one network."""
    nets = contenders(network)
    off = distance(nets[OURS], nets[THEIRS], min(data.image, network.side))
    if not off <= AGREEMENT:
        raise AssertionError(
            f"timm's network computes something else than ours: off by {off:.2g} of the largest logit"
        )
    if compiled:
        nets[COMPILED] = compiling.compile_blocks(contenders(network)[OURS])
    blocks = len(api.injected(nets[OURS]))
    works = {name: step(net, data) for name, net in nets.items()}
    times = measure.interleaved(works, rounds, data.device, enough=enough)
    return {
        "format": data.format,
        "dtype": data.dtype,
        "blocks": blocks,
        "how": network.how,
        "rounds": len(times[OURS]),
        "difference": off,
        "seconds": {name: measure.spread(taken) for name, taken in times.items()},
        "over_theirs": {
            name: measure.ratios(taken, times[THEIRS]) for name, taken in times.items() if name != THEIRS
        },
        "over_bare": {
            name: measure.ratios(taken, times[BARE]) for name, taken in times.items() if name != BARE
        },
        "peak": {name: measure.peak_bytes(work, data.device) for name, work in works.items()},
    }


def contenders(network: Network) -> dict[str, nn.Module]:
    """Ours, timm's with the same weights, and the backbone alone.

    All weights are as in a trained net: fresh ones zero the last norm of a branch, and no block would show.
    """
    ours = scrambled(network.ours())
    theirs = network.theirs()
    theirs.load_state_dict(translated(ours, network.weights))
    bare = models.build(network.backbone)
    bare.load_state_dict({k: v for k, v in ours.state_dict().items() if k in bare.state_dict()})
    return {OURS: ours, THEIRS: theirs, BARE: bare}


def translated(ours: nn.Module, weights: Callable[[peers.State], peers.State]) -> dict[str, torch.Tensor]:
    """The state of our network with every block's part in timm's words."""
    found = dict(ours.state_dict())
    for name in api.injected(ours):
        part = {
            key.removeprefix(f"{name}."): found.pop(key) for key in list(found) if key.startswith(f"{name}.")
        }
        found.update({f"{name}.{key}": value for key, value in weights(part).items()})
    return found


def distance(ours: nn.Module, theirs: nn.Module, side: int) -> float:
    """Largest difference of the logits of two networks in eval mode, in units of the largest of ours."""
    x = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        a, b = ours.eval()(x), theirs.eval()(x)
    made: float = ((a - b).abs().max() / a.abs().max()).item()
    return made


def step(model: nn.Module, data: Data) -> Work:
    """One step of SGD with momentum, as a function."""
    model.train().to(device=data.device, memory_format=FORMATS[data.format])  # type: ignore[call-overload]
    images, labels = data.tensors()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    low = data.dtype != "float32"

    def run() -> None:
        with torch.autocast(data.device, DTYPES[data.dtype] if low else None, enabled=low):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def _progress(row: Mapping[str, Any]) -> str:
    over = row["over_theirs"][OURS]["median"]
    return f"{row['network']} {row['format']} {row['dtype']}: {over:.3f} of timm's time"


# --- words --------------------------------------------------------------------------------------


def to_markdown(result: Mapping[str, Any], details: bool = False) -> str:
    """The figures as Markdown; `details` adds the times."""
    about = result["machine"]
    head = (
        machine_line(about)
        + f" Training steps (forward, loss, backward, SGD) on {about['batch']} images of {about['image']}×"
        f"{about['image']}; medians of the ratios within up to {about['rounds']} interleaved rounds, quartiles in "
        f"brackets; below 1 ours is faster or smaller. The run took {result['took'] / 60:.1f} minutes."
    )
    parts = [head, _ratios(result["rows"])]
    if details:
        parts.append(_times(result["rows"]))
    return "\n\n".join(parts)


def _ratios(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        "| network | blocks | timm's modules | time: ours / timm | peak: ours / timm | price of ours: time | memory "
        "| price of timm's: time | memory |",
        "|---|--:|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        for name in [n for n in (OURS, COMPILED) if n in row["seconds"]]:
            label = row["network"] + (" (compiled blocks)" if name == COMPILED else "")
            kind = (
                ""
                if (row["format"], row["dtype"]) == ("NCHW", "float32")
                else f", {row['format']} {row['dtype']}"
            )
            peak = row["peak"]
            cells = [
                label + kind,
                row["blocks"],
                row["how"],
                _spread(row["over_theirs"][name]),
                f"{peak[name] / peak[THEIRS]:.3f}",
                _price(row["over_bare"][name]["median"]),
                _price(peak[name] / peak[BARE]),
                _price(row["over_bare"][THEIRS]["median"]),
                _price(peak[THEIRS] / peak[BARE]),
            ]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    lines.append(
        "\nPeak: of tensors alive at once during a step, beyond parameters and momentum. Price: over the bare backbone."
    )
    return "\n".join(lines)


def _times(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = ["| network | contender | step, ms | peak, MiB |", "|---|---|--:|--:|"]
    for row in rows:
        for name, found in row["seconds"].items():
            low, middle, high = (1e3 * found[key] for key in ("q1", "median", "q3"))
            peak = row["peak"][name] / 2**20
            lines.append(f"| {row['network']} | {name} | {middle:.0f} [{low:.0f}, {high:.0f}] | {peak:.0f} |")
    return "\n".join(lines)


def _spread(found: Mapping[str, float]) -> str:
    return f"{found['median']:.3f} [{found['q1']:.3f}, {found['q3']:.3f}]"


def _price(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.0f} %"
