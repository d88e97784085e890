"""Flag > environment > settings.toml > default, and every value knows where it came from."""

from pathlib import Path

import pytest

from salalocal.errors import RequestError, SettingsError
from salalocal.settings import (
    READERS,
    Settings,
    is_debugging,
    load_settings,
    parse_bytes,
    parse_tokens,
    settings_path,
)


def environ(folder: Path, toml: str | bytes | None = None, **variables: str) -> dict[str, str]:
    path = folder / "settings.toml"
    if toml is not None:
        path.write_bytes(toml.encode() if isinstance(toml, str) else toml)
        variables["SALALOCAL_CONFIG"] = str(path)
    return variables


def test_defaults_know_that_they_are(tmp_path: Path) -> None:
    settings = load_settings({}, {"SALALOCAL_CONFIG": str(_empty(tmp_path))})
    assert settings == Settings(origins={})
    assert settings.origin("model") == "default"


def _empty(folder: Path) -> Path:
    path = folder / "empty.toml"
    path.write_text("")
    return path


def test_each_level_wins_over_the_next(tmp_path: Path) -> None:
    variables = environ(
        tmp_path, 'model = "file"\ntop_k = 3\nctx = "64k"\nmin_p = 0.1\n', SALALOCAL_MODEL="env", SALALOCAL_TOP_K="4"
    )
    settings = load_settings({"model": "flag", "seed": None}, variables)
    assert (settings.model, settings.origin("model")) == ("flag", "--model")
    assert (settings.top_k, settings.origin("top_k")) == (4, "SALALOCAL_TOP_K")
    assert (settings.ctx, settings.origin("ctx")) == (65536, str(tmp_path / "settings.toml"))
    assert (settings.seed, settings.origin("seed")) == (None, "default")
    assert load_settings({"max_tokens": 5}, variables).origin("max_tokens") == "--max-tokens"


def test_auto_is_no_limit_of_the_context() -> None:
    assert load_settings({"ctx": "auto"}, {"SALALOCAL_CTX": "64k"}).ctx is None


@pytest.mark.parametrize(("word", "said"), [("1", True), ("Yes", True), ("off", False), ("false", False)])
def test_a_switch_is_said_in_words(word: str, said: bool) -> None:
    assert load_settings({}, {"SALALOCAL_GUESS": word}).guess is said
    assert load_settings({"guess": not said}, {"SALALOCAL_GUESS": word}).guess is not said
    assert load_settings({}, {}).guess is None
    with pytest.raises(SettingsError, match="SALALOCAL_GUESS is 'perhaps', not true or false"):
        load_settings({}, {"SALALOCAL_GUESS": "perhaps"})


def test_an_empty_variable_is_not_set() -> None:
    assert load_settings({}, {"SALALOCAL_MODEL": ""}).model == "builtin"


@pytest.mark.parametrize(
    ("toml", "said"),
    [
        ("temperature = 'hot'", "temperature in"),
        ("top_k = 1.5", "whole number"),
        ("top_k = true", "whole number"),
        ("model = 7", "text"),
        ("ctx = '12q'", "tokens"),
        ("modle = 'x'", "did you mean model"),
        ("[tool]\nx = 1", "unknown setting 'tool'"),
        ("model = ", "not TOML"),
        (b"model = '\xff'", "not TOML"),
        ("x = " + "[" * 5000, "not TOML"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path: Path, toml: str | bytes, said: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings({}, environ(tmp_path, toml))
    assert said in caught.value.message + caught.value.hint
    assert "settings.toml" in caught.value.message and caught.value.exit_code == 2


def test_a_named_file_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no settings file"):
        load_settings({}, {"SALALOCAL_CONFIG": str(tmp_path / "missing.toml")})
    with pytest.raises(SettingsError, match="cannot read"):
        load_settings({}, {"SALALOCAL_CONFIG": str(tmp_path)})


def test_variables_and_flags_are_named_in_errors() -> None:
    with pytest.raises(SettingsError, match="SALALOCAL_SEED"):
        load_settings({}, {"SALALOCAL_SEED": "x"})
    with pytest.raises(RequestError, match="--max-tokens"):
        load_settings({"max_tokens": "-3"}, {})


def test_every_setting_has_a_reader_and_the_other_way_round() -> None:
    assert set(READERS) == set(Settings.__dataclass_fields__) - {"origins"}


def test_where_the_file_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert settings_path({}).name == "settings.toml" and "salalocal" in settings_path({}).parts
    assert settings_path({"SALALOCAL_CONFIG": "/x/y.toml"}) == Path("/x/y.toml")


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("65536", 65536), ("64k", 65536), ("256K", 262144), ("1m", 1048576), ("1.5m", 1572864), (" 2k ", 2048)],
)
def test_numbers_of_tokens(text: str, tokens: int) -> None:
    assert parse_tokens(text) == tokens


@pytest.mark.parametrize("text", ["", "0", "-1", "1g", "k", "1e5", "٣", "1 000", "64kb", "9" * 30, "nan", "0.0001"])
def test_what_is_no_number_of_tokens(text: str) -> None:
    with pytest.raises(RequestError):
        parse_tokens(text)


@pytest.mark.parametrize(
    ("text", "num_bytes"), [("16g", 2**34), ("512MiB", 2**29), ("24GB", 24 * 2**30), ("1.5t", 3 * 2**39), ("100", 100)]
)
def test_amounts_of_memory(text: str, num_bytes: int) -> None:
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize("text", ["16q", "g", "-2g", "16gg", "0b"])
def test_what_is_no_amount_of_memory(text: str) -> None:
    with pytest.raises(RequestError):
        parse_bytes(text)


def test_debugging() -> None:
    assert is_debugging({"SALALOCAL_DEBUG": "1"})
    assert not is_debugging({}) and not is_debugging({"SALALOCAL_DEBUG": "0"})
