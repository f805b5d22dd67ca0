"""Local graphs: used where faithful, refused with a reason where a trace would freeze or miss something."""

from __future__ import annotations

import collections
import copy
import random
import re
from collections.abc import Callable

import pytest
import torch
from small import Around, Through, calls_of, images, se, state, stir
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import attninject as ai
from attninject.surgery import local_graph


def planned(inner: nn.Module, **where: object) -> ai.planning.Site:
    """The site of SE after `inner.a`, or elsewhere."""
    rule = se(**(where or {"after": "inner.a"}))
    return ai.plan(Around(inner), **rule, example_inputs=images()).sites[0]


# --- what a plain trace would freeze -----------------------------------------------------------


def writes(self, x):
    """Writes an attribute."""
    self.last = 1
    return self.b(self.a(x))


def draws(self, x):
    """Asks Python for a random number."""
    return self.b(self.a(x)) * (1 if random.random() < 2 else 0)


def draws_torch(self, x):
    """Asks torch for a random number, and decides by it."""
    return self.b(self.a(x)) * (1 if float(torch.rand(1)) < 2 else 0)


def constant(self, x):
    """Makes a tensor of its own."""
    return self.b(self.a(x)) + torch.ones(1)


def iterates(self, x):
    """Goes over its own children."""
    for child in self.children():
        x = child(x)
    return x


def checkpoints(self, x):
    """Checkpoints a child."""
    return checkpoint(self.b, self.a(x), use_reentrant=False)


def autocasts(self, x):
    """Sets autocast."""
    with torch.autocast("cpu", enabled=False):
        return self.b(self.a(x))


def without_grad(self, x):
    """Sets the grad mode."""
    with torch.no_grad():
        return self.b(self.a(x))


def asks_autocast(self, x):
    """Does more where autocast is on, with or without gradients."""
    more = torch.is_grad_enabled() and torch.is_autocast_enabled()
    return self.b(self.a(x)) * 2 if more else self.b(self.a(x))


def asks_dtype(self, x):
    """Takes the dtype that autocast would."""
    return self.b(self.a(x).to(torch.get_autocast_dtype("cpu")).float())


def asks_child(self, x):
    """Takes the dtype of the first tensor of a child."""
    return self.b(self.a(x.to(next(self.a.parameters()).dtype)))


def branches(self, x):
    """Decides by the values of a tensor."""
    y = self.a(x)
    return self.b(y) if y.sum() != 12345 else y


def caches(self, x):
    """Fills a list of its own."""
    self.memo.append(1)
    return self.b(self.a(x))


def ordered(self, x):
    """Returns an OrderedDict."""
    return collections.OrderedDict(y=self.b(self.a(x)))


def keeps_tensors(self, x):
    """Reads a list of tensors."""
    return self.b(self.a(x)) if len(self.kept) else x


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (writes, "writes an attribute"),
        (draws, "draws random numbers"),
        (draws_torch, "draws random numbers"),
        (constant, "no parameter or buffer"),
        (iterates, "iterates over its own children"),
        (checkpoints, "grad mode|checkpoints its children"),
        (autocasts, "sets autocast"),
        (without_grad, "depends on the grad mode"),
        (asks_autocast, "depends on autocast"),
        (asks_dtype, "depends on autocast"),
        (asks_child, "looks at the tensors of its children"),
        (caches, "cache of its own"),
        (ordered, "returns a OrderedDict"),
        (keeps_tensors, "container of tensors"),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_what_a_graph_would_freeze_or_lose_goes_by_module(body: Callable, reason: str) -> None:
    """The plan falls back to the module and says why; the function stays, and the block runs once."""
    model, x = Around(Through(body)).eval(), images()
    model.inner.memo, model.inner.kept = [], [torch.ones(3)]
    before, marks = model(x), state(model)
    plan = ai.plan(model, **se(after="inner.b"), example_inputs=x)
    assert state(model) == marks
    assert plan.sites[0].mechanism == "module"
    assert re.search(reason, plan.sites[0].reason)  # which of the two a checkpoint shows first is torch's
    ai.inject(model, plan)
    after = model(x)
    assert type(after) is type(before)
    pairs = (
        zip(after.values(), before.values(), strict=True) if isinstance(after, dict) else [(after, before)]
    )
    assert all(torch.equal(a, b) for a, b in pairs)
    assert calls_of(model, x) == {"inner.b.se": 1}


