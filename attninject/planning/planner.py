"""From a recipe and a model to a plan: every check is done before any change."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from attninject.blocks import registry
from attninject.errors import (
    BlockError,
    IdentityError,
    LayoutError,
    NoTensorError,
    PlanError,
    ProbeError,
    TooFewChannelsError,
    UnusableNameError,
)
from attninject.layout import RANK, Layout
from attninject.observe.example_inputs import Inputs
from attninject.observe.probe import hooked, probe, run
from attninject.observe.record import Record, map_tensors
from attninject.observe.snapshot import PATCHING, undoing
from attninject.recipe.rules import Recipe, Rule
from attninject.surgery.injected_state import Insertion, as_original
from attninject.wording import listed

from .cost import block_cost, injected_parameters, macs_of
from .locating import Location, locate, watchable
from .matching import match
from .plan import Plan, Step, signature
from .planned_site import Site
from .scene import Match, Scene
from .support import check_root, refuse_unsupported

# --- making a plan -----------------------------------------------------------------------------


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
        return _Planner(model, recipe, root, example_inputs, strict, partial=True).plan()
    except _Incomplete as stopped:
        try:
            return _Planner(model, recipe, root, example_inputs, strict, partial=False).plan()
        except ProbeError as failed:
            raise ProbeError(
                f"{stopped.__cause__} (as far as the forward goes without data; with data it fails: {failed})"
            ) from failed


class _Incomplete(Exception):
    """The run on meta tensors stopped early, and a rule looks for something behind."""


class _Planner:
    def __init__(
        self, model: nn.Module, recipe: Recipe, root: str, example_inputs: Any, strict: bool, partial: bool
    ) -> None:
        self.model, self.recipe, self.root, self.strict = model, recipe, root, strict
        with as_original(model):
            self.record, self.inputs = probe(model, example_inputs, partial=partial)
        self.scene = Scene(model, self.record, root, self.rerun)
        self.taken: dict[int, set[str]] = {}
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
        steps: list[Step] = []
        for index, rule in enumerate(self.recipe.rules):
            steps += self.rule(index, rule)
        return Plan(
            sites=tuple(s.site for s in steps),
            recipe=self.recipe,
            model_name=type(self.model).__name__,
            base_parameters=sum(p.numel() for p in self.model.parameters()) - injected_parameters(self.model),
            base_macs=macs_of(self.record),
            notes=tuple(self.notes),
            steps=tuple(steps),
            model=weakref.ref(self.model),
            signature=signature(self.model),
            inputs=self.inputs,
        )

    def rule(self, index: int, rule: Rule) -> list[Step]:
        label = f"rule {index + 1} ({rule.block_name})"
        try:
            found, notes = match(rule, self.scene, label)
        except PlanError as error:
            if not self.record.complete:
                raise _Incomplete from error
            if rule.optional or not self.strict:
                self.notes.append(f"{error} (skipped)")
                return []
            raise
        self.notes += notes
        steps: dict[Any, Step] = {}
        idle: list[str] = []
        for m in found:
            place = locate(self.scene, m.spot, m.path)
            key = (id(place.holder), place.position, place.target, place.operand, place.output)
            if key not in steps:  # a carrier that several owners call has one block
                steps[key] = made = self.step(index, rule, m, place, label)
                if made.site.layout.prefix and self.scene.unread(m.spot.value):
                    idle.append(made.site.name)
        if idle:
            self.notes.append(
                f"{label}: nothing reads the positions behind {listed(idle)}, only the tokens in front of them, "
                "which bypass blocks: there a block changes nothing and learns nothing"
            )
        return list(steps.values())

    def step(self, index: int, rule: Rule, m: Match, location: Location, label: str) -> Step:
        value = self.record.values[m.spot.value]
        layout = self.layout(rule, m, value.shape, label)
        if not value.dtype.is_floating_point:
            raise NoTensorError(f"{label}: {m.path} gives {value.dtype}, no floating-point tensor")
        channels = layout.channels(value.shape)
        name, slot = self.name(rule, location, label)
        holder = self.scene.path(location.holder)
        parameters, macs = self.cost(rule, layout, value.shape, m, label)
        copies, foreign = location.copies, registry.resolve(rule.block).family == "registered"
        insertion = Insertion(
            name, location.position, location.target, location.operand, location.output, layout, slot,
            copies.given, copies.result or (copies.written and foreign and rule.init != "blend"),
        )  # fmt: skip
        owner = m.spot.owner
        site = Site(
            path=m.path,
            position=m.spot.position,
            call=getattr(m.spot.event, "number", 1),
            owner=self.scene.path(owner.module) if owner else "",
            block=rule.block,
            args=rule.args,
            init=rule.init,
            name=f"{holder}.{name}" if holder else name,
            shape=value.shape,
            layout=layout,
            channels=channels,
            parameters=parameters,
            macs=macs,
            mechanism=location.mechanism,
            reason=location.reason,
            rule=index,
            input=m.spot.operand if m.spot.position == "before" else None,
            output=m.spot.output,
        )
        source = self.source(m, layout)
        return Step(site, location.holder, insertion, location.local, value.device, m.spot.time, source)

    def source(self, m: Match, layout: Layout) -> nn.Module | None:
        """The layer whose map the tokens of a site are, where it can be watched for the map's size."""
        found = self.scene.positions.find(m.spot.value) if layout.grid else None
        op = found.source.op if found and found.source else None
        if op is None or op.call.outs != op.outs[:1] or not watchable(op.call.module):
            return None
        before = [c for c in self.record.calls_of(op.call.module) if c.start < m.spot.time]
        return op.call.module if before[-1] is op.call else None

    def layout(self, rule: Rule, m: Match, shape: tuple[int, ...], label: str) -> Layout:
        """The layout that the block sees: measured or overridden, and one that its mathematics allows."""
        layout = m.layout
        if rule.layout:
            if RANK[rule.layout] != len(shape):
                raise LayoutError(
                    f"{label}: layout {rule.layout} has {RANK[rule.layout]} axes; {m.path} has {shape}"
                )
            if layout is None or layout.kind != rule.layout or not layout.ordered:
                layout = Layout(rule.layout)
        spec = registry.resolve(rule.block)
        if layout is None:
            found = self.scene.positions.find(m.spot.value)
            why = found.why if found and found.why else "do not say which are batch, channels and positions"
            known = len(shape) in RANK.values()
            fix = "say it with layout:" if known else "blocks need 3 to 5 axes, so name a site before"
            raise LayoutError(f"{label}: the axes of {m.path}, {tuple(shape)}, {why}; {fix}")
        if spec.spatial and not layout.is_map:
            held = f"{shape[1]} tokens" if layout.kind == "NLC" else f"{layout.kind} {tuple(shape)}"
            lie = "that form no grid" if layout.ordered else "in windows or an order of the network's own"
            raise LayoutError(
                f"{label}: {m.path} holds {held} {lie}, and {spec.name} works on positions; take a block that works "
                "on tokens too, see `attninject list blocks`"
            )
        if layout.dims in spec.dims:
            return layout
        if layout.kind in ("NLC", "NCL") and 1 in spec.dims and not spec.spatial:
            return Layout(layout.kind, layout.prefix)
        raise LayoutError(
            f"{label}: {spec.name} works on {' or '.join(f'{d}D' for d in spec.dims)} maps; "
            f"{m.path} is {layout} {tuple(shape)}"
        )

    def name(self, rule: Rule, location: Location, label: str) -> tuple[str, str]:
        """A free name on the holder: the rule's, else with _2, _3; and what held it."""
        holder, wanted = location.holder, rule.child_name
        if hasattr(type(holder), wanted):
            raise UnusableNameError(
                f"{label}: {type(holder).__name__} has an attribute {wanted!r} of its own; give the rule another name:"
            )
        taken = self.taken.setdefault(id(holder), set())
        for number in range(1, 10_000):
            name = wanted if number == 1 else f"{wanted}_{number}"
            slot = _slot(holder, name)
            if location.target is None and slot != "free":
                slot = ""  # the original forward, which still runs, would call what fills the slot
            if slot and name not in taken:
                taken.add(name)
                return name, slot
        raise UnusableNameError(f"{label}: no free name like {wanted!r} on {type(holder).__name__}")

    def cost(
        self, rule: Rule, layout: Layout, shape: tuple[int, ...], m: Match, label: str
    ) -> tuple[int, int]:
        """Parameters and MACs of the block for one sample; builds it on the meta device."""
        try:
            return block_cost(rule, layout.channels(shape), layout.dims, layout.positions(shape))
        except TooFewChannelsError as error:
            raise TooFewChannelsError(f"{label}: at {m.path}: {error}") from error
        except IdentityError as error:
            raise IdentityError(f"{label}: at {m.path}: {error}") from error
        except BlockError as error:
            raise BlockError(f"{label}: at {m.path}: {error}") from error


def _slot(holder: nn.Module, name: str) -> str:
    """What a name holds: `free` nothing, `attribute` or `module` None, "" something."""
    if name in holder._modules:
        return "" if holder._modules[name] is not None else "module"
    if name in holder.__dict__:
        return "" if holder.__dict__[name] is not None else "attribute"
    return "" if name in holder._parameters or name in holder._buffers else "free"
