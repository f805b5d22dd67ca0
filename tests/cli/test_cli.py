"""The command line as a user meets it: output, messages, exit codes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import attninject as ai
from attninject import models
from attninject.cli import VERBS, main, parser_of, rule_flags
from attninject.recipe.fields import FIELDS
from attninject.recipe.loading import rule_from_fields
from attninject.recipe.rules import Rule

ROOT = Path(__file__).resolve().parents[2]
NET = "torchvision/resnet18"
TINY = "timm/test_resnet"  # where whole networks are written


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]):
    """Run a command line in this process: (exit code, standard output, standard error)."""

    def call(*argv: str) -> tuple[int, str, str]:
        try:
            code = main(argv)
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return call


def elsewhere(*argv: str, **kw: object) -> subprocess.CompletedProcess[str]:
    """Run `python -m attninject` in a process of its own."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    env = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(
        [sys.executable, "-m", "attninject", *argv], env=env, capture_output=True, text=True, **kw
    )  # type: ignore[call-overload]


# --- usage --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], "a COMMAND is required: list, sites"),
        (["plna"], "unknown command 'plna'; did you mean plan?"),
        (["list", "modles"], "unknown kind 'modles'; did you mean models?"),
        (["bench", "injct"], "unknown benchmark 'injct'; did you mean inject?"),
        (["--versoin"], "unknown flag --versoin; did you mean --version?"),
        (["plan", NET, "--blok", "se"], "unknown flag --blok; did you mean --block?"),
        (["plan", NET, "se", "--stagez", "2"], "unknown flag --stagez; did you mean --stages?"),
        (
            ["plan", NET, "se", "--min_channels=2"],
            "unknown flag --min_channels; did you mean --min-channels?",
        ),
        (["plan", NET, "se", "-stages", "2"], "unknown flag -stages; did you mean --stages?"),
        (["plan", NET, "se", "--stage", "2"], "unknown flag --stage; did you mean --stages?"),
        (["inject", NET, "se", "--outt", "f"], "unknown flag --outt; did you mean --out?"),
        (["plan", NET, "se", "more"], "unexpected argument 'more'"),
        (["plan", NET, "--block", "se", "--place", "stage_end", "--stages", "[1"], "'[1' is no value"),
        (["bench", "blocks", "--device", "gpu"], "unknown device 'gpu'; did you mean cpu?"),
        (["zoo", "--timeout", "nan"], "'nan' is no number above 0"),
        (["inject", NET, "se", "-o", ""], "'' is no file name"),
        (["bench", "inject", "--sites", ","], "',' names nothing"),
        (["zoo", "--sample", "timm/resnet18"], "leave the NAMEs out"),
        (["plan", NET, "--block", "se", "--place", "stage_end", "--call", ""], "'' is no value"),
        (["inject", NET, "se", "-o", "f", "--seed", "9" * 30], "is no seed"),
        (["visualize", NET, "a.png", "--recipe", "se"], "required: -o/--out"),
        (["visualize", NET, "a.png", "-o", "b", "--at", "5"], "'5' is no position; write it as 120,80"),
        (["visualize", NET, "a.png", "-o", "b"], "or --block with --after"),
        (["plan"], "required: MODEL"),
        (["plan", NET], "give a RECIPE (attninject list recipes), or --block"),
        (["plan", NET, "--block", "se"], "--block se needs --after, --before, --place or --replace"),
        (["plan", NET, "--after", "layer1"], "give a RECIPE"),
        (
            ["plan", NET, "se", "--block", "se", "--place", "stage_end"],
            "RECIPE 'se' and --block, --place together",
        ),
        (["plan", NET, "--block", "se", "--after", "a", "--place", "b"], "not allowed with argument --after"),
        (["plan", NET, "se", "--set", "reduction"], "'reduction' is no KEY=VALUE, such as reduction=8"),
        (["plan", NET, "se", "--set", "reduction=[1"], "is no value"),
        (["plan", NET, "se", "--input-size", "3x224x224"], "write it as 3,224,224"),
        (["inject", NET, "se"], "required: -o/--out"),
        (["demo", "--epochs", "0"], "'0' is no whole number from 1"),
        (["bench", "inject", "--rounds", "0"], "'0' is no whole number from 1"),
        (["export", "x", "--to", "pt2", "--size", "-1"], "'-1' is no whole number from 1"),
    ],
)
def test_usage_errors_exit_with_2_and_say_what_is_wrong(argv: list[str], expected: str, run) -> None:
    """A command line that cannot be understood: exit code 2, the word, the nearest right one."""
    code, out, err = run(*argv)
    assert code == 2
    assert out == ""
    assert expected in err
    command = f"attninject {argv[0]}" if argv and argv[0] in VERBS else "attninject"
    assert err.startswith(f"{command}: ")
    assert err.endswith(f" (see {command} --help)\n")
    assert err.count("\n") == 1


