"""A small sharded model on a fake hub, and what must hold after a pull of it; for tests of downloads."""

import hashlib
import json
from pathlib import Path

import checkpoint_cases
import pytest
from fake_hub import FakeHub

from salalocal.checkpoint.checkpoint import Checkpoint
from salalocal.checkpoint.hub import find_model
from salalocal.checkpoint.hub_cache import CachedRepository
from salalocal.checkpoint.hub_client import HubClient, HubLimits
from salalocal.checkpoint.hub_listing import read_listing
from salalocal.checkpoint.pull import PullPlan, PullProgress, plan_pull, run_pull
from salalocal.errors import HubError

REPOSITORY = "acme/tiny"
SHARDS = [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
SHARD = SHARDS[0]
TOKEN = "hf_a_secret_of_the_user"
LIMITS = HubLimits(stall_s=0.4, tries=3, pause_s=0.01, max_pause_s=0.05, max_json_bytes=2**20)


def write_repository(root: Path) -> Path:
    """A sharded model with files that no model is made of, as ORG/NAME below the folder that comes back."""
    folder = root / REPOSITORY
    config = checkpoint_cases.small_config()
    checkpoint_cases.written(folder, config, checkpoint_cases.random_tensors(config, 7), max_shard_bytes=150_000)
    for name in ("modeling_minicpm_sala.py", "pytorch_model.bin", "x.pkl", "adapter_model.safetensors"):
        (folder / name).write_bytes(b"import os" * 99)
    (folder / "onnx").mkdir()
    (folder / "onnx" / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "words": ["x"] * 2000}))
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    return root


def plan(hub: FakeHub, revision: str = "main", limits: HubLimits = LIMITS) -> tuple[PullPlan, HubClient]:
    """What a pull would do, and the client to do it with."""
    client = HubClient(hub.url, TOKEN, limits)
    return plan_pull(read_listing(client, REPOSITORY, revision), revision), client


def pull(hub: FakeHub, revision: str = "main", limits: HubLimits = LIMITS) -> list[PullProgress]:
    """Pull, and give back all that was shown."""
    seen: list[PullProgress] = []
    planned, client = plan(hub, revision, limits)
    run_pull(planned, client, seen.append)
    return seen


def assert_pulled(hub: FakeHub) -> Path:
    """The model in the cache is the one on the hub, and nothing else is there."""
    folder = find_model(REPOSITORY).path
    for path in folder.iterdir():
        assert path.read_bytes() == (hub.root / REPOSITORY / path.name).read_bytes()
    Checkpoint.open(folder).validate()
    for blob in (CachedRepository.of(REPOSITORY).folder / "blobs").iterdir():
        assert_named_by_its_hash(blob)
    return folder


def assert_nothing_counts(cache: Path) -> None:
    """No model is found; what is on the disk are blobs that are right, and beginnings."""
    with pytest.raises(HubError, match="not in the local"):
        find_model(REPOSITORY)
    for blob in cache.rglob("blobs/*"):
        if "." not in blob.name:
            assert_named_by_its_hash(blob)


def assert_named_by_its_hash(blob: Path) -> None:
    """As in the cache of huggingface_hub."""
    data = blob.read_bytes()
    assert blob.name in (hashlib.sha256(data).hexdigest(), hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest())
