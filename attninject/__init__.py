"""attninject: attention injected into pretrained vision networks, without losing a weight.

`attninject.inject(model, "cbam_resnet")` is the whole of it; see the README for recipes and guarantees.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

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
    "compile_blocks": "compiling",
    "save": "delta",
    "load": "delta",
    **dict.fromkeys(("freeze", "trainable", "unfreeze"), "training.freezing"),
    "param_groups": "training.groups",
}  # fmt: skip

__all__ = sorted([*_HOME, "__version__"])

if TYPE_CHECKING:
    from attninject.api import (
        create_block,
        disabled,
        eject,
        inject,
        injected,
        list_blocks,
        list_places,
        list_recipes,
        plan,
    )
    from attninject.attention import attention_maps
    from attninject.blocks.registry import register_block
    from attninject.compiling import compile_blocks
    from attninject.delta import load, save
    from attninject.errors import AttnInjectError
    from attninject.planning.plan import Plan
    from attninject.planning.planned_site import Site
    from attninject.planning.sites import sites
    from attninject.recipe.loading import load_recipe, parse_recipe
    from attninject.recipe.rules import Recipe, Rule
    from attninject.training.freezing import freeze, trainable, unfreeze
    from attninject.training.groups import param_groups


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
