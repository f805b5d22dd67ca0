"""Which second value belongs to which site, where a block can be given both, and what is said where it cannot."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from pair_nets import FlatUNet, Siamese, Step, Towers, UNet
from small import images
from torch import Tensor, nn

import attninject as ai
from attninject.errors import (
    CannotRewriteError,
    LayoutError,
    NoMatchError,
    NoTensorError,
    PlanError,
    SeveralCallsError,
)
from attninject.recipe.captures import captures

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
    ],
)
def test_what_the_wildcards_of_a_glob_stood_for(pattern: str, name: str, expected: Any) -> None:
    """Outermost wildcards in order; braces and what is in them count as one."""
    assert captures(pattern, name) == expected


def test_several_values_go_by_what_the_wildcards_stood_for() -> None:
    """The first wildcards of the site's pattern are those of `with`, of modules and of operations."""
    expected = ["before up.1::cat with before up.1.up", "before up.0::cat with before up.0.up"]
    assert planned(UNet(), GATE, before="up.*::cat", with_={"before": "up.*.up"}) == expected
    assert planned(UNet(), GATE, before="up.*::cat*", with_={"before": "up.*.up"}) == expected
    assert (
        planned(UNet(), GATE, before="up.*::cat", with_={"before": "up.1.up"}, exclude="up.0") == expected[:1]
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
            {"after": r"re:down\.\d", "with_": "down.*"}, SeveralCallsError,
            "is a regular expression, and only the wildcards of a glob can be aligned; name one value with `with`",
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
