"""`attninject bench blocks`: every block forward and backward, beside timm's modules and the papers' formulas.

All contenders hold the same weights and run in turn on the same map; before that they must agree in outputs and
in gradients, or the peer is left out and the table says so. The gradient of the output is given, parameters
require grad, and so does the map, as in the middle of a network.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from attninject.bench import measure
from attninject.blocks import gpu, registry
from attninject.blocks.fast import dispatch
from attninject.wording import first_line

from .measure import Work
from .peers import SUBJECTS, Subject

SIZES = {
    "cpu": ((8, 256, 56, 56), (8, 1024, 14, 14), (2, 64, 28, 28)),
    "cuda": ((128, 256, 56, 56), (256, 1024, 14, 14), (8, 64, 28, 28)),
}
"""Maps by device: two of a resnet's, far beyond the caches, and a small one."""
PAIRWISE_BATCH = {"cpu": 1, "cuda": 8}
"""Samples of a pairwise block on a map of more than `MANY` positions: time grows with their square."""
MANY = 1024
SMALL = 500_000
"""Elements up to which a map counts as small."""
FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
AGREEMENT = {torch.float32: 1e-3, torch.bfloat16: 6e-2, torch.float16: 1e-2}
"""How far a peer may be from ours (`distance`); in float32 on a card ten times as far, where convolutions run in tf32."""
OURS, PLAIN, COMPILED, THEIRS_COMPILED = "ours", "ours plain", "ours compiled", "timm compiled"
KERNELS = "ours by kernels"


@dataclass(frozen=True)
class Case:
    """One map that one block is measured on."""

    name: str
    size: tuple[int, ...]
    format: str
    dtype: str
    device: str

    @property
    def subject(self) -> Subject:
        """What is measured."""
        return SUBJECTS[self.name]

    @property
    def label(self) -> str:
        """`8×256×56×56`."""
        return "×".join(map(str, self.size))

    @property
    def small(self) -> bool:
        """Whether overhead rather than memory is what counts."""
        elements = torch.Size(self.size).numel()
        return elements < SMALL

    def tensor(self, seed: int) -> Tensor:
        """Random numbers of the case's size, dtype and memory format."""
        generator = torch.Generator(self.device).manual_seed(seed)
        made = torch.randn(self.size, generator=generator, device=self.device)
        return made.to(DTYPES[self.dtype], memory_format=FORMATS[self.format])


def blocks(
    *,
    device: str = "cpu",
    dtypes: Sequence[str] | None = None,
    only: Iterable[str] | None = None,
    sizes: Sequence[tuple[int, ...]] | None = None,
    formats: Sequence[str] = tuple(FORMATS),
    rounds: int = 9,
    threads: int = 1,
    compiled: bool = False,
    seconds: float = 3.0,
    progress: Callable[[str], Any] = lambda line: None,
) -> dict[str, Any]:
    """Measure; times in seconds, sizes in bytes.

    Args:
        device: `cpu` or `cuda`.
        dtypes: of map and weights; by default float32, and on a GPU bfloat16 too.
        only: names of rows; all by default.
        sizes: of the map; by default `SIZES`, cut for pairwise blocks (`PAIRWISE_BATCH`).
        formats: of `FORMATS`.
        rounds: per figure, at most.
        threads: within an operation.
        compiled: measure our plain form compiled by inductor too; slow to compile.
        seconds: after so many for a case, three rounds must do.
        progress: told a line per case.
    """
    began = time.perf_counter()
    with measure.threads(threads):
        about = {
            **measure.machine(device),
            "rounds": rounds,
            "copy_bandwidth": measure.copy_bandwidth(device),
        }
        names = list(SUBJECTS if only is None else only)
        rows = []
        for case in _cases(names, sizes, formats, dtypes, device):
            rows.append(measured(case, rounds, compiled, seconds))
            progress(_progress(rows[-1]))
    return {"machine": about, "rows": rows, "summary": summary(rows), "took": time.perf_counter() - began}


