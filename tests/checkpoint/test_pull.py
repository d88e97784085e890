"""A pull from a hub on loopback: what arrives, what is gone on with, what is refused before the first byte."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from fake_hub import FakeHub, Fault
from pull_cases import REPOSITORY, SHARD, SHARDS, TOKEN, assert_nothing_counts, assert_pulled, plan, pull

from salalocal.checkpoint.folder_lock import only_one
from salalocal.checkpoint.hub import find_model
from salalocal.checkpoint.hub_cache import CachedRepository
from salalocal.checkpoint.hub_client import HubLimits
from salalocal.checkpoint.pull import DONE, PullProgress, check_pulled, run_pull
from salalocal.errors import BusyError, CheckpointError, HubError


def test_a_model_arrives_whole_and_without_code(hub: FakeHub) -> None:
    seen = pull(hub)
    folder = assert_pulled(hub)
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md", "config.json", *SHARDS, "model.safetensors.index.json", "tokenizer.json",
    ]  # fmt: skip
    assert folder.name == hub.commit(REPOSITORY)
    assert all(path.is_symlink() for path in folder.iterdir())
    last = seen[-1]
    assert last.num_bytes == last.total_bytes > 0 and all(file.phase == DONE for file in last.files)
    assert not any(name in request.path for request in hub.log for name in (".py", ".bin", ".pkl", "onnx", "adapter"))


def test_huggingface_hub_finds_what_was_pulled(hub: FakeHub, hub_cache: Path) -> None:
    from huggingface_hub import scan_cache_dir, snapshot_download

    pull(hub)
    assert (
        Path(snapshot_download(REPOSITORY, local_files_only=True, cache_dir=hub_cache)) == find_model(REPOSITORY).path
    )
    info = scan_cache_dir(hub_cache)
    assert [repository.repo_id for repository in info.repos] == [REPOSITORY] and not info.warnings


def test_a_second_pull_checks_and_fetches_nothing(hub: FakeHub) -> None:
    pull(hub)
    hub.log.clear()
    seen = pull(hub)
    assert {request.path.rpartition("/")[2] for request in hub.log} == {
        "main", "config.json", "model.safetensors.index.json",
    }  # fmt: skip
    assert any(file.phase == "checking" for progress in seen for file in progress.files) or len(seen) < 3
    assert_pulled(hub)


def test_a_damaged_blob_is_found_and_fetched_again(hub: FakeHub) -> None:
    pull(hub)
    blob = (find_model(REPOSITORY).path / SHARD).resolve()
    data = bytearray(blob.read_bytes())
    data[len(data) // 2] ^= 1
    blob.write_bytes(data)
    with pytest.raises(CheckpointError, match="damaged, its hash"):
        check_pulled(REPOSITORY, "main", lambda progress: None)
    pull(hub)
    assert_pulled(hub)
    assert check_pulled(REPOSITORY, "main", lambda progress: None).num_bytes > 0


def test_a_dry_run_writes_nothing(hub: FakeHub, hub_cache: Path) -> None:
    planned, _ = plan(hub)
    assert planned.fetch_bytes == planned.listing.num_bytes > 300_000
    assert planned.listing.left_out == (
        "adapter_model.safetensors", "modeling_minicpm_sala.py", "onnx/config.json", "pytorch_model.bin", "x.pkl",
    )  # fmt: skip
    assert not hub_cache.exists() and planned.free_bytes > 0


def test_a_disk_that_is_too_small_is_told_before_the_first_byte(
    hub: FakeHub, hub_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 1000}))
    with pytest.raises(CheckpointError, match=r"needs 0\.06 GiB more, 0\.00 GiB are free for"):
        pull(hub)
    assert not hub_cache.exists() and not hub.bodies(SHARD)


def test_a_revision_is_pinned_to_its_commit(hub: FakeHub) -> None:
    pull(hub, "v1")
    commit = hub.commit(REPOSITORY)
    cached = CachedRepository.of(REPOSITORY)
    assert (cached.folder / "refs" / "v1").read_text() == commit and cached.commit_of("main") is None
    assert find_model(f"{REPOSITORY}@v1") == find_model(f"{REPOSITORY}@{commit}")
    with pytest.raises(HubError, match="not in the local"):
        find_model(REPOSITORY)
    pull(hub, commit)
    assert sorted(path.name for path in (cached.folder / "refs").iterdir()) == ["v1"]


def test_a_new_commit_joins_the_old_one(hub: FakeHub, repository: Path) -> None:
    pull(hub)
    old = find_model(REPOSITORY).path
    card = repository / REPOSITORY / "README.md"
    text = card.read_text()
    try:
        card.write_text(text + "more\n")
        pull(hub)
        new = assert_pulled(hub)
    finally:
        card.write_text(text)
    assert new != old and old.is_dir() and len(hub.bodies(SHARD)) == 1


def test_a_finished_pull_leaves_no_beginnings_of_older_ones(hub: FakeHub, hub_cache: Path) -> None:
    blobs = hub_cache / "models--acme--tiny" / "blobs"
    blobs.mkdir(parents=True)
    for name in (f"{'0' * 64}.salalocal-partial", f"{'0' * 64}.salalocal-etag", ".writing-0123"):
        (blobs / name).write_text("x")
    pull(hub)
    assert_pulled(hub)


def test_the_token_goes_to_the_hub_and_nowhere_else(hub: FakeHub) -> None:
    pull(hub)
    for request in hub.log:
        expected = f"Bearer {TOKEN}" if request.host == "127.0.0.1" else None
        assert request.headers.get("Authorization") == expected
    assert {request.host for request in hub.log} == {"127.0.0.1", "localhost"}


def test_a_pull_goes_on_where_it_was(hub: FakeHub) -> None:
    total = (hub.root / REPOSITORY / SHARD).stat().st_size
    hub.faults[SHARD] = [Fault(cut_after=100_000)]
    pull(hub)
    assert_pulled(hub)
    first, second = hub.bodies(SHARD)
    assert "Range" not in first.headers and second.headers["Range"] == "bytes=100000-" and total > 100_000
    assert second.status == 206 and second.headers["If-Range"].startswith('"')


KILLED = """
from salalocal.checkpoint.hub_client import HubClient
from salalocal.checkpoint.hub_listing import read_listing
from salalocal.checkpoint.pull import plan_pull, run_pull
client = HubClient({url!r})
run_pull(plan_pull(read_listing(client, {repository!r}, "main"), "main"), client, lambda progress: None)
"""


def test_a_killed_pull_loses_nothing_that_came(hub: FakeHub, hub_cache: Path) -> None:
    planned, _ = plan(hub)
    digest = next(file.digest for file in planned.listing.files if file.name == SHARD)
    partial = planned.repository.partial(digest)
    hub.bytes_per_s = 200_000
    code = KILLED.format(url=hub.url, repository=REPOSITORY)
    environment = {**os.environ, "HF_HUB_CACHE": str(hub_cache), "HF_HUB_OFFLINE": "0"}
    child = subprocess.Popen([sys.executable, "-c", code], env=environment)
    deadline_s = time.monotonic() + 60
    while not (partial.exists() and partial.stat().st_size >= 40_000) and time.monotonic() < deadline_s:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    grown = partial.stat().st_size
    assert_nothing_counts(hub_cache)
    hub.bytes_per_s = None
    hub.log.clear()
    pull(hub)
    assert_pulled(hub)
    assert [request.headers.get("Range") for request in hub.bodies(SHARD)] == [f"bytes={grown}-"]


def test_stopping_leaves_at_once_and_keeps_what_came(hub: FakeHub, hub_cache: Path) -> None:
    hub.faults[SHARD] = [Fault(stall_after=50_000)]
    planned, client = plan(hub, limits=HubLimits(stall_s=30))

    def interrupt(progress: PullProgress) -> None:
        if any(file.num_bytes == 50_000 for file in progress.files):
            raise KeyboardInterrupt

    started_s = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_pull(planned, client, interrupt)
    assert time.monotonic() - started_s < 4
    assert_nothing_counts(hub_cache)
    assert 50_000 in [path.stat().st_size for path in hub_cache.rglob("*-partial")]


@pytest.mark.parametrize("count", range(8))
def test_a_pull_that_dies_while_it_names_files_leaves_no_model(
    count: int, hub: FakeHub, hub_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = Path.replace, []

    def dying(path: Path, target: Path) -> Path:
        if "snapshots" in path.parts or "refs" in path.parts:
            calls.append(target.name)
            if len(calls) > count:
                raise SystemExit(143)
        return real(path, target)

    monkeypatch.setattr(Path, "replace", dying)
    with pytest.raises(SystemExit):
        pull(hub)
    assert calls[6:] == ["config.json", "main"][: max(0, count - 5)]  # after all other names
    assert_nothing_counts(hub_cache)
    monkeypatch.setattr(Path, "replace", real)
    pull(hub)
    assert_pulled(hub)


def test_two_pulls_of_one_model_do_not_meet(hub: FakeHub) -> None:
    pull(hub)
    with (
        only_one(CachedRepository.of(REPOSITORY).folder, "pulls it"),
        pytest.raises(BusyError, match="another process"),
    ):
        pull(hub)


def test_a_disk_that_fails_is_told_and_what_came_stays(
    hub: FakeHub, hub_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pulled = threading.Event()
    real = os.fsync

    def full(descriptor: int) -> None:
        if pulled.is_set():
            raise OSError(28, "No space left on device")
        real(descriptor)

    pulled.set()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="cannot write: No space left"):
        pull(hub)
    monkeypatch.setattr(os, "fsync", real)
    assert_nothing_counts(hub_cache)
    pull(hub)
    assert_pulled(hub)
