"""Publishing one model in two forms: both open, what is equal in them is stored once, and a stranger is refused."""

import json
from pathlib import Path

import pytest
import torch
from checkpoint_cases import random_tensors, small_config, written

from salalocal.checkpoint.checkpoint import Checkpoint
from salalocal.checkpoint.folder import ModelFolder
from salalocal.checkpoint.header import read_header
from salalocal.quant import weight_layout
from salalocal.quant.quantizer import Quantizer
from salalocal.quant.recipe import QuantizeOptions
from training.variants import publish_original, publish_quantized

CONFIG = small_config(True, torch.bfloat16, mixer_types=("minicpm4", "lightning-attn"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_both_forms_open_and_share_the_embedding_and_the_norms(tmp_path: Path, seed: int) -> None:
    tensors = random_tensors(CONFIG, seed, torch.bfloat16)
    source, out = written(tmp_path / "source", CONFIG, tensors), tmp_path / "out"
    out.mkdir()
    publish_original(source, out)
    original = Checkpoint.open(ModelFolder(out, "bf16"))
    assert all(torch.equal(original.tensor(name), tensor) for name, tensor in tensors.items())
    Checkpoint.open(out).validate()

    fingerprint = original.fingerprint
    card = Quantizer(ModelFolder(out, "bf16"), tmp_path / "int4", QuantizeOptions(group_size=8)).run()
    publish_quantized(tmp_path / "int4", out)
    assert json.loads((out / "quantization_card.json").read_text()) == card
    assert Checkpoint.open(ModelFolder(out, "bf16")).fingerprint == fingerprint == card["identity"]["source"]
    alone, shipped = Checkpoint.open(tmp_path / "int4"), Checkpoint.open(out)
    assert shipped.config_dict == alone.config_dict
    assert set(weight_layout(shipped).matrices) == {
        name[:-7] for name in tensors if "_proj" in name or "o_gate" in name
    }
    assert set(shipped.tensor_names) == set(alone.tensor_names)
    assert all(torch.equal(shipped.tensor(name), alone.tensor(name)) for name in alone.tensor_names)
    held = [name for path in out.glob("*.safetensors") for name in read_header(path).entries]
    assert len(held) == len(set(held)) and set(held) == set(alone.tensor_names) | set(tensors)

    again = tmp_path / "again"
    again.mkdir()
    publish_original(source, again)
    publish_quantized(tmp_path / "int4", again)
    assert contents(again) == contents(out)


def test_a_copy_of_another_model_is_refused(tmp_path: Path, seed: int) -> None:
    for name, offset in (("one", 0), ("two", 1)):
        written(tmp_path / name, CONFIG, random_tensors(CONFIG, seed + offset, torch.bfloat16))
    (tmp_path / "out").mkdir()
    publish_original(tmp_path / "one", tmp_path / "out")
    before = contents(tmp_path / "out")
    Quantizer(tmp_path / "two", tmp_path / "int4", QuantizeOptions(group_size=8)).run()
    with pytest.raises(ValueError, match=r"model\.embed_tokens\.weight is not that of"):
        publish_quantized(tmp_path / "int4", tmp_path / "out")
    assert contents(tmp_path / "out") == before
