"""Lists of models and settings that fit the terminal, and say the same as JSON."""

import json
from pathlib import Path

import pytest

from salalocal.checkpoint.folder import ModelFolder
from salalocal.session.catalog import ModelEntry
from salalocal.settings import READERS, load_settings
from salalocal.terminal.model_views import (
    config_json,
    config_lines,
    context_text,
    model_json,
    model_lines,
    places,
    removal_line,
)

FOLDER = ModelFolder(Path("/models/x"))
ENTRIES = [
    ModelEntry("builtin", "built in", FOLDER, 8_700_000, 0, None, "int4", "gptq", 8_658_816, 14_800_000),
    ModelEntry("acme/big", "hub", FOLDER, 19 * 10**9, 0, None, "bf16", None, 19 * 10**9, 0),
    ModelEntry("acme/\x1b[2Jodd", "hub", FOLDER, 1000, 0, problem="unfinished; salalocal pull goes on with it"),
]


def test_a_wide_terminal_gets_a_table() -> None:
    assert list(model_lines(ENTRIES, 80)) == [
        "model                  size  weights    fits here",
        "builtin             8.3 MiB  int4 gptq      14.1m",
        "acme/big           17.7 GiB  bf16         nothing",
        "acme/\\x1b[2Jodd  1000 bytes  -                  -",
        "acme/\\x1b[2Jodd: unfinished; salalocal pull goes on with it",
    ]


def test_a_narrow_terminal_gets_two_lines_for_a_model() -> None:
    lines = list(model_lines(ENTRIES, 40))
    assert lines[:4] == [
        "builtin",
        "  8.3 MiB, int4 gptq, 14.1m, built in",
        "acme/big",
        "  17.7 GiB, bf16, nothing, hub",
    ]
    assert all(len(line) <= 40 for line in lines[:-1])


@pytest.mark.parametrize(
    ("tokens", "text"),
    [(0, "nothing"), (1023, "nothing"), (1024, "1k"), (185_999, "181k"), (2**20, "1.0m"), (2**21, "2.0m")],
)
def test_contexts_are_rounded_down(tokens: int, text: str) -> None:
    assert context_text(tokens) == text


def test_an_entry_as_json() -> None:
    document = json.loads(json.dumps(model_json(ENTRIES[0])))
    assert document["model"] == "builtin" and document["longest_context_tokens"] == 14_800_000
    assert json.loads(json.dumps(model_json(ENTRIES[2])))["problem"].startswith("unfinished")


def test_what_is_deleted_is_named_with_its_size() -> None:
    assert removal_line(ENTRIES[2]) == "acme/\\x1b[2Jodd, 1000 bytes (hub)"


@pytest.mark.parametrize("width", [40, 80])
def test_settings_show_where_they_come_from(width: int, tmp_path: Path) -> None:
    path = tmp_path / "settings.toml"
    path.write_text('temperature = 0.7\nmodel = "acme/big"\n')
    environ = {"SALALOCAL_CONFIG": str(path), "SALALOCAL_TOP_K": "40"}
    settings = load_settings({}, environ)
    shown = "\n".join(config_lines(settings, places(environ), tuple(READERS), width))
    assert "temperature  0.7" in shown and str(path) in shown and "SALALOCAL_TOP_K" in shown
    assert f"settings file: {path}" in shown and "hub cache: " in shown
    document = json.loads(json.dumps(config_json(settings, places(environ), tuple(READERS))))
    assert document["settings"]["top_k"] == {"value": 40, "origin": "SALALOCAL_TOP_K"}
    assert document["settings"]["seed"] == {"value": None, "origin": "default"}
    assert document["places"]["settings file"] == str(path)