def test_a_question_about_autocast_without_consequence_is_allowed() -> None:
    """A forward that asks and then does the same has a graph."""

    def looks(self, x):
        torch.is_autocast_enabled()
        return self.b(self.a(x))

    assert planned(Through(looks)).mechanism == "graph"


def test_branching_on_values_goes_by_module() -> None:
    """A forward that decides by a tensor's values cannot be a graph."""
    assert planned(Through(branches)).mechanism == "module"


def test_isinstance_of_a_tensor_takes_the_right_branch() -> None:
    """A plain Proxy is no Tensor; the graph must not double as the forward does for other types."""

    def body(self, x):
        x = x if isinstance(x, Tensor) else x * 0
        return self.b(self.a(x))

    model, x = Around(Through(body)).eval(), images()
    before = model(x)
    plan = ai.plan(model, **se(after="inner.a"), example_inputs=x)
    assert plan.sites[0].mechanism == "graph"
    assert torch.equal(ai.inject(model, plan)(x), before)


def test_a_counting_buffer_counts_once_per_step() -> None:
    """A buffer that the forward increments is incremented as before, not by planning and not twice."""

    class Counting(Through):
        def __init__(self) -> None:
            super().__init__(lambda self, x: self.b(self.a(x)))
            self.register_buffer("steps", torch.zeros((), dtype=torch.long))

        def forward(self, x):
            if self.training:
                self.steps.add_(1)
            return super().forward(x)

    model, x = Around(Counting()), images()
    ai.inject(model, **se(after="inner.a"), example_inputs=x)
    assert "inner.se" in ai.injected(model)
    assert model.inner.steps == 0
    model.train()(x)
    model.eval()(x)
    assert model.inner.steps == 1


# --- modes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("traced_in", [True, False])
def test_dropout_follows_the_mode_whatever_the_mode_at_injection(traced_in: bool) -> None:
    """Functional dropout is on in train and off in eval, whatever the mode at injection."""

    def body(self, x):
        return self.b(F.dropout(self.a(x), 0.5, self.training))

    base, x = Around(Through(body)), images()
    model = copy.deepcopy(base).train(traced_in)
    ai.inject(model, **se(after="inner.a"), example_inputs=x)
    assert "inner.se" in ai.injected(model)
    assert model.training is traced_in
    for mode in (True, False, True):
        results = []
        for m in (base, model):
            torch.manual_seed(1)
            results.append(m.train(mode)(x))
        assert torch.equal(*results)


def test_a_site_in_the_eval_branch_only_is_no_graph_site() -> None:
    """Where train and eval call different children, the block of one branch runs in that branch only."""

    def body(self, x):
        return self.b(x) if self.training else self.b(self.a(x))

    model, x = Around(Through(body)).eval(), images()
    plan = ai.plan(model, **se(after="inner.a"), example_inputs=x)
    assert plan.sites[0].mechanism == "module"
    ai.inject(model, plan)
    assert calls_of(model, x) == {"inner.a.se": 1}
    assert calls_of(model.train(), x) == {"inner.a.se": 0}


# --- arguments ---------------------------------------------------------------------------------


