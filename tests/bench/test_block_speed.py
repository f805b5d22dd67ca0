"""The benchmark of blocks: that peers compute what ours computes, and that figures are what they are called."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attninject.bench import block_speed, measure, peers
from attninject.bench.block_speed import OURS, Case
from attninject.cli import main

LAYER_NORM = {("gc", "timm"): 1e-4}
"""timm's layer norm has another epsilon."""
PAIRS = [(name, peer) for name, subject in peers.SUBJECTS.items() for peer in subject.peers]


def case(name: str = "se", size: tuple[int, ...] = (2, 64, 9, 7), memory_format: str = "NCHW") -> Case:
    return Case(name, size, memory_format, "float32", "cpu")


# --- the peers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory_format", block_speed.FORMATS)
@pytest.mark.parametrize(("name", "peer"), PAIRS, ids=[f"{n}-{p}" for n, p in PAIRS])
def test_a_peer_computes_what_ours_computes(name: str, peer: str, memory_format: str) -> None:
    """With our weights, in float64: the output and the map's gradient agree, and neither is trivial."""
    if peer == "mmcv" and importlib.util.find_spec("mmcv") is None:
        pytest.skip("mmcv is not installed")
    one = case(name, memory_format=memory_format)
    modules, _ = block_speed.contenders(one)
    if peer not in modules:
        pytest.skip(f"this {peer} has no {name}")
    x, gradient = one.tensor(0).double().requires_grad_(), one.tensor(1).double()
    ours = block_speed.results(modules[OURS].double(), x, gradient)
    theirs = block_speed.results(modules[peer].double(), x, gradient)
    assert block_speed.distance(ours, theirs) < LAYER_NORM.get((name, peer), 1e-9)
    assert block_speed.distance(ours, [x.detach(), gradient]) > 1e-3


def test_every_block_has_the_papers_formula_beside_it() -> None:
    """A formula for each row; timm's module wherever timm has one of the same function."""
    assert all("formula" in subject.peers for subject in peers.SUBJECTS.values())
    assert {n for n, s in peers.SUBJECTS.items() if "timm" in s.peers} == {
        "se", "channel_attention", "spatial_attention", "cbam", "eca", "gc", "coord", "nonlocal",
    }  # fmt: skip


def test_a_map_far_from_ours_is_far() -> None:
    """The distance that decides is of the order of the disturbance."""
    a = [torch.ones(10, 10), torch.ones(3)]
    assert block_speed.distance(a, a) == 0
    assert block_speed.distance(a, [torch.full((10, 10), 1.25), torch.ones(3)]) == pytest.approx(0.25)


