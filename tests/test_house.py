"""The house itself: who imports whom, what the wheel holds, what lies at the top of the checkout."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "attninject"

# From the ground up: a module imports only what stands before it (or beside it, in its own room).
ORDER = (
    "errors", "terms", "wording", "plugins", "doctor", "files", "notebook", "layout", "blocks", "observe", "surgery",
    "anatomy", "recipe", "planning", "api", "switching", "compiling", "attention", "inspection", "adapters", "hub",
    "site_rules", "delta_file", "delta",
    "integrations", "package_weights", "models", "training", "sharing", "evidence", "zoo", "bench", "cli", "__main__",
)  # fmt: skip

TOP = {
    ".ci", ".gitignore", "CHANGELOG.md", "LICENSE", "README.md", "attninject", "examples",
    "pyproject.toml", "recipes", "tests",
}  # fmt: skip


def room(file: Path) -> str:
    """The room that a file of the package belongs to."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_names(source: str, package: tuple[str, ...]) -> set[str]:
    """Full names that a source text imports: at the top, inside functions, for type checkers, relative or not."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join((*above, *(node.module or "").split("."))).strip(".")
            names = [f"{base}.{alias.name}" for alias in node.names]
        found.update(names)
    return found


def imported_rooms(source: str, package: tuple[str, ...]) -> set[str]:
    """Rooms of attninject that a source text imports."""
    names = (name.split(".") for name in imported_names(source, package))
    return {"".join(name[1:2]) for name in names if name[0] == "attninject"}


def imports_of(sources: dict[str, str]) -> dict[str, set[str]]:
    """Which modules each imports, by the longest name that is one; sources by path (`attninject/api.py`)."""
    modules = {path.removesuffix(".py").removesuffix("/__init__").replace("/", "."): path for path in sources}
    found: dict[str, set[str]] = {}
    for module, path in modules.items():
        parts = tuple(path.split("/")[:-1])
        others = set()
        for name in imported_names(sources[path], parts):
            while name and name not in modules:
                name = name.rpartition(".")[0]
            others.add(name)
        found[module] = others - {module, ""}
    return found


def circles(imports: dict[str, set[str]]) -> list[list[str]]:
    """Modules that import one another by whatever way round, a list for each ring."""
    reached = {module: set(others) for module, others in imports.items()}
    for between in reached:
        for others in reached.values():
            if between in others:
                others |= reached[between]
    rings = {tuple(sorted(o for o in reached[m] if m in reached[o])) for m in reached if m in reached[m]}
    return [list(ring) for ring in sorted(rings)]


def python(*args: str, cwd: Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run this Python elsewhere, with `path` in front of everything installed."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if path is not None:
        env["PYTHONPATH"] = str(path)
    return subprocess.run([sys.executable, *args], cwd=cwd, env=env, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("source", "rooms"),
    [
        ("import attninject.api", {"api"}),
        ("from attninject import api, delta", {"api", "delta"}),
        ("from attninject.blocks.se import SE", {"blocks"}),
        ("def f():\n    from ..api import plan", {"api"}),
        ("from . import common", {"cli"}),
        ("import torch, attninjectors", set()),
    ],
)
def test_reader_of_imports(source: str, rooms: set[str]) -> None:
    """The reader behind the next test sees every way to import a room."""
    assert imported_rooms(source, ("attninject", "cli")) == rooms


def test_imports_go_up_the_list_never_down() -> None:
    """Every module imports only rooms that stand before its own in ARCHITECTURE's order."""
    wrong = []
    files = [file for file in PACKAGE.rglob("*.py") if file != PACKAGE / "__init__.py"]
    for file in files:
        assert room(file) in ORDER, f"{file.relative_to(ROOT)} is in no room of the house"
        parts = ("attninject", *file.relative_to(PACKAGE).parts[:-1])
        for other in imported_rooms(file.read_text(encoding="utf-8"), parts):
            if other == "__version__":
                continue
            if other not in ORDER or ORDER.index(other) > ORDER.index(room(file)):
                wrong.append(f"{file.relative_to(ROOT)} imports {other or 'attninject itself'}")
    assert wrong == []
    assert len(files) > 10


