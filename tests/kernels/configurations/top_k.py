"""What sampling from a small top_k launches: the first selection, from logits, and those behind it."""

from compile_case import CompileCase

from salalocal.kernels.top_k import BLOCK_ENTRIES, MAX_TOP_K, NUM_WARPS, _select_kernel

CASES = [
    CompileCase(
        name=f"select {MAX_TOP_K} logits={from_logits}",
        kernel=_select_kernel,
        types={"source_ptr": "*fp32" if from_logits else "*i64", "keys_ptr": "*i64", "num_entries": "i32"},
        constants={
            "BLOCK": BLOCK_ENTRIES,
            "KEPT": MAX_TOP_K,
            "FROM_LOGITS": from_logits,
            "PDL": min(architectures) >= 90,
        },
        num_warps=NUM_WARPS,
        divisible=("source_ptr", "keys_ptr"),
        architectures=architectures,
    )
    for from_logits in (True, False)
    for architectures in ((80, 86, 89), (90, 120))
]
