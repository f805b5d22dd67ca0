"""Figures of a card in words: tables, the verdict against the goals, and what is missing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from attninject.bench.block_speed import COMPILED, KERNELS, OURS, PLAIN, THEIRS_COMPILED
from attninject.bench.measure import geometric_mean
from attninject.blocks.fast import crossover
from attninject.wording import markdown_table

from . import sheet

BANDWIDTH = {
    **dict.fromkeys(("se", "channel_attention", "spatial_attention", "cbam", "eca", "gc", "scse"), 0.8),
    **dict.fromkeys(("bam", "coord"), 0.6),
}
"""Block → the least share of copy bandwidth at floor traffic."""
OVER_TIMM, OVER_COMPILED = 2.0, 1.0
PRICES = {"resnet50 + SE": 0.05, "resnet50 + CBAM": 0.12}
"""Network → the most that blocks may add to a bf16 training step."""
BUSY = 0.9

Row = Mapping[str, Any]


def to_markdown(folder: Path) -> str:
    """Everything that a folder's sheet holds.

    Raises:
        DataError: no sheet is there.
    """
    rows = sheet.read(folder)
    about: Row = next((r for r in reversed(rows) if r["part"] == "about"), {})
    newest = {(r["part"], r["name"]): r for r in rows if "error" not in r and "left_out" not in r}
    good = list(newest.values())
    bandwidth = next(
        (r["bytes_per_second"] for r in good if r["part"] == "ceilings" and r["name"] == "copy"), None
    )
    parts = [
        _about(about), _ceilings(good), _truth(good), _blocks(good, bandwidth), _crossovers(good),
        _networks(good), _engine(good),
        "\n".join(["Goals:", "", *(f"- {line}" for line in verdict(good, bandwidth))]), _missing(rows, about),
    ]  # fmt: skip
    return "\n\n".join(part for part in parts if part)


def verdict(good: Sequence[Row], bandwidth: float | None) -> Iterator[str]:
    """A line per goal: met, missed and by how much, or not measured."""
    cases = [r for r in good if r["part"] == "blocks" and "floor_bytes" in r]
    for least in (0.8, 0.6):
        names = [name for name, share in BANDWIDTH.items() if share == least]
        shares = [(_share(r, bandwidth), r) for r in cases if r["block"] in names and bandwidth and _large(r)]
        yield _goal(f"share of copy bandwidth of {', '.join(names)}", least, shares, "{:.0%}".format)
    timm = [(r["seconds"]["timm"] / _ours(r), r) for r in cases if "timm" in r["seconds"] and _large(r)]
    yield _goal("times as fast as timm, eager", OVER_TIMM, timm, "{:.2f}".format)
    against = [
        (r["seconds"][THEIRS_COMPILED] / min(_ours(r), r["seconds"].get(COMPILED, _ours(r))), r)
        for r in cases if THEIRS_COMPILED in r["seconds"]
    ]  # fmt: skip
    yield _goal("times as fast as timm, compiled", OVER_COMPILED, against, "{:.2f}".format)
    for name, most in PRICES.items():
        found = [
            r for r in good if r["part"] == "networks" and r["network"] == name and r["dtype"] == "bfloat16"
        ]
        eager = [r["over_bare"][OURS]["median"] - 1 for r in found if "over_bare" in r]
        said = f"{eager[0]:+.1%}, {'met' if eager[0] <= most else 'missed'}" if eager else "not measured"
        yield f"price of {name} in a bf16 step at most {most:.0%}: {said}"
    busy = [r["busy"] for r in good if r["part"] == "engine" and "busy" in r]
    said = f"{busy[0]:.0%}, {'met' if busy[0] >= BUSY else 'missed'}" if busy else "not measured"
    yield f"training from JPEGs at {BUSY:.0%} of the speed from memory: {said}"


def _goal(what: str, least: float, found: Sequence[tuple[float, Row]], show: Any) -> str:
    """The geometric mean and the worst case of a ratio against its goal."""
    if not found:
        return f"{what}, at least {show(least)}: not measured"
    worst, row = min(found, key=lambda pair: pair[0])
    mean = geometric_mean(value for value, _ in found)
    where = f"{row['block']} {_size(row)} {row['format']} {row['dtype']}"
    said = "met" if worst >= least else f"missed in {sum(v < least for v, _ in found)} of {len(found)} cases"
    return f"{what}, at least {show(least)}: mean {show(mean)}, worst {show(worst)} ({where}): {said}"


# --- the parts ---------------------------------------------------------------------------------


def _about(about: Row) -> str:
    if not about:
        return "The sheet does not say which machine it comes from."
    versions = ", ".join(f"{name} {found}" for name, found in about["versions"].items())
    return (
        f"{about['device']}; {versions}, Python {about['python']}; {about['minutes']:g} minutes were given."
    )


def _ceilings(good: Iterable[Row]) -> str:
    said = []
    for r in good:
        if r["part"] == "ceilings" and "bytes_per_second" in r:
            said.append(f"a copy moves {r['bytes_per_second'] / 1e9:,.0f} GB/s")
        elif r["part"] == "ceilings":
            said.append(f"a {r['name']} runs at {r['operations_per_second'] / 1e12:.3g} TFLOP/s")
    return f"Ceilings: {', '.join(said)}." if said else ""


def _truth(good: Iterable[Row]) -> str:
    lines = []
    for r in good:
        if r["part"] == "truth" and "counts" in r:
            counts = (
                ", ".join(f"{number} {word}" for word, number in sorted(r["counts"].items())) or "no test ran"
            )
            lines += [f"- {r['name']}: {counts}{'' if r['complete'] else ' (cut off)'}"]
            lines += [f"  - {line}" for line in r["failures"]]
    return "\n".join(["Tests on the device:", "", *lines]) if lines else ""


def _blocks(good: Iterable[Row], bandwidth: float | None) -> str:
    rows = [r for r in good if r["part"] == "blocks" and "seconds" in r]
    if not rows:
        return ""
    head = (
        "block", "map", "format", "dtype", "lean, ms", "kernels, ms", "of copy", "plain / ours", "timm / ours",
        "timm compiled / ours", "saved: ours / timm",
    )  # fmt: skip
    cells = [
        [r["block"], _size(r), r["format"], r["dtype"], *(_milliseconds(r, name) for name in (OURS, KERNELS)),
         f"{_share(r, bandwidth):.0%}" if bandwidth and r["floor_bytes"] else "–",
         _over(r, PLAIN), _over(r, "timm"), _over(r, THEIRS_COMPILED), _saved(r)]
        for r in rows
    ]  # fmt: skip
    reasons = dict.fromkeys(r["skipped"][KERNELS] for r in rows if KERNELS in r.get("skipped", ()))
    left_out = [f"Kernels left out: {'; '.join(reasons)}."] if reasons else []
    return "\n\n".join([markdown_table(head, cells), *left_out])


def _crossovers(good: Iterable[Row]) -> str:
    """From how many elements on a form is taken on this card."""
    rows = [(r, crossover.thresholds(r["sizes"])) for r in good if r.get("sizes")]
    cells = [
        [r["block"], r["format"], r["dtype"], f"{max(int(s['elements']) for s in r['sizes']):,}",
         *("never" if n is None else f"{n:,}" for n in (found.lean, found.kernels))]
        for r, found in rows
    ]  # fmt: skip
    head = ("block", "format", "dtype", "measured up to, elements", "lean from", "kernels from")
    return markdown_table(head, cells) if cells else ""


def _networks(good: Iterable[Row]) -> str:
    rows = [r for r in good if r["part"] == "networks"]
    if not rows:
        return ""
    head = ("network", "kind", "dtype", "images/s", "of the bare backbone", "ours / timm, time")
    cells = []
    for r in rows:
        ours, bare, theirs = (r["seconds"][kind] for kind in ("ours", "bare", "timm"))
        kind = "eager" if "over_bare" in r else "compiled"
        cells.append(
            [
                r["network"],
                kind,
                r["dtype"],
                f"{r['batch'] / ours:,.0f}",
                f"{bare / ours:.3f}",
                f"{ours / theirs:.3f}",
            ]
        )
    return markdown_table(head, cells)


def _engine(good: Iterable[Row]) -> str:
    lines = []
    for r in good:
        if r["part"] == "engine":
            said = ", ".join(
                f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                for key, value in r.items() if key not in ("part", "name", "took")
            )  # fmt: skip
            lines.append(f"- {r['name']}: {said}")
    return "\n".join(["Fine-tuning:", "", *lines]) if lines else ""


def _missing(rows: Sequence[Row], about: Row) -> str:
    """What was to be measured and was not, with the reason."""
    done = {(r["part"], r["name"]) for r in rows if "error" not in r and "left_out" not in r}
    reasons = {
        (r["part"], r["name"]): r.get("error", r.get("left_out"))
        for r in rows
        if "error" in r or "left_out" in r
    }
    lines = [
        f"- {part}: {name}: {reasons.get((part, name), 'cut off before')}"
        for part, name in about.get("tasks", ()) if (part, name) not in done
    ]  # fmt: skip
    return "\n".join([f"Missing, {len(lines)} of {len(about['tasks'])}:", "", *lines]) if lines else ""


def _ours(row: Row) -> float:
    """The faster of the lean form and the kernels."""
    made: float = min(row["seconds"][name] for name in (OURS, KERNELS) if name in row["seconds"])
    return made


def _milliseconds(row: Row, name: str) -> str:
    return f"{1e3 * row['seconds'][name]:.3g}" if name in row["seconds"] else "–"


def _share(row: Row, bandwidth: float | None) -> float:
    return row["floor_bytes"] / _ours(row) / bandwidth if bandwidth and row["floor_bytes"] else 0.0


def _large(row: Row) -> bool:
    return bool(row["map_bytes"] > 50 * 2**20)


def _over(row: Row, name: str) -> str:
    return f"{row['seconds'][name] / _ours(row):.2f}" if name in row["seconds"] else "–"


def _saved(row: Row) -> str:
    return f"{row['saved'][OURS] / row['saved']['timm']:.2f}" if "timm" in row["saved"] else "–"


def _size(row: Row) -> str:
    return "×".join(map(str, row["size"]))
