"""From a sweep's file to its design: arms with their controls, times seeds, each a run with a folder of its own."""

from __future__ import annotations

import itertools
import json
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from attninject import api
from attninject.errors import ExperimentError, Fault, PlanError, RunError
from attninject.files import installed_versions, replacing
from attninject.observe.snapshot import rng_kept
from attninject.planning.plan import Plan
from attninject.recipe.frozen import FrozenDict
from attninject.recipe.loading import load_recipe
from attninject.recipe.rules import Recipe
from attninject.training.building import build
from attninject.training.data.opening import open_images
from attninject.training.experiment import Experiment, read_experiment

from .sweep_controls import bottlenecks, random_sites
from .sweep_file import OF_BLOCKS, Sweep

DESIGN = "sweep.json"
FORMAT = 1
PLAIN, ATTENTION, BOTTLENECK, RANDOM = "plain", "attention", "bottleneck", "random sites"
DEVICES = {"CON", "PRN", "AUX", "NUL", *(f"{kind}{n}" for kind in ("COM", "LPT") for n in range(10))}
"""What Windows does not let be a file."""
LONGEST = 200  # bytes
PACKAGES = ("attninject", "torch", "torchvision", "timm", "numpy")


@dataclass(frozen=True)
class Arm:
    """One way of training, over all seeds.

    Attributes:
        name: in tables; the folder's is made of it.
        kind: `plain`, `attention`, or a control: `bottleneck`, `random sites`.
        settings: of `train`, in place of the common ones.
        recipe: as in a YAML file; None: plain fine-tuning.
        plain: name of the arm that differs from this one by having no blocks; None: this is it.
        of: of a control, the attention arm that it is of.
        parameters: of the blocks.
        macs: multiply-accumulates of the blocks for one image.
        sites: where the blocks stand.
    """

    name: str
    kind: str
    settings: Mapping[str, Any]
    recipe: Mapping[str, Any] | None = None
    plain: str | None = None
    of: str | None = None
    parameters: int = 0
    macs: int = 0
    sites: tuple[str, ...] = ()

    @property
    def slug(self) -> str:
        """The name as a folder on any system: a long one cut and numbered, none a device of Windows or a dot."""
        text = re.sub(r"[^\w.=+-]+", "_", self.name).rstrip(".") or "_"
        text = f"_{text}" if text.partition(".")[0].upper() in DEVICES else text
        return text if len(text.encode()) <= LONGEST else f"{text[:60]}_{zlib.crc32(text.encode()):08x}"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**asdict(self), "sites": list(self.sites)}


@dataclass(frozen=True)
class Run:
    """One arm with one seed."""

    arm: Arm
    seed: int
    folder: Path
    experiment: Experiment


@dataclass(frozen=True)
class Design:
    """Arms times seeds, fixed before the first run."""

    common: Mapping[str, Any]
    out: Path
    seeds: tuple[int, ...]
    arms: tuple[Arm, ...]
    notes: tuple[str, ...] = ()

    def runs(self) -> Iterator[Run]:
        """Every run, seed by seed, so that an interrupted sweep has whole pairs."""
        for seed in self.seeds:
            for arm in self.arms:
                folder = self.out / arm.slug / f"seed-{seed}"
                yield Run(arm, seed, folder, _experiment(self.common, arm, seed, folder))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "format": FORMAT, "common": plain_data(self.common), "seeds": list(self.seeds),
            "arms": plain_data([arm.to_dict() for arm in self.arms]), "notes": list(self.notes),
        }  # fmt: skip

    @staticmethod
    def of(data: Mapping[str, Any], out: Path) -> Design:
        """The inverse of `to_dict`."""
        arms = tuple(Arm(**{**arm, "sites": tuple(arm["sites"])}) for arm in data["arms"])
        return Design(data["common"], out, tuple(data["seeds"]), arms, tuple(data["notes"]))


