"""Several deltas on one base, each under a name: one is active, the others wait beside the model.

A delta that waits is its blocks and the tensors that its file held; no parameter and no key of the model shows it.
Switching puts these very objects in place of those that are there: nothing is copied, and no other tensor is touched.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from attninject.errors import DeltaError
from attninject.observe.example_inputs import first_float
from attninject.planning import support
from attninject.surgery import apply, injected_state
from attninject.wording import nearest_hint

BASE = "base"
"""What stands for no delta, beside None: no delta can be called so."""
_DELTAS = "_attninject_deltas"  # attribute of a model


@dataclass
class _Waiting:
    """A delta that is not active: what hung on which module, its tensors by key, and how the modules were then."""

    removed: dict[str, apply.Removed]
    tensors: dict[str, Tensor]
    like: dict[str, tuple[torch.device, torch.dtype]]


@dataclass
class _Deltas:
    """The named deltas of a model. `displaced`: the base's tensors whose places those of the active one have."""

    active: str | None = None
    displaced: dict[str, Tensor] = field(default_factory=dict)
    waiting: dict[str, _Waiting] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(sorted({*self.waiting, *([] if self.active is None else [self.active])}))


def active(model: nn.Module) -> str | None:
    """The name of the delta that is active; None: the base, or a model whose deltas have no names.

    Looks through DDP, torch.compile and averages.
    """
    return _deltas_of(model).active


def names(model: nn.Module) -> tuple[str, ...]:
    """The names of a model's deltas, sorted."""
    return _deltas_of(model).names


def own_keys(model: nn.Module) -> set[str]:
    """The keys of the tensors that the active delta has in place of the base's."""
    return set(_deltas_of(model).displaced)


def activate(model: nn.Module, name: str | None) -> nn.Module:
    """Put the delta of this name in place of the active one; None or "base": the base alone. Returns the same model.

    What was active is kept with all that training did to it. Either the whole delta is in, or an error is raised and
    the model is as it was. Each delta has `Parameter` objects of its own: an optimizer trains the one it was made of,
    and `requires_grad` is each one's own. Switch before `torch.compile` and before DDP, which count the parameters once.

    Raises:
        DeltaError: no delta has this name; the blocks that are in have none.
        UnsupportedModelError: wrapped, compiled or sharded.
        CannotRewriteError: a module that the delta changes is another one since.
    """
    support.refuse_unsupported(model)
    deltas = _deltas_of(model)
    if name is not None and name != BASE and name not in deltas.names:
        has = ", ".join(deltas.names)
        raise DeltaError(
            f"the model has no delta {name!r}{nearest_hint(name, deltas.names)}; "
            + (f"it has {has}" if has else "load it under that name: ai.load(model, file, name=…)")
        )
    _switch(model, deltas, None if name == BASE else name)
    return model


def unload(model: nn.Module, name: str | None = None) -> nn.Module:
    """Forget a named delta, or all of them; where it was active, the base is left. Returns the same model.

    Raises:
        DeltaError, UnsupportedModelError, CannotRewriteError: see `activate`.
    """
    support.refuse_unsupported(model)
    deltas = _deltas_of(model)
    if name is None or name == deltas.active:
        activate(model, None)
    elif name not in deltas.waiting:
        activate(model, name)  # says that there is none
    for gone in deltas.names if name is None else (name,):
        del deltas.waiting[gone]
    if not deltas.names:
        model.__dict__.pop(_DELTAS, None)
    return model


