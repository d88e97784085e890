"""Interchange with GPTQModel: what it packs is what we write, bit for bit, and both dequantize to the same numbers.

GPTQModel needs a newer torch than ours must have and is no test extra; where it is installed, this runs, on a CPU.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from quantized_cases import gptq_record, random_weight

from salalocal.quant.int4 import IntScheme, from_gptq, to_gptq

NUM_OUT, NUM_IN = 64, 128


def their_linear(scheme: IntScheme, act_order: bool) -> Any:
    linear = pytest.importorskip("gptqmodel.nn_modules.qlinear.torch").TorchLinear
    return linear(
        bits=scheme.bits, group_size=scheme.group_size, sym=True, desc_act=act_order,
        in_features=NUM_IN, out_features=NUM_OUT, bias=False,
    )  # fmt: skip


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("scheme", [IntScheme(4, 32), IntScheme(4, 128), IntScheme(8, 32)], ids=str)
def test_it_reads_what_we_write_and_writes_what_we_read(seed: int, scheme: IntScheme, act_order: bool) -> None:
    weight = random_weight(NUM_OUT, NUM_IN, scheme, seed, act_order, torch.float16)
    reader = their_linear(scheme, act_order)
    versions = pytest.importorskip("gptqmodel.utils.model")
    assert reader.load_state_dict(to_gptq(weight), strict=False).missing_keys == []
    versions.convert_gptq_v1_to_v2_format_module(reader, scheme.bits, torch.int32)
    reader.post_init()
    assert torch.equal(reader.dequantize_weight().T, weight.dequantize(torch.float16))

    dense = torch.nn.Linear(NUM_IN, NUM_OUT, bias=False)
    dense.weight.data = weight.dequantize()
    middle = torch.full_like(weight.scales, 2 ** (scheme.bits - 1), dtype=torch.float32)
    writer = their_linear(scheme, act_order)
    writer.pack_original(dense, weight.scales.float(), middle, weight.groups.clone())
    version_2 = from_gptq(writer.state_dict(), gptq_record(scheme, checkpoint_format="gptq_v2"))
    assert torch.equal(version_2.dequantize(), weight.dequantize())
    asked = SimpleNamespace(bits=scheme.bits, pack_dtype=torch.int32, sym=True)
    versions.convert_gptq_v2_to_v1_format_module(writer, asked)
    for leaf, tensor in to_gptq(weight).items():
        assert torch.equal(writer.state_dict()[leaf], tensor), leaf
