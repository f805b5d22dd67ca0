"""Every page says what is so: its code runs, its output is what was printed, its links lead somewhere.

`python tests/test_readme.py` runs what is quick and writes into the pages what it prints; read the diff.
`python tests/test_readme.py "attninject bench inject"` runs one measurement or table, which may take long.
"""

from __future__ import annotations

import importlib
import re
import shlex
import sys
import tomllib
from dataclasses import fields
from pathlib import Path

import pages
import pytest
from pages import PAGES, ROOT, Fence

FENCES = [fence for page in PAGES for fence in pages.fences(page)]
PARTS = [part for page in PAGES for part in pages.parts(page)]
PROGRAMS = {"accelerate", "attninject", "pdoc", "pip", "python", "torchrun"}


def at(fence: Fence) -> str:
    """A fence as a test's name."""
    return f"{fence.page}:{fence.line}"


def commands() -> list[tuple[str, list[str]]]:
    """The command lines of all pages, each with where it stands; what `&&` joins counts as two."""
    found = []
    for fence in FENCES:
        if fence.word == "sh":
            lines = [part for line in fence.text.splitlines() for part in line.split(" && ")]
            found += [(at(fence), words) for line in lines if (words := shlex.split(line, comments=True))]
    return found


# --- form --------------------------------------------------------------------------------------


def test_readme_is_short() -> None:
    """The first page is read in a few minutes."""
    assert len(pages.text_of("README.md").splitlines()) <= 200


