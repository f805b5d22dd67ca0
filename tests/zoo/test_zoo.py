"""The zoo: that its checks can fail, that its sweep survives what models do to it, that its tables say what rows hold."""

from __future__ import annotations

import copy
import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import attninject as ai
from attninject import models
from attninject.anatomy.places import PLACES
from attninject.cli import main
from attninject.observe.example_inputs import Inputs
from attninject.zoo import coverage, guarantees, row_file, subjects, sweeping, tables

PATIENT = sweeping.Limits(300, 2**40)
SMALL = {  # by kind of trunk: tokens, NHWC, container that hides its children, detector, clip, flow, segmentation
    "timm/test_convnext": {"stage_end": 4, "residual_branch": 9},
    "timm/test_mambaout": {"stage_end": 4},
    "timm/pvt_v2_b0": {"stage_end": 4, "residual_branch": 16},
    "torchvision/mobilenet_v3_small": {"residual_branch": 6},
    "torchvision/lraspp_mobilenet_v3_large": {"residual_branch": 10},
    "torchvision/fasterrcnn_mobilenet_v3_large_320_fpn": {"residual_branch": 10},
}


class Net(nn.Module):
    """One convolution in a Sequential, a residual unit, and a head that reads it all."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.last = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.last(self.body(x)).mean((2, 3)))


RULE = {"block": "cbam", "after": "body.2", "args": {"reduction": 4}}


def bare(net: nn.Module | None = None) -> guarantees.Bare:
    """A small net that looks trained, with inputs."""
    torch.manual_seed(0)
    inputs = Inputs((torch.randn(2, 3, 8, 8),))
    return guarantees.Bare(subjects.randomise(net or Net()), subjects.Calls(inputs, inputs))


def findings(of: guarantees.Bare, **rule: Any) -> dict[str, dict[str, str]]:
    """All findings at one place."""
    return guarantees.check(of, {**RULE, **rule}, coverage.CHEAP)[1]["checks"]


# --- checks ------------------------------------------------------------------------------------


def test_every_promise_is_checked_and_holds_on_a_plain_net() -> None:
    """Each check that is explained is made, and passes."""
    of = bare()
    found = findings(of)
    together = guarantees.check_together(of, [RULE], "")
    assert list({**found, **together}) == list(guarantees.MEANING)
    assert {f["status"] for f in (*found.values(), *together.values())} == {"ok"}
    assert ai.injected(of.model) == {}


def _twice(model: nn.Module) -> None:
    block = next(iter(ai.injected(model).values()))
    model.get_submodule("last").register_forward_pre_hook(lambda m, given: (block(given[0]),))


def _cut(model: nn.Module) -> None:
    block = next(iter(ai.injected(model).values()))
    block.register_forward_hook(lambda m, given, out: given[0])


def _shared(model: nn.Module) -> None:
    model.__class__ = type("Net", (type(model),), {"__deepcopy__": lambda self, memo: self})


def _unpickled(model: nn.Module) -> None:
    model.note = lambda: None


def _other_tensor(model: nn.Module) -> None:
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())


def _doubled(model: nn.Module) -> None:
    model.head.register_forward_hook(lambda m, given, out: out * 2)


def _counting(model: nn.Module) -> None:
    def count(norm: nn.Module, given: Any, out: torch.Tensor) -> None:
        if norm.training:
            norm.num_batches_tracked.add_(1)

    model.body[1].register_forward_hook(count)


@pytest.mark.parametrize(
    ("harm", "noticed"),
    [
        (_twice, {"once"}),
        (_cut, {"gradient", "deepcopy"}),
        (_shared, {"deepcopy", "eject"}),
        (_unpickled, {"pickle"}),
        (_other_tensor, {"kept", "eject"}),
        (_doubled, {"eval", "train", "pickle", "eject"}),
        (_counting, {"train"}),
    ],
    ids=lambda value: value.__name__ if callable(value) else None,
)
def test_a_broken_promise_is_noticed(
    harm: Callable[[nn.Module], None], noticed: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Damage done on injection turns up under the promise that it breaks, and under no unrelated one."""
    of, inject = bare(), ai.inject

    def harmful(model: nn.Module, plan: Any) -> None:
        inject(model, plan)
        harm(model)

    monkeypatch.setattr(guarantees.api, "inject", harmful)
    found = findings(of)
    failed = {name for name, f in found.items() if f["status"] == "failed"}
    assert noticed <= failed <= noticed | {"pickle"}  # the harm itself may not pickle
    assert all(f["detail"] for f in found.values() if f["status"] == "failed")


