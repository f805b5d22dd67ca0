"""The measurements run and say what they measured; no figure of time is asserted."""

from __future__ import annotations

from attninject.evidence import measuring


def test_the_time_ratio_is_that_of_its_seconds() -> None:
    """Both are there for every repeat, and the ratio is their median."""
    found = measuring.time_ratio("torchvision/resnet18", 32, 32, repeats=1, block="se", place="block_end")
    assert found["sites"] == 8
    assert found["ratio"] == found["ranking"][0] / found["training"][0]


def test_p_values_under_the_null_are_counted() -> None:
    """Shares of p-values below three levels, and the distance from the uniform distribution."""
    found = measuring.null_p_values(nets=4, images=32, head="keep")
    assert set(found["below"]) == {0.05, 0.2, 0.5}
    assert 0 < found["distance"] <= 1


def test_kolmogorov_by_hand() -> None:
    """Evenly spread values are 1/2n away; all at one end, nearly 1."""
    assert measuring.kolmogorov([0.25, 0.75]) == 0.25
    assert measuring.kolmogorov([0.0, 0.0]) == 1.0
