"""The registry: every block by name, checked and built. Names map to classes here and nowhere else.

A class in a file of this folder is a block by having `facts`: no list names it, none has to be kept. Third-party
classes join by `register_block`, from Python only: nothing in a recipe is ever imported.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from attninject import blocks
from attninject.blocks import foreign, sources
from attninject.errors import BlockError, TooFewChannelsError, UnknownBlockError
from attninject.wording import name_of

from .base import Block, BlockSpec
from .controls import CONTROLS
from .forms import ConvForm
from .gate import Blend
from .geometry import Geometry
from .options import INITS, RESERVED, Int, OneOf, faults, nearest, unknown
from .paired import BlendedPair, PairBlock
from .replacement import Blended, Replacement

__all__ = [
    "BlockSpec",
    "block_table",
    "check_args",
    "create_block",
    "create_replacement",
    "get",
    "is_form",
    "is_given_twice",
    "is_identity",
    "list_blocks",
    "needs_second",
    "reference",
    "refused",
    "register_block",
    "resolve",
    "source_of",
    "takes_second",
]


def _own_classes() -> Iterator[type[Block]]:
    """The classes with `facts` in the files of this folder."""
    for file in pkgutil.iter_modules(blocks.__path__, f"{blocks.__name__}."):
        if file.ispkg or file.name == __name__:
            continue
        for cls in vars(importlib.import_module(file.name)).values():
            own = isinstance(cls, type) and cls.__module__ == file.name and issubclass(cls, Block)
            if own and "facts" in vars(cls):
                yield cls


_BUILT_IN: dict[str, BlockSpec] = {cls.facts.name: BlockSpec.of(cls) for cls in _own_classes()}
_TIMM: dict[str, foreign.TimmSpec] = {spec.name: spec for spec in foreign.BLOCKS}
_REGISTERED: dict[str, BlockSpec] = {}

M = TypeVar("M", bound=Callable[..., nn.Module])
BlockLike = str | type[nn.Module] | Callable[..., nn.Module] | nn.Module


def list_blocks() -> list[str]:
    """The names of all blocks, built in, timm's and registered, sorted."""
    return sorted({*_BUILT_IN, *_TIMM, *_REGISTERED})


def block_table() -> list[BlockSpec]:
    """The rows of all blocks, sorted by name; timm's and the registered ones come last."""
    tables = (_BUILT_IN, _TIMM, _REGISTERED)
    return [table[name] for table in tables for name in sorted(table)]


def get(name: str) -> BlockSpec:
    """The table row of a block; `UnknownBlockError` with the nearest names where there is none."""
    spec = _find(name) if isinstance(name, str) else None
    if spec is None:
        if refused(name):
            raise UnknownBlockError(f"{name!r} cannot be a block: {foreign.REFUSED[name]}")
        near = nearest(name, list_blocks()) if isinstance(name, str) else ""
        raise UnknownBlockError(
            f"no block is called {name!r}{near} (there are: {', '.join(list_blocks())}; "
            "others join by attninject.register_block)"
        )
    return spec


def refused(name: Any) -> bool:
    """Whether the name is one of timm's that is no block, for a reason that `get` gives."""
    return isinstance(name, str) and name in foreign.REFUSED


def _find(name: str) -> BlockSpec | None:
    return _BUILT_IN.get(name) or _TIMM.get(name) or _REGISTERED.get(name) or CONTROLS.get(name)


def resolve(block: BlockLike) -> BlockSpec:
    """The table row of a name, a class or what makes a block; one that nobody registered gets one made for it.

    Such a class may say what it supports by class attributes `supported_dims` (default `(2,)`) and `spatial`
    (default True); a function by attributes of its own.
    """
    if isinstance(block, str):
        return get(block)
    if not (_is_class(block) or sources.is_source(block)):
        raise BlockError(
            "a block is a name or a class derived from torch.nn.Module, a function or partial that makes one, or an "
            f"instance, found {block!r}"
        )
    for spec in (*_BUILT_IN.values(), *_REGISTERED.values(), *CONTROLS.values()):
        if block in (spec.cls, getattr(spec, "source", None)):
            return spec
    return _foreign_spec(name_of(block).lower(), block)


