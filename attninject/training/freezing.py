"""Freezing: what may learn, and which batch norms keep their statistics.

`freeze` sets `requires_grad` and holds norms in eval; `unfreeze` undoes exactly that. Nothing else of the
model changes: no key, no class, no hook. A held norm carries an object of its own under the name `train`,
which ignores the mode that a parent hands down; it is a plain attribute of the instance, so it goes along
with deepcopy and pickle and is invisible to the state dict. (Converting norms, as `convert_sync_batchnorm`
does, makes new modules: convert first, freeze afterwards.)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from attninject import api
from attninject.anatomy.place_map import PlaceMap
from attninject.errors import AttnInjectError, NoHeadError, NoMatchError, UnsupportedModelError
from attninject.observe.probe import probe
from attninject.planning import support
from attninject.recipe.patterns import compile_pattern
from attninject.surgery import change_history, injected_state
from attninject.wording import nearest, nearest_hint, parameter_count

from .words import WORDS

What = str | int | Sequence[str | int]
Head = str | nn.Module | Sequence[str | nn.Module]

_HEAD = "_attninject_head"  # attribute of a model: names of the head's modules, as `freeze(head=…)` said


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
        names = _named_head(model, head)
        model.__dict__[_HEAD] = names
    chosen = _select(model, what)
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
    chosen = _select(model, what)
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


def trainable(model: nn.Module) -> str:
    """How much of the model learns, in a line: "2.5 M of 28.1 M (9.0 %)"."""
    parameters = list(support.unwrapped(model).parameters())
    total = sum(p.numel() for p in parameters)
    learning = sum(p.numel() for p in parameters if p.requires_grad)
    share = 100 * learning / total if total else 0.0
    return f"{parameter_count(learning)} of {parameter_count(total)} ({share:.1f} %)"


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
            _select(support.unwrapped(model), what)

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


# --- which parameters and norms ----------------------------------------------------------------


@dataclass
class _Chosen:
    """Parameters as (module, name); norms with the module around each."""

    parameters: list[tuple[nn.Module, str]] = field(default_factory=list)
    norms: dict[nn.Module, nn.Module] = field(default_factory=dict)


def _select(model: nn.Module, what: What) -> _Chosen:
    parts = [what] if isinstance(what, str | int) else list(what)
    wanted: set[str] = set()
    for part in parts:
        wanted |= _keys(model, part)
    chosen, modules = _Chosen(), dict(model.named_modules())
    for path, module in modules.items():
        own = [n for n, p in module._parameters.items() if p is not None]
        taken = [n for n in own if _join(path, n) in wanted]
        chosen.parameters += [(module, n) for n in taken]
        if _has_statistics(module) and (path in wanted or (own and len(taken) == len(own))):
            chosen.norms[module] = modules[path.rpartition(".")[0]]
    return chosen


def _keys(model: nn.Module, part: str | int) -> set[str]:
    """Names of modules and parameters that a word, a stage's number or a pattern means."""
    if isinstance(part, bool) or not isinstance(part, str | int):
        raise TypeError(f"what: expected a word, a pattern or a stage's number, found {part!r}")
    every, blocks = _names(model), list(api.injected(model))
    inside = {n for n in every if _below(n, blocks)}
    if isinstance(part, int):
        return _stage(model, part) - inside
    if part == "injected":
        if not blocks:
            raise NoMatchError("the model has no injected blocks to freeze or unfreeze")
        return inside
    if part in ("backbone", "head"):
        head = {n for n in every if _below(n, head_of(model))} - inside
        return head if part == "head" else every - head - inside
    pattern = compile_pattern(part)
    found = {n for n in every if any(pattern.matches(name) for name in (n, *_parents(n)))}
    if not found:
        hint = nearest_hint(part, [n for n in every if n])
        raise NoMatchError(
            f"no module or parameter matches {part!r}{hint}; it may also be {', '.join(WORDS)}, or a stage's "
            f"number"
        )
    return (found - inside) or found


