"""The kernels of the fast forms without a card: in Triton's interpreter; and when the dispatch takes them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from block_cases import noise
from small import older

from attninject.blocks import attend, gpu, registry
from attninject.blocks.channel import SE
from attninject.blocks.fast import crossover, dispatch, primitives
from attninject.blocks.fast.crossover import Thresholds

ROOT = Path(__file__).resolve().parents[2]


def python(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    """This Python from the top of the checkout."""
    return subprocess.run(
        [sys.executable, *args], cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True
    )


def loops_are_interpreted() -> bool:
    """Whether Triton's interpreter takes a bound of a loop: up to 3.6 it makes a number of an array with an axis,
    of which NumPy warns, and which newer NumPy refuses.
    """
    triton = pytest.importorskip("triton")
    if not older(triton.__version__, "3.7"):
        return True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return int(np.ones(1)) == 1  # type: ignore[call-overload,no-any-return]
        except TypeError:
            return False


def test_in_the_interpreter() -> None:
    """All tests of the kernels that run on a card, on a CPU."""
    if not loops_are_interpreted():
        pytest.skip("this Triton's interpreter and this NumPy do not go together")
    file = "tests/gpu/test_gpu_kernels.py"
    done = python("-m", "pytest", file, "-m", "gpu", "-q", "-p", "no:cacheprovider",
                  "-W", "ignore:Conversion of an array:DeprecationWarning",
                  TRITON_INTERPRET="1", ATTNINJECT_TEST_DEVICE="cpu")  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:]
    assert "passed" in done.stdout.splitlines()[-1]
    assert "skipped" not in done.stdout.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["80", "90"])
def test_compiled_for_a_card_without_one(capability: str) -> None:
    """Triton's compiler takes every kernel, in both layouts, for an A100 and an H100; none runs."""
    pytest.importorskip("triton")
    done = python("tests/blocks/compile_kernels.py", capability, PYTHONPATH=str(ROOT), TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.split()[0]) > 100


def test_nothing_imports_triton_before_it_is_wanted() -> None:
    """A CPU's plain and lean forms run without Triton, and without the modules that need it."""
    code = (
        "import sys, torch; from attninject.blocks import registry; from attninject.blocks.fast import dispatch\n"
        "b, x = registry.create_block('cbam', 8), torch.ones(1, 8, 4, 4)\n"
        "for form in ('plain', 'fast', 'kernels'):\n"
        "    with dispatch.backend(form): b(x).sum().backward()\n"
        "print([m for m in sys.modules if m.split('.')[0] == 'triton' or m.startswith('attninject.blocks.gpu.')])"
    )
    done = python("-c", code)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_without_triton_the_lean_form_serves(monkeypatch) -> None:
    """On a machine without Triton, or where it cannot compile, asking for kernels gives the lean form."""
    monkeypatch.setattr(gpu, "find_spec", lambda name: None)
    assert gpu.trouble(torch.device("cuda", 0)) == "triton is not installed"
    x = torch.ones(1, 16, 4, 4, requires_grad=True)
    with dispatch.backend("kernels"):
        assert type(registry.create_block("cbam", 16)(x).grad_fn).__name__ == "RescaleBackward"


# --- which form ---------------------------------------------------------------------------------------


def test_thresholds_by_hand() -> None:
    """A form is taken from the size on from which it wins at all larger ones too; a win in between does not count."""

    def row(elements: int, plain: float, lean: float, **more: float) -> dict[str, float]:
        return {"elements": elements, "plain": plain, "lean": lean, **more}

    assert crossover.thresholds([]) == Thresholds()
    rows = [
        row(8, 1, 0.5, kernels=2),
        row(1, 1, 2, kernels=3),
        row(4, 1, 2, kernels=0.5),
        row(2, 1, 0.5, kernels=2),
    ]
    assert crossover.thresholds(rows) == Thresholds(8, None)
    rows[0]["kernels"] = 0.4
    assert crossover.thresholds(rows) == Thresholds(8, 4)
    assert crossover.thresholds([row(2, 2, 1), row(1, 2, 1)]) == Thresholds(1, None)
    forms = [Thresholds(8, 32).form(n) for n in (7, 8, 31, 32)]
    assert forms == ["plain", "lean", "lean", "kernels"]
    assert Thresholds().form(10**9) == "plain"


