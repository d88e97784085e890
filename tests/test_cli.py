"""The command line from outside: help, streams, exit codes."""

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny_model

from salalocal.cli import app
from salalocal.evals import comparison
from salalocal.quant.quantizer import Quantizer
from salalocal.quant.recipe import QuantizeOptions
from salalocal.session.texts import TokenText
from salalocal.settings import READERS
from salalocal.terminal.exits import run

GOLDEN = Path(__file__).parent / "golden"
COMMANDS = ("chat", "ask", "tokens", "plan", "quantize", "eval", "eval divergence")


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in READERS:
        monkeypatch.delenv(f"SALALOCAL_{name.upper()}", raising=False)
    for name in ("SALALOCAL_CONFIG", "SALALOCAL_DEBUG", "NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
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
    (docs / "blob.bin").write_bytes(bytes(range(256)))
    return tmp_path


def stdin(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))


def salalocal(*arguments: str, **options: Any) -> "subprocess.CompletedProcess[bytes]":
    return subprocess.run([sys.executable, "-m", "salalocal", *arguments], capture_output=True, check=False, **options)


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_is_as_documented(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """SALALOCAL_WRITE_GOLDEN=1 writes the files anew."""
    assert run(app, [*command.split(), "--help"]) == 0
    shown, path = capsys.readouterr().out, GOLDEN / f"help-{command.replace(' ', '-') or 'salalocal'}.txt"
    if os.environ.get("SALALOCAL_WRITE_GOLDEN"):
        path.write_text(shown)
    assert shown == path.read_text()
    assert max(map(len, shown.splitlines())) <= 80


def test_help_is_quick_and_imports_no_torch() -> None:
    salalocal("--help")
    started_s = time.monotonic()
    assert salalocal("--help").returncode == 0
    elapsed_s = time.monotonic() - started_s
    listed = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "salalocal", "--help"], capture_output=True, check=False
    ).stderr.decode()
    assert "torch" not in listed and "prompt_toolkit" not in listed and "numpy" not in listed
    assert elapsed_s < 0.5 or os.getloadavg()[0] > 1.5, f"{elapsed_s:.2f} s on an idle machine"


def test_counting_tokens_imports_no_torch(folder: Path) -> None:
    arguments = ["tokens", "-f", str(folder / "docs"), "--model", str(folder / "model")]
    code = "import sys; from salalocal.cli import app; from salalocal.terminal.exits import run;"
    code += f"code = run(app, {arguments}); sys.exit(9 if 'torch' in sys.modules else code)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == 0, done


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(app, ["--version"]) == 0
    assert capsys.readouterr().out.startswith("salalocal 0.")


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ([], 2, "error: no command given"),
        (["frobnicate"], 2, "frobnicate"),
        (["ask", "--no-such-flag"], 2, "--no-such-flag"),
        (["ask", "what?", "--temperature", "hot"], 2, "--temperature"),
        (["ask", "what?", "--top-p", "3"], 2, "top_p"),
        (["ask", "what?", "--ctx", "12q"], 2, "--ctx"),
        (["ask", "what?", "-f", "x", "--max-member", "much"], 2, "much"),
        (["tokens"], 2, "no file given"),
        (["tokens", "-f", "missing.txt"], 4, "missing.txt"),
        (["ask", "what?", "--model", "nobody/nothing"], 5, "salalocal pull nobody/nothing"),
        (["plan", "openbmb/MiniCPM-SALA", "--ctx", "1m", "--gpu-memory", "8g"], 3, "does not fit"),
        (["plan", "openbmb/MiniCPM-SALA", "--gpu-memory", "much"], 2, "much"),
        (["quantize", "--bits", "3"], 2, "4, 8"),
        (["eval"], 2, "error: no evaluation given"),
        (["eval", "divergence"], 2, "--against"),
        (["eval", "divergence", "--against", "nobody/nothing"], 5, "salalocal pull nobody/nothing"),
        (["eval", "divergence", "--against", "builtin", "--ctx", "much"], 2, "much"),
        (["eval", "divergence", "--against", "builtin", "-f", "missing.txt"], 4, "missing.txt"),
        (["quantize", "--calibration", "missing.txt"], 4, "missing.txt"),
        (["ask", "what?", "--device", "cuda:99"], 6, "cuda"),
        (["ask", "what?", "--math", "int4"], 2, "error: --math is 'int4', not one of bf16, int8, fp8"),
        (["ask", "what?", "--kv-cache", "fp8"], 2, "error: --kv-cache is 'fp8', not one of fp32, int8"),
    ],
)
def test_errors_have_a_code_and_two_lines(
    arguments: list[str], code: int, said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if code == 6:
        arguments = [*arguments, "--model", str(folder / "model")]
    assert run(app, arguments) == code
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("error: "))
    assert said in captured.err and "Traceback" not in captured.err
    assert all(line.startswith("hint: ") for line in lines[first + 1 :])
    assert all(len(line) <= 300 for line in lines)
    assert captured.out == "" or arguments[0] == "plan"


