"""What a repository must hold to be pulled; it is told before its weights are asked for."""

import json
from pathlib import Path

import pytest
from fake_hub import FakeHub, Fault
from pull_cases import REPOSITORY

from salalocal.checkpoint.hub_client import HubClient
from salalocal.checkpoint.hub_listing import read_listing
from salalocal.errors import CheckpointError, HubError


def test_a_repository_that_is_no_sala_model_is_told_before_its_weights(hub: FakeHub, repository: Path) -> None:
    other = repository / "acme" / "llama"
    other.mkdir(exist_ok=True)
    (other / "config.json").write_text('{"model_type": "llama"}')
    (other / "model.safetensors").write_bytes(bytes(5000))
    with pytest.raises(CheckpointError, match=r"acme/llama: config\.json: .*model_type"):
        read_listing(HubClient(hub.url), "acme/llama", "main")
    assert not hub.bodies("model.safetensors")


@pytest.mark.parametrize(
    ("weight_map", "said"),
    [
        ({"x": "../../evil.safetensors"}, "not a plain name"),
        ({"x": "model-00009-of-00009.safetensors"}, "which is not there"),
        ({"x": "a.bin"}, "not a plain name"),
        ({}, "should be an object"),
    ],
)
def test_an_index_can_only_name_what_the_repository_has(
    weight_map: dict[str, str], said: str, hub: FakeHub, repository: Path
) -> None:
    other = repository / "acme" / "odd"
    other.mkdir(exist_ok=True)
    (other / "config.json").write_text((repository / REPOSITORY / "config.json").read_text())
    (other / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=said):
        read_listing(HubClient(hub.url), "acme/odd", "main")


def test_pickled_weights_are_never_fetched(hub: FakeHub, repository: Path) -> None:
    other = repository / "acme" / "pickled"
    other.mkdir(exist_ok=True)
    (other / "config.json").write_text((repository / REPOSITORY / "config.json").read_text())
    (other / "pytorch_model.bin").write_bytes(bytes(5000))
    with pytest.raises(CheckpointError) as caught:
        read_listing(HubClient(hub.url), "acme/pickled", "main")
    assert "no model.safetensors" in caught.value.message and "never pickles" in caught.value.hint


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_a_config_or_index_that_is_not_the_listed_one_is_refused(name: str, hub: FakeHub) -> None:
    hub.faults[name] = [Fault(body=lambda data: data.replace(b"0", b"1"))]
    with pytest.raises(HubError, match="not what the hub's list says"):
        read_listing(HubClient(hub.url), REPOSITORY, "main")
    assert read_listing(HubClient(hub.url), REPOSITORY, "main").config.hidden_size == 48


def test_a_commit_that_was_asked_for_is_the_one_that_comes(hub: FakeHub) -> None:
    commit = hub.commit(REPOSITORY)
    hub.listing = lambda reply: {**reply, "sha": "f" * 40}
    with pytest.raises(HubError, match=f"asked for commit {commit[:12]}, the hub gives ffffffffffff"):
        read_listing(HubClient(hub.url), REPOSITORY, commit)