class Halved(peers.SE):
    """SE with a slip: half of what it should be."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


class Failing(peers.SE):
    """A module that has no backward for this map."""

    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("view size is not compatible\nand a second line")


def _missing(channels: int) -> nn.Module:
    raise ImportError("no such library", name="mmcv")


def test_peers_that_differ_or_fail_are_left_out_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """No ratio is given to a peer that computes something else, cannot run, or is not installed."""
    more = {"wrong": peers.Peer(Halved), "broken": peers.Peer(Failing), "absent": peers.Peer(_missing)}
    subject = peers.SUBJECTS["se"]
    changed = dataclasses.replace(subject, peers={**subject.peers, **more})
    monkeypatch.setitem(peers.SUBJECTS, "se", changed)
    result = block_speed.blocks(only=["se"], sizes=[(1, 16, 5, 4)], formats=["NCHW"], rounds=1)
    (row,) = result["rows"]
    assert not {"wrong", "broken", "absent"} & set(row["seconds"])
    assert row["skipped"] == {
        "absent": "not installed (mmcv)",
        "wrong": "computes something else, off by 0.5",
        "broken": "RuntimeError: view size is not compatible",
    }
    text = block_speed.to_markdown(result)
    assert "Left out: absent: not installed (mmcv)." in text
    assert "Left out: wrong in se (NCHW): computes something else, off by 0.5." in text


# --- one case -------------------------------------------------------------------------------------


def test_small_run_has_every_figure() -> None:
    """A large and a small map, both formats: all there, JSON-ready, peers measured."""
    sizes = [(1, 16, 200, 160), (1, 16, 5, 4)]
    lines: list[str] = []
    result = block_speed.blocks(only=["se"], sizes=sizes, rounds=2, seconds=0, progress=lines.append)
    json.dumps(result)
    assert len(result["rows"]) == len(lines) == 4
    for row in result["rows"]:
        assert {OURS, "formula", "timm"} <= set(row["seconds"])
        assert row["rounds"] == 2
        assert row["map_bytes"] == 4 * torch.Size(row["size"]).numel()
        assert row["small"] == (row["size"][2] == 5)
        assert set(row["saved"]) == set(row["peak"]) == set(row["seconds"])
        assert all(block_speed.AGREEMENT[torch.float32] > d for d in row["difference"].values())
    text = block_speed.to_markdown(result, details=True)
    assert "| float32 | 16×200×160 NCHW | 16×200×160 channels_last | 16×5×4 NCHW |" in text
    assert "### 1×200×160" not in text
    assert "### 1×16×200×160, float32" in text
    assert result["machine"]["versions"]["torch"] == torch.__version__
    assert result["machine"]["threads"] == 1


def test_the_formulas_saved_bytes() -> None:
    """SE's formula keeps the map and little else; CBAM's keeps two maps: what the figures are compared with."""
    size = (1, 64, 40, 40)
    for name, maps in (("se", 1), ("cbam", 2)):
        row = block_speed.measured(case(name, size), rounds=1)
        assert maps <= row["saved"]["formula"] / row["map_bytes"] < maps + 0.15
        assert row["peak"]["formula"] >= row["saved"]["formula"]


def test_a_step_leaves_no_gradient_and_reaches_every_weight() -> None:
    """Each call differentiates the map and all weights, and cleans up."""
    one = case("cbam")
    modules, _ = block_speed.contenders(one)
    module, x = modules[OURS], one.tensor(0).requires_grad_()
    touched: list[str] = []
    for name, p in (*module.named_parameters(), ("x", x)):
        p.register_hook(lambda grad, name=name: touched.append(name))
    block_speed.step(module, x, one.tensor(1))()
    assert set(touched) == {"x", *(name for name, _ in module.named_parameters())}
    assert x.grad is None
    assert all(p.grad is None for p in module.parameters())


def test_maps_of_pairwise_blocks_are_cut() -> None:
    """Where time is quadratic in many positions, fewer samples; a size that was asked for is kept."""
    cases = block_speed._cases(["se", "nonlocal", "danet_cam"], None, ["NCHW"], None, "cpu")
    sizes = {(c.name, c.size) for c in cases}
    assert ("nonlocal", (1, 256, 56, 56)) in sizes
    assert ("nonlocal", (8, 1024, 14, 14)) in sizes
    assert ("se", (8, 256, 56, 56)) in sizes
    assert ("danet_cam", (8, 256, 56, 56)) in sizes  # quadratic in channels
    (asked,) = block_speed._cases(["nonlocal"], [(8, 256, 56, 56)], ["NCHW"], None, "cpu")
    assert asked.size == (8, 256, 56, 56)
    dtypes = {c.dtype for c in block_speed._cases(["se"], None, ["NCHW"], None, "cuda")}
    assert dtypes == {"float32", "bfloat16"}


def test_scrambled_weights_are_no_starting_values() -> None:
    """Nothing is at zero or one, and the same seed gives the same."""
    modules = [block_speed.contenders(case("nonlocal"))[0][OURS] for _ in range(2)]
    for a, b in zip(modules[0].parameters(), modules[1].parameters(), strict=True):
        assert torch.equal(a, b)
        assert 0 not in a
        assert not torch.all(a == a.flatten()[0]) or a.numel() == 1


@pytest.mark.slow
def test_the_compiled_form_is_measured_when_asked_for() -> None:
    """`compiled` adds a contender that agrees."""
    result = block_speed.blocks(only=["se"], sizes=[(2, 16, 9, 7)], rounds=1, compiled=True, formats=["NCHW"])
    assert block_speed.COMPILED in result["rows"][0]["peer_over_ours"]


# --- arithmetic -----------------------------------------------------------------------------------


def row(block: str, small: bool, **times: float) -> dict[str, Any]:
    """A row whose contenders took these times."""

    def same(value: float) -> dict[str, float]:
        return {"median": value, "q1": value, "q3": value}

    ours = times[OURS]
    return {
        "block": block,
        "small": small,
        "size": [1, 2, 3, 4],
        "format": "NCHW",
        "seconds": {name: same(value) for name, value in times.items()},
        "peer_over_ours": {n: same(t / ours) for n, t in times.items() if n != OURS},
    }


def test_summary_is_the_geometric_mean_against_the_fastest_peer() -> None:
    """Our own other forms are no peers; large and small maps are kept apart; the worst is named."""
    rows = [
        row("se", False, **{OURS: 1.0, "ours plain": 0.1, "formula": 4.0, "timm": 2.0}),
        row("se", False, **{OURS: 1.0, "formula": 8.0}),
        row("bam", False, **{OURS: 2.0, "formula": 1.0}),
        row("se", True, **{OURS: 1.0, "formula": 0.5, "timm": 3.0}),
    ]
    found = block_speed.summary(rows)
    assert found["large"] == pytest.approx((2 * 8 * 0.5) ** (1 / 3))
    assert found["small"] == pytest.approx(0.5)
    assert found["blocks"] == pytest.approx({"se": 4.0, "bam": 0.5})
    assert found["worst_large"]["block"] == "bam"
    assert block_speed.fastest_peer(rows[0]) == "timm"
    assert block_speed.summary([row("se", False, **{OURS: 1.0})])["large"] is None


def test_spread_and_means() -> None:
    """Medians, quartiles, ratios within rounds, geometric mean."""
    assert measure.spread([5.0, 1.0, 2.0, 4.0, 3.0]) == {"median": 3.0, "q1": 2.0, "q3": 4.0}
    assert measure.spread([7.0]) == {"median": 7.0, "q1": 7.0, "q3": 7.0}
    assert measure.ratios([2.0, 9.0, 4.0], [1.0, 3.0, 4.0])["median"] == 2.0
    assert measure.geometric_mean([2.0, 8.0]) == pytest.approx(4.0)
    assert measure.geometric_mean([]) is None


def test_contenders_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """One figure per round and contender, the first place alternating; a long case stops after `least` rounds."""
    order: list[str] = []
    works = {name: (lambda name=name: order.append(name)) for name in "ab"}
    taken = measure.interleaved(works, 4, sample=0)
    assert {name: len(t) for name, t in taken.items()} == {"a": 4, "b": 4}
    assert "".join(order) == "aabb" + "ba" + "ab" + "ba" + "ab"
    assert len(measure.interleaved(works, 9, enough=-1.0, least=3, sample=0)["a"]) == 3
    monkeypatch.setattr(
        measure, "seconds", lambda work, device, times=1: [work() for _ in range(times)] and 0.004
    )
    order.clear()
    measure.interleaved(works, 1, sample=0.02)
    assert "".join(order) == "aabb" + "b" * 5 + "a" * 5  # short calls are repeated within a figure


def test_a_slow_first_call_makes_no_figure_of_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """What compiles at its first call gets as many calls to a figure as another that takes as long later."""
    calls = {"compiled": 0, "eager": 0}

    def work(name: str) -> float:
        calls[name] += 1
        return 1.0 if (name, calls[name]) == ("compiled", 1) else 0.004

    monkeypatch.setattr(
        measure, "seconds", lambda work, device, times=1: sum(work() for _ in range(times)) / times
    )
    works = {name: (lambda name=name: work(name)) for name in calls}
    taken = measure.interleaved(works, 1, sample=0.02)
    assert calls == {"compiled": 7, "eager": 7}
    assert taken["compiled"] == taken["eager"]


def test_peak_counts_tensors_alive_at_once() -> None:
    """Two tensors at once and one after the other; what was there before does not count."""
    megabyte = 2**20

    def both() -> None:
        a = torch.zeros(megabyte, dtype=torch.uint8)
        a = [a, torch.zeros(megabyte, dtype=torch.uint8)]

    def in_turn() -> None:
        for _ in range(3):
            torch.zeros(megabyte, dtype=torch.uint8)

    before = torch.zeros(megabyte)
    assert measure.peak_bytes(both) == 2 * megabyte
    assert measure.peak_bytes(in_turn) == megabyte
    assert measure.peak_bytes(before.sum) < 1000


def test_peak_of_a_backward() -> None:
    """x ↦ (2x)² keeps 2x; with its result and the gradients, three more at most."""
    x = torch.ones(2**18, requires_grad=True)
    gradient = torch.ones(2**18)

    def work() -> None:
        (2 * x).square().backward(gradient)

    assert 3 * x.nbytes <= measure.peak_bytes(work) <= 5 * x.nbytes + 1000


def test_the_machine_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    """Versions, threads and whatever changes the allocator are in the text."""
    monkeypatch.setenv("MALLOC_TOP_PAD_", "1024")
    monkeypatch.setenv("LD_PRELOAD", "")
    with measure.threads(2):
        about = measure.machine()
    assert about["allocator"] == {"LD_PRELOAD": "", "MALLOC_TOP_PAD_": "1024"}
    text = block_speed.machine_line(about)
    assert "2 threads, wall time. Allocator: LD_PRELOAD=, MALLOC_TOP_PAD_=1024. Filling 25 MB takes" in text
    assert f"torch {torch.__version__}, timm " in text
    assert torch.get_num_threads() != 2 or about["threads"] == 2


def test_a_copy_moves_its_bytes_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bandwidth counts what is read and what is written."""
    monkeypatch.setattr(measure, "interleaved", lambda works, *_, **__: {"copy": [0.5, 0.25, 1.0]})
    assert measure.copy_bandwidth(size=1000) == 4000


