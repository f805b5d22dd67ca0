"""Random networks of real module classes, written out as source text from a frozen spec.

A spec is nested tuples of numbers that are taken modulo what there is, so every spec means a net. Every
owner class has a forward of its own, written statement by statement, as people write them: torch.fx sees
plain Python. The classes live in a module of their own in `sys.modules`, so they pickle.
"""

from __future__ import annotations

import itertools
import linecache
import sys
import types
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils.checkpoint
from nets import pretrained
from torch import nn

CHANNELS, SIZE = 4, 8
MODULE = "attninject_random_nets"


class Pair(nn.Module):
    """Gives a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(CHANNELS, CHANNELS, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.conv(x), x


class Named(nn.Module):
    """Gives a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(CHANNELS, CHANNELS, 1)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"out": self.conv(x), "half": x * 0.5}


class Masked(nn.Module):
    """Takes an optional argument, which may decide the way."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(CHANNELS, CHANNELS, 1)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None, twice: bool = False) -> torch.Tensor:
        x = self.conv(x)
        if mask is not None:
            x = x * mask
        return x + x if twice else x


class Chain(nn.Module):
    """Goes over its own children."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(CHANNELS, CHANNELS, 1)
        self.second = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for child in self.children():
            x = child(x)
        return x


# Statement → text. {a}, {b}: earlier values; {n}: the new one; {m}: a new child, made by the second text.
_C = "CHANNELS"
STATEMENTS: dict[str, tuple[str, str]] = {
    "conv": ("{n} = self.{m}({a})", f"nn.Conv2d({_C}, {_C}, 3, padding=1)"),
    "norm": ("{n} = self.{m}({a})", f"nn.BatchNorm2d({_C})"),
    "relu": ("{n} = self.{m}({a})", "nn.ReLU()"),
    "relu_in_place": ("{n} = self.{m}({a})", "nn.ReLU(inplace=True)"),
    "identity": ("{n} = self.{m}({a})", "nn.Identity()"),
    "sequential": (
        "{n} = self.{m}({a})",
        f"nn.Sequential(nn.Conv2d({_C}, {_C}, 1), nn.BatchNorm2d({_C}), nn.ReLU(inplace=True))",
    ),
    "conv_norm": ("{n} = self.{m}({a})", f"nn.Sequential(nn.Conv2d({_C}, {_C}, 1), nn.BatchNorm2d({_C}))"),
    "dropout": ("{n} = self.{m}({a})", "nn.Dropout(0.3)"),
    "reuse": ("{n} = self.{old}({a})", ""),
    "nested": ("{n} = self.{m}({a})", "{owner}()"),
    "twice": ("{n} = self.{m}(self.{m}({a}))", "{owner}()"),
    "pair": ("{n}, {n}b = self.{m}({a})\n{n} = {n} + {n}b", "Pair()"),
    "first": ("{n} = self.{m}({a})[0]", "Pair()"),
    "named": ("{n} = self.{m}({a})['out']", "Named()"),
    "masked": ("{n} = self.{m}({a}, {b})", "Masked()"),
    "unmasked": ("{n} = self.{m}({a}, twice=True)", "Masked()"),
    "keyword": ("{n} = self.{m}(x={a}, mask={b})", "Masked()"),
    "chain": ("{n} = self.{m}({a})", "Chain()"),
    "loop": (
        "{n} = {a}\nfor layer in self.{m}:\n    {n} = layer({n})",
        f"nn.ModuleList([nn.Conv2d({_C}, {_C}, 1), nn.ReLU(), nn.Conv2d({_C}, {_C}, 1)])",
    ),
    "norm_last": (
        "{n} = self.{m}({a}.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)",
        f"nn.LayerNorm({_C})",
    ),
    "joined": ("{n} = self.{m}(torch.cat([{a}, {b}], 1))", f"nn.Conv2d(2 * {_C}, {_C}, 1)"),
    "checkpoint": (
        "{n} = torch.utils.checkpoint.checkpoint(self.{m}, {a}, use_reentrant=False)",
        f"nn.Conv2d({_C}, {_C}, 1)",
    ),
    "slot": ("{n} = {a}\nif self.se is not None:\n    {n} = self.se({n})", ""),
    "called_slot": ("{n} = {a} if self.spare is None else self.spare({a})", ""),
    "flag": ("if self.flag:\n    {n} = F.relu({a})\nelse:\n    {n} = {a} * 2", ""),
    "training": ("if self.training:\n    {n} = {a} * 2\nelse:\n    {n} = F.relu({a})", ""),
    "training_child": ("{n} = {a}\nif self.training:\n    {n} = self.{m}({n})", f"nn.Conv2d({_C}, {_C}, 1)"),
    "functional_dropout": ("{n} = F.dropout({a}, 0.3, self.training)", ""),
    "noise": ("{n} = {a}\nif self.training:\n    {n} = {a} + torch.rand_like({a})", ""),
    "relu_f": ("{n} = F.relu({a})", ""),
    "sigmoid": ("{n} = torch.sigmoid({a})", ""),
    "add": ("{n} = {a} + {b}", ""),
    "torch_add": ("{n} = torch.add({a}, {b})", ""),
    "mul": ("{n} = {a} * {b}", ""),
    "scale": ("{n} = {a} * self.scale", ""),
    "swap": ("{n}p, {n}q = {a}.chunk(2, 1)\n{n} = torch.cat([{n}q, {n}p], 1)", ""),
    "view": ("{n} = {a}.view({a}.shape)", ""),
    "slice": ("{n} = {a}[:]", ""),
    "iadd": ("{a} += {b}\n{n} = {a}", ""),
    "add_": ("{n} = {a}.add_({b})", ""),
    "imul": ("{a} *= 0.5\n{n} = {a}", ""),
    "relu_": ("{n} = {a}.relu_()", ""),
    "relu_f_in_place": ("{n} = F.relu({a}, inplace=True)", ""),
    "count": ("self.count.add_(1)\n{n} = {a}", ""),
    "note": ("self.notes = self.notes + 1\n{n} = {a}", ""),
}
KINDS = tuple(STATEMENTS)

