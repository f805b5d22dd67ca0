"""Names and counts in words."""

from __future__ import annotations

import pytest

from attninject.wording import human, nearest, parameter_count


@pytest.mark.parametrize(
    ("count", "exact", "spoken"),
    [
        (0, "0", "0"),
        (999, "999", "999"),
        (1_000, "1.00 k", "1.0 k"),
        (89_880, "89.9 k", "89.9 k"),
        (2_530_992, "2.53 M", "2.5 M"),
        (128_000_000, "128 M", "128.0 M"),
        (4_096_000_000, "4.10 G", "4.1 B"),
    ],
)
def test_counts(count: int, exact: str, spoken: str) -> None:
    """Operations have three digits and G, sizes of models one decimal and B."""
    assert human(count) == exact
    assert parameter_count(count) == spoken


def test_words_may_stand_in_another_order() -> None:
    """Names of recipes and modules are near with their words swapped or left out; names of models are not."""
    assert nearest("resnet_cbam", ["se_resnet", "cbam_resnet"], 1) == ["cbam_resnet"]
    assert nearest("bam", ["cbam_resnet_of_long_name"]) == ["cbam_resnet_of_long_name"]
    assert nearest("bam", ["cbam_resnet_of_long_name"], reordered=False) == []


def test_model_names_are_read_from_left_to_right() -> None:
    """Case does not count, and the name comes back as it is written."""
    assert nearest("RESNET51", ["ResNet50", "vgg11"], reordered=False) == ["ResNet50"]
    assert nearest("zzz", ["ResNet50"], reordered=False) == []
