"""From settings and paths to an open session, failing as early as it can."""

import os
from pathlib import Path

import pytest
import tiny_model

from salalocal.errors import ContextError, HubError, PackError, RequestError
from salalocal.prompt.sources import Reading, Skip
from salalocal.session.start import Sources, model_choice, open_session, report_sources, tell_skips
from salalocal.settings import Settings, load_settings


@pytest.fixture
def folder(tmp_path: Path, seed: int) -> Path:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "config.py").write_text("MAX_RETRIES = 5\n")
    (tmp_path / "docs" / "blob.bin").write_bytes(bytes(range(256)))
    tiny_model.write_tiny_model(tmp_path / "model", seed)
    return tmp_path


def settings(folder: Path, **flags: object) -> Settings:
    return load_settings({"model": str(folder / "model"), "device": "cpu", **flags}, {})


def test_what_happens_is_told_in_order(folder: Path) -> None:
    told: list[str] = []
    opened = open_session(settings(folder), Sources((str(folder / "docs"),)), (), told.append)
    text = "\n".join(told)
    assert told[0].startswith('skipped "blob.bin": ')
    assert f"model: {folder / 'model'} (from --model)" in text
    assert text.index("model:") < text.index("found 1 file, 16 bytes, skipped 1, ")
    report = opened.token_report()
    assert [document.path for document in report.documents] == ["config.py"]
    assert [skip.path for skip in report.skips] == ["blob.bin"]
    assert f"{report.total_tokens:,} tokens" in text
    assert "demonstration" not in text


def test_files_without_text_fail_before_a_model_is_looked_for(folder: Path) -> None:
    told: list[str] = []
    with pytest.raises(PackError):
        open_session(Settings(model="nobody/nothing"), Sources((str(folder / "docs" / "blob.bin"),)), (), told.append)
    with pytest.raises(HubError):
        open_session(Settings(model="nobody/nothing"), Sources(), (), told.append)


def test_a_context_that_is_too_small_fails_before_the_weights_are_read(folder: Path) -> None:
    os.truncate(folder / "model" / "model.safetensors", 9)
    with pytest.raises(ContextError):
        open_session(settings(folder, ctx="16"), Sources((str(folder / "docs"),)), (), lambda _: None)


def test_sampling_comes_from_settings(folder: Path) -> None:
    opened = open_session(settings(folder, temperature=0.5, max_tokens=9, seed=4), Sources(), (), lambda _: None)
    assert (opened.session.sampling.temperature, opened.session.sampling.max_tokens) == (0.5, 9)
    with pytest.raises(RequestError, match="top_p"):
        open_session(settings(folder, top_p=2.0), Sources(), (), lambda _: None)


def test_the_choice_of_a_model_has_a_reason() -> None:
    assert model_choice(Settings()) == "model: builtin (no --model, SALALOCAL_MODEL or setting)"
    assert "SALALOCAL_MODEL" in model_choice(load_settings({}, {"SALALOCAL_MODEL": "x"}))


def test_counting_needs_no_weights(folder: Path) -> None:
    (folder / "model" / "model.safetensors").unlink()
    told: list[str] = []
    report = report_sources(settings(folder), Sources((str(folder / "docs"),)), told.append)
    assert told == [model_choice(settings(folder))]
    assert report.total_tokens > 20 and len(report.skips) == 1


def test_many_skips_are_counted(folder: Path) -> None:
    told: list[str] = []
    tell_skips(Reading((), tuple(Skip(f"{n}.bin", "binary") for n in range(50))), told.append)
    assert len(told) == 21 and "30 more" in told[-1]
