"""Modules that serve several owners or several nets: a block changes the model that it was put into, at its own sites."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from small import Around, Through, calls_of, images, se, stir
from torch import nn

import attninject as ai
from attninject import errors


class Unit(nn.Module):
    """Convolution, norm, activation as detectors write them: one activation for the class, a second forward."""

    act0 = nn.SiLU()

    def __init__(self, inputs: int, outputs: int, act: nn.Module | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        self.act = act or self.act0

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))

    def forward_fuse(self, x):
        return self.act(self.conv(x))


class Defaulted(nn.Module):
    """Its activation is made once, when the class is written."""

    def __init__(self, act: nn.Module = nn.ReLU()) -> None:  # noqa: B008 (the fault under test)
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 8, 1), act

    def forward(self, x):
        return self.act(self.conv(x))

    def forward_split(self, x):
        return self.conv(x)


def units(act: nn.Module | None = None) -> nn.Sequential:
    """Two units of different widths."""
    return nn.Sequential(Unit(3, 8, act), Unit(8, 16, act)).eval()


def refused(model: nn.Module, words: str, **where: object) -> None:
    """A plan is refused with these words."""
    with pytest.raises(errors.CannotRewriteError, match=words):
        ai.plan(model, **se(**where), example_inputs=images())


@pytest.mark.parametrize("where", ["1.bn", "*.bn", "*.act", "1.act"])
def test_an_activation_of_the_class_carries_no_block(where: str) -> None:
    """Every net of the class would get it and fail; the class is named, and what to name instead."""
    refused(units(), r"0\.act \(SiLU\), which the class Unit has too.*name the module around it", after=where)


def test_the_unit_around_a_shared_activation_carries_the_block() -> None:
    """What the message advises works, and other nets of the class are as they were."""
    model, other = units(), units()
    x = images()
    before, others = model(x), other(x)
    ai.inject(model, **se(after="*"), example_inputs=x)
    assert list(ai.injected(model)) == ["0.se", "1.se"]
    assert torch.equal(model(x), before)
    stir(model)
    assert not torch.equal(model(x), before)
    assert torch.equal(other(x), others)
    assert torch.isfinite(units()(x)).all()
    assert type(Unit.act0) is nn.SiLU


def test_an_activation_that_two_live_nets_share_carries_no_block() -> None:
    """As long as the other net lives."""
    act = nn.SiLU()
    model, other = nn.Sequential(Unit(3, 8, act)).eval(), nn.Sequential(Unit(3, 4, act))
    refused(model, r"0\.act \(SiLU\), which another Unit has too", after="0.bn")
    del other
    assert ai.plan(model, **se(after="0.bn"), example_inputs=images()).sites[0].name == "0.act.se"


def test_a_default_argument_carries_no_block() -> None:
    """`act=nn.ReLU()` in a signature is one object for all nets; a Sequential around it carries in its place."""
    refused(Defaulted().eval(), "a default argument of Defaulted.__init__ has too", after="act")
    chain = nn.Sequential(nn.Conv2d(3, 8, 1), Defaulted().act).eval()
    found = ai.plan(Around(chain, 3).eval(), **se(after="inner"), example_inputs=images())
    assert [s.name for s in found.sites] == ["inner.se"]


class Student(nn.Module):
    """A trunk, and a head of its own."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk, self.head = trunk, nn.Conv2d(8, 4, 1)

    def forward(self, x):
        return self.head(self.trunk(x))


class Teacher(Student):
    pass


def trunk() -> nn.Module:
    """A stem and a module with a forward of its own."""
    return Around(Through(lambda self, x: self.b(self.a(x))))


def test_a_trunk_that_another_live_net_uses_takes_no_block() -> None:
    """The teacher would get the student's blocks, and with them keys that its checkpoints lack."""
    shared = trunk()
    student, teacher = Student(shared).eval(), Teacher(shared)
    refused(student, "another Teacher has too", after="trunk.inner.a")
    refused(student, "another Teacher has too", before="trunk.inner")
    found = ai.plan(student, **se(after="trunk"), example_inputs=images())
    assert [s.name for s in found.sites] == ["se"], "the student's own forward is its own"
    both = nn.ModuleDict({"student": student, "teacher": teacher})
    del teacher
    refused(student, "another Teacher has too", after="trunk.inner.a")
    both.forward = lambda x: student(x)  # type: ignore[assignment]
    assert len(ai.plan(both, **se(after="student.trunk.inner.a"), example_inputs=images()).sites) == 1
    del both
    assert len(ai.plan(student, **se(after="trunk.inner.a"), example_inputs=images()).sites) == 1


