"""What is said about delta files."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small import images, se
from torch import nn

import attninject as ai
from attninject import delta_file

from .models import small
from .registry import before, case, cases

Change = Callable[[dict[str, torch.Tensor], dict[str, Any]], Any]


def saved(folder: Path, frozen: bool = False) -> Path:
    """A delta of the small net; `frozen`: of which only the block was to be trained."""
    model = ai.inject(small(), **se(after="inner.a"), example_inputs=images())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not frozen or ".se." in name)
    ai.save(model, folder / "d.safetensors", base="mine/small")
    return folder / "d.safetensors"


def _load(change: Callable[[Path], Any], folder: Path) -> Any:
    """Load a file that something was done to."""
    file = saved(folder)
    change(file)
    return ai.load(small(), file, example_inputs=images())


def _tampered(change: Change, folder: Path, forged: bool = True) -> Any:
    """Load a file whose tensors or record were changed by hand; `forged`: and its digests made anew."""

    def edit(file: Path) -> None:
        with safe_open(file, framework="pt") as opened:
            record = json.loads((opened.metadata() or {})["attninject"])
        tensors = load_file(file)
        change(tensors, record)
        seal = record.pop("sha256")
        whole = (
            delta_file.metadata(record, tensors) if forged else {delta_file.METADATA_KEY: _kept(seal, record)}
        )
        save_file(tensors, file, metadata=whole)

    return _load(edit, folder)


def _kept(seal: str, record: dict[str, Any]) -> str:
    return json.dumps({"sha256": seal, **record})


def _rule(field: str, value: Any) -> Change:
    return lambda tensors, record: record["sites"][0]["rule"].update({field: value})


DAMAGED: dict[str, Callable[[Path], Any]] = {
    "missing": Path.unlink,
    "a plain state dict": lambda file: save_file({"a": torch.zeros(1)}, file),
}
FOREIGN: dict[str, Callable[[Path], Any]] = {  # the reader's own words follow
    "cut off": lambda file: file.write_bytes(file.read_bytes()[:100]),
    "deeply nested metadata": lambda file: save_file({}, file, metadata={"attninject": "[" * 100_000}),
}
TAMPERED: dict[str, Change] = {
    "of another format": lambda tensors, record: record.update(format=99),
    "without sites": lambda tensors, record: record.update(sites=[]),
    "an odd hash": lambda tensors, record: record["fingerprint"]["values"].update({"stem.weight": 3}),
    "a hash too many": lambda tensors, record: record["fingerprint"]["values"].update({"x": "0" * 64}),
    "an unknown block": _rule("block", "os.system"),
    "an unknown layer": _rule("after", "inner.z"),
    "a reserved name": _rule("name", "forward"),
    "an unknown argument": _rule("args", {"nonsense": 1}),
    "a block that is too large": _rule("args", {"reduction": 1}),
    "another site": lambda tensors, record: record["sites"][0].update(qualified="inner.other"),
    "a tensor too few": lambda tensors, record: tensors.pop(next(k for k in sorted(tensors) if ".se." in k)),
    "a tensor too many": lambda tensors, record: tensors.update(backdoor=torch.zeros(1)),
    "another shape": lambda tensors, record: tensors.update({"stem.bias": torch.zeros(9)}),
}
FLIPPED: dict[str, Change] = {
    "a value that flipped": lambda tensors, record: tensors["stem.bias"].neg_(),
    "a name that flipped": lambda tensors, record: tensors.update({"stem.bhas": tensors.pop("stem.bias")}),
    "metadata that flipped": lambda tensors, record: record.update(base="mine/smaml"),
}
cases("delta", [(name, functools.partial(_load, change)) for name, change in DAMAGED.items()])
cases("delta", [(name, before("(", functools.partial(_load, change))) for name, change in FOREIGN.items()])
cases("delta", [(name, functools.partial(_tampered, change)) for name, change in TAMPERED.items()])
cases(
    "delta", [(name, functools.partial(_tampered, change, forged=False)) for name, change in FLIPPED.items()]
)


@case("delta: another base")
def _(folder: Path) -> Any:
    return ai.load(nn.Sequential(small()), saved(folder))


@case("delta: another dtype")
def _(folder: Path) -> Any:
    return ai.load(small().half(), saved(folder))


@case("delta: other frozen values")
def _(folder: Path) -> Any:
    model = small()
    nn.init.zeros_(model.stem.weight)
    return ai.load(model, saved(folder, frozen=True))


@case("delta: onto blocks")
def _(folder: Path) -> Any:
    model = ai.inject(small(), **se(after="inner.b"), example_inputs=images())
    return ai.load(model, saved(folder))


@case("delta: of what holds more than the model")
def _(folder: Path) -> Any:
    model = ai.inject(small(), **se(after="inner.b"), example_inputs=images())
    holder = nn.ModuleDict({"net": model, "more": nn.Linear(2, 2)})
    return ai.save(holder, folder / "d.safetensors")


@case("delta: nothing to save")
def _(folder: Path) -> Any:
    ai.save(small(), folder / "d.safetensors")


def _nowhere(folder: Path) -> Any:
    ai.save(
        ai.inject(small(), **se(after="inner.a"), example_inputs=images()), folder / "no" / "d.safetensors"
    )


case("delta: no folder to save in")(before("written", _nowhere))


@case("delta: a block that was replaced")
def _(folder: Path) -> Any:
    model = ai.inject(small(), **se(after="inner.a"), example_inputs=images())
    model.inner.se = nn.Identity()
    ai.save(model, folder / "d.safetensors")


@case("delta: a class with a block's name")
def _(folder: Path) -> Any:
    kind = type("se", (Kept,), {"__doc__": "Named like a block."})
    ai.save(ai.inject(small(), block=kind, after="stem", example_inputs=images()), folder / "d.safetensors")


class Kept(nn.Module):
    """The identity, with a weight."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight
