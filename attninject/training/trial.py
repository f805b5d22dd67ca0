"""A copy of a model, trained for a few steps to see what a run would do."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from attninject.errors import RunError

from . import devices
from .data.loaders import batches
from .data.seeds import seed_all
from .job import Job
from .loop import Run
from .reporting import Reporter
from .run_files import RunFiles


@contextmanager
def on_a_copy(job: Job) -> Iterator[Run]:
    """A run of one process that writes nothing and trains a copy of the model, made ready.

    Raises:
        RunError: the model cannot be copied, or there are several processes.
    """
    accelerator = devices.open_accelerator(job.train)
    try:
        if accelerator.num_processes > 1:
            raise RunError(
                "what a run would do is tried in one process: start it without torchrun or accelerate"
            )
        try:
            model = copy.deepcopy(job.model)
        except Exception as error:  # what a class of the caller's raises when it is copied
            raise RunError(f"the model cannot be copied, to be tried: {error}") from error
        tried = replace(job, model=model, out=None)
        with devices.deterministic():
            run = Run(tried, accelerator, RunFiles(tried, True), Reporter(main=False))
            run.thaw(0)
            run.learner.nets.net.train()
            yield run
    finally:
        devices.forget_accelerator()


def steps_of(run: Run) -> Iterator[float]:
    """The loss of one step after another, over as many epochs as are asked for."""
    step = 0
    for epoch in itertools.count():
        run.loaders.order.at(epoch)
        coming = batches(run.loaders.train)
        for _ in range(run.loaders.steps):
            seed_all(run.train.seed, 1, step, 0)
            loss, _ = run.learner.backward([next(coming) for _ in range(run.train.accumulate)])
            yield loss
            run.learner.update()
            step += 1
