"""The verbs: plan, inject, eject, sites, injected, disabled, create_block."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import edits, planning, rewrite
from .blocks import registry
from .errors import NoMatchError, VerificationError
from .flow import Spot
from .layout import Layout
from .matching import Scene
from .patterns import compile_pattern, nearest, nearest_hint
from .places import PLACES
from .planning import Plan
from .probe import Inputs, probe
from .recipe import Recipe, Rule, load_recipe, recipe_names, rule_from_fields
from .record import map_tensors
from .snapshot import rng_kept, stand_ins

RecipeLike = Recipe | Rule | str | os.PathLike[str] | Mapping[str, Any]


def plan(
    model: nn.Module,
    recipe: RecipeLike | None = None,
    *,
    root: str = "",
    example_inputs: Any = None,
    strict: bool = True,
    args: Mapping[str, Any] | None = None,
    **rule: Any,
) -> Plan:
    """Resolve a recipe on a model, with every check; nothing is touched. `print` the result.

    Args:
        model: any `nn.Module` that is not wrapped, compiled, scripted or quantized.
        recipe: a shipped name, a path, a dict, a `Recipe`; or none, and the fields of one rule as keywords
            (`block=`, and one of `after=`, `before=`, `place=`).
        root: submodule that patterns and places are relative to, as "backbone.body".
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments; None: found.
        strict: a rule that is not `optional` and finds nothing is an error.
        args: the block's arguments; with a recipe they override those of every rule.

    Raises:
        RecipeError: the recipe is faulty.
        PlanError: a rule cannot be carried out; each kind has a class of its own.
        UnsupportedModelError, ProbeError: the model is not open to surgery, or fails its own forward.
    """
    resolved = _recipe(recipe, args, rule)
    return planning.make(model, resolved, root=root, example_inputs=example_inputs, strict=strict)


def inject(
    model: nn.Module,
    recipe: RecipeLike | Plan | None = None,
    *,
    root: str = "",
    example_inputs: Any = None,
    strict: bool = True,
    verify: bool = False,
    args: Mapping[str, Any] | None = None,
    **rule: Any,
) -> nn.Module:
    """Put attention into a model, in place, and return the same object.

    Either every site is in, or an error is raised and the model is as it was. The model computes bit for
    bit what it computed before until the first optimizer step (unless a rule says `init: paper`).

    Args:
        model: see `plan`.
        recipe: see `plan`; also a `Plan` that `plan` made for this very model.
        root: see `plan`.
        example_inputs: see `plan`.
        strict: see `plan`.
        verify: run the model on random inputs before and after, and compare.
        args: see `plan`.
        **rule: fields of one rule.

    Raises:
        ForeignPlanError, StalePlanError: a plan of another model, or of one changed since.
        VerificationError: `verify` found a difference; the model was restored.
    """
    if isinstance(recipe, Plan):
        if root or args or rule:
            raise TypeError("a plan is resolved already; give root, args and fields of a rule to plan()")
        given = recipe
        planning.refuse_unsupported(model)
        given.check(model)
    else:
        given = plan(
            model, recipe, root=root, example_inputs=example_inputs, strict=strict, args=args, **rule
        )
    before = _outputs(model, given) if verify else None
    changes = _changes(model, given)
    edits.remember(model)
    with rewrite.apply(changes):
        if verify and not _equal(before, _outputs(model, given)):
            raise VerificationError(
                f"the outputs of {given.model_name} differ after injecting {given.recipe.name}; it was restored"
            )
    return model


def eject(model: nn.Module, pattern: str | None = None) -> nn.Module:
    """Take injected blocks out again, all of them or those whose qualified name matches `pattern`.

    A pattern also takes every block below what it matches: `layer4.**`, `layer4`. Returns the same object.

    Raises:
        NoMatchError: no injected block matches; the names of those that are there are given.
    """
    planning.refuse_unsupported(model)
    names = list(edits.injected_blocks(model))
    if pattern is not None:
        wanted = compile_pattern(pattern)
        chosen = [n for n in names if wanted.matches(n) or any(wanted.matches(p) for p in _parents(n))]
        if not chosen:
            near = nearest(pattern, names) or names[:3]
            raise NoMatchError(
                f"no injected block matches {pattern!r}; "
                + (f"the nearest are {', '.join(near)}" if names else "the model has none")
            )
        names = chosen
    rewrite.revert(model, names)
    return model


def _parents(name: str) -> Iterator[str]:
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def injected(model: nn.Module) -> dict[str, nn.Module]:
    """Qualified name → block; {} on a clean model. Looks through DDP and torch.compile wrappers."""
    return edits.injected_blocks(unwrapped(model))


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Pass all blocks through for a while, e.g. to measure the baseline; nests, and survives errors."""
    with edits.bypassed(unwrapped(model)):
        yield model


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DDP, DataParallel and torch.compile wrappers."""
    while True:
        inner = model._modules.get("_orig_mod")
        if inner is None and isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            inner = model._modules.get("module")
        if inner is None:
            return model
        model = inner


def create_block(
    block: str | type[nn.Module], channels: int, *, init: str = "identity", dims: int = 2, **args: Any
) -> nn.Module:
    """A block alone, for inputs (B, channels, *positions) with `dims` spatial dimensions.

    Raises:
        UnknownBlockError, BlockError, TooFewChannelsError: with the valid names and ranges.
    """
    return registry.create_block(block, channels, init=init, dims=dims, **args)


def list_blocks() -> list[str]:
    """Sorted names of the blocks."""
    return registry.list_blocks()


def list_recipes() -> list[str]:
    """Sorted names of the recipes shipped with the package."""
    return recipe_names()


def list_places() -> list[str]:
    """Sorted names of the places."""
    return sorted(PLACES)


# --- sites -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SiteInfo:
    """What can be targeted: one call of one module.

    `shape` and `layout` are those of its result; None where that is no single tensor of a known layout.
    """

    path: str
    call: int
    calls: int
    type: str
    shape: tuple[int, ...] | None
    layout: Layout | None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        layout = None if self.layout is None else str(self.layout)
        return {**self.__dict__, "shape": self.shape and list(self.shape), "layout": layout}


class SiteList(tuple[SiteInfo, ...]):
    """A tuple of `SiteInfo` that prints as a table."""

    __slots__ = ()

    def __str__(self) -> str:
        rows = [("path", "call", "type", "shape", "layout")]
        for s in self:
            shape = "×".join(map(str, s.shape)) if s.shape else "no tensor"
            call = str(s.call) if s.calls == 1 else f"{s.call} of {s.calls}"
            rows.append((s.path or "(the model)", call, s.type, shape, str(s.layout or "")))
        widths = [max(len(r[i]) for r in rows) for i in range(5)]
        return "\n".join("  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows)


def sites(model: nn.Module, pattern: str = "**", *, root: str = "", example_inputs: Any = None) -> SiteList:
    """Every call that a pattern can target, in call order: path, call, shape, layout. Touches nothing.

    Raises:
        NoMatchError: the pattern matches no module; the nearest names are given.
    """
    planning.refuse_unsupported(model)
    planning.check_root(model, root)
    wanted = compile_pattern(pattern)
    with edits.as_original(model):
        record, _ = probe(model, example_inputs, partial=True)
    scene = Scene(model, record, root, lambda how: None)
    names = {id(m): n for n, m in reversed(scene.names.items()) if wanted.matches(n)}
    if not names:
        raise NoMatchError(
            f"no module matches {pattern!r}{nearest_hint(pattern, [n for n in scene.names if n])}"
        )
    found = []
    for call in record.calls:
        if id(call.module) in names:
            calls = call.parent.runs[id(call.module)] if call.parent else 1
            value = call.outs[0] if len(call.outs) == 1 else None
            shape = None if value is None else record.shape(value)
            layout = None if value is None else scene.layout(Spot(call, "after", value))
            kind = edits.base_class(call.module).__name__
            found.append(SiteInfo(scene.path(call.module), call.number, calls, kind, shape, layout))
    return SiteList(found)


# --- carrying out ------------------------------------------------------------------------------


def _recipe(recipe: RecipeLike | None, args: Mapping[str, Any] | None, rule: Mapping[str, Any]) -> Recipe:
    if recipe is None:
        made = rule_from_fields(args=args, **rule)
        return Recipe(made.child_name, (made,))
    if rule:
        raise TypeError(f"a recipe and fields of a rule ({', '.join(rule)}) exclude each other")
    loaded = load_recipe(recipe)
    return loaded.with_args(args) if args else loaded


def _changes(model: nn.Module, given: Plan) -> list[edits.Change]:
    """Build the blocks and group them by holder. The generators' states are put back."""
    fallback = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    grouped: dict[int, list[tuple[planning.Step, nn.Module]]] = {}
    with rng_kept():
        for step in given.steps:
            grouped.setdefault(id(step.holder), []).append((step, _build(step, fallback)))
    for pairs in grouped.values():  # around one carrier: `before units` runs before `before units.0`
        pairs.sort(key=lambda pair: pair[0].time if pair[0].insertion.target is None else -1)
    return [
        edits.Change(
            pairs[0][0].holder,
            tuple((step.insertion, block) for step, block in pairs),
            next((step.local for step, _ in pairs if step.local), None),
            tuple(step.source for step, _ in pairs),
        )
        for pairs in grouped.values()
    ]


