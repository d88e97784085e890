"""Other kernels that multiply 4-bit weights, for benchmarks to stand beside: x [M, K] bf16 -> [M, N].

A peer is made with copies of random weights that are together larger than `cold_bytes`, one function for each copy. One
that is not installed raises ImportError.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Peer = list[Callable[[Tensor], Any]]


def cublas_peer(N: int, K: int, cold_bytes: int) -> Peer:
    weights = [torch.randn(N, K, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    return [lambda x, w=w: functional.linear(x, w) for w in weights]


def tinygemm_peer(N: int, K: int, cold_bytes: int) -> Peer:
    count = max(2, math.ceil(cold_bytes / (N * K // 2)))
    codes = torch.randint(0, 256, (N, K // 2), dtype=torch.uint8, device="cuda")
    packed = [torch.ops.aten._convert_weight_to_int4pack(codes, 8) for _ in range(count)]
    scales = torch.rand(K // 128, N, 2, device="cuda").bfloat16()
    return [lambda x, w=w: torch.ops.aten._weight_int4pack_mm(x, w, 128, scales) for w in packed]


def bnb_peer(N: int, K: int, cold_bytes: int) -> Peer:
    import bitsandbytes
    from bitsandbytes.functional import quantize_4bit

    weight = torch.randn(N, K, device="cuda", dtype=torch.bfloat16)
    packed, state = quantize_4bit(weight, quant_type="nf4", blocksize=128)
    count = max(2, math.ceil(cold_bytes / packed.numel()))
    copies = [packed.clone() for _ in range(count)]
    return [lambda x, w=w: bitsandbytes.matmul_4bit(x, w.t(), state) for w in copies]


def gemlite_peer(N: int, K: int, cold_bytes: int) -> Peer:
    from gemlite import helper

    make = helper.A16W4_HQQ_INT(device="cuda:0", dtype=torch.bfloat16)
    codes = torch.randint(0, 16, (N, K), dtype=torch.uint8, device="cuda")
    scales = torch.rand(N, K // 128, device="cuda").bfloat16()
    count = max(2, math.ceil(cold_bytes / (N * K // 2)))
    zeros = torch.full_like(scales, 8)
    return [make.from_weights(codes.clone(), scales.clone(), zeros.clone()) for _ in range(count)]


PEERS: dict[str, Callable[[int, int, int], Peer]] = {
    "cublas bf16": cublas_peer,
    "tinygemm": tinygemm_peer,
    "bitsandbytes nf4": bnb_peer,
    "gemlite A16W4": gemlite_peer,
}
