"""Who depends on whom in one recorded run, and what was done on the way. Knows no architecture's name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from attninject.observe.record import Call, Op, Record, Ref, refs
from attninject.surgery.local_graph import Target
from attninject.terms import Position


@dataclass(frozen=True, eq=False)
class Spot:
    """One point of the dataflow in a recorded run.

    Attributes:
        event: the call or operation; the root's own call for its input and result.
        position: `after` or `before` it.
        value: the tensor there.
        output: `after` a call with a nested result: index or key of the tensor.
        operand: `before`: position or name of the operand.
        target: name of the operation in its owner's graph, once it is known: a value alone does not
            say it, since an operation may hand its operand on (a dropout in eval mode).
    """

    event: Call | Op
    position: Position
    value: int
    output: int | str | None = None
    operand: int | str = 0
    target: Target | None = None

    @property
    def module(self) -> nn.Module:
        """The module that is called, or in whose forward the operation is: what the filters of a rule look at."""
        return self.event.module if isinstance(self.event, Call) else self.event.call.module

    @property
    def owner(self) -> Call | None:
        """The run of the module in whose forward the event is."""
        return self.event.parent if isinstance(self.event, Call) else self.event.call

    @property
    def time(self) -> int:
        """Orders spots as the run met them."""
        if isinstance(self.event, Op):
            return self.event.time
        return self.event.end if self.position == "after" else self.event.start


def output_key(event: Call | Op, value: int) -> int | str | None:
    """Where in a call's result the value is: None for the result itself."""
    if isinstance(event, Op) or isinstance(event.out, Ref):
        return None
    items = event.out.items() if isinstance(event.out, dict) else enumerate(event.out)
    return next((k for k, item in items if isinstance(item, Ref) and item.value == value), None)


def operand_of(call: Call, value: int) -> int | str:
    """Position or name of the argument that is the value, or, where none is, that holds it in a list or the like."""
    given: dict[Any, Any] = {**dict(enumerate(call.args)), **call.kwargs}
    held: list[int | str] = [k for k, item in given.items() if value in (r.value for r in refs(item))]
    return next((k for k in held if isinstance(given[k], Ref)), held[0])


# --- kinds of operations -----------------------------------------------------------------------


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


WEIGHTED = _words("convolution _convolution mm addmm bmm baddbmm linear")
MOVES = _words(
    "permute transpose t view reshape contiguous clone unsqueeze squeeze flatten _unsafe_view alias"
)
NORMS = _words("native_layer_norm native_group_norm layer_norm group_norm rsqrt var_mean")
BATCH_NORMS = _words("native_batch_norm cudnn_batch_norm batch_norm")
POOLS = _words("avg_pool1d avg_pool2d avg_pool3d")
_PRODUCTS = _words("mul div mm bmm baddbmm")
GATES = _words("sigmoid hardsigmoid")
_NOISE = _words("randn randn_like normal normal_functional rand rand_like")
# Affine in what depends on the input, or pooling alone: such a path bends nothing.
_STRAIGHT = (
    WEIGHTED | MOVES | BATCH_NORMS | POOLS | _PRODUCTS
    | _words(
        "add sub rsub neg addcmul lerp slice select split unbind split_with_sizes unsafe_split cat stack roll flip "
        "repeat expand index index_select gather constant_pad_nd reflection_pad2d replication_pad2d as_strided copy "
        "detach _to_copy unfold im2col col2im pixel_shuffle pixel_unshuffle "
        "_adaptive_avg_pool2d _adaptive_avg_pool3d mean sum amax max max_pool2d_with_indices "
        "max_pool3d_with_indices upsample_nearest2d upsample_bilinear2d upsample_bicubic2d native_dropout dropout "
        "empty zeros ones full empty_like zeros_like ones_like full_like new_empty new_zeros lift_fresh bernoulli"
    )
)  # fmt: skip

_UNWEIGHTED = _STRAIGHT - WEIGHTED


def kind(op: Op) -> str:
    """The operation's name without namespace, overload and in-place mark: `add` for `aten.add_.Tensor`."""
    name = op.name.split(".")[1]
    return name.rstrip("_") or name


# --- dependence --------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class FlowStep:
    """One operation, or one layer of torch itself: what an LSTM does inside is not the net's dataflow."""

    ops: tuple[Op, ...]
    ins: tuple[int, ...]
    outs: tuple[int, ...]
    time: int