def test_plan_prints_commands_that_fit(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(app, ["plan", "openbmb/MiniCPM-SALA", "--ctx", "1m", "--gpu-memory", "16g"]) == 3
    captured = capsys.readouterr()
    hints = [line.removeprefix("hint: ") for line in captured.err.splitlines() if line.startswith("hint: ")]
    assert 1 <= len(hints) <= 3
    for hint in hints:
        assert run(app, hint.split()[1:]) == 0
    assert run(app, ["plan", "openbmb/MiniCPM-SALA", "--ctx", "64k", "--gpu-memory", "24g", "--json"]) == 0


def ask(folder: Path, *arguments: str) -> int:
    return run(app, ["ask", "--model", str(folder / "model"), "--max-tokens", "8", *arguments])


def test_ask_puts_the_answer_alone_on_stdout(folder: Path, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    assert ask(folder, "-f", str(folder / "docs"), "what?", "--json") == 0
    answer = json.loads(capsysbinary.readouterr().out)
    assert ask(folder, "-f", str(folder / "docs"), "what?") == 0
    captured = capsysbinary.readouterr()
    assert captured.out.decode() == answer["answer"].removesuffix("\n") + "\n"
    narration = captured.err.decode()
    for part in ('skipped "blob.bin"', "model: ", "found 2 files", "read 2 files: ", "context ", "tok/s"):
        assert part in narration
    assert "\x1b" not in narration
    assert ask(folder, "-q", "-f", str(folder / "docs"), "what?") == 0
    assert capsysbinary.readouterr() == (captured.out, b"")


def test_the_built_in_model_answers_with_a_cache_in_8_bits(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["ask", "-f", str(folder / "docs"), "What is the value of MAX_RETRIES in config.py?", "--device", "cpu"]
    assert run(app, [*arguments, "--model", "builtin", "--kv-cache", "int8"]) == 0
    assert capsys.readouterr().out == "MAX_RETRIES = 5\n"


def test_ask_as_json_is_one_document(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask(folder, "-f", str(folder / "docs"), "what?", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["reason"] == "length" and document["usage"]["answer_tokens"] == 8
    assert document["model"] == str(folder / "model")
    assert [file["path"] for file in document["files"]] == ["config.py", "notes.md"]
    assert document["skips"][0]["path"] == "blob.bin"
    assert ask(folder, "-f", str(folder / "missing"), "what?", "--json") == 4
    assert json.loads(capsys.readouterr().out)["error"]["exit_code"] == 4


def test_several_questions_share_one_read(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "questions.txt").write_text("what?\n\nwhy?\n")
    assert ask(folder, "-f", str(folder / "docs"), "--from", str(folder / "questions.txt"), "--json") == 0
    first, second = json.loads(capsys.readouterr().out)["answers"]
    assert (first["question"], second["question"]) == ("what?", "why?")
    assert second["usage"]["cached_tokens"] > second["usage"]["new_tokens"]


def test_ask_reads_documents_and_questions_from_stdin(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stdin(monkeypatch, b"alpha = 1\n")
    assert ask(folder, "-f", "-", "what?", "--json") == 0
    assert [file["path"] for file in json.loads(capsys.readouterr().out)["files"]] == ["stdin"]
    stdin(monkeypatch, "what is ü?\n".encode())
    assert ask(folder, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["question"] == "what is ü?" and document["files"] == []


def test_files_that_do_not_fit_are_counted_and_not_cut(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask(folder, "-f", str(folder / "docs"), "what?", "--ctx", "64") == 4
    error, hint = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("error", "hint"))]
    assert "do not fit a context of 64 tokens" in error and "in 2 files" in error and "notes.md" in hint


def test_tokens_lists_files_and_skips(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["tokens", "-f", str(folder / "docs"), "--model", str(folder / "model")]
    assert run(app, arguments) == 0
    shown = capsys.readouterr().out
    assert "config.py" in shown and "in all, 2 files" in shown and "skipped blob.bin: binary" in shown
    assert run(app, [*arguments, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert f"{document['total_tokens']:,}  in all" in shown


def test_chat_in_a_pipe_takes_a_question_a_line(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stdin(monkeypatch, b"what?\n/tokens\nwhy?\n/bye\nnever?\n")
    assert run(app, ["chat", "-f", str(folder / "docs"), "--model", str(folder / "model"), "--max-tokens", "4"]) == 0
    captured = capsys.readouterr()
    assert captured.err.count(" cached + ") == 2 and "in all, 2 files" in captured.err
    assert captured.out.endswith("\n") and "in all" not in captured.out


def test_sampling_flags_reach_the_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hot = ["--temperature", "30", "--top-k", "50", "--top-p", "0.99", "--min-p", "0", "what?", "--json"]
    answers = []
    for seed in ("1", "1", "2"):
        assert ask(folder, "--seed", seed, *hot) == 0
        answers.append(json.loads(capsys.readouterr().out)["answer"])
    assert answers[0] == answers[1] != answers[2]
    assert ask(folder, "what?", "--stop", "", "--json") == 2


@pytest.fixture
def short_shipped_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shipped evaluation text would take a tiny model half a minute."""
    text = TokenText("the shipped evaluation text", (tuple(range(1, 200)),))
    monkeypatch.setattr(comparison, "shipped_text", lambda name, codec: text)


@pytest.mark.usefixtures("short_shipped_text")
def test_quantize_makes_a_model_that_answers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = folder / "small"
    arguments = ["quantize", "--bits", "4", "--model", str(folder / "model"), "--group-size", "8", "--out", str(out)]
    gptq = ["--method", "gptq", "--calibration", str(folder / "docs")]
    assert run(app, [*arguments, *gptq]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("gptq, 4 bits, groups of 8\n") and f"result: {out}" in captured.err
    assert "calibration: " in captured.err and "skipped" in captured.err
    assert "evaluating on 199 of the 199 tokens" in captured.err and "\nperplexity      " in captured.out
    assert run(app, ["ask", "--model", str(out), "--max-tokens", "4", "-f", str(folder / "docs"), "what?"]) == 0
    capsys.readouterr()
    assert run(app, [*arguments, *gptq, "--json", "--quiet"]) == 0  # done already
    captured = capsys.readouterr()
    card = json.loads(captured.out)
    assert card["folder"] == str(out) and card["quality"]["num_tokens"] == 198 and captured.err == ""
    assert run(app, arguments) == 2
    assert "exists" in capsys.readouterr().err


def test_eval_divergence_compares_a_copy_with_its_original(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, copy = str(folder / "model"), str(folder / "copy")
    Quantizer(Path(model), Path(copy), QuantizeOptions(group_size=8)).run()
    arguments = ["eval", "divergence", "--model", model, "--against", copy, "-f", str(folder / "docs"), "--ctx", "64"]
    assert run(app, [*arguments, "--dtype", "float32"]) == 0
    captured = capsys.readouterr()
    assert [line.split()[0] for line in captured.out.splitlines()] == ["perplexity", "KL", "top-1"]
    assert f"model: {model}" in captured.err and "skipped" in captured.err and "evaluated in" in captured.err
    assert run(app, [*arguments, "--tokens", "100", "--json", "--quiet"]) == 0
    captured = capsys.readouterr()
    figures = json.loads(captured.out)
    assert figures["num_tokens"] == 98 and figures["num_sequences"] == 2 and figures["kl_mean_nats"] > 0
    assert captured.err == ""


def test_a_reader_that_goes_away_is_no_error(folder: Path) -> None:
    (folder / "docs" / "many").mkdir()
    for number in range(400):  # more bytes of names than a pipe holds
        (folder / "docs" / "many" / f"{'long' * 50}{number}.txt").write_text("x\n")
    command = f"{sys.executable} -m salalocal tokens -f {folder / 'docs'} --model {folder / 'model'}"
    done = subprocess.run(
        ["bash", "-c", f"{command} | true; echo ${{PIPESTATUS[0]}}"], capture_output=True, check=False
    )
    assert done.stdout == b"141\n"
    assert done.stderr.startswith(b"model: ") and done.stderr.count(b"\n") == 1


def test_text_passes_whatever_the_locale_says(folder: Path) -> None:
    (folder / "docs" / "naïve.md").write_text("x\n")
    done = salalocal(
        *["tokens", "-f", str(folder / "docs"), "--model", str(folder / "model")],
        env={**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C"},
    )
    assert done.returncode == 0 and "naïve.md" in done.stdout.decode("utf-8")


def test_import_is_quick_and_names_are_lazy() -> None:
    code = "import sys, salalocal; assert 'torch' not in sys.modules; salalocal.PromptPack; salalocal.ReadProgress;"
    code += "assert 'torch' not in sys.modules; salalocal.load; assert 'torch' in sys.modules;"
    code += "assert all(hasattr(salalocal, name) for name in salalocal.__all__)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
