"""What answers at once: help, names and wrong words need neither torch nor what is built on it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from attninject.cli import VERBS

ROOT = Path(__file__).resolve().parents[2]
HEAVY = {"torch", "timm", "torchvision", "numpy", "accelerate", "safetensors"}

QUICK = [
    ["--version"],
    ["--help"],
    *([verb, "--help"] for verb in VERBS),
    ["list", "recipes"],
    ["list", "places", "*_end"],
    ["list", "recipes", "--json"],
    ["list", "places", "--json"],
    [],
    ["plna"],
    ["--versoin"],
    *([verb, "--no-such-flag"] for verb in VERBS),
    ["plan", "torchvision/resnet18"],
    ["plan", "torchvision/resnet18", "--block", "se"],
    ["plan", "torchvision/resnet18", "se", "--place", "stage_end"],
    ["finetune", "--recipe", "se", "--block", "se"],
    ["zoo", "timm/resnet18", "--place", "nowhere"],
]

SCRIPT = """
import contextlib, io, json, sys
from attninject.cli import main
found = []
for argv in json.loads(sys.argv[1]):
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            code = main(argv)
        except SystemExit as stop:
            code = stop.code
    found.append([code, said.getvalue(), sorted({name.partition(".")[0] for name in sys.modules})])
print(json.dumps(found))
"""


def python(*arguments: str) -> str:
    """What a fresh Python prints."""
    done = subprocess.run([sys.executable, "-c", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def answers() -> dict[str, tuple[int, str, set[str]]]:
    """Exit code, text and loaded packages after each of `QUICK`, one after another in one fresh process."""
    rows = json.loads(python(SCRIPT, json.dumps(QUICK)))
    return {" ".join(argv): (row[0], row[1], set(row[2])) for argv, row in zip(QUICK, rows, strict=True)}


@pytest.mark.parametrize("argv", QUICK, ids=" ".join)
def test_what_needs_no_model_loads_no_torch(argv: list[str], answers) -> None:
    """Help of every verb, version, names of recipes and places, and usage errors come without the heavy packages."""
    code, text, loaded = answers[" ".join(argv)]
    assert loaded & HEAVY == set()
    asked = "--help" in argv or "--version" in argv or (argv[:1] == ["list"] and "--no-such-flag" not in argv)
    assert code == (0 if asked else 2)
    assert text


def test_a_verb_loads_its_own_file_only() -> None:
    """`attninject list` does not build the other verbs."""
    loaded = python(
        "import sys; from attninject.cli import main; main(['list', 'places']); print(*sys.modules, sep=chr(10))"
    ).split()
    of_cli = {name.removeprefix("attninject.cli.") for name in loaded if name.startswith("attninject.cli.")}
    assert of_cli == {"listing", "common", "usage"}


def test_every_verb_has_a_file_of_its_own() -> None:
    """A verb is found by its name; only `list` cannot bear it, a module `list` would hide the builtin."""
    files = {file.stem for file in (ROOT / "attninject" / "cli").glob("*.py")}
    shared = {"__init__", "usage", "common", "rule_flags"}
    assert files - shared == {"listing" if verb == "list" else verb for verb in VERBS}


def test_text_rooms_import_without_torch() -> None:
    """Recipes, places, layouts, errors, settings and the package itself are read without torch, every file of them."""
    room = ROOT / "attninject" / "recipe"
    names = [f"recipe.{file.stem}" for file in room.glob("*.py") if file.stem != "__init__"]
    names += ["errors", "wording", "layout", "anatomy.places", "training.experiment"]
    assert len(names) > 12
    lines = ["import sys, attninject", *(f"import attninject.{name}" for name in names)]
    loaded = python("\n".join([*lines, "print(*sys.modules, sep=chr(10))"])).split()
    assert {name.partition(".")[0] for name in loaded} & HEAVY == set()
