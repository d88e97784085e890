"""The eval commands from outside: help, streams, exit codes, a stopped run that goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_model

from salalocal.cli import app
from salalocal.settings import READERS
from salalocal.terminal.exits import run

GOLDEN = Path(__file__).parent / "golden"
COMMANDS = ("needle", "ruler", "mrcr", "recall", "ppl")


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in READERS:
        monkeypatch.delenv(f"SALALOCAL_{name.upper()}", raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERMINAL_WIDTH", "80")


@pytest.fixture
def folder(tmp_path: Path, seed: int) -> Path:
    """A tiny model in model/ and two readable files in docs/."""
    tiny_model.write_tiny_model(tmp_path / "model", seed)
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "config.py").write_text("MAX_RETRIES = 5\n")
    (docs / "notes.md").write_text("the value of data\n" * 9)
    return tmp_path


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_as_documented(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """SALALOCAL_WRITE_GOLDEN=1 writes the files anew."""
    assert run(app, ["eval", command, "--help"]) == 0
    shown, path = capsys.readouterr().out, GOLDEN / f"help-eval-{command}.txt"
    if os.environ.get("SALALOCAL_WRITE_GOLDEN"):
        path.write_text(shown)
    assert shown == path.read_text()
    assert max(map(len, shown.splitlines())) <= 80


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["needle", "--ctx", "100"], 2, "--ctx 100"),
        (["needle", "--ctx", "much"], 2, "much"),
        (["needle", "--ctx", ","], 2, "no context length"),
        (["needle", "--form", "nail"], 2, "constant, sentence"),
        (["needle", "--plot", "map.gif"], 2, "map.gif"),
        (["needle", "--at-least", "90"], 2, "--at-least"),
        (["needle", "--model", "nobody/nothing"], 5, "nobody/nothing"),
        (["needle", "-f", "missing.txt"], 4, "missing.txt"),
        (["ruler", "--tasks", "single,nothing"], 2, "nothing"),
        (["mrcr", "--needles", "two"], 2, "two"),
        (["mrcr", "--needles", "9"], 2, "from 2 to 8"),
        (["recall"], 2, "no file given"),
        (["ppl", "--ctx", "64", "--stride", "64"], 2, "--stride"),
        (["ppl", "-f", "missing.txt"], 4, "missing.txt"),
    ],
)
def test_errors_have_a_code_and_two_lines(
    arguments: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(app, ["eval", *arguments]) == code
    captured = capsys.readouterr()
    assert said in captured.err and "\nhint: " in captured.err and captured.out == ""
    assert all(len(line) <= 300 for line in captured.err.splitlines())


def needle(folder: Path, *more: str) -> list[str]:
    model = ["--model", str(folder / "model"), "--max-tokens", "4", "-f", str(folder / "docs")]
    return ["eval", "needle", *model, "--ctx", "512", "--depths", "2", "--samples", "1", *more]


def test_needle_shows_a_table_and_draws_a_map(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(app, needle(folder, "--plot", str(folder / "map.svg"))) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines()[:3] == ["depth  512", "0 %      0", "100 %    0"]
    assert "haystack: 2 files" in captured.err and "measured in" in captured.err
    assert (folder / "map.svg").read_text().startswith("<svg")
    assert run(app, needle(folder, "--json", "--quiet", "--at-least", "0.5")) == 7
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert report["total"]["asked"] == 2 and len(report["cells"]) == 2
    error, hint = captured.err.splitlines()
    assert error == "error: 0.0 % right, --at-least asks for 50.0 %" and hint.endswith("records.jsonl")


@pytest.mark.parametrize(
    "flags", [["--device", "cpu", "--kv-place", "host"], ["--dtype", "foo"], ["--kv-cache", "foo"], ["--math", "foo"]]
)
def test_a_refused_evaluation_leaves_nothing_behind(
    flags: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = folder / "records"
    ppl = ["eval", "ppl", "--model", str(folder / "model"), "-f", str(folder / "docs"), "--tokens", "9"]
    for arguments in (needle(folder), ppl):
        for place in ([], ["--out", str(out)], ["--out", str(out), "--fresh"]):
            assert run(app, [*arguments, *flags, *place]) == 2, capsys.readouterr().err
            assert not out.exists() and not (folder / "state").exists()
    assert run(app, needle(folder, "--out", str(out), "--depths", "1")) == 0
    records = (out / "records.jsonl").read_bytes()
    assert run(app, needle(folder, *flags, "--out", str(out), "--fresh")) == 2
    assert (out / "records.jsonl").read_bytes() == records


def test_an_interrupt_says_that_the_run_goes_on(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("salalocal.evals.asking.read_prompt", interrupt)
        assert run(app, needle(folder)) == 130
    assert capsys.readouterr().err.endswith("stopped; the same command goes on from here\n")


def test_the_other_evaluations_end_in_one_json_document(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("salalocal.evals.mrcr.MIN_LENGTH", 512)
    monkeypatch.setattr("salalocal.evals.ruler.MIN_LENGTH", 512)  # the tiny model reads a row at a time
    model = ["--model", str(folder / "model"), "--json"]
    files = ["-f", str(folder / "docs")]
    few = ["--max-tokens", "4", "--samples", "1"]
    for arguments, axis in (
        (["ruler", "--ctx", "600", "--tasks", "single,files", *few, *files], "by_task"),
        (["mrcr", "--ctx", "1200", "--needles", "2", *few], "by_needles"),
        (["recall", "--questions", "1", "--max-tokens", "4", *files], "by_kind"),
        (["ppl", "--ctx", "64", "--tokens", "100", *files], "by_position"),
    ):
        assert run(app, ["eval", *arguments, *model]) == 0, arguments
        report = json.loads(capsys.readouterr().out)
        assert report["evaluation"] == arguments[0] and report[axis]


@pytest.mark.skipif(os.name == "nt", reason="no such signals there")
def test_a_killed_run_goes_on(folder: Path) -> None:
    arguments = [sys.executable, "-m", "salalocal", *needle(folder, "--samples", "4", "--out", str(folder / "records"))]
    first = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    path = folder / "records" / "records.jsonl"
    deadline_s = time.monotonic() + 60
    while time.monotonic() < deadline_s and not (path.exists() and path.read_bytes().count(b"\n") >= 2):
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.wait()
    kept = path.read_bytes()
    kept = kept[: kept.rfind(b"\n") + 1]
    assert kept.count(b"\n") >= 2
    done = subprocess.run(arguments, capture_output=True, check=True)
    assert f"{kept.count(bytes([10]))} of 8 questions were answered before".encode() in done.stderr
    assert path.read_bytes().startswith(kept) and path.read_bytes().count(b"\n") == 8
