"""Names of strangers build no path but the one meant, and links in the cache lead nowhere else."""

import ast
import os
from pathlib import Path

import pytest
from fake_hub import FakeHub
from hypothesis import given
from hypothesis import strategies as st
from pull_cases import REPOSITORY, SHARD, assert_pulled, plan, pull

from salalocal.checkpoint import hub_cache as hub_cache_module
from salalocal.checkpoint.hub_cache import CachedRepository, is_revision, is_wanted_name
from salalocal.errors import CheckpointError, HubError

HOSTILE = [
    "../config.json", "/etc/passwd", "a/config.json", "..", ".", "", "config.json/..", "C:\\config.json",
    "c:config.json", "\\\\srv\\share\\x.safetensors", "config.json\0", "config.json\n", "config .json",
    "x" * 300 + ".safetensors", "con.safetensors", "NUL.safetensors", "com1.safetensors", "model.safetensors.",
    "model.safetensors ", ".safetensors", "-rf.safetensors", "..safetensors", "a..b.safetensors",
    "cafe\u0301.safetensors", "caf\u00e9.safetensors", "\u202emodel.safetensors", "config.json.py", "tokenizer.py",
    "tokenizer.model", "model.pt", "model.bin", "Config.json", "config..json", "config.a/b.json", "README.md/x",
    "%2e%2e/config.json", "~/config.json", "$HOME.safetensors",
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_reach_no_path(name: str, hub_cache: Path) -> None:
    assert not is_wanted_name(name)
    with pytest.raises(HubError, match="not a file of a model"):
        CachedRepository.of(REPOSITORY).file("0" * 40, name)


def test_hostile_names_of_a_repository_are_left_where_they_are(hub: FakeHub, hub_cache: Path, tmp_path: Path) -> None:
    entries = [{"rfilename": name, "size": 3, "blobId": "0" * 40} for name in HOSTILE]
    hub.listing = lambda reply: {**reply, "siblings": [*reply["siblings"], *entries]}
    planned, _ = plan(hub)
    assert set(HOSTILE) <= set(planned.listing.left_out) and not hub_cache.exists()
    before = set(tmp_path.rglob("*"))
    pull(hub)
    assert_pulled(hub)
    assert all(hub_cache.parent in (path, *path.parents) for path in set(tmp_path.rglob("*")) - before)


@pytest.mark.parametrize("hub_id", ["../../x", "acme", "a/b/c", "acme/..", "a--b/c", "acme/tiny\n", "/acme", "acme/"])
def test_what_is_no_hub_id_has_no_place_in_the_cache(hub_id: str, hub_cache: Path) -> None:
    with pytest.raises(HubError, match="not a hub id"):
        CachedRepository.of(hub_id)


@pytest.mark.parametrize("revision", ["../../x", "", "a//b", "/etc", "x.lock", "a/../b", "-x", "\n", "a b", "x/" * 9])
def test_what_is_no_revision_is_refused(revision: str, hub_cache: Path) -> None:
    repository = CachedRepository.of(REPOSITORY)
    assert repository.commit_of(revision) is None
    with pytest.raises(HubError, match="no revision"):
        repository.set_ref(revision, "0" * 40)


@given(st.text(max_size=40))
def test_a_wanted_name_is_one_plain_name(name: str) -> None:
    if is_wanted_name(name):
        assert Path(name).name == name and name.isascii() and "/" not in name and "\\" not in name and ":" not in name


@given(st.text(alphabet="ab./\\:-_~\0 ", max_size=20))
def test_a_revision_stays_below_its_folder(text: str) -> None:
    if is_revision(text):
        place = (Path("/refs") / text).as_posix()
        assert os.path.normpath(place) == place and place.startswith("/refs/")


@pytest.mark.parametrize("what", ["models--acme--tiny", "models--acme--tiny/blobs", "models--acme--tiny/refs"])
def test_links_in_the_cache_are_not_followed(what: str, hub: FakeHub, hub_cache: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (hub_cache / what).parent.mkdir(parents=True)
    (hub_cache / what).symlink_to(outside)
    with pytest.raises(CheckpointError, match="not a folder of its own"):
        pull(hub)
    assert not list(outside.iterdir())


def test_a_link_in_the_place_of_a_file_is_replaced_not_followed(hub: FakeHub, hub_cache: Path, tmp_path: Path) -> None:
    planned, _ = plan(hub)
    victim = tmp_path / "victim"
    victim.write_text("mine")
    blobs = hub_cache / "models--acme--tiny" / "blobs"
    blobs.mkdir(parents=True)
    for file in planned.listing.files:
        for name in (file.digest, f"{file.digest}.salalocal-partial", f"{file.digest}.salalocal-etag"):
            (blobs / name).symlink_to(victim)
    snapshot = planned.repository.snapshot(planned.listing.commit)
    snapshot.mkdir(parents=True)
    (snapshot / SHARD).symlink_to(victim)
    pull(hub)
    assert_pulled(hub)
    assert victim.read_text() == "mine"


@pytest.mark.parametrize(
    "module",
    ["checkpoint/hub_client", "checkpoint/hub_listing", "checkpoint/transfer", "checkpoint/pull", "session/pulling"],
)
def test_only_hub_cache_joins_names_of_strangers_to_folders(module: str) -> None:
    tree = ast.parse((Path(hub_cache_module.__file__).parents[1] / f"{module}.py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
            words = {part.id for part in ast.walk(node.right) if isinstance(part, ast.Name)}
            words |= {part.attr for part in ast.walk(node.right) if isinstance(part, ast.Attribute)}
            assert not words & {"name", "digest", "revision", "commit", "hub_id", "file", "entry"}, ast.unparse(node)
        called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        assert not called.endswith(("joinpath", "path.join", "with_name")) and called != "Path", ast.unparse(node)
