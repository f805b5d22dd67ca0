"""A plan for people: the table, printed or in a notebook."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from attninject.notebook import html_table
from attninject.recipe.rules import Recipe, Rule
from attninject.wording import aligned, human, listed

from .planned_site import Site

HEADER = ("site", "shape", "layout", "new module", "how", "parameters", "MACs")
NUMBERS = {5, 6}  # the columns that are set flush right


def table(
    model_name: str,
    recipe: Recipe,
    sites: Sequence[Site],
    base_parameters: int,
    base_macs: int,
    notes: Sequence[str],
) -> str:
    """The plan in words: rules with their counts, then a row per site, then the sums."""
    lines = [summary(model_name, recipe, sites), *_rules(recipe, sites)]
    lines += ["  " + line for line in aligned([HEADER, *map(row, sites)], right=NUMBERS)]
    return "\n".join([*lines, *sums(sites, base_parameters, base_macs), *_noted(notes)])


def html(
    model_name: str,
    recipe: Recipe,
    sites: Sequence[Site],
    base_parameters: int,
    base_macs: int,
    notes: Sequence[str],
) -> str:
    """What `table` says, for a notebook."""
    return html_table(
        HEADER,
        map(row, sites),
        right=NUMBERS,
        above=[summary(model_name, recipe, sites), *_rules(recipe, sites)],
        below=[*sums(sites, base_parameters, base_macs), *_noted(notes)],
    )


def summary(model_name: str, recipe: Recipe, sites: Sequence[Site]) -> str:
    """A plan in a few words: `cbam_resnet on ResNet: 16 sites`."""
    return f"{recipe.name} on {model_name}: {_sites(len(sites))}"


def _rules(recipe: Recipe, sites: Sequence[Site]) -> Iterator[str]:
    for index, rule in enumerate(recipe.rules):
        yield f"rule {index + 1}: {described(rule)}: {_sites(sum(s.rule == index for s in sites))}"


def _noted(notes: Sequence[str]) -> list[str]:
    return [f"note: {note}" for note in notes]


def described(rule: Rule) -> str:
    """A rule in one line: `se (reduction=16), after layer1.*, init identity`."""
    patterns = listed([str(p) for p in rule.after or rule.before or rule.replace or ()], 8)
    said = "after" if rule.after else "before" if rule.before else "in place of"
    where = rule.place or f"{said} {patterns}"
    args = ", ".join(f"{key}={value}" for key, value in rule.args.items())
    more = f", with {rule.with_}" if rule.with_ else ""
    more += f", one per {rule.share} and width" if rule.share else ""
    return f"{rule.block_name}{f' ({args})' if args else ''}, {where}{more}, init {rule.init}"


def row(site: Site) -> tuple[str, ...]:
    """The cells of a site, under `HEADER`."""
    call = f" call {site.call}" if site.call > 1 else ""
    item = "" if site.output is None else f"[{site.output!r}]"
    second = f" with {site.second.where}" if site.second else ""
    return (
        f"{site.where}{item}{call}{second}",
        "×".join(map(str, site.shape[1:])),
        str(site.layout),
        site.name,
        site.mechanism,
        "shared" if site.shares else f"{site.parameters:,}",
        human(site.macs),
    )


def sums(sites: Sequence[Site], base_parameters: int, base_macs: int) -> Iterator[str]:
    """The lines below the rows: reasons for `module`, parameters, MACs, and whether the output changes."""
    for reason in dict.fromkeys(s.reason for s in sites if s.reason):
        yield f"module: {reason}"
    yield _sum("parameters", "{:,}".format, sum(s.parameters for s in sites), base_parameters)
    if base_macs:
        yield _sum("MACs", human, sum(s.macs for s in sites), base_macs)
    if any(s.position == "replace" for s in sites):
        yield "no key moves: what is replaced keeps its own, and the new part's stand below them"
    same = all(s.init != "paper" for s in sites)
    yield "output identical until training begins" if same else "output changes at once (init: paper)"


def _sum(what: str, show: Callable[[int], str], new: int, base: int) -> str:
    return f"{what}: {show(base)} + {show(new)} = {show(base + new)} (+{100 * new / max(base, 1):.1f} %)"


def _sites(count: int) -> str:
    return "1 site" if count == 1 else f"{count} sites"
