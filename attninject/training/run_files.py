"""What a run writes and where it goes on: only the first process writes, and without a folder nobody does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from attninject import api, delta, delta_file, plugins

from . import runs
from .job import Job
from .measuring import Measured


class RunFiles:
    """The folder of one run, or none, for a process that is the first (`main`) or not."""

    def __init__(self, job: Job, main: bool) -> None:
        self.job, self.main = job, main
        self.folder = None if job.out is None else runs.Folder(job.out)

    def begin(self, resume: bool) -> None:
        """Take the folder's lock; see `Folder.begin`."""
        if self.folder and self.main:
            self.folder.begin(resume)

    def end(self) -> None:
        """Give the lock back."""
        if self.folder:
            self.folder.end()

    def kept(self) -> str:
        """Which checkpoint a message may offer."""
        return self.folder.last_good() if self.folder else "nothing was saved, as `out` was not given"

    def ship(self, name: str, model: nn.Module) -> None:
        """The file that is the run's product: a delta, or without blocks a plain state dict."""
        if not self.folder or not self.main:
            return
        with self.folder.replacing(name) as temporary:
            if api.injected(model):
                delta.save(model, temporary, base=self.job.base)
            else:
                delta_file.save_tensors(delta_file.detached(model.state_dict()), temporary, {"format": "pt"})

    def measured(self, epoch: int, metrics: Measured) -> None:
        """What a log has no columns for: the newest epoch's counts per class, and its calibration."""
        if self.folder and self.main:
            self.folder.write(runs.MEASURED, json.dumps({"epoch": epoch, **metrics.to_dict()}) + "\n")

    def save(self, state: Mapping[str, Any], terms: Mapping[str, Any]) -> None:
        """A checkpoint of a run's state and terms; the settings anew each time, as a resumed run may have others."""
        if not self.folder or not self.main:
            return
        tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
        plain = {key: value for key, value in state.items() if key not in tensors}
        meta = json.loads(
            json.dumps({**plain, **terms})
        )  # what cannot be JSON is found before a file is touched
        if self.job.experiment is not None:
            text = json.dumps(self.job.experiment.to_dict(), indent=2) + "\n"
            self.folder.write(runs.SETTINGS, text)
        if plugins.names():
            self.folder.write(plugins.RECORD, "".join(f"{name}\n" for name in plugins.names()))
        self.folder.write(runs.CLASSES, "\n".join(self.job.images.classes) + "\n")
        self.folder.save(tensors, meta)

    def load(self) -> dict[str, Any]:
        """State and terms of the checkpoint; see `Folder.load`."""
        assert self.folder is not None
        tensors, meta = self.folder.load()
        return {**meta, **tensors}