@contextlib.contextmanager
def added(model: nn.Module, name: str, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[None]:
    """A new delta: in the body, the model is its base with tensors of its own under the keys of `shapes`.

    What the body injects and writes there is the delta. Then what was active is so again, or the new one where nothing
    was; if the body raises, the model is as it was. A Linear or convolution may have another number of outputs.

    Raises:
        DeltaError: the name is taken or none, or the model has blocks without a name.
    """
    support.refuse_unsupported(model)
    deltas = _deltas_of(model)
    if not isinstance(name, str) or not name or name == BASE:
        raise DeltaError(f"{name!r} is no name for a delta: take any text but {BASE!r}")
    if name in deltas.names:
        raise DeltaError(f"the model has a delta {name!r} already; ai.unload(model, {name!r}) forgets it")
    was = deltas.active
    _switch(model, deltas, None)
    try:
        displaced = _exchange(model, _fresh(model, shapes))
        try:
            yield
        except BaseException:
            _exchange(model, displaced)
            raise
        deltas.active, deltas.displaced = name, displaced
        model.__dict__[_DELTAS] = deltas
    finally:
        if was is not None:
            _switch(model, deltas, was)


def _deltas_of(model: nn.Module) -> _Deltas:
    found = support.unwrapped(model).__dict__.get(_DELTAS)
    return found if isinstance(found, _Deltas) else _Deltas()


def _switch(model: nn.Module, deltas: _Deltas, name: str | None) -> None:
    """The active delta out, the one of this name in; both or neither."""
    was = deltas.active
    if name == was and name is not None:
        return
    if was is None and injected_state.injected_blocks(model):
        raise DeltaError(
            "the model has blocks that belong to no named delta: ai.save them and ai.load the file under a name, into "
            "a clean base; ai.eject takes them out"
        )
    waiting = dict(deltas.waiting)
    with contextlib.ExitStack() as undo:
        if was is not None:
            removed = apply.take_out(model)
            undo.callback(apply.put_back, model, removed)
            own = _exchange(model, deltas.displaced)
            undo.callback(_exchange, model, own)
            waiting[was] = _Waiting(removed, own, _like(model, removed))
        displaced: dict[str, Tensor] = {}
        if name is not None:
            wanted = waiting.pop(name)
            displaced = _exchange(model, wanted.tensors)
            undo.callback(_exchange, model, displaced)
            _follow(model, wanted)
            apply.put_back(model, wanted.removed)
        undo.pop_all()
    deltas.active, deltas.displaced, deltas.waiting = name, displaced, waiting


def _like(model: nn.Module, paths: Iterable[str]) -> dict[str, tuple[torch.device, torch.dtype]]:
    """Device and dtype of the modules that blocks hang on, which are out now."""
    fallback = first_float(model)
    like = {path: first_float(model.get_submodule(path), fallback) for path in paths}
    return {path: (tensor.device, tensor.dtype) for path, tensor in like.items()}


def _follow(model: nn.Module, delta: _Waiting) -> None:
    """Take the blocks of a delta where the modules around them have gone while it waited, and into their mode."""
    for path, now in _like(model, delta.removed).items():
        for block in delta.removed[path].blocks.values():
            if now != delta.like[path]:
                block.to(*now)
            block.train(model.get_submodule(path).training)


def _exchange(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put tensors in the places of those of these keys, which it returns; their device and dtype are followed.

    Raises:
        DeltaError: a key is gone, or has another shape, and nothing was changed.
    """
    places = {key: _place(model, key) for key in tensors}
    displaced = {key: getattr(*place) for key, place in places.items()}
    for key, (module, _) in places.items():
        if not _fits(module, displaced[key].shape, tensors[key].shape):
            shapes = tuple(tensors[key].shape), tuple(displaced[key].shape)
            raise DeltaError(f"{key} has shape {shapes[0]} in the delta and {shapes[1]} in the model by now")
    with contextlib.ExitStack() as undo:
        for key, place in places.items():
            undo.callback(_set, model, *place, displaced[key])
            _set(model, *place, tensors[key])
        undo.pop_all()
    return displaced


def _set(model: nn.Module, module: nn.Module, name: str, tensor: Tensor) -> None:
    """One tensor in the place of another, whose device and dtype it follows."""
    old = getattr(module, name)
    if (tensor.device, tensor.dtype) != (old.device, old.dtype):
        tensor.data = tensor.data.to(old.device, old.dtype)
    setattr(module, name, tensor)
    if tensor.shape != old.shape:  # let the layer, and a model that counts its classes, say what they are now
        setattr(module, str(_outputs(module)), len(tensor))
        if getattr(model, "num_classes", None) == len(old):
            model.num_classes = len(tensor)  # type: ignore[assignment]


def _place(model: nn.Module, key: str) -> tuple[nn.Module, str]:
    """The module that has the tensor of a key, and the tensor's name there."""
    path, _, name = key.rpartition(".")
    with contextlib.suppress(AttributeError):
        module = model.get_submodule(path)
        if module._parameters.get(name, module._buffers.get(name)) is not None:
            return module, name
    raise DeltaError(f"the model has no {key} any more, which the delta has a value for")


def _fits(module: nn.Module, old: torch.Size, new: torch.Size) -> bool:
    """Whether a tensor may take the place of another: of the same shape, or of a layer with other outputs."""
    return old == new or (_outputs(module) is not None and old[1:] == new[1:])


def _outputs(module: nn.Module) -> str | None:
    """The attribute that says how many outputs a layer has, whose tensors have a row for each; None: of no other."""
    if isinstance(module, nn.Linear):
        return "out_features"
    plain = isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and module.groups == 1
    return "out_channels" if plain else None


def _fresh(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """A tensor of its own for each key that the model has, like the one there; tied ones are tied again."""
    made: dict[int, Tensor] = {}
    found: dict[str, Tensor] = {}
    for key in [key for key in model.state_dict() if key in shapes]:  # what else there is, `load` says
        module, name = _place(model, key)
        old, shape = getattr(module, name), torch.Size(shapes[key])
        if id(old) not in made:
            like, other = old.detach(), old.shape != shape and _fits(module, old.shape, shape)
            new = like.new_empty(shape) if other else torch.empty_like(like)
            made[id(old)] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
        found[key] = made[id(old)]
    return found
