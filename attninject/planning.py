"""A recipe resolved on one model: frozen sites, every check done before any change, and the printed table."""

from __future__ import annotations

import contextlib
import functools
import gc
import math
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

from .blocks import registry
from .edits import Insertion, as_original, extended_since, injected_in
from .errors import (
    AttnInjectError,
    BlockError,
    ForeignPlanError,
    IdentityError,
    LayoutError,
    NoMatchError,
    NoTensorError,
    PlanError,
    ProbeError,
    StalePlanError,
    TooFewChannelsError,
    UnsupportedModelError,
    UnusableNameError,
)
from .layout import RANK, Layout
from .locating import Location, locate, watchable
from .matching import Match, Scene, match
from .patterns import listed, nearest_hint
from .probe import Inputs, hooked, probe, run
from .recipe import FrozenDict, Recipe, Rule
from .record import Record, map_tensors
from .snapshot import PATCHING, rng_kept, undoing
from .trace import LocalGraph


@dataclass(frozen=True)
class Site:
    """One block at one point of the dataflow.

    Attributes:
        path: `layer1.0.bn3`, or `layer1.0::add` for an operation.
        position: `after` or `before`.
        call: which call of the module within one run of its owner, from 1.
        owner: name of the module whose forward contains the site; "" for the model.
        block: the block's registered name, or the class.
        args: the block's arguments.
        init: `identity`, `paper` or `blend`.
        name: qualified name of the new module.
        shape: of the tensor there, as the probe met it (its batch is 2 unless example_inputs said otherwise).
        layout: what the tensor's axes mean.
        channels: extent of the channel axis.
        parameters: of the new block.
        macs: multiply-accumulates of the new block for one sample (convolutions and matrix products).
        mechanism: `graph` or `module`.
        reason: why the mechanism is not `graph`; "" when it is.
        rule: index of the rule in the recipe, from 0.
        input: `before`: which operand, by position or name.
        output: `after`: index or key of the tensor in a nested result.
    """

    path: str
    position: str
    call: int
    owner: str
    block: str | type
    args: FrozenDict
    init: str
    name: str
    shape: tuple[int, ...]
    layout: Layout
    channels: int
    parameters: int
    macs: int
    mechanism: str
    reason: str
    rule: int
    input: int | str | None = None
    output: int | str | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        data = {f.name: getattr(self, f.name) for f in fields(self)}
        data["block"] = self.block if isinstance(self.block, str) else self.block.__name__
        data["args"] = {k: list(v) if isinstance(v, tuple) else v for k, v in self.args.items()}
        data["shape"] = list(self.shape)
        data["layout"] = str(self.layout)
        return data


@dataclass(frozen=True, eq=False)
class Step:
    """A site with what carrying it out needs."""

    site: Site
    holder: nn.Module
    insertion: Insertion
    local: LocalGraph | None
    device: torch.device  # of the tensor there; meta where the probe did not look
    time: int  # orders the blocks of one carrier as the dataflow does
    source: nn.Module | None = None  # makes the map whose positions the tokens at the site are


@dataclass(frozen=True, eq=False)
class Plan:
    """Rules resolved on one model. `print` shows a table; `inject(model, plan)` carries it out.

    Attributes:
        sites: in the order of the rules, then of the calls.
        recipe: what was resolved.
        model_name: the class of the model.
        base_parameters: parameters of the model before.
        base_macs: multiply-accumulates of the model for one sample; 0 where the run did not get through.
        notes: what was left aside.
    """

    sites: tuple[Site, ...]
    recipe: Recipe
    model_name: str
    base_parameters: int
    base_macs: int
    notes: tuple[str, ...]
    steps: tuple[Step, ...] = field(repr=False)
    model: weakref.ref[nn.Module] = field(repr=False)
    signature: Any = field(repr=False)
    inputs: Inputs = field(repr=False)

    @property
    def parameters(self) -> int:
        """Parameters that the plan adds."""
        return sum(s.parameters for s in self.sites)

    @property
    def macs(self) -> int:
        """Multiply-accumulates that the plan adds, for one sample."""
        return sum(s.macs for s in self.sites)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "model": self.model_name,
            "recipe": self.recipe.to_dict(),
            "sites": [s.to_dict() for s in self.sites],
            "parameters": self.parameters,
            "macs": self.macs,
            "base_parameters": self.base_parameters,
            "base_macs": self.base_macs,
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        return table(self)

    def check(self, model: nn.Module) -> None:
        """Refuse a model that the plan was not made for, or one that has changed since.

        Raises:
            ForeignPlanError, StalePlanError: with what to do.
        """
        if self.model() is not model:
            raise ForeignPlanError(
                f"this plan was made for another {self.model_name} object; make one for this model with plan()"
            )
        if self.signature != signature(model) or any(
            s.local is not None and not all(r.holds(s.holder) for r in s.local.reads) for s in self.steps
        ):
            raise StalePlanError("the model has changed since this plan was made; make it anew with plan()")


