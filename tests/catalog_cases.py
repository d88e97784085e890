"""Models on disk as `pull` and `quantize` leave them, for tests of what finds and chooses them."""

import dataclasses
from pathlib import Path

import checkpoint_cases
import pytest
import tiny_tokenizer
import torch

from salalocal.checkpoint.hub_cache import CachedRepository
from salalocal.model.config import LIGHTNING, SPARSE, LightningConfig, SalaConfig
from salalocal.quant.quantizer import Quantizer
from salalocal.quant.recipe import QuantizeOptions
from salalocal.settings import models_folder

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def use_empty_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let the hub's cache, the models made here and the settings be empty folders; gives back the cache."""
    from huggingface_hub import constants

    for variable, folder in (("XDG_DATA_HOME", "data"), ("XDG_STATE_HOME", "state"), ("XDG_CONFIG_HOME", "config")):
        monkeypatch.setenv(variable, str(tmp_path / folder))
    monkeypatch.delenv("SALALOCAL_MODEL", raising=False)
    monkeypatch.delenv("SALALOCAL_CONFIG", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return tmp_path / "hf" / "hub"


def bf16_config() -> SalaConfig:
    """A config whose matrices all take groups of 128."""
    small = checkpoint_cases.small_config(
        dtype=torch.bfloat16,
        mixer_types=(SPARSE, LIGHTNING),
        vocab_size=tiny_tokenizer.VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=256,
    )
    return dataclasses.replace(
        small,
        eos_token_ids=tiny_tokenizer.EOS_IDS,
        max_position_embeddings=20_000,
        sparse=dataclasses.replace(small.sparse, head_dim=32),
        lightning=LightningConfig(num_heads=4, num_key_value_heads=4, head_dim=32),
    )


def write_model(folder: Path, seed: int, config: SalaConfig | None = None) -> Path:
    """A model in bf16 with a tokenizer and a model card."""
    config = config or bf16_config()
    tiny_tokenizer.write_tokenizer(folder)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    tensors = checkpoint_cases.random_tensors(config, seed, torch.bfloat16)
    return checkpoint_cases.written(folder, config, tensors)


def put_into_cache(hub_id: str, seed: int) -> Path:
    """A model as a pull of main leaves it, but for the links."""
    repository = CachedRepository.of(hub_id)
    folder = write_model(repository.snapshot(COMMIT), seed)
    (repository.folder / "refs").mkdir()
    (repository.folder / "refs" / "main").write_text(COMMIT)
    return folder


def make_copy(source: Path, name: str) -> Path:
    """A quantized copy among the models made here."""
    Quantizer(source, models_folder() / name, QuantizeOptions()).run()
    return models_folder() / name
