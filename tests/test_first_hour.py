"""The first hour of a user, as docs/first-hour.md has it: every command as it stands there, on a hub of our own.

The model is small, so contexts to plan and to measure are, too, and the shipped texts are short.
"""

import io
import json
import re
import shlex
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import catalog_cases
import fake_hub
import pytest

from salalocal.bench.ceilings import Ceilings
from salalocal.checkpoint.hub import find_model
from salalocal.cli import app
from salalocal.device import DeviceMemory
from salalocal.evals import comparison
from salalocal.session import quantizing
from salalocal.session.plan import RELEASED_MODEL
from salalocal.session.texts import TokenText
from salalocal.terminal.exits import run

GUIDE = (Path(__file__).parents[1] / "docs" / "first-hour.md").read_text()

# As the guide has them, but for what would take minutes without a card.
SMALLER = {"256k": "1k", "64k,256k": "128,256"}
SHORT_BENCH = ["--gen", "4", "-r", "1"]


def commands() -> list[list[str]]:
    """The commands of the guide, word by word."""
    match = re.search(r"<!-- first hour -->\n```sh\n(.*?)```", GUIDE, re.DOTALL)
    assert match is not None
    return [shlex.split(line)[1:] for line in match[1].splitlines()]


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> Iterator[fake_hub.FakeHub]:
    """A machine with nothing on it but salalocal and repo.tar, a hub with the released model, made small."""
    catalog_cases.use_empty_places(tmp_path, monkeypatch)
    short = TokenText("a short text", (tuple(range(1, 300)),))
    monkeypatch.setattr(comparison, "shipped_text", lambda name, codec: short)
    monkeypatch.setattr(quantizing, "shipped_text", lambda name, codec: short)
    ceilings = Ceilings(1e10, 1e10, 1e11, "float32")  # to measure them takes longer than all the rest
    monkeypatch.setattr("salalocal.bench.run.measure_ceilings", lambda device, dtype: ceilings)
    for name in ("SALALOCAL_DEVICE", "SALALOCAL_DEBUG", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("SALALOCAL_MAX_TOKENS", "8")
    # Less than the 9B needs, whatever this machine has free.
    monkeypatch.setattr("salalocal.device._machine_memory", lambda: DeviceMemory(14 * 2**30, 6 * 2**30))
    monkeypatch.setattr("salalocal.device._container_memory", lambda: (2**60, 0))
    catalog_cases.write_model(tmp_path / "hub" / RELEASED_MODEL, seed)
    (tmp_path / "hub" / RELEASED_MODEL / "modeling_minicpm_sala.py").write_text("raise SystemExit")
    (tmp_path / "config.py").write_text("MAX_RETRIES = 5\n")
    with tarfile.open(tmp_path / "repo.tar", "w") as archive:
        archive.add(tmp_path / "config.py", "repo/config.py")
    monkeypatch.chdir(tmp_path)
    with fake_hub.running(tmp_path / "hub", large_bytes=100_000) as running:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", running.url)
        yield running


def salalocal(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, typed: str = ""
) -> tuple[str, str]:
    """Run a command that should succeed; gives back stdout and stderr."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed.encode()), encoding="utf-8"))
    code = run(app, arguments)
    captured = capsys.readouterr()
    assert code == 0, (arguments, captured)
    return captured.out, captured.err


@pytest.mark.slow
def test_the_first_hour(
    hub: fake_hub.FakeHub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: dict[str, tuple[str, str]] = {}
    for arguments in commands():
        small = [SMALLER.get(word, word) for word in arguments] + (SHORT_BENCH if arguments[0] == "bench" else [])
        said[" ".join(arguments)] = salalocal(small, capsys, monkeypatch, "What is MAX_RETRIES?\n")
    names = [" ".join(arguments).partition(" ")[0] for arguments in commands()]
    assert names == ["doctor", "plan", "pull", "pull", "quantize", "ls", "bench", "chat"]
    assert f"to get it: salalocal pull {RELEASED_MODEL}" in said["doctor"][0]
    assert "this plan is for its released shape" in said["plan --ctx 256k --gpu-memory 24g"][1]
    assert "to fetch: " in said["pull --dry-run"][0]
    assert "every hash is right" in said["pull"][0] and "modeling_minicpm_sala.py" in said["pull"][1]
    assert find_model(RELEASED_MODEL).path.name == hub.commit(RELEASED_MODEL)
    quantized, told = said["quantize --bits 4"]
    assert f"model: {RELEASED_MODEL} (no --model given, and it is here)" in told and "method: gptq" in told
    assert quantized.startswith("gptq, 4 bits, groups of 128") and "top-1 agreement" in quantized
    copy = re.search(r"result: (.*)\n", told)
    assert copy is not None and Path(copy[1]).name in said["ls"][0] and RELEASED_MODEL in said["ls"][0]
    answer, told = said["chat --file repo.tar"]
    assert f"model: {Path(copy[1]).name} (the newest quantized copy of {RELEASED_MODEL})" in told
    assert "found 1 file" in told and answer.endswith("\n")


@pytest.mark.slow
def test_every_stage_takes_the_sensible_model_and_says_why(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def chat() -> str:
        arguments = ["chat", "--file", "repo.tar"]
        return salalocal(arguments, capsys, monkeypatch, "What is MAX_RETRIES?\n")[1]

    told = chat()
    assert f"to get it: salalocal pull {RELEASED_MODEL}" in told and "model: builtin (no other model is here)" in told
    salalocal(["pull", "-q"], capsys, monkeypatch)
    told = chat()
    assert "is here, but without a card" in told and "model: builtin (no quantized model is here)" in told
    salalocal(["quantize", "--bits", "4", "--method", "rtn", "-q"], capsys, monkeypatch)
    assert "the newest quantized copy" in chat()
    listed = json.loads(salalocal(["ls", "--json"], capsys, monkeypatch)[0])["models"]
    copy = next(entry["model"] for entry in listed if entry["place"] == "made here")
    shown = json.loads(salalocal(["show", copy, "--json"], capsys, monkeypatch)[0])
    assert shown["card"]["quality"]["num_tokens"] and shown["licence"] == "apache-2.0"
    salalocal(["rm", "--yes", RELEASED_MODEL], capsys, monkeypatch)
    assert "the newest quantized copy" in chat()
