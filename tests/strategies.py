"""Hypothesis strategies, all in one place."""

from __future__ import annotations

from hypothesis import strategies as st
from random_nets import KINDS, ROOTS, NetSpec

# Few letters, so that random patterns and random names meet.
_LETTERS = "ab1"

segments = st.text(_LETTERS, min_size=1, max_size=4)


def names(max_segments: int = 4) -> st.SearchStrategy[str]:
    """Dotted module names, the root's empty one among them."""
    return st.lists(segments, max_size=max_segments).map(".".join)


def _glob_pieces() -> st.SearchStrategy[str]:
    leaves = st.sampled_from(["a", "b", "1", "*", "?", "[ab]", "[!a]", "[0-9]", "[a-]", "."])
    words = st.lists(leaves, min_size=1, max_size=3).map("".join)
    alternatives = st.one_of(words, st.sampled_from(["", "**", "**.a", "b.**", ".a", "a."]))
    braces = st.lists(alternatives, min_size=1, max_size=3).map(lambda a: "{" + (",".join(a) or "a") + "}")
    nested = st.tuples(words, braces, words).map(lambda t: "{" + "".join(t) + ",b}")
    return st.one_of(words, words, braces, nested)


def globs() -> st.SearchStrategy[str]:
    """Globs with wildcards, `**`, classes and (nested) braces; some of them malformed by their dots."""
    segment = st.one_of(st.just("**"), st.lists(_glob_pieces(), min_size=1, max_size=2).map("".join))
    return st.lists(segment, min_size=1, max_size=4).map(".".join)


def _extend(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    repeat = st.sampled_from(["*", "+", "?", "*?", "+?", "??", "{2}", "{1,2}", "{0,3}?", "{1,}"])
    return st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda t: f"(?:{t[0]}|{t[1]})"),
        st.tuples(inner, inner).map(lambda t: f"({t[0]}|{t[1]}|)"),
        st.tuples(inner, repeat).map(lambda t: f"(?:{t[0]}){t[1]}"),
        inner.map(lambda t: f"({t})"),
    )


def regexes() -> st.SearchStrategy[str]:
    """Small regular expressions without lookaround and references."""
    atoms = [
        "a",
        "b",
        "1",
        r"\.",
        ".",
        "[ab]",
        "[^a]",
        "[^.]",
        "[0-9a]",
        r"\d",
        r"\w",
        r"\W",
        r"\D",
        r"\s",
        r"[\d.]",
    ]
    leaves = st.sampled_from([*atoms, "^", "$", r"\A", r"\Z", r"\b", r"\B"])
    return st.recursive(leaves, _extend, max_leaves=6)


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from(["se", "layer1.*", "**.bn3", "stage_end", "all", "forward", "a.b", "owner", "NCHW"]),
)

FIELDS = (
    *("block", "after", "before", "place", "input", "output", "layout", "type", "exclude", "pick", "per"),
    *(
        "call",
        "stages",
        "min_channels",
        "args",
        "init",
        "name",
        "optional",
        "with",
        "share",
        "rules",
        "every",
        "source",
        "blok",
    ),
)

values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.one_of(st.sampled_from(FIELDS), st.text(max_size=5)), inner, max_size=4),
    ),
    max_leaves=8,
)

recipe_like = st.fixed_dictionaries(
    {"rules": st.lists(st.dictionaries(st.sampled_from(FIELDS), values, max_size=6), max_size=3)},
    optional={"name": values, "source": values, "rule": values},
)

# Scraps of YAML, one a line; a line's own quotes and blanks matter.
_SCRAPS = r"""
rules:
-
block: se
after: x
{
}
[
]
&a
*a
<<:
!!set
!!binary aGk=
!<tag:x>
?
:
---
...
|
>-
'
"
"\U0011ffff"
\x
#
%YAML 1.1
%TAG ! x
.inf
.nan
1_0
0x1F
1:30:5
2001-01-01
0b2
=
~
@
`
""".splitlines()

yaml_like = st.lists(
    st.one_of(
        st.sampled_from(_SCRAPS),
        st.sampled_from(
            ["\n", "\n", "  ", " ", "\t", "\x00", "\ufeff", "\u2028", "\x85", "\ud800", "9" * 5000]
        ),
        st.text(max_size=4),
    ),
    max_size=30,
).map("".join)


# --- random nets and rules ---------------------------------------------------------------------

_statements = st.tuples(st.sampled_from(KINDS), st.integers(0, 3), st.integers(0, 3))

nets = st.builds(
    NetSpec,
    owners=st.lists(st.lists(_statements, min_size=2, max_size=7).map(tuple), min_size=1, max_size=3).map(
        tuple
    ),
    root=st.sampled_from(sorted(ROOTS)),
    features=st.booleans(),
    seed=st.integers(0, 3),
)


@st.composite
def rules(draw: st.DrawFn, names: list[str], operations: list[str], places: list[str]) -> dict:
    """Fields of one rule for a net whose modules have these names: often a good rule, sometimes none."""
    deep = [n for n in names if n.count(".") > 1]
    name = draw(st.sampled_from(draw(st.sampled_from([names, deep, deep])) or names))
    leaf = name.rpartition(".")[2] or name
    patterns = [name, name, name, f"**.{leaf}", f"re:.*{leaf}", "**", "units.**", "units.*.*"]
    where = draw(st.sampled_from(["after", "after", "after", "before", "operation", "operation", "place"]))
    rule = {"block": draw(st.sampled_from(["scaling", "scaling", "se", "cbam"]))}
    if where == "operation":
        owner = draw(st.sampled_from(["units.*", "**", "units.0"]))
        where, patterns = draw(st.sampled_from(["after", "before"])), [f"{owner}::{op}" for op in operations]
    rule[where] = draw(st.sampled_from(places if where == "place" else patterns))
    rule["call"] = draw(st.sampled_from(["all", "all", "all", "last", 1, 2]))
    if where == "place":
        del rule["call"]
    optional = {
        "pick": st.sampled_from(["first", "last", [0, -1], {"every": 2, "offset": 1}]),
        "per": st.sampled_from(["owner", "stage"]),
        "init": st.just("blend"),
        "name": st.sampled_from(["spare", "se", "extra"]),
        "type": st.sampled_from(["Conv2d", "BatchNorm2d", "ReLU", "Owner0", "Owner1", "Module"]),
        "exclude": st.sampled_from(["units.0.**", "**.m0", "head"]),
    }
    if where == "before":
        optional["input"] = st.sampled_from([1, "x", "mask"])
    if where == "after":
        optional["output"] = st.sampled_from([0, 1, "out"])
    count = draw(st.sampled_from([0, 0, 0, 1, 2]))
    for field in draw(
        st.lists(st.sampled_from(sorted(optional)), min_size=count, max_size=count, unique=True)
    ):
        rule[field] = draw(optional[field])
    if rule["block"] == "scaling":
        rule.pop("init", None)  # an identity, blended, has nothing to learn
    else:
        rule["args"] = {"reduction": 1}
    return rule