@pytest.mark.parametrize("page", PAGES)
def test_page_has_one_title(page: str) -> None:
    """One heading of the first order, on the first line; generated parts bring none."""
    assert re.findall(r"^# .*$", pages.prose(page), re.M) == [pages.text_of(page).splitlines()[0]]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    """A relative link leads to a file of the checkout, and its anchor to a heading there."""
    for link in pages.links(page):
        if re.match(r"https?:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), f"{page}: {link}"
        assert not anchor or anchor in pages.anchors(str(target.resolve().relative_to(ROOT))), (
            f"{page}: {link}"
        )


@pytest.mark.parametrize("page", PAGES)
def test_files_named_in_a_page_are_there(page: str) -> None:
    """A Python file in backquotes is a file of the house, by its path from the top or from the package."""
    for name in re.findall(r"`((?:\w+/)+\w+\.(?:py|yaml))`", pages.prose(page)):
        homes = (ROOT, ROOT / "attninject", (ROOT / page).parent)
        assert any((home / name).is_file() for home in homes), f"{page}: {name}"


@pytest.mark.parametrize("page", [page for page in PAGES if not page.endswith("GRADIENTS.md")])
def test_code_stands_in_fences(page: str) -> None:
    """No page has indented code, which nothing would run; in GRADIENTS.md these are formulas."""
    assert re.findall(r"\n\n {4}\S.*", pages.prose(page)) == []


@pytest.mark.parametrize("fence", FENCES, ids=at)
def test_fence_is_run_or_says_why_not(fence: Fence) -> None:
    """Each fenced block is code that a test runs, output, a drawing, or tells why nothing runs it."""
    why = fence.mark.removeprefix("not run: ") if fence.mark.startswith("not run: ") else ""
    if fence.word == "text":
        assert fence.mark in ("output", "drawing") or why
    else:
        assert why or (fence.word in ("python", "yaml", "sh") and fence.mark == "")


# --- code --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def said() -> dict[str, list[str] | str]:
    """What the Python of every page printed, from a process of their own: they register blocks and places."""
    return pages.run_python()


@pytest.mark.parametrize("page", [p for p in PAGES if any(f.word == "python" for f in pages.fences(p))])
def test_python_of_a_page_runs_and_prints_what_it_shows(page: str, said: dict[str, list[str] | str]) -> None:
    """The page's Python runs from top to bottom without a warning; outputs are to the letter."""
    printed = said[page]
    assert not isinstance(printed, str), printed
    for fence, text in pages.outputs(page, printed):
        assert text.strip() == fence.text.strip(), at(fence)


@pytest.mark.parametrize("fence", [f for f in FENCES if f.word == "yaml" and not f.mark], ids=at)
def test_yaml_is_a_recipe_or_an_experiment(fence: Fence, tmp_path: Path) -> None:
    """The reader of recipes, of sweeps, or of experiment files, takes the text."""
    file = tmp_path / "text.yaml"
    file.write_text(fence.text, encoding="utf-8")
    if re.search(r"^rules:", fence.text, re.M):
        from attninject import load_recipe

        assert load_recipe(file).rules
    elif re.search(r"^seeds:", fence.text, re.M):
        from attninject.evidence.sweep_file import read_sweep

        assert read_sweep(file).seeds
    else:
        from attninject.training import read_experiment

        assert read_experiment(file).model


@pytest.mark.parametrize(("where", "words"), commands(), ids=[" ".join(words) for _, words in commands()])
def test_command_can_be_given(where: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The parser takes each `attninject` line, with and without what is in brackets; files given to Python exist."""
    if words == [".", ".venv/bin/activate"]:
        return
    assert words[0] in PROGRAMS, where
    if "attninject" in words and words[0] != "pdoc":
        _parse(words[words.index("attninject") + 1 :], monkeypatch)
    elif words[0] == "python" and words[1].endswith(".py"):
        assert (ROOT / words[1]).is_file(), where


def _parse(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from attninject import cli

    for file in (ROOT / "attninject" / "cli").glob("[a-z]*.py"):
        module = importlib.import_module(f"attninject.cli.{file.stem}")
        if hasattr(module, "run"):  # a verb: parsed, not carried out
            monkeypatch.setattr(module, "run", lambda args: None)
    choices = re.fullmatch(r"\[(.*)\]", arguments[-1])
    for last in choices[1].split("|") if choices else [arguments[-1]]:
        assert cli.main([*arguments[:-1], last]) == 0


def test_readme_says_what_ci_does() -> None:
    """The two commands of the README, to install and to test, are those of the CI script."""
    script, readme = (ROOT / ".ci" / "run").read_text(encoding="utf-8"), pages.text_of("README.md")
    for command in ('-e ".[test]"', "python -m pytest -n 2"):
        assert command in script
        assert command in readme


# --- generated parts -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "part", [p for p in PARTS if p.command.split()[1] in pages.QUICK], ids=lambda p: p.command
)
def test_generated_part_is_what_the_command_prints(part: pages.Part) -> None:
    """The part between the markers is the command's own output, to the letter."""
    assert part.shown.removeprefix("```text\n").removesuffix("\n```").strip() == pages.printed_by(
        part.command
    )


def test_every_measurement_and_table_has_a_page() -> None:
    """What `bench` and `zoo` print, and the table of blocks, stands on one page each, with a command that makes it."""
    shown = sorted(part.command for part in PARTS)
    assert shown == [
        "attninject bench blocks", "attninject bench digits", "attninject bench finetune",
        "attninject bench inject", "attninject bench models", "attninject list blocks --markdown",
        "attninject zoo --table runs/zoo",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "part", [p for p in PARTS if p.command.split()[1] not in pages.QUICK], ids=lambda p: p.command
)
def test_command_of_a_measurement_can_be_given(part: pages.Part, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parser takes the command that a measured part names, and the part brings no title of its own."""
    _parse(shlex.split(part.command)[1:], monkeypatch)
    assert not re.search(r"^##? ", part.shown, re.M)


def test_a_part_is_put_in_its_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The writer changes what is between a command's markers, and nothing else."""
    (tmp_path / "page.md").write_text("# T\n\n<!-- zoo: attninject zoo x -->\nold\n<!-- end zoo -->\nrest\n")
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    monkeypatch.setattr(pages, "PAGES", ["page.md"])
    monkeypatch.setattr(pages, "printed_by", lambda command: f"new from {command}")
    pages.regenerate_part("attninject zoo x")
    assert (tmp_path / "page.md").read_text() == (
        "# T\n\n<!-- zoo: attninject zoo x -->\nnew from attninject zoo x\n<!-- end zoo -->\nrest\n"
    )
    with pytest.raises(SystemExit, match="no page shows 'attninject zoo y'; they show attninject zoo x"):
        pages.regenerate_part("attninject zoo y")


# --- what the pages list -------------------------------------------------------------------------


def test_fields_of_a_rule_are_all_explained() -> None:
    """Every field of a rule is in the recipe reference, and no other."""
    from attninject.recipe.rules import Rule, written

    named = {
        name
        for cell in pages.table("recipes/README.md", "| field |")
        for name in re.findall(r"`(\w+)`", cell)
    }
    assert named == {written(f.name) for f in fields(Rule)}


def test_places_are_all_explained_and_drawn() -> None:
    """Every place of the library has a row and stands in a drawing, and no other has a row."""
    from attninject.anatomy.places import PLACES

    named = {
        name
        for cell in pages.table("recipes/README.md", "| place |")
        for name in re.findall(r"`(\w+)`", cell)
    }
    drawn = "".join(f.text for f in pages.fences("recipes/README.md") if f.mark == "drawing")
    assert named == {name for name in PLACES if PLACES[name].__module__ == "attninject.anatomy.places"}
    assert [name for name in named if name not in drawn] == []


def test_shipped_recipes_are_all_listed() -> None:
    """Every shipped recipe has its row, and no other."""
    cells = pages.table("recipes/README.md", "| recipe |")
    named = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}
    assert named == {file.stem for file in (ROOT / "recipes").glob("*.yaml")}


def test_examples_are_all_listed() -> None:
    """Every script has its row, and no other."""
    named = set(pages.table("examples/README.md", "| script |"))
    assert named == {file.name for file in (ROOT / "examples").glob("*.py")}


def test_house_map_shows_every_room_in_order() -> None:
    """The rooms of the map are those of the package, from the ground up."""
    from test_house import ORDER

    named = [cell.strip("`") for cell in pages.table("attninject/README.md", "| room |")]
    assert named == [room for room in ORDER if room != "__main__"]


def test_verbs_are_all_on_the_first_page() -> None:
    """The README has a line for every verb."""
    from attninject.cli import VERBS

    words = {words[words.index("attninject") + 1] for where, words in commands()
             if where.startswith("README.md") and words[0] == "attninject"}  # fmt: skip
    assert words == set(VERBS)


# --- elsewhere -----------------------------------------------------------------------------------


def test_api_pages_show_the_public_names_and_no_others(tmp_path: Path) -> None:
    """`pdoc`, as the README calls it, makes a section for each public name, with its signature."""
    pytest.importorskip("pdoc", reason="the extra `docs`")
    import subprocess

    import attninject

    line = next(words for _, words in commands() if words[0] == "pdoc")
    line = [str(tmp_path) if word == "build/api" else word for word in line[1:]]
    done = subprocess.run([sys.executable, "-m", "pdoc", *line], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for module, file in ((attninject, "attninject.html"), (attninject.training, "attninject/training.html")):
        text = (tmp_path / file).read_text(encoding="utf-8")
        assert sorted(re.findall(r'<section id="(\w+)">', text)) == sorted(module.__all__)
    section = (tmp_path / "attninject.html").read_text(encoding="utf-8").split('<section id="freeze">')[1]
    assert "model: torch.nn.modules.module.Module" in re.sub(r"<[^>]*>", "", section.split("</section>")[0])


def test_extras_of_the_readme_are_those_of_the_project() -> None:
    """The README names every optional dependency group."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
        "optional-dependencies"
    ]
    line = next(line for line in pages.text_of("README.md").splitlines() if line.startswith("The extras: "))
    assert set(re.findall(r"`(\w+)`", line)) == set(extras)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        pages.regenerate_part(sys.argv[1])
    else:
        pages.regenerate_outputs()
