"""bitsandbytes folders: what is stored is read to the same numbers, and records and tensors that contradict each other
are refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import random_tensors, small_config
from quantized_cases import written_quantized
from torch import Tensor, nn

from salalocal.checkpoint.checkpoint import Checkpoint
from salalocal.errors import CheckpointError
from salalocal.quant import weight_layout
from salalocal.quant.codebook import (
    FP4,
    NF4,
    STATE_LEAF,
    CodebookScheme,
    CodebookWeight,
    round_to_codebook,
    to_bitsandbytes,
)
from salalocal.quant.recipe import QuantizeOptions, quantization_record

MODULE = "model.layers.1.self_attn.q_proj"
STATE = f"{MODULE}.{STATE_LEAF}{NF4}"
CONFIG = small_config()


def record(kind: str = NF4, **changes: Any) -> dict[str, Any]:
    options = QuantizeOptions(method=kind, group_size=64)
    return {**quantization_record(CONFIG, options, "float32"), **changes}


def is_quantized(name: str) -> bool:
    """Layers' linear maps but for a gate, as in a folder whose maker has left some out."""
    return name.startswith("model.layers.") and "norm" not in name and "o_gate" not in name


def stored_and_meant(seed: int, kind: str = NF4) -> tuple[dict[str, Tensor], dict[str, CodebookWeight]]:
    stored: dict[str, Tensor] = {}
    meant: dict[str, CodebookWeight] = {}
    for name, tensor in random_tensors(CONFIG, seed).items():
        if not is_quantized(name):
            stored[name] = tensor
            continue
        module = name.removesuffix(".weight")
        meant[module] = round_to_codebook(tensor, CodebookScheme(kind), torch.float32)
        stored.update({f"{module}.{leaf}": part for leaf, part in to_bitsandbytes(meant[module]).items()})
    return stored, meant


def opened(folder: Path, stored: dict[str, Tensor], asked: dict[str, Any]) -> Checkpoint:
    return Checkpoint.open(written_quantized(folder, CONFIG, stored, asked))


def as_tensor(state: dict[str, Any]) -> Tensor:
    return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


def state_of(stored: dict[str, Tensor]) -> dict[str, Any]:
    return dict(json.loads(bytes(stored[STATE].tolist())))


@pytest.mark.parametrize("kind", [NF4, FP4])
def test_a_folder_means_what_was_stored_and_its_codes_stay_mapped(tmp_path: Path, seed: int, kind: str) -> None:
    stored, meant = stored_and_meant(seed, kind)
    checkpoint = opened(tmp_path, stored, record(kind))
    layout = weight_layout(checkpoint)
    assert layout.matrices.keys() == meant.keys() and "model.layers.0.self_attn.o_gate.weight" in layout.dense
    assert layout.expected.keys() == set(checkpoint.tensor_names)
    for module, weight in meant.items():
        read = layout.read(module)
        assert isinstance(read, CodebookWeight) and torch.equal(read.dequantize(), weight.dequantize())
        assert read.codes.data_ptr() == checkpoint.tensor(f"{module}.weight").data_ptr()
        in_memory = read.codes.nbytes + read.absmax.nbytes + read.codebook.nbytes
        assert layout.matrices[module].num_bytes == in_memory


def test_double_quantization_is_unfolded_when_read(tmp_path: Path, seed: int) -> None:
    stored, meant = stored_and_meant(seed)
    absmax = stored[f"{MODULE}.weight.absmax"]
    line = torch.linspace(0, 4, 256)
    stored[f"{MODULE}.weight.absmax"] = torch.arange(len(absmax), dtype=torch.uint8)
    stored[f"{MODULE}.weight.nested_absmax"] = torch.tensor([2.0])
    stored[f"{MODULE}.weight.nested_quant_map"] = line
    nested = {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.25}
    stored[STATE] = as_tensor({**state_of(stored), **nested})
    layout = weight_layout(opened(tmp_path, stored, record(bnb_4bit_use_double_quant=True)))
    read = layout.read(MODULE)
    assert isinstance(read, CodebookWeight) and torch.equal(read.codes, meant[MODULE].codes)
    assert torch.equal(read.absmax, 2 * line[: len(absmax)] + 0.25)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"load_in_4bit": False, "load_in_8bit": True}, r"4 bits \(load_in_4bit\) alone can be read"),
        ({"load_in_4bit": "yes"}, "alone can be read"),
        ({"load_in_8bit": True}, "alone can be read"),
        ({"bnb_4bit_quant_storage": "bfloat16"}, "quant_storage bfloat16, uint8 can be read"),
    ],
)
def test_records_of_another_kind_are_refused(tmp_path: Path, seed: int, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason):
        weight_layout(opened(tmp_path, stored_and_meant(seed)[0], record(**changes)))


