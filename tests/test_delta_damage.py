"""Damaged delta files: a flipped bit anywhere is seen, and an older file without digests says how to renew it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small import ManyTypes
from torch import Tensor, nn

import attninject as ai
from attninject import errors

FLIPS = 400
SEED = 20240607


def fresh() -> nn.Module:
    """The base model, the same each time."""
    return ManyTypes().eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, dict[str, Tensor]]:
    """A delta's bytes, and the state of the model that it gives."""
    net = ai.inject(
        fresh(),
        block="se",
        after="stem",
        args={"reduction": 4},
        init="paper",
        example_inputs=torch.zeros(1, 3, 8, 8),
    )
    path = tmp_path_factory.mktemp("delta") / "run.safetensors"
    ai.save(net, path)
    return path.read_bytes(), {key: t.clone() for key, t in net.state_dict().items()}


def outcome(content: bytes, path: Path, state: dict[str, Tensor]) -> str:
    """`refused`, with the base untouched; `harmless`: the very model that was saved; or what is wrong."""
    path.write_bytes(content)
    net = fresh()
    before = {key: t.clone() for key, t in net.state_dict().items()}
    try:
        ai.load(net, path)
    except errors.DeltaError:
        same = same_state(net.state_dict(), before) and not ai.injected(net)
        return "refused" if same else "refused, but the model was changed"
    return "harmless" if same_state(net.state_dict(), state) else "loaded as something else"


def same_state(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Bit by bit, NaN or not."""
    return list(a) == list(b) and all(
        t.dtype == b[k].dtype and t.numpy(force=True).tobytes() == b[k].numpy(force=True).tobytes()
        if t.dtype != torch.bfloat16
        else torch.equal(t.view(torch.int16), b[k].view(torch.int16))
        for k, t in a.items()
    )


def header_length(content: bytes) -> int:
    """Where a safetensors file's tensors begin."""
    return 8 + int.from_bytes(content[:8], "little")


# --- flips, cuts, garbage -------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["header", "tensors"])
def test_a_flipped_bit_is_refused_or_harmless(
    part: str, saved: tuple[bytes, dict[str, Tensor]], tmp_path: Path
) -> None:
    """Half of 400 seeded flips in the header with its metadata, half in the tensors, none of which is harmless."""
    content, state = saved
    start = header_length(content)
    region = range(start) if part == "header" else range(start, len(content))
    chance = random.Random(SEED)
    for _ in range(FLIPS // 2):
        at, bit = chance.choice(region), chance.randrange(8)
        damaged = bytearray(content)
        damaged[at] ^= 1 << bit
        found = outcome(bytes(damaged), tmp_path / "run.safetensors", state)
        assert found == "refused" or (found == "harmless" and part == "header"), (at, bit, found)


def test_cuts_additions_and_swapped_halves_are_refused(
    saved: tuple[bytes, dict[str, Tensor]], tmp_path: Path
) -> None:
    """A file cut at any of many lengths, with bytes behind its end, zeroed in part, or garbage from the start."""
    content, state = saved
    chance = random.Random(SEED)
    start = header_length(content)
    cases = [content[: chance.randrange(len(content))] for _ in range(40)]
    cases += [content + b"\0", content[:-64] + bytes(64), content[:start] + content[:start:-1]]
    cases += [chance.randbytes(200), content[:start] + bytes(len(content) - start)]
    for case in cases:
        assert outcome(case, tmp_path / "run.safetensors", state) == "refused", len(case)


# --- what the message names -----------------------------------------------------------------------


def rewritten(path: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], Any]) -> None:
    """The file with its tensors and record changed, and the digests left as they were."""
    with safe_open(path, framework="pt") as file:
        record = json.loads(file.metadata()["attninject"])
    tensors = load_file(path)
    change(tensors, record)
    save_file(tensors, path, metadata={"attninject": json.dumps(record)})


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t, r: t["norm.bias"].add_(1e-7), "the values of norm.bias are not those that were saved"),
        (lambda t, r: t.update({"norm.bias": t["norm.bias"].view(4, 4)}), "norm.bias"),
        (lambda t, r: t.update({"norm.bias": t["norm.bias"].view(torch.int32)}), "norm.bias"),
        (lambda t, r: t.pop("head.bias"), "head.bias is not in it any more"),
        (lambda t, r: t.update(more=torch.zeros(1)), "more was not in it when it was saved"),
        (
            lambda t, r: t.update({"norm.bias": t["norm.weight"], "norm.weight": t["norm.bias"]}),
            "norm.bias, norm.weight",
        ),
        (lambda t, r: r.update(base="another"), "its metadata is damaged"),
        (lambda t, r: r.pop("digests"), "its metadata is damaged"),
        (lambda t, r: r.pop("sha256"), "its own digest is gone"),
    ],
)
def test_the_damaged_part_is_named(
    change: Callable[..., Any], expected: str, saved: tuple[bytes, dict[str, Tensor]], tmp_path: Path
) -> None:
    """Values, shape, dtype, names, or the metadata: the message says which."""
    path = tmp_path / "run.safetensors"
    path.write_bytes(saved[0])
    rewritten(path, change)
    with pytest.raises(errors.DeltaError) as caught:
        ai.load(fresh(), path, strict_base=False)
    assert expected in str(caught.value)
    assert "the model is unchanged" in str(caught.value)


# --- older files ----------------------------------------------------------------------------------


def test_a_file_without_digests_loads_with_a_warning_that_says_how_to_renew_it(
    saved: tuple[bytes, dict[str, Tensor]], tmp_path: Path
) -> None:
    """Load and save again, as the warning says, and there is none any more."""
    path = tmp_path / "old.safetensors"
    path.write_bytes(saved[0])
    rewritten(path, lambda t, r: (r.pop("digests"), r.pop("sha256")))
    with pytest.warns(UserWarning, match=r"holds no digests.*ai\.load it and ai\.save the model again"):
        net = ai.load(fresh(), path)
    assert same_state(net.state_dict(), saved[1])
    ai.save(net, path)
    assert same_state(ai.load(fresh(), path).state_dict(), saved[1])
