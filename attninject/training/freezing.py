"""Freezing: what may learn, and which batch norms keep their statistics.

`freeze` sets `requires_grad` and holds norms in eval; `unfreeze` undoes exactly that. Nothing else of the
model changes: no key, no class, no hook. A held norm carries an object of its own under the name `train`,
which ignores the mode that a parent hands down; it is a plain attribute of the instance, so it goes along
with deepcopy and pickle and is invisible to the state dict. (Converting norms, as `convert_sync_batchnorm`
does, makes new modules: convert first, freeze afterwards.)
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from attninject import api
from attninject.errors import UnsupportedModelError
from attninject.inspection import Learning, learning_of
from attninject.planning import support
from attninject.surgery import change_history

from .heads import Head, remember_head
from .selecting import What, select


def freeze(
    model: nn.Module, what: What = "backbone", bn: str = "eval", head: Head | None = None
) -> nn.Module:
    """Take parameters out of training, and keep their norms' statistics still; returns the same model.

    Args:
        model: anything but a DDP wrapper, which must be put on afterwards.
        what: `backbone` (all but blocks and head), `head`, `injected` (the blocks); a pattern over names of
            modules and parameters, with all below (`layer[12]`, `**.bias`), which takes a block only where
            it matches nothing else; the number of a stage (1 the first, -1 the last); or a list of these.
        bn: `eval`: norms with running statistics stay in eval mode through `.train()`; `train`: they go on.
        head: the head, by pattern or as the module, where it is not found (timm's classifier; all that is
            beside a child named `backbone`; else the last Linear). Remembered for later calls.

    Raises:
        NoMatchError: nothing in the model is meant by `what`.
        NoHeadError: `backbone` or `head` was asked for, and the head was not found.
    """
    if bn not in ("eval", "train"):
        raise ValueError(f"bn: expected 'eval' or 'train', found {bn!r}")
    _refuse_ddp(model)
    model = support.unwrapped(model)
    if head is not None:
        remember_head(model, head)
    chosen = select(model, what)
    injected = bool(api.injected(model))
    for module, name in chosen.parameters:
        parameter = module._parameters[name]
        if parameter is not None and parameter.requires_grad:
            changed = injected and change_history.changed_since_injection(parameter)
            parameter.requires_grad_(False)
            module.__dict__.setdefault(change_history.FROZEN, {})[name] = changed
    for norm in chosen.norms if bn == "eval" else ():
        if change_history.HELD not in norm.__dict__:
            norm.__dict__[change_history.HELD] = injected and change_history.changed_since_injection(norm)
            norm.__dict__["train"] = _Held(norm)
            norm.training = False
    return model


def unfreeze(model: nn.Module, what: What = "backbone") -> nn.Module:
    """Undo `freeze` for a part: its parameters learn again, its norms follow `.train()` and `.eval()`.

    What `freeze` did not freeze stays as it is, parameters that never required grad among it. A norm takes
    the mode of the module around it.

    Raises:
        NoMatchError, NoHeadError: see `freeze`.
    """
    _refuse_ddp(model)
    model = support.unwrapped(model)
    chosen = select(model, what)
    for module, name in chosen.parameters:
        frozen = module.__dict__.get(change_history.FROZEN, {})
        if name in frozen:
            module._parameters[name].requires_grad_(True)  # type: ignore[union-attr]
            del frozen[name]
            if not frozen:
                del module.__dict__[change_history.FROZEN]
    for norm, around in chosen.norms.items():
        if norm.__dict__.pop(change_history.HELD, None) is not None:
            del norm.__dict__["train"]
            norm.training = around.training
    return model


def trainable(model: nn.Module) -> Learning:
    """How much of the model learns, in a line: "2.5 M of 28.1 M (9.0 %)"; the counts are `.learning`, `.total`."""
    return learning_of(support.unwrapped(model))


def follow(model: nn.Module, copy: nn.Module) -> None:
    """Unfreeze in a copy of a model, made while it was frozen, what is no longer frozen in the model."""
    theirs = dict(copy.named_modules())
    for path, module in model.named_modules():
        twin = theirs[path]
        for name, parameter in module._parameters.items():
            ours = twin._parameters[name]
            if parameter is not None and ours is not None and parameter.requires_grad:
                ours.requires_grad_(True)
        if (
            change_history.HELD not in module.__dict__
            and twin.__dict__.pop(change_history.HELD, None) is not None
        ):
            del twin.__dict__["train"]
            twin.training = theirs[path.rpartition(".")[0]].training


class GradualUnfreezing:
    """Unfreeze parts at the beginning of given epochs: `GradualUnfreezing(model, {2: -1, 4: "backbone"})`.

    Call `step(epoch)` as each epoch (from 0) begins; after a resume it catches up. Pass the parameters that
    it returns on to the optimizer (`extend_optimizer`) unless they are in it already.
    """

    def __init__(self, model: nn.Module, schedule: Mapping[int, What]) -> None:
        self.model, self.schedule = model, dict(sorted(schedule.items()))
        for what in self.schedule.values():  # a wrong name is said now, not after hours
            select(support.unwrapped(model), what)

    def step(self, epoch: int) -> list[nn.Parameter]:
        """Unfreeze all that is due; the parameters that begin to learn with this call."""
        before = {id(p) for p in self.model.parameters() if p.requires_grad}
        for due, what in self.schedule.items():
            if due <= epoch:
                unfreeze(self.model, what)
        return [p for p in self.model.parameters() if p.requires_grad and id(p) not in before]


class _Held:
    """Stands for the `train` method of one norm: the norm stays in eval, its children follow."""

    def __init__(self, norm: nn.Module) -> None:
        self.norm = norm

    def __call__(self, mode: bool = True) -> nn.Module:
        for child in self.norm.children():
            child.train(mode)
        return self.norm


def _refuse_ddp(model: nn.Module) -> None:
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise UnsupportedModelError(
            "DistributedDataParallel has taken note of what learns: freeze or unfreeze model.module, and "
            "wrap it anew"
        )