Change = Callable[[dict[str, Tensor]], object]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda s: s.pop(f"{MODULE}.weight"), f"1 missing: {MODULE}.weight$"),
        (lambda s: s.pop(f"{MODULE}.weight.absmax"), f"1 missing: {MODULE}.weight.absmax"),
        (lambda s: s.pop(f"{MODULE}.weight.quant_map"), f"1 missing: {MODULE}.weight.quant_map"),
        (lambda s: s.pop(STATE), f"{MODULE}.weight .576, 1., not .24, 48."),
        (lambda s: s.update({f"{MODULE}.weight": torch.zeros(1, 576, dtype=torch.uint8)}), r"not \[576, 1\]"),
        (lambda s: s.update({f"{MODULE}.weight.absmax": torch.zeros(17)}), r"absmax \[17\], not \[18\]"),
        (lambda s: s.update({f"{MODULE}.weight.absmax": torch.zeros(18).byte()}), "absmax U8, not F32"),
        (lambda s: s.update({f"{MODULE}.weight.nested_absmax": torch.zeros(1)}), "1 unknown: .*nested_absmax"),
        (lambda s: s.update({STATE: as_tensor({})}), f"{MODULE}: quant_state .* is not one of bitsandbytes' nf4"),
        (lambda s: s.update({STATE: torch.zeros(4)}), f"{MODULE}: quant_state is torch.float32"),
        (
            lambda s: s.update({STATE: as_tensor({**state_of(s), "shape": [48, 24]})}),
            rf"{MODULE}: quant_state says \[48, 24\], the config \[24, 48\]",
        ),
    ],
)
def test_tensors_that_do_not_belong_together_are_named(tmp_path: Path, seed: int, change: Change, reason: str) -> None:
    stored, _ = stored_and_meant(seed)
    change(stored)
    with pytest.raises(CheckpointError, match=reason):
        weight_layout(opened(tmp_path, stored, record()))


def test_rows_of_odd_length_are_refused(tmp_path: Path, seed: int) -> None:
    config = small_config(hidden_size=47)
    stored = random_tensors(config, seed)
    matrix = stored.pop(f"{MODULE}.weight")
    stored[f"{MODULE}.weight"] = torch.zeros(matrix.numel() // 2, 1, dtype=torch.uint8)
    stored[STATE] = as_tensor({"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": list(matrix.shape)})
    checkpoint = Checkpoint.open(written_quantized(tmp_path, config, stored, record()))
    with pytest.raises(CheckpointError, match="an odd number of inputs cannot be read"):
        weight_layout(checkpoint)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_make_no_sense_are_refused_when_read(tmp_path: Path, seed: int, value: float) -> None:
    stored, _ = stored_and_meant(seed)
    stored[f"{MODULE}.weight.absmax"][-1] = value
    layout = weight_layout(opened(tmp_path, stored, record()))
    with pytest.raises(CheckpointError, match=f"{MODULE}: scales hold NaN or infinity"):
        layout.read(MODULE)


def test_transformers_understands_record_and_tensors(seed: int) -> None:
    library = pytest.importorskip("bitsandbytes")
    config_class = pytest.importorskip("transformers").BitsAndBytesConfig
    for kind in (NF4, FP4):
        asked = record(kind)
        config = config_class.from_dict(asked)
        assert config.load_in_4bit and config.bnb_4bit_quant_type == kind and not config.bnb_4bit_use_double_quant
        assert config.to_dict() == asked
        ours = round_to_codebook(torch.randn(24, 64), CodebookScheme(kind), torch.float32)
        model = nn.Module()
        model.up_proj = library.nn.Linear4bit(64, 24, bias=False, compute_dtype=torch.float32, quant_type=kind)
        reader = pytest.importorskip("transformers.integrations.bitsandbytes").Bnb4bitDeserialize(None)
        given: dict[str, Any] = dict(to_bitsandbytes(ours))
        model.up_proj.weight = reader.convert(given, model=model, full_layer_name="up_proj.weight")["weight"]
        x = torch.randn(5, 64)
        torch.testing.assert_close(model.up_proj(x), x @ ours.dequantize().T)
        read = library.functional.dequantize_4bit(model.up_proj.weight.data, model.up_proj.weight.quant_state)
        assert torch.equal(read, ours.dequantize())
