"""Fuzzers of what users write and what files hold: recipes, delta files, checkpoints of training runs.

A case is what a fuzzer's `make` draws from a seeded generator, in plain JSON; `verdict` says what is wrong with
what the library does then, in words, or nothing. Case n of seed s is always the same one.

    python tests/fuzz/fuzzers.py recipes --minutes 120 --seed 7

A counter-example is printed with its seed and number, and belongs into `cases.jsonl`, a line each, which the default
tier runs.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script: the helpers of all tests

from small import ManyTypes

import attninject as ai
from attninject.errors import CheckpointError, DeltaError, RecipeError
from attninject.recipe.loading import load_recipe, parse_recipe
from attninject.training import runs

Case = Any  # plain JSON
CASES = Path(__file__).with_name("cases.jsonl")


@dataclass(frozen=True)
class Fault:
    """A counter-example: which case it was, and what went wrong."""

    fuzzer: str
    seed: int
    number: int
    case: Case
    what: str

    def __str__(self) -> str:
        line = json.dumps({"fuzzer": self.fuzzer, "case": self.case})
        return f"{self.fuzzer}, seed {self.seed}, number {self.number}: {self.what}\n{line}"


def search(name: str, seed: int, seconds: float) -> tuple[int, Fault | None]:
    """Cases of a seed until time is up or one fails: how many there were, and the one that failed."""
    fuzzer, end, number = FUZZERS[name](), time.monotonic() + seconds, 0
    while time.monotonic() < end:
        case = fuzzer.make(random.Random(f"{seed} {number}"))
        if what := verdict(fuzzer, case):
            return number + 1, Fault(name, seed, number, case, what)
        number += 1
    return number, None


def verdict(fuzzer: Any, case: Case) -> str:
    """What is wrong with a case, an error of a kind that nobody promised included; empty if nothing is."""
    try:
        return str(fuzzer.verdict(case))
    except Exception as error:
        return f"{type(error).__name__}: {error}"


# --- recipes -----------------------------------------------------------------------------------

_GOOD: dict[str, list[Any]] = {
    "block": ["se", "cbam", "eca", "bam", "coord", "nonlocal"],
    "after": ["layer1.*.bn3", "**.{a,b}", "re:layer[1-4]", ["layer1", "layer2"], "units.*::add", "**::add_{1,2}"],
    "before": ["head", "**", "layer?.[01].conv1", "units.*::mul"],
    "place": ["stage_end", "residual_branch", "block_end", "head_input"],
    "input": [0, 1, "x"],
    "output": [0, -1, "out"],
    "layout": ["NCHW", "NHWC", "NLC"],
    "type": ["Conv2d", "BatchNorm2d"],
    "exclude": ["layer4.**", ["a", "b"]],
    "pick": ["first", "last", "even", [0, -1], {"every": 2, "offset": 1}],
    "per": ["owner", "stage"],
    "call": ["all", "last", 1],
    "stages": [[1, 2], [-1]],
    "min_channels": [1, 64],
    "args": [{"reduction": 4}, {"kernel_size": 7}, {}],
    "init": ["identity", "paper", "blend"],
    "name": ["se", "my_block"],
    "optional": [True, False],
}  # fmt: skip
_ODD = [None, -1, 0, 2**70, 1e400, "", " ", "a..b", "re:(", "{a", "**.**", [], {}, [[]], True, "é", "\x00"]


class Recipes:
    """Texts by the grammar of recipes, some of them then damaged: each loads, or is reported with a place."""

    def make(self, chance: random.Random) -> Case:
        """A text, one character for each byte."""
        rules = [self._rule(chance) for _ in range(chance.choice([1, 1, 1, 2, 3]))]
        tree: dict[str, Any] = {"rules": rules}
        for key in chance.sample(["name", "source", "rule"], chance.choice([0, 0, 1, 2])):
            tree[key] = chance.choice(["mine", *_ODD])
        flow = chance.choice([True, False, None])
        text = yaml.safe_dump(tree, allow_unicode=True, default_flow_style=flow, sort_keys=False)
        damaged = bytearray(text.encode())
        for _ in range(chance.choice([0, 0, 1, 1, 2, 5])):
            _damage(damaged, chance)
        return damaged.decode("latin-1")

    @staticmethod
    def _rule(chance: random.Random) -> dict[str, Any]:
        fields = ["block", chance.choice(["after", "before", "place"])]
        fields += chance.sample(sorted(_GOOD), chance.choice([0, 1, 2, 4]))
        return {f: chance.choice(_ODD if chance.random() < 0.1 else _GOOD[f]) for f in fields}

    def verdict(self, case: Case) -> str:
        """Wrong is a fault without a line, and a recipe that does not survive its own dict."""
        try:
            recipe = parse_recipe(case.encode("latin-1"))
        except RecipeError as error:
            placed = all((f.line and f.column) or " at byte " in f.message for f in error.faults)
            return "" if placed else f"a fault without a place: {error}"
        again = load_recipe(recipe.to_dict())
        return "" if again == recipe and hash(again) == hash(recipe) else "its dict reads as another recipe"


def _damage(content: bytearray, chance: random.Random) -> None:
    """One flip, cut, insertion, repetition or overwriting of bytes, in place."""
    at = chance.randrange(len(content) + 1)
    what, length = chance.choice(["flip", "drop", "insert", "repeat", "set"]), chance.choice([1, 1, 2, 8, 40])
    if what == "flip" and at < len(content):
        content[at] ^= 1 << chance.randrange(8)
    elif what == "drop":
        del content[at : at + length]
    elif what == "insert":
        content[at:at] = chance.choice(
            [chance.randbytes(length), b"\n", b"  ", b"&a", b"*a", b": ", b"- ", b"\t"]
        )
    elif what == "repeat":
        content[at:at] = content[at : at + length] * 2
    elif what == "set":
        content[at : at + length] = bytes([chance.choice([0, 9, 32, 255, chance.randrange(256)])]) * length


# --- files -------------------------------------------------------------------------------------


def _with_block() -> nn.Module:
    args: dict[str, Any] = {
        "args": {"reduction": 4},
        "init": "paper",
        "example_inputs": torch.zeros(1, 3, 8, 8),
    }
    return ai.inject(ManyTypes().eval(), block="se", after="stem", **args)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """The same keys in any order, each of the same dtype, shape and bits."""
    return a.keys() == b.keys() and all(
        t.dtype == b[k].dtype and t.shape == b[k].shape and _bits(t) == _bits(b[k]) for k, t in a.items()
    )


def _bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


class _Files:
    """Damage to a safetensors file: each is refused, or harmless. A case is a list of edits, [what, where, how]."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="attninject-fuzz-"))

    def path(self) -> Path:
        """Where the file lies that is damaged."""
        raise NotImplementedError

    @cached_property
    def content(self) -> bytes:
        """The undamaged file."""
        return self.path().read_bytes()

    def make(self, chance: random.Random) -> Case:
        """One to three edits of the header, the metadata in it, or the tensors; places are shares of these."""
        parts = ["header", "metadata", "tensors", "whole"]
        edits = ["flip", "cut", "drop", "insert", "zero", "swap", "word"]
        return [
            [chance.choice(edits), chance.choice(parts), chance.random(), chance.randrange(1 << 16)]
            for _ in range(chance.choice([1, 1, 1, 2, 3]))
        ]

    def damaged(self, case: Case) -> bytes:
        """The file after its edits."""
        content = bytearray(self.content)
        start = 8 + int.from_bytes(content[:8], "little")
        spans = {"header": (0, start), "tensors": (start, len(content)), "whole": (0, len(content))}
        spans["metadata"] = (max(0, content.find(b"__metadata__")), start)
        for what, part, share, how in case:
            low, high = spans[part]
            _edit(content, what, low + int(share * (high - low)), how)
        return bytes(content)


