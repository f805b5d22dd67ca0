"""A recipe resolved on one model, as frozen data: sites, and what carrying them out needs."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from attninject.errors import ForeignPlanError, StalePlanError
from attninject.observe.example_inputs import Inputs
from attninject.recipe.rules import Recipe
from attninject.surgery.location import Location
from attninject.wording import parameter_count

from .planned_site import Site
from .table import html, summary, table


@dataclass(frozen=True, eq=False)
class Plan:
    """Rules resolved on one model. `print` shows a table; `inject(model, plan)` carries it out.

    Attributes:
        sites: in the order of the rules, then of the calls.
        recipe: what was resolved.
        model_name: the class of the model.
        base_parameters: parameters of the model before.
        base_macs: multiply-accumulates of the model for one sample; 0 where the run did not get through.
        notes: what was left aside.
    """

    sites: tuple[Site, ...]
    recipe: Recipe
    model_name: str
    base_parameters: int
    base_macs: int
    notes: tuple[str, ...]
    locations: tuple[Location, ...] = field(repr=False)  # of each site, what carrying it out needs
    model: weakref.ref[nn.Module] = field(repr=False)
    signature: Any = field(repr=False)
    inputs: Inputs = field(repr=False)

    @property
    def parameters(self) -> int:
        """Parameters that the plan adds."""
        return sum(s.parameters for s in self.sites)

    @property
    def macs(self) -> int:
        """Multiply-accumulates that the plan adds, for one sample."""
        return sum(s.macs for s in self.sites)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "model": self.model_name,
            "recipe": self.recipe.to_dict(),
            "sites": [s.to_dict() for s in self.sites],
            "parameters": self.parameters,
            "macs": self.macs,
            "base_parameters": self.base_parameters,
            "base_macs": self.base_macs,
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        return table(
            self.model_name, self.recipe, self.sites, self.base_parameters, self.base_macs, self.notes
        )

    def __repr__(self) -> str:
        what = summary(self.model_name, self.recipe, self.sites)
        return f"<Plan {what}, +{parameter_count(self.parameters)} parameters>"

    def _repr_html_(self) -> str:
        return html(
            self.model_name, self.recipe, self.sites, self.base_parameters, self.base_macs, self.notes
        )

    def check(self, model: nn.Module) -> None:
        """Refuse a model that the plan was not made for, or one that has changed since.

        Raises:
            ForeignPlanError, StalePlanError: with what to do.
        """
        if self.model() is not model:
            raise ForeignPlanError(
                f"this plan was made for another {self.model_name} object; make one for this model with plan()"
            )
        if self.signature != signature(model) or any(
            at.local is not None and not all(r.set_by_run or r.holds(at.carrier) for r in at.local.reads)
            for at in self.locations
        ):
            raise StalePlanError("the model has changed since this plan was made; make it anew with plan()")


def signature(model: nn.Module) -> Any:
    """What a plan depends on: names, classes and identities of all modules, and of forwards assigned to them."""
    modules = model.named_modules(remove_duplicate=False)
    return tuple((name, id(m), type(m), id(m.__dict__.get("forward"))) for name, m in modules)