@pytest.mark.parametrize(
    ("sources", "found"),
    [
        ({"a/x.py": "from . import y", "a/y.py": "import os"}, []),
        ({"a/x.py": "from . import y", "a/y.py": "def f():\n    from a.x import g"}, [["a.x", "a.y"]]),
        ({"a/x.py": "import a.y", "a/y.py": "if TYPE_CHECKING:\n    from .x import X"}, [["a.x", "a.y"]]),
        (
            {"a/x.py": "from .b import f", "a/b/__init__.py": "from . import z", "a/b/z.py": "from .. import x"},
            [["a.b", "a.b.z", "a.x"]],
        ),
    ],
)  # fmt: skip
def test_reader_of_circles(sources: dict[str, str], found: list[list[str]]) -> None:
    """The reader behind the next test sees rings of two and of three, inside functions and for type checkers."""
    assert circles(imports_of(sources)) == found


def test_no_two_modules_import_each_other() -> None:
    """Imports go one way between files too, inside a room as between rooms, those for type checkers among them."""
    files = [file for file in PACKAGE.rglob("*.py") if file != PACKAGE / "__init__.py"]
    sources = {file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8") for file in files}
    assert circles(imports_of(sources)) == []


def test_timm_and_torchvision_builders_are_imported_in_one_file_only() -> None:
    """`timm.create_model` and torchvision's model registry are used in models.py alone."""
    users = {
        file.name
        for file in PACKAGE.rglob("*.py")
        if re.search(
            r"timm\.create_model\(|models\.get_model\(|list_models\(", file.read_text(encoding="utf-8")
        )
    }
    assert users == {"models.py"}


def test_no_module_bears_the_name_of_a_public_function() -> None:
    """`attninject.plan` stays a function, whatever was imported before."""
    import attninject

    modules = {file.name.removesuffix(".py") for file in PACKAGE.iterdir()}
    assert modules & set(attninject.__all__) == set()
    assert {"plan", "inject", "eject", "save", "load"} <= set(attninject.__all__)


def test_importing_the_package_is_light() -> None:
    """`import attninject` loads none of the libraries that only some verbs need."""
    heavy = ("timm", "torchvision", "yaml", "safetensors", "sklearn", "tqdm", "torch._dynamo", "torch.onnx")
    done = python("-c", "import sys, attninject; print(*sys.modules, sep='\\n')", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    loaded = done.stdout.split()
    assert "attninject" in loaded
    assert [name for name in heavy if name in loaded] == []


def test_top_level_holds_exactly_what_it_should() -> None:
    """Nothing lies at the top of the checkout but what belongs there."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listing.returncode:
        pytest.skip("no git checkout")
    assert {line.split("/", 1)[0] for line in listing.stdout.splitlines()} == TOP


def test_ci_script_can_be_run() -> None:
    """The one command of CI is executable."""
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_changelog_and_citation_speak_of_this_version() -> None:
    """The version has a section in the changelog, of the year in which the first page has it cited."""
    from attninject import __version__

    dates = re.findall(
        rf"^## {re.escape(__version__)} \((\d{{4}})-\d\d-\d\d\)$",
        (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"),
        re.M,
    )
    assert len(dates) == 1
    assert f"version {__version__}, {dates[0]}" in (ROOT / "README.md").read_text(encoding="utf-8")


def overdue(source: str, version: str) -> list[str]:
    """What is wrong about the `@deprecated("…")` of a module: no way out named, or a version that has come."""
    wrong = []
    for node in ast.walk(ast.parse(source)):
        for call in getattr(node, "decorator_list", ()):
            if isinstance(call, ast.Call) and ast.unparse(call.func).endswith("deprecated"):
                text = str(ast.literal_eval(call.args[0]))
                said = re.fullmatch(r"use .+; gone in (\d+)\.(\d+)", text)
                if not said or [int(n) for n in said.groups()] <= [int(n) for n in version.split(".")[:2]]:
                    wrong.append(text)
    return wrong


@pytest.mark.parametrize(
    ("decorator", "found"),
    [
        ('@deprecated("use ai.plan; gone in 0.4")', []),
        ('@typing_extensions.deprecated("use ai.plan; gone in 0.2")', ["use ai.plan; gone in 0.2"]),
        ('@deprecated("gone soon")', ["gone soon"]),
        ("@cache", []),
    ],
)
def test_reader_of_deprecations(decorator: str, found: list[str]) -> None:
    """The reader behind the next test takes a name that is to go, with what to use and a later version, and no other."""
    assert overdue(f"{decorator}\ndef old(): ...", "0.2.0") == found


def test_what_is_deprecated_says_what_to_use_and_goes_in_time() -> None:
    """A public name that is to go carries `typing_extensions.deprecated`; it is gone in the version that it names."""
    from attninject import __version__

    for file in PACKAGE.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        assert "deprecated(" not in text or overdue(text, __version__) == [], file.relative_to(ROOT)


def test_recipes_are_found_from_a_checkout(tmp_path: Path) -> None:
    """From the checkout, `attninject list recipes` names the files in recipes/."""
    done = python("-m", "attninject", "list", "recipes", cwd=tmp_path, path=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == sorted(file.stem for file in (ROOT / "recipes").glob("*.yaml"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built wheel."""
    folder = tmp_path_factory.mktemp("dist")
    done = python("-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT), cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(folder.glob("*.whl"))


def test_wheel_installed_elsewhere_finds_its_recipes(wheel: Path, tmp_path: Path) -> None:
    """The installed wheel, run outside the checkout, lists the same recipes and can plan with one."""
    target = tmp_path / "site"
    done = python(
        "-m", "pip", "install", "--no-deps", "--no-index", "--target", str(target), str(wheel), cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    where = python("-c", "import attninject; print(attninject.__file__)", cwd=tmp_path, path=target)
    assert Path(where.stdout.strip()).is_relative_to(target), where.stdout + where.stderr
    listed = python("-m", "attninject", "list", "recipes", cwd=tmp_path, path=target)
    assert listed.stdout.split() == sorted(file.stem for file in (ROOT / "recipes").glob("*.yaml")), (
        listed.stderr
    )
    planned = python(
        "-m", "attninject", "plan", "torchvision/resnet18", "se_resnet", cwd=tmp_path, path=target
    )
    assert planned.returncode == 0, planned.stderr


def test_wheel_holds_types_and_licence_and_no_tests(wheel: Path) -> None:
    """The wheel carries `py.typed` and the licence; tests and examples stay in the checkout."""
    names = zipfile.ZipFile(wheel).namelist()
    assert wheel.stat().st_size < 1_000_000
    assert "attninject/py.typed" in names
    assert any(name.endswith("dist-info/licenses/LICENSE") for name in names)
    assert {name.split("/", 1)[0].split("-")[0] for name in names} == {"attninject"}
    assert not any("tests" in name.split("/") or "examples" in name.split("/") for name in names)


def test_description_of_the_wheel_links_nowhere_relative(wheel: Path) -> None:
    """A package index shows the README alone: no link of the description needs the checkout, and no page is lost."""
    with zipfile.ZipFile(wheel) as file:
        name = next(name for name in file.namelist() if name.endswith("dist-info/METADATA"))
        text = file.read(name).decode("utf-8")
    assert "Description-Content-Type: text/markdown" in text
    assert "recipes/README.md" in text
    assert [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match("https?:|#", link)] == []


def test_licence_is_the_full_apache_text() -> None:
    """LICENSE is Apache-2.0, whole."""
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
