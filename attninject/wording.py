"""Names, counts and lists in words: what every message and table of the house is made of.

Columns are padded by hand, in ten lines: tabulate or rich would take longer to load than all of the command line.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any

_MAX_WORD = 200  # characters of a name that are looked at


def nearest(word: str, candidates: Iterable[str], n: int = 3, *, reordered: bool = True) -> list[str]:
    """Up to n of the candidates that most resemble `word`, best first, whatever the case; [] when none does.

    `reordered`: a candidate with the same words in another order, or with more of them, is near as well. Not so
    for names of models, whose letters and digits are read from left to right.

    >>> nearest("resnet_cbma", ["se_resnet", "cbam_resnet", "bam"], n=1)
    ['cbam_resnet']
    """
    if not reordered:
        lower = {candidate.lower(): candidate for candidate in candidates}
        return [lower[close] for close in difflib.get_close_matches(word.lower(), lower, n, 0.6)]
    wanted = word[:_MAX_WORD].lower()
    given, ordered = (
        difflib.SequenceMatcher(b=text, autojunk=False) for text in (wanted, _in_word_order(wanted))
    )
    scored: list[tuple[float, str]] = []
    for candidate in dict.fromkeys(candidates):
        lowered = candidate[:_MAX_WORD].lower()
        score = max(_ratio(given, lowered), _ratio(ordered, _in_word_order(lowered)))
        if min(len(wanted), len(lowered)) > 2 and (wanted in lowered or lowered in wanted):
            score = max(score, 0.6)
        if score >= 0.6:
            scored.append((-score, candidate))
    return [candidate for _, candidate in sorted(scored)[:n]]


def nearest_hint(word: str, names: Iterable[str]) -> str:
    """What a message adds of names that resemble `word`: `; the nearest names are a, b`, or nothing."""
    near = nearest(word, names)
    return f"; the nearest names are {', '.join(near)}" if near else ""


def listed(names: Sequence[str], most: int = 3) -> str:
    """The first few of some names, for a message: `a, b, c, …`."""
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")


def _in_word_order(name: str) -> str:
    return "_".join(sorted(re.split(r"[_./\- ]+", name)))


def _ratio(matcher: difflib.SequenceMatcher[str], text: str) -> float:
    matcher.set_seq1(text)  # the second sequence, which the matcher indexes, stays
    quick = matcher.real_quick_ratio() >= 0.6 and matcher.quick_ratio() >= 0.6
    return matcher.ratio() if quick else 0.0


def clipped(text: str) -> str:
    """At most 60 characters."""
    return text if len(text) <= 60 else text[:57] + "..."


def quoted(text: str) -> str:
    """A text in quotes, clipped."""
    return repr(clipped(text))


def did_you_mean(word: str, candidates: Iterable[str]) -> str:
    """`; did you mean bn3?`, or nothing where nothing is near."""
    close = nearest(word, candidates)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def name_of(block: Any) -> str:
    """What a block is called: a name itself, a class or function by its own, an instance by its class's.

    >>> name_of("se"), name_of(functools.partial(dict, a=1)), name_of(3)
    ('se', 'dict', 'int')
    """
    while isinstance(block, functools.partial):
        block = block.func
    own = block if isinstance(block, str) else getattr(block, "__name__", None)
    return own if isinstance(own, str) else type(block).__name__


def human(count: int) -> str:
    """12.3 M for 12,345,678, 4.10 G for 4,096,000,000: always three digits from 1,000."""
    return _with_unit(count, "GMk", lambda value: f"{value:#.3g}".rstrip("."))


def parameter_count(count: int) -> str:
    """2.5 M for 2,530,992, 7.0 B for 7,000,000,000: as the sizes of models are spoken of."""
    return _with_unit(count, "BMk", "{:.1f}".format)


def _with_unit(count: int, units: str, show: Callable[[float], str]) -> str:
    for limit, unit in zip((10**9, 10**6, 10**3), units, strict=True):
        if count >= limit:
            return f"{show(count / limit)} {unit}"
    return str(count)


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or what kind it is of."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]], right: Container[int] = ()) -> str:
    """A table in Markdown, the columns of `right` flush right."""
    rule = ["---:" if i in right else "---" for i in range(len(head))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *rows))


def aligned(rows: Sequence[Sequence[str]], right: Container[int] = ()) -> list[str]:
    """Rows of cells as lines whose columns stand below one another, those of `right` flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = (
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join(padded).rstrip()

    return [line(cells) for cells in rows]