def test_help_shows_the_verbs(run) -> None:
    """`--help` lists every verb and exits with 0."""
    code, out, _ = run("--help")
    assert code == 0
    for verb, summary in VERBS.items():
        assert re.search(rf"\n    {verb} +{re.escape(summary)}\n", out)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_and_json(verb: str, run) -> None:
    """Each verb explains itself and every flag of it, and offers --json; --help is the last."""
    code, out, _ = run(verb, "--help")
    assert code == 0
    assert out.startswith(f"usage: attninject {verb}")
    assert "  --json " in out
    assert out.rstrip().splitlines()[-1].split()[:2] == ["-h,", "--help"]
    lines = out.splitlines()
    for line, below in zip(lines, [*lines[1:], ""], strict=True):
        if line.startswith("  -"):
            assert re.match(r"  -.*?  \S", line) or below.startswith(" " * 10), f"no help: {line}"


def test_help_shows_placeholders_and_defaults(run) -> None:
    """A flag's line says what its value is, what it means and what it is by default; the usage, what must be given."""
    out = run("finetune", "--help")[1]
    assert re.search(r"--lr FLOAT +learning rate of the backbone \(0\.0001\)\n", out)
    assert re.search(r"--epochs INT +epochs \(10\)\n", out)
    assert "usage: attninject finetune [FILE] [flags]\n" in out
    assert "usage: attninject inject MODEL [RECIPE] -o FILE [flags]\n" in run("inject", "--help")[1]
    assert "usage: attninject zoo [NAME …] [flags]\n" in run("zoo", "--help")[1]


def test_version(run) -> None:
    """`--version` prints the name and a version."""
    code, out, _ = run("--version")
    assert code == 0
    assert out.startswith("attninject ")


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["plan", "torchvision/resnet81", "se"], "torchvision/resnet18"),
        (["plan", "resnet18", "se"], "torchvision/resnet18 and timm/resnet18"),
        (["plan", NET, "se_resnt"], "se_resnet"),
        (["plan", NET, "missing.yaml"], "missing.yaml"),
        (["plan", NET, "--block", "see", "--after", "layer1"], "se"),
        (["plan", NET, "--block", "se", "--after", "layr1.*"], "layr1.*"),
        (["plan", NET, "--block", "se", "--after", "layer1.*", "--set", "redcution=8"], "reduction"),
        (["plan", NET, "se_resnet", "--weights", "nothing.pth"], "no weights file at nothing.pth"),
        (["sites", NET, "nothing_here"], "nothing_here"),
        (["plan", NET, "se", "--input-size", f"3,{10**20},8"], "no inputs of size 3,100000000000000000000,8"),
        (["inject", NET, "se", "-o", "."], ". cannot be written: it is a folder"),
        (["plan", NET, "--block", "se", "--place", "stage_end", "--stages", "x"], "the number of a stage"),
    ],
)
def test_refusals_exit_with_1_and_no_traceback(argv: list[str], expected: str, run) -> None:
    """What cannot be done is said in one paragraph on standard error; the exit code is 1."""
    code, out, err = run(*argv)
    assert code == 1
    assert out == ""
    assert err.startswith("attninject: ")
    assert expected in err
    assert "Traceback" not in err
    assert "\n\n" not in err


def test_all_faults_of_a_recipe_are_shown_with_their_lines(run, tmp_path: Path) -> None:
    """Two faults in a file: two lines, each with file, line and column."""
    file = tmp_path / "bad.yaml"
    file.write_text("rules:\n  - block: sse\n    after: layer1\n    pic: last\n", encoding="utf-8")
    code, _, err = run("plan", NET, str(file))
    assert code == 1
    assert f"{file}:2:" in err
    assert f"{file}:4:" in err


def test_a_file_that_cannot_be_written_is_a_refusal(run, tmp_path: Path) -> None:
    """`-o` into a folder that does not exist: exit code 1 and the path."""
    target = tmp_path / "no" / "such" / "run.safetensors"
    code, _, err = run("inject", NET, "se_resnet", "-o", str(target))
    assert code == 1
    assert str(target.parent) in err


def test_a_closed_pipe_is_quiet() -> None:
    """`attninject list models | head -1` prints no traceback."""
    command = f'"{sys.executable}" -m attninject list models | head -1'
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        command, shell=True, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.stdout.startswith("timm/")
    assert done.stderr == ""


# --- verbs --------------------------------------------------------------------------------------


def test_list_names_everything(run) -> None:
    """Each kind prints what Python gives, a name a line; JSON holds the same."""
    assert run("list", "recipes")[1].split() == ai.list_recipes()
    assert run("list", "places")[1].split() == ai.list_places()
    assert json.loads(run("list", "recipes", "--json")[1]) == {"recipes": ai.list_recipes()}
    assert run("list", "models", "*resnet18")[1].split() == models.names("*resnet18")


