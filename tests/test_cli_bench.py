"""`salalocal bench` from outside: help, formats on stdout, narration on stderr, files, exit codes."""

import csv
import io
import json
import os
from pathlib import Path

import pytest
import tiny_model
import torch

from salalocal.bench import ceilings
from salalocal.bench.subject import EngineSubject
from salalocal.cli import app
from salalocal.settings import READERS
from salalocal.terminal.exits import run

GOLDEN = Path(__file__).parent / "golden" / "help-bench.txt"


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in (*(f"SALALOCAL_{name.upper()}" for name in READERS), "SALALOCAL_CONFIG", "NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERMINAL_WIDTH", "80")
    monkeypatch.setattr(ceilings, "_CPU_BYTES", 2**22)
    monkeypatch.setattr(ceilings, "_CPU_PRODUCT", (32, 128, 128))
    monkeypatch.setattr(ceilings, "_ENOUGH_S", 0.0)


@pytest.fixture
def model(tmp_path: Path, seed: int) -> list[str]:
    folder = tiny_model.write_tiny_model(tmp_path / "model", seed)
    return ["bench", "--model", str(folder), "--device", "cpu", "--ctx", "24,40", "--gen", "2", "-r", "1"]


def test_help_is_as_documented(capsys: pytest.CaptureFixture[str]) -> None:
    """SALALOCAL_WRITE_GOLDEN=1 writes the file anew."""
    assert run(app, ["bench", "--help"]) == 0
    shown = capsys.readouterr().out
    if os.environ.get("SALALOCAL_WRITE_GOLDEN"):
        GOLDEN.write_text(shown)
    assert shown == GOLDEN.read_text()
    assert max(map(len, shown.splitlines())) <= 80


def test_tables_go_to_stdout_and_narration_to_stderr(
    model: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(app, [*model, "--plot", str(tmp_path / "bench.svg")]) == 0
    out, err = capsys.readouterr()
    assert out.count("| context |") == 1 and "prefill tok/s" in out and "model:" not in out
    assert "model:" in err and "plot:" in err
    assert (tmp_path / "bench.svg").read_text().startswith("<svg")


def test_every_format_is_read_by_its_reader(model: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    shown = {}
    for form in ("json", "csv"):
        assert run(app, [*model, "-q", "--output", form]) == 0
        out, err = capsys.readouterr()
        assert err == ""
        shown[form] = out
    assert [row["n_depth"] for row in json.loads(shown["json"])["tests"]] == [0, 24, 24, 40]
    assert len(list(csv.DictReader(io.StringIO(shown["csv"])))) == 4


@pytest.mark.parametrize(
    "wrong",
    [
        ["--output", "yaml"],
        ["--ctx", "64k,many"],
        ["--ctx", ","],
        ["--baseline", "moe"],
        ["--plot", "bench.pdf"],
        ["--plot", "/no/such/folder/bench.svg"],
        ["--project", "RTX 5090"],
        ["--memory-cap", "8g"],
        ["--math", "int3"],
        ["--kv-cache", "int2"],
        ["--gen", "0"],
        ["--dtype", "int3"],
        ["--chunk-size", "none"],
    ],
)
def test_wrong_usage_is_refused_with_a_hint(
    model: list[str], wrong: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(app, [*model, *wrong]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "error: " in err and "Traceback" not in err
    assert all(len(line) <= 300 for line in err.splitlines())


def test_json_asks_for_json_alone(model: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(app, [*model, "--json", "--output", "csv"]) == 2
    assert "contradict" in json.loads(capsys.readouterr().out)["error"]["message"]


def test_a_depth_that_memory_does_not_hold_ends_in_code_3_with_what_was_measured(
    model: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begin = EngineSubject.begin

    def begin_small(self: EngineSubject, capacity: int) -> None:
        if capacity > 1000:
            raise torch.OutOfMemoryError("too much")
        begin(self, capacity)

    monkeypatch.setattr(EngineSubject, "begin", begin_small)
    assert run(app, [*model, "-q", "--ctx", "24,2000", "--chunk-size", "32"]) == 3
    out = capsys.readouterr().out
    assert "2000: out of memory while making room for 2,000 tokens" in out and "|      24 |" in out
