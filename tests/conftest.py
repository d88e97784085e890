"""Fixtures for every test: a seed that is new in each run and printed when a test fails."""

import os
import random

import pytest


@pytest.fixture
def seed() -> int:
    """A fresh random seed; set SALALOCAL_TEST_SEED to repeat a failing run."""
    value = int(os.environ.get("SALALOCAL_TEST_SEED") or random.SystemRandom().randrange(2**31))
    print(f"SALALOCAL_TEST_SEED={value}")
    return value
