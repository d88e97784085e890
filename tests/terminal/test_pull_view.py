"""A pull on screen: bars that fit the terminal, lines in a pipe, and what stands at the end."""

import io
import json
from pathlib import Path

import checkpoint_cases
import pytest
from rich.console import Console

from salalocal.checkpoint.hub_cache import CachedRepository
from salalocal.checkpoint.hub_listing import Listing, RemoteFile
from salalocal.checkpoint.pull import CHECKING, DONE, FETCHING, WAITING, FileProgress, FileState, PullPlan, PullProgress
from salalocal.session.pulling import PullReport
from salalocal.terminal.console import Terminal, make_terminal
from salalocal.terminal.pull_view import PullView, pull_json, pull_lines

GIB = 2**30
PROGRESS = PullProgress(
    (
        FileProgress("config.json", DONE, 1000, 1000),
        FileProgress("model-00001-of-00004.safetensors", FETCHING, GIB, 4 * GIB, "", 50 * 2**20),
        FileProgress("model-00002-of-00004.safetensors", FETCHING, GIB, 4 * GIB, "the hub answers 503; again in 4 s"),
        FileProgress("model-00003-of-00004.safetensors", CHECKING, 3 * GIB, 4 * GIB),
        FileProgress("model-00004-of-00004.safetensors", WAITING, 0, 4 * GIB),
    ),
    bytes_per_s=50 * 2**20,
    left_s=224.0,
    elapsed_s=61.0,
)
LISTING = Listing(
    "acme/big",
    "0" * 40,
    (RemoteFile("config.json", 1000, "1" * 40), RemoteFile("model.safetensors", 4 * GIB, "2" * 64)),
    ("modeling.py",),
    checkpoint_cases.small_config(),
)


def report(folder: Path | None) -> PullReport:
    states = (FileState(LISTING.files[0], 1000), FileState(LISTING.files[1], GIB))
    plan = PullPlan(LISTING, "main", CachedRepository("acme/big", Path("/hub")), states, 70 * GIB)
    return PullReport(LISTING, "main", folder, plan, 60.0)


@pytest.mark.parametrize("width", [40, 80, 120])
def test_the_bars_fit_the_terminal(width: int) -> None:
    err = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None, legacy_windows=False)
    view = PullView(Terminal(make_terminal().out, err))
    view.show(PROGRESS)
    view.close()
    shown = err.file.getvalue()  # type: ignore[attr-defined]
    lines = [line for line in shown.replace("\r", "\n").split("\n") if "%" in line]
    assert lines[0].lstrip("\x1b[?25l").startswith("31% of 16.0 GiB, 50.0 MiB/s")
    assert all(len(line.replace("\x1b[?25l", "")) <= width for line in lines)
    if width >= 80:
        assert "25% 50.0 MiB/s, 1:01 left" in shown and "75% checking" in shown and "1/5 files" in shown
        assert "00004-of-00004" not in shown


def test_a_pipe_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    err = io.StringIO()
    view = PullView(make_terminal(err=err))
    view.show(PROGRESS)
    assert err.getvalue() == ""
    monkeypatch.setattr("time.monotonic", lambda: 1e9)
    view.show(PROGRESS)
    assert err.getvalue().startswith("pulling: 31% of 16.0 GiB, 50.0 MiB/s, 3:44 left, 1/5 files, the hub answers 503")
    view.close()


def test_a_quiet_terminal_gets_nothing() -> None:
    err = io.StringIO()
    view = PullView(make_terminal(is_quiet=True, err=err))
    view.show(PROGRESS)
    view.close()
    assert err.getvalue() == ""


def test_a_dry_run_lists_the_files() -> None:
    assert list(pull_lines(report(None))) == [
        "1000 bytes  here      config.json",
        "  4.0 GiB  25% here  model.safetensors",
        "to fetch: 3.0 GiB of 4.0 GiB",
        "free on the disk: 70.0 GiB",
    ]


def test_a_pull_ends_with_the_folder() -> None:
    assert list(pull_lines(report(Path("/hub/x")))) == [
        f"acme/big, commit {'0' * 40}",
        "2 files, 4.0 GiB, every hash is right",
        "fetched 3.0 GiB in 1:00, 51.2 MiB/s",
        "/hub/x",
    ]


def test_the_same_as_json() -> None:
    document = json.loads(json.dumps(pull_json(report(None))))
    assert document["fetch_bytes"] == 3 * GIB and document["folder"] is None and document["free_bytes"] == 70 * GIB
    assert document["files"][1] == {
        "name": "model.safetensors", "bytes": 4 * GIB, "here_bytes": GIB, "digest": "2" * 64,
    }  # fmt: skip
    assert document["not_fetched"] == ["modeling.py"]