def _cases(
    names: Iterable[str],
    sizes: Sequence[tuple[int, ...]] | None,
    formats: Sequence[str],
    dtypes: Sequence[str] | None,
    device: str,
) -> list[Case]:
    dtypes = dtypes or (("float32", "bfloat16") if device == "cuda" else ("float32",))
    return [
        Case(name, size if sizes else cut(size, SUBJECTS[name], device), memory_format, dtype, device)
        for dtype in dtypes
        for size in sizes or SIZES[device]
        for name in names
        for memory_format in formats
    ]


def cut(size: tuple[int, ...], subject: Subject, device: str) -> tuple[int, ...]:
    """The map; of a pairwise block fewer samples of it, as its time grows with the square of the positions."""
    positions = torch.Size(size[2:]).numel()
    if not subject.pairwise or positions <= MANY:
        return size
    return (min(size[0], PAIRWISE_BATCH[device]), *size[1:])


# --- one case -----------------------------------------------------------------------------------


def measured(
    case: Case, rounds: int, compiled: bool = False, enough: float = 2.0, forms: bool = False
) -> dict[str, Any]:
    """All figures of one case; `forms`: ours is the lean form, whatever the size, and the kernels stand beside it."""
    x, gradient = case.tensor(0).requires_grad_(), case.tensor(1)
    modules, skipped = contenders(case, compiled)
    if forms:
        take_forms(modules, skipped, x)
    difference = differences(modules, skipped, x, gradient)
    works = {name: step(module, x, gradient) for name, module in modules.items()}
    times = measure.interleaved(works, rounds, case.device, enough=enough)
    return {
        "block": case.name,
        "size": list(case.size),
        "format": case.format,
        "dtype": case.dtype,
        "small": case.small,
        "rounds": len(times[OURS]),
        "seconds": {name: measure.spread(taken) for name, taken in times.items()},
        "peer_over_ours": {
            name: measure.ratios(taken, times[OURS]) for name, taken in times.items() if name != OURS
        },
        "map_bytes": x.nbytes,
        "saved": {name: measure.saved_bytes(partial(m, x), m.parameters()) for name, m in modules.items()},
        "peak": {name: measure.peak_bytes(work, case.device) for name, work in works.items()},
        "floor_bytes": None if case.subject.floor is None else case.subject.floor * x.nbytes,
        "difference": difference,
        "skipped": skipped,
    }


def differences(
    modules: dict[str, nn.Module], skipped: dict[str, str], x: Tensor, gradient: Tensor
) -> dict[str, float]:
    """How far each is from ours; who cannot run on this map or computes something else goes, and `skipped` says why."""
    ours = results(modules[OURS], x, gradient)
    most = AGREEMENT[x.dtype] * (10 if x.is_cuda and x.dtype == torch.float32 else 1)
    found = {}
    for name in [name for name in modules if name != OURS]:
        try:
            found[name] = distance(ours, results(modules[name], x, gradient))
        except Exception as error:
            skipped[name] = f"{type(error).__name__}: {first_line(error)}"
            del modules[name]
            continue
        if not found[name] <= most:
            skipped[name] = f"computes something else, off by {found[name]:.2g}"
            del modules[name]
    return found


def contenders(case: Case, compiled: bool = False) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Modules in train mode with the same weights, ours first; and who is left out, with the reason."""
    subject, channels = case.subject, case.size[1]
    ours = scrambled(registry.create_block(subject.block, channels, init="paper", **subject.args))
    found, skipped = {OURS: ours}, {}
    spec = registry.get(subject.block)
    if "backend" in spec.cls.options:  # type: ignore[attr-defined]
        found[PLAIN] = _plain(subject, channels, ours)
    if compiled:
        found[COMPILED] = _plain(subject, channels, ours)
    for name, peer in subject.peers.items():
        try:
            found[name] = peer.made(channels, ours)
        except ImportError as error:
            skipped[name] = f"not installed ({error.name})"
    like = {"device": case.device, "dtype": DTYPES[case.dtype], "memory_format": FORMATS[case.format]}
    found = {name: module.to(**like).train() for name, module in found.items()}  # type: ignore[call-overload]
    if compiled:
        found[COMPILED] = torch.compile(found[COMPILED])  # type: ignore[assignment]
        if "timm" in found:
            found[THEIRS_COMPILED] = torch.compile(found["timm"])  # type: ignore[assignment]
    return found, skipped


class Taking(nn.Module):
    """A block that takes one of its forms at every size."""

    def __init__(self, block: nn.Module, form: str) -> None:
        super().__init__()
        self.block, self.form = block, form

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, *S) → the block's result."""
        with dispatch.backend(self.form):
            y: Tensor = self.block(x)
            return y


