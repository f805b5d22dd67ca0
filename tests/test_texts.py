"""Every message, plan and table is, to the letter, what `tests/reference/texts.txt` says.

Where a text is meant to change, `python tests/test_texts.py` makes the reference anew; read its diff.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import texts
import timm

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """All texts, from a process of their own: blocks that other tests registered are in many lists."""
    file = tmp_path_factory.mktemp("texts") / "texts.txt"
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")))
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "80"}
    done = subprocess.run([sys.executable, __file__, str(file)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return texts.read(file)


def test_the_reference_has_these_cases_and_no_others(said: dict[str, str]) -> None:
    """A case that was added or taken out shows in the reference, and in the same order."""
    assert list(said) == list(texts.read())


OF_NEW_TIMM = {"plan: convnext", "plan: swin", "setting: no scheduler", "sites: swin"}


@pytest.mark.parametrize("name", texts.read())
def test_what_is_said_is_what_was_said(name: str, said: dict[str, str]) -> None:
    """One case: a message with its class, a printed plan, a table."""
    if name in OF_NEW_TIMM and timm.__version__ == "1.0.15":
        pytest.skip("this timm names its modules or schedulers otherwise")
    assert said.get(name) == texts.read()[name]


if __name__ == "__main__":
    texts.write(*map(Path, sys.argv[1:]))
