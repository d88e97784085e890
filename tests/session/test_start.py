"""Opening a session: what is told on the way, in an order that fails early."""

from pathlib import Path

import pytest

from salalocal.errors import ContextError, PackError, RequestError
from salalocal.session import start
from salalocal.session.events import TextDelta
from salalocal.session.start import Sources, open_session
from salalocal.settings import load_settings


@pytest.fixture
def sources(tmp_path: Path) -> Sources:
    (tmp_path / "config.py").write_text("MAX_RETRIES = 5\n" * 40)
    return Sources((str(tmp_path / "config.py"),))


def test_the_builtin_model_says_what_it_is_and_what_was_not_measured(
    sources: Sources, monkeypatch: pytest.MonkeyPatch
) -> None:
    short: list[str] = []
    open_session(load_settings({"model": "builtin"}), sources, (), short.append)
    assert any("cannot chat or reason" in line for line in short)
    assert not any("one answer in three" in line for line in short)
    monkeypatch.setattr(start, "BUILTIN_TRAINED_TOKENS", 100)
    long: list[str] = []
    open_session(load_settings({"model": "builtin"}), sources, (), long.append)
    assert any("up to 100 tokens" in line and "one answer in three" in line for line in long)


def test_files_without_text_and_too_long_ones_fail_before_the_model_is_loaded(
    sources: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("salalocal.session.runtime.open_runtime", lambda *_: pytest.fail("the model was loaded"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(PackError):
        open_session(load_settings({"model": "builtin"}), Sources((str(tmp_path / "empty"),)), (), lambda _: None)
    with pytest.raises(ContextError):
        open_session(load_settings({"model": "builtin", "ctx": "64"}), sources, (), lambda _: None)


def test_a_context_beyond_what_the_model_was_made_for_is_told(sources: Sources) -> None:
    told: list[str] = []
    open_session(load_settings({"model": "builtin", "ctx": "1m"}), sources, (), told.append)
    assert any("made for contexts of up to 524,288" in line for line in told)


def test_a_value_that_makes_no_sense_is_refused_before_anything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("salalocal.session.start.read_sources", lambda *_: pytest.fail("files were read"))
    with pytest.raises(RequestError, match="top_p"):
        open_session(load_settings({"model": "builtin", "top_p": "2"}), Sources(("x",)), (), lambda _: None)


def test_a_long_allowance_for_answers_asks_for_no_memory_before_it_is_used(sources: Sources) -> None:
    settings = load_settings({"model": "builtin", "max_tokens": "2000000000"})
    opened = open_session(settings, sources, (), lambda _: None)
    events = opened.session.ask("What is the value of MAX_RETRIES?")
    assert "".join(event.text for event in events if isinstance(event, TextDelta)) == "MAX_RETRIES = 5"
    assert next(opened.runtime.generate("import", max_tokens=2_000_000_000)).token_ids
