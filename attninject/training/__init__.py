"""Fine-tuning: freezing, parameter groups, images, and the engine behind `attninject finetune`.

For: training a model that has its blocks, from settings to files that ship: `freeze`, `param_groups`,
`finetune`, `run_experiment`, `trained`. Not for: changing a model's structure. Here `requires_grad` and the mode
of norms change, and `unfreeze` undoes it; the one layer ever put in is a head (`building`). Not for figures to
compare by either, which belong to `bench`.

A *run* is one fine-tuning from its first step to its last, whatever interrupts it; its folder is `runs.Folder`.
A *job* is what a run is asked for, its *state* all that training changes.

From the ground up, each importing only what stands before it:

- settings: words · monitors · finetune_settings · experiment
- a model's parts: dotted_names · heads · selecting · freezing · groups · dead_gates
- images: runs · data/
- machine and nets: devices · sharding · nets
- one step: losses · factories · metrics · multilabel_metrics · measuring · gate_movement · learner
- one run: job · optimizer_state · log_columns · run_state · resuming · run_files · callbacks · tracking · reporting ·
  loop · trial · cost · rate_test
- from outside: building · engine · evaluation · predicting · exporting

Nothing of the settings needs torch: the command line describes its flags from `experiment`.
"""

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
    "Callback": "callbacks",
    "finetune": "engine",
    "find_lr": "engine",
    "dry_run": "engine",
    "run_experiment": "engine",
    "trained": "engine",
    "read_experiment": "experiment",
}

__all__ = [
    "Callback",
    "GradualUnfreezing",
    "Result",
    "dry_run",
    "extend_optimizer",
    "find_lr",
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
    from .callbacks import Callback
    from .engine import dry_run, find_lr, finetune, run_experiment, trained
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
