"""Labelled images for studies, made of what packages carry: nothing is downloaded, and no image is kept here.

Each loader says where its images come from and under which licence, draws everything from its `seed`, and divides by
source, so that a test image shares no digit, photograph, font or file with a training image.

For: from a seed to a `Task`. Not for: folders of a user's images, which `training.data` opens. From the ground up:
task · handwriting, drawn_letters, cut_outs · photographs, damages, damaged_photos · fonts.
"""

from __future__ import annotations

from collections.abc import Callable

from .cut_outs import rotations, stamps
from .damaged_photos import channels, corruptions
from .drawn_letters import letters
from .fonts import counts, numerals, typefaces
from .handwriting import digits_on_photos
from .task import Task

__all__ = [
    "TASKS", "Task", "channels", "corruptions", "counts", "digits_on_photos", "letters", "numerals", "rotations",
    "stamps", "typefaces",
]  # fmt: skip

TASKS: dict[str, Callable[..., Task]] = {
    "digits_on_photos": digits_on_photos,
    "letters": letters,
    "stamps": stamps,
    "corruptions": corruptions,
    "rotations": rotations,
    "numerals": numerals,
    "typefaces": typefaces,
    "counts": counts,
    "channels": channels,
}
"""Name → loader, called with `seed`, `size` and, but for `stamps`, the numbers of images `train` and `test`."""
