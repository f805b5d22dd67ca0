"""From a recipe and a model to a plan: every check is done before any change."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from attninject.anatomy.dataflow import Spot
from attninject.blocks import registry
from attninject.blocks.registry import reads_conv
from attninject.errors import CannotRewriteError, NoTensorError, PlanError, ProbeError
from attninject.layout import Layout
from attninject.observe.example_inputs import Inputs, first_float
from attninject.observe.probe import hooked, probe, run
from attninject.observe.record import Record, map_tensors
from attninject.observe.snapshot import PATCHING, undoing
from attninject.recipe.rules import Recipe, Rule
from attninject.recipe.targets import named
from attninject.surgery.injected_state import as_original
from attninject.surgery.location import Location
from attninject.terms import Slot
from attninject.wording import listed

from . import meeting, pairing, replacing, serving
from .cost import Cost, injected_parameters, macs_of, replacement_cost, site_cost
from .layout_check import layout_for, packers
from .locating import locate, parted, refuse_partly_matched, token_source
from .matching import match
from .meeting import Placed
from .naming import Names
from .plan import Plan, signature
from .planned_site import SecondValue, Site
from .scene import Scene
from .sharing import Sharing
from .support import check_root, refuse_unsupported

Row = tuple[Site, Location]  # what a plan shows of a site, and what carrying it out needs


def make(
    model: nn.Module, recipe: Recipe, *, root: str = "", example_inputs: Any = None, strict: bool = True
) -> Plan:
    """Resolve a recipe on a model. Touches nothing.

    Args:
        model: any open module.
        recipe: rules.
        root: name of the submodule that patterns and places are relative to.
        example_inputs: what the model's forward takes; None: inputs are found.
        strict: a rule that finds nothing is an error unless it is `optional`.

    Raises:
        PlanError: of the kind that fits; see `errors`.
    """
    refuse_unsupported(model)
    check_root(model, root)
    with PATCHING, _uncollected():
        return _make(model, recipe, root, example_inputs, strict)


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """No garbage collection for a while: a record is many small objects, none of them garbage, and looking takes long."""
    was_on = gc.isenabled()
    with undoing(gc.enable if was_on else gc.disable):
        gc.disable()
        yield


def _make(model: nn.Module, recipe: Recipe, root: str, example_inputs: Any, strict: bool) -> Plan:
    try:
        return _planned(_Planner(model, recipe, root, example_inputs, strict, partial=True))
    except _Incomplete as stopped:
        try:
            return _planned(_Planner(model, recipe, root, example_inputs, strict, partial=False))
        except ProbeError as failed:
            raise ProbeError(
                f"{stopped.__cause__} (as far as the forward goes without data; with data it fails: {failed})"
            ) from failed


def _planned(planner: _Planner) -> Plan:
    try:
        return planner.plan()
    finally:
        planner.scene.forget()


class _Incomplete(Exception):
    """The run on meta tensors stopped early, and a rule looks for something behind."""


class _Planner:
    """One recorded run of a model, and the rules resolved on it one after another."""

    def __init__(
        self, model: nn.Module, recipe: Recipe, root: str, example_inputs: Any, strict: bool, partial: bool
    ) -> None:
        self.model, self.recipe, self.root, self.strict = model, recipe, root, strict
        sharing = Sharing(model)
        with as_original(model):
            self.record, self.inputs = probe(model, example_inputs, partial=partial)
        self.scene = Scene(model, self.record, root, self.rerun, sharing)
        self.names, self.packers = Names(), packers(model)
        self.taken: dict[int, str] = {}  # id of a module whose place is taken -> by which rule
        self.notes: list[str] = []
        if not self.record.hooks and (names := hooked(model)):
            self.notes.append(
                f"the hooks of {listed([n or 'the model' for n in names])} were "
                "not run: should one change a shape, the shapes above are those without it"
            )

    def rerun(self, how: str) -> Record | None:
        """The same model "larger", at an oblong size, or in "training" mode; None where it fails."""

        def larger(x: Tensor) -> Tensor:
            if x.ndim < 4:
                return x
            size = (*x.shape[:-2], x.shape[-2] + 64, x.shape[-1] + 128)
            return torch.empty(size, dtype=x.dtype, device="meta")

        inputs, mode = self.inputs, self.record.mode
        if how == "larger":
            inputs, mode = Inputs(*map_tensors((inputs.args, inputs.kwargs), larger)), "meta"
        try:
            with as_original(self.model):
                return run(self.model, inputs, mode, how == "training", self.record.hooks)
        except Exception:
            return None

    def plan(self) -> Plan:
        """Every rule resolved, in order."""
        rules = tuple(named(rule, self.scene.names) for rule in self.recipe.rules)
        rows = [row for index, rule in enumerate(rules) for row in self.rule(index, rule)]
        return Plan(
            sites=tuple(site for site, _ in rows),
            recipe=replace(self.recipe, rules=rules),
            model_name=type(self.model).__name__,
            base_parameters=sum(p.numel() for p in self.model.parameters()) - injected_parameters(self.model),
            base_macs=macs_of(self.record),
            notes=tuple(self.notes),
            locations=tuple(location for _, location in rows),
            model=weakref.ref(self.model),
            signature=signature(self.model),
            inputs=self.inputs,
        )

    def rule(self, index: int, rule: Rule) -> list[Row]:
        """The sites of one rule; none where it finds nothing and may."""
        label = f"rule {index + 1} ({rule.block_name})"
        try:
            found, notes = match(rule, self.scene, label)
            pairs = list(pairing.partners(rule, self.scene, found, label, notes)) if rule.with_ else []
        except PlanError as error:
            if not self.record.complete and not (rule.place and self.scene.root_ran):
                raise _Incomplete from error
            if rule.optional or not self.strict:
                self.notes.append(f"{error} (skipped)")
                return []
            raise
        self.notes += notes
        rows: dict[Any, Row] = {}
        spots: list[Spot] = []
        for placed in self.located(rule, found, pairs, label):
            at = placed.location.insertion
            key = (id(placed.location.carrier), at.position, at.target, at.operand, at.output, at.second)
            if key not in rows:  # a carrier that several owners call has one block
                rows[key] = self.row(index, placed, label)
                spots.append(placed.spot)
        made = serving.joined(rule, self.scene, list(rows.values()), spots)
        idle = [
            site.name
            for (site, _), spot in zip(made, spots, strict=True)
            if site.layout.prefix and self.scene.unread(spot.value)
        ]
        packed = [site.name for site, at in made if id(at.carrier) in self.packers and not at.insertion.mask]
        self.notes += _noted(rule, made, idle, packed, label)
        return made

    def located(
        self, rule: Rule, found: list[Spot], pairs: list[tuple[Spot, Spot]], label: str
    ) -> list[Placed]:
        """Where the block of each spot goes.

        Raises:
            CannotRewriteError: for some, nowhere; or it would run at spots that the rule leaves out.
        """
        if rule.with_:
            placed = list(meeting.located(self.scene, pairs, label, self.notes))
            refuse_partly_matched(self.scene, [(p.spot, p.location) for p in placed])
            return placed
        if not rule.replace:
            located = [(spot, locate(self.scene, spot, self.scene.name(spot))) for spot in found]
            refuse_partly_matched(self.scene, located)
            return [Placed(*at) for at in located]
        for spot in found:
            taker = self.taken.setdefault(id(spot.module), label)
            if taker != label:
                raise CannotRewriteError(
                    f"{label}: {taker} takes the place of {self.scene.name(spot)} already"
                )
        self.notes += replacing.shared_notes(self.scene, found, label)
        return [Placed(spot, replacing.locate(self.scene, spot, self.scene.name(spot))) for spot in found]

    def row(self, index: int, placed: Placed, label: str) -> Row:
        """One site and its location in full: layout, name and cost checked."""
        spot, location, _ = placed
        rule, path, value = self.recipe.rules[index], self.scene.name(spot), self.record.values[spot.value]
        layout = layout_for(rule, self.scene, spot, label)
        second = pairing.described(rule, self.scene, placed, layout, label)
        if not value.dtype.is_floating_point:
            raise NoTensorError(f"{label}: {path} gives {value.dtype}, no floating-point tensor")
        around = location.insertion.target is None
        name, slot = self.names.take(location.carrier, rule.child_name, around, label)
        qualified = f"{self.scene.path(location.carrier)}.{name}".lstrip(".")
        cost = self.cost(rule, placed, layout, second, f"{label}: at {path}")
        site = Site(
            path=path,
            position=spot.position,
            call=getattr(spot.event, "number", 1),
            owner=self.scene.owner(spot.owner),
            block=rule.block,
            args=rule.args,
            init=rule.init,
            name=qualified,
            shape=value.shape,
            layout=layout,
            channels=layout.channels(value.shape),
            parameters=cost.parameters,
            macs=cost.macs,
            mechanism=location.mechanism,
            reason=location.reason,
            rule=index,
            input=spot.operand if spot.position == "before" else None,
            output=spot.output,
            second=second,
        )
        return site, self.completed(index, placed, (name, slot), (layout, second), cost)

    def cost(
        self, rule: Rule, placed: Placed, layout: Layout, second: SecondValue | None, where: str
    ) -> Cost:
        """What the block of a site costs, tried on the site's shape."""
        spot, location, _ = placed
        shape = self.record.shape(spot.value)
        if location.old is None:
            other = None if second is None else second.layout.map_shape(second.shape)
            return site_cost(rule, layout, shape, where, other)
        made = self.record.shape(replacing.result_of(spot).value)
        return replacement_cost(rule, location.old, layout, (shape, made), where)

    def completed(
        self, index: int, placed: Placed, named: tuple[str, Slot], seen_as: tuple[Layout, SecondValue | None],
        cost: Cost,
    ) -> Location:  # fmt: skip
        """A location with what depends on the rule; `seen_as`: the layout of the site's value, and the second one."""
        spot, location, other = placed
        (name, slot), (layout, second) = named, seen_as
        at, rule = location.insertion, self.recipe.rules[index]
        source, given = token_source(self.scene, spot, layout, spot.time), at.second
        if second is not None and other is not None and given is not None:
            theirs = token_source(self.scene, other, second.layout, spot.time)
            source = source or theirs
            given = replace(given, layout=second.layout, watched=theirs is not None and theirs is source)
        copied = at.copy_result or (location.written and _keeps_result(rule))
        seen = replacing.result_of(spot) if location.old is location.carrier else spot
        insertion = replace(
            at, name=name, layout=layout, slot=slot, copy_result=copied, alone=cost.alone and not at.copy_given,
            splits=parted(self.scene, seen, location.carrier), second=given,
        )  # fmt: skip
        value, like = self.record.values[spot.value], location.like(first_float(self.model))
        return replace(
            location, insertion=insertion, device=value.device, time=spot.time, source=source,
            dtype=None if location.old or value.dtype == like.dtype else value.dtype,
            packer=self.packers.get(id(location.carrier)) if at.mask else None,
        )  # fmt: skip


