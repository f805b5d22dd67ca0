"""Which second value belongs to which site, where a block can be given both, and what is said where it cannot."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pair_nets import Asked, FlatUNet, Siamese, Step, Towers, UNet
from small import images
from torch import Tensor, nn

import attninject as ai
from attninject.errors import (
    CannotRewriteError,
    LayoutError,
    NoMatchError,
    NoTensorError,
    PlanError,
    RecipeError,
    SeveralCallsError,
)
from attninject.recipe.patterns import compile_pattern

X = images(size=32)
TEXT = torch.zeros(2, 7, dtype=torch.long)
GATE, CROSS = "attention_gate", "cross_attention"


def planned(model: nn.Module, block: str, *inputs: Tensor, **rule: Any) -> list[str]:
    """The plan's sites in words."""
    sites = ai.plan(model, block=block, example_inputs=inputs or X, **rule).sites
    return [f"{site.where} with {site.second.where}" for site in sites]


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("enc.*.skip", "enc.2.skip", ("2",)),
        ("{enc,dec}.stage[1-4]", "dec.stage3", ("dec", "3")),
        ("**.conv", "a.b.conv", ("a.b",)),
        ("a.**", "a", ("",)),
        ("x?.[!a].b", "x1.b.b", ("1", "b")),
        ("{a,b.{c,d}}.e", "b.d.e", ("b.d",)),
        ("up.*::cat_?", "up.3::cat_1", ("3", "1")),
        ("::cat", "::cat", ()),
        ("up.*", "down.0", None),
        ("a-b.[a-c]", "a-b.b", ("b",)),
        ("*.*.*.*.*.*", "a.b.c.d.e.f", tuple("abcdef")),
        ("a*b*c", "aabbc", ("ab", "")),
        (r"re:(enc|dec)\.(?:stage)?(\d)", "dec.stage3", ("dec", "3")),
        (r"re:up\.(\d)::cat*", "up.3::cat_1", ("3", "_1")),
        (r"re:(?P<first>.*?)(x+)(y)?", "axx", ("a", "xx", "")),
        (r"re:(.*)(x+)", "axx", ("ax", "x")),
        (r"re:(?:(a)|(b))+\b", "ab", ("a", "b")),
        (r"re:(a|b){2}", "ab", ("b",)),
        (r"re:up\.\d", "up.1", ()),
        (r"re:(a*)*b", "a" * 40 + "c", None),
    ],
)
def test_what_wildcards_and_groups_stood_for(pattern: str, name: str, expected: Any) -> None:
    """Outermost wildcards in order; braces and what is in them count as one. Groups as Python's `re` has them."""
    assert compile_pattern(pattern).captures(name) == expected


def test_several_values_go_by_what_the_wildcards_stood_for() -> None:
    """The first wildcards of the site's pattern are those of `with`, of modules and of operations."""
    expected = ["before up.1::cat with before up.1.up", "before up.0::cat with before up.0.up"]
    assert planned(UNet(), GATE, before="up.*::cat", with_={"before": "up.*.up"}) == expected
    assert planned(UNet(), GATE, before="up.*::cat*", with_={"before": "up.*.up"}) == expected
    assert (
        planned(UNet(), GATE, before="up.*::cat", with_={"before": "up.1.up"}, exclude="up.0") == expected[:1]
    )


def test_groups_of_regular_expressions_pair_as_wildcards_do() -> None:
    """On either side, of modules and operations, in text and in Python."""
    expected = ["before up.1::cat with before up.1.up", "before up.0::cat with before up.0.up"]
    site, value = r"re:up\.(\d)::cat", r"re:up\.(.)\.up"
    for before, with_ in (
        (site, value),
        (site, "up.*.up"),
        ("up.*::cat", value),
        (site, re.compile(value[3:])),
    ):
        assert planned(UNet(), GATE, before=before, with_={"before": with_}) == expected
    assert planned(
        UNet(), GATE, before=re.compile(r"up\.(\d)"), input=1, with_={"before": value}, exclude="up.0"
    ) == ["before up.1 with before up.1"]
    with pytest.raises(SeveralCallsError, match=re.escape("needs more than 4000 states")):
        planned(
            UNet(), GATE, before="up.*", with_={"before": "re:up." + "(" * 60 + "u?" + ")" * 60 + "{60}[01]"}
        )


def test_one_value_serves_every_site() -> None:
    """Also those of a place, which has no wildcards."""
    found = planned(Towers(), CROSS, X, TEXT, before=["proj", "proj"], with_="image", args={"num_heads": 4})
    assert found == ["before proj with after image"]
    assert planned(FlatUNet(), GATE, before="up.*", with_="down.0") == [
        "before up.1 with after down.0",
        "before up.0 with after down.0",
    ]


