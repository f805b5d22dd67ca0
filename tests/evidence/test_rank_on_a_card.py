"""rank_sites on a model that is not on the CPU: every tensor that it makes lies where those that it meets lie."""

from __future__ import annotations

import subprocess
import sys

import pytest
from torch.utils import backend_registration

SCRIPT = """
import sys, torch, torch.nn.functional as F
sys.path[:0] = ["tests", "tests/evidence"]
import pretend_card
from attninject.evidence import gradients, rank
from test_rank import images, tiny
rule = {"after": "re:(2|4|7)", "images": 48, "args": {"reduction": 4}}
x, y = images()

def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

def ranked(model):
    methods = [m for m in rank.METHODS if m != "papers_places"]
    found = list(rank.rankings(model, data=(x, y), block="cbam", methods=methods, head="fit", **rule).values())
    found.append(rank.rank_sites(model, data=(x, y), block="bam", head="keep", **rule))
    found.append(rank.rank_sites(model, data=[(x, y)], block="se", metric=loss, **rule))
    gradients.WIDEST = 16
    return [*found, rank.rank_sites(model, data=(x, y), block="se", mode="train", **rule)]

here = ranked(tiny())
with pretend_card.Card():
    model = tiny().to(pretend_card.NAME)
    there = ranked(model)
    assert {p.device.type for p in model.parameters()} == {pretend_card.NAME}
    try:
        x + next(model.parameters())[0, 0, 0, 0] + model[0].bias
    except AssertionError:
        print("ok" if [r.to_dict() for r in here] == [r.to_dict() for r in there] else (str(here), str(there)))
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"), reason="torch before 2.9"
)
def test_the_ranking_is_that_of_the_cpu() -> None:
    """All methods, a head that is fitted and one that is kept, a loss of one's own, and gradients that are projected."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", SCRIPT], capture_output=True, text=True)
    assert done.stdout.strip() == "ok", done.stdout[-2000:] + done.stderr[-2000:]
