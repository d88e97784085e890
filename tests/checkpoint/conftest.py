"""A fake hub and an empty Hugging Face cache, for tests of downloads."""

from collections.abc import Iterator
from pathlib import Path

import fake_hub
import pull_cases
import pytest


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a hub with one model, made once."""
    return pull_cases.write_repository(tmp_path_factory.mktemp("hub"))


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hugging Face cache, not made yet."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    return tmp_path / "hf" / "hub"


@pytest.fixture
def hub(repository: Path, hub_cache: Path) -> Iterator[fake_hub.FakeHub]:
    """A hub that serves the model, and the empty cache to pull it into."""
    with fake_hub.running(repository) as running:
        yield running