def steps(call: Call) -> Iterator[FlowStep]:
    """The steps of a call and of all calls inside it, in order."""
    for event in call.events:
        if isinstance(event, Op):
            yield FlowStep((event,), event.ins, event.outs, event.time)
        elif any(isinstance(e, Call) for e in event.events) or not _of_torch(event.module):
            yield from steps(event)
        else:
            ops = tuple(e for e in event.events if isinstance(e, Op))
            made = dict.fromkeys(o for op in ops for o in op.outs)
            given = dict.fromkeys(i for op in ops for i in op.ins if i not in made)
            if ops:
                yield FlowStep(ops, tuple(given), event.outs, event.end)


def _of_torch(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn.")


class Flow:
    """Dependence between the values of a record. A set of values is an int, a bit for each in order of appearance."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.values: list[int] = []  # bit -> value
        self.number: dict[int, int] = {}  # value -> bit
        self.ancestors: list[int] = []
        self.time: list[int] = []
        self.live = 0  # depends on the model's input
        self.learned = 0  # made of the model's tensors alone
        self.made = 0  # live results of steps
        self.weighted = 0  # made by a convolution or a linear layer
        self.normed = 0  # made by a batch norm
        self.pooled = 0  # made by a mean over a neighbourhood
        self.taught = 0  # made with tensors of the model
        self.layered = 0  # of these, by a convolution, a linear layer or a norm
        self.bent = 0  # made by an activation, a softmax, a norm, a product of live values
        self.active = 0  # the same without norms
        self.gates = 0  # between 0 and 1 by a sigmoid, or that flipped, widened or pooled
        self.gated = 0  # products of live values with these
        self.noise = 0  # random numbers
        self.sampled = 0  # products of live values with random numbers
        for i in record.constants:
            self.learned |= self.bit(i)
        for i in record.calls[0].ins:
            self.live |= self.bit(i)
        self.steps = list(steps(record.calls[0]))
        for step in self.steps:
            self._take(step)

    def bit(self, value: int) -> int:
        """The set of this value alone."""
        at = self.number.get(value)
        if at is None:
            at = self.number[value] = len(self.values)
            self.values.append(value)
            self.ancestors.append(1 << at)
            self.time.append(-1)
        return 1 << at

    def past(self, value: int) -> int:
        """The value and all that it depends on."""
        self.bit(value)
        return self.ancestors[self.number[value]]

    def made_by(self, ops: Iterable[Op]) -> int:
        """The values that operations made, as far as any are known."""
        made = 0
        for op in ops:
            for value in op.outs:
                made |= self.bit(value) if value in self.number else 0
        return made

    def only(self, a: int, b: int) -> int:
        """What `a` depends on and `b` does not."""
        return self.past(a) & ~self.past(b)

    def depends(self, value: int, on: int) -> bool:
        """Whether the first value is the second or depends on it."""
        return bool(self.past(value) & self.bit(on))

    def weights(self, bits: int) -> int:
        """How many of these values a convolution or linear layer made."""
        return (bits & self.weighted).bit_count()

    def earliest(self, bits: int) -> int:
        """The time at which the first of these values was made."""
        bits &= self.made
        return self.time[(bits & -bits).bit_length() - 1] if bits else 1 << 60

    def members(self, bits: int) -> Iterator[int]:
        """The values of a set, in order of appearance."""
        while bits:
            low = bits & -bits
            yield self.values[low.bit_length() - 1]
            bits ^= low

    def _take(self, step: FlowStep) -> None:
        past = given = made = 0
        for i in dict.fromkeys(step.ins):
            past |= self.past(i)
            given |= self.bit(i)
        for o in step.outs:
            if o not in step.ins:
                made |= self.bit(o)
                self.ancestors[self.number[o]] |= past
                self.time[self.number[o]] = step.time
        kinds = {kind(op) for op in step.ops}
        drawn = kinds & _NOISE or (given & self.noise and kinds <= MOVES | {"detach"})
        self.noise |= made if drawn else 0
        if not given & self.live:
            self.learned |= made if given & self.learned else 0
            return
        self.live |= made
        self.made |= made
        self.sampled |= made if given & self.noise and kinds & _PRODUCTS else 0
        learned = given & self.learned
        self.taught |= made if learned else 0
        self.weighted |= made if learned and kinds & WEIGHTED else 0
        self.layered |= made if learned and kinds & (WEIGHTED | NORMS | BATCH_NORMS) else 0
        self.normed |= made if kinds & BATCH_NORMS else 0
        self.pooled |= made if kinds & POOLS else 0
        live = given & self.live
        products = len(step.ops) == 1 and kinds & _PRODUCTS and live.bit_count() > 1
        if kinds & GATES or (live == given & self.gates and kinds <= _UNWEIGHTED):
            self.gates |= made
        self.gated |= made if products and live & self.gates else 0
        if kinds - _STRAIGHT or products:
            self.bent |= made
            self.active |= 0 if kinds & NORMS else made