@pytest.fixture
def card(monkeypatch, tmp_path: Path) -> Any:
    """A CUDA device that is none: a name, a cache folder, what is measured; `x(n)` is a map of n elements there."""
    made = SimpleNamespace(
        name="Card", measured=[], rows=[], cache=tmp_path / "attninject" / "crossover.json"
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(crossover.VARIABLE, raising=False)
    monkeypatch.setattr(crossover, "_found", {})
    monkeypatch.setattr(crossover, "SHIPPED", tmp_path / "crossover.json")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: made.name)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    def rows(kind: type, *about: Any) -> list[dict[str, float]]:
        made.measured.append((kind.__name__, torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        if not made.rows:
            raise torch.OutOfMemoryError("no memory")
        return made.rows

    monkeypatch.setattr(crossover, "_rows", rows)
    made.form = lambda n, least=16: crossover.form(torch.ones(1, 1, 1, n), SE, least)
    return made


def test_an_unknown_card_is_measured_once_and_remembered(card, monkeypatch) -> None:
    """In a thread where neither autocast nor `no_grad` holds; the next process reads the file."""
    card.rows = [{"elements": 64, "plain": 2.0, "lean": 1.0, "kernels": 0.5}]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert card.form(64) == "kernels"
    assert card.form(63) == "plain"
    assert card.measured == [("SE", True, False)]
    monkeypatch.setattr(crossover, "_found", {})
    assert card.form(64) == "kernels"
    assert len(card.measured) == 1
    ((name, entries),) = json.loads(card.cache.read_text())["cards"].items()
    assert name.startswith("Card, attninject ")
    assert entries == {"se float32 NCHW": {"lean": 64, "kernels": 64}}
    card.cache.write_text('{"cards": {"' + name + '": {"se float32 NCHW": {"lean": "many", "kernels": 1}}}}')
    monkeypatch.setattr(crossover, "_found", {})
    assert card.form(64) == "kernels"  # a damaged file is as good as none
    assert len(card.measured) == 2


@pytest.mark.parametrize("why", ["opted out", "capturing", "deterministic", "no memory"])
def test_what_is_not_measured_is_guessed(card, why: str, monkeypatch) -> None:
    """No kernels then, and the lean form from 64 times as many elements as on a CPU."""
    card.rows = [] if why == "no memory" else [{"elements": 1, "plain": 2.0, "lean": 1.0, "kernels": 0.5}]
    if why == "opted out":
        monkeypatch.setenv("ATTNINJECT_MEASURE", "0")
    if why == "capturing":
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    if why == "deterministic":
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert [card.form(n) for n in (16 * 64 - 1, 16 * 64)] == ["plain", "lean"]
    assert len(card.measured) == (why == "no memory")
    assert not card.cache.exists()
    monkeypatch.setattr(crossover, "_read", lambda file: pytest.fail("no forward reads the files again"))
    assert card.form(16) == "plain"


def test_kernels_are_measured_only_if_asked_for(monkeypatch) -> None:
    """No card has run them, and their fault would end the caller's training; what is kept says which it was."""
    monkeypatch.setattr(crossover, "BATCHES", (1,))
    monkeypatch.setattr(crossover, "_seconds", lambda call, x: 1.0)
    monkeypatch.setattr(crossover.gpu, "serves", lambda x: True)
    about = SE, torch.device("cpu"), torch.float32, True
    monkeypatch.delenv(crossover.VARIABLE, raising=False)
    (row,), plain = crossover._rows(*about), crossover._versioned("Card")
    assert row.keys() == {"elements", "plain", "lean"}
    monkeypatch.setenv(crossover.VARIABLE, "kernels")
    (row,) = crossover._rows(*about)
    assert row.keys() == {"elements", "plain", "lean", "kernels"}
    assert crossover._versioned("Card") == f"{plain}, kernels"


def test_a_shipped_card_is_not_measured(card) -> None:
    """The file's numbers hold, whatever the versions."""
    crossover.SHIPPED.write_text(crossover.written({"Card": {"se float32 NCHW": Thresholds(8, 32)}}))
    assert [card.form(n) for n in (7, 8, 32)] == ["plain", "lean", "kernels"]
    assert card.measured == []


def test_the_shipped_file_can_be_read() -> None:
    """It is in the package, and every entry is one of a block, a dtype and a layout."""
    found = crossover._read(crossover.SHIPPED)
    assert json.loads(crossover.written(found)) == json.loads(crossover.SHIPPED.read_text(encoding="utf-8"))
    for entries in found.values():
        assert {name.split()[0] for name in entries} <= set(registry.list_blocks())


# --- parts that run on a CPU too ----------------------------------------------------------------------


@pytest.mark.parametrize("last", [False, True])
def test_a_product_with_a_shift(last: bool) -> None:
    """Wᵀ g and a number per channel, added to a map of either layout at once."""
    out, g = noise(2, 6, 5, dtype=torch.float64), noise(2, 3, 5, seed=1, dtype=torch.float64)
    w, shift = noise(3, 6, seed=2, dtype=torch.float64), noise(2, 6, seed=3, dtype=torch.float64)
    expected = out + w.T @ g + shift.unsqueeze(2)
    made = out.mT.contiguous().mT if last else out.clone()
    primitives.projected_back_onto(made, w, g, shift)
    torch.testing.assert_close(made, expected)


@pytest.mark.parametrize(("d", "e"), [(32, 512), (5, 300), (200, 700), (256, 257)])
def test_heads_of_equal_size_in_pieces(d: int, e: int) -> None:
    """A wide v, cut into heads that flash kernels take: the same result and gradients, no head above 256."""
    given = [noise(2, 1, n, width, seed=width, dtype=torch.float64) for n, width in ((7, d), (9, d), (9, e))]
    results, heads = [], []

    def watched(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *more: Any) -> torch.Tensor:
        heads.append((q.shape[3], k.shape[3], v.shape[3]))
        return fused(q, k, v, *more)

    fused = attend.attention
    for call in (attend.attend, attend.in_pieces):
        tensors = [t.clone().requires_grad_() for t in given]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(attend, "attention", watched)
            y = call(*tensors, 0.3)
        y.backward(noise(2, 1, 7, e, seed=5, dtype=torch.float64))
        results.append([y.detach(), *(t.grad for t in tensors)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
    assert len(set(heads[1])) == 1
    assert heads[1][0] <= attend.WIDEST
