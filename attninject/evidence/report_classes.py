"""Changes per class: the recall of each class, paired over seeds, against plain fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from .report_data import Arm, Study
from .statistics import Paired, paired

CLASS_HEADER = ("study", "arm", "seed", "class", "images", "predicted", "right")


@dataclass(frozen=True)
class ClassChange:
    """One class in one arm; recalls in percent, the difference in points.

    Attributes:
        arm: name.
        name: of the class.
        images: validation images of the class, per seed.
        plain: mean recall of plain fine-tuning, over the seeds that both have.
        recall: that of the arm.
        found: the paired difference.
    """

    arm: str
    name: str
    images: float
    plain: float
    recall: float
    found: Paired


def class_changes(study: Study) -> list[ClassChange]:
    """Every class of every arm whose runs and plain ones have said so; in the order of arms and classes."""
    return [
        change
        for arm in study.arms.values()
        if arm.plain in study.arms
        for change in _of_arm(arm, study.arms[arm.plain])
    ]


def _of_arm(arm: Arm, plain: Arm) -> list[ClassChange]:
    pairs = [
        (found.measured.classes, other.measured.classes)
        for seed, found in arm.finished().items()
        if found.measured and (other := plain.finished().get(seed)) and other.measured
    ]
    if not pairs:
        return []
    found = []
    for number, one in enumerate(pairs[0][0]):
        both = [(ours[number], theirs[number]) for ours, theirs in pairs]
        recalls = [
            (100 * a.recall, 100 * b.recall) for a, b in both if a.recall is not None and b.recall is not None
        ]
        if recalls:
            ours, theirs = (fmean(values) for values in zip(*recalls, strict=True))
            images = fmean(a.images for a, _ in both)
            found.append(
                ClassChange(arm.name, one.name, images, theirs, ours, paired([a - b for a, b in recalls]))
            )
    return found


def widest(changes: Sequence[ClassChange], most: int) -> list[ClassChange]:
    """For each arm the classes that changed most, up or down, in order of the change."""
    kept: list[ClassChange] = []
    for arm in dict.fromkeys(change.arm for change in changes):
        of_arm = sorted((c for c in changes if c.arm == arm), key=lambda c: -abs(c.found.mean))[:most]
        kept += sorted(of_arm, key=lambda c: -c.found.mean)
    return kept


def class_rows(studies: Sequence[Study]) -> list[dict[str, object]]:
    """A row per run and class, under `CLASS_HEADER`; none where no run says."""
    return [
        dict(zip(CLASS_HEADER, (number, arm.name, seed, c.name, c.images, c.predicted, c.right), strict=True))
        for number, study in enumerate(studies, 1)
        for arm in study.arms.values()
        for seed, found in arm.finished().items()
        for c in (found.measured.classes if found.measured else ())
    ]
