"""The pattern language against an independent reference, and against hostile patterns."""

from __future__ import annotations

import copy
import itertools
import pickle
import re
import time

import pytest
from hypothesis import assume, example, given, settings
from strategies import globs, names, regexes

from attninject.errors import PatternError
from attninject.recipe.patterns import compile_pattern
from attninject.wording import nearest

RESNET = [
    "",
    "conv1",
    "bn1",
    "layer1",
    "layer1.0",
    "layer1.0.bn1",
    "layer1.0.bn3",
    "layer1.1.bn3",
    "layer2.0.bn3",
]
RESNET += ["layer2.0.downsample.1", "layer5.0.bn3", "layer10.0.bn3", "fc"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("layer1", ["layer1"]),
        ("layer[1-4]", ["layer1"]),
        ("layer?.*.bn3", ["layer1.0.bn3", "layer1.1.bn3", "layer2.0.bn3", "layer5.0.bn3"]),
        ("layer[!12].*.bn3", ["layer5.0.bn3"]),
        ("layer*.0.bn3", ["layer1.0.bn3", "layer2.0.bn3", "layer5.0.bn3", "layer10.0.bn3"]),
        ("*", ["conv1", "bn1", "layer1", "fc"]),
        ("**", RESNET),
        ("layer1.**", ["layer1", "layer1.0", "layer1.0.bn1", "layer1.0.bn3", "layer1.1.bn3"]),
        ("**.bn1", ["bn1", "layer1.0.bn1"]),
        ("**.**.bn1", ["bn1", "layer1.0.bn1"]),
        ("layer1.**.bn3", ["layer1.0.bn3", "layer1.1.bn3"]),
        ("{conv1,layer{1.0,2.*}.bn{1,3}}", ["conv1", "layer1.0.bn1", "layer1.0.bn3", "layer2.0.bn3"]),
        ("layer1{,.0}", ["layer1", "layer1.0"]),
        ("layer2{,.**}", ["layer2.0.bn3", "layer2.0.downsample.1"]),
        ("re:layer[12]\\.\\d+\\.bn3", ["layer1.0.bn3", "layer1.1.bn3", "layer2.0.bn3"]),
        ("re:bn", []),
        ("re:", [""]),
        ("re:.*bn1|fc", ["bn1", "layer1.0.bn1", "fc"]),
        ("layer1.*::add", []),
    ],
)
def test_patterns_match_whole_names(pattern, expected):
    """Each form of the language picks these names of a small resnet and no others."""
    assert [name for name in RESNET if compile_pattern(pattern).matches(name)] == expected