def _noted(rule: Rule, rows: list[Row], idle: list[str], packed: list[str], label: str) -> Iterator[str]:
    """What a user should know of a rule's sites; `idle`: those that nothing reads; `packed`: those in an encoder."""
    if idle:
        yield (
            f"{label}: nothing reads the positions behind {listed(idle)}, only the tokens in front of them, "
            "which bypass blocks: there a block changes nothing and learns nothing"
        )
    if packed:
        yield (
            f"{label}: {listed(packed)} would stand inside nn.TransformerEncoder, which in eval mode without gradients "
            "packs the tokens of a padding mask into nested tensors, which blocks refuse: if masks are given, build it "
            "with enable_nested_tensor=False"
        )
    if not (rule.with_ or rule.replace) and registry.is_given_twice(rule.block):
        yield f"{label}: it takes a second value, and is given that of its site twice, since `with` names no other"
    alone = [site.path for site, at in rows if at.insertion.alone and not reads_conv(rule.block)]
    if alone:
        yield f"{label}: under init: paper {listed(alone)} will not run, and their own parameters learn nothing"
    between = [site.name for site, at in rows if at.insertion.splits]
    if between and rule.replace:
        yield f"{label}: a batch norm cannot be folded (fused) into or across {listed(between)}; eject before that"
    elif between:
        yield (
            f"{label}: {listed(between)} would stand between a layer and its batch norm: folding the norm into the "
            "layer (fuse) would reach across and is refused there; place it after the norm to fold later"
        )


def _keeps_result(rule: Rule) -> bool:
    """Whether a block may keep what it gives for its backward: nobody knows of a foreign one that nothing wraps."""
    return registry.resolve(rule.block).family == "registered" and rule.init != "blend"
