"""Fine-tuning: freezing, parameter groups, data, and the engine behind `attninject finetune`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOME = {
    "freeze": "freezing",
    "unfreeze": "freezing",
    "trainable": "freezing",
    "GradualUnfreezing": "freezing",
    "param_groups": "groups",
    "extend_optimizer": "groups",
    "Result": "job",
    "finetune": "engine",
    "run_experiment": "engine",
    "trained": "engine",
    "read_experiment": "experiment",
}

__all__ = [
    "GradualUnfreezing",
    "Result",
    "extend_optimizer",
    "finetune",
    "freeze",
    "param_groups",
    "read_experiment",
    "run_experiment",
    "trainable",
    "trained",
    "unfreeze",
]

if TYPE_CHECKING:
    from .engine import finetune, run_experiment, trained
    from .experiment import read_experiment
    from .freezing import GradualUnfreezing, freeze, trainable, unfreeze
    from .groups import extend_optimizer, param_groups
    from .job import Result


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