@pytest.mark.parametrize(
    ("pattern", "owner", "operation", "expected"),
    [
        ("layer*.*::add", "layer1.0", "add", True),
        ("layer*.*::add", "layer1.0", "add_1", False),
        ("layer*.*::add*", "layer1.0", "add_1", True),
        ("layer*.*::add", "layer1", "add", False),
        ("::add", "", "add", True),
        ("::add", "layer1", "add", False),
        ("**::{add,mul}_[1-3]", "a.b.c", "mul_2", True),
        ("re:layer[12]\\..*::add", "layer2.0", "add", True),
        ("layer1.0", "layer1.0", "add", False),
    ],
)
def test_operations_match_on_both_sides(pattern, owner, operation, expected):
    """`owner::operation` takes a glob on either side and never matches a module."""
    compiled = compile_pattern(pattern)
    assert compiled.match_operation(owner, operation) is expected
    assert not (compiled.operation and compiled.matches(owner))


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("", "it is empty; the model itself and everything in it is **"),
        ("a..b", "it has an empty segment; names have no two dots in a row, and none at either end"),
        ("a.", "it has an empty segment"),
        ("{a,}.b", "it has an empty segment"),
        ("a**", "`**` must be a whole segment; write *, or put a dot between: **.x"),
        ("**a", "`**` must be a whole segment"),
        ("{**,x}a", "`**` must be a whole segment"),
        ("a.***", "more than two stars in a row; use * or ** (at character 3)"),
        ("x[ab", "`[` is never closed (at character 2)"),
        ("x[4-1]", "the range 4-1 is empty; write 1-4 (at character 2)"),
        ("x[a.b]", "a class stays within a segment, so the dot cannot be in it"),
        ("x[^a]", "write [!...] for the complement of a class"),
        ("{a,b", "`{` is never closed (at character 1)"),
        ("a}", "`}` without `{` (at character 2)"),
        ("a]", "`]` without `[`"),
        ("{}", "empty braces"),
        ("layer(1|2)", "parentheses belong to regular expressions: put re: in front, or write {a,b}"),
        ("layer\\d", "a glob has no escapes; a class does it, as in [*]"),
        ("{" * 21, "braces nested more than 20 deep (at character 21)"),
        ("a" * 1001, "it has 1001 characters, at most 1000 are allowed; use a list"),
        ("layer1::", "no operation after `::`; write for example layer1::add"),
        ("re:(", "no regular expression: missing ), unterminated subpattern at position 0"),
        ("re:(?=a)a", "lookahead and lookbehind are not supported; use `exclude:` for what must not match"),
        ("re:(?<!a)a", "lookahead and lookbehind are not supported"),
        ("re:(?!)", "lookahead and lookbehind are not supported"),
        (r"re:(a)\1", "backreferences are not supported"),
        ("re:(a)?(?(1)b|c)", "conditional groups are not supported"),
        ("re:(?>a)", "atomic groups are not supported"),
        ("re:a++", "possessive repeats are not supported"),
        ("re:(?i)a", "flags such as (?i) are not supported; write [Aa] for either case"),
        ("re:(?i:a)", "flags such as (?i:) are not supported"),
        ("re:(a{1000}){1000}", "it needs more than 500 states; use smaller counted repeats"),
        ("re:(){65535}", "it needs more than 500 states"),
        ("re:a{99999999999}", "a repeat is too large"),
        ("re:" + "a" * 201, "a regular expression of 201 characters, at most 200 are allowed"),
    ],
)
def test_bad_patterns_are_refused_with_the_fix(pattern, message):
    """A malformed or refused pattern says what is wrong, where, and what to write instead."""
    with pytest.raises(PatternError, match=re.escape(message)) as caught:
        compile_pattern(pattern)
    assert pattern[:50] in str(caught.value)


@pytest.mark.parametrize(
    "pattern",
    [
        "*a" * 40 + "b",
        "**." * 60 + "x",
        "{a,aa}" * 100 + "b",
        "{a,b}" * 200,
        "{a,{a,{a,{a,*}}}}" * 30 + "b",
        "re:(a*)*b",
        "re:(a|a)*b",
        "re:(a|aa)+$b",
        "re:(.*a){30}b",
        "re:(a?){60}a{60}b",
        "re:(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)x",
    ],
)
def test_hostile_patterns_cannot_hang(pattern):
    """Patterns that make a backtracking engine run for ages answer on long names at once."""
    compiled = compile_pattern(pattern)
    start = time.perf_counter()
    assert not compiled.matches("a" * 300)
    assert not compiled.matches(".".join("a" * 150) + ".y")
    assert time.perf_counter() - start < 3


def test_the_dfa_stays_small():
    """A pattern whose DFA would be exponential forgets old states and still answers right."""
    compiled = compile_pattern("re:[ab]*a[ab]{80}")
    for number in range(600):
        name = format(number * 0x9E3779B97F4A7C15 % 2**180, "0180b").translate({48: "a", 49: "b"})
        assert compiled.matches(name) is (name[-81] == "a")
        assert compiled._machine is not None
        assert compiled._machine.weight < 250_000


def test_ten_thousand_names_are_quick():
    """One pattern over 10 000 names takes a small part of a second."""
    many = [f"layer{i % 5}.{i}.bn{i % 3}.weight" for i in range(10_000)]
    compiled = compile_pattern("layer[1-4].*.bn*.**")
    start = time.perf_counter()
    assert sum(map(compiled.matches, many)) == 8000
    assert time.perf_counter() - start < 0.5


def test_patterns_are_values():
    """Equal texts give equal, hashable patterns, also through pickle and deepcopy."""
    pattern = compile_pattern("layer*.*::add")
    assert {pattern: 1}[compile_pattern("layer*.*::add")] == 1
    assert pickle.loads(pickle.dumps(pattern)) == pattern == copy.deepcopy(pattern)
    assert pickle.loads(pickle.dumps(pattern)).match_operation("layer1.0", "add")
    assert str(pattern) == "layer*.*::add"
    with pytest.raises(PatternError, match="a pattern is a string, found int: 3"):
        compile_pattern(3)


