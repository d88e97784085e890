"""Appending to the KV cache at the released sizes: a decode step, a draft and a chunk, in 16 and in 8 bits."""

from compile_case import CompileCase

from salalocal.kernels.block_topk import BlockGeometry
from salalocal.kernels.kv_cache import _append_kernel, append_constants

RELEASED = BlockGeometry(kernel_size=32, kernel_stride=16, block_size=64, init_blocks=1, window_size=2048, topk=64)
FLOATS = dict.fromkeys(("k_ptr", "v_ptr", "k1_ptr", "k2_ptr", "recent_ptr"), "*bf16")
SCALES = dict.fromkeys(("key_scales_ptr", "value_scales_ptr"), "*bf16")
STRIDES = dict.fromkeys((f"stride_{axis}" for axis in ("kt", "kh", "vt", "vh", "keys", "values", "k1", "k2")), "i32")
POSITION = {"position_ptr": "*i64"}


def case(num_tokens: int, is_quantized: bool, architectures: tuple[int, ...], has_pdl: bool) -> CompileCase:
    """One launch of so many tokens."""
    cached = dict.fromkeys(("keys_ptr", "values_ptr"), "*i8" if is_quantized else "*bf16")
    absent = {} if is_quantized else dict.fromkeys(("recent_ptr", *SCALES))
    types = {**FLOATS, **SCALES, **cached, **STRIDES, **POSITION, "num_tokens": "i32", "stride_scales": "i32"}
    return CompileCase(
        f"append {num_tokens} {'int8' if is_quantized else 'bf16'}",
        _append_kernel,
        types,
        append_constants(RELEASED, num_tokens, 128, is_quantized) | absent | {"PDL": has_pdl},
        divisible=tuple(name for name in (*FLOATS, *cached, *STRIDES, *POSITION) if name not in absent),
        architectures=architectures,
    )


CASES = [
    case(num_tokens, is_quantized, architectures, has_pdl)
    for num_tokens in (1, 16, 8192)
    for is_quantized in (False, True)
    for architectures, has_pdl in (((80, 86), False), ((90, 120), True))
]
