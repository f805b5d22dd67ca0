"""Files that appear whole or not at all, and the versions in them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import attninject as ai
from attninject.files import installed_versions, replacing


def test_a_file_is_replaced_once_the_body_is_through(tmp_path: Path) -> None:
    """Until then a reader sees the old file; afterwards the new one alone lies in the folder."""
    target = tmp_path / "a.txt"
    target.write_text("old")
    with replacing(target) as temporary:
        temporary.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


def torn(target: Path, error: type[BaseException]) -> None:
    """A write that gets half-way."""
    with replacing(target) as temporary:
        temporary.write_text("ne")
        raise error


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_body_that_fails_leaves_the_old_file(tmp_path: Path, error: type[BaseException]) -> None:
    """What it raised comes through, and nothing half-written stays."""
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(error):
        torn(target, error)
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_body_that_fails_at_once_leaves_nothing(tmp_path: Path) -> None:
    """A temporary file that was never made is not missed, and hides no error."""
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "a.txt"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_versions_name_what_is_installed() -> None:
    """What is not installed is left out; this library says its own version."""
    found = installed_versions(("attninject", "torch", "no-such-package"))
    assert found["attninject"] == ai.__version__
    assert torch.__version__.startswith(found["torch"].partition("+")[0])
    assert set(found) == {"attninject", "torch"}