def test_list_blocks_is_a_table(run) -> None:
    """`attninject list blocks` shows a line for each block: family, dimensions, paper, equation, summary."""
    code, out, _ = run("list", "blocks")
    header, *lines = out.splitlines()
    assert code == 0
    assert header.split()[:3] == ["name", "family", "dims"]
    assert sorted(line.split()[0] for line in lines) == ai.list_blocks()
    (se,) = (line for line in lines if line.startswith("se "))
    assert se.split()[:7] == ["se", "channel", "1,2,3", "maps,", "tokens", "1709.01507", "2-4"]
    assert se.endswith("squeeze-and-excitation: a gate per channel from the mean")
    assert len(run("list", "blocks", "timm/*c")[1].splitlines()) == 1 + len(
        [name for name in ai.list_blocks() if name.startswith("timm/") and name.endswith("c")]
    )
    assert json.loads(run("list", "blocks", "--json")[1]) == {"blocks": ai.list_blocks()}


def test_list_alone_is_an_overview(run) -> None:
    """`attninject list` shows blocks, recipes and places, and how many models there are."""
    _, out, _ = run("list")
    assert "recipes: attention_unet, bam, bam_mobilenet, bam_resnet, cbam" in out
    assert f"models: {len(models.names())};" in out


def test_sites_prints_the_table_and_json(run) -> None:
    """`sites` shows path, shape, layout and type of what can be targeted."""
    _, out, _ = run("sites", NET, "layer1.0.bn*")
    assert "layer1.0.bn1" in out
    assert "layer1.0.bn2" in out
    assert "layer1.1" not in out
    rows = json.loads(run("sites", NET, "layer1.0.bn2", "--json")[1])
    assert [row["path"] for row in rows] == ["layer1.0.bn2"]
    assert rows[0]["type"] == "BatchNorm2d"
    assert rows[0]["layout"] == "NCHW"


def test_plan_prints_what_python_prints(run) -> None:
    """`plan MODEL RECIPE` is `print(ai.plan(model, recipe))`; --json is its to_dict()."""
    expected = ai.plan(models.build(NET).eval(), "cbam_resnet")
    assert run("plan", NET, "cbam_resnet")[1] == f"{expected}\n"
    assert json.loads(run("plan", NET, "cbam_resnet", "--json")[1]) == json.loads(
        json.dumps(expected.to_dict())
    )


def test_a_rule_in_options_is_that_rule(run) -> None:
    """--block, --after, --set and the other fields say what keyword arguments say; order does not matter."""
    _, out, _ = run(
        "plan", "--json", NET, "--block", "se", "--after", "layer[12].*.bn2", "--exclude", "layer1.0.**",
        "--set", "reduction=8", "--set", "bias=false", "--init", "paper", "--name", "gate", "--pick", "last",
        "--per", "stage", "--type", "BatchNorm2d",
    )  # fmt: skip
    sites = json.loads(out)["sites"]
    assert [site["name"] for site in sites] == ["layer1.1.gate", "layer2.1.gate"]
    assert all(site["args"]["reduction"] == 8 and site["args"]["bias"] is False for site in sites)
    assert {site["init"] for site in sites} == {"paper"}


GIVEN = {  # a field: what stands on the command line, and what a recipe would say
    "block": (["cross_attention"], "cross_attention"),
    "after": (["[fl]*.bn2", "layer1.*"], ["[fl]*.bn2", "layer1.*"]),
    "before": (["**.bn3"], "**.bn3"),
    "place": (["stage_end"], "stage_end"),
    "input": (["1"], 1),
    "output": (["-1"], -1),
    "layout": (["NLC"], "NLC"),
    "replace": (["**.conv2"], "**.conv2"),
    "with_": (["**.up"], "**.up"),
    "type": (["BatchNorm2d"], "BatchNorm2d"),
    "exclude": (["**.0.**"], "**.0.**"),
    "pick": (["{every: 2, offset: 1}"], {"every": 2, "offset": 1}),
    "per": (["stage"], "stage"),
    "call": (["last"], "last"),
    "stages": (["[2, -1]"], [2, -1]),
    "min_channels": (["64"], 64),
    "args": (["num_heads=4"], {"num_heads": 4}),
    "init": (["paper"], "paper"),
    "name": (["gate"], "gate"),
    "share": (["stage"], "stage"),
    "optional": ([], True),
}


def test_the_table_of_fields_is_that_of_a_rule() -> None:
    """Every field of a rule has a row, in order, and a test below."""
    assert list(FIELDS) == [spec.name for spec in fields(Rule)]
    assert set(GIVEN) == set(FIELDS)