def _names(model: nn.Module) -> set[str]:
    modules = {name for name, _ in model.named_modules()}
    return modules | {name for name, _ in model.named_parameters(remove_duplicate=False)}


def _stage(model: nn.Module, number: int) -> set[str]:
    """Names of all that is first called within a stage."""
    with injected_state.as_original(model):
        record, _ = probe(model, partial=True)
    if not record.complete:
        record.input_values = record.calls[0].ins
    net = PlaceMap(record)
    count = len(net.spans)
    wanted = number if number > 0 else count + 1 + number
    if not 1 <= wanted <= count:
        raise NoMatchError(f"there is no stage {number}: {type(model).__name__} has {count} stages, from 1")
    began = {id(call.module): call.start for call in reversed(record.calls)}
    inside = [n for n, m in model.named_modules() if n and net.stage_of(began.get(id(m), -1)) == wanted]
    # below: a module that is never called itself (nn.MultiheadAttention's out_proj) goes with its owner
    return {n for n in _names(model) if _below(n, inside)}


def _below(name: str, modules: Iterable[str]) -> bool:
    above = {name, *_parents(name)}
    return any(module in above for module in modules)


def _parents(name: str) -> Iterator[str]:
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _has_statistics(module: nn.Module) -> bool:
    return any(b is not None and n.startswith("running_") for n, b in module._buffers.items())


# --- the head ----------------------------------------------------------------------------------


def head_of(model: nn.Module) -> list[str]:
    """Names of the head's modules; empty where timm says that there is none (`num_classes=0`).

    As `freeze(head=…)` said; else timm's own word; else all beside a child named `backbone` (torchvision's
    detectors and segmenters); else the last Linear; else a child named `classifier`.

    Raises:
        NoHeadError: none of these is there.
    """
    model = support.unwrapped(model)
    if _HEAD in model.__dict__:
        return list(model.__dict__[_HEAD])
    names = {id(m): n for n, m in model.named_modules()}
    own = _timm_head(model)
    if own is not None:
        return [names[id(m)] for m in own if id(m) in names and any(True for _ in m.parameters())]
    children = dict(model.named_children())
    if len(children) > 1 and "backbone" in children:
        return [n for n in children if n != "backbone"]
    blocks = list(api.injected(model))
    linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and not _below(n, blocks)]
    if linears:
        return [linears[-1]]
    if "classifier" in children:
        return ["classifier"]
    raise NoHeadError(
        f"the head of {type(model).__name__} was not found (no get_classifier, no Linear, no child named "
        f"'classifier'); name it, as in ai.freeze(model, head=\"fc\")"
    )


def _timm_head(model: nn.Module) -> list[nn.Module] | None:
    getter: Any = getattr(model, "get_classifier", None)
    if not callable(getter):
        return None
    found = getter()
    if isinstance(found, Mapping):
        found = list(found.values())
    several = isinstance(found, list | tuple | nn.ModuleList)
    return [m for m in (found if several else [found]) if isinstance(m, nn.Module)]


def _named_head(model: nn.Module, head: Head) -> tuple[str, ...]:
    """The head as the caller says it: patterns over module names, or modules."""
    parts: list[Any] = [head] if isinstance(head, str | nn.Module) else list(head)
    names = {id(m): n for n, m in model.named_modules()}
    found: list[str] = []
    for part in parts:
        if isinstance(part, nn.Module):
            if id(part) not in names:
                raise NoHeadError(f"the head given, a {type(part).__name__}, is no module of this model")
            found.append(names[id(part)])
            continue
        pattern = compile_pattern(part)
        matched = [n for n in names.values() if n and pattern.matches(n)]
        if not matched:
            near = nearest(part, [n for n in names.values() if n])
            hint = f"; the nearest are {', '.join(near)}" if near else ""
            raise NoHeadError(f"no module matches head={part!r}{hint}")
        found += matched
    if "" in found:
        raise AttnInjectError("the whole model cannot be its own head")
    return tuple(dict.fromkeys(found))
