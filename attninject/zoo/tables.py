"""The zoo's rows as tables: Markdown by family, CSV by model and place, and a summary in figures."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

Row = dict[str, Any]
PLANNED = ("green", "bare")  # every promise holds; or all but those that the bare model does not keep either


def one_line(row: Row) -> str:
    """A row for the one who watches."""
    places = [f"{place} {_sites(entry)}" for place, entry in row.get("places", {}).items()]
    why = [] if row["status"] == "green" else reasons(row)
    said = "; ".join([*places, *(reason[:160] for reason in why[:3])])
    return f"{row['model']} {row['status']} ({row.get('device', '-')}): {said} · {row['seconds']} s"


def _sites(entry: dict[str, Any]) -> str:
    return f"{entry['graph']}+{entry['module']}" if "sites" in entry else entry["status"]


def reasons(row: Row) -> list[str]:
    """Why a row is not green: the error, or each check that did not pass."""
    if row.get("error"):
        return [row["error"]]
    said = []
    for place, entry in {**row.get("places", {}), "together": row.get("together", {})}.items():
        if entry.get("status") == "failed" and "checks" not in entry:
            said.append(f"{place}: {entry['error']}")
        for name, check in entry.get("checks", {}).items():
            if check["status"] != "ok":
                said.append(f"{place}, {name}: {check.get('detail', '')}")
    if row.get("places") and row["places"].get("stage_end", {}).get("status") == "absent":
        said.append(f"stage_end: {row['places']['stage_end']['error']}")
    return said


# --- figures -----------------------------------------------------------------------------------


def summary(rows: list[Row]) -> dict[str, Any]:
    """Figures over all rows."""
    placed = [r for r in rows if "places" in r]
    places = list(dict.fromkeys(p for r in placed for p in r["places"]))
    return {
        "models": len(rows),
        "status": dict(Counter(r["status"] for r in rows)),
        "with_values": sum(map(with_values, rows)),
        "places": {p: _place_figures([r["places"][p] for r in placed if p in r["places"]]) for p in places},
        "planning": _planning(placed),
    }


def _place_figures(entries: list[dict[str, Any]]) -> dict[str, Any]:
    sites = [e for e in entries if "sites" in e]
    reasons: Counter[str] = Counter()
    for entry in sites:
        reasons.update(entry["reasons"])
    return {
        "models": sum(e["status"] != "absent" for e in entries),
        "absent": sum(e["status"] == "absent" for e in entries),
        "green": sum(e["status"] in PLANNED for e in entries),
        "sites": sum(e["sites"] for e in sites),
        "graph": sum(e["graph"] for e in sites),
        "module": sum(e["module"] for e in sites),
        "reasons": dict(reasons.most_common()),
    }


def _planning(placed: list[Row]) -> dict[str, Any]:
    """The slowest plan of each model against the longer of its build and 0.3 s, where it was built for real."""
    ratios = {}
    for row in placed:
        seconds = [e["plan_seconds"] for e in row["places"].values() if "plan_seconds" in e]
        if seconds and row["device"] != "meta":
            ratios[row["model"]] = max(seconds) / max(row["build_seconds"], 0.3)
    slow = sorted((n for n in ratios if ratios[n] > 1), key=lambda n: -ratios[n])
    return {"models": len(ratios), "slower": {n: round(ratios[n], 2) for n in slow}}


# --- Markdown ----------------------------------------------------------------------------------


def to_markdown(rows: list[Row]) -> str:
    """The figures, the table by family, and each model that is not green with its reason."""
    figures = summary(rows)
    return "\n\n".join(part for part in (_figures(figures), _families(rows), _rest(rows)) if part)


def _figures(figures: dict[str, Any]) -> str:
    status, real = figures["status"], figures["with_values"]
    lines = [
        f"{figures['models']:,} models: "
        + ", ".join(f"{count:,} {_STATUS.get(name, name)}" for name, count in status.items())
        + f". With values {real:,}, by structure alone, on the meta device, {figures['models'] - real:,}."
    ]
    for place, found in figures["places"].items():
        share = f" ({100 * found['graph'] / found['sites']:.1f} %)" if found["sites"] else ""
        lines.append(
            f"- `{place}`: {found['green']:,} of {found['models']:,} models that have it, {found['sites']:,} sites, "
            f"{found['graph']:,} by local graph{share}{_at_module(found['reasons'])}"
        )
    planning = figures["planning"]
    if planning["models"]:
        lines.append(
            f"- planning took longer than the larger of building and 0.3 s on {len(planning['slower'])} of "
            f"{planning['models']:,} models"
            + "".join(f", {n} ({r} times)" for n, r in list(planning["slower"].items())[:5])
        )
    return "\n".join(lines)


def _at_module(reasons: dict[str, int], limit: int = 5) -> str:
    """Why the other sites are at the module, the classes left out."""
    kinds: Counter[str] = Counter()
    for reason, count in reasons.items():
        kinds[re.sub(r"^\w+: | \([^)]*\)", "", reason)] += count
    said = [f"{kind} ({count:,})" for kind, count in kinds.most_common(limit)]
    return f"; at the module: {'; '.join(said)}{'; …' if len(kinds) > limit else ''}" if said else ""


_STATUS = {
    "green": "green",
    "bare": "green but for what the bare model cannot do",
    "refused": "refused",
    "failed": "not green",
    "unbuildable": "that cannot be built",
}


def _families(rows: list[Row]) -> str:
    places = list(dict.fromkeys(p for r in rows for p in r.get("places", {})))
    groups: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda r: (not r["family"].startswith("torchvision"), r["family"])):
        groups.setdefault(row["family"], []).append(row)
    lines = [
        "<details><summary>By family: models planned, green, and green with values compared; sites by local graph + "
        "at the module</summary>",
        "",
        f"| family | models | planned | green | with values | {' | '.join(f'`{p}`' for p in places)} |",
        f"|---|--:|--:|--:|--:|{'--:|' * len(places)}",
    ]
    for family, members in groups.items():
        counts = [
            len(members),
            sum(_planned(r) for r in members),
            sum(r["status"] in PLANNED for r in members),
            sum(r["status"] in PLANNED and with_values(r) for r in members),
        ]
        cells = [*map(str, counts), *(_cell([r.get("places", {}).get(p) for r in members]) for p in places)]
        lines.append(f"| {family} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", "</details>"])


def _planned(row: Row) -> bool:
    return "sites" in row.get("places", {}).get("stage_end", {})


def _cell(entries: list[dict[str, Any] | None]) -> str:
    """Sites by local graph + at the module, summed over the family; – where no member has the place."""
    sites = [e for e in entries if e and "sites" in e]
    return f"{sum(e['graph'] for e in sites)} + {sum(e['module'] for e in sites)}" if sites else "–"


def _rest(rows: list[Row]) -> str:
    """Models that are not green, those with one reason together."""
    by_reason: dict[str, list[str]] = {}
    for row in rows:
        if row["status"] != "green":
            for reason in dict.fromkeys(_kinds(row)):
                by_reason.setdefault(_short(reason), []).append(row["model"])
    if not by_reason:
        return ""
    lines = ["| not fully green | reason |", "|---|---|"]
    for reason, names in sorted(by_reason.items(), key=lambda item: -len(item[1])):
        lines.append(f"| {_names(names)} | {reason.replace('|', '¦')} |")
    return "\n".join(lines)


def _kinds(row: Row) -> list[str]:
    """The reasons without what differs from model to model, where the model itself is the reason."""
    if row["status"] == "refused":
        return [
            "quantized: refused, with what to do instead" if "quantized" in row["error"] else row["error"]
        ]
    if row.get("error"):
        return [row["error"]]
    entries = [*row.get("places", {}).values(), row.get("together", {})]
    checks = [(name, c) for e in entries for name, c in e.get("checks", {}).items()]
    own = [f"{name}: {c.get('detail', '').partition(': ')[0]}" for name, c in checks if c["status"] == "bare"]
    return own + [
        reason for reason in reasons(row) if not any(reason.partition(", ")[2].startswith(o) for o in own)
    ]


def _short(reason: str, limit: int = 200) -> str:
    return reason if len(reason) <= limit else f"{reason[: limit - 1]}…"


def _names(names: list[str], limit: int = 12) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


# --- CSV ---------------------------------------------------------------------------------------

COLUMNS = ("model", "family", "status", "device", "parameters", "build_seconds", "place", "block", "place_status",
           "sites", "graph", "module", "plan_seconds", "reason")  # fmt: skip


def to_csv(rows: list[Row]) -> str:
    """A line per model and place."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        for place, entry in row.get("places", {"": {}}).items():
            line = {**row, "place": place, **{k: v for k, v in entry.items() if k != "status"}}
            writer.writerow({**line, "place_status": entry.get("status", ""), "reason": _why(row, entry)})
    return text.getvalue()


def _why(row: Row, entry: dict[str, Any]) -> str:
    failed = [
        f"{n}: {c.get('detail', '')}" for n, c in entry.get("checks", {}).items() if c["status"] != "ok"
    ]
    return "; ".join([*failed, *filter(None, (entry.get("error") or row.get("error"),))])


def with_values(row: Row) -> bool:
    """Whether outputs were compared, not structure alone."""
    return "places" in row and row["device"] == "cpu" and row["asked"]["level"] != "plan"


def strength(row: Row) -> tuple[bool, int]:
    """How much a row says: values before none, and the level."""
    return with_values(row), ("plan", "cheap", "full").index(row["asked"]["level"])


def strongest(rows: Iterable[Row]) -> list[Row]:
    """One row per model: the one that says most, the newest of those."""
    best: dict[str, Row] = {}
    for row in rows:
        if row["model"] not in best or strength(row) >= strength(best[row["model"]]):
            best[row["model"]] = row
    return sorted(best.values(), key=lambda r: r["model"])
