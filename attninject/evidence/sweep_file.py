"""The file of a sweep: an experiment's settings, and `grid:`, `seeds:` and `controls:`. No torch here.

Faults are said as a recipe's are: all of them in one report, each with its line and column.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from attninject.errors import ExperimentError
from attninject.recipe.checks import Checker, boolean, checked_fields, integer, some, words
from attninject.recipe.report import BAD, Node, Report
from attninject.recipe.yaml_text import from_python, read_file, read_yaml
from attninject.training.experiment import DATA, TOP, TRAIN, data_section
from attninject.wording import did_you_mean, quoted

FORM = "a mapping with `model:`, `seeds:` and `grid:`"

BUDGET = ("epochs", "batch_size", "accumulate", "mixup", "cutmix")
"""Settings of `train` that are an arm's budget or change its images: the same in every arm."""

MACHINE = ("device", "sharding", "save_every", "log_every")
"""Settings of `train` that say where and how a run is carried out, not what it learns."""

ARM = {key: row for key, row in TRAIN.items() if key not in (*BUDGET, *MACHINE, "seed")}
"""Settings of `train` that arms may differ in."""

OF_BLOCKS = ("recipe", "place", "attn_lr")
"""Keys of the grid that say nothing of plain fine-tuning."""


@dataclass(frozen=True)
class Controls:
    """What is trained beside the arms; plain fine-tuning always is.

    Attributes:
        bottleneck: for each recipe a 1×1 residual bottleneck of its parameters at its sites.
        random_sites: for each recipe so many draws of its block at random sites of the same stages and shapes.
        seed: of the draws.
    """

    bottleneck: bool = True
    random_sites: int = 1
    seed: int = 0


@dataclass(frozen=True)
class Sweep:
    """What a sweep's file says: common settings, a list of values for each key of the grid, seeds."""

    common: Mapping[str, Any]  # model, weights, recipe, data, train: as in an experiment file
    out: str
    seeds: tuple[int, ...]
    grid: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    controls: Controls = field(default_factory=Controls)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        grid = {key: list(values) for key, values in self.grid.items()}
        return {**self.common, "out": self.out, "seeds": list(self.seeds), "grid": grid,
                "controls": asdict(self.controls)}  # fmt: skip


def read_sweep(
    path: str | Path | Mapping[str, Any], *, out: str | None = None, seeds: tuple[int, ...] | None = None
) -> Sweep:
    """A sweep from a YAML file or a mapping; `out` and `seeds` take the place of the file's.

    Raises:
        ExperimentError: with every fault, each with its place.
    """
    if isinstance(path, Mapping):
        report = Report(error=ExperimentError)
        node: Node | None = from_python(dict(path), report)
    else:
        report = Report(str(path), error=ExperimentError)
        node = read_yaml(read_file(str(path), error=ExperimentError), report, "sweep", FORM)
    values: dict[str, Any] = {}
    if node is not None and not isinstance(node.value, dict):
        report.expected(node, FORM)
    elif node is not None:
        values = checked_fields(node, _CHECKERS, "key", report)
    report.raise_if_any()
    given = {key: value for key, value in (("out", out), ("seeds", seeds)) if value is not None}
    return _made({**values, **given}, report)


def _made(values: dict[str, Any], report: Report) -> Sweep:
    missing = [f"`{key}`" for key in ("model", "out", "seeds") if key not in values]
    if missing:
        report.add(Node(None), f"{', '.join(missing)} missing: a sweep is {FORM}, and `out:`")
    grid = dict(values.pop("grid", {}))
    if "recipe" in grid and values.get("recipe") is not None:
        report.add(Node(None), "`recipe` stands at the top and in `grid`: one of the two")
    if "recipe" not in grid and values.get("recipe") is None:
        report.add(Node(None), "no arm has a recipe: give `recipe` at the top, or a list of them in `grid`")
    report.raise_if_any()
    out, seeds = str(values.pop("out")), tuple(sorted(values.pop("seeds")))
    controls = Controls(**values.pop("controls", {}))
    return Sweep(values, out, seeds, grid, controls)


# --- checks ------------------------------------------------------------------------------------


def _seeds(node: Node, report: Report) -> Any:
    """A list of seeds, or their number: 5 is 0 … 4."""
    if not isinstance(node.value, list):
        count = integer("a list of seeds, or their number from 1", 1)(node, report)
        return BAD if count is BAD else tuple(range(count))
    found = some(integer("a seed, a whole number from 0", 0), "a seed")(node, report)
    if found is not BAD and len(set(found)) < len(found):
        return report.add(node, f"the same seed twice in {list(found)}")
    return found


def _grid(node: Node, report: Report) -> Any:
    """Key → the values that arms take."""
    if not isinstance(node.value, dict):
        return report.expected(node, "a mapping such as {recipe: [se, cbam], attn_lr: [1e-3, 1e-2]}")
    checkers = {key: row[0] for key, row in ARM.items()} | {"recipe": TOP["recipe"][0], "place": words}
    found = {}
    for key, (key_node, value) in node.value.items():
        if key in checkers:
            found[key] = _values(checkers[key], value, report.within(key))
        else:
            report.add(key_node, _unknown(key, checkers))
    return BAD if BAD in found.values() else found


def _values(check: Checker, node: Node, report: Report) -> Any:
    if not isinstance(node.value, list) or not node.value:
        return report.expected(node, "a list of values, one for each arm")
    values = [check(item, report) for item in node.value]
    if any(value is BAD for value in values):
        return BAD
    if any(value in values[:i] for i, value in enumerate(values)):
        return report.add(node, "the same value twice")
    return tuple(values)


def _unknown(key: str, known: Mapping[str, Any]) -> str:
    """Why a key cannot be in the grid."""
    if key in ("seed", "seeds"):
        return "seeds stand beside the grid, as `seeds: [0, 1, 2]`"
    if key in BUDGET or key in DATA or key in ("data", "model", "weights"):
        return (
            f"{quoted(key)} is the same in every arm, as budget, images and augmentation are: "
            f"make a sweep of its own for each value"
        )
    if key in (*MACHINE, "out"):
        return f"{quoted(key)} makes no arm; it stands with the common settings"
    hint = did_you_mean(key, known) or f"; known are {', '.join(sorted(known))}"
    return f"unknown key of the grid {quoted(key)}{hint}"


def _mapping_of(checkers: Mapping[str, Checker]) -> Checker:
    def check(node: Node, report: Report) -> Any:
        if not isinstance(node.value, dict):
            return report.expected(node, "a mapping")
        return checked_fields(node, checkers, "key", report)

    return check


def _no_seed(node: Node, report: Report) -> Any:
    return report.add(node, "a sweep has `seeds:` at the top, in place of one seed")


def _checkers() -> dict[str, Checker]:
    def rows(table: Mapping[str, Any]) -> dict[str, Checker]:
        return {key: row[0] for key, row in table.items()}

    controls = {
        "bottleneck": boolean,
        "random_sites": integer("a number of draws from 0", 0),
        "seed": integer("a seed from 0", 0),
    }
    return {
        **rows(TOP),
        "data": data_section,
        "train": _mapping_of({**rows(TRAIN), "seed": _no_seed}),
        "seeds": _seeds,
        "grid": _grid,
        "controls": _mapping_of(controls),
    }


_CHECKERS = _checkers()
