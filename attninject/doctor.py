"""What is installed and what runs here: packages, extras, devices, and what to do about what is missing.

Nothing is imported at the top but the standard library: the doctor must answer where torch itself is broken.
"""

from __future__ import annotations

import importlib
import platform
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

from attninject import __version__
from attninject.wording import aligned, first_line

IMPORTED = ("torch", "torchvision", "timm")
"""What is imported to see whether it works: a torchvision of another torch is installed, and fails."""

_REQUIREMENT = re.compile(r"^(?P<name>[\w.-]+)(?P<extras>\[[^\]]*\])?(?P<bounds>[^;]*)(?:;(?P<marker>.*))?$")
_LEAST = re.compile(r">=\s*([\w.]+)")
_EXTRA = re.compile(r"extra\s*==\s*['\"]([\w-]+)['\"]")


@dataclass(frozen=True)
class Package:
    """A package that is asked for. `found`: its version, None where it is missing. `extra`: empty where always."""

    name: str
    least: str
    found: str | None
    extra: str = ""

    @property
    def fine(self) -> bool:
        """There, and not too old."""
        return self.found is not None and _at_least(self.found, self.least)

    @property
    def said(self) -> str:
        """`ok`, or what is wrong."""
        if self.fine:
            return "ok"
        return "missing" if self.found is None else f"older than {self.least}"


@dataclass(frozen=True)
class Findings:
    """What the doctor found; `print` it. `faults`: what keeps attninject from working here, a line each."""

    versions: Mapping[str, str]
    packages: tuple[Package, ...]
    devices: tuple[str, ...]
    faults: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "versions": dict(self.versions), "devices": list(self.devices), "faults": list(self.faults),
            "packages": [{**asdict(p), "said": p.said} for p in self.packages],
        }  # fmt: skip

    def __str__(self) -> str:
        about = " · ".join(f"{name} {found}" for name, found in self.versions.items())
        rows: list[tuple[str, ...]] = [(p.name, p.found or "-", p.said) for p in self.packages if not p.extra]
        blocks = [about, *_titled("needed", rows), *_titled("extras", _extras(self.packages))]
        blocks += _titled("devices", [(device,) for device in self.devices])
        return "\n".join([*blocks, *(self.faults or ["", "nothing is wrong here"])])


def examine() -> Findings:
    """Look at this Python: what is installed, whether it can be imported, which devices there are."""
    about = {"attninject": __version__, "Python": platform.python_version(), "on": platform.platform()}
    packages = tuple(_packages())
    faults = [f"{p.name} is {p.said}: pip install attninject" for p in packages if not p.extra and not p.fine]
    for name in IMPORTED:
        try:
            importlib.import_module(name)
        except Exception as error:
            faults.append(
                f"{name} cannot be imported ({first_line(error)}): install torch and torchvision together"
            )
            break
    devices = () if faults else tuple(_devices())
    return Findings(about, packages, devices, tuple(faults))


# --- packages ----------------------------------------------------------------------------------


def _packages() -> list[Package]:
    """All that attninject's metadata names, each once for each extra; of a checkout that is not installed, none."""
    try:
        wanted = requires("attninject") or []
    except PackageNotFoundError:
        wanted = []
    found = []
    for line in wanted:
        parts = _REQUIREMENT.match(line)
        if parts is None or parts["name"].lower() == "attninject":
            continue
        extra = _EXTRA.search(parts["marker"] or "")
        least = _LEAST.search(parts["bounds"])
        found.append(
            Package(
                parts["name"], least[1] if least else "", _version(parts["name"]), extra[1] if extra else ""
            )
        )
    return found or [Package(name, "", _version(name)) for name in IMPORTED]


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _at_least(found: str, least: str) -> bool:
    """By the numbers in front: 2.11.0+cu130 is newer than 2.6."""
    return _numbers(found) >= _numbers(least)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text.partition("+")[0])[:3])


def _extras(packages: Iterable[Package]) -> list[tuple[str, ...]]:
    """A row for each extra: complete, or what is missing and the command that installs it."""
    groups: dict[str, list[Package]] = {}
    for package in packages:
        if package.extra:
            groups.setdefault(package.extra, []).append(package)
    rows: list[tuple[str, ...]] = []
    for extra, members in sorted(groups.items()):
        wrong = [f"{p.name} is {p.said}" for p in members if not p.fine]
        said = f'{", ".join(wrong)}: pip install "attninject[{extra}]"' if wrong else "complete"
        rows.append((extra, said))
    return rows


# --- devices -----------------------------------------------------------------------------------


def _devices() -> list[str]:
    """The processor, each GPU, and what `torch.compile` needs."""
    import torch

    found = [f"cpu: {torch.get_num_threads()} threads"]
    if torch.cuda.is_available():
        found += [_card(number) for number in range(torch.cuda.device_count())]
    elif torch.version.cuda:
        found.append(f"no GPU is seen (this torch is built for CUDA {torch.version.cuda})")
    else:
        found.append("no GPU: this torch is built without CUDA")
    if torch.backends.mps.is_available():
        found.append("mps: Apple's GPU")
    compiler = next((c for c in ("c++", "g++", "clang++") if shutil.which(c)), None)
    found.append(f"torch.compile on the CPU: {f'{compiler} found' if compiler else 'needs a C++ compiler'}")
    return found


def _card(number: int) -> str:
    import torch

    about = torch.cuda.get_device_properties(number)
    half = "bf16" if torch.cuda.is_bf16_supported() else "no bf16"
    return f"cuda:{number}: {about.name}, {about.total_memory / 2**30:.0f} GiB, {half}"


def _titled(title: str, rows: list[tuple[str, ...]]) -> list[str]:
    return ["", title, *(f"  {line}" for line in aligned(rows))] if rows else []
