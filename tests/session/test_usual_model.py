"""The model that nobody named: at each stage of a user's first hour, with the reason and the next command."""

import os
from pathlib import Path

import catalog_cases
import pytest
import torch

from salalocal import device
from salalocal.device import DeviceMemory
from salalocal.session.plan import RELEASED_MODEL
from salalocal.session.start import model_choice
from salalocal.session.usual_model import (
    with_usual_model,
    with_usual_original,
    with_usual_plan,
    with_usual_tokenizer,
)
from salalocal.settings import load_settings

COPY = "openbmb--MiniCPM-SALA-int4-g128-rtn"


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return catalog_cases.use_empty_places(tmp_path, monkeypatch)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> DeviceMemory:
    """A card with memory to spare."""
    memory = DeviceMemory(80 * 2**30, 80 * 2**30)
    monkeypatch.setattr(device, "pick_device", lambda name: torch.device("cuda", 0))
    monkeypatch.setattr(device, "device_memory", lambda where: memory)
    return memory


def choice(environ: dict[str, str] | None = None) -> tuple[str, str, str]:
    """The model for a chat, the line that names it, and what was told before."""
    told: list[str] = []
    settings = with_usual_model(load_settings({}, environ or {}), told.append)
    return settings.model, model_choice(settings), "\n".join(told)


def test_with_nothing_here_the_built_in_model_is_taken_and_pull_is_named() -> None:
    model, line, told = choice()
    assert model == "builtin" and line == "model: builtin (no other model is here)"
    assert told.endswith("salalocal pull openbmb/MiniCPM-SALA")


def test_a_pulled_model_without_a_card_waits_for_its_copy(seed: int) -> None:
    catalog_cases.put_into_cache(RELEASED_MODEL, seed)
    model, line, told = choice()
    assert model == "builtin" and "no quantized model is here" in line
    assert "is here, but without a card" in told and told.endswith("salalocal quantize --bits 4")


def test_a_pulled_model_that_fits_the_card_is_taken_as_it_is(seed: int, card: DeviceMemory) -> None:
    catalog_cases.put_into_cache(RELEASED_MODEL, seed)
    model, line, told = choice()
    assert model == RELEASED_MODEL and "fits on the card" in line and not told


def test_a_pulled_model_that_does_not_fit_says_by_how_much(
    seed: int, card: DeviceMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog_cases.put_into_cache(RELEASED_MODEL, seed)
    monkeypatch.setattr(device, "device_memory", lambda where: DeviceMemory(2**28, 2**28))
    model, _, told = choice()
    assert model == "builtin" and "0.2 GiB of the card are free" in told and "needs" in told


def test_the_newest_copy_wins(seed: int, card: DeviceMemory) -> None:
    source = catalog_cases.put_into_cache(RELEASED_MODEL, seed)
    older = catalog_cases.make_copy(source, COPY)
    newer = catalog_cases.make_copy(source, f"{COPY}-again")
    catalog_cases.make_copy(source, "of-something-else-int4")
    os.utime(older / "config.json", (10**9, 10**9))
    model, line, told = choice()
    assert model == newer.name and "the newest quantized copy of openbmb/MiniCPM-SALA" in line and not told
    os.utime(newer / "config.json", (10**8, 10**8))
    assert choice()[0] == older.name


def test_a_damaged_copy_is_passed_over(seed: int) -> None:
    copy = catalog_cases.make_copy(catalog_cases.put_into_cache(RELEASED_MODEL, seed), COPY)
    weights = next(copy.glob("model-*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-9])
    assert choice()[0] == "builtin"


def test_a_model_that_was_named_stays(seed: int) -> None:
    catalog_cases.make_copy(catalog_cases.put_into_cache(RELEASED_MODEL, seed), COPY)
    model, line, told = choice({"SALALOCAL_MODEL": "builtin:bf16"})
    assert model == "builtin:bf16" and line == "model: builtin:bf16 (from SALALOCAL_MODEL)" and not told


def test_what_is_quantized_is_the_pulled_model_or_the_built_in_original(seed: int) -> None:
    told: list[str] = []
    assert with_usual_original(load_settings({}, {}), told.append).model == "builtin:bf16"
    assert "salalocal pull openbmb/MiniCPM-SALA" in told[0]
    catalog_cases.put_into_cache(RELEASED_MODEL, seed)
    chosen = with_usual_original(load_settings({}, {}), told.append)
    assert chosen.model == RELEASED_MODEL and len(told) == 1
    assert model_choice(chosen) == "model: openbmb/MiniCPM-SALA (no --model given, and it is here)"
    assert with_usual_original(load_settings({"model": "x"}, {}), told.append).model == "x"


def test_plans_and_token_counts_follow(seed: int) -> None:
    assert with_usual_plan(load_settings({}, {})).model == RELEASED_MODEL
    assert with_usual_tokenizer(load_settings({}, {})).model == "builtin"
    source = catalog_cases.put_into_cache(RELEASED_MODEL, seed)
    assert with_usual_tokenizer(load_settings({}, {})).model == RELEASED_MODEL
    catalog_cases.make_copy(source, COPY)
    assert with_usual_plan(load_settings({}, {})).model == COPY == with_usual_tokenizer(load_settings({}, {})).model
    assert with_usual_plan(load_settings({"model": "x"}, {})).model == "x"
