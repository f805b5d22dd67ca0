"""Compares the places of a recorded run with a reference that names them (see reference/zoo_places_*.yaml)."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from attninject import models
from attninject.anatomy.axes import measure
from attninject.anatomy.dataflow import Spot
from attninject.anatomy.place_map import PlaceMap
from attninject.anatomy.places import spots
from attninject.anatomy.repeated_units import channels_of
from attninject.errors import NoSuchPlaceError, UnknownModelError
from attninject.observe.example_inputs import Inputs
from attninject.observe.probe import probe
from attninject.observe.record import Call, Op, Record
from attninject.recipe.patterns import compile_pattern

REFERENCE = Path(__file__).parent / "reference"
MOVES = {
    "permute",
    "transpose",
    "reshape",
    "view",
    "contiguous",
    "clone",
    "_unsafe_view",
    "unsqueeze",
    "alias",
}
SAME = MOVES | {"flatten", "squeeze", "unflatten", "rearrange"}


@functools.cache
def places() -> dict[str, Any]:
    """The reference lists, model name → what is expected."""
    found: dict[str, Any] = {}
    for file in sorted(REFERENCE.glob("*_places*.yaml")):
        found |= yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    return found


def built(name: str) -> nn.Module:
    """The net without its numbers: on the meta device where its constructor allows it."""
    try:
        with torch.device("meta"):
            return models.build(name)
    except UnknownModelError:
        return models.build(name)


def compared(name: str) -> Comparison:
    """A net of the reference, run once, ready to be compared."""
    expected = places()[name]
    model = built(name)
    record, inputs = probe(model, partial=True)
    if not record.complete:
        record.input_values = record.calls[0].ins
    root = expected.get("root")
    found = Comparison(record, expected, record.calls_of(model.get_submodule(root))[0] if root else None)
    found.inputs = inputs
    return found


def features(net: PlaceMap) -> list[tuple[float, int]]:
    """Reduction and channels of the stage ends, as timm's feature_info gives them."""
    record = net.record
    given = record.shape(record.input_values[0])
    found = []
    for spot in net.stages:
        shape, at = record.shape(spot.value), net.resolution(spot)
        layout = measure(shape, given[0], given[2:], channels_of(spot.event.module))
        assert at is not None
        assert layout is not None
        found.append((given[2] / math.prod(at) ** (1 / len(given[2:])), layout.channels(shape)))
    return found


