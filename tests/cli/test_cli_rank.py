"""`attninject rank`: a table, a recipe of the best, and refusals in words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch

import attninject as ai
from attninject.cli import main
from attninject.recipe.loading import load_recipe

SMALL = [
    "--block",
    "se",
    "--place",
    "residual_branch",
    "--images",
    "48",
    "--batch-size",
    "16",
    "--size",
    "32",
]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of two classes: dark and light noise."""
    from torchvision.utils import save_image

    draw = torch.Generator().manual_seed(0)
    for label, level in (("dark", 0.3), ("light", 0.7)):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for n in range(40):
            image = level * torch.rand(3, 40, 36, generator=draw)
            save_image(image, tmp_path / "photos" / label / f"{n}.png")
    return tmp_path / "photos"


def test_rank_writes_the_recipe_of_the_best(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The recipe names as many sites as were asked for, all of the table, and plans on a fresh model."""
    file = tmp_path / "best.yaml"
    argv = ["rank", "timm/resnet10t", "--data", str(photos), *SMALL, "--top", "2", "-o", str(file)]
    assert main([*argv, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    names = {site["site"]["path"] for site in shown["sites"]}
    assert len(names) == 4
    best = [rule.after[0] for rule in load_recipe(str(file)).rules if rule.after]
    assert len(best) == 2
    plan = ai.plan(timm.create_model("resnet10t"), str(file))
    assert {site.path for site in plan.sites} < names


@pytest.mark.parametrize(
    ("more", "code", "said"),
    [
        (["--data", "nowhere"], 1, "--data: there is no folder nowhere"),
        (["--data", "digit"], 1, "did you mean digits"),
        (["--data", "digits", "--top", "3"], 2, "--top goes with -o FILE"),
        (["--data", "digits", "--method", "scor"], 2, "the nearest names are score"),
    ],
)
def test_wrong_words_are_refused(
    more: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """No traceback; usage errors end with 2, what cannot be found with 1."""
    try:
        ended = main(["rank", "timm/resnet10t", *SMALL, *more])
    except SystemExit as left:
        ended = left.code
    assert ended == code
    assert said in capsys.readouterr().err