@pytest.mark.parametrize(
    ("rule", "error", "said"),
    [
        (
            {"after": "down.2", "with_": "down.[01]"}, NoMatchError,
            "with after down.[01] finds 2 values (down.0, down.1); the wildcards of down.2 stand for nothing, which "
            "fits none of them",
        ),
        (
            {"after": "down.2", "with_": ["down.0", "down.1"]}, SeveralCallsError,
            "stand for nothing, which fits down.0 call 1, down.1 call 1: give `with` a call, or as many wildcards",
        ),
        (
            {"place": "stage_end", "with_": "down.*"}, SeveralCallsError,
            "with after down.* finds 3 values (down.0, down.1, down.2), and a place has no wildcards",
        ),
        (
            {"after": r"re:down\.\d", "with_": r"re:down\.[01]"}, SeveralCallsError,
            "the wildcards of down.0 stand for nothing, which fits down.0 call 1, down.1 call 1: give `with` a call, or "
            "as many wildcards (in a regular expression: groups) as tell them apart",
        ),
        (
            {"before": "up.*::cat", "with_": {"before": "up.{0,7}.up"}}, NoMatchError,
            "finds 1 values (up.0.up); the wildcards of up.1::cat stand for '1', which fits none of them",
        ),
        ({"after": "down.0", "with_": "dwn.0"}, NoMatchError, "no module matches 'dwn.0'; the nearest names are down.0"),
        (
            {"after": "down.0", "with_": "down.2"}, CannotRewriteError,
            "after down.0 with after down.2: the second value comes to be later than the block would need it",
        ),
        (
            {"before": "down.0", "with_": "down.0"}, CannotRewriteError, "comes to be later than the block would need",
        ),
        (
            {"after": "down.2", "with_": {"after": "down.1", "output": 1}}, NoTensorError,
            "with: the output of down.1 is one tensor",
        ),
        (
            {"after": "down.2", "with_": "down.1.conv"}, CannotRewriteError,
            "the second value lies inside down.1, which does not give it on; the nearest that would do is with: down.1",
        ),
        (
            {"after": "down.2.conv", "with_": "down.1"}, CannotRewriteError,
            "the site lies inside down.2, which does not have the second value; the nearest place that would do is "
            "after down.2",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_paired_is_refused_in_words(
    rule: dict[str, Any], error: type[PlanError], said: str
) -> None:
    """No value, several, one that is there too late, or one that no forward has beside the site."""
    with pytest.raises(error, match=re.escape(said)):
        planned(UNet(), GATE, **rule)


def test_a_site_is_raised_to_where_its_value_meets_the_second() -> None:
    """What ends a child is the child's own result; the plan says so. What others read inside it stays there."""
    plan = ai.plan(UNet(), block=GATE, after="down.2.act", with_="down.1.act", example_inputs=X)
    (site,) = plan.sites
    assert (site.where, site.second.where, site.owner) == ("after down.2", "after down.1", "")
    assert plan.notes == (
        "rule 1 (attention_gate): after down.2.act goes after down.2, where the same value meets the second one",
    )
    assert planned(UNet(), GATE, before="up.1.up", with_="down.0") == ["before up.1 with after down.0"]
    with pytest.raises(CannotRewriteError, match=re.escape("the nearest place that would do is after inner")):
        planned(ReadTwice(), GATE, after="inner.act", with_="side")


class ReadTwice(nn.Module):
    """What its child gives is read within the child too, after the place that is named."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.side, self.inner = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1), Counting()

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, 3, H, W) → (B, 8, H, W)."""
        side = self.side(x)
        return self.inner(self.stem(x))[0] + side


class Counting(nn.Module):
    """An activation, and its mean."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: (B, C, H, W) → the same, (B, C)."""
        y = self.act(x)
        return y, y.mean((2, 3))


class Dropping(nn.Module):
    """A child that gives on what its convolution made, but for a dropout: a module, or a function."""

    def __init__(self, module: bool) -> None:
        super().__init__()
        self.conv, self.drop = nn.Conv2d(3, 8, 1), nn.Dropout() if module else None

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, 3, H, W) → (B, 8, H, W)."""
        y = self.conv(x)
        return F.dropout(y, 0.5, self.training) if self.drop is None else self.drop(y)


class AfterDropping(nn.Module):
    """What was made before it, a child with a dropout, and what comes behind."""

    def __init__(self, module: bool) -> None:
        super().__init__()
        self.side, self.inner, self.behind = nn.Conv2d(3, 8, 1), Dropping(module), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, 3, H, W) → (B, 8, H, W)."""
        side = self.side(x)
        return self.behind(self.inner(x)) + side


@pytest.mark.parametrize("module", [True, False])
def test_a_value_that_crosses_a_forward_does_so_while_training_too(module: bool) -> None:
    """In eval mode a dropout hands its operand on; the plan asks a run in training mode, and refuses."""
    said = "while training after inner is another value than after inner.conv, as behind a dropout; the nearest that"
    with pytest.raises(CannotRewriteError, match=re.escape(said)):
        planned(AfterDropping(module), GATE, after="behind", with_="inner.conv")
    said = "which does not have the second value; the nearest place" if module else said
    with pytest.raises(CannotRewriteError, match=re.escape(said)):
        planned(AfterDropping(module), GATE, after="inner.conv", with_="side")
    assert planned(AfterDropping(module), GATE, after="behind", with_="inner") == [
        "after behind with after inner"
    ]


class OneActivation(nn.Module):
    """Two encoders, and two decoders that have one activation between them."""

    def __init__(self) -> None:
        super().__init__()
        act = nn.ReLU()
        self.enc = nn.ModuleList(nn.Sequential(nn.Conv2d(n, 8, 1), nn.ReLU()) for n in (3, 8))
        self.dec = nn.ModuleList(Acting(act) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, 3, H, W) → (B, 8, H, W)."""
        return self.dec[1](self.dec[0](self.enc[1](self.enc[0](x))))


class Acting(nn.Module):
    """A convolution, and an activation that others have, too."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(8, 8, 1), act

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, 8, H, W) → the same shape."""
        return self.act(self.conv(x))


def test_a_module_of_several_names_is_paired_by_the_one_that_it_is_called_by() -> None:
    """One activation in two decoders: at each it goes by that decoder's name."""
    assert planned(OneActivation(), GATE, after="dec.*.act", with_="enc.*") == [
        "after dec.0 with after enc.0",
        "after dec.1 with after enc.1",
    ]


class Nested(nn.Module):
    """A module that ends in a part of itself, beside two values."""

    def __init__(self) -> None:
        super().__init__()
        self.side_a, self.side_b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 6, 1)
        self.a = nn.Sequential(nn.Conv2d(3, 8, 1))
        self.a.add_module("b", nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, 3, H, W) → (B, 8, H, W)."""
        side = self.side_a(x).sum() + self.side_b(x).sum()
        return self.a(x) + side


def test_two_sites_that_meet_at_one_place_have_a_block_each() -> None:
    """Raised to the same result, each with the second value that is its own."""
    found = planned(Nested(), GATE, after=r"re:(?:a\.)?([ab])", with_=r"re:side_([ab])")
    assert sorted(found) == ["after a with after side_a", "after a with after side_b"]


class Twice(nn.Module):
    """A tower that runs for two images within one child."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.head = BothImages(), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, 3, H, W) → (B, 8, H, W)."""
        left, right = self.both(x)
        return self.head(left + right)