class Masked(nn.Module):
    """Takes an optional mask, a flag, and a size."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(8, 8, 1)

    def forward(self, x, mask=None, *, flip=False, size=(1, 1)):
        y = self.a(x)
        if mask is not None:
            y = y * mask
        if flip:
            y = y.flip(-1)
        return y * size[0]


class Caller(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner = nn.Conv2d(3, 8, 1), Masked()

    def forward(self, x, mask=None, flip=False, size=(1, 1)):
        return self.inner(self.stem(x), mask, flip=flip, size=size)


def test_optional_arguments_work_in_every_combination_after_injection() -> None:
    """What the probe saw as None may be a mask later, and the other way round."""
    base, x = Caller().eval(), images()
    model = copy.deepcopy(base)
    ai.inject(model, **se(after="inner.a"), example_inputs=x)
    assert "inner.se" in ai.injected(model)
    mask = torch.rand(2, 1, 16, 16)
    for given in ({}, {"mask": mask}, {"flip": True}, {"mask": mask, "flip": True, "size": (3, 2)}, {}):
        assert torch.equal(model(x, **given), base(x, **given)), given
        assert calls_of(model, x, run=lambda x, given=given: model(x, **given)) == {"inner.se": 1}


def test_the_signature_stays() -> None:
    """Tools that read the forward's signature see the original one, defaults included."""
    import inspect

    base, model = Caller(), Caller()
    ai.inject(model, **se(after="inner.a"), example_inputs=images())
    before, after = inspect.signature(base.inner.forward), inspect.signature(model.inner.forward)
    assert list(after.parameters) == list(before.parameters)
    assert [p.default for p in after.parameters.values()] == [p.default for p in before.parameters.values()]
    assert [p.kind for p in after.parameters.values()] == [p.kind for p in before.parameters.values()]


# --- names of operations -----------------------------------------------------------------------


def additions(self, x):
    """Every way to write a sum."""
    y = self.a(x) + x
    y = torch.add(y, x)
    y += x
    y = y.add(x)
    y.add_(x)
    return self.b(torch.cat((y, x), 1)[:, :8])


def test_operations_are_named_by_kind_and_number() -> None:
    """`+`, `torch.add`, `+=`, `.add` and `.add_` are all `add`, numbered as torch.fx does."""
    model = Around(Through(additions))
    plan = ai.plan(model, **se(after="inner::add*"), example_inputs=images())
    assert [s.path for s in plan.sites] == ["inner::add", *(f"inner::add_{n}" for n in range(1, 5))]
    assert ai.plan(model, **se(after="inner::cat"), example_inputs=images()).sites[0].channels == 16


def test_a_graph_holds_its_own_text_for_equal_owners_once() -> None:
    """Owners alike share one generated class, so a deep net does not cost a class per block."""
    model = Around(nn.Sequential(*(Through(writes_nothing) for _ in range(5))))
    ai.inject(model, **se(after="inner.*.a"), example_inputs=images())
    assert len({type(m) for m in model.inner}) == 1


def writes_nothing(self, x):
    """Two layers."""
    return self.b(self.a(x))


def test_public_forwards_are_seen() -> None:
    """timm's networks have forwards beside `forward`; a plain block has none."""
    import timm

    assert "forward_features" in local_graph.public_forwards(timm.models.resnet.ResNet)
    assert local_graph.public_forwards(nn.Conv2d) == ()


def test_reading_a_plain_container_that_changes_in_place_is_noticed() -> None:
    """A nested list on `self` that is edited in place after injection counts, as on the base."""

    class Listed(Through):
        def __init__(self) -> None:
            super().__init__(lambda self, x: self.b(self.a(x)) * self.factors[0][0])
            self.factors = [[1], [2]]

    base, x = Around(Listed()).eval(), images()
    model = copy.deepcopy(base)
    ai.inject(model, **se(after="inner.a"), example_inputs=x)
    stir(model)
    for m in (base, model):
        m.inner.factors[0][0] = 3
    with ai.disabled(model):
        assert torch.equal(model(x), base(x))


def test_a_graph_that_decides_by_sizes_serves_calls_of_like_sizes() -> None:
    """It is known again, so that equal owners share it; an input named as a tensor's attribute is no question."""

    def forward(self, x, shape):
        """Two inputs, one a list."""

    def called(size: int) -> local_graph.Arguments:
        return local_graph.Arguments.of(forward, (torch.zeros(2, 3, size, size), [1]), {})

    even = called(4).decided([local_graph.Decision("_operator.mod(x.shape[2], 2)", False)])
    assert called(6).fits(even)
    assert not called(5).fits(even)
