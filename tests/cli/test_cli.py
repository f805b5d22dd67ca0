"""The command line as a user meets it: output, messages, exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import attninject as ai
from attninject import models
from attninject.cli import main

ROOT = Path(__file__).resolve().parents[2]
NET = "torchvision/resnet18"


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
        ([], "required: COMMAND"),
        (["plna"], "unknown command 'plna'; did you mean 'plan'?"),
        (["list", "modles"], "unknown kind 'modles'; did you mean 'models'?"),
        (["bench", "injct"], "unknown benchmark 'injct'; did you mean 'inject'?"),
        (["plan", NET, "--blok", "se"], "unknown argument '--blok'; did you mean '--block'?"),
        (["plan"], "required: MODEL"),
        (["plan", NET], "give a RECIPE (attninject list recipes), or --block"),
        (["plan", NET, "--block", "se"], "--block se needs --after, --before or --place"),
        (["plan", NET, "--after", "layer1"], "give a RECIPE"),
        (
            ["plan", NET, "se", "--block", "se", "--place", "stage_end"],
            "RECIPE 'se' and --block, --place together",
        ),
        (["plan", NET, "--block", "se", "--after", "a", "--place", "b"], "not allowed with argument --after"),
        (["plan", NET, "se", "--set", "reduction"], "'reduction' is no KEY=VALUE, such as reduction=8"),
        (["plan", NET, "se", "--set", "reduction=[1"], "is no value"),
        (["plan", NET, "se", "--input-size", "3x224x224"], "write it as 3,224,224"),
        (["inject", NET, "se"], "-o/--output"),
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


def test_help_shows_the_verbs(run) -> None:
    """`--help` lists every verb and exits with 0."""
    code, out, _ = run("--help")
    assert code == 0
    for verb in ("list", "sites", "plan", "inject", "demo", "bench"):
        assert f"\n    {verb} " in out


@pytest.mark.parametrize("verb", ["list", "sites", "plan", "inject", "demo", "bench"])
def test_every_verb_has_help_and_json(verb: str, run) -> None:
    """Each verb explains itself and offers --json."""
    code, out, _ = run(verb, "--help")
    assert code == 0
    assert "--json" in out


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
    assert "recipes: bam, bam_mobilenet, bam_resnet, cbam" in out
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
    code, out, _ = run("inject", NET, "se_resnet", "-o", str(file), "--seed", "5", "--verify")
    assert code == 0
    assert f'ai.load(base_model, "{file}")' in out
    torch.manual_seed(5)
    base = models.build(NET).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = base(x)
        model = ai.load(base, file)
        assert torch.equal(before, model(x))
    assert next(iter(ai.injected(model))) == "layer1.0.se"


def test_inject_json(run, tmp_path: Path) -> None:
    """--json of `inject` says where the file is, how large, and the plan."""
    file = tmp_path / "se.safetensors"
    said = json.loads(run("inject", NET, "se_resnet", "-o", str(file), "--json")[1])
    assert (said["model"], said["file"], said["bytes"]) == (NET, str(file), file.stat().st_size)
    assert len(said["plan"]["sites"]) == 8


def test_weights_from_a_file_are_those_injected(run, tmp_path: Path) -> None:
    """--weights FILE and --num-classes build the base that the file was trained as."""
    weights, file = tmp_path / "w.pth", tmp_path / "se.safetensors"
    torch.manual_seed(1)
    base = models.build(NET, num_classes=4).eval()
    torch.save(base.state_dict(), weights)
    assert run("plan", NET, "se_resnet", "--weights", str(weights))[0] == 1
    code, *_ = run(
        "inject", NET, "se_resnet", "-o", str(file), "--weights", str(weights), "--num-classes", "4"
    )
    assert code == 0
    x = torch.randn(1, 3, 64, 64)
    other = ai.load(models.build(NET, num_classes=4).eval(), file)
    with torch.no_grad():
        assert torch.equal(base(x), other(x))


def test_the_package_runs_as_a_module() -> None:
    """`python -m attninject` is the same command, with the same exit codes."""
    assert elsewhere("list", "recipes").stdout.split() == ai.list_recipes()
    refused = elsewhere("plan", "resnet18", "se")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr.count("\n") == 1