@given(globs(), names())
@example("{a,b}.**.{**,a}", "a.b.a")
@example("a{,.**}", "a")
@settings(max_examples=400, deadline=None)
def test_globs_agree_with_the_reference(pattern, name):
    """Compiled globs match exactly what a naive matcher does, and fail to compile on the same texts."""
    expansions = [text.split(".") for text in expand(pattern.replace("**", DEEP))]
    if any(not good_segment(segment) for text in expansions for segment in text):
        with pytest.raises(PatternError):
            compile_pattern(pattern)
        return
    segments = name.split(".") if name else []
    expected = any(match_segments(text, segments) for text in expansions)
    assert compile_pattern(pattern).matches(name) is expected


@given(regexes(), names())
@settings(max_examples=400, deadline=None)
def test_regexes_agree_with_python(pattern, name):
    """Regular expressions match exactly what Python's full match does."""
    assume(len(pattern) <= 200 and not (name == "" and r"\B" in pattern))  # \B on "" differs between Pythons
    try:
        compiled = compile_pattern("re:" + pattern)
    except PatternError as error:
        assume("states" not in str(error))
        raise
    assert compiled.matches(name) is (re.fullmatch(pattern, name) is not None)


@pytest.mark.parametrize(
    ("word", "candidates", "expected"),
    [
        ("cbma", ["cbam", "bam", "se"], ["cbam"]),
        ("resnet_cbam", ["se_resnet", "cbam_resnet", "bam"], ["cbam_resnet", "bam", "se_resnet"]),
        ("layer1.0.bn4", ["layer1.0.bn3", "fc"], ["layer1.0.bn3"]),
        ("REDUCTION", ["reduction", "bias"], ["reduction"]),
        ("zzz", ["cbam", "se"], []),
        ("", ["cbam"], []),
        ("x" * 10**6, ["cbam"], []),
    ],
)
def test_nearest_words(word, candidates, expected):
    """Suggestions come best first, whatever the case or the order of words, and only when they resemble."""
    assert nearest(word, candidates) == expected


# --- the reference: expand braces, split at dots, match by recursion ---------------------------

DEEP = "§"  # a `**` as written; two stars that only meet when braces are expanded are two `*`


def expand(pattern: str) -> list[str]:
    """All brace-free globs of a glob."""
    depth, start, cuts = 0, -1, []
    for i, char in enumerate(pattern):
        if char == "{":
            if depth == 0:
                start, cuts = i, [i]
            depth += 1
        elif char == "," and depth == 1:
            cuts.append(i)
        elif char == "}":
            depth -= 1
            if depth == 0:
                cuts.append(i)
                middles = [pattern[a + 1 : b] for a, b in itertools.pairwise(cuts)]
                return [
                    pattern[:start] + middle + rest
                    for branch in middles
                    for middle in expand(branch)
                    for rest in expand(pattern[i + 1 :])
                ]
    return [pattern]


def good_segment(segment: str) -> bool:
    """Whether a brace-free segment is `**` or does not hold it, and is not empty."""
    return segment == DEEP or (segment != "" and DEEP not in segment)


def match_segments(pattern: list[str], segments: list[str]) -> bool:
    """`**` takes any number of segments, every other pattern one."""
    if not pattern:
        return not segments
    if pattern[0] == DEEP:
        return any(match_segments(pattern[1:], segments[i:]) for i in range(len(segments) + 1))
    return (
        bool(segments) and match_text(pattern[0], segments[0]) and match_segments(pattern[1:], segments[1:])
    )


def match_text(pattern: str, text: str) -> bool:
    """One segment, by recursion on the first character."""
    if not pattern:
        return not text
    if pattern[0] == "*":
        return any(match_text(pattern[1:], text[i:]) for i in range(len(text) + 1))
    if not text:
        return False
    if pattern[0] == "[":
        body, rest = pattern[1:].split("]", 1)
        inside = in_class(text[0], body.removeprefix("!"))
        return inside is not body.startswith("!") and match_text(rest, text[1:])
    return pattern[0] in ("?", text[0]) and match_text(pattern[1:], text[1:])


def in_class(char: str, body: str) -> bool:
    """`0-9` is a range, everything else stands for itself."""
    return "0" <= char <= "9" if body == "0-9" else char in body
