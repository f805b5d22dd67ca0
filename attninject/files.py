"""Files that appear whole or not at all, the versions that stand in them, and how damage to them is seen."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

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


def raw_bytes(tensor: torch.Tensor) -> Any:
    """A tensor's bytes in logical order, whatever its strides and device: a buffer, for hashes and checksums."""
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else b""


def digest(*parts: Any) -> str:
    """SHA-256 of texts and buffers, one behind the other, in hexadecimal digits."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part.encode() if isinstance(part, str) else part)
    return sha.hexdigest()


_SEAL = '{"sha256": "'


def sealed(text: str) -> str:
    """The text of a JSON object, its own SHA-256 put in front as one more member."""
    return f'{_SEAL}{digest(text)}", {text[1:]}'


def seal_holds(text: str) -> bool | None:
    """Whether a text is what `sealed` gave; None: it has no seal."""
    if not text.startswith(_SEAL):
        return None
    end = len(_SEAL) + 64
    return text[end : end + 3] == '", ' and text[len(_SEAL) : end] == digest("{" + text[end + 3 :])
