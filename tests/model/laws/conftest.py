"""One fresh seed for all laws of a run, so that they share the drawn cases."""

import os
import random

import pytest

SEED = int(os.environ.get("SALALOCAL_TEST_SEED") or random.SystemRandom().randrange(2**31))


@pytest.fixture
def seed() -> int:
    """The seed of this run; set SALALOCAL_TEST_SEED to repeat a failing one."""
    print(f"SALALOCAL_TEST_SEED={SEED}")
    return SEED