def _experiment(common: Mapping[str, Any], arm: Arm, seed: int, folder: Path) -> Experiment:
    train = {**common.get("train", {}), **arm.settings, "seed": seed}
    given = {**common, "recipe": arm.recipe, "out": str(folder), "train": train}
    return read_experiment(None, given)


def plain_data(value: Any) -> Any:
    """The same in dicts and lists, as JSON has them."""
    if isinstance(value, Mapping):
        return {key: plain_data(item) for key, item in value.items()}
    return [plain_data(item) for item in value] if isinstance(value, tuple | list) else value


# --- making it ---------------------------------------------------------------------------------


def design(sweep: Sweep) -> Design:
    """Every arm with its controls, planned on the model itself; nothing is trained or written.

    Raises:
        ExperimentError: settings that forbid one another, or two arms of one name.
        RecipeError, PlanError: a recipe is faulty, or cannot be carried out on the model.
        DataError: the images cannot be had.
    """
    common = plain_data({key: value for key, value in sweep.common.items() if key != "recipe"})
    first = _experiment(common, Arm("", PLAIN, {}), sweep.seeds[0], Path(sweep.out))
    if first.data.kind == "multilabel":
        raise ExperimentError([Fault("data: a sweep compares top-1, of images of one class each")])
    with rng_kept():
        torch.manual_seed(sweep.seeds[0])
        classes = len(open_images(first.data).classes)
        model = build(first.model, first.weights, classes)
        notes: list[str] = []
        arms = [arm for point in _points(sweep) for arm in _of_point(model, point, sweep, notes)]
    unique = list({arm.name: arm for arm in arms if arm.kind == PLAIN}.values())
    unique += [arm for arm in arms if arm.kind != PLAIN]
    _refuse_twins(unique)
    return Design(common, Path(sweep.out), sweep.seeds, tuple(unique), tuple(notes))


def _points(sweep: Sweep) -> Iterator[dict[str, Any]]:
    """The combinations of the grid's values."""
    grid = dict(sweep.grid)
    grid.setdefault("recipe", (sweep.common.get("recipe"),))
    for values in itertools.product(*grid.values()):
        yield dict(zip(grid, values, strict=True))


def _of_point(model: nn.Module, point: Mapping[str, Any], sweep: Sweep, notes: list[str]) -> Iterator[Arm]:
    """Plain fine-tuning, the arm, and its controls."""
    shared = {key: value for key, value in point.items() if key not in OF_BLOCKS}
    plain = Arm(" ".join([PLAIN, *_said(shared)]), PLAIN, plain_data(shared))
    yield plain
    if point["recipe"] is None:
        return
    recipe = _at_place(load_recipe(point["recipe"]), point.get("place"))
    settings = plain_data({k: v for k, v in point.items() if k not in ("recipe", "place")})
    plan = api.plan(model, recipe)
    name = " ".join([_name(point, recipe), *_said(settings)])
    arm = _arm(Arm(name, ATTENTION, settings, plain=plain.name), plan)
    yield arm
    yield from _controls(model, plan, arm, sweep, notes)


def _controls(model: nn.Module, plan: Plan, arm: Arm, sweep: Sweep, notes: list[str]) -> Iterator[Arm]:
    def control(kind: str, number: str, made: Recipe) -> Arm:
        bare = Arm(f"{kind}{number} of {arm.name}", kind, arm.settings, plain=arm.plain, of=arm.name)
        return _arm(bare, api.plan(model, made))

    if sweep.controls.bottleneck:
        found = control(BOTTLENECK, "", bottlenecks(plan))
        if abs(found.parameters - arm.parameters) > 0.1 * arm.parameters:
            notes.append(
                f"{found.name} has {found.parameters:,} parameters, {arm.name} {arm.parameters:,}: "
                f"no width of a bottleneck comes nearer"
            )
        yield found
    for draw in range(1, sweep.controls.random_sites + 1):
        try:
            yield control(RANDOM, f" {draw}", random_sites(model, plan, sweep.controls.seed, draw))
        except PlanError as error:
            notes.append(f"{arm.name} has no control at random sites: {error}")
            break


