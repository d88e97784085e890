"""Every kernel once or twice at small but real widths, and whole answers of the built-in model, for compute-sanitizer.

    export PYTHONPATH=.
    python3 benchmarks/sanitize.py --tool memcheck --seconds 75 --out memcheck
    python3 benchmarks/sanitize.py --tool racecheck --seconds 75 --out racecheck
    PYTHONPATH=.:tests python3 benchmarks/sanitize.py --dry --seconds 300 [--graphs]     # no card: this script

`--tool` first fills Triton's cache without the sanitizer (as `--compile` does alone), then runs shares of the cases in
processes side by side, each under compute-sanitizer, and prints what they found; their whole output lies in --out.
Triton's kernels need no flags for it. Kernels are run with an allocation for every tensor (no caching), so that a step
past its end is seen; a captured step cannot be, since a graph takes its memory from torch's cache: `--graphs` runs
those, with caching, so that only what has gone back to the driver, or never was memory, is seen. Racecheck looks at
shared memory alone and leaves the graphs out, which hold the same kernels, and the tiles of 256 rows.

`--only a,b` runs what has that in its name, `--part I/N` a share; what was not reached in `--seconds` is told and makes
the exit status 3. Not covered: torch's own kernels (dense attention, products of the vendor), packed_matmul,
codebook_matmul and pick_weights, which are torch operations, and launch settings of other cards than the one at hand.
memcheck also reports torch's own question whether memory may be shared between processes (cuMemCreate, error 800).
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

DRY, GRAPHS = "--dry" in sys.argv, "--graphs" in sys.argv
os.environ.pop("PYTORCH_NO_CUDA_MEMORY_CACHING", None)  # of the process that started this one
if DRY:
    os.environ["TRITON_INTERPRET"] = "1"
elif not GRAPHS:
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"

import torch  # noqa: E402

if DRY:
    import interp_compat  # noqa: F401

from benchmarks.sanitizer_processes import Script, check_by, compile_all  # noqa: E402
from salalocal.checkpoint.checkpoint import Checkpoint  # noqa: E402
from salalocal.checkpoint.hub import find_model  # noqa: E402
from salalocal.engine.engine import Engine, EngineConfig  # noqa: E402
from salalocal.engine.load import Placement, load_model  # noqa: E402
from salalocal.engine.sampling_params import SamplingParams  # noqa: E402
from salalocal.kernels.backend import entry_of_card  # noqa: E402
from salalocal.kernels.block_attention import KeyValues, block_attention_decode, block_attention_triton  # noqa: E402
from salalocal.kernels.block_attention.host import host_block_attention  # noqa: E402
from salalocal.kernels.block_topk import BlockGeometry, block_topk_decode, block_topk_triton  # noqa: E402
from salalocal.kernels.column_walk import column_walk_triton  # noqa: E402
from salalocal.kernels.embedding import embed_triton  # noqa: E402
from salalocal.kernels.gate import sigmoid_gate_triton  # noqa: E402
from salalocal.kernels.gated_norm import GatedNorm, gated_norm_triton  # noqa: E402
from salalocal.kernels.host_memory import page_locked_empty  # noqa: E402
from salalocal.kernels.int4 import activations_by_row as by_row  # noqa: E402
from salalocal.kernels.int4.activations_by_group import RawActivations, grouped_activations_triton  # noqa: E402
from salalocal.kernels.int4.gemm import int4_gemm_triton, new_split_workspace  # noqa: E402
from salalocal.kernels.int4.gemm_launch import INT4_BF16_LAUNCH, INT4_INT8_LAUNCH, INT8_LAUNCH, GemmLaunch  # noqa: E402
from salalocal.kernels.int4.gemv import PLAIN, SWIGLU, Epilogue, int4_gemv_triton  # noqa: E402
from salalocal.kernels.int4.gemv.launch import StreamLaunch, TileLaunch, WordLaunch  # noqa: E402
from salalocal.kernels.int4.int8_gemm import Residual, int8_gemm_triton, int8_swiglu_triton  # noqa: E402
from salalocal.kernels.int4.scratch import (  # noqa: E402
    Int4Weight,
    decode_bf16_triton,
    decode_fp8_triton,
    decode_int8_triton,
    int4_weight,
)
from salalocal.kernels.int4.vocabulary import likeliest_tokens_triton  # noqa: E402
from salalocal.kernels.kv_cache import RECENT_TOKENS, CacheRows, append_tokens_triton  # noqa: E402
from salalocal.kernels.lightning import lightning_slopes  # noqa: E402
from salalocal.kernels.lightning_decode import (  # noqa: E402
    MAX_STEPS,
    Heads,
    PendingTokens,
    commit_pending_triton,
    lightning_decays,
    speculative_step_triton,
)
from salalocal.kernels.lightning_prefill import Recurrence, lightning_prefill_triton  # noqa: E402
from salalocal.kernels.memory_read import PIECE, read_sums_triton  # noqa: E402
from salalocal.kernels.norm import rms_norm_triton  # noqa: E402
from salalocal.kernels.pick_ring import StepPicks, keep_picks_triton, new_pick_ring  # noqa: E402
from salalocal.kernels.pooled_keys import num_pooled, pooled_keys  # noqa: E402
from salalocal.kernels.qk_norm_rope import NormRope, qk_norm_rope_triton  # noqa: E402
from salalocal.kernels.sampling import (  # noqa: E402
    draw_tokens_triton,
    greedy_tokens_triton,
    new_sampling_tensors,
    sample_tokens_triton,
)
from salalocal.kernels.swiglu import swiglu_triton  # noqa: E402
from salalocal.kernels.top_k import top_k_triton  # noqa: E402
from salalocal.quant.int4 import PackedWeight  # noqa: E402

DEVICE = torch.device("cpu" if DRY else "cuda")
# Not whole tiles; K a power of two, as the streaming products need.
K, N = (256, 40) if DRY else (2048, 1032)
HEADS, DIM = (4, 32) if DRY else (32, 128)
TOKENS = 600 if DRY else 6_211
GEOMETRY = BlockGeometry(
    kernel_size=32, kernel_stride=16, block_size=64, init_blocks=1, window_size=128 if DRY else 2048,
    topk=6 if DRY else 64,
)  # fmt: skip
Case = Callable[[], object]


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE).bfloat16()


def packed(bits: int, num_out: int = N, num_in: int = K) -> PackedWeight:
    words = torch.randint(-(2**31), 2**31 - 1, (num_out, num_in * bits // 32), device=DEVICE, dtype=torch.int64)
    scales = torch.rand(num_out, num_in // 128, device=DEVICE) * 0.01 + 0.001
    return PackedWeight(words.to(torch.int32), scales.bfloat16(), bits, 128)


def folded(bits: int, num_out: int = N, num_in: int = K) -> Int4Weight:
    weight = packed(bits, num_out, num_in)
    return int4_weight(weight.words, weight.scales, 128, bits)


def gemv(kind: str, num_tokens: int, bits: int, launch: object, epilogue: Epilogue) -> None:
    weight, rows = packed(bits), normal(num_tokens, K)
    if epilogue.kind == "residual":
        epilogue = Epilogue("residual", 0.5, normal(num_tokens, N))
    if kind == "raw":
        x: object = RawActivations(rows, (torch.ones(K, device=DEVICE).bfloat16(), 1e-6))
    else:
        x = grouped_activations_triton(rows, quantize=kind == "int8", is_split=bits == 4)
    int4_gemv_triton(x, weight, epilogue, launch=launch)  # type: ignore[arg-type]


def gemv_cases() -> Iterator[tuple[str, Case]]:
    words, stream = WordLaunch(4, 128 if not DRY else 16, 2), StreamLaunch(8, 128 if not DRY else 16, 4, 2)
    tiles = [TileLaunch(64, 4, 4, 2, ahead=0 if DRY else 256), TileLaunch(128, 8, 3, 1, ahead=0 if DRY else 256)]
    for num_tokens in (1, 3):
        for name, epilogue in (("plain", PLAIN), ("swiglu", SWIGLU), ("residual", Epilogue("residual"))):
            yield f"gemv words {num_tokens} {name}", partial(gemv, "int8", num_tokens, 4, words, epilogue)
            yield f"gemv stream {num_tokens} {name}", partial(gemv, "raw", num_tokens, 4, stream, epilogue)
    yield "gemv words 8 bits", partial(gemv, "int8", 2, 8, words, PLAIN)
    for launch in tiles:
        yield f"gemv tiles {launch.rows}", partial(gemv, "int8", 5, 4, launch, Epilogue("residual"))
        yield f"gemv tiles {launch.rows} swiglu", partial(gemv, "int8", 16, 4, launch, SWIGLU)
        yield f"gemv tiles {launch.rows} 8 bits", partial(gemv, "int8", 9, 8, launch, PLAIN)
    yield "gemv tiles floats", partial(gemv, "float", 16, 4, tiles[0], PLAIN)


def vocabulary() -> None:
    x = grouped_activations_triton(normal(2, K), is_split=False)
    likeliest_tokens_triton(x, packed(8), torch.zeros(1, dtype=torch.int32, device=DEVICE))
    top_k_triton(torch.randn(2, 3_001, device=DEVICE), 40)


def row_makers() -> None:
    width = 384 if DRY else 1_152
    both = normal(33, 2 * width + 128)
    x, gate, gain = both[:, :width], both[:, width : 2 * width], both[0, :width].contiguous()
    by_row.quantize_rows_triton(x)
    if not DRY:
        by_row.quantize_rows_triton(x, torch.float8_e4m3fn)
    by_row.split_rows_triton(x)
    by_row.rms_norm_quantize_rows_triton(x, gain, 1e-6)
    by_row.swiglu_quantize_triton(gate, x)
    by_row.gate_quantize_triton(x, gate)
    by_row.gate_quantize_triton(x, gate, (gain, 1e-6))
    grouped_activations_triton(x, (gain, 1e-6))
    rms_norm_triton(x, gain, 1e-6)
    swiglu_triton(gate, x)
    sigmoid_gate_triton(x, gate)
    gated_norm_triton(x, GatedNorm(weight=gain, gate=gate, eps=1e-6))


def scratches(bits: int) -> None:
    weight = folded(bits, N, 384 if DRY else 1_152)
    decode_int8_triton(weight, torch.empty(2 * N, weight.shape[1], dtype=torch.int8, device=DEVICE)[::2])
    decode_bf16_triton(weight, torch.empty(weight.shape, dtype=torch.bfloat16, device=DEVICE))
    if not DRY:
        decode_fp8_triton(weight, torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=DEVICE))


def launches_of(table: dict[int, object]) -> list[GemmLaunch]:
    """Those of this card, once each."""
    if DRY:
        return [GemmLaunch(16, 32, num_stages=2, programs=8), GemmLaunch(16, 32, num_stages=2, has_tma=True)]
    capability = torch.cuda.get_device_capability()
    found = [one for _, one in entry_of_card(table, capability[0] * 10 + capability[1])]  # type: ignore[arg-type]
    each = [launch for one in found for launch in ([one] if isinstance(one, GemmLaunch) else one)]
    return list(dict.fromkeys(each))


def int4_product(launch: GemmLaunch, is_int8: bool) -> None:
    weight, num_rows = folded(4), launch.rows + 3
    x = normal(num_rows, K)
    out = normal(num_rows, N + 24)[:, 8:-16]
    ready = by_row.quantize_rows_triton(x) if is_int8 else by_row.split_rows_triton(x)
    int4_gemm_triton(ready, weight, out, new_split_workspace(DEVICE), Residual(out, 0.5), launch)


def int8_product(launch: GemmLaunch, epilogue: str) -> None:
    num_rows = launch.rows + 3
    x = by_row.quantize_rows_triton(normal(num_rows, K))
    w = torch.randint(-127, 128, (N, K), device=DEVICE).to(torch.int8)
    scales = torch.rand(N, device=DEVICE)
    if epilogue == "swiglu":
        int8_swiglu_triton(x, w, scales, normal(num_rows, N // 2 + 16)[:, 8:-8], launch)
    else:
        out = normal(num_rows, N)
        int8_gemm_triton(x, w, scales, out, Residual(out, 0.5) if epilogue == "residual" else None, launch)


def gemm_cases() -> Iterator[tuple[str, Case]]:
    for is_int8, table in ((True, INT4_INT8_LAUNCH), (False, INT4_BF16_LAUNCH)):
        for launch in launches_of(table):
            shape = f"{launch.rows}x{launch.columns}x{launch.depth}w{launch.num_warps}s{launch.num_stages}"
            yield f"int4_gemm {'int8' if is_int8 else 'bf16'} {shape}", partial(int4_product, launch, is_int8)
    for launch in launches_of(INT8_LAUNCH):
        for epilogue in ("plain", "residual", "swiglu"):
            shape = f"{launch.rows}x{launch.columns}w{launch.num_warps}{'walks' if launch.walks else ''}"
            yield f"int8_gemm {epilogue} {shape}", partial(int8_product, launch, epilogue)


def cache_of(is_int8: bool, is_on_host: bool = False) -> tuple[CacheRows, torch.Tensor, torch.Tensor]:
    """A cache appended to in three ways, with keys and values of all its tokens."""
    k, v, room = normal(TOKENS, 2, DIM), normal(TOKENS, 2, DIM), TOKENS + 70
    dtype = torch.int8 if is_int8 else torch.bfloat16

    def rows_of(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        if is_on_host and not DRY:
            return page_locked_empty(shape, dtype)
        return torch.zeros(shape, dtype=dtype, device=DEVICE)

    codes = [rows_of((2, room, DIM), dtype) for _ in range(2)]
    scales = [rows_of((2, room), torch.bfloat16) if is_int8 else None for _ in range(2)]
    recent = normal(RECENT_TOKENS, 2, DIM) if is_int8 else None
    rows = CacheRows(*codes, *scales, normal(2, room // 16, DIM), normal(2, room // 64, DIM), recent)
    at = 0
    for num_tokens in (TOKENS - 17, 16, 1):
        step = slice(at, at + num_tokens)
        append_tokens_triton(rows, k[step], v[step], torch.tensor([at], device=DEVICE), GEOMETRY)
        at += num_tokens
    return rows, k, v


def sparse_step(is_int8: bool, num_rows: int) -> None:
    rows, _, _ = cache_of(is_int8)
    first = torch.tensor([TOKENS - num_rows], device=DEVICE)
    q, gate = normal(1, num_rows, HEADS, DIM), normal(num_rows, HEADS * DIM + 64)[:, 32:-32]
    k1, k2 = (x.transpose(0, 1)[None] for x in (rows.k1, rows.k2))
    for sparse_from in (0, 100 * 64):
        picks = block_topk_decode(q, k1, k2, first, GEOMETRY, DIM**-0.5, sparse_from)
        block_attention_decode(q, rows.key_values, picks, first, GEOMETRY.block_size, DIM**-0.5, gate)


def sparse_chunk(is_int8: bool) -> None:
    rows, k, _ = cache_of(is_int8)
    num_rows = 70
    q = normal(1, num_rows, HEADS, DIM)
    sizes = [(GEOMETRY.kernel_size, GEOMETRY.kernel_stride)]
    sizes.append((GEOMETRY.coarse_kernel_size, GEOMETRY.coarse_kernel_stride))
    k1, k2 = (pooled_keys(k[None], 0, num_pooled(TOKENS, *size), *size) for size in sizes)
    picks = block_topk_triton(q, k1, k2, TOKENS - num_rows, TOKENS, GEOMETRY, DIM**-0.5)
    held: KeyValues = rows.key_values.first(TOKENS)
    block_attention_triton(q, held, picks, TOKENS - num_rows, GEOMETRY.block_size, DIM**-0.5)


def sparse_on_host(is_int8: bool) -> None:
    """Keys and values in page-locked memory: written there, read there by a row, gathered for many rows."""
    rows, _, _ = cache_of(is_int8, is_on_host=True)
    num_rows = 70
    first = TOKENS - num_rows
    q, k1, k2 = normal(1, num_rows, HEADS, DIM), *(x.transpose(0, 1)[None] for x in (rows.k1, rows.k2))
    num_fine = num_pooled(TOKENS, GEOMETRY.kernel_size, GEOMETRY.kernel_stride)
    num_coarse = num_pooled(TOKENS, GEOMETRY.coarse_kernel_size, GEOMETRY.coarse_kernel_stride)
    picks = block_topk_triton(q, k1[:, :num_fine], k2[:, :num_coarse], first, TOKENS, GEOMETRY, DIM**-0.5)
    held: KeyValues = rows.key_values.first(TOKENS)

    def attend(part: torch.Tensor, copies: KeyValues, picked: torch.Tensor, position: int) -> torch.Tensor:
        return block_attention_triton(part, copies, picked, position, GEOMETRY.block_size, DIM**-0.5)

    host_block_attention(q, held, picks, first, GEOMETRY.block_size, attend)
    newest = torch.tensor([TOKENS - 1], device=DEVICE)
    block_attention_decode(q[:, -1:], held, picks[:, -1:], newest, GEOMETRY.block_size, DIM**-0.5)


def ring_of_picks() -> None:
    ring = new_pick_ring((37, 3, 2, 5), DEVICE)
    blocks = torch.randint(0, 99, (3, 4, 2, 7), device=DEVICE)
    keep_picks_triton(
        ring, StepPicks(blocks, torch.rand(blocks.shape, device=DEVICE)), torch.tensor([35], device=DEVICE)
    )


@cache
def engine(is_cache_int8: bool = False, is_kv_on_host: bool = False) -> Engine:
    """The built-in model in the dtype of the kernels."""
    model = load_model(Checkpoint.open(find_model("builtin")), DEVICE, torch.bfloat16, Placement("int8"))
    return Engine(model, EngineConfig(512, is_cache_int8, not is_kv_on_host, is_kv_on_host))


def read_and_answer(runner: Engine, num_tokens: int, params: SamplingParams, num_drawn: int, guesses: bool) -> None:
    """Read random tokens, draw so many of an answer, and go on from the state, which settles it."""
    ids = torch.randint(3, 8_000, (num_tokens,)).tolist()
    if guesses:
        ids = (ids[:60] * (num_tokens // 60 + 1))[:num_tokens]
    state = runner.new_state(num_tokens + 64)
    logits = runner.prefill(ids, state)
    answer = runner.generate(state, logits, params, guess_from=ids if guesses else ())
    drawn = list(answer) if num_drawn == params.max_tokens else [next(answer) for _ in range(num_drawn)]
    if len(drawn) != num_drawn or runner.prefill([5, 6, 7], state) is None:
        raise RuntimeError(f"{len(drawn)} tokens were drawn, not {num_drawn}")


def greedy(num_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=num_tokens, temperature=0.0, is_loop_guarded=False)


def answers(num_drawn: int) -> None:
    """Answers one after the other, of 21 tokens or given up before: a step that ran ahead is under way at their end."""
    for _ in range(5):
        read_and_answer(engine(), 300, greedy(21), num_drawn, guesses=False)


def graph_cases() -> Iterator[tuple[str, Case]]:
    """A step is run as it is, then captured, then replayed: so five tokens of an answer at least."""
    drawn = SamplingParams(max_tokens=9, temperature=0.9, top_p=0.9, top_k=40, seed=7, is_loop_guarded=False)
    deep = 700 if DRY else 4_500  # of these, rows choose blocks
    for num_drawn in (21, 11):
        yield f"answers {num_drawn}", partial(answers, num_drawn)
    for name, num_tokens, params, guesses in (
        ("dense", 77, greedy(9), False),
        ("sparse", deep, greedy(9), False),
        ("drawn", 77, drawn, False),
        ("guesses", deep, greedy(40), True),
    ):
        yield f"step {name}", lambda n=num_tokens, p=params, g=guesses: read_and_answer(engine(), n, p, p.max_tokens, g)
    yield "step int8 cache", lambda: read_and_answer(engine(is_cache_int8=True), deep, greedy(9), 9, False)
    if not DRY:  # a CPU has no memory but the host's
        yield "step host cache", lambda: read_and_answer(engine(True, True), deep, greedy(9), 9, False)


def turn(num_tokens: int) -> NormRope:
    weight = torch.ones(DIM, device=DEVICE).bfloat16()
    positions = torch.arange(num_tokens, device=DEVICE)
    return NormRope(q_weight=weight, k_weight=weight, eps=1e-6, positions=positions, theta=10_000.0)


def lightning_chunk(num_tokens: int, has_turn: bool) -> None:
    q, k, v = normal(1, num_tokens, 3, HEADS, DIM).unbind(2)
    state = torch.randn(1, HEADS, DIM, DIM, device=DEVICE)
    slopes = lightning_slopes(HEADS).to(DEVICE)
    given = Recurrence(slopes, DIM**-0.5, state, turn(num_tokens) if has_turn else None)
    lightning_prefill_triton(q, k, v, given, (1, num_tokens // 2))
    if has_turn:
        qk_norm_rope_triton(q, k, turn(num_tokens))


def lightning_step(num_tokens: int) -> None:
    rows = normal(num_tokens, 4 * HEADS * DIM)
    q, k, v, z = rows.chunk(4, dim=1)
    q, k, v = (x.unflatten(1, (HEADS, DIM))[None] for x in (q, k, v))
    state = torch.randn(1, HEADS, DIM, DIM, device=DEVICE)
    decays = lightning_decays(lightning_slopes(HEADS)).to(DEVICE)
    kept = normal(2, 2, MAX_STEPS, HEADS, DIM)
    count, parity = (torch.ones(1, dtype=torch.int32, device=DEVICE) for _ in range(2))
    pending = PendingTokens(kept[0], kept[1], count, parity)
    heads = Heads(q, k, v, decays, DIM**-0.5, turn(1))
    gated = GatedNorm(weight=torch.ones(HEADS * DIM, device=DEVICE).bfloat16(), gate=z, eps=1e-6)
    speculative_step_triton(heads, state, pending, gated, torch.zeros(MAX_STEPS, dtype=torch.int32, device=DEVICE))
    commit_pending_triton(state, pending, decays)


def tokens() -> None:
    table, ids = normal(300, K), torch.randint(300, (17,), device=DEVICE)
    embed_triton(table, ids, 12.0)
    if not DRY:
        embed_triton(table.cpu().pin_memory(), ids, 12.0)
    logits = torch.randn(2, 5_003, device=DEVICE)
    sampling = new_sampling_tensors(DEVICE, 8, 2)
    greedy_tokens_triton(logits, sampling)
    sampling.temperature.fill_(0.8)
    draw_tokens_triton(logits, sampling)
    sampling.top_k.fill_(40)
    sampling.top_p.fill_(0.9)
    sample_tokens_triton(logits, sampling)


def quantizer() -> None:
    size = 16 if DRY else 128
    column_walk_triton(*(torch.rand(n, size, device=DEVICE) + 0.1 for n in (33, size, 33)), 4)
    read_sums_triton(torch.ones(3 * PIECE, dtype=torch.int32, device=DEVICE))


def cases() -> list[tuple[str, Case]]:
    if GRAPHS:
        return list(graph_cases())
    return [
        ("ring of picks", ring_of_picks),
        *((f"sparse on host {is_int8}", partial(sparse_on_host, is_int8)) for is_int8 in (False, True)),
        ("rows", row_makers),
        ("vocabulary", vocabulary),
        ("tokens", tokens),
        ("quantizer", quantizer),
        *((f"scratch {bits} bits", partial(scratches, bits)) for bits in (4, 8)),
        *((f"lightning chunk {n} {has}", partial(lightning_chunk, n, has)) for n, has in ((300, True), (17, False))),
        *((f"lightning step {n}", partial(lightning_step, n)) for n in (1, 16)),
        *(
            (f"sparse step {n} {is_int8}", partial(sparse_step, is_int8, n))
            for n in (1, 9)
            for is_int8 in (False, True)
        ),
        *((f"sparse chunk {is_int8}", partial(sparse_chunk, is_int8)) for is_int8 in (False, True)),
        *gemv_cases(),
        *gemm_cases(),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--compile", action="store_true", help="only fill the cache of kernels, by all cores")
    parser.add_argument("--tool", choices=("memcheck", "racecheck"), help="compile, then run all under this tool")
    parser.add_argument("--out", default="sanitizer", help="a folder for what the tool writes")
    parser.add_argument("--graphs", action="store_true", help="whole answers of the built-in model, captured steps")
    parser.add_argument("--part", default="0/1", help="INDEX/COUNT: every COUNT-th case from INDEX on")
    parser.add_argument("--only", default="", help="cases that hold one of these words, by commas")
    parser.add_argument("--skip-largest", action="store_true", help="GEMM tiles of 256 rows, slow under racecheck")
    parser.add_argument("--seconds", type=float, default=50, help="cases that begin later are left out and named")
    parser.add_argument("--dry", action="store_true", help="tiny shapes in the interpreter: checks this script")
    arguments = parser.parse_args()
    flags = ["--only", arguments.only, *["--dry"] * DRY]
    if arguments.skip_largest or arguments.tool == "racecheck":
        flags.append("--skip-largest")
    script = Script(Path(__file__), tuple(flags), arguments.seconds)
    if arguments.compile:
        sys.exit(compile_all(script))
    if arguments.tool:
        sys.exit(check_by(arguments.tool, script, Path(arguments.out)))
    torch.manual_seed(1)
    index, count = map(int, arguments.part.split("/"))
    began, left_out, failed = time.monotonic(), [], []
    for name, case in cases()[index::count]:
        if arguments.skip_largest and "256x" in name:
            continue
        if arguments.only and not any(part in name for part in arguments.only.split(",")):
            continue
        if time.monotonic() - began > arguments.seconds:
            left_out.append(name)
            continue
        started = time.monotonic()
        try:
            with torch.no_grad():
                case()
            if not DRY:
                torch.cuda.synchronize()
        except Exception as error:  # told, and the rest runs
            failed.append(name)
            print(f"FAILED {name}: {type(error).__name__} {str(error)[:200]}", flush=True)
        print(f"{name}: {time.monotonic() - started:.2f} s", flush=True)
    print(f"done in {time.monotonic() - began:.0f} s; failed {failed}; not reached {left_out}", flush=True)
    sys.exit(1 if failed else 3 if left_out else 0)


if __name__ == "__main__":
    main()
