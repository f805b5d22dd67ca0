"""What plans, sites and injected blocks look like in a notebook, and in a line."""

from __future__ import annotations

import copy
import re
from xml.etree import ElementTree

import pytest
from torch import nn

import attninject as ai
from attninject.notebook import html_table


def net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU())


def cells(page: str) -> list[list[str]]:
    """The texts of the table's rows, read as a browser would."""
    tree = ElementTree.fromstring(page)
    return [["".join(cell.itertext()) for cell in row] for row in tree.iter("tr")]


def shown(page: str) -> str:
    return "\n".join(ElementTree.fromstring(page).itertext())


def test_repr_of_a_plan_is_one_line() -> None:
    """`repr` names recipe, model, number of sites and parameters; `print` shows the table."""
    plan = ai.plan(net(), block="se", after="0", args={"reduction": 1})
    assert repr(plan) == "<Plan se on Sequential: 1 site, +544 parameters>"
    assert str(plan).count("\n") > 3


def test_a_plan_says_in_a_notebook_what_it_prints() -> None:
    """Every word of the printed table stands in the HTML, a cell per cell."""
    plan = ai.plan(net(), block="se", after="0", args={"reduction": 1})
    page = plan._repr_html_()
    assert cells(page) == [
        ["site", "shape", "layout", "new module", "how", "parameters", "MACs"],
        ["after 0", "16×222×222", "NCHW", "0.se", "module", "544", "512"],
    ]
    lines = [line.strip() for line in str(plan).splitlines()]
    assert [
        line for line in lines if not line.startswith(("site ", "after 0")) and line not in shown(page)
    ] == []


def test_sites_are_a_table() -> None:
    """`ai.sites()` has a row per call."""
    page = ai.sites(net())._repr_html_()
    assert [row[:3] for row in cells(page)[1:]] == [
        ["(the model)", "1", "Sequential"],
        ["0", "1", "Conv2d"],
        ["1", "1", "ReLU"],
    ]


def test_injected_blocks_are_a_dict_and_a_table() -> None:
    """`ai.injected()` stays an ordinary dict; an empty one says so."""
    model = net()
    assert ai.injected(model) == {}
    assert "no injected blocks" in shown(ai.injected(model)._repr_html_())
    ai.inject(model, block="se", after="0", args={"reduction": 1})
    found = ai.injected(model)
    assert isinstance(found, dict)
    assert found == {"0.se": model[0].se}
    assert repr(found) == repr({"0.se": model[0].se})
    assert list(copy.copy(found)) == ["0.se"]
    assert cells(found._repr_html_())[1:] == [["0.se", "SE", "544"]]


@pytest.mark.parametrize("text", ["<script>alert(1)</script>", 'a" onload="x', "&amp;", "'"])
def test_names_are_escaped(text: str) -> None:
    """A name from a stranger's model is text, never markup, wherever it stands."""
    page = html_table([text], [[text]], above=[text, text], below=[text])
    assert "<script" not in page
    assert cells(page) == [[text], [text]]
    assert shown(page).count(text) == 5
    assert all(set(e.attrib) <= {"style"} for e in ElementTree.fromstring(page).iter())


def test_colours_are_those_of_the_page() -> None:
    """No colour of our own, so that the table can be read in a light and in a dark notebook."""
    page = ai.plan(net(), block="se", after="0", args={"reduction": 1})._repr_html_()
    assert not re.search(r"#[0-9a-fA-F]{3}|rgb|hsl|white(?!-)|black|gr[ae]y", page)
    assert set(re.findall(r"(?<![-\w])color:(\w+)", page)) == {"inherit"}


def test_a_wide_table_scrolls_in_its_own_box() -> None:
    """The box around the table scrolls; the lines above and below it stand outside and wrap."""
    tree = ElementTree.fromstring(html_table(["a"], [["b"]], above=["title"], below=["note"]))
    box = next(e for e in tree.iter("div") if "overflow-x:auto" in e.get("style", ""))
    assert [child.tag for child in box] == ["table"]
    assert list(box.itertext()) == ["a", "b"]