def test_a_block_that_changes_the_function_is_noticed() -> None:
    """The published gate is no identity: the output in both modes differs, all else holds."""
    found = findings(bare(), init="paper")
    failed = {name for name, f in found.items() if f["status"] == "failed"}
    assert {"eval", "train"} <= failed <= {"eval", "train", "pickle", "deepcopy"}
    assert "differs by up to" in found["eval"]["detail"]


def test_blocks_whose_positions_nobody_reads_are_told_from_blocks_cut_off() -> None:
    """Where the bare model reads the class token alone, a missing gradient is not the injection's fault."""

    class Corner(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.body(x)
            return self.head(self.last(y * 0).mean((2, 3)))

    found = findings(bare(Corner()))
    assert found["gradient"]["status"] == "bare"
    assert "reads no position where the block is" in found["gradient"]["detail"]
    assert "body.2.cbam" in found["gradient"]["detail"]
    assert found["deepcopy"]["status"] == "ok"  # though no change to a block changes the copy's output


def test_what_the_bare_model_cannot_do_is_not_held_against_the_injected_one() -> None:
    """A model that looks at its numbers cannot be exported or compiled in one graph with or without blocks."""

    class Looks(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x + 1 if float(x.sum()) > 1e9 else x)

    found = guarantees.check_together(bare(Looks()), [RULE], "")
    assert {name: f["status"] for name, f in found.items()} == {"export": "bare", "compile": "bare"}
    assert "not in one graph, with breaks the same output" in found["compile"]["detail"]


def test_a_graph_break_of_ours_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where only the injected model breaks the graph, compile fails the check."""
    from attninject.blocks import registry

    kind = type(registry.create_block("cbam", 8))
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: (print(end=""), forward(self, x))[1])
    found = guarantees.check_together(bare(), [RULE], "")
    assert found["compile"]["status"] == "failed"


def test_a_randomised_net_has_nothing_at_zero() -> None:
    """No norm, scale, bias or head is left at a value under which any block would look like the identity."""
    model = subjects.build("timm/resnet18")
    at_rest = [n for n, p in model.named_parameters() if p.abs().max() == 0]
    assert any(n.endswith("bn2.weight") for n in at_rest)
    subjects.randomise(model)
    assert [n for n, p in model.named_parameters() if p.abs().max() < 1e-3] == []
    assert [n for n, p in model.named_parameters() if p.ndim == 1 and p.std() == 0] == []
    assert all(b.std() > 0.1 for n, b in model.named_buffers() if "running" in n)


# --- rows --------------------------------------------------------------------------------------


def test_a_row_says_all_about_one_model() -> None:
    """Sites by mechanism, reasons, times, and every promise at every place."""
    row = coverage.row("timm/test_resnet", coverage.Asked(("stage_end", "residual_branch")))
    assert (row["status"], row["family"], row["device"]) == ("green", "timm/resnet", "cpu")
    branches, ends = row["places"]["residual_branch"], row["places"]["stage_end"]
    assert (branches["graph"], branches["module"], ends["sites"]) == (4, 0, 4)
    assert ends["reasons"] == {"owner is a container (Sequential)": 4}
    assert row["together"]["checks"] == {"export": {"status": "ok"}, "compile": {"status": "ok"}}
    assert json.loads(json.dumps(row)) == row


def test_every_place_is_swept_with_values_and_one_that_a_net_lacks_is_no_failure() -> None:
    """Of a densely connected net: where it has the place, output, gradient and calls; elsewhere why it has none."""
    row = coverage.row("timm/test_mambaout", coverage.Asked(level="cheap"))
    assert row["status"] == "green"
    assert set(row["places"]) == set(PLACES) == set(coverage.DEFAULT_PLACES)
    absent = {p for p, e in row["places"].items() if e["status"] == "absent"}
    assert absent == {"decoder_end"}
    assert "has no place 'decoder_end'" in row["places"]["decoder_end"]["error"]
    for place in set(PLACES) - absent:
        assert {"eval", "train", "once", "gradient"} <= set(row["places"][place]["checks"])


def test_a_shortcut_that_nobody_reads_is_told_from_a_block_cut_off() -> None:
    """Before a module too: the bare model reads no position of what enters it."""

    class Last(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.last(self.body(x))[:, :, 0, 0] * 0 + x.mean((2, 3)).sum(1, keepdim=True))

    found = guarantees.check(
        bare(Last()), {"block": "cbam", "before": "last", "args": {"reduction": 4}}, coverage.CHEAP
    )
    assert found[1]["checks"]["gradient"]["status"] == "bare"


@pytest.mark.parametrize("name", SMALL)
def test_small_nets_of_many_kinds_are_green(name: str) -> None:
    """Every promise but export and compile, at a known number of sites."""
    row = coverage.row(name, coverage.Asked(("stage_end", "residual_branch"), level="cheap"))
    assert tables.reasons(row) == []
    assert row["status"] == "green"
    assert {p: row["places"][p]["sites"] for p in SMALL[name]} == SMALL[name]


def test_a_net_that_reads_its_class_token_alone_says_so() -> None:
    """The last block's patches have no reader; the row is not green without a word."""
    row = coverage.row("timm/test_vit", coverage.Asked(("stage_end",), level="cheap"))
    assert row["status"] == "bare"
    assert row["places"]["stage_end"]["checks"]["gradient"]["status"] == "bare"


def test_quantized_models_are_refused_with_what_to_do() -> None:
    """The row is `refused`, with the library's own message."""
    row = coverage.row("torchvision/quantized_resnet18", coverage.Asked())
    assert row["status"] == "refused"
    assert "is quantized; inject into the float model" in row["error"]
    assert coverage.row("torchvision/quantized_resnet18", coverage.Asked(meta=True))["status"] == "refused"


def test_on_meta_the_structure_is_checked_and_the_calls_are_counted() -> None:
    """No value is compared, and the row says where it was made."""
    row = coverage.row("timm/test_resnet", coverage.Asked(("stage_end",), level="cheap", meta=True))
    assert (row["status"], row["device"]) == ("green", "meta")
    assert set(row["places"]["stage_end"]["checks"]) == {
        "untouched", "kept", "eval", "once", "deepcopy", "pickle", "eject",
    }  # fmt: skip


def test_planning_all_places_at_once_finds_the_sites_of_each_alone() -> None:
    """The cheap level's one plan has the same sites as the plans one by one."""
    places = ("stage_end", "residual_branch", "block_end")
    for name in ("torchvision/vgg11", "timm/test_vit"):
        at_once = coverage.row(name, coverage.Asked(places, level="plan", meta=True))["places"]
        for place in places:
            alone = coverage.row(name, coverage.Asked((place,), level="plan", meta=True))["places"][place]
            keys = ("status", "sites", "graph", "module", "reasons")
            assert [at_once[place].get(k) for k in keys] == [alone.get(k) for k in keys]


def test_a_model_that_cannot_be_built_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """The row is `unbuildable`, with the builder's own message."""

    def fails(name: str, weights: str = "none", **more: Any) -> nn.Module:
        raise ai.AttnInjectError("no kernel for this")

    monkeypatch.setattr(coverage.subjects.models, "build", fails)
    row = coverage.row("timm/resnet18", coverage.Asked())
    assert (row["status"], "no kernel for this" in row["error"]) == ("unbuildable", True)


def test_the_sample_has_one_model_of_every_family() -> None:
    """Every file of timm and every family of torchvision is represented, by a model of its own."""
    chosen = subjects.sample()
    families = [models.family(name) for name in chosen]
    assert len(set(families)) == len(families)
    assert set(families) == {models.family(name) for name in models.names()}
    assert "timm/coat_tiny" in chosen


# --- the sweep ---------------------------------------------------------------------------------

CHEAP = coverage.Asked(("stage_end",), level="plan", meta=True)


def sweep(
    names: list[str], folder: Path, limits: sweeping.Limits = PATIENT, **more: Any
) -> list[dict[str, Any]]:
    """The rows made, in the order in which they came."""
    return [r for _, _, r in sweeping.sweep(names, CHEAP, folder=folder, limits=limits, **more)]


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the rows of two models."""
    folder = tmp_path_factory.mktemp("zoo")
    made = sweep(["timm/test_resnet", "torchvision/vgg11"], folder)
    assert [r["status"] for r in made] == ["green", "green"]
    return folder


def test_a_sweep_goes_on_where_it_was_killed(swept: Path, tmp_path: Path) -> None:
    """Rows that are there are not made again, and a line cut short is made anew and harms no other."""
    lines = (swept / row_file.ROWS).read_text().splitlines(keepends=True)
    (tmp_path / row_file.ROWS).write_text(lines[0] + lines[1][:100])
    names = ["timm/test_resnet", "torchvision/vgg11"]
    assert sweeping.to_do(names, CHEAP, tmp_path, retry=False) == ["torchvision/vgg11"]
    row_file.append(tmp_path, json.loads(lines[1]))
    assert sweeping.to_do(names, CHEAP, tmp_path, retry=False) == []
    assert [r["model"] for r in row_file.read(tmp_path)] == names


def test_a_row_that_answers_another_question_does_not_count(swept: Path) -> None:
    """Other places, another block or a higher level are examined anew."""
    names = ["timm/test_resnet"]
    for asked in (coverage.Asked(), coverage.Asked(("stage_end",), "se", "plan", True)):
        assert sweeping.to_do(names, asked, swept, retry=False) == names


def test_retry_examines_again_only_what_was_not_green(tmp_path: Path) -> None:
    """A newer green row takes a model off the list."""
    old = {"model": "a", "family": "timm/a", "asked": CHEAP.to_dict(), "status": "failed"}
    row_file.append(tmp_path, old)
    row_file.append(tmp_path, {**old, "model": "b", "status": "green"})
    assert sweeping.to_do(["a", "b"], CHEAP, tmp_path, retry=False) == []
    assert sweeping.to_do(["a", "b"], CHEAP, tmp_path, retry=True) == ["a"]
    row_file.append(tmp_path, {**old, "status": "green"})
    assert sweeping.to_do(["a", "b"], CHEAP, tmp_path, retry=True) == []


@pytest.mark.parametrize(
    ("limits", "said"),
    [(sweeping.Limits(0.0, 2**40), "took longer than 0 s"), (sweeping.Limits(300, 1), "GiB of memory")],
    ids=["time", "memory"],
)
def test_a_model_that_takes_too_much_costs_its_own_row_only(
    limits: sweeping.Limits, said: str, tmp_path: Path
) -> None:
    """The process is ended, the row says why, and the sweep comes to its end."""
    made = sweep(["timm/test_resnet", "torchvision/vgg11"], tmp_path, limits)
    assert [r["status"] for r in made] == ["failed", "failed"]
    assert all(said in r["error"] for r in made)
    assert [r["model"] for r in row_file.read(tmp_path)] == ["timm/test_resnet", "torchvision/vgg11"]


def test_a_process_that_dies_costs_its_own_row_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """The row names the signal; the next model gets a fresh process."""
    worker = sweeping.Worker(CHEAP, PATIENT, 1)
    worker.process.kill()
    assert worker.ask("timm/test_resnet") == (None, "its process ended with signal 9")
    assert worker.spent
    worker.end()


# --- tables ------------------------------------------------------------------------------------


def entry(graph: int, module: int, **more: Any) -> dict[str, Any]:
    """A place's entry."""
    checks = {"eval": {"status": "ok"}, **more.pop("checks", {})}
    return {"block": "cbam", "status": "green", "sites": graph + module, "graph": graph, "module": module,
            "reasons": {"owner is the model": module} if module else {}, "plan_seconds": 0.1,
            "checks": checks, **more}  # fmt: skip


def row(model: str, family: str, status: str = "green", **more: Any) -> dict[str, Any]:
    """A row."""
    return {"model": model, "family": family, "status": status, "device": "cpu", "build_seconds": 0.2,
            "asked": coverage.Asked().to_dict(), "seconds": 1.0, "parameters": 10, **more}  # fmt: skip


ROWS = [
    row("timm/a", "timm/x", places={"stage_end": entry(0, 4), "residual_branch": entry(8, 0)}),
    row("timm/b", "timm/x", "failed", places={
        "stage_end": entry(1, 2, status="failed", checks={"train": {"status": "failed", "detail": "differs"}}),
        "residual_branch": {"block": "cbam", "status": "absent", "error": "no such place"}}),
    row("timm/c", "timm/y", "unbuildable", error="no | kernel"),
    row("torchvision/q", "torchvision/quantization.resnet", "refused", error="is quantized"),
]  # fmt: skip


def test_the_markdown_sums_by_family_and_names_what_is_not_green() -> None:
    """A row per family, torchvision first; a row per reason, with the models that it holds for."""
    text = tables.to_markdown(ROWS)
    lines = text.splitlines()
    at = [i for i, line in enumerate(lines) if line.startswith(("| torchvision/q", "| timm/x", "| timm/y"))]
    assert lines[at[0]] == "| torchvision/quantization.resnet | 1 | 0 | 0 | 0 | – | – |"
    assert lines[at[1]] == "| timm/x | 2 | 2 | 1 | 1 | 1 + 6 | 8 + 0 |"
    assert "| timm/b | stage_end, train: differs |" in lines
    assert "| timm/c | no ¦ kernel |" in lines
    assert "| torchvision/q | quantized: refused, with what to do instead |" in lines
    assert "- `residual_branch`: 1 of 1 models that have it, 8 sites, 8 by local graph (100.0 %)" in lines
    assert lines[1] == (
        "- `stage_end`: 1 of 2 models that have it, 7 sites, 1 by local graph (14.3 %); "
        "at the module: owner is the model (6)"
    )


def test_the_summary_compares_planning_with_building() -> None:
    """A plan that takes longer than the build, and longer than 0.3 s, is counted with its ratio."""
    slow = copy.deepcopy(ROWS[0])
    slow["places"]["stage_end"]["plan_seconds"] = 0.6
    planning = tables.summary([slow, ROWS[1]])["planning"]
    assert planning == {"models": 2, "slower": {"timm/a": 2.0}}


def test_the_csv_has_a_line_per_model_and_place() -> None:
    """Readable by machines, with the reason where there is one."""
    lines = list(csv.DictReader(io.StringIO(tables.to_csv(ROWS))))
    assert [(n["model"], n["place"], n["sites"]) for n in lines[:2]] == [
        ("timm/a", "stage_end", "4"),
        ("timm/a", "residual_branch", "8"),
    ]
    assert lines[2]["reason"] == "train: differs"
    assert lines[-1]["reason"] == "is quantized"


def test_of_several_rows_of_a_model_the_one_that_says_most_counts() -> None:
    """A full row with values outweighs a newer plan on meta; of equals, the newest."""
    weak = row("timm/a", "timm/x", asked=CHEAP.to_dict(), device="meta")
    strong = row("timm/a", "timm/x", "failed", places={"stage_end": entry(1, 0)})
    newer = {**strong, "status": "green"}
    assert tables.strongest([strong, weak]) == [strong]
    assert tables.strongest([weak, strong, newer]) == [newer]


# --- the command -------------------------------------------------------------------------------


def test_the_command_makes_rows_and_prints_their_table(
    swept: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With rows in the folder nothing is made anew; all three forms print."""
    folder = str(swept)
    given = ["zoo", "timm/test_resnet", "--out", folder, "--level", "plan", "--meta", "--place", "stage_end"]
    assert main(given) == 0
    assert "| timm/resnet | 1 | 1 | 1 | 0 | 0 + 4 |" in capsys.readouterr().out
    assert main(["zoo", "--table", folder, "--csv"]) == 0
    assert capsys.readouterr().out.count("\n") == 3
    assert main(["zoo", "--table", folder, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["summary"]["models"] == 2


def test_a_name_that_no_model_has_is_refused_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 1 and one paragraph."""
    assert main(["zoo", "timm/resnet_18"]) == 1
    assert "timm/resnet18" in capsys.readouterr().err


def test_a_block_that_nobody_knows_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    """One line with the nearest name, before any model is built."""
    with pytest.raises(SystemExit) as stop:
        main(["zoo", "timm/resnet18", "--block", "cbma"])
    said = capsys.readouterr().err
    assert (stop.value.code, said.count("\n"), "did you mean 'cbam'?" in said) == (2, 1, True)


@pytest.mark.parametrize(
    "given", [[], ["--table", "nowhere"], ["--sample", "--all"], ["x", "--place", "stage"]]
)
def test_wrong_usage_ends_with_code_two(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing to examine, no rows, contradictions, unknown places."""
    with pytest.raises(SystemExit) as stop:
        main(["zoo", *given])
    assert stop.value.code == 2


# --- the whole sample --------------------------------------------------------------------------


@pytest.mark.zoo
def test_every_family_is_green(tmp_path: Path) -> None:
    """One small model of every file of timm and family of torchvision keeps every promise."""
    made = sweeping.sweep(
        subjects.sample(), coverage.Asked(), folder=tmp_path, limits=sweeping.Limits(900, 12 * 2**30)
    )
    wrong = [tables.one_line(r) for _, _, r in made if r["status"] not in ("green", "bare", "refused")]
    assert wrong == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["timm/test_resnet", "timm/test_convnext"])
def test_inductor_compiles_in_one_graph(name: str) -> None:
    """torch.compile with its own backend gives what the injected model gives."""
    model = subjects.randomise(subjects.build(name))
    given = subjects.calls(name, model).eval.args
    ai.inject(model, block="cbam", place="residual_branch")
    with torch.no_grad(), subjects.quiet():
        wanted = model(*given)
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(*given), wanted, rtol=1e-3, atol=1e-3)
    torch._dynamo.reset()