_WORDS = (
    (b"F32", b"I32"),
    (b"F32", b"U32"),
    (b"[16", b"[4"),
    (b"16,", b"61,"),
    (b"BF16", b"F16"),
    (b"1", b"2"),
    (b"0", b"1"),
)


def _edit(content: bytearray, what: str, at: int, how: int) -> None:
    if what == "flip" and at < len(content):
        content[at] ^= 1 << (how % 8)
    elif what == "cut":
        del content[at:]
    elif what == "drop":
        del content[at : at + 1 + how % 9]
    elif what == "insert":
        content[at:at] = bytes([how % 256]) * (1 + how % 9)
    elif what == "zero":
        content[at : at + how % 64] = bytes(len(content[at : at + how % 64]))
    elif what == "swap":
        size, other = 1 + how % 16, how % max(1, len(content))
        content[at : at + size], content[other : other + size] = (
            content[other : other + size],
            content[at : at + size],
        )
    elif what == "word":
        old, new = _WORDS[how % len(_WORDS)]
        content[at:] = content[at:].replace(old, new, 1)


class Deltas(_Files):
    """A damaged delta is refused with the base untouched, or gives the very model that was saved."""

    def path(self) -> Path:
        """A delta with an SE block of the paper's init."""
        net, path = _with_block(), self.folder / "saved.safetensors"
        self.state = {k: t.clone() for k, t in net.state_dict().items()}
        ai.save(net, path)
        return path

    def verdict(self, case: Case) -> str:
        """Wrong is a model that is neither the saved one nor the one before."""
        content, path, net = self.damaged(case), self.folder / "damaged.safetensors", ManyTypes().eval()
        path.write_bytes(content)
        before = {k: t.clone() for k, t in net.state_dict().items()}
        try:
            ai.load(net, path)
        except DeltaError:
            same_net = same(net.state_dict(), before) and not ai.injected(net)
            return "" if same_net else "refused, but the model was changed"
        return "" if same(net.state_dict(), self.state) else "loaded as something else"


