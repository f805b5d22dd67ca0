"""The pages of the documentation, read apart: fences, generated parts, links, headings.

A fence is one of these, told by its word and by the comment above it:

    ```python                    run, all of a page in order, in one namespace and a folder of its own
    ```yaml                      read as a recipe (it has `rules`), a sweep (`seeds`) or an experiment (`model`)
    ```sh                        its `attninject` lines are parsed, files that it names must be there
    <!-- output --> ```text      what the python fence before it prints
    <!-- drawing --> ```text     a drawing
    <!-- not run: why --> ```…   anything else, with the reason

A generated part stands between `<!-- name: attninject … -->` and `<!-- end name -->`, and is what that command prints.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    str(file.relative_to(ROOT))
    for folder in (".", "attninject", "examples", "recipes", "tests")
    for file in ((ROOT / folder).glob("*.md") if folder == "." else (ROOT / folder).rglob("*.md"))
)
QUICK = ("list", "plan")  # verbs whose printed text the tests compare; the others measure, or sweep

_FENCE = re.compile(r"(?:^<!-- (?P<mark>[^\n]*?) -->\n+)?^```(?P<word>\w*)\n(?P<text>.*?)^```$", re.M | re.S)
_PART = re.compile(r"<!-- (\w+): (attninject .*?) -->\n(.*?)\n<!-- end \1 -->", re.S)


@dataclass(frozen=True)
class Fence:
    """One fenced block of a page."""

    page: str
    line: int
    word: str  # python, yaml, sh, text
    mark: str  # what the comment above it says, or ""
    text: str
    span: tuple[int, int]  # of the text, in characters of the page


@dataclass(frozen=True)
class Part:
    """One generated part: the command, and what the page shows for it."""

    page: str
    command: str
    shown: str
    span: tuple[int, int]


def text_of(page: str) -> str:
    """A page as it stands."""
    return (ROOT / page).read_text(encoding="utf-8")


def parts(page: str) -> list[Part]:
    """The generated parts of a page, in order."""
    return [Part(page, found[2], found[3], found.span(3)) for found in _PART.finditer(text_of(page))]


def fences(page: str) -> list[Fence]:
    """The fenced blocks of a page that are not in a generated part, in order."""
    text, made = text_of(page), [part.span for part in parts(page)]
    return [
        Fence(
            page,
            text.count("\n", 0, found.start("text")),
            found["word"],
            found["mark"] or "",
            found["text"],
            found.span("text"),
        )
        for found in _FENCE.finditer(text)
        if not any(start <= found.start("text") <= end for start, end in made)
    ]


def prose(page: str) -> str:
    """A page without its fences."""
    return _FENCE.sub("", text_of(page))


def table(page: str, head: str) -> list[str]:
    """The first cells of the table that begins with `head`, without their backquotes and links."""
    rows = text_of(page).split(head)[1].split("\n\n")[0].splitlines()[2:]
    return [re.sub(r"\[(.*?)\]\(.*?\)", r"\1", row.split("|")[1]).strip() for row in rows]


def links(page: str) -> Iterator[str]:
    """Where the links of a page lead."""
    for found in re.finditer(r"\]\(([^)\s]+)\)", prose(page)):
        yield found[1]


def anchors(page: str) -> set[str]:
    """The anchors that the headings of a page make."""
    heads = re.findall(r"^#+ (.*)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


# --- running -----------------------------------------------------------------------------------


def environment() -> dict[str, str]:
    """Of a process that imports this checkout, and prints wide tables."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, "COLUMNS": "200"}


def printed_by(command: str) -> str:
    """What `attninject …` prints, in a process of its own, which knows no block but the built-in ones."""
    arguments = [sys.executable, "-m", *shlex.split(command)]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=ROOT, env=environment())
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


_DRIVER = """
import contextlib, io, json, os, sys, tempfile, traceback
results = {}
for page, code in json.load(sys.stdin).items():
    said, names, out = [], {"__name__": "page"}, io.StringIO()
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), contextlib.redirect_stdout(out):
        try:
            for line, text in code:
                exec(compile("\\n" * line + text, page, "exec"), names)
                said.append(out.getvalue())
                out.seek(0), out.truncate()
            results[page] = said
        except BaseException:
            results[page] = traceback.format_exc()
json.dump(results, sys.stdout)
"""


def run_python() -> dict[str, list[str] | str]:
    """Run the python fences of every page in order, each page in a namespace and a folder of its own.

    Warnings are errors. Page → what each fence printed, or the traceback. One process serves all, since importing
    torch takes longer than what most pages do.
    """
    code = {
        page: [(f.line, f.text) for f in fences(page) if f.word == "python" and not f.mark] for page in PAGES
    }
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", _DRIVER],
        input=json.dumps({page: found for page, found in code.items() if found}),
        capture_output=True,
        text=True,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def outputs(page: str, said: list[str]) -> Iterator[tuple[Fence, str]]:
    """Each output fence of a page with what the python fence before it printed."""
    number = -1
    for fence in fences(page):
        if fence.word == "python" and not fence.mark:
            number += 1
        elif fence.mark == "output":
            yield fence, said[number]


# --- writing -----------------------------------------------------------------------------------


def rewrite(page: str, pieces: list[tuple[tuple[int, int], str]]) -> None:
    """Put new texts in the place of spans of a page."""
    text = text_of(page)
    for (start, end), new in sorted(pieces, reverse=True):
        text = text[:start] + new + text[end:]
    (ROOT / page).write_text(text, encoding="utf-8")


def regenerate_outputs() -> None:
    """Run what is quick on every page, and write what it printed there."""
    for page, said in run_python().items():
        if isinstance(said, str):
            raise SystemExit(said)
        rewrite(page, [(fence.span, f"{text.strip()}\n") for fence, text in outputs(page, said)])
    for command in {part.command for page in PAGES for part in parts(page)}:
        if command.split()[1] in QUICK:
            regenerate_part(command)


def regenerate_part(command: str) -> None:
    """Run one command, however long it takes, and write what it printed wherever a page shows it."""
    known = {part.command for page in PAGES for part in parts(page)}
    if command not in known:
        raise SystemExit(f"no page shows {command!r}; they show {', '.join(sorted(known))}")
    printed = printed_by(command)
    for page in PAGES:
        rewrite(page, [(part.span, printed) for part in parts(page) if part.command == command])
