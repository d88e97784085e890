"""A tiny model, opened for one test."""

from pathlib import Path

import pytest
import tiny_model

from salalocal.session.runtime import Runtime


@pytest.fixture
def runtime(tmp_path: Path, seed: int) -> Runtime:
    return tiny_model.open_tiny_runtime(tmp_path / "model", seed)
