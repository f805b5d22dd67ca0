"""attninject: attention injected into pretrained vision networks, without losing a weight.

`attninject.inject(model, "cbam_resnet")` is the whole of it; see the README for recipes and guarantees.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

# public name -> the room that it lives in; loaded on first use
_HOME = {
    **dict.fromkeys(
        (
            "create_block", "disabled", "eject", "inject", "injected", "list_blocks", "list_places",
            "list_recipes", "plan",
        ),
        "api",
    ),
    "sites": "planning.sites",
    **dict.fromkeys(("Plan", "Site"), "planning.plan"),
    **dict.fromkeys(("Recipe", "Rule"), "recipe.rules"),
    **dict.fromkeys(("load_recipe", "parse_recipe"), "recipe.loading"),
    "register_block": "blocks.registry",
    "AttnInjectError": "errors",
    "attention_maps": "attention",
    "visualize": "evidence.pictures",
    **dict.fromkeys(("activate", "active", "unload"), "switching"),
    "compile_blocks": "compiling",
    "status": "inspection",
    "save": "delta",
    "load": "delta",
    **dict.fromkeys(("freeze", "trainable", "unfreeze"), "training.freezing"),
    "param_groups": "training.groups",
    "rank_sites": "evidence.rank",
    "push_to_hub": "sharing",
}  # fmt: skip

__all__ = sorted([*_HOME, "__version__"])

if TYPE_CHECKING:  # `as`: names that type checkers take for public ones
    from attninject.api import create_block as create_block
    from attninject.api import disabled as disabled
    from attninject.api import eject as eject
    from attninject.api import inject as inject
    from attninject.api import injected as injected
    from attninject.api import list_blocks as list_blocks
    from attninject.api import list_places as list_places
    from attninject.api import list_recipes as list_recipes
    from attninject.api import plan as plan
    from attninject.attention import attention_maps as attention_maps
    from attninject.blocks.registry import register_block as register_block
    from attninject.compiling import compile_blocks as compile_blocks
    from attninject.delta import load as load
    from attninject.delta import save as save
    from attninject.errors import AttnInjectError as AttnInjectError
    from attninject.evidence.pictures import visualize as visualize
    from attninject.evidence.rank import rank_sites as rank_sites
    from attninject.inspection import status as status
    from attninject.planning.plan import Plan as Plan
    from attninject.planning.planned_site import Site as Site
    from attninject.planning.sites import sites as sites
    from attninject.recipe.loading import load_recipe as load_recipe
    from attninject.recipe.loading import parse_recipe as parse_recipe
    from attninject.recipe.rules import Recipe as Recipe
    from attninject.recipe.rules import Rule as Rule
    from attninject.sharing import push_to_hub as push_to_hub
    from attninject.switching import activate as activate
    from attninject.switching import active as active
    from attninject.switching import unload as unload
    from attninject.training.freezing import freeze as freeze
    from attninject.training.freezing import trainable as trainable
    from attninject.training.freezing import unfreeze as unfreeze
    from attninject.training.groups import param_groups as param_groups


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
        globals()[name] = value
        return value
    if name == "training":  # the one room with verbs of its own: ai.training.finetune
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
