"""One row of the zoo: all that is found out about a model at every place, JSON-ready."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from attninject import models
from attninject.anatomy.places import PLACES
from attninject.errors import (
    AttnInjectError,
    LayoutError,
    NoSuchPlaceError,
    NoTensorError,
    ProbeError,
    UnsupportedModelError,
)
from attninject.files import installed_versions
from attninject.planning.planned_site import Site
from attninject.planning.support import refuse_unsupported
from attninject.zoo import guarantees, subjects

CHEAP = ("eval", "train", "gradient", "deepcopy", "pickle")
ON_META = ("eval", "deepcopy", "pickle")  # of these, what needs no values: calls, keys, copies
WITHOUT_GRID = "se"  # works in any layout: for where the block asked for needs a grid of positions
THOROUGH = (
    "stage_end",
    "residual_branch",
    "block_end",
)  # the copies are checked here, and what torch makes of it
ELSEWHERE = ("eval", "train", "gradient")  # of CHEAP, what is checked at the other places
DEFAULT_PLACES = (*THOROUGH, *sorted(set(PLACES) - set(THOROUGH)))
INSTEAD = {"residual_branch": "block_end"}  # what is examined on a net that lacks the place asked for


@dataclass(frozen=True)
class Asked:
    """What a sweep checks on every model."""

    places: tuple[str, ...] = DEFAULT_PLACES
    block: str = "cbam"
    level: str = "full"
    meta: bool = False

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**asdict(self), "places": list(self.places)}


def row(name: str, asked: Asked, meta_because: str = "") -> dict[str, Any]:
    """Everything that the zoo finds out about one model; nothing that goes wrong is raised."""
    gc.collect()
    began = time.perf_counter()
    result: dict[str, Any] = {
        "model": name,
        "family": models.family(name),
        "asked": asked.to_dict(),
        "device": "meta" if asked.meta or meta_because else "cpu",
        "versions": installed_versions(("attninject", "torch", "torchvision", "timm")),
    }
    if meta_because:
        result["meta_because"] = meta_because
    try:
        result |= _examine(name, asked, result)
    except UnsupportedModelError as error:
        result |= {"status": "refused", "error": guarantees.told(error)}
    except Exception as error:
        result |= {"status": "failed", "error": guarantees.told(error)}
    result["seconds"] = round(time.perf_counter() - began, 2)
    return result


def _examine(name: str, asked: Asked, result: dict[str, Any]) -> dict[str, Any]:
    """What building, planning and checking the model gives; on meta tensors as far as `result` says so."""
    began = time.process_time()
    try:
        model = subjects.build(name, result["device"] == "meta")
    except Exception as error:
        return {"status": "unbuildable", "error": guarantees.told(error)}
    found: dict[str, Any] = {"build_seconds": round(time.process_time() - began, 3)}
    found["parameters"] = subjects.parameters(model)
    root = subjects.ROOTS.get(result["family"], "")
    if root:
        found["root"] = root
    bare, checks = _bare(name, model, asked, found)
    try:
        found["places"] = _places(bare, asked, root, checks)
    except ProbeError:
        if not bare.on_meta:
            raise
        result["device"] = "cpu"  # what it computes next depends on values: they are needed after all
        return _examine(name, asked, result)
    if asked.level == "full" and bare.values:
        entries = {p: e for p, e in found["places"].items() if "sites" in e}
        chosen = [p for p in THOROUGH[: 2 if "residual_branch" in entries else None] if p in entries]
        rules = [{"block": entries[p]["block"], "place": p} for p in chosen or entries]
        if rules:
            found["together"] = _together(bare, rules, root)
    found["status"] = _overall(found)
    return found


def _places(bare: guarantees.Bare, asked: Asked, root: str, checks: tuple[str, ...]) -> dict[str, Any]:
    """The entries of the places asked for, and of what is examined instead of one that the net lacks."""
    entries = (not checks and _planned_at_once(bare, asked, root)) or {
        place: _place(bare, place, asked.block, root, checks) for place in asked.places
    }
    for place, other in INSTEAD.items():
        if entries.get(place, {}).get("status") == "absent" and other not in entries:
            entries[other] = _place(bare, other, asked.block, root, checks)
    return entries


def _bare(
    name: str, model: nn.Module, asked: Asked, found: dict[str, Any]
) -> tuple[guarantees.Bare, tuple[str, ...]]:
    """The model ready for its checks, and which of them it can have."""
    if asked.level == "plan" or _is_refused(model):
        return guarantees.Bare(model, None), ()
    calls = subjects.calls(name, model)
    found["input"] = subjects.shape_text(calls.eval)
    if guarantees.on_meta(model):
        return guarantees.Bare(model, subjects.on_meta(calls)), ON_META
    subjects.randomise(model)
    return guarantees.Bare(model, calls), CHEAP


def _is_refused(model: nn.Module) -> bool:
    """Whether the library refuses the model as such, so that there is nothing to run."""
    try:
        refuse_unsupported(model)
    except UnsupportedModelError:
        return True
    return False


def _of(found: dict[str, Any], sites: Sequence[Site]) -> dict[str, Any]:
    """An entry with its sites and its status."""
    return {**guarantees.counted(sites), **found, "status": _worst(found["checks"])}


def _planned_at_once(bare: guarantees.Bare, asked: Asked, root: str) -> dict[str, Any] | None:
    """The entries of all places from one plan, for structure alone; None where they must be planned one by one."""
    rules = [{"block": asked.block, "place": place, "optional": True} for place in asked.places]
    recipe = {"name": "zoo", "rules": rules}
    try:
        plan, found = guarantees.check(bare, {"recipe": recipe, "root": root}, ())
    except UnsupportedModelError:
        raise
    except Exception:
        return None
    entries: dict[str, Any] = {}
    for index, place in enumerate(asked.places):
        sites = [s for s in plan.sites if s.rule == index]
        why = next((n for n in plan.notes if n.startswith(f"rule {index + 1} ") and "no place" in n), "")
        if not sites and not why:
            return None
        more = _of(found, sites) if sites else {"status": "absent", "error": why.removesuffix(" (skipped)")}
        entries[place] = {"block": asked.block, **more}
    return entries


def _place(
    bare: guarantees.Bare, place: str, block: str, root: str, checks: tuple[str, ...]
) -> dict[str, Any]:
    """The entry of one place: `green`, `bare`, `failed`, `absent`, with what was found.

    Raises:
        UnsupportedModelError, ProbeError: no place of this model can be planned.
    """
    entry: dict[str, Any] = {"block": block}
    if place not in THOROUGH:
        checks = tuple(c for c in checks if c in ELSEWHERE)
    for block_here in dict.fromkeys((block, WITHOUT_GRID)):
        try:
            plan, found = guarantees.check(bare, {"block": block_here, "place": place, "root": root}, checks)
            return {**entry, **_of(found, plan.sites)}
        except (UnsupportedModelError, ProbeError):
            raise
        except (NoSuchPlaceError, NoTensorError) as error:  # no one tensor enters a densely connected unit
            return {**entry, "status": "absent", "error": guarantees.told(error)}
        except LayoutError as error:
            if block_here == WITHOUT_GRID:
                return {**entry, "status": "failed", "error": guarantees.told(error)}
            entry = {"block": WITHOUT_GRID, "instead_of": block, "refused": guarantees.told(error)}
        except Exception as error:
            return {**entry, "status": "failed", "error": guarantees.told(error)}
    return entry


def _together(bare: guarantees.Bare, rules: list[dict[str, Any]], root: str) -> dict[str, Any]:
    try:
        checks = guarantees.check_together(bare, rules, root)
    except AttnInjectError as error:
        return {"status": "failed", "error": guarantees.told(error)}
    return {"status": _worst(checks), "checks": checks}


def _worst(checks: dict[str, dict[str, str]]) -> str:
    statuses = {c["status"] for c in checks.values()}
    return next((s for s in (guarantees.FAILED, guarantees.BARE) if s in statuses), "green")


def _overall(found: dict[str, Any]) -> str:
    """Green when every promise holds, and there is a stage end and a branch or block end to hold it at."""
    places = found["places"]
    statuses = [e["status"] for e in places.values()] + [found.get("together", {}).get("status", "green")]
    if guarantees.FAILED in statuses or places.get("stage_end", {}).get("status") == "absent":
        return "failed"
    if all(s == "absent" for s in statuses[:-1]):
        return "failed"
    return "bare" if guarantees.BARE in statuses else "green"
