"""The commands about models from outside: help, streams, exit codes, completion."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import catalog_cases
import fake_hub
import pytest

from salalocal.cli import app
from salalocal.session.plan import RELEASED_MODEL
from salalocal.terminal.exits import run

GOLDEN = Path(__file__).parent / "golden"
COPY = "acme--tiny-int4-g128-rtn"


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    catalog_cases.use_empty_places(tmp_path, monkeypatch)
    for name in ("NO_COLOR", "FORCE_COLOR", "HF_TOKEN", "SALALOCAL_DEBUG", "SALALOCAL_DEVICE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERMINAL_WIDTH", "80")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> Iterator[fake_hub.FakeHub]:
    catalog_cases.write_model(tmp_path / "hub" / RELEASED_MODEL, seed)
    with fake_hub.running(tmp_path / "hub") as running:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", running.url)
        yield running


@pytest.fixture
def models(seed: int) -> Path:
    """acme/tiny in the hub's cache, and a quantized copy of it."""
    source = catalog_cases.put_into_cache("acme/tiny", seed)
    return catalog_cases.make_copy(source, COPY)


@pytest.mark.parametrize("command", ["pull", "ls", "show", "rm", "doctor", "config"])
def test_help_is_as_documented(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """SALALOCAL_WRITE_GOLDEN=1 writes the files anew."""
    assert run(app, [command, "--help"]) == 0
    shown, path = capsys.readouterr().out, GOLDEN / f"help-{command}.txt"
    if os.environ.get("SALALOCAL_WRITE_GOLDEN"):
        path.write_text(shown)
    assert shown == path.read_text()
    assert max(map(len, shown.splitlines())) <= 80


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["pull", "builtin"], 2, "came with salalocal"),
        (["pull", "../x"], 2, "not a hub id"),
        (["pull", "acme/none"], 5, "no such model on the hub"),
        (["pull", "--revision", "v9"], 5, "no such revision"),
        (["pull", "--offline"], 5, "not on this machine"),
        (["show", "acme/none"], 5, "salalocal pull acme/none"),
        (["show"], 2, "MODEL"),
        (["rm", "acme/none"], 2, "salalocal ls"),
        (["rm", "builtin", "--yes"], 2, "came with salalocal"),
        (["ls", "--device", "tpu"], 2, "tpu"),
        (["chat", "--model", "acme/none@v1"], 5, "salalocal pull acme/none --revision v1"),
    ],
)
def test_errors_have_a_code_and_two_lines(
    arguments: list[str], code: int, said: str, hub: fake_hub.FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(app, arguments) == code
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("error: "))
    assert said in captured.err and "Traceback" not in captured.err and captured.out == ""
    assert [line[:6] for line in lines[first + 1 :]] == ["hint: "]
    assert all(len(line) <= 300 for line in lines)


def test_pull_puts_what_it_made_on_stdout(hub: fake_hub.FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(app, ["pull", "--dry-run", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["folder"] is None and planned["fetch_bytes"] == planned["total_bytes"] > 0
    assert run(app, ["pull"]) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines()[-1].endswith(hub.commit(RELEASED_MODEL))
    assert captured.err.startswith(f"model: {RELEASED_MODEL}, revision main, from {hub.url}\n")
    assert run(app, ["pull", "-q", "--json", "--offline"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["fetch_bytes"] == 0 and captured.err == ""
    assert run(app, ["pull", "acme/none", "--json"]) == 5
    assert json.loads(capsys.readouterr().out)["error"]["exit_code"] == 5


def test_models_are_listed_and_shown(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(app, ["ls"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["model", "builtin", "builtin:bf16", COPY, "acme/tiny"]
    assert run(app, ["ls", "--json"]) == 0
    listed = {entry["model"]: entry for entry in json.loads(capsys.readouterr().out)["models"]}
    assert listed[COPY]["method"] == "rtn" and listed["acme/tiny"]["longest_context_tokens"] > 10**5
    assert run(app, ["show", COPY]) == 0
    shown = capsys.readouterr().out
    assert "int4, groups of 128" in shown and "licence      apache-2.0" in shown
    assert run(app, ["show", str(models), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["weights"] == "int4"


class Keyboard(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_model_is_removed_after_a_yes(
    models: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert run(app, ["rm", COPY]) == 2 and f"salalocal rm --yes {COPY}" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdin", Keyboard("n\n"))
    assert run(app, ["rm", COPY]) == 1 and models.is_dir()
    assert "nothing deleted" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdin", Keyboard("y\n"))
    assert run(app, ["rm", COPY]) == 0 and not models.exists()
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.endswith(f"deleted {captured.err.rpartition('deleted ')[2]}")
    assert run(app, ["rm", "-y", "-q", "acme/tiny", "acme/tiny"]) == 0
    assert capsys.readouterr() == ("", "")


def test_one_name_that_is_wrong_removes_nothing(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(app, ["rm", "--yes", COPY, "acme/none"]) == 2 and models.is_dir()


def test_doctor_and_config_are_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(app, ["doctor", "--offline", "--json"]) in (0, 6)
    findings = json.loads(capsys.readouterr().out)["findings"]
    assert {"packages", "memory", "hub", "model"} <= {finding["name"] for finding in findings}
    (tmp_path / "config" / "salalocal").mkdir(parents=True)
    (tmp_path / "config" / "salalocal" / "settings.toml").write_text("top_k = 40\n")
    assert run(app, ["config"]) == 0
    captured = capsys.readouterr()
    assert "top_k        40" in captured.out and "settings.toml" in captured.out and captured.err == ""
    assert run(app, ["config", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["settings"]["top_k"]["value"] == 40


def test_doctor_has_the_exit_code_of_what_is_wrong(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "config" / "salalocal").mkdir(parents=True)
    (tmp_path / "config" / "salalocal" / "settings.toml").write_text("nonsense = 40\n")
    assert run(app, ["doctor", "--offline"]) in (2, 6)
    assert "PROBLEM settings: unknown setting" in capsys.readouterr().out


def complete(typed: str, tmp_path: Path) -> list[str]:
    """What a shell would offer behind these words, from a process of its own."""
    code = "from salalocal.cli import app; import sys; app(prog_name='salalocal')"
    words = {"_SALALOCAL_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(len(typed.split(" ")) - 1)}
    environment = {**os.environ, **words, "HF_HUB_CACHE": str(tmp_path / "hf" / "hub")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=False)
    return done.stdout.decode().split()


def test_a_shell_completes_commands_and_models(models: Path, tmp_path: Path) -> None:
    assert complete("salalocal do", tmp_path) == ["doctor"]
    assert complete("salalocal show ", tmp_path) == ["builtin", COPY, "acme/tiny"]
    assert complete("salalocal chat --model acme/", tmp_path) == ["acme/tiny"]


def test_lists_and_completion_load_no_torch(models: Path, tmp_path: Path) -> None:
    code = "import sys; from salalocal.session.catalog import list_models, model_names;"
    code += "assert list_models() and model_names(); sys.exit(9 if 'torch' in sys.modules else 0)"
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hf" / "hub")}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0
