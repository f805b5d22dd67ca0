"""The default tier on several versions of Python, torch and timm, each in an environment of its own.

    python tests/versions.py                       # all of VERSIONS, one after the other; hours
    python tests/versions.py "torch 2.8" --keep    # one, and its environment stays
    python tests/versions.py --table               # what is known, as a table

Environments and results lie in one folder (`--folder`, build/versions by default), so that a run that was stopped goes
on with what has no result for this state of the sources. An environment takes about 6 GB; without `--keep` it goes when
its tests are through. Interpreters are looked for on PATH; one that is missing is said in the table.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "tests" / "README.md"
BEGIN, END = "<!-- versions -->", "<!-- end versions -->"


@dataclass(frozen=True)
class Version:
    """What is installed in one environment; "" is the newest."""

    python: str
    torch: str
    torchvision: str
    timm: str

    @property
    def name(self) -> str:
        """As the command line and the folder call it."""
        return f"torch {self.torch or 'newest'}, timm {self.timm or 'newest'}, Python {self.python}"

    @property
    def packages(self) -> list[str]:
        """As pip wants them, with the project's own test extra."""
        wanted = {"torch": self.torch, "torchvision": self.torchvision, "timm": self.timm}
        return [
            f"{name}=={at}.*" if at.count(".") == 1 else f"{name}=={at}" if at else name
            for name, at in wanted.items()
        ]


VERSIONS = (
    Version("3.11", "2.6", "0.21", "1.0.15"),
    Version("3.12", "2.8", "0.23", "1.0.15"),
    Version("3.12", "2.9", "0.24", ""),
    Version("3.12", "2.11", "0.26", ""),
    Version("3.11", "", "", ""),
    Version("3.12", "", "", ""),
    Version("3.13", "", "", ""),
)


def interpreter(python: str) -> str | None:
    """The interpreter of this version that PATH has: this one, `python3.11` and the like, if it runs."""
    if python == f"{sys.version_info.major}.{sys.version_info.minor}":
        return sys.executable
    found = shutil.which(f"python{python}")
    asked = found and subprocess.run(  # pyenv's shims stand on PATH for versions that are not switched on
        [found, "-c", "import sys; print(sys.executable)"], capture_output=True, text=True
    )
    return asked.stdout.strip() if asked and asked.returncode == 0 else None