class Wrapper(nn.Module):
    """What Lightning modules and trainers do: the whole net, and names for some of its parts."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.body = net, net.trunk


def test_variables_views_and_wrappers_are_no_other_net() -> None:
    """A user's own references, a list of parts, and a module that the model itself is a part of."""
    model = Student(trunk()).eval()
    body, parts, found = model.trunk, [model.trunk.inner], {"inner": model.trunk.inner}
    view, wrapper = nn.ModuleList([model.trunk, model.trunk.inner.a]), Wrapper(model)
    sites = ai.plan(model, **se(after=["trunk.inner.a", "trunk"]), example_inputs=images()).sites
    assert len(sites) == 2
    assert body is wrapper.body is view[0]
    assert parts[0] is found["inner"]


# --- inside one net --------------------------------------------------------------------------


def act_twice(self, x):
    """Two norms before one activation."""
    return self.act(self.bn2(self.b(self.act(self.bn1(self.a(x))))))


class Split(Through):
    """Cannot be rewritten: its other forward would pass the new one by."""

    def forward_split(self, x):
        return x


def two_norms(cls: Callable) -> nn.Module:
    """An owner with one activation behind two norms."""
    torch.manual_seed(0)
    return cls(act_twice, bn1=nn.BatchNorm2d(8), bn2=nn.BatchNorm2d(8), act=nn.ReLU())


def test_one_activation_behind_two_norms_does_not_carry_the_block_of_one() -> None:
    """It would run at both; a root's own graph tells the two apart, an owner that has none is refused."""
    refused(Around(two_norms(Split)), r"inner\.act \(ReLU\), which is called 2 times", after="inner.bn1")
    model = two_norms(Through).eval()
    x = images(channels=8)
    before = model(x)
    ai.inject(model, **se(after="bn1"), example_inputs=x)
    assert list(ai.injected(model)) == ["se"]
    assert calls_of(model, x) == {"se": 1}
    assert torch.equal(model(x), before)


class Tower(nn.Module):
    """Two owners without a graph call one module, maybe with different channels."""

    def __init__(self, act: nn.Module, widths: tuple[int, int]) -> None:
        super().__init__()
        self.first, self.second = (_Owner(3, widths[0], act), _Owner(*widths, act))

    def forward(self, x):
        return self.second(self.first(x))


class _Owner(nn.Module):
    def __init__(self, inputs: int, outputs: int, act: nn.Module) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(inputs, outputs, 1), act

    def forward(self, x):
        return self.act(self.conv(x))

    def forward_split(self, x):
        return x


def test_a_carrier_serves_all_of_its_owners_or_none() -> None:
    """Taken at all sites, one block runs at each; taken at one of them, or with other channels, it is refused."""
    model, x = Tower(nn.ReLU(), (8, 8)).eval(), images()
    refused(model, r"which second calls too, where the rule puts none", after="first.act", pick="first")
    before = model(x)
    ai.inject(model, **se(after="first.act"), example_inputs=x)
    assert calls_of(model, x) == {"first.act.se": 2}
    assert torch.equal(model(x), before)
    refused(Tower(nn.ReLU(), (8, 16)), "is called with 16, 8 channels", after="first.act")


def test_an_owner_that_runs_with_other_channels_is_not_rewritten() -> None:
    """A module without parameters may run at several widths; a block has one."""
    owner = Through(lambda self, x: self.act(x) * 2, act=nn.ReLU())
    del owner.a, owner.b
    model = nn.Sequential(nn.Conv2d(3, 8, 1), owner, nn.Conv2d(8, 16, 1), owner).eval()
    refused(model, "channels", after="1.act")
