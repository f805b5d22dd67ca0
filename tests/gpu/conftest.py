"""What runs on a card: `python -m pytest -m gpu`; on a CPU with ATTNINJECT_TEST_DEVICE=cpu, as a rehearsal."""

from __future__ import annotations

import pytest
import torch
from cases import DEVICE


@pytest.fixture(autouse=True)
def device() -> str:
    """The device of these tests; without a card they are skipped."""
    if DEVICE == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    return DEVICE


@pytest.fixture(autouse=True)
def one_kernel_for_one_shape():
    """The same kernel in both runs of a comparison: cuDNN's choice by timing may differ from run to run."""
    backend = torch.backends.cudnn
    before = backend.benchmark, backend.deterministic
    backend.benchmark, backend.deterministic = False, True
    yield
    backend.benchmark, backend.deterministic = before
