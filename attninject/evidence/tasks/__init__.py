"""Labelled images for studies, made of what packages carry: nothing is downloaded, and no image is kept here.

Each loader says where its images come from and under which licence, draws everything from its `seed`, and divides by
source, so that a test image shares no digit, photograph, font or file with a training image.

For: from a seed to a `Task`. Not for: folders of a user's images, which `training.data` opens. From the ground up:
task · handwriting, drawn_letters, cut_outs · photographs, damages, damaged_photos.
"""

from __future__ import annotations

from collections.abc import Callable

from .cut_outs import rotations, stamps
from .damaged_photos import corruptions
from .drawn_letters import letters
from .handwriting import digits_on_photos
from .task import Task

__all__ = ["TASKS", "Task", "corruptions", "digits_on_photos", "letters", "rotations", "stamps"]

TASKS: dict[str, Callable[..., Task]] = {
    "digits_on_photos": digits_on_photos,
    "letters": letters,
    "stamps": stamps,
    "corruptions": corruptions,
    "rotations": rotations,
}
"""Name → loader, called with `seed`, `size` and, but for `stamps`, the numbers of images `train` and `test`."""
