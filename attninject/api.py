"""The verbs: plan, inject, eject, injected, disabled, create_block, and the lists."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Unpack

from torch import nn

from attninject.anatomy.places import PLACES
from attninject.blocks import registry
from attninject.blocks.registry import BlockLike
from attninject.errors import NoMatchError, RebuiltModelWarning, VerificationError
from attninject.notebook import html_table
from attninject.observe.verify import equal, outputs
from attninject.planning import building, planner, support
from attninject.planning.plan import Plan
from attninject.planning.support import unwrapped
from attninject.recipe.loading import RecipeLike, load_recipe, recipe_names, rule_from_fields
from attninject.recipe.patterns import compile_pattern
from attninject.recipe.rules import Init, Recipe, RuleFields, explains_fields
from attninject.recipe.targets import as_ending
from attninject.surgery import apply, change_history, injected_state
from attninject.wording import nearest


@explains_fields
def plan(
    model: nn.Module,
    recipe: RecipeLike | None = None,
    *,
    root: str = "",
    example_inputs: Any = None,
    strict: bool = True,
    **rule: Unpack[RuleFields],
) -> Plan:
    """Resolve a recipe on a model, with every check; nothing is touched. `print` the result.

    Args:
        model: any `nn.Module` that is not wrapped, compiled, scripted or quantized.
        recipe: a shipped name, a path, a dict, a `Recipe`; or none, and the fields of one rule as keywords.
        root: submodule that patterns and places are relative to, as "backbone.body".
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments; None: found.
        strict: a rule that is not `optional` and finds nothing is an error.
        **rule: without a recipe: `block`, one of `after`, `before`, `place` and `replace`, and what else the rule says.
            With a recipe: `args` alone, which override those of every rule.

    Raises:
        RecipeError: the recipe is faulty.
        PlanError: a rule cannot be carried out; each kind has a class of its own.
        UnsupportedModelError, ProbeError: the model is not open to surgery, or fails its own forward.
    """
    resolved = _recipe(recipe, rule)
    return planner.make(model, resolved, root=root, example_inputs=example_inputs, strict=strict)


@explains_fields
def inject(
    model: nn.Module,
    recipe: RecipeLike | Plan | None = None,
    *,
    root: str = "",
    example_inputs: Any = None,
    strict: bool = True,
    verify: bool = False,
    **rule: Unpack[RuleFields],
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
        **rule: see `plan`:

    Raises:
        ForeignPlanError, StalePlanError: a plan of another model, or of one changed since.
        VerificationError: `verify` found a difference; the model was restored.

    Warns:
        RebuiltModelWarning: the model's own trainer or loader would make it anew from its config, without blocks.
    """
    if isinstance(recipe, Plan):
        if root or rule.pop("args", None) or rule:
            raise TypeError("a plan is resolved already; give root, args and fields of a rule to plan()")
        given = recipe
        support.refuse_unsupported(model)
        given.check(model)
    else:
        given = plan(model, recipe, root=root, example_inputs=example_inputs, strict=strict, **rule)
    if (advice := support.rebuilt_from_config(model)) and not injected_state.injected_blocks(model):
        warnings.warn(advice, RebuiltModelWarning, stacklevel=2)
    return carry_out(model, given, verify=verify)


def carry_out(model: nn.Module, given: Plan, *, verify: bool = False) -> nn.Module:
    """What `inject` does once there is a plan of this very model, as it is now; returns the same model.

    Raises:
        VerificationError: see `inject`.
    """
    before = outputs(model, given.inputs) if verify else None
    blocks = building.build(given, model)
    change_history.remember(model)
    with apply.apply(blocks):
        change_history.remember_blocks(block for _, block in blocks)
        if verify and not equal(before, outputs(model, given.inputs)):
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
    support.refuse_unsupported(model)
    names = list(injected_state.injected_blocks(model))
    if pattern is not None:
        wanted = compile_pattern(pattern)
        chosen = [n for n in names if wanted.matches(n) or any(wanted.matches(p) for p in _parents(n))]
        if not chosen:
            near = f"; the nearest are {', '.join(nearest(pattern, names) or names[:3])}"
            near = as_ending(pattern, names) or near if names else "; the model has none"
            raise NoMatchError(f"no injected block matches {pattern!r}{near}")
        names = chosen
    apply.revert(model, names)
    return model


def _parents(name: str) -> Iterator[str]:
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


class InjectedBlocks(dict[str, nn.Module]):
    """Qualified name → block, in a notebook a table."""

    def _repr_html_(self) -> str:
        seen: set[int] = set()
        rows = []
        for name, block in self.items():
            count = f"{sum(p.numel() for p in block.parameters()):,}"
            rows.append((name, type(block).__name__, "shared" if id(block) in seen else count))
            seen.add(id(block))
        below = [] if rows else ["no injected blocks"]
        return html_table(("module", "block", "parameters"), rows, right={2}, below=below)


def injected(model: nn.Module) -> dict[str, nn.Module]:
    """Qualified name → block; {} on a clean model. Looks through DDP, torch.compile and averages."""
    return InjectedBlocks(injected_state.injected_blocks(unwrapped(model)))


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Pass all blocks through for a while, e.g. to measure the baseline; nests, and survives errors."""
    with injected_state.bypassed(unwrapped(model)):
        yield model


def create_block(
    block: BlockLike, channels: int, *, init: Init = "identity", dims: int = 2, **args: Any
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


def _recipe(recipe: RecipeLike | None, rule: RuleFields) -> Recipe:
    if recipe is None:
        made = rule_from_fields(**rule)
        return Recipe(made.child_name, (made,))
    args = rule.pop("args", None)
    if rule:
        raise TypeError(f"a recipe and fields of a rule ({', '.join(rule)}) exclude each other")
    loaded = load_recipe(recipe)
    return loaded.with_args(args) if args else loaded
