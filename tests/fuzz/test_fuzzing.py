"""Fuzzing: the cases that once failed, a few of fixed seeds, and a minute each in the slow tier."""

from __future__ import annotations

import json
import random

import fuzzers
import pytest

KEPT = [json.loads(line) for line in fuzzers.CASES.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("kept", KEPT, ids=lambda kept: f"{kept['fuzzer']} {kept['what']}")
def test_what_once_failed_is_right_now(kept: dict[str, object]) -> None:
    """Every counter-example of an earlier search."""
    assert fuzzers.verdict(fuzzers.FUZZERS[kept["fuzzer"]](), kept["case"]) == ""


@pytest.mark.parametrize("name", sorted(fuzzers.FUZZERS))
def test_a_few_cases_of_a_fixed_seed(name: str) -> None:
    """The fuzzers themselves run, and the first cases are harmless."""
    fuzzer = fuzzers.FUZZERS[name]()
    for number in range(40):
        case = fuzzer.make(random.Random(f"0 {number}"))
        assert fuzzers.verdict(fuzzer, case) == "", case


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(fuzzers.FUZZERS))
def test_a_minute_of_fuzzing(name: str) -> None:
    """A new seed at each run, printed with the case that fails."""
    seed = random.SystemRandom().randrange(2**32)
    print(f"{name}: seed {seed}")
    count, fault = fuzzers.search(name, seed, 60)
    assert count > 0
    assert fault is None, str(fault)