class Comparison:
    """One net's places against its reference; each method gives the differences as sentences."""

    def __init__(self, record: Record, expected: dict[str, Any], inside: Call | None = None) -> None:
        self.record, self.expected = record, expected
        self.inputs = Inputs(())
        self.net = PlaceMap(record, inside)
        root = self.net.root.module
        self.names = {id(m): name for name, m in root.named_modules()}
        self.modules = dict(root.named_modules(remove_duplicate=False))
        self.makers = {v: op for op in record.calls[0].ops() for v in op.outs if v not in op.ins}

    def spots(self, place: str) -> list[Spot]:
        """The spots of a place; [] where the net has none."""
        try:
            return spots(self.net, place)
        except NoSuchPlaceError:
            return []

    def path(self, spot: Spot) -> str:
        """A spot as the reference writes it."""
        if isinstance(spot.event, Op):
            return f"{self.names[id(spot.event.call.module)]}::{_kind(spot.event)}"
        name = self.names[id(spot.event.module)]
        return name if spot.output is None else f"{name}#{spot.output}"

    def called(self, patterns: Iterable[str]) -> list[str]:
        """Names of the called modules that the patterns mean; one object under two names counts once."""
        compiled = [compile_pattern(p) for p in patterns]
        hits = [n for n in self.modules if any(p.matches(n) for p in compiled)]
        hits = [n for n in hits if self.record.calls_of(self.modules[n])]
        return list({id(self.modules[n]): n for n in reversed(hits)}.values())[::-1]

    def outputs(self, name: str) -> set[int]:
        """Values that a module returns over all its calls; `name#i` is element i."""
        path, _, at = name.partition("#")
        calls = self.record.calls_of(self.modules[path]) if path in self.modules else []
        return {o for c in calls for i, o in enumerate(c.outs) if not at or i == int(at)}

    # --- the three places -----------------------------------------------------------------

    def stage_end(self) -> list[str]:
        """Whether the stage ends are the tensors that the reference, or another right reading of it, names."""
        found = self.spots("stage_end")
        lists = [self.expected["stage_end"], *self.expected.get("also_right", [])]
        if any(self._same_ends(found, wanted) for wanted in lists):
            return []
        return [f"stage_end: found {[self.path(s) for s in found]}, expected {lists[0]}"]

    def _same_ends(self, found: list[Spot], wanted: list[str]) -> bool:
        return len(found) == len(wanted) and all(
            s.value in self._accepted(w) for s, w in zip(found, wanted, strict=True)
        )

    def _accepted(self, name: str) -> set[int]:
        """Values that are right for a stage end: those of the unit, and of its neighbours where thirds are rounded."""
        accepted = self.outputs(name)
        if self.expected.get("thirds_of", 3) % 3:
            units = self.called(self.expected["block_end"]["units"])
            at = units.index(name) if name in units else None
            if at is not None and at + 1 < self.expected["thirds_of"]:
                for near in units[max(at - 1, 0) : at + 2]:
                    accepted |= self.outputs(near)
        return accepted

    def block_end(self) -> list[str]:
        """Whether the repeated units are those of the reference."""
        found, expected = self.spots("block_end"), self.expected["block_end"]
        if expected == "none":
            return [f"block_end: found {[self.path(s) for s in found][:5]}, expected none"] if found else []
        wanted = self.called(expected["units"])
        made = {n: self.outputs(n) for n in wanted}
        missing = [n for n in wanted if not any(s.value in made[n] for s in found)]
        values = set().union(*made.values()) if made else set()
        extra = [self.path(s) for s in found if s.value not in values]
        if len(found) in expected.get("or_sites", ()) and not (missing and extra):
            return []  # another right reading of the words leaves out some of these, or takes in more
        said = [f"block_end: missing {_some(missing)}"] if missing else []
        said += [f"block_end: not expected {_some(extra)}"] if extra else []
        if not said and len(found) != expected["sites"]:
            said = [f"block_end: found {len(found)} sites, expected {expected['sites']}"]
        return said

    def residual_branch(self) -> list[str]:
        """Whether the adds are as many, in the modules named, and the branches end where the reference says."""
        found, expected = self.spots("residual_branch"), self.expected["residual_branch"]
        if expected == "none":
            return (
                [f"residual_branch: found {_some([self.path(s) for s in found])}, expected none"]
                if found
                else []
            )
        said = []
        if len(found) != expected["sites"]:
            said.append(f"residual_branch: found {len(found)} sites, expected {expected['sites']}")
        owners = Counter(self.names[id(a.owner.module)] for a in self.net.adds)
        wanted = set(self.called(expected["adds"])) | ({""} & set(expected["adds"]))
        if set(owners) - wanted:
            said.append(f"residual_branch: adds not expected in {_some(sorted(set(owners) - wanted))}")
        if wanted - set(owners):
            said.append(f"residual_branch: no adds found in {_some(sorted(wanted - set(owners)))}")
        return said or self._ends(found, expected["ends"])

    def _ends(self, found: list[Spot], ends: list[str]) -> list[str]:
        operations = [compile_pattern(e.split("::")[0]) for e in ends if "::" in e]
        kinds = [e.split("::")[1] for e in ends if "::" in e]
        modules = self.called([e for e in ends if "::" not in e])
        values = {self._bare(v) for n in modules for v in self.outputs(n)}
        wrong = []
        for spot, add in zip(found, self.net.adds, strict=True):
            batch = self.record.shape(add.out)[0]  # windows are not the map that they are cut from
            if isinstance(spot.event, Op):
                owner, mine = self.names[id(spot.event.call.module)], _kind(spot.event)
                if any(
                    p.matches(owner) and (k == mine or {k, mine} <= SAME)
                    for p, k in zip(operations, kinds, strict=True)
                ):
                    continue
            if self._bare(spot.value) not in values or self.record.shape(spot.value)[0] != batch:
                wrong.append(self.path(spot))
        return [f"residual_branch: ends not expected {_some(wrong)}"] if wrong else []

    def _bare(self, value: int) -> int:
        """The value before its axes were moved."""
        while (op := self.makers.get(value)) and _kind(op) in MOVES and len(op.ins) == 1:
            value = op.ins[0]
        return value

    def all(self) -> list[str]:
        """Every difference."""
        return [*self.stage_end(), *self.block_end(), *self.residual_branch()]


def _kind(op: Op) -> str:
    name = op.name.split(".")[1]
    return name.rstrip("_") or name


def _some(names: list[str]) -> str:
    counts = Counter(names)
    shown = [n if k == 1 else f"{n} (×{k})" for n, k in list(counts.items())[:6]]
    return f"{len(names)}: {', '.join(shown)}{', …' if len(counts) > 6 else ''}"
