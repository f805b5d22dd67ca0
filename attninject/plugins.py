"""Python files that register blocks and places of your own for the command line: `--plugin FILE`.

Never from a recipe, a delta or a run: those name the plugins that they were made with, and only you can load one.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Iterable, Iterator
from importlib.machinery import SourceFileLoader
from pathlib import Path

from attninject.errors import Fault, PluginError, RecipeError
from attninject.wording import clipped, first_line

VARIABLE = "ATTNINJECT_PLUGINS"
"""Tells the processes that this one starts which plugins to load."""
RECORD = "plugins.txt"
"""The file in a run's folder that names its plugins."""

_loaded: list[Path] = []


def load(file: str | os.PathLike[str]) -> None:
    """Run a plugin in this process, once; the processes that it starts will run it too.

    Raises:
        PluginError: there is no such file, or what it raised, with its line.
    """
    path = Path(file).resolve()
    if path in _loaded:
        return
    if not path.is_file():
        raise PluginError(f"there is no plugin {file}")
    name = f"attninject_plugin_{len(_loaded)}_{path.stem}"  # the same in every process, for pickled blocks
    loader = SourceFileLoader(name, str(path))
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    assert spec is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    try:
        loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise PluginError(
            f"the plugin {file} failed{_line(path, error)}: {type(error).__name__}: {first_line(error)}"
        ) from error
    _loaded.append(path)
    os.environ[VARIABLE] = os.pathsep.join(map(str, _loaded))


def load_inherited() -> None:
    """In a worker process: the plugins of the process that started it."""
    for file in filter(None, os.environ.get(VARIABLE, "").split(os.pathsep)):
        load(file)


def files() -> tuple[Path, ...]:
    """The plugins of this process."""
    return tuple(_loaded)


def names() -> list[str]:
    """Their names, as runs and deltas record them."""
    return [path.name for path in _loaded]


def made_with(recorded: Iterable[str]) -> str:
    """What a message adds of plugins that something was made with, if they are not loaded here; or nothing."""
    missing = [name for name in recorded if name not in names()]
    said = clipped(", ".join(missing))
    return f"; it was made with the plugin {said}: import that file, or give it with --plugin" if said else ""


@contextlib.contextmanager
def named_beside(settings: Path) -> Iterator[None]:
    """Let a fault in a run's settings name the plugins that the run was made with.

    Raises:
        RecipeError: what the body raised, with that besides.
    """
    try:
        yield
    except RecipeError as error:
        recorded: list[str] = []
        with contextlib.suppress(OSError, ValueError):
            recorded = (settings.parent / RECORD).read_text(encoding="utf-8").split("\n")[:-1]
        if said := made_with(recorded).removeprefix("; "):
            raise type(error)([*error.faults, Fault(said, str(settings))]) from error
        raise


def _line(path: Path, error: BaseException) -> str:
    """Where in a plugin it stopped: ` in line 3`."""
    frames = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
    line = error.lineno if isinstance(error, SyntaxError) else frames[-1] if frames else None
    return f" in line {line}" if line else ""
