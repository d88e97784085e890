"""Every end of a command has its code and its lines."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from salalocal.errors import HubError, NumericError
from salalocal.terminal.exits import run


def ending(error: BaseException | None = None, code: object = None) -> Any:
    def app(**_options: object) -> object:
        if error is not None:
            raise error
        return code

    return app


@pytest.fixture(autouse=True)
def state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.delenv("SALALOCAL_DEBUG", raising=False)


@pytest.mark.parametrize(
    ("app", "code"),
    [
        (ending(), 0),
        (ending(code=3), 3),
        (ending(HubError("gone", "fetch")), 5),
        (ending(NumericError("NaN")), 7),
        (ending(KeyboardInterrupt()), 130),
        (ending(typer.Abort()), 130),
        (ending(BrokenPipeError(32, "gone")), 141),
        (ending(SystemExit(9)), 9),
        (ending(typer.BadParameter("wrong")), 2),
    ],
)
def test_codes(app: Any, code: int, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "dup2", lambda *_: None)
    assert run(app, []) == code


def test_our_own_errors_are_two_lines(capsys: pytest.CaptureFixture[str]) -> None:
    run(ending(HubError("gone", "fetch")), [])
    assert capsys.readouterr() == ("", "error: gone\nhint: fetch\n")


def test_interrupts_say_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    run(ending(KeyboardInterrupt()), [])
    assert capsys.readouterr() == ("", "")


def test_json_ends_in_a_document_even_then(capsys: pytest.CaptureFixture[str]) -> None:
    run(ending(HubError("gone", "fetch")), ["ask", "--json"])
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"error": {"message": "gone", "hint": "fetch", "exit_code": 5}}
    assert captured.err == "error: gone\nhint: fetch\n"


def test_a_bug_names_its_log(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run(ending(ZeroDivisionError("a\x1b\n" * 500)), []) == 1
    error, hint = capsys.readouterr().err.splitlines()
    assert error.startswith("error: a bug in salalocal, written to ") and "ZeroDivisionError: a\\x1b" in error
    assert len(error) <= 300
    log = next((tmp_path / "salalocal" / "log").iterdir())
    assert str(log) in error and "ZeroDivisionError" in log.read_text() and "report" in hint


def in_a_process(app_body: str, **streams: Any) -> "subprocess.CompletedProcess[str]":
    code = "import sys; from salalocal.errors import HubError; from salalocal.terminal.exits import run\n"
    code += f"def app(**_): {app_body}\nraise SystemExit(run(app, ['--json']))"
    return subprocess.run([sys.executable, "-c", code], text=True, check=False, **streams)


@pytest.mark.parametrize("num_chars", [10, 100_000])
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_behind_stdout_is_one_clear_line(num_chars: int) -> None:
    with Path("/dev/full").open("w") as full:
        done = in_a_process(f"sys.stdout.write('x' * {num_chars})", stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 4
    assert done.stderr == (
        "error: cannot write the output: No space left on device\nhint: make room, or write elsewhere\n"
    )


def test_a_full_disk_elsewhere_names_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(ending(OSError(errno.ENOSPC, "No space left on device", "/big/file")), ["--json"]) == 4
    captured = capsys.readouterr()
    assert captured.err.startswith("error: cannot write /big/file: No space left on device\n")
    assert json.loads(captured.out)["error"]["exit_code"] == 4


@pytest.mark.parametrize("place", ["stdout", "stderr"])
def test_an_error_keeps_its_code_where_nothing_can_be_written(place: str) -> None:
    read, write = os.pipe()
    os.close(read)
    other = "stderr" if place == "stdout" else "stdout"
    streams = {place: write, other: subprocess.PIPE}
    done = in_a_process("raise HubError('gone', 'fetch')", **streams)
    os.close(write)
    said = done.stderr if place == "stdout" else done.stdout
    assert done.returncode == 5 and "gone" in said and "Traceback" not in said and "ignored" not in said


def test_debugging_shows_the_traceback(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SALALOCAL_DEBUG", "1")
    run(ending(HubError("gone", "fetch")), [])
    assert "Traceback" in capsys.readouterr().err


def test_sigterm() -> None:
    def app(**_options: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    assert run(app, []) == 143
    assert signal.getsignal(signal.SIGTERM) is before
