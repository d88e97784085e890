"""GPTQ folders: gates left in 16 bit, mixed bits, act-order, version 2; and records that contradict the tensors."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import random_tensors, small_config
from quantized_cases import (
    GROUPS_OF_16,
    gptq_record,
    projections,
    quantized_tensors,
    random_weight,
    written_quantized,
)
from torch import Tensor

from salalocal.checkpoint.checkpoint import Checkpoint
from salalocal.errors import CheckpointError
from salalocal.quant import weight_layout
from salalocal.quant.int4 import IntScheme, to_gptq

MODULE = "model.layers.0.self_attn.q_proj"
CONFIG = small_config()


def stored_and_dense(seed: int, choice: Any = projections) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return quantized_tensors(random_tensors(CONFIG, seed), choice)


def opened(folder: Path, stored: dict[str, Tensor], record: dict[str, Any]) -> Checkpoint:
    return Checkpoint.open(written_quantized(folder, CONFIG, stored, record))


def test_gates_may_be_left_as_they_are(tmp_path: Path, seed: int) -> None:
    stored, dense = stored_and_dense(seed)
    patterns = {"-:.*self_attn\\.o_gate.*": {}, "-:.*self_attn\\.z_proj.*": {}}
    checkpoint = opened(tmp_path, stored, gptq_record(GROUPS_OF_16, dynamic=patterns))
    layout = weight_layout(checkpoint)
    assert "model.layers.0.self_attn.o_gate.weight" in layout.dense
    assert "model.layers.1.self_attn.z_proj.weight" in layout.dense
    assert len(layout.matrices) == 4 * 7 and all(m.scheme == GROUPS_OF_16 for m in layout.matrices.values())
    assert layout.expected.keys() == set(checkpoint.tensor_names)
    for module in layout.matrices:
        assert torch.equal(layout.read(module).unpacked().dequantize(), dense[f"{module}.weight"])


def test_everything_down_to_the_head_may_be_quantized(tmp_path: Path, seed: int) -> None:
    stored, dense = stored_and_dense(seed, lambda name: None if "embed" in name else GROUPS_OF_16)
    layout = weight_layout(opened(tmp_path, stored, gptq_record(GROUPS_OF_16, lm_head=True)))
    assert "lm_head" in layout.matrices and "model.layers.0.self_attn.o_gate" in layout.matrices
    assert torch.equal(layout.read("lm_head").unpacked().dequantize(), dense["lm_head.weight"])


def test_bits_and_groups_may_differ_from_matrix_to_matrix(tmp_path: Path, seed: int) -> None:
    def choice(name: str) -> IntScheme | None:
        return IntScheme(8, 24) if name == f"{MODULE}.weight" else projections(name)

    stored, dense = stored_and_dense(seed, choice)
    exception = {f"+:^{MODULE}$".replace(".", r"\."): {"bits": 8, "group_size": 24}}
    layout = weight_layout(opened(tmp_path / "told", stored, gptq_record(GROUPS_OF_16, dynamic=exception)))
    assert layout.matrices[MODULE].scheme == IntScheme(8, 24)
    assert layout.matrices[MODULE.replace("q_proj", "k_proj")].scheme == GROUPS_OF_16
    weight = layout.read(MODULE)
    assert weight.bits == 8 and torch.equal(weight.unpacked().dequantize(), dense[f"{MODULE}.weight"])

    with pytest.raises(CheckpointError, match=rf"{MODULE}: .* fit none of .*4 bits in groups of 16"):
        weight_layout(opened(tmp_path / "untold", stored, gptq_record(GROUPS_OF_16)))


def test_act_order_and_version_2(tmp_path: Path, seed: int) -> None:
    stored, _ = stored_and_dense(seed)
    num_in = stored[f"{MODULE}.g_idx"].numel()
    weight = random_weight(64, num_in, GROUPS_OF_16, seed, act_order=True)
    stored.update({f"{MODULE}.{leaf}": tensor for leaf, tensor in to_gptq(weight).items()})
    for name in stored:
        if name.endswith(".qzeros"):
            stored[name] = stored[name] + 0x11111111
    record = gptq_record(GROUPS_OF_16, desc_act=True, checkpoint_format="gptq_v2")
    read = weight_layout(opened(tmp_path, stored, record)).read(MODULE)
    assert read.group_index is not None and torch.equal(read.unpacked().dequantize(), weight.dequantize())


def test_a_group_per_row_may_be_spelled_minus_one(tmp_path: Path, seed: int) -> None:
    stored, dense = stored_and_dense(seed, lambda name: IntScheme(4, 1000) if projections(name) else None)
    layout = weight_layout(opened(tmp_path, stored, {**gptq_record(GROUPS_OF_16), "group_size": -1}))
    assert torch.equal(layout.read(MODULE).unpacked().dequantize(), dense[f"{MODULE}.weight"])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"bits": 3}, "3 bits, 4 and 8 can be read"),
        ({"bits": True}, "True bits"),
        ({"group_size": 0}, "group size 0 is not a count"),
        ({"group_size": 32}, "fit none of what quantization_config declares .4 bits in groups of 32"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format marlin, gptq and gptq_v2 can be read"),
        ({"dynamic": [1]}, "dynamic is not an object"),
        ({"dynamic": {f"+:{i}": {} for i in range(257)}}, "at most 256 patterns"),
        ({"dynamic": {"+:x": {"bits": 2}}}, r"dynamic \+:x: 2 bits"),
        ({"quant_method": "awq"}, "quantized by awq, gptq, compressed-tensors, bitsandbytes can be read"),
        ({"quant_method": ["gptq"]}, "can be read"),
    ],
)
def test_a_record_that_cannot_be_understood_is_refused(
    tmp_path: Path, seed: int, changes: dict[str, Any], reason: str
) -> None:
    stored, _ = stored_and_dense(seed)
    with pytest.raises(CheckpointError, match=reason):
        weight_layout(opened(tmp_path, stored, {**gptq_record(GROUPS_OF_16), **changes}))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda s: s.pop(f"{MODULE}.scales"), f"{MODULE}.scales is missing"),
        (lambda s: s.pop(f"{MODULE}.g_idx"), f"1 missing: {MODULE}.g_idx"),
        (lambda s: s.pop(f"{MODULE}.qweight"), f"1 missing: {MODULE}.weight"),
        (lambda s: s.update({f"{MODULE}.bias": torch.zeros(64)}), f"1 unknown: {MODULE}.bias"),
        (lambda s: s.update({f"{MODULE}.weight": torch.zeros(64, 48)}), f"1 unknown: {MODULE}.weight"),
        (lambda s: s.update({f"{MODULE}.g_idx": torch.zeros(48)}), f"{MODULE}.g_idx F32, not I32"),
        (lambda s: s.update({f"{MODULE}.qweight": torch.zeros(48, dtype=torch.int32)}), "needed is a matrix"),
        (lambda s: s.update({f"{MODULE}.qweight": torch.zeros(6, 63, dtype=torch.int32)}), r"\[6, 63\], not \[6, 64\]"),
        (lambda s: s.update({f"{MODULE}.qweight": torch.zeros(5, 64, dtype=torch.int32)}), "5 words and 3 groups"),
    ],
)
def test_tensors_that_do_not_belong_together_are_named(
    tmp_path: Path, seed: int, change: Callable[[dict[str, Tensor]], object], reason: str
) -> None:
    stored, _ = stored_and_dense(seed)
    change(stored)
    with pytest.raises(CheckpointError, match=reason):
        weight_layout(opened(tmp_path, stored, gptq_record(GROUPS_OF_16)))


@pytest.mark.parametrize(
    ("leaf", "value", "reason"),
    [
        ("scales", float("nan"), "scales hold NaN or infinity"),
        ("scales", float("inf"), "scales hold NaN or infinity"),
        ("g_idx", 3, "g_idx goes from 0 to 3, groups are 3"),
        ("qzeros", 0, "zero points are not symmetric"),
    ],
)
def test_numbers_that_make_no_sense_are_refused_when_read(
    tmp_path: Path, seed: int, leaf: str, value: float, reason: str
) -> None:
    stored, _ = stored_and_dense(seed)
    stored[f"{MODULE}.{leaf}"].view(-1)[-1] = value
    layout = weight_layout(opened(tmp_path, stored, gptq_record(GROUPS_OF_16)))
    with pytest.raises(CheckpointError, match=f"{MODULE}: {reason}"):
        layout.read(MODULE)