# --- the command ----------------------------------------------------------------------------------


def test_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Any
) -> None:
    """Options reach the run; Markdown by default, --json the data, --save both."""
    asked: dict[str, Any] = {}
    real = block_speed.blocks(only=["se"], sizes=[(1, 16, 5, 4)], rounds=1)
    monkeypatch.setattr(block_speed, "blocks", lambda **given: asked.update(given) or real)
    file = tmp_path / "figures.json"
    command = [
        "bench",
        "blocks",
        "--only",
        "se,nonlocal dot product",
        "--rounds",
        "4",
        "--maps",
        "1x2x3x4,2x8x5x5",
    ]
    assert main([*command, "--device", "cpu", "--formats", "NCHW", "--compiled", "--save", str(file)]) == 0
    assert capsys.readouterr().out == block_speed.to_markdown(real) + "\n"
    assert json.loads(file.read_text()) == real
    del asked["progress"]
    assert asked == {
        "only": ["se", "nonlocal dot product"],
        "rounds": 4,
        "sizes": [(1, 2, 3, 4), (2, 8, 5, 5)],
        "device": "cpu",
        "formats": ["NCHW"],
        "dtypes": None,
        "threads": 1,
        "compiled": True,
    }
    assert main(["bench", "blocks", "--json", "--quick"]) == 0
    assert json.loads(capsys.readouterr().out) == real
    assert asked["rounds"] == 3
    assert max(torch.Size(size).numel() for size in asked["sizes"]) < block_speed.SMALL


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--only", "see"], "unknown row 'see'; did you mean se?"),
        (["--formats", "NHWC"], "unknown name 'NHWC'"),
        (["--dtypes", "float3"], "unknown name 'float3'; did you mean float32?"),
        (["--maps", "3x3"], "'3x3' is no list of maps"),
        (["--maps", "8x0x3x3"], "is no list of maps"),
    ],
)
def test_wrong_options_are_usage_errors(
    options: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2 and the nearest name."""
    with pytest.raises(SystemExit) as raised:
        main(["bench", "blocks", *options])
    assert raised.value.code == 2
    assert text in " ".join(capsys.readouterr().err.split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    """Asked for a GPU where there is none, nothing is measured on the CPU in its name."""
    with pytest.raises(SystemExit) as raised:
        main(["bench", "blocks", "--device", "cuda"])
    assert raised.value.code == 2
    assert "no CUDA device" in capsys.readouterr().err