class BothImages(nn.Module):
    """An image and its mirror."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Sequential(nn.Conv2d(3, 8, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: (B, 3, H, W) → (B, 8, H, W), twice."""
        return self.tower(x), self.tower(x.flip(3))


def test_a_value_of_one_of_several_runs_is_not_chosen_unasked() -> None:
    """What lies in a tower is refused; one of its calls, by number, is an item of its owner's result."""
    said = "both.tower is called 2 times, and only the model has both values; name one of its calls"
    with pytest.raises(CannotRewriteError, match=re.escape(said)):
        planned(Twice(), GATE, after="head", with_="both.tower.0")
    assert planned(Twice(), GATE, after="head", with_={"after": "both.tower", "call": 2}) == [
        "after head with after both[1]"
    ]


class WrittenBetween(nn.Module):
    """A value that is written to in place between its making and its reading, behind another one."""

    def __init__(self) -> None:
        super().__init__()
        self.make, self.other, self.read = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, 3, H, W) → (B, 8, H, W)."""
        made = self.make(x)
        other = self.other(x)
        made.relu_()
        return self.read(made) + other


def test_a_value_that_is_not_yet_what_it_is_named_for_is_too_late() -> None:
    """Its tensor is there, what it will hold is not."""
    with pytest.raises(
        CannotRewriteError, match="the second value comes to be later than the block would need it"
    ):
        planned(WrittenBetween(), GATE, after="other", with_={"before": "read"})
    assert planned(WrittenBetween(), GATE, after="read", with_={"before": "read"}) == [
        "after read with before read"
    ]


def test_a_value_that_is_given_to_a_forward_stays_in_it() -> None:
    """The innermost forward that has both is that of the decoder's step, whose input the second value is."""
    model = UNet()
    plan = ai.plan(model, block=GATE, before="up.*::cat", with_={"before": "up.*"}, example_inputs=X)
    assert [(s.owner, s.second.where) for s in plan.sites] == [
        ("up.1", "before up.1"),
        ("up.0", "before up.0"),
    ]


