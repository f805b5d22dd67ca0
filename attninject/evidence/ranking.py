"""A ranking of sites as frozen data: what was measured, how sure it is, and the recipe of the best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from attninject.errors import PlanError
from attninject.notebook import html_table
from attninject.planning.planned_site import Site
from attninject.recipe.rules import Recipe, Rule
from attninject.wording import aligned, human, listed

from .methods import FORMULAS
from .statistics import LEVEL

HEADER = (
    "rank",
    "site",
    "shape",
    "parameters",
    "MACs",
    "score",
    "95 % interval",
    "ranks",
    "p (Holm)",
    "loss drop",
)
_NUMBERS = {0, 3, 4, 5, 8, 9}


@dataclass(frozen=True)
class RankedSite:
    """One candidate.

    Attributes:
        site: as planned.
        number: of the site in the plan, from 0.
        score: the method's; larger is better.
        interval: of the score, 95 %, by a bootstrap over images.
        rank: from 1, by the score.
        rank_interval: of the rank, from the same bootstrap.
        p: of the score test under random signs of the images, whatever the method.
        p_holm: the same, corrected for the number of sites (Holm).
        drop: loss that one damped Newton step on some images takes off the loss of others, to first order.
    """

    site: Site
    number: int
    score: float
    interval: tuple[float, float]
    rank: int
    rank_interval: tuple[int, int]
    p: float
    p_holm: float
    drop: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        own = {k: list(v) if isinstance(v, tuple) else v for k, v in self.__dict__.items() if k != "site"}
        return {"site": self.site.to_dict(), **own}


@dataclass(frozen=True)
class Ranking:
    """Candidate sites in order of a score. `print` shows a table; `top` gives the recipe of the best.

    Attributes:
        sites: best first.
        order: indices into `sites` in which `top` takes them: of `score`, by forward selection, each the best given
            those before it; of the others, by the score.
        recipe: what was resolved.
        model_name: the class of the model.
        method: its name.
        images: how many were looked at.
        seed: of everything drawn.
        notes: what was done with the head, and what was left aside.
    """

    sites: tuple[RankedSite, ...]
    order: tuple[int, ...]
    recipe: Recipe
    model_name: str
    method: str
    images: int
    seed: int
    notes: tuple[str, ...]

    @property
    def significant(self) -> tuple[RankedSite, ...]:
        """The sites that can be told from chance after Holm's correction, at 5 %."""
        return tuple(s for s in self.sites if s.p_holm < LEVEL)

    @property
    def verdict(self) -> str:
        """One sentence: whether any site can be told from chance."""
        found = self.significant
        on = f"can be told from chance on these {self.images} images"
        if not found:
            return f"no site {on}"
        return f"{len(found)} of {len(self.sites)} sites {on}: {listed([_where(s.site) for s in found], 5)}"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "model": self.model_name,
            "recipe": self.recipe.to_dict(),
            "method": self.method,
            "images": self.images,
            "seed": self.seed,
            "sites": [s.to_dict() for s in self.sites],
            "order": list(self.order),
            "verdict": self.verdict,
            "notes": list(self.notes),
        }

    def top(self, k: int | None = None, *, parameters: int | None = None, macs: int | None = None) -> Recipe:
        """A recipe that names exactly the best k sites, or as many as a budget of parameters or MACs holds.

        A site that does not fit is passed over for the next that does.

        Raises:
            TypeError: not exactly one of the three is given.
            PlanError: no site fits; k is none of 1 … number of sites.
        """
        limits = [("k", k), ("parameters", parameters), ("macs", macs)]
        given = [(name, limit) for name, limit in limits if limit is not None]
        if len(given) != 1:
            raise TypeError("top: give exactly one of k, parameters, macs")
        name, limit = given[0]
        if name == "k" and not 1 <= limit <= len(self.sites):
            raise PlanError(f"top: k: expected 1 … {len(self.sites)}, found {limit}")
        chosen = self._within(name, limit)
        if not chosen:
            least = min(getattr(s.site, name) for s in self.sites)
            raise PlanError(f"top: {name}={limit:,} holds no site; the smallest has {least:,}")
        ranked = sorted((self.sites[i] for i in chosen), key=lambda s: s.number)
        rules = tuple(exact_rule(s.site, self.recipe.rules[s.site.rule]) for s in ranked)
        return Recipe(f"{self.recipe.name}_top_{len(rules)}", rules, self.recipe.source)

    def _within(self, name: str, limit: int) -> list[int]:
        if name == "k":
            return list(self.order[:limit])
        chosen, spent = [], 0
        for i in self.order:
            cost = getattr(self.sites[i].site, name)
            if spent + cost <= limit:
                chosen.append(i)
                spent += cost
        return chosen

    def rows(self) -> list[tuple[str, ...]]:
        """The cells of the table, under `HEADER`."""
        return [
            (
                str(s.rank), _where(s.site), "×".join(map(str, s.site.shape[1:])), f"{s.site.parameters:,}",
                human(s.site.macs), _number(s.score), f"{_number(s.interval[0])} … {_number(s.interval[1])}",
                f"{s.rank_interval[0]}–{s.rank_interval[1]}", _p(s.p_holm), f"{s.drop:.2g}",
            )
            for s in self.sites
        ]  # fmt: skip

    def words(self) -> list[str]:
        """The sentences below the table."""
        return [
            *(f"note: {note}" for note in self.notes),
            f"method: {self.method}: {FORMULAS[self.method]}",
            "in a study of nine tasks no method chose better sites than chance does within a budget of parameters "
            "(attninject/evidence/RESULTS.md); train the short list beside its controls before you believe it",
            self.verdict,
        ]

    def __str__(self) -> str:
        table = aligned([HEADER, *self.rows()], right=_NUMBERS)
        return "\n".join([self._title(), *("  " + line for line in table), *self.words()])

    def _repr_html_(self) -> str:
        return html_table(HEADER, self.rows(), right=_NUMBERS, above=[self._title()], below=self.words())

    def _title(self) -> str:
        looked = f"{len(self.sites)} sites, {self.images} images, seed {self.seed}"
        return f"{self.recipe.name} on {self.model_name}: {looked}"