ROOTS = {
    "direct": ("", "x = self.units[0](x)"),
    "sequential": ("", "x = self.units(x)"),
    "loop": ("", "for unit in self.units:\n    x = unit(x)"),
    "again": ("self.again = self.units[-1]", "x = self.again(self.units(x))"),
    "same": ("", "x = self.units[0](x)\nx = self.units[0](x) + x"),
}


@dataclass(frozen=True)
class NetSpec:
    """A net: its owners, each a tuple of (statement, operand, operand); how the root runs them; a seed."""

    owners: tuple[tuple[tuple[str, int, int], ...], ...]
    root: str
    features: bool  # the root's work sits in forward_features
    seed: int


def _text(owner: int, statements: tuple[tuple[str, int, int], ...]) -> str:
    """Source of one owner class; `nested` ones use the owner before it."""
    make, lines, values, children = [], [], ["x"], []
    kinds = {kind for kind, _, _ in statements}
    for n, (kind, a, b) in enumerate(statements):
        text, child = STATEMENTS[kind]
        if kind == "reuse" and not children:
            text, child = STATEMENTS["conv"]
        if "{owner}" in child and owner == 0:
            text, child = STATEMENTS["conv"]
        if child:
            make.append(f"self.m{n} = {child.format(owner=f'Owner{owner - 1}')}")
        words = {
            "a": values[-1 - a % len(values)],
            "b": values[-1 - b % len(values)],
            "n": f"v{n}",
            "m": f"m{n}",
            "old": children[b % len(children)] if children else "",
        }
        lines += text.format(**words).split("\n")
        values.append(f"v{n}")
        if child and kind in ("conv", "norm", "relu", "relu_in_place", "identity", "sequential", "nested"):
            children.append(f"m{n}")
    make += ["self.se = None"] if "slot" in kinds else []
    make += ["self.register_module('spare', None)"] if "called_slot" in kinds else []
    make += ["self.flag = True"] if "flag" in kinds else []
    make += ["self.scale = nn.Parameter(torch.ones(CHANNELS, 1, 1))"] if "scale" in kinds else []
    make += ["self.register_buffer('count', torch.zeros(()))"] if "count" in kinds else []
    make += ["self.notes = 0"] if "note" in kinds else []
    return _class(f"Owner{owner}", make, {"forward": [*lines, f"return {values[-1]}"]})


def _class(name: str, make: list[str], methods: dict[str, list[str]]) -> str:
    parts = [f"class {name}(nn.Module):", "    def __init__(self):", "        super().__init__()"]
    parts += [f"        {line}" for line in make]
    for method, lines in methods.items():
        parts += [f"    def {method}(self, x):", *(f"        {line}" for line in lines)]
    return "\n".join(parts) + "\n\n"


def source(spec: NetSpec) -> str:
    """The text of all classes of a net; the root is `Net`."""
    extra, run = ROOTS[spec.root]
    text = "".join(_text(i, owner) for i, owner in enumerate(spec.owners))
    units = ", ".join(f"Owner{i}()" for i in range(len(spec.owners)))
    make = [
        "self.stem = nn.Conv2d(3, CHANNELS, 1)",
        f"self.units = nn.Sequential({units})",
        *([extra] if extra else []),
        "self.head = nn.Linear(CHANNELS, 3)",
    ]
    body = ["x = self.stem(x)", *run.split("\n")]
    if spec.features:
        methods = {
            "forward_features": [*body, "return x"],
            "forward": ["return self.head(self.forward_features(x).mean((2, 3)))"],
        }
    else:
        methods = {"forward": [*body, "return self.head(x.mean((2, 3)))"]}
    return text + _class("Net", make, methods)


_modules: dict[str, types.ModuleType] = {}
_numbers = itertools.count()


def _module(text: str) -> types.ModuleType:
    if text not in _modules:
        name = f"{MODULE}_{next(_numbers)}"
        module = types.ModuleType(name)
        module.__dict__.update(
            torch=torch,
            nn=nn,
            F=nn.functional,
            CHANNELS=CHANNELS,
            Pair=Pair,
            Named=Named,
            Masked=Masked,
            Chain=Chain,
        )
        file = f"<{name}>"
        linecache.cache[file] = (len(text), None, text.splitlines(True), file)
        exec(compile(text, file, "exec"), module.__dict__)
        sys.modules[name] = _modules[text] = module
    return _modules[text]


def build(spec: NetSpec) -> Any:
    """The net, with random weights and batch-norm statistics, in eval mode; the same for the same spec."""
    module = _module(source(spec))
    with torch.random.fork_rng():
        torch.manual_seed(spec.seed)
        return pretrained(module.Net(), spec.seed)


def batch(seed: int = 0) -> torch.Tensor:
    """Two images."""
    return torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))
