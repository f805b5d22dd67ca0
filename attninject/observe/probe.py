"""One run of a model, recorded: every module call, every operation, and the shapes between them."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from attninject.errors import ProbeError, UnsupportedModelError
from attninject.terms import ProbeMode

from .example_inputs import Inputs, candidates
from .meta_kernels import empty_alike, meta_like, short_recurrences
from .record import Record, map_tensors
from .recorder import Recorder, calls_through, direct_forwards, iterations
from .snapshot import rng_kept, stand_ins, undoing
from .walking import modules_in, named_modules_in


def run(
    model: nn.Module, inputs: Inputs, mode: ProbeMode, training: bool = False, hooks: bool = False
) -> Record:
    """Record one forward of `model`; the model is left exactly as it was.

    Args:
        model: any module; the run sees the module's forward with all its children.
        inputs: arguments; only shapes, dtypes and non-tensors matter.
        mode: `meta`, `fake` or `real`, what the stand-ins are made of.
        training: all modules in training mode, else all in eval mode.
        hooks: whether the hooks of the model's owner run too.

    Raises:
        Exception: whatever the forward raised; its attribute `attninject_record` has what was seen so far.
    """
    record = Record(model, mode)
    record.hooks = hooks
    make, context = _maker(mode)
    with (
        rng_kept(),
        torch.no_grad(),
        without_autocast(),
        context,
        stand_ins(model, make, hooks, record.numbers) as memo,
    ):
        for module in modules_in(model):
            module.__dict__["training"] = training
        record.stand_ins = memo
        device = next((t.device for t in memo.values()), torch.device("cpu"))
        given = map_tensors((inputs.args, inputs.kwargs), functools.partial(_input, mode=mode, device=device))
        recorder = Recorder(record)
        sees = calls_through(recorder.call), direct_forwards(recorder, model), iterations(recorder)
        with sees[0], sees[1], sees[2], short_recurrences(mode), _as_in_training(), recorder:
            try:
                model(*given[0], **given[1])
            except Exception as error:
                record.input_values = _image_first(record)
                error.attninject_record = record  # type: ignore[attr-defined]
                raise
        record.complete = True
        record.input_values = _image_first(record)
    return record


def autocasting() -> list[str]:
    """The kinds of devices for which autocast is on."""
    return [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]


@contextlib.contextmanager
def without_autocast() -> Iterator[None]:
    """Operations as the forward asks for them: autocast would add casts, and on meta tensors it does not."""
    with contextlib.ExitStack() as stack:
        for kind in autocasting():
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@contextlib.contextmanager
def _as_in_training() -> Iterator[None]:
    """torch's encoder layers call their children, and are given no nested tensors, which no record describes."""
    fast: Any = torch.backends.mha
    with undoing(functools.partial(fast.set_fastpath_enabled, fast.get_fastpath_enabled())):
        fast.set_fastpath_enabled(False)
        yield


def _image_first(record: Record) -> tuple[int, ...]:
    """The tensors that the model is called with, the image before masks, sizes and what else goes with it.

    A detector takes a list of images without a batch axis: there it is the first batch that a module takes.
    """
    given = record.calls[0].ins if record.calls else ()
    if given and record.calls[0].args and isinstance(record.calls[0].args[0], list):
        batched = (v for call in record.calls for v in call.ins if len(record.shape(v)) > 3)
        if (first := next(batched, None)) is not None:
            return (first, *given)
    return tuple(sorted(given, key=lambda v: -len(record.shape(v))))


_MIXED = "expected device meta"  # beside a tensor that the forward makes on the CPU: no question of values


def _data_dependent(error: Exception) -> bool:
    words = ("nonzero", "meta tensor", "item()", "Meta", "device meta")
    return hasattr(error, "attninject_record") and any(word in str(error) for word in words)


def _maker(mode: ProbeMode) -> tuple[Callable[[Tensor], Tensor], contextlib.AbstractContextManager[Any]]:
    if mode == "meta":
        return empty_alike, contextlib.nullcontext()
    if mode == "fake":
        from torch._subclasses.fake_tensor import FakeTensorMode

        fake = FakeTensorMode(allow_non_fake_inputs=True)

        def make(t: Tensor) -> Tensor:  # not fake.from_tensor(t), whose writes would count in t._version
            with fake:
                return torch.empty_strided(tuple(t.shape), t.stride(), dtype=t.dtype, device=t.device)

        return make, _quietly(fake)
    return lambda t: t.detach().clone(), contextlib.nullcontext()


@contextlib.contextmanager
def _quietly(mode: contextlib.AbstractContextManager[Any]) -> Iterator[None]:
    """Fake tensors log every failure with its traceback; here a failure only means: try the next way."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    was_disabled = logger.disabled
    with undoing(lambda: setattr(logger, "disabled", was_disabled)), mode:
        logger.disabled = True
        yield


def _input(tensor: Tensor, mode: ProbeMode, device: torch.device) -> Tensor:
    if mode == "meta":
        return meta_like(tensor)
    if mode == "fake":
        at = device if tensor.is_meta else tensor.device
        return torch.empty(tuple(tensor.shape), dtype=tensor.dtype, device=at)
    if not tensor.is_meta:
        return tensor.detach().clone()
    if tensor.is_floating_point():
        return torch.rand(tuple(tensor.shape), device=device).to(tensor.dtype)
    return torch.zeros(tuple(tensor.shape), dtype=tensor.dtype, device=device)


def probe(model: nn.Module, example_inputs: Any = None, *, partial: bool = False) -> tuple[Record, Inputs]:
    """Record a forward of `model` in eval mode, on meta tensors where that works.

    Args:
        model: any module.
        example_inputs: a tensor, a tuple or a dict of keyword arguments; None: inputs are found.
        partial: settle for a run on meta tensors that stops where the data decide (a detector's proposals),
            unless the forward that decides has layers ahead (an early exit); such a record is not `complete`.

    Returns:
        The record, and the inputs that worked.

    Raises:
        UnsupportedModelError: it has no forward.
        ProbeError: the model's forward fails on all of them.
    """
    _check_forward(model)
    tries = list(candidates(model)) if example_inputs is None else [Inputs.of(example_inputs)]
    for hooks in (False, True) if hooked(model) else (False,):  # one may be what makes the shapes fit
        for mode in _modes(model):
            for inputs in tries:
                try:
                    return run(model, inputs, mode, hooks=hooks), inputs
                except Exception as error:
                    last = error
                    if mode == "meta" and _data_dependent(error):
                        stopped: Record = error.attninject_record  # type: ignore[attr-defined]
                        settles = partial and _MIXED not in str(error)
                        if settles and not stopped.layers_ahead:
                            return stopped, inputs
                        with contextlib.suppress(Exception):  # values are asked for: these inputs, for real
                            return run(model, inputs, "real", hooks=hooks), inputs
                        if settles:
                            return stopped, inputs
    raise ProbeError(_why_failed(model, example_inputs, tries, last)) from last


def _modes(model: nn.Module) -> tuple[ProbeMode, ...]:
    """What to make stand-ins of, in order; only fake and real tensors know on which of several devices they lie."""
    held = (m._parameters for m in modules_in(model) if m._parameters)
    several = len({p.device for parameters in held for p in parameters.values() if p is not None}) > 1
    return ("fake", "real", "meta") if several else ("meta", "fake", "real")


def hooked(model: nn.Module) -> list[str]:
    """Names of the modules with hooks around their forward, those of torch.nn.utils (weight norm, pruning) aside."""

    def foreign(hook: Any) -> bool:
        return not type(hook).__module__.startswith("torch.nn.utils")

    return [
        name
        for name, m in named_modules_in(model)
        if (m._forward_hooks or m._forward_pre_hooks)
        and any(foreign(h) for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values()))
    ]


def _check_forward(model: nn.Module) -> None:
    if type(model).forward is nn.Module.forward and "forward" not in model.__dict__:
        name, inside = type(model).__name__, _network_in(model)
        raise UnsupportedModelError(
            f"{name} has no forward, so there is no dataflow to put a block into; pass "
            + (f"the network that it holds, {name.lower()}.{inside}" if inside else "the model that calls it")
        )


def _network_in(model: nn.Module) -> str:
    """The child with most parameters among those with a forward: what a Lightning module trains; empty: none."""
    if isinstance(model, (nn.ModuleList, nn.ModuleDict)):
        return ""
    sizes = {
        name: sum(p.numel() for p in child.parameters())
        for name, child in model.named_children()
        if type(child).forward is not nn.Module.forward or "forward" in child.__dict__
    }
    largest = max(sizes, key=lambda name: sizes[name], default="")
    return largest if len(sizes) == 1 or sizes.get(largest) else ""


def _why_failed(model: nn.Module, example: Any, tries: list[Inputs], last: Exception) -> str:
    tensors: list[Tensor] = []
    map_tensors([(i.args, i.kwargs) for i in tries], tensors.append)
    shapes = ", ".join(dict.fromkeys(str(tuple(t.shape)) for t in tensors)) or "given"
    advice = ""
    if example is None:
        with contextlib.suppress(TypeError, ValueError):
            advice = f"; it takes {inspect.signature(model.forward)}"
        advice += "; give example_inputs= that the model accepts"
    reason = str(last).splitlines()[0] if str(last) else ""
    return (
        f"{type(model).__name__} fails its own forward on inputs of shape {shapes}: "
        f"{type(last).__name__}: {reason}{advice}"
    )