def _arm(arm: Arm, plan: Plan) -> Arm:
    """The arm with what its plan says."""
    where = tuple(site.where for site in plan.sites)
    recipe = plain_data(plan.recipe.to_dict())
    return replace(arm, recipe=recipe, parameters=plan.parameters, macs=plan.macs, sites=where)


def _at_place(recipe: Recipe, place: str | None) -> Recipe:
    """The recipe with every rule at another place."""
    if place is None:
        return recipe
    rules = tuple(
        replace(r, place=place, after=None, before=None, replace=None, input=None, output=None, call=None)
        for r in recipe.rules
    )
    checked = load_recipe(replace(recipe, rules=rules).to_dict())  # an unknown place is said as in a recipe
    return checked


def _name(point: Mapping[str, Any], recipe: Recipe) -> str:
    """A recipe's own name; of a single rule, its block; and the place."""
    given = point["recipe"]
    place = point.get("place")
    if place is None and isinstance(given, Mapping) and "rules" not in given:
        rule = recipe.rules[0]
        place = rule.place or ",".join(map(str, rule.after or rule.before or rule.replace or ()))
    return f"{recipe.name} at {place}" if place else recipe.name


def _said(settings: Mapping[str, Any]) -> list[str]:
    return [f"{key}={_shown(value)}" for key, value in settings.items()]


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple | list):
        return "+".join(map(_shown, value))
    return str(dict(value)) if isinstance(value, FrozenDict) else str(value)


def _refuse_twins(arms: list[Arm]) -> None:
    names = [arm.slug.casefold() for arm in arms]  # one folder on systems that know no case
    twins = [arm.name for arm in arms if names.count(arm.slug.casefold()) > 1]
    if twins:
        raise ExperimentError([Fault(f"two arms are called {twins[0]!r}: give their recipes a `name`")])


# --- keeping it --------------------------------------------------------------------------------


def keep(made: Design, command: str) -> Design:
    """Write the design into its folder; one that is there already may only grow, by arms and seeds.

    What was begun stays in the design, so that nothing is left out of the report after its result was seen.

    Raises:
        RunError: the folder holds a sweep with other settings, or with arms or seeds that are gone now.
    """
    then = read(made.out) if (made.out / DESIGN).exists() else None
    if then is not None:
        _compare(then, made)
    made.out.mkdir(parents=True, exist_ok=True)
    data = {**made.to_dict(), "command": command, "versions": installed_versions(PACKAGES)}
    with replacing(made.out / DESIGN) as temporary:
        temporary.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return made


def read(folder: Path) -> Design:
    """The design in a folder.

    Raises:
        RunError: there is none, or it is damaged.
    """
    return Design.of(read_raw(folder), folder)


def read_raw(folder: Path) -> dict[str, Any]:
    """The design's file as it is, with command and versions."""
    path = folder / DESIGN
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["format"] != FORMAT:
            raise RunError(f"{path} is of another version of attninject (format {data['format']})")
        Design.of(data, folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} is missing or damaged ({error})") from error
    found: dict[str, Any] = data
    return found


def _compare(then: Design, now: Design) -> None:
    old, new = then.to_dict(), now.to_dict()
    other = "take another `out`, or put it back: a sweep in a folder may only grow, by arms and by seeds"
    for part in ("model", "weights", "data", "train"):
        if old["common"].get(part) != new["common"].get(part):
            raise RunError(
                f"{then.out} holds a sweep with other settings ({part}: {old['common'].get(part)} then, "
                f"{new['common'].get(part)} now); {other}"
            )
    arms = {arm["name"]: arm for arm in new["arms"]}
    for arm in old["arms"]:
        if arms.get(arm["name"]) != arm:
            how = "is another now" if arm["name"] in arms else "is gone from the file"
            raise RunError(f"the arm {arm['name']!r} of the sweep in {then.out} {how}; {other}")
    gone = [seed for seed in then.seeds if seed not in now.seeds]
    if gone:
        raise RunError(f"the seeds {gone} of the sweep in {then.out} are gone from the file; {other}")
