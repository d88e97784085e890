"""What is on this machine, by name: found, measured, shown and taken away."""

from pathlib import Path

import catalog_cases
import pytest

from salalocal.checkpoint.folder_lock import only_one
from salalocal.checkpoint.hub import find_model
from salalocal.checkpoint.hub_cache import CachedRepository
from salalocal.engine.budget import plan_memory
from salalocal.errors import BusyError, RequestError
from salalocal.session.catalog import (
    HUB,
    MADE_HERE,
    PACKAGE,
    find_entry,
    find_kept,
    list_models,
    model_names,
    plan_options,
    remove_model,
    with_contexts,
)
from salalocal.settings import models_folder

COPY = "acme--tiny-int4-g128-rtn"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return catalog_cases.use_empty_places(tmp_path, monkeypatch)


@pytest.fixture
def models(seed: int) -> Path:
    """acme/tiny in the hub's cache, and a quantized copy of it."""
    source = catalog_cases.put_into_cache("acme/tiny", seed)
    catalog_cases.make_copy(source, COPY)
    return source


def test_an_empty_machine_has_the_built_in_model() -> None:
    assert [(entry.name, entry.place) for entry in list_models()] == [("builtin", PACKAGE), ("builtin:bf16", PACKAGE)]
    assert model_names() == ["builtin"]


def test_every_place_is_looked_at(models: Path) -> None:
    entries = {entry.name: entry for entry in list_models()}
    assert list(entries) == ["builtin", "builtin:bf16", COPY, "acme/tiny"] and model_names() == [
        "builtin", COPY, "acme/tiny",
    ]  # fmt: skip
    copy, original = entries[COPY], entries["acme/tiny"]
    assert (copy.place, copy.weights, copy.method) == (MADE_HERE, "int4", "rtn")
    assert (original.place, original.weights, original.method) == (HUB, "bf16", None)
    assert original.weight_bytes == 2 * catalog_cases.bf16_config().num_parameters > copy.weight_bytes
    assert original.num_bytes > original.weight_bytes and original.problem is None
    assert entries["builtin"].method == "gptq"


def test_other_models_of_the_cache_are_not_ours(cache: Path) -> None:
    folder = CachedRepository.of("acme/llama").snapshot(catalog_cases.COMMIT)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder.parents[1] / "refs").mkdir()
    (folder.parents[1] / "refs" / "main").write_text(catalog_cases.COMMIT)
    (cache / "datasets--acme--text").mkdir()
    (cache / "models--odd").mkdir()
    assert {entry.place for entry in list_models()} == {PACKAGE}


def test_what_is_unfinished_is_listed_with_the_way_on(cache: Path) -> None:
    blobs = CachedRepository.of("acme/big").folder / "blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{'0' * 64}.salalocal-partial").write_bytes(b"x" * 1000)
    (models_folder() / "acme--big-int4.quantizing").mkdir(parents=True)
    problems = {entry.name: entry.problem for entry in list_models() if entry.problem}
    assert problems["acme/big"] == "unfinished; salalocal pull acme/big goes on with it"
    assert "quantize" in str(problems["acme--big-int4.quantizing"])
    for name in problems:
        remove_model(find_kept(name))
    assert {entry.place for entry in list_models()} == {PACKAGE}


def test_a_damaged_model_is_listed_with_what_is_wrong(models: Path) -> None:
    weights = models / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    entry = find_entry("acme/tiny")
    assert entry.weights is None and "truncated" in str(entry.problem)


def test_the_context_that_fits_is_that_of_a_plan(models: Path) -> None:
    entries = [entry for entry in list_models() if entry.place != PACKAGE]
    for entry in with_contexts(entries, 2**28, is_cuda=False):
        assert entry.config is not None and entry.longest_tokens
        options = plan_options(entry, is_cuda=False)
        assert plan_memory(entry.config, entry.longest_tokens, options).total_bytes <= 2**28
        assert plan_memory(entry.config, entry.longest_tokens + 1, options).total_bytes > 2**28


def test_a_model_made_here_is_found_by_its_name(models: Path) -> None:
    assert find_model(COPY).path == models_folder() / COPY
    assert find_entry(str(models)).name == str(models)


def test_a_model_that_is_removed_is_gone(models: Path, cache: Path) -> None:
    remove_model(find_kept("acme/tiny"))
    remove_model(find_kept(COPY))
    assert not list(cache.iterdir()) and not list(models_folder().iterdir())
    assert {entry.place for entry in list_models()} == {PACKAGE}


def test_only_what_is_kept_here_can_be_removed(models: Path, tmp_path: Path) -> None:
    catalog_cases.write_model(tmp_path / "mine", 1)
    for name, said in (
        ("builtin", "came with salalocal"),
        ("nothing/here", "no model"),
        (str(tmp_path / "mine"), "no model"),
    ):
        with pytest.raises(RequestError, match=said):
            find_kept(name)


def test_a_model_that_is_worked_on_stays(models: Path) -> None:
    entry = find_kept("acme/tiny")
    with only_one(CachedRepository.of("acme/tiny").folder, "pulls it"), pytest.raises(BusyError):
        remove_model(entry)
    assert find_entry("acme/tiny").problem is None


def test_a_removal_that_was_cut_short_is_finished_by_the_next(models: Path, cache: Path) -> None:
    (cache / ".removing-models--acme--tiny" / "blobs").mkdir(parents=True)
    remove_model(find_kept("acme/tiny"))
    assert not list(cache.iterdir())