def environment(version: Version, folder: Path) -> Path:
    """The Python of an environment with these packages and the test extra, made if it is not there yet.

    Raises:
        RuntimeError: there is no such interpreter, or a package cannot be installed.
    """
    place = folder / re.sub(r"[^\w.]+", "-", version.name)
    python = place / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if (place / "complete").exists():
        return python
    found = interpreter(version.python)
    if found is None:
        raise RuntimeError(f"no python{version.python} that runs on PATH")
    if found == sys.executable:
        venv.create(place, with_pip=True, clear=True)
    else:
        subprocess.run([found, "-m", "venv", "--clear", str(place)], check=True)
    done = subprocess.run(
        [str(python), "-m", "pip", "install", "-q", "--no-cache-dir", *version.packages, f"{ROOT}[test]"],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        shutil.rmtree(place, ignore_errors=True)
        raise RuntimeError(f"not installed: {(done.stderr.strip().splitlines() or ['pip failed'])[-1]}")
    subprocess.run([str(python), "-m", "pip", "uninstall", "-q", "-y", "attninject"], check=True)
    (place / "complete").touch()
    return python


def state_of_sources() -> str:
    """A digest of all that the tests depend on."""
    sha = hashlib.sha256()
    for top in ("attninject", "tests", "recipes", "examples", "pyproject.toml"):
        files = sorted((ROOT / top).rglob("*")) if (ROOT / top).is_dir() else [ROOT / top]
        for file in files:
            if file.is_file() and file.suffix != ".pyc" and file != PAGE:
                sha.update(str(file.relative_to(ROOT)).encode() + file.read_bytes())
    return sha.hexdigest()[:16]


def run(python: Path, log: Path, more: list[str]) -> dict[str, object]:
    """The default tier with an environment's Python: pytest's last line, the failures, the versions that it met."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [str(python), "-m", "pytest", "-q", "--show-capture=no", "-p", "no:cacheprovider", *more]
    with log.open("w", encoding="utf-8") as stream:
        subprocess.run(command, cwd=ROOT, env=env, stdout=stream, stderr=subprocess.STDOUT)
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    counts = {
        what: int(n)
        for n, what in re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", lines[-1] if lines else "")
    }
    failed = [line.split(" - ")[0] for line in lines if line.startswith(("FAILED ", "ERROR "))]
    return {"counts": counts, "failed": failed, "versions": versions(python)}


def versions(python: Path) -> dict[str, str]:
    """What is installed there."""
    code = (
        "import json, platform, importlib.metadata as m\n"
        "names = ('torch', 'torchvision', 'timm')\n"
        "print(json.dumps({'python': platform.python_version(), **{n: m.version(n) for n in names}}))"
    )
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True)
    found: dict[str, str] = json.loads(done.stdout)
    return found


def table(results: dict[str, dict[str, object]]) -> str:
    """Results by name of a version, as a table."""
    lines = [
        "| Python | torch | torchvision | timm | passed | skipped | failed |",
        "|---|---|---|---|--:|--:|--:|",
    ]
    for version in VERSIONS:
        found = results.get(version.name)
        wanted = [
            version.python,
            *(v or "newest" for v in (version.torch, version.torchvision, version.timm)),
        ]
        if found is None or "missing" in found:
            why = "not run" if found is None else str(found["missing"])
            lines.append(f"| {' | '.join(wanted)} | {why} | | |")
            continue
        counts, met = found["counts"], found["versions"]
        assert isinstance(counts, dict)
        assert isinstance(met, dict)
        failed = counts.get("failed", 0) + counts.get("error", 0) + counts.get("errors", 0)
        names = " | ".join(str(met[n]).partition("+")[0] for n in ("python", "torch", "torchvision", "timm"))
        lines.append(f"| {names} | {counts.get('passed', 0):,} | {counts.get('skipped', 0)} | {failed} |")
    return "\n".join(lines)


def write_page(text: str) -> None:
    """The table on the page of the tests."""
    page = PAGE.read_text(encoding="utf-8")
    head, _, rest = page.partition(BEGIN)
    _, _, tail = rest.partition(END)
    PAGE.write_text(f"{head}{BEGIN}\n{text}\n{END}{tail}", encoding="utf-8")


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        description="The default tier on several versions of torch, timm and Python."
    )
    parser.add_argument("only", nargs="*", help="parts of the names of versions, as 'torch 2.8'; none: all")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "versions")
    parser.add_argument("--keep", action="store_true", help="leave the environments")
    parser.add_argument("--table", action="store_true", help="run nothing: print the table of what is known")
    parser.add_argument("--write", action="store_true", help="put the table on the page of the tests")
    parser.add_argument("--pytest", default="", help="more arguments for pytest, as '-n 2'")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    file = given.folder / "results.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    chosen = [v for v in VERSIONS if not given.only or any(part in v.name for part in given.only)]
    sources = state_of_sources()
    for version in () if given.table else chosen:
        if results.get(version.name, {}).get("sources") == sources:
            continue
        print(version.name, flush=True)
        try:
            python = environment(version, given.folder)
            found = run(
                python,
                given.folder / f"{version.torch or 'newest'}-{version.python}.log",
                given.pytest.split(),
            )
            if not given.keep:
                shutil.rmtree(python.parents[1])
        except RuntimeError as error:
            found = {"missing": str(error)}
        results[version.name] = {"sources": sources, **found}
        file.write_text(json.dumps(results, indent=1))
        print(
            "\n".join(
                f"  {line}"
                for line in found.get("failed", ()) or [str(found.get("missing", found.get("counts")))]
            )
        )
    print(table(results))
    if given.write:
        write_page(table(results))
    return int(any(results.get(v.name, {}).get("failed") for v in chosen))


if __name__ == "__main__":
    sys.exit(main())