def take_forms(modules: dict[str, nn.Module], skipped: dict[str, str], x: Tensor) -> None:
    """Ours becomes the lean form whatever the size, plain the definition; the kernels come beside them."""
    ours = modules[OURS]
    if PLAIN not in modules:
        return
    modules[OURS], modules[PLAIN] = Taking(ours, "fast"), Taking(modules[PLAIN], "plain")
    if gpu.serves(x):
        modules[KERNELS] = Taking(copy.deepcopy(ours), "kernels")
    else:
        why = gpu.trouble(x.device) if x.is_cuda else "Triton runs on a CPU only in its interpreter"
        skipped[KERNELS] = why or "not for such maps"


def _plain(subject: Subject, channels: int, ours: nn.Module) -> nn.Module:
    """Our block's readable definition, with the same weights."""
    spec = registry.get(subject.block)
    more: dict[str, Any] = {"backend": "plain"} if "backend" in spec.cls.options else {}  # type: ignore[attr-defined]
    module = registry.create_block(subject.block, channels, init="paper", **subject.args, **more)
    module.load_state_dict(ours.state_dict())
    return module


def scrambled(module: nn.Module, seed: int = 0) -> nn.Module:
    """The same module with weights of a trained net's size: published ones often start at zero."""
    generator = torch.Generator().manual_seed(seed)
    norms = {id(m.weight) for m in module.modules() if isinstance(m, (nn.LayerNorm, nn.BatchNorm2d))}
    with torch.no_grad():
        for p in module.parameters():
            center = 1.0 if id(p) in norms else 0.0
            deviation = 0.2 if p.ndim < 2 else p[0].numel() ** -0.5
            p.copy_(center + deviation * torch.randn(p.shape, generator=generator))
    return module


def step(module: nn.Module, x: Tensor, gradient: Tensor) -> Work:
    """Forward and backward, as a function; no gradient is left behind."""
    wanted = [x, *(p for p in module.parameters() if p.requires_grad)]

    def run() -> None:
        module(x).backward(gradient)
        for tensor in wanted:
            tensor.grad = None

    return run


def results(module: nn.Module, x: Tensor, gradient: Tensor) -> list[Tensor]:
    """Output, and the map's gradient."""
    y = module(x)
    (grad,) = torch.autograd.grad(y, x, gradient)
    return [y.detach(), grad]


