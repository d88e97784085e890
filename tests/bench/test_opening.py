"""Which model is measured, and how many bytes its weights are."""

from pathlib import Path

import pytest
import tiny_model
import torch
from checkpoint_cases import random_tensors, small_config
from quantized_cases import gptq_record, quantized_tensors, written_quantized

from salalocal.bench import opening
from salalocal.bench.opening import find_subject, open_subject, tensor_bytes
from salalocal.checkpoint.checkpoint import Checkpoint
from salalocal.checkpoint.names import expected_tensors
from salalocal.device import DeviceMemory
from salalocal.errors import HubError, MemoryBudgetError, RequestError
from salalocal.quant import weight_layout
from salalocal.quant.int4 import IntScheme
from salalocal.session.plan import RELEASED_MODEL
from salalocal.settings import Settings, load_settings

CPU, CARD = torch.device("cpu"), torch.device("cuda:0")


@pytest.fixture(autouse=True)
def empty_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(opening, "with_usual_model", lambda settings, tell: settings)


def test_nobody_s_choice_is_the_built_in_model_on_a_cpu_and_random_weights_on_a_card() -> None:
    settings, told = load_settings({}, {}), []
    _, found = find_subject(settings, CPU, told.append)
    assert found is not None and found.path.name == "builtin"
    assert find_subject(settings, CARD, told.append) == (settings, None)
    assert "random int4 weights of the released 9B shape" in told[-1]


def test_a_model_to_chat_with_comes_before_random_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    copy = tiny_model.write_tiny_model(tmp_path / "copy", 1)
    usual = Settings(model=str(copy), origins={"model": "default: the newest quantized copy"})
    monkeypatch.setattr(opening, "with_usual_model", lambda settings, tell: usual)
    told: list[str] = []
    settings, found = find_subject(load_settings({}, {}), CARD, told.append)
    assert settings is usual and found is not None and found.path == copy
    assert "the newest quantized copy" in told[0]
    chosen = Settings(model="builtin", origins={"model": "--model"})
    assert find_subject(chosen, CARD, told.append)[0] is chosen


def test_the_released_model_may_be_absent_and_no_other() -> None:
    told: list[str] = []
    settings = Settings(model=RELEASED_MODEL, origins={"model": "--model"})
    assert find_subject(settings, CPU, told.append)[1] is None
    assert "is not on this machine" in told[0]
    with pytest.raises(HubError):
        find_subject(Settings(model="someone/else", origins={"model": "--model"}), CPU, told.append)


def test_bytes_of_packed_and_dense_tensors(tmp_path: Path, seed: int) -> None:
    config = small_config(hidden_size=64)
    tensors = random_tensors(config, seed)
    scheme = IntScheme(4, 32)
    stored, _ = quantized_tensors(tensors, lambda name: scheme if "gate_proj" in name else None)
    folder = written_quantized(tmp_path / "model", config, stored, gptq_record(scheme))
    sizes = tensor_bytes(weight_layout(Checkpoint.open(folder)), torch.float32)
    assert set(sizes) == set(expected_tensors(config))
    assert sizes["model.layers.0.mlp.gate_proj.weight"] == 80 * 64 // 2 + 2 * 80 * 2
    assert sizes["model.layers.0.mlp.up_proj.weight"] == 80 * 64 * 4
    assert sizes["model.norm.weight"] == 64 * 4


def test_a_random_model_that_cannot_fit_is_refused_with_what_would(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "device_memory", lambda device: DeviceMemory(9 * 2**30, 9 * 2**30))
    with pytest.raises(MemoryBudgetError, match="4,000,000 tokens need") as caught:
        open_subject(None, Settings(), CPU, 4_000_000)
    assert caught.value.hint.startswith("salalocal bench --ctx ")
    monkeypatch.setattr(opening, "device_memory", lambda device: DeviceMemory(2**30, 2**30))
    with pytest.raises(MemoryBudgetError) as caught:
        open_subject(None, Settings(), CPU, 4096)
    assert caught.value.hint == "salalocal bench --model builtin"


@pytest.mark.parametrize("wish", [{"dtype": "float16"}, {"math": "int3"}, {"kv_cache": "bf16"}, {"kv_place": "host"}])
def test_what_random_weights_cannot_be_is_refused(wish: dict[str, str]) -> None:
    with pytest.raises(RequestError, match="--"):
        open_subject(None, Settings(**wish), CPU, 4096)  # type: ignore[arg-type]


def test_a_stored_model_says_what_it_is(tmp_path: Path, seed: int) -> None:
    folder = tiny_model.write_tiny_model(tmp_path / "model", seed)
    settings = Settings(model=str(folder), device="cpu", chunk_size=32, origins={"model": "--model"})
    found = find_subject(settings, CPU, lambda line: None)[1]
    subject = open_subject(found, settings, CPU, 500)
    facts = subject.facts
    assert facts.chunk_size == 32 and (facts.dtype, facts.math, facts.cache) == ("fp32", "fp32", "fp32")
    assert facts.model_bytes == 4 * facts.num_parameters == 4 * subject.config.num_parameters