def _build(step: planning.Step, fallback: Tensor) -> nn.Module:
    """The block of a step, on the device and in the dtype and mode of where it goes."""
    site = step.site
    block = registry.create_block(
        site.block, site.channels, init=site.init, dims=site.layout.dims, **site.args
    )
    like = next((p for p in step.holder.parameters() if p.is_floating_point()), fallback)
    block.to(device=like.device if step.device.type == "meta" else step.device, dtype=like.dtype)
    block.train(step.holder.training)
    block.__dict__[edits.SITE] = site
    return block


def _outputs(model: nn.Module, given: Plan) -> list[Any]:
    """Outputs in eval and in train mode on random inputs; the model's own buffers, modes and caches are spared."""
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    results: list[Any] = []
    with rng_kept(), torch.no_grad(), stand_ins(model, _own_buffer):
        torch.manual_seed(0)
        real = _real_inputs(given.inputs, like)
        for training in (False, True):
            torch.manual_seed(1)
            model.train(training)
            try:
                results.append(model(*real.args, **real.kwargs))
            except Exception as error:  # some models take targets in train mode
                results.append(repr(error))
    return results


def _own_buffer(tensor: Tensor) -> Tensor:
    """Parameters are shared with the run, everything that it may write to is not."""
    return tensor.detach() if isinstance(tensor, nn.Parameter) else tensor.detach().clone()


def _real_inputs(inputs: Inputs, like: Tensor) -> Inputs:
    def real(t: Tensor) -> Tensor:
        if not t.is_meta:
            return t
        if t.is_floating_point():
            return torch.randn(t.shape, device=like.device).to(t.dtype)
        return torch.zeros(t.shape, dtype=t.dtype, device=like.device)

    return Inputs(*map_tensors((inputs.args, inputs.kwargs), real))


def _equal(a: Any, b: Any) -> bool:
    flat_a: list[Tensor] = []
    flat_b: list[Tensor] = []
    map_tensors(a, flat_a.append)
    map_tensors(b, flat_b.append)
    same = len(flat_a) == len(flat_b)
    return same and all(torch.equal(x, y) for x, y in zip(flat_a, flat_b, strict=True))
