"""Ctrl-C at any moment: the next pass is right, nothing is held, and the model closes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from surroundings import run_python

PROGRAM = Path(__file__).with_name("interrupts.py")
COUNT = os.environ.get("WSM_TEST_INTERRUPTS", "60")
SEED = os.environ.get("WSM_TEST_SEED", "1")


@pytest.mark.parametrize("kind", ["casts", "integrity", "backward", "resize"])
def test_an_interrupt_at_any_moment_leaves_nothing_wrong(kind: str) -> None:
    done = run_python(PROGRAM, "--only", kind, "--count", COUNT, "--seed", SEED)
    assert done.returncode == 0, done.stdout + done.stderr
    trials, interrupted = (int(word) for word in done.stdout.split() if word.isdigit())
    assert trials == int(COUNT)
    assert interrupted > trials // 4