def signature(model: nn.Module) -> Any:
    """What a plan depends on: names, classes and identities of all modules."""
    return tuple((name, id(m), type(m)) for name, m in model.named_modules(remove_duplicate=False))


# --- which models ------------------------------------------------------------------------------


def refuse_unsupported(model: Any) -> None:
    """Refuse what is not open to surgery, with what to pass instead.

    Raises:
        UnsupportedModelError: wrapped, scripted, compiled, quantized, lazy or no module at all.
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"expected a torch.nn.Module, found {type(model).__name__}")
    if type(model).__name__ == "OptimizedModule" or model.__dict__.get("_compiled_call_impl") is not None:
        raise UnsupportedModelError("the model is compiled; inject first, then torch.compile it")
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    if isinstance(model, wrappers) or type(model).__name__ == "FullyShardedDataParallel":
        raise UnsupportedModelError(
            f"the model is wrapped in {type(model).__name__}; inject into model.module first"
        )
    for name, module in model.named_modules():
        if (why := _not_open(module, name == "")) is not None:
            raise UnsupportedModelError(f"{name or 'the model'} ({type(module).__name__}) {why}")


def _not_open(module: nn.Module, is_model: bool) -> str | None:
    """Why a model with this module in it is not open to surgery; None if the module does not forbid it."""
    home = type(module).__module__
    if extended_since(module) or type(module).__name__.startswith("FSDP"):
        return "was sharded or parametrized (its class was extended); inject and eject before that"
    if isinstance(module, torch.jit.ScriptModule):
        return "is scripted; inject into the original, then script or trace it"
    if isinstance(module, torch.fx.GraphModule):
        return "is a torch.fx GraphModule; inject into the original model" if is_model else None
    if type(module).__name__ == "OptimizedModule":
        return "is compiled; inject first, then compile it"
    if isinstance(module, nn.parallel.DistributedDataParallel) or home.startswith("torch.distributed.fsdp"):
        return "is a wrapper that has counted its parameters already; inject before it is made"
    if home.startswith("torch.ao.nn.quantized.modules.functional_modules"):
        return "belongs to a quantizable variant; inject into the plain float model"
    if home.startswith(("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")):
        return "is quantized; inject into the float model, then quantize it"
    if isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params():  # type: ignore[misc]
        return "is lazy and not initialised; run the model once first"
    return None


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


def check_root(model: nn.Module, root: str) -> None:
    """Refuse a root that the model does not have.

    Raises:
        NoMatchError: with the nearest names.
    """
    names = [n for n, _ in model.named_modules(remove_duplicate=False)]
    if root not in names:
        raise NoMatchError(f"root: no module is called {root!r}{nearest_hint(root, names[1:])}")


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
            base_parameters=sum(p.numel() for p in self.model.parameters())
            - _injected_parameters(self.model),
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


def _injected_parameters(model: nn.Module) -> int:
    seen: dict[int, int] = {}
    for module in model.modules():
        if known := injected_in(module):
            for insertion in known.edit:
                seen.update({id(p): p.numel() for p in module._modules[insertion.name].parameters()})  # type: ignore[union-attr]
    return sum(seen.values())


# --- what a block costs ------------------------------------------------------------------------


@functools.lru_cache(maxsize=1024)
def _cost(
    block: str | type, args: FrozenDict, init: str, channels: int, dims: int, positions: tuple[int, ...]
) -> tuple[int, int]:
    with rng_kept():
        try:
            with torch.device("meta"):
                built = registry.create_block(block, channels, init=init, dims=dims, **args)
        except AttnInjectError:
            raise
        except Exception:  # a foreign class may not know the meta device
            built = registry.create_block(block, channels, init=init, dims=dims, **args)
    built.eval()
    parameters = sum(p.numel() for p in built.parameters())
    try:
        x = torch.empty((1, channels, *positions), device="meta")
        return parameters, macs_of(run(built, Inputs((x,)), "meta"))
    except Exception:
        return parameters, 0


def block_cost(rule: Rule, channels: int, dims: int, positions: tuple[int, ...]) -> tuple[int, int]:
    """Parameters and MACs of a rule's block; tests the identity of a foreign class.

    Raises:
        BlockError, TooFewChannelsError: the block cannot be built so.
        IdentityError: a foreign class changes the function, and `init` is `identity`.
    """
    spec = registry.resolve(rule.block)
    if spec.family != "registered":
        return _cost(rule.block, rule.args, rule.init, channels, dims, positions)
    cls: type = spec.cls  # not the name, which may be registered anew for an edited class
    cost = _cost(cls, rule.args, rule.init, channels, dims, positions)
    if rule.init == "identity":
        _check_foreign(cls, rule.args, channels, dims)
    return cost


@functools.lru_cache(maxsize=1024)
def _check_foreign(block: type, args: FrozenDict, channels: int, dims: int) -> None:
    with rng_kept():
        built = registry.create_block(block, channels, init="identity", dims=dims, **args)
    try:
        kept = registry.is_identity(built, channels, dims)
    except Exception as error:
        raise IdentityError(
            f"{block.__name__} fails on a random map of {channels} channels: {type(error).__name__}: {error}"
        ) from error
    if not kept:
        raise IdentityError(
            f"{block.__name__} changes the function at init; ask for init: blend (x + α(f(x) − x), α = 0) "
            "or init: paper (as it is)"
        )


def macs_of(record: Record) -> int:
    """Multiply-accumulates of a run for one sample: convolutions and matrix products."""
    if not record.complete or not record.input_values:
        return 0
    total = 0
    for op in record.calls[0].ops():
        shapes = [record.shape(i) for i in op.ins]
        kind = op.name.split(".")[1]
        if kind == "convolution":
            x, weight, out = shapes[0], shapes[1], record.shape(op.outs[0])
            larger = math.prod(out[2:]) > math.prod(x[2:])  # transposed: each input position is spread
            total += math.prod(x if larger else out) * math.prod(weight[1:])
        elif kind in ("mm", "bmm"):
            total += math.prod(shapes[0]) * shapes[1][-1]
        elif kind in ("addmm", "baddbmm"):
            total += math.prod(shapes[1]) * shapes[2][-1]
        elif "scaled_dot_product" in kind:
            (*batch, n, d), keys, values = shapes[0], shapes[1][-2], shapes[2][-1]
            total += math.prod(batch) * n * keys * (d + values)
    return total // max(1, record.shape(record.input_values[0])[0])


# --- the table ---------------------------------------------------------------------------------


def table(plan: Plan) -> str:
    """The plan for people: rules with their counts, then a row per site, then the sums."""
    lines = [f"{plan.recipe.name} on {plan.model_name}: {_sites(len(plan.sites))}"]
    for index, rule in enumerate(plan.recipe.rules):
        own = [s for s in plan.sites if s.rule == index]
        where = (
            rule.place
            or f"{'after' if rule.after else 'before'} {', '.join(rule.after or rule.before or ())}"
        )
        args = ", ".join(f"{k}={v}" for k, v in rule.args.items())
        detail = f" ({args})" if args else ""
        lines.append(
            f"rule {index + 1}: {rule.block_name}{detail}, {where}, init {rule.init}: {_sites(len(own))}"
        )
    header = ("site", "shape", "layout", "new module", "how", "parameters", "MACs")
    rows = [header, *(_row(s) for s in plan.sites)]
    widths = [max(len(r[i]) for r in rows) for i in range(len(header))]
    right = {5, 6}
    for row in rows:
        cells = [
            c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  " + "  ".join(cells).rstrip())
    for reason in dict.fromkeys(s.reason for s in plan.sites if s.reason):
        lines.append(f"module: {reason}")
    lines.append(_sum("parameters", plan.parameters, plan.base_parameters))
    if plan.base_macs:
        lines.append(_sum("MACs", plan.macs, plan.base_macs))
    if all(s.init != "paper" for s in plan.sites):
        lines.append("output identical until training begins")
    else:
        lines.append("output changes at once (init: paper)")
    lines += [f"note: {n}" for n in plan.notes]
    return "\n".join(lines)


def _row(site: Site) -> tuple[str, ...]:
    call = f" call {site.call}" if site.call > 1 else ""
    item = "" if site.output is None else f"[{site.output!r}]"
    path = f"{site.position} {site.path}{item}{call}"
    shape = "×".join(map(str, site.shape[1:]))
    return (
        path,
        shape,
        str(site.layout),
        site.name,
        site.mechanism,
        f"{site.parameters:,}",
        human(site.macs),
    )


def _sum(what: str, new: int, base: int) -> str:
    show = human if what == "MACs" else "{:,}".format
    return f"{what}: {show(base)} + {show(new)} = {show(base + new)} (+{100 * new / max(base, 1):.1f} %)"


def _sites(count: int) -> str:
    return "1 site" if count == 1 else f"{count} sites"


def human(count: int) -> str:
    """12.3 M for 12,345,678, 4.10 G for 4,096,000,000: always three digits from 1,000."""
    for limit, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= limit:
            return f"{count / limit:#.3g}".rstrip(".") + f" {unit}"
    return str(count)
