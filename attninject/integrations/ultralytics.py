"""Blocks in detectors that Ultralytics trains.

Its trainer makes the net that it trains from the layers in the net's config and copies weights by name, so that blocks
of the net that was passed are left behind. A trainer made here puts them into every net that it makes: in a fresh run,
from a checkpoint of an earlier one, and on `resume`. Checkpoints hold the whole net, blocks included, as they always do.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, ClassVar, Unpack

import torch
from torch import nn

from attninject import api, site_rules
from attninject.errors import PlanError, UnsupportedModelError
from attninject.planning.plan import Plan
from attninject.recipe.loading import RecipeLike, load_recipe, rule_from_fields
from attninject.recipe.rules import Recipe, RuleFields, explains_fields
from attninject.wording import listed


class KeepsBlocks:
    """Goes in front of a trainer class of Ultralytics: `class Trainer(KeepsBlocks, DetectionTrainer)`.

    A net made from weights that carry blocks gets the same blocks with their values; another gets the recipe's.

    Attributes:
        recipe: what `ai.plan` takes; None: only nets whose weights carry blocks can be trained.
        example_inputs: see `ai.plan`.
    """

    recipe: ClassVar[RecipeLike | None] = None
    example_inputs: ClassVar[Any] = None

    def get_model(self, cfg: Any = None, weights: Any = None, verbose: bool = True) -> nn.Module:
        """The trainer's own net, with the blocks in.

        Args:
            cfg: the layers, as the trainer's own `get_model` takes them.
            weights: a net whose tensors are copied by name, or a checkpoint with one; None: none.
            verbose: whether the trainer prints the net.

        Raises:
            UnsupportedModelError: neither the trainer nor the weights know of any block.
            PlanError: the weights carry other blocks than the recipe gives.
        """
        model: nn.Module = super().get_model(cfg=cfg, weights=weights, verbose=verbose)  # type: ignore[misc]
        return with_blocks(model, _net_in(weights), self.recipe, self.example_inputs)


@explains_fields
def trainer_for(
    yolo: Any,
    recipe: RecipeLike | None = None,
    *,
    base: type | None = None,
    example_inputs: Any = None,
    **rule: Unpack[RuleFields],
) -> type:
    """A trainer class for `yolo.train(trainer=…)` whose nets carry blocks.

    Args:
        yolo: a `YOLO`, as loaded; its own net is not touched.
        recipe: what `ai.plan` takes. Without a recipe and a rule: the blocks that `yolo.model` carries now.
        base: the trainer class to extend; None: the one that Ultralytics has for the task of `yolo`.
        example_inputs: see `plan`.
        **rule: see `plan`:

    Raises:
        RecipeError: the recipe is faulty.
        UnsupportedModelError: no recipe was given, and the net carries no blocks.
    """
    given = _recipe(recipe, rule)
    net = getattr(yolo, "model", None)
    if given is None and isinstance(net, nn.Module) and api.injected(net):
        given = load_recipe({"name": "kept", "rules": [site["rule"] for site in site_rules.recorded(net)]})
    if given is None:
        raise UnsupportedModelError(
            f"no recipe was given, and the network of {type(yolo).__name__} carries no blocks that could be kept: "
            f"trainer_for(yolo, recipe), or ai.inject(yolo.model, recipe) first"
        )
    base = base or yolo.task_map[yolo.task]["trainer"]
    kept = {"recipe": given, "example_inputs": example_inputs, "__doc__": KeepsBlocks.__doc__}
    return type(base.__name__, (KeepsBlocks, base), kept)


def with_blocks(
    model: nn.Module, weights: nn.Module | None, recipe: RecipeLike | None, example_inputs: Any = None
) -> nn.Module:
    """Put blocks into a net without any, in place: those of `weights` with their values, else the recipe's.

    Raises:
        UnsupportedModelError, PlanError: see `KeepsBlocks.get_model`.
    """
    if weights is not None and api.injected(weights):
        found = site_rules.planned(model, site_rules.recorded(weights), "the weights", example_inputs)
        if recipe is not None:
            _compare(found, api.plan(model, recipe, example_inputs=example_inputs))
        _copy_blocks(weights, api.carry_out(model, found))
        return model
    if recipe is None:
        raise UnsupportedModelError(
            "the trainer has no recipe, and the weights that it starts from carry no blocks: give it a recipe "
            "(attninject.integrations.ultralytics.trainer_for)"
        )
    return api.carry_out(model, api.plan(model, recipe, example_inputs=example_inputs))


def _compare(carried: Plan, given: Plan) -> None:
    """Refuse a recipe that puts in other blocks than the weights have."""
    here, there = (
        {s.name: (site_rules.block_name(s), s.args) for s in plan.sites} for plan in (carried, given)
    )
    if here != there:
        other = sorted(name for name in {**here, **there} if here.get(name) != there.get(name))
        raise PlanError(
            f"the weights carry other blocks than the recipe {given.recipe.name} gives ({listed(other)}): leave the "
            f"recipe out to keep those of the weights, or ai.eject them first"
        )


def _copy_blocks(weights: nn.Module, model: nn.Module) -> None:
    """Values of the blocks, where the shapes agree: those in a head for other classes start anew."""
    theirs, fresh = weights.state_dict(), []
    names = tuple(f"{name}." for name in api.injected(model))
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if key.startswith(names):
                if key in theirs and theirs[key].shape == tensor.shape:
                    tensor.copy_(theirs[key])
                else:
                    fresh.append(key)
    if fresh:
        warnings.warn(
            f"{listed(fresh)} of the blocks have another shape in the weights, so they start untrained",
            UserWarning,
            stacklevel=2,
        )


def _net_in(weights: Any) -> nn.Module | None:
    """The net in what a trainer takes for weights: itself, or in a checkpoint, the average first."""
    if isinstance(weights, Mapping):
        weights = weights.get("ema") or weights.get("model")
    return weights if isinstance(weights, nn.Module) else None


def _recipe(recipe: RecipeLike | None, rule: RuleFields) -> Recipe | None:
    if recipe is not None:
        if rule:
            raise TypeError(f"a recipe and fields of a rule ({', '.join(rule)}) exclude each other")
        return load_recipe(recipe)
    if not rule:
        return None
    made = rule_from_fields(**rule)
    return Recipe(made.child_name, (made,))