def _is_class(block: Any) -> bool:
    return isinstance(block, type) and issubclass(block, nn.Module)


def _foreign_spec(name: str, cls: Any) -> BlockSpec:
    if not _is_class(cls):
        return sources.spec_of(name, cls)
    dims = tuple(getattr(cls, "supported_dims", (2,)))
    spatial = bool(getattr(cls, "spatial", True))
    summary = (inspect.getdoc(cls) or "").split("\n")[0] if cls.__doc__ else ""
    return BlockSpec(name, "registered", spatial, summary=summary, cls=cls, dims=dims)


# --- third-party blocks -----------------------------------------------------------------------


def register_block(name: str) -> Callable[[M], M]:
    """Decorator of a class, or of a function that makes a module: recipes may from now on call it `name`.

    It is called as `cls(channels, **args)`; `dims` and `init` are passed where its signature has them.
    A built-in name or one held by another class is refused; the same class again is fine.
    """
    _check_name(name)

    def register(cls: M) -> M:
        if not (_is_class(cls) or sources.is_source(cls)):
            raise BlockError(
                f"register_block({name!r}) decorates a torch.nn.Module class or a function that makes one, "
                f"found {cls!r}"
            )
        held = _REGISTERED.get(name)
        if held is not None and _qualified(source_of(held)) != _qualified(cls):
            raise BlockError(f"the block name {name!r} is taken by {_qualified(source_of(held))}")
        _REGISTERED[name] = _foreign_spec(name, cls)
        return cls

    return register


def source_of(spec: BlockSpec) -> Any:
    """What is called for a block of this row (or copied, an instance)."""
    return getattr(spec, "source", spec.cls)


def _qualified(block: Any) -> str:
    said = sources.made_by(block)
    return f"{said.__module__}.{said.__qualname__}"


def _check_name(name: Any) -> None:
    if not isinstance(name, str) or not re.fullmatch(r"([A-Za-z][A-Za-z0-9_]*/)?[A-Za-z][A-Za-z0-9_]*", name):
        raise BlockError(
            f"a block's name is a word of letters, digits and _, with at most one 'prefix/' before it, "
            f"found {name!r}"
        )
    if name in _BUILT_IN or name in CONTROLS:
        raise BlockError(f"{name!r} is a built-in block and cannot be replaced; register under another name")
    if name.startswith("timm/"):
        raise BlockError(f"{name!r}: the prefix 'timm/' is kept for timm's own blocks")
    if hasattr(nn.Module, name.rpartition("/")[2]):
        raise BlockError(f"{name!r} is an attribute of every torch module and cannot name a child")


def reference(block: BlockLike) -> str | type[nn.Module]:
    """What a model and its files may keep of a block: a name or class as it is, of what makes one a name.

    The name is that under which it was registered, else its own, with `factory/` before it where that is taken.
    """
    if isinstance(block, str) or _is_class(block):
        return block  # type: ignore[return-value]
    for spec in _REGISTERED.values():
        if source_of(spec) is block:
            return spec.name
    own = name_of(block)
    return f"factory/{own}" if _find(own) else own


# --- checking and building --------------------------------------------------------------------


def check_args(name: BlockLike, args: Mapping[str, Any]) -> list[tuple[str | None, str]]:
    """Everything wrong with a block's arguments, without building it: (argument or None, sentence) pairs."""
    spec = resolve(name)
    if issubclass(spec.cls, Block):
        return faults(spec.name, spec.cls.options, args)
    return _foreign_faults(spec, args)