class Checkpoints(_Files):
    """A damaged checkpoint is refused, or gives the very tensors and counters that were saved."""

    def path(self) -> Path:
        """A checkpoint of a net with a block, with an optimizer's state and a log."""
        net, folder = _with_block(), runs.Folder(self.folder)
        state = {f"model.{k}": t for k, t in net.state_dict().items()}
        state |= {f"optimizer.{k}|exp_avg": torch.randn_like(t) for k, t in net.named_parameters()}
        folder.save(
            state, {"epoch": 2, "batch": 0, "step": 12, "history": [{"loss": 0.5}], "classes": ["a", "b"]}
        )
        self.saved = runs.read(self.folder / runs.CHECKPOINT)
        return self.folder / runs.CHECKPOINT

    def verdict(self, case: Case) -> str:
        """Wrong are tensors or counters other than those saved."""
        path = self.folder / "damaged"
        path.write_bytes(self.damaged(case))
        try:
            tensors, meta = runs.read(path)
        except CheckpointError:
            return ""
        return "" if meta == self.saved[1] and same(tensors, self.saved[0]) else "read as something else"


FUZZERS: dict[str, Callable[[], Any]] = {"recipes": Recipes, "deltas": Deltas, "checkpoints": Checkpoints}


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description="Fuzz for a while; the first counter-example ends it.")
    parser.add_argument("fuzzer", choices=sorted(FUZZERS))
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=None, help="default: a random one, which is printed")
    given = parser.parse_args()
    seed = random.SystemRandom().randrange(2**32) if given.seed is None else given.seed
    print(f"{given.fuzzer}: seed {seed}, {given.minutes:g} minutes", flush=True)
    count, fault = search(given.fuzzer, seed, 60 * given.minutes)
    print(f"{count:,} cases" + (f"; a counter-example:\n{fault}" if fault else ", none of them wrong"))
    return 1 if fault else 0


if __name__ == "__main__":
    sys.exit(main())