def distance(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """How far results are apart, in units of the size of ours; both as root mean squares.

    Not by the largest number: where a maximum or a relu's corner falls on another element by rounding, single
    gradients move although both are right.
    """
    pairs = zip(ours, theirs, strict=True)
    made: float = max(((a - b).double().norm() / a.double().norm()).item() for a, b in pairs)
    return made


# --- summary ------------------------------------------------------------------------------------


def peers_of(row: Mapping[str, Any]) -> list[str]:
    """Who was measured beside ours and is not ours, as it is without a compiler."""
    return [name for name in row["seconds"] if not name.startswith(OURS) and name != THEIRS_COMPILED]


def fastest_peer(row: Mapping[str, Any]) -> str | None:
    """The peer with the smallest median time."""
    return min(peers_of(row), key=lambda name: row["seconds"][name]["median"], default=None)


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Geometric means of (fastest peer's time / ours): overall, per block, and on small maps."""

    def mean(chosen: Iterable[Mapping[str, Any]]) -> float | None:
        values = [r["peer_over_ours"][peer]["median"] for r in chosen if (peer := fastest_peer(r))]
        return measure.geometric_mean(values)

    large, small = [r for r in rows if not r["small"]], [r for r in rows if r["small"]]
    names = dict.fromkeys(r["block"] for r in rows)
    return {
        "large": mean(large),
        "small": mean(small),
        "blocks": {name: mean(r for r in large if r["block"] == name) for name in names},
        "blocks_small": {name: mean(r for r in small if r["block"] == name) for name in names},
        "worst_large": _worst(large),
        "worst_small": _worst(small),
    }


def _worst(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any] | None:
    found = [(r["peer_over_ours"][peer]["median"], r) for r in rows if (peer := fastest_peer(r))]
    if not found:
        return None
    ratio, row = min(found, key=lambda pair: pair[0])
    return {"ratio": ratio, "block": row["block"], "size": row["size"], "format": row["format"]}


def _progress(row: Mapping[str, Any]) -> str:
    peer = fastest_peer(row)
    ratio = f"{row['peer_over_ours'][peer]['median']:.2f} × {peer}" if peer else "no peer"
    return f"{row['block']} {_size(row)} {row['format']} {row['dtype']}: {ratio}"


# --- words --------------------------------------------------------------------------------------


def to_markdown(result: Mapping[str, Any], details: bool = False) -> str:
    """The figures as Markdown: what was run, a table per dtype; with `details` one per size with every peer."""
    rows = result["rows"]
    parts = [_about(result)]
    for dtype in dict.fromkeys(r["dtype"] for r in rows):
        parts.append(_overview([r for r in rows if r["dtype"] == dtype], result["machine"]))
    parts.append(_reading(result))
    if details:
        tables: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
        for row in rows:
            tables.setdefault((row["dtype"], row["small"], tuple(row["size"][1:])), []).append(row)
        parts += [_table(chosen, result["machine"]) for chosen in tables.values()]
    return "\n\n".join(parts)


def _about(result: Mapping[str, Any]) -> str:
    about = result["machine"]
    return (
        machine_line(about)
        + f" Forward and backward; the fastest peer's time over ours within the same round (above 1 ours is faster), "
        f"medians of up to {about['rounds']} interleaved rounds, quartiles in brackets. A copy of a large tensor "
        f"moves {about['copy_bandwidth'] / 1e9:.1f} GB/s. The run took {result['took'] / 60:.1f} minutes."
    )


def machine_line(about: Mapping[str, Any]) -> str:
    """Versions, device, threads, clock and allocator in a few sentences."""
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    cost = about["fresh_page_cost"]
    settings = ", ".join(f"{k}={v}" for k, v in about["allocator"].items()) or "the system's defaults"
    clock = "GPU time" if cost is None else "CPU time" if about["threads"] == 1 else "wall time"
    pages = (
        ""
        if cost is None
        else f" Filling 25 MB takes {cost['fresh']:.1f} ms in memory just allocated, {cost['used']:.1f} ms in "
        "memory in use."
    )
    plural = "" if about["threads"] == 1 else "s"
    return (
        f"{versions}, Python {about['python']}; {about['device']}, {about['threads']} thread{plural}, {clock}. "
        f"Allocator: {settings}.{pages}"
    )


def _overview(rows: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> str:
    """A line per block: the ratio to the fastest peer on each map, and memory and bandwidth on the first."""
    maps = {(tuple(r["size"][1:]), r["format"]): r["small"] for r in rows}
    heads = [f"{'×'.join(map(str, size))} {memory_format}" for size, memory_format in maps]
    lines = [
        f"| {rows[0]['dtype']} | {' | '.join(heads)} | saved | peak | of copy |",
        f"|---|{'--:|' * (len(heads) + 3)}",
    ]
    for name in dict.fromkeys(r["block"] for r in rows):
        mine = {(tuple(r["size"][1:]), r["format"]): r for r in rows if r["block"] == name}
        first = next(iter(mine.values()))
        cells = [_against(mine[one]) if one in mine else "–" for one in maps]
        best = fastest_peer(first)
        cells += [_in_maps(first, "saved", best), _in_maps(first, "peak", best), _of_copy(first, about)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    means = [
        summary([r for r in rows if (tuple(r["size"][1:]), r["format"]) == one])[_kind(small)]
        for one, small in maps.items()
    ]
    cells = ["–" if mean is None else f"**{mean:.2f}**" for mean in means]
    lines.append(f"| geometric mean | {' | '.join(cells)} | | | |")
    return "\n".join(lines)


def _kind(small: bool) -> str:
    return "small" if small else "large"


def _size(row: Mapping[str, Any]) -> str:
    return "×".join(map(str, row["size"]))


def _against(row: Mapping[str, Any]) -> str:
    """`1.85 [1.80, 1.90] timm`: the fastest peer's time over ours."""
    peer = fastest_peer(row)
    return "–" if peer is None else f"{_spread(row['peer_over_ours'][peer])} {peer}"


def _reading(result: Mapping[str, Any]) -> str:
    """Overall means, how to read the tables, and who is missing where."""
    found, rows = result["summary"], result["rows"]
    lines = []
    for kind, label in (("large", "Large maps"), ("small", "Maps under 0.5 M elements")):
        worst = found[f"worst_{kind}"]
        if worst is not None:
            where = f"{worst['block']}, {_size(worst)}, {worst['format']}"
            lines.append(
                f"{label}: geometric mean over all blocks and formats {found[kind]:.2f}, worst {worst['ratio']:.2f} "
                f"({where})."
            )
    lines.append(
        "Saved for backward, and peak of tensors alive at once beyond the map and its output's gradient: ours : the "
        "fastest peer's, in units of the map, on the first map. Of copy: the share of the copy's bandwidth that ours "
        "reaches there, counting only the least traffic possible; – where arithmetic bounds the block."
    )
    usual = dict.fromkeys(_size(r) for r in rows if not SUBJECTS[r["block"]].pairwise)
    others = dict.fromkeys(f"{r['block']} {_size(r)}" for r in rows if _size(r) not in usual)
    lines.append(f"Maps: {', '.join([*usual, *others])}.")
    return " ".join(lines) + "".join(f"\n\n{note}" for note in _notes(rows))


def _table(rows: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> str:
    sizes = dict.fromkeys(map(_size, rows))
    peers = list(dict.fromkeys(name for r in rows for name in r["seconds"] if name != OURS))
    heads = [*(f"{name} / ours" for name in peers), "saved", "peak", "of copy"]
    lines = [
        f"### {' and '.join(sizes)}, {rows[0]['dtype']}",
        "",
        f"| block | format | ours, ms | {' | '.join(heads)} |",
        f"|---|---|--:|{'--:|' * len(heads)}",
    ]
    lines += [_line(row, peers, about) for row in rows]
    return "\n".join(lines)


def _line(row: Mapping[str, Any], peers: Sequence[str], about: Mapping[str, Any]) -> str:
    time_of = row["seconds"][OURS]
    cells = [row["block"], row["format"], _spread(time_of, 1e3)]
    found = row["peer_over_ours"]
    best = fastest_peer(row)
    for name in peers:
        text = _spread(found[name]) if name in found else "–"
        cells.append(f"**{text}**" if name == best else text)
    cells += [_in_maps(row, "saved", best), _in_maps(row, "peak", best), _of_copy(row, about)]
    return f"| {' | '.join(cells)} |"


def _of_copy(row: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    """The share of a copy's bandwidth that ours reaches, counting only the least traffic possible."""
    if row["floor_bytes"] is None:
        return "–"
    return f"{row['floor_bytes'] / row['seconds'][OURS]['median'] / about['copy_bandwidth']:.0%}"


def _spread(found: Mapping[str, float], unit: float = 1.0) -> str:
    low, middle, high = (unit * found[key] for key in ("q1", "median", "q3"))
    digits = max(0, 2 - len(str(int(middle)))) if unit != 1.0 else 2
    return f"{middle:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def _in_maps(row: Mapping[str, Any], what: str, peer: str | None) -> str:
    """Ours and the fastest peer's, in units of the map."""
    ours = row[what][OURS] / row["map_bytes"]
    return f"{ours:.2f}" if peer is None else f"{ours:.2f} : {row[what][peer] / row['map_bytes']:.2f}"


def _notes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Who is missing where, and why."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for name, reason in row["skipped"].items():
            reasons.setdefault((name, reason), []).append(f"{row['block']} ({row['format']})")
    lines = []
    for (name, reason), where in reasons.items():
        places = "" if reason.startswith("not installed") else f" in {', '.join(dict.fromkeys(where))}"
        lines.append(f"Left out: {name}{places}: {reason}.")
    return lines
