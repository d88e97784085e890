"""What pull tells and gives back, with the hub of this machine set to a fake one."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import catalog_cases
import fake_hub
import pytest
from fake_hub import FakeHub

from salalocal.checkpoint.hub_client import HubClient
from salalocal.errors import HubError, RequestError
from salalocal.session.plan import RELEASED_MODEL
from salalocal.session.pulling import PullReport, PullRequest, pull_model


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> Iterator[FakeHub]:
    catalog_cases.use_empty_places(tmp_path, monkeypatch)
    catalog_cases.write_model(tmp_path / "hub" / RELEASED_MODEL, seed)
    (tmp_path / "hub" / RELEASED_MODEL / "modeling\x1b[2J.py").write_text("x")
    with fake_hub.running(tmp_path / "hub") as running:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", running.url)
        yield running


def pull(**wishes: object) -> tuple[PullReport, list[str]]:
    told: list[str] = []
    return pull_model(PullRequest(**wishes), lambda progress: None, told.append), told  # type: ignore[arg-type]


def test_a_pull_tells_what_it_does(hub: FakeHub) -> None:
    report, told = pull()
    commit = hub.commit(RELEASED_MODEL)
    assert told[0] == f"model: {RELEASED_MODEL}, revision main, from {hub.url}"
    assert told[1].startswith(f"commit {commit[:12]}: 8 files, ")
    assert told[2] == "not fetched, since no model is made of them: 'modeling\\x1b[2J.py'"
    assert report.folder is not None and report.folder.name == commit == report.listing.commit
    assert report.fetched_bytes == report.listing.num_bytes
    again, told = pull()
    assert again.fetched_bytes == 0 and told[-1].endswith("are here already and are checked")


def test_a_dry_run_has_no_folder(hub: FakeHub, tmp_path: Path) -> None:
    report, told = pull(is_dry_run=True)
    assert report.folder is None and report.fetched_bytes == report.listing.num_bytes and len(told) == 3
    assert not (tmp_path / "hf").exists()


def test_offline_checks_what_is_here(hub: FakeHub) -> None:
    with pytest.raises(HubError, match="not on this machine"):
        pull(is_offline=True)
    pull()
    hub.log.clear()
    report, told = pull(is_offline=True)
    assert report.plan is None and report.fetched_bytes == 0 and told[0].endswith("no hub is asked")
    assert not hub.log and report.listing.num_bytes > 100_000


def test_a_revision_comes_from_the_flag_or_the_name(hub: FakeHub) -> None:
    assert pull(revision="v1")[0].revision == "v1" == pull(model=f"{RELEASED_MODEL}@v1")[0].revision
    with pytest.raises(HubError, match="it has no such revision"):
        pull(revision="v2")


@pytest.mark.parametrize(
    ("wishes", "said"),
    [
        ({"model": "builtin"}, "came with salalocal"),
        ({"model": "builtin:bf16"}, "came with salalocal"),
        ({"model": "./folder"}, "not a hub id"),
        ({"model": "acme"}, "not a hub id"),
        ({"model": "a/b", "revision": "../x"}, "is no revision"),
        ({"model": "a/b@"}, "is no revision"),
    ],
)
def test_names_that_no_hub_has(wishes: dict[str, str], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        pull(**wishes)


def test_an_interrupted_pull_says_how_to_go_on(hub: FakeHub) -> None:
    told: list[str] = []

    def interrupt(progress: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pull_model(PullRequest(), interrupt, told.append)
    assert told[-1] == "stopped: the same command goes on from here"


def test_a_token_is_only_sent_where_the_user_is_logged_in(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_a_secret")
    pull()
    assert {request.headers.get("Authorization") for request in hub.log if request.host == "127.0.0.1"} == {
        "Bearer hf_a_secret"
    }
    assert HubClient("https://example.invalid").endpoint == "https://example.invalid"


AUDITED = """
import sys
from salalocal.checkpoint.hub import find_model
from salalocal.session.runtime import LoadOptions, open_runtime
folder = find_model({model!r})
open_runtime(folder, "warm", LoadOptions("cpu"))  # what is imported on the way is imported now
seen = []
watched = ("pickle.", "exec", "compile", "subprocess.", "socket.", "os.system", "os.exec", "import")
sys.addaudithook(lambda event, arguments: seen.append((event, str(arguments)[:80])) if event.startswith(watched) else 0)
open_runtime(folder, "again", LoadOptions("cpu"))
sys.exit(f"{{seen}}" if seen else 0)
"""


def test_loading_what_was_pulled_runs_no_code_and_asks_nobody(hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "hub" / RELEASED_MODEL / "configuration_minicpm_sala.py").write_text("raise SystemExit(3)")
    pull()
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hf" / "hub"), "CUDA_VISIBLE_DEVICES": ""}
    code = AUDITED.format(model=RELEASED_MODEL)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