def _foreign_faults(spec: BlockSpec, args: Mapping[str, Any]) -> list[tuple[str | None, str]]:
    if isinstance(spec, foreign.TimmSpec):
        return faults(spec.name, spec.options, args)
    source = source_of(spec)
    if isinstance(source, nn.Module):
        return [(n, f"block {spec.name!r} is built already and takes no argument {n!r}") for n in args]
    parameters = _parameters(source)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    behind_channels = list(parameters.items())[1:]  # the first is the channels, whatever it is called
    named = {n: p for n, p in behind_channels if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    known = [n for n in named if n not in RESERVED]
    found: list[tuple[str | None, str]] = [
        (n, unknown(spec.name, n, known))
        for n in args
        if not isinstance(n, str) or n in RESERVED or (n not in known and not takes_any)
    ]
    for n in known:
        if named[n].default is inspect.Parameter.empty and n not in args:
            found.append((None, f"block {spec.name!r} needs the argument {n!r}"))
    return found


def _parameters(cls: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(cls).parameters)


def create_block(
    block: BlockLike,
    channels: int,
    *,
    init: str = "identity",
    dims: int = 2,
    other_channels: int | None = None,
    **args: Any,
) -> nn.Module:
    """Build a block for inputs of shape (B, channels, *S) with `dims` spatial dimensions.

    `other_channels`: of the second value, for a block that takes one; None: it is given its own input twice.
    `init`: `identity` (the model's function is unchanged), `paper` (the published gate and initialisation),
    `blend` (x + α(f(x) − x), α = 0). A foreign class is used as it is under `identity` (given `init` where it
    takes one; whether it keeps the function is for `is_identity` to say) and `paper`, wrapped under `blend`.
    For timm's modules `identity` means `blend`.
    """
    spec = resolve(block)
    second = {} if other_channels is None else {SECOND: other_channels}
    if second and not takes_second(block):
        raise BlockError(f"block {spec.name!r} takes one value, so there are no {SECOND} to be told")
    if issubclass(spec.cls, Block):
        _refuse([text for _, text in check_args(spec.cls, args)])
        return spec.cls(channels, dims=dims, init=init, **second, **args)
    return _create_foreign(spec, channels, init, {"dims": dims, **second}, args)


SECOND = "other_channels"  # what the constructor of a block of two inputs takes behind its channels


def takes_second(block: BlockLike) -> bool:
    """Whether a block is given a second value: a foreign one says so by a constructor that takes `other_channels`."""
    spec = resolve(block)
    if issubclass(spec.cls, Block) or isinstance(spec, foreign.TimmSpec):
        return issubclass(spec.cls, PairBlock)
    source = source_of(spec)
    return not isinstance(source, nn.Module) and SECOND in _parameters(source)


def is_given_twice(block: BlockLike) -> bool:
    """Whether a block of two inputs that is given no second value takes its own input for it."""
    return takes_second(block) and getattr(resolve(block).cls, "alone", PairBlock.alone) is PairBlock.alone


def needs_second(block: BlockLike) -> bool:
    """Whether a block cannot do without a second value: ours are given their own input twice."""
    source = source_of(resolve(block))
    return takes_second(block) and _parameters(source)[SECOND].default is inspect.Parameter.empty


def _create_foreign(
    spec: BlockSpec, channels: int, init: str, known: Mapping[str, int], args: Mapping[str, Any]
) -> nn.Module:
    """`known`: `dims` of the site, and the channels of a second value."""
    dims = known["dims"]
    found = [text for _, text in _foreign_faults(spec, args)]
    if not OneOf(*INITS).accepts(init):
        found.append(f"block {spec.name!r}: init: expected one of {', '.join(INITS)}, found {init!r}")
    if dims not in spec.dims:
        expected = " or ".join(map(str, spec.dims))
        found.append(f"block {spec.name!r}: dims (spatial dimensions): expected {expected}, found {dims!r}")
    _refuse(found)
    if not Int(min=1).accepts(channels):
        raise TooFewChannelsError(
            f"block {spec.name!r}: channels: expected a whole number >= 1, found {channels!r}"
        )
    if isinstance(spec, foreign.TimmSpec):
        return spec.build(channels, init, args)
    source = source_of(spec)
    if not isinstance(source, nn.Module):
        args = {**_settings(_parameters(source), init, known), **args}
    module = spec.make(channels, args) if isinstance(spec, sources.MadeSpec) else source(channels, **args)
    if init != "blend":
        return module
    return BlendedPair(module) if SECOND in known else Blend(module)


def create_replacement(
    block: BlockLike,
    old: nn.Module,
    channels: int,
    *,
    init: str = "identity",
    dims: int = 2,
    forward: Any = None,
    **args: Any,
) -> Replacement:
    """The new part of a module that a block takes the place of.

    A convolution in another form (`ConvForm`) takes over the old one's geometry, and begins as it was. Any other
    block f keeps its input's shape, and the module's result y becomes y + α(f(x) − y), α = 0, under `identity`
    and `blend` alike; f(x) under `paper`.

    Args:
        block: a name, a class, or what makes one.
        old: the module.
        channels: of what it is given.
        init: see `create_block`.
        dims: spatial dimensions of what it is given.
        forward: that of the module's class, where the class was extended since.
        **args: of the block.

    Raises:
        BlockError: the block cannot be built, or cannot take over what the module is.
    """
    spec = resolve(block)
    if issubclass(spec.cls, ConvForm):
        _refuse([text for _, text in check_args(spec.cls, args)])
        start: Any = init
        return spec.cls.in_place_of(Geometry.of(old, forward), start, args)
    alone = init == "paper"
    made = create_block(block, channels, init="paper" if alone else "blend", dims=dims, **args)
    if isinstance(made, Block):
        made.alpha = None  # what it would blend with is x; here it is y
    return Blended(made.block if isinstance(made, Blend) else made, alone=alone)


def is_form(block: BlockLike) -> bool:
    """Whether a block is a convolution in another form."""
    return issubclass(resolve(block).cls, ConvForm)


def reads_conv(block: BlockLike) -> bool:
    """Whether it is one that goes on to use the convolution whose place it takes, whatever `init` says."""
    cls = resolve(block).cls
    return issubclass(cls, ConvForm) and cls.reads_conv


def _settings(parameters: Mapping[str, Any], init: str, known: Mapping[str, int]) -> dict[str, Any]:
    """What is known of a site, and `init`, for what takes them; behind a blend a block starts as published."""
    given = {**known, "init": "paper" if init == "blend" else init}
    return {name: value for name, value in given.items() if name in parameters}


def _refuse(found: list[str]) -> None:
    if found:
        raise BlockError("\n".join(found))


def is_identity(
    block: nn.Module,
    channels: int,
    dims: int = 2,
    *,
    shape: tuple[int, ...] | None = None,
    other: tuple[int, ...] | None = None,
) -> bool:
    """Whether the block returns a random input bit for bit, in eval and in train mode.

    `shape`: (B, C, *S) of the input, by default two samples of 8 positions a side; `other`: that of a second value,
    (B, …). A copy is run, so buffers and modes stay as they are; the random generators' states are put back. What the
    block raises is raised.
    """
    probe = copy.deepcopy(block)
    like = next((p for p in block.parameters() if p.is_floating_point()), torch.empty(0))
    size = shape or (2, channels, *(8,) * dims)
    devices = [like.device] if like.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        x, *second = (torch.randn(s, dtype=torch.float32).to(like) for s in (size, other) if s is not None)
        return all(_returns_same(probe.train(mode), x, *second) for mode in (False, True))


def _returns_same(block: nn.Module, x: torch.Tensor, *second: torch.Tensor) -> bool:
    y = block(x.clone(), *second)
    return isinstance(y, torch.Tensor) and y.dtype == x.dtype and torch.equal(y, x)
