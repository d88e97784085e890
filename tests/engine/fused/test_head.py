"""Tokens of a step from hidden states: greedy ones without logits are those of the logits."""

import pytest
import torch
from fused_cases import CPU, packed_model
from quantized_cases import random_weight

from salalocal.engine.fused import head as fused_head
from salalocal.engine.fused.head import Head
from salalocal.kernels.int4 import vocabulary
from salalocal.kernels.int4.gemv import PLAIN, int4_gemv_triton, operation
from salalocal.kernels.int4.gemv.launch import WordLaunch
from salalocal.kernels.int4.linear import _few, new_workspace
from salalocal.kernels.sampling import new_sampling_tensors
from salalocal.model.layers import DenseLinear
from salalocal.quant.int4 import IntScheme
from salalocal.quant.linear import KernelLinear

ENTRIES = 150


def hidden_rows(seed: int, num_rows: int, width: int) -> torch.Tensor:
    return torch.randn(num_rows, width, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.mark.parametrize("num_rows", [1, 3])
def test_greedy_tokens_are_those_of_the_logits(seed: int, num_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = packed_model("int8")
    config = model.config
    weight = random_weight(ENTRIES, config.hidden_size, IntScheme(8, 128), seed).packed()
    model.lm_head = linear = KernelLinear(weight, "int8", new_workspace(CPU, 2**16, "int8"))
    for module in (fused_head, vocabulary):  # as on a card
        monkeypatch.setattr(module, "use_triton", lambda *_: True)
    monkeypatch.setattr(operation, "choose_launch", lambda *_: WordLaunch(64, 32, 2))  # few programs: interpreted
    hidden = hidden_rows(seed, num_rows, config.hidden_size)
    sampling = new_sampling_tensors(CPU, 1, 16)
    tokens = Head(model).greedy(hidden, sampling)
    rows = _few(hidden / config.logit_divisor, linear, linear.math)
    logits = int4_gemv_triton(rows, linear, PLAIN, torch.bfloat16)
    assert tokens.tolist() == logits.float().argmax(1).tolist() and int(sampling.is_damaged) == 0


def test_without_kernels_and_without_packed_weights_logits_are_made(seed: int) -> None:
    model = packed_model("int8")
    hidden, sampling = hidden_rows(seed, 2, model.config.hidden_size), new_sampling_tensors(CPU, 1, 16)
    with torch.inference_mode():
        assert model.lm_head is None  # the embedding's table
        assert Head(model).greedy(hidden, sampling).tolist() == model.logits(hidden).argmax(1).tolist()
        dense = DenseLinear(model.config.hidden_size, ENTRIES, CPU, torch.bfloat16)
        dense.weight.data.normal_(generator=torch.Generator().manual_seed(seed))
        model.lm_head = dense
        assert Head(model).greedy(hidden, sampling).tolist() == model.logits(hidden).argmax(1).tolist()