def test_what_runs_twice_is_named_by_its_call() -> None:
    """Values inside an encoder of two images cannot meet those of the other run; the encoder's results can."""
    where = {"after": "encoder.2.conv", "with_": "encoder.0"}
    said = "encoder (Sequential) has both values, and its forward cannot be rewritten: owner is a container (Sequential)"
    with pytest.raises(CannotRewriteError, match=re.escape(said)):
        planned(Siamese(), CROSS, X, X, **{**where, "after": "encoder.2"})
    said = "encoder is called 2 times, and only the model has both values; name one of its calls"
    with pytest.raises(CannotRewriteError, match=re.escape(said)):
        planned(Siamese(), CROSS, X, X, after="encoder", call=2, with_="encoder.0")
    with pytest.raises(
        SeveralCallsError, match=re.escape("rule 1 (cross_attention), with: encoder is called 2 times")
    ):
        planned(Siamese(), CROSS, X, X, after="encoder", call=2, with_="encoder")
    with_ = {"after": "encoder", "call": 1}
    assert planned(Siamese(), CROSS, X, X, after="encoder", call=2, with_=with_) == [
        "after encoder with after encoder"
    ]


class Forked(nn.Module):
    """A root with another forward beside `forward`, which would pass a rewritten one by."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Step(3, 8), Step(8, 8)

    def forward_features(self, x: Tensor) -> Tensor:
        """x: (B, 3, H, W) → (B, 8, H, W)."""
        return self.b(self.a(x))

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, 3, H, W) → (B, 8)."""
        return self.forward_features(x).mean((2, 3))


def test_a_root_with_several_forwards_is_left_alone() -> None:
    """The message says which forward has both values, and why it is not rewritten."""
    with pytest.raises(
        CannotRewriteError, match=r"the model \(Forked\) has both values, and its forward cannot be"
    ):
        planned(Forked(), GATE, after="b", with_="a")


def test_layouts_of_second_values() -> None:
    """A gate wants a map of as many dimensions; attention takes tokens, too, and says what it was told to see."""
    with pytest.raises(
        LayoutError, match=r"the second value, text is NLC no grid .* wants a 2D map there as at its"
    ):
        planned(Towers(), GATE, X, TEXT, after="image", with_="text")
    with pytest.raises(LayoutError, match="layout NCHW has 4 axes; the second value, text has"):
        planned(Towers(), CROSS, X, TEXT, after="image", with_={"after": "text", "layout": "NCHW"})
    with pytest.raises(LayoutError, match=r"layout NC has 2 axes; the second value, text has \(2, 7, 24\)"):
        planned(Towers(), CROSS, X, TEXT, after="image", with_={"after": "text", "layout": "NC"})
    with pytest.raises(
        LayoutError, match=r"the second value, state is NC \(2, 12\), and attention_gate wants a 2D map"
    ):
        planned(Asked(), GATE, X, TEXT, after="image", with_="state")
    with pytest.raises(RecipeError, match="layout: expected a layout"):
        planned(Asked(), CROSS, X, TEXT, after="image", layout="NC")
    assert planned(Asked(), GATE, X, TEXT, after="image", with_="pool") == ["after image with after pool"]
    (site,) = ai.plan(
        Towers(),
        block=CROSS,
        after="image",
        with_={"after": "text", "layout": "NCL"},
        example_inputs=(X, TEXT),
    ).sites
    assert (site.second.channels, str(site.second.layout)) == (7, "NCL")
    with pytest.raises(NoTensorError, match=r"text gives torch\.int64"):
        planned(Towers(), CROSS, X, TEXT, after="image", with_={"before": "text"})


def test_a_rule_that_may_find_nothing_may_find_no_second_value() -> None:
    """`optional` leaves it aside with a note."""
    plan = ai.plan(UNet(), block=GATE, after="down.2", with_="nothing", optional=True, example_inputs=X)
    assert plan.sites == ()
    assert "with: no module matches 'nothing'" in plan.notes[0]
