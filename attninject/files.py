"""Files that appear whole or not at all, and the versions that stand in them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from attninject import __version__


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A temporary path beside `target`, which takes its place when the body is through without an error.

    A reader sees the old file or the new one, never a part; a body that fails leaves the old one. The body must
    write the file. What it raises, and an OSError of the last step, comes through.
    """
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        with suppress(OSError):
            temporary.unlink()


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """Package → version, of those that are installed; attninject itself says its own, also in a checkout."""
    found: dict[str, str] = {}
    for package in packages:
        with suppress(PackageNotFoundError):
            found[package] = __version__ if package == "attninject" else version(package)
    return found
