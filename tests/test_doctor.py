"""`attninject doctor`: what is installed and missing, also where torch is broken or absent."""

from __future__ import annotations

import importlib
import json

import pytest

from attninject import doctor
from attninject.cli import main

WANTED = [
    "torch>=2.6",
    "timm>=1.0.15",
    "ray>=2.9; extra == 'sweep'",
    "attninject[train]; extra == 'sweep'",
    'scipy>=1.11; extra == "report"',
]
INSTALLED = {"torch": "2.11.0+cu130", "timm": "1.0.9", "scipy": "1.11"}


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Python with a few packages."""

    def version(name: str) -> str:
        if name in INSTALLED:
            return INSTALLED[name]
        raise doctor.PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "requires", lambda name: WANTED)
    monkeypatch.setattr(doctor, "version", version)


def test_what_is_missing_and_what_installs_it(world: None) -> None:
    """Needed packages by version, extras with the command that completes them; 1.0.9 is older than 1.0.15."""
    found = doctor.examine()
    text = str(found)
    assert "torch  2.11.0+cu130  ok" in text
    assert 'sweep   ray is missing: pip install "attninject[sweep]"' in text
    assert "report  complete" in text
    assert found.faults == ("timm is older than 1.0.15: pip install attninject",)
    assert found.devices == ()


def test_a_torchvision_of_another_torch_is_named(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """The import that fails is said in a line, not as a traceback; exit code 1."""
    real = importlib.import_module

    def broken(name: str, package: str | None = None) -> object:
        if name == "torchvision":
            raise RuntimeError("operator torchvision::nms does not exist\nmore")
        return real(name, package)

    monkeypatch.setattr(doctor.importlib, "import_module", broken)
    with pytest.raises(SystemExit) as stop:
        main(["doctor"])
    assert stop.value.code == 1
    assert (
        "torchvision cannot be imported (operator torchvision::nms does not exist): "
        in capsys.readouterr().out
    )


def test_here(capsys) -> None:
    """Where these tests run nothing is wrong, and the figures are JSON too."""
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["faults"] == []
    assert any(device.startswith("cpu:") for device in found["devices"])
