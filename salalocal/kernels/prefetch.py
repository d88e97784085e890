"""Asking the L2 cache for memory that a kernel will read after it has waited for the one ahead of it."""

from salalocal.kernels.backend import tl, triton


@triton.jit
def ask_for(bytes_ptr, rows, first, row_bytes, AHEAD: tl.constexpr):
    """AHEAD bytes of every row, from its byte `first` on, 128 at a time. Not for the interpreter.

    Shapes: rows [R]; bytes_ptr: 8-bit numbers, `row_bytes` a row.
    """
    starts = tl.minimum(first + tl.arange(0, (AHEAD + 127) // 128) * 128, row_bytes - 1)
    addresses = (bytes_ptr + rows[:, None] * row_bytes + starts[None, :]).to(tl.int64)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [addresses], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def ask_for_vector(ptr, BYTES: tl.constexpr):
    """The first BYTES bytes behind a pointer, rounded up to lines of 128. Not for the interpreter."""
    LINES: tl.constexpr = triton.next_power_of_2((BYTES + 127) // 128)
    ask_for(ptr.to(tl.pointer_type(tl.int8)), tl.zeros([1], tl.int32), 0, BYTES, LINES * 128)