@pytest.mark.parametrize("verb", ["plan", "inject", "finetune"])
@pytest.mark.parametrize("name", [name for name in FIELDS if name != "block"])
def test_every_field_of_a_rule_is_a_flag(name: str, verb: str) -> None:
    """Each flag gives the rule that the same field gives in Python, read as in a recipe where it is no text."""
    where = {"input": "before"}.get(name, "after")
    asked = ["block", name] if name in ("after", "before", "place", "replace") else ["block", where, name]
    argv: list[str] = []
    for field in asked:
        values = GIVEN[field][0]
        argv += [word for value in values for word in (rule_flags.flag(field), value)]
        argv += [] if values else [rule_flags.flag(field)]
    first = {"plan": [NET], "inject": [NET, "-o", "f"], "finetune": []}[verb]
    args = parser_of(verb).parse([*first, *argv])
    given = rule_flags.rule_fields(args)
    if args.settings:
        given["args"] = dict(args.settings)
    assert set(given) == set(asked)
    assert rule_from_fields(**given) == rule_from_fields(**{field: GIVEN[field][1] for field in asked})


def test_flags_of_one_rule_narrow_the_plan(run) -> None:
    """`--stages 2`, `--min-channels` and `--pick` leave what they leave in a recipe; --out is the file of `inject`."""
    rule = ["plan", NET, "--json", "--block", "se", "--place", "block_end"]
    owners = [site["owner"] for site in json.loads(run(*rule, "--stages", "2")[1])["sites"]]
    assert owners
    assert {owner.split(".")[0] for owner in owners} == {"layer2"}
    wide = json.loads(run(*rule, "--min-channels", "256", "--pick", "last")[1])["sites"]
    assert [site["shape"][1] for site in wide] == [512]
    assert run(*rule, "--min-channels", "4096")[0] == 1
    assert json.loads(run(*rule, "--min-channels", "4096", "--optional")[1])["sites"] == []


def test_set_overrides_a_recipe(run) -> None:
    """--set changes the arguments of every rule of a recipe, options between the positionals included."""
    _, out, _ = run("plan", NET, "--set", "reduction=4", "se_resnet", "--json")
    assert {site["args"]["reduction"] for site in json.loads(out)["sites"]} == {4}


def test_root_and_input_size(run) -> None:
    """--root limits injection to a submodule, --input-size sets the size of the probe."""
    _, out, _ = run("plan", NET, "se", "--root", "layer3", "--input-size", "3,64,64", "--json")
    sites = json.loads(out)["sites"]
    assert [site["owner"] for site in sites] == ["layer3.0", "layer3.1"]
    assert [site["shape"][-2:] for site in sites] == [[4, 4], [4, 4]]


def test_inject_writes_a_file_that_load_reads(run, tmp_path: Path) -> None:
    """The file of `inject -o` makes a fresh base model the injected one."""
    file = tmp_path / "se.safetensors"
    code, out, _ = run("inject", TINY, "se_resnet", "-o", str(file), "--seed", "5", "--verify")
    assert code == 0
    assert f'ai.load(base_model, "{file}")' in out
    torch.manual_seed(5)
    base = models.build(TINY).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = base(x)
        model = ai.load(base, file)
        assert torch.equal(before, model(x))
    assert next(iter(ai.injected(model))) == "layer1.0.se"


def test_inject_json(run, tmp_path: Path) -> None:
    """--json of `inject` says where the file is, how large, and the plan."""
    file = tmp_path / "se.safetensors"
    said = json.loads(run("inject", TINY, "se_resnet", "-o", str(file), "--json")[1])
    assert (said["model"], said["file"], said["bytes"]) == (TINY, str(file), file.stat().st_size)
    assert len(said["plan"]["sites"]) == 4


def test_weights_from_a_file_are_those_injected(run, tmp_path: Path) -> None:
    """--weights FILE and --num-classes build the base that the file was trained as."""
    weights, file = tmp_path / "w.pth", tmp_path / "se.safetensors"
    torch.manual_seed(1)
    base = models.build(TINY, num_classes=4).eval()
    torch.save(base.state_dict(), weights)
    assert run("plan", TINY, "se_resnet", "--weights", str(weights))[0] == 1
    code, *_ = run(
        "inject", TINY, "se_resnet", "-o", str(file), "--weights", str(weights), "--num-classes", "4"
    )
    assert code == 0
    x = torch.randn(1, 3, 64, 64)
    other = ai.load(models.build(TINY, num_classes=4).eval(), file)
    with torch.no_grad():
        assert torch.equal(base(x), other(x))


def test_the_package_runs_as_a_module() -> None:
    """`python -m attninject` is the same command, with the same exit codes."""
    assert elsewhere("list", "recipes").stdout.split() == ai.list_recipes()
    refused = elsewhere("plan", "resnet18", "se")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr.count("\n") == 1
