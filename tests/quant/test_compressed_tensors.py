"""compressed-tensors folders: what that library packs is read to the same numbers, and what is not understood is
refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import random_tensors, small_config
from quantized_cases import projections, random_weight, rounded, unpacked_by_hand, written_quantized
from torch import Tensor

from salalocal.checkpoint.checkpoint import Checkpoint
from salalocal.engine.load import load_model
from salalocal.errors import CheckpointError
from salalocal.quant import weight_layout
from salalocal.quant.int4 import IntScheme, IntWeight
from salalocal.quant.linear import QuantizedLinear

MODULE = "model.layers.1.self_attn.q_proj"


def pack_quantized(weight: IntWeight) -> dict[str, Tensor]:
    """The tensors of one matrix by their last name."""
    packed = weight.packed()
    tensors = {
        "weight_packed": packed.words,
        "weight_scale": weight.scales,
        "weight_shape": torch.tensor(weight.codes.shape),
    }
    if weight.group_index is not None:
        tensors["weight_g_idx"] = weight.group_index
    return tensors


def record(scheme: IntScheme, **weights: Any) -> dict[str, Any]:
    args = {"num_bits": scheme.bits, "type": "int", "symmetric": True, "strategy": "group"}
    group = {"targets": ["Linear"], "weights": {**args, "group_size": scheme.group_size, **weights}}
    return {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "ignore": ["lm_head", "re:.*z_proj", "re:.*o_gate"], "config_groups": {"group_0": group},
    }  # fmt: skip


def folder_of(tmp_path: Path, seed: int, quantize: Any, asked: dict[str, Any]) -> tuple[Checkpoint, dict[str, Tensor]]:
    """A folder whose projections went through `quantize(weight) -> IntWeight`, and what they mean."""
    stored: dict[str, Tensor] = {}
    meaning: dict[str, Tensor] = {}
    for name, tensor in random_tensors(small_config(), seed).items():
        if tensor.ndim == 1 or projections(name) is None:
            stored[name] = tensor
            continue
        weight = quantize(tensor)
        module = name.removesuffix(".weight")
        meaning[module] = weight.dequantize()
        stored.update({f"{module}.{leaf}": part for leaf, part in pack_quantized(weight).items()})
    return Checkpoint.open(written_quantized(tmp_path, small_config(), stored, asked)), meaning


@pytest.mark.parametrize("scheme", [IntScheme(4, 16), IntScheme(8, 8), IntScheme(4, 32)], ids=str)
def test_a_folder_means_what_was_stored_and_its_words_stay_mapped(tmp_path: Path, seed: int, scheme: IntScheme) -> None:
    checkpoint, meaning = folder_of(tmp_path, seed, lambda tensor: rounded(tensor, scheme), record(scheme))
    layout = weight_layout(checkpoint)
    model = load_model(checkpoint, torch.device("cpu"))
    assert layout.matrices.keys() == meaning.keys()
    for module, dense in meaning.items():
        weight = layout.read(module)
        assert torch.equal(weight.unpacked().dequantize(), dense)
        linear = model.get_submodule(module)
        assert isinstance(linear, QuantizedLinear)
        assert linear.words.data_ptr() == checkpoint.tensor(f"{module}.weight_packed").data_ptr()
        torch.testing.assert_close(linear(torch.eye(dense.shape[1])).T, dense)


def test_channels_and_act_order(tmp_path: Path, seed: int) -> None:
    asked = record(IntScheme(4, 1), strategy="channel", group_size=None)
    checkpoint, meaning = folder_of(
        tmp_path / "channel", seed, lambda tensor: rounded(tensor, IntScheme(4, tensor.shape[1])), asked
    )
    layout = weight_layout(checkpoint)
    assert all(torch.equal(layout.read(module).unpacked().dequantize(), dense) for module, dense in meaning.items())

    scheme = IntScheme(4, 16)
    checkpoint, meaning = folder_of(
        tmp_path / "order", seed, lambda tensor: random_weight(*tensor.shape, scheme, seed, True), record(scheme)
    )
    layout = weight_layout(checkpoint)
    assert all(torch.equal(layout.read(module).unpacked().dequantize(), dense) for module, dense in meaning.items())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"type": "float"}, "group_0 is not pack-quantized with symmetric integer weights"),
        ({"symmetric": False}, "group_0 is not pack-quantized"),
        ({"strategy": "tensor"}, "group_0 is not pack-quantized"),
        ({"num_bits": 3}, "3 bits, 4 and 8 can be read"),
        ({"num_bits": 8}, "fit none of what quantization_config declares .8 bits in groups of 16"),
        ({"group_size": 8}, "4 bits in groups of 8"),
        ({"group_size": "many"}, "group size many is not a count"),
    ],
)
def test_a_record_that_says_something_else_is_refused(
    tmp_path: Path, seed: int, changes: dict[str, Any], reason: str
) -> None:
    scheme = IntScheme(4, 16)
    checkpoint, _ = folder_of(tmp_path, seed, lambda tensor: rounded(tensor, scheme), record(scheme, **changes))
    with pytest.raises(CheckpointError, match=reason):
        weight_layout(checkpoint)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda whole: whole.update(format="int-quantized"), "not pack-quantized"),
        (lambda whole: whole["config_groups"]["group_0"].update(input_activations={"num_bits": 8}), "not pack-quant"),
        (lambda whole: whole["config_groups"]["group_0"].pop("weights"), "has no weights"),
        (lambda whole: whole.update(config_groups={}), "1 to 256 groups"),
        (lambda whole: whole.update(config_groups=[1]), "1 to 256 groups"),
    ],
)
def test_a_record_of_another_kind_is_refused(tmp_path: Path, seed: int, change: Any, reason: str) -> None:
    scheme = IntScheme(4, 16)
    whole = record(scheme)
    change(whole)
    checkpoint, _ = folder_of(tmp_path, seed, lambda tensor: rounded(tensor, scheme), whole)
    with pytest.raises(CheckpointError, match=reason):
        weight_layout(checkpoint)


def test_a_shape_that_contradicts_the_config_is_named(tmp_path: Path, seed: int) -> None:
    scheme = IntScheme(4, 16)
    checkpoint, _ = folder_of(tmp_path, seed, lambda tensor: rounded(tensor, scheme), record(scheme))
    layout = weight_layout(checkpoint)
    checkpoint.tensor(f"{MODULE}.weight_shape")[0] += 1  # private to this process: the file stays as it is
    with pytest.raises(CheckpointError, match=f"{MODULE}: weight_shape says"):
        layout.read(MODULE)


@pytest.mark.parametrize("strategy", ["group", "channel"])
@pytest.mark.parametrize("scheme", [IntScheme(4, 32), IntScheme(8, 16), IntScheme(4, 128)], ids=str)
def test_the_library_packs_and_unpacks_the_same_numbers(seed: int, scheme: IntScheme, strategy: str) -> None:
    library = pytest.importorskip("compressed_tensors", reason="needs compressed-tensors, a test extra")
    packer = pytest.importorskip("compressed_tensors.compressors").PackedQuantizationCompressor
    asked = record(scheme)["config_groups"]["group_0"]
    if strategy == "channel":
        scheme = IntScheme(scheme.bits, 128)
        asked = record(scheme, strategy="channel", group_size=None)["config_groups"]["group_0"]
    theirs = library.quantization.QuantizationScheme.model_validate(asked)
    weight = torch.randn(24, 128, generator=torch.Generator().manual_seed(seed))
    ours = rounded(weight, scheme, torch.float32)

    packed = packer.compress({"weight": weight, "weight_scale": ours.scales}, theirs)
    assert unpacked_by_hand(packed["weight_packed"], scheme.bits).tolist() == ours.codes.tolist()
    assert torch.equal(packed["weight_packed"], ours.packed().words)
    unpacked = packer.decompress(pack_quantized(ours), theirs)
    assert torch.equal(unpacked["weight"], ours.dequantize())