def exact_rule(site: Site, rule: Rule) -> Rule:
    """The rule that names this site alone, by the block, arguments and options of the rule that found it."""
    pattern = (_escaped(site.path),)
    operation = "::" in site.path
    return replace(
        rule,
        after=pattern if site.position == "after" else None,
        before=pattern if site.position == "before" else None,
        replace=pattern if site.position == "replace" else None,
        place=None,
        input=site.input if site.position == "before" else None,
        output=site.output if site.position == "after" else None,
        call=None if operation or site.position == "replace" else site.call,
        type=(), exclude=(), pick="all", per="model", stages=(), min_channels=0, optional=False,
        args=site.args, init=site.init,
    )  # fmt: skip


def _escaped(path: str) -> str:
    """A path as a pattern that matches itself alone."""
    return "".join(f"[{c}]" if c in "*?[{}" else c for c in path) or "re:"


def _where(site: Site) -> str:
    """`layer1.0::add call 2`, `before` said, the block where it is no matter of course."""
    call = f" call {site.call}" if site.call > 1 else ""
    item = "" if site.output is None else f"[{site.output!r}]"
    where = site.where if site.path else f"{site.position} (the model)"
    return f"{where}{item}{call}"


def _number(value: float) -> str:
    return f"{value:.2f}" if 0.01 <= abs(value) < 1e4 or value == 0 else f"{value:.1e}"


def _p(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else f"{value:.1e}"


def ranks_of(scores: Sequence[float]) -> list[int]:
    """Rank from 1 of each, largest first, ties by order.

    >>> ranks_of([0.5, 2.0, 0.5])
    [2, 1, 3]
    """
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    found = [0] * len(scores)
    for rank, i in enumerate(order, 1):
        found[i] = rank
    return found
