"""InfLLM-V2 on a GPU: block choice and attention of one layer, of a step and of 8,192 queries on a long cache.

    python benchmarks/sparse_attention.py --out FILE [--tokens [262144 ...]] [--decode-tokens 262144 65536:1048576 ...]
        [--search] [--search-choice] [--seconds N]

Correctness comes first: the choice against the reference in float64 on some rows (overlap of picked blocks), the
attention against float64. Then times with a cold cache beside torch's dense attention. Two kinds of queries: alike
neighbours (each is the one before, somewhat changed), and independent ones, which share nothing but the local blocks.
A step is also measured where there is room for more tokens than there are: 65536:1048576 is 64K in a room for 1M.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import math
import multiprocessing
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.sparse_layer import DIM, GEOMETRY, GROUPS, HEADS, SCALE, Layer, draw, overlap_of
from benchmarks.timing import ColdTimer
from salalocal.kernels import block_attention as attention_room
from salalocal.kernels import block_topk as choice_room
from salalocal.kernels.backend import entry_of_card, triton
from salalocal.kernels.block_attention import decode as attention_decode
from salalocal.kernels.block_attention import prefill as attention
from salalocal.kernels.block_topk import PickRecord
from salalocal.kernels.block_topk import decode as choice_decode
from salalocal.kernels.block_topk import decode_choice as choice_search
from salalocal.kernels.block_topk import prefill as choice
from salalocal.kernels.kv_cache import RECENT_TOKENS, CacheRows, KeyValues, append_tokens

DECODE_TOKENS = ["4096", "32768", "131072", "262144", "1048576", "2097152", "65536:1048576"]
CHOICES = [
    choice.PrefillLaunch(*setting)
    for setting in [
        (128, 128, 4, 8, 2, 256, 2, 1, True, 128),
        (128, 128, 2, 8, 2, 256, 2, 1, True, 128),
        (128, 128, 4, 8, 3, 256, 1, 1, True, 255),
        (128, 64, 8, 4, 2, 256, 3, 1, True, 168),
    ]
]
ATTENTIONS = [attention.PrefillLaunch(*setting) for setting in [(4, 4, 3), (8, 8, 2, 128), (4, 4, 2), (8, 4, 2, 255)]]
DECODE_CHOICES = [choice_decode.DecodeLaunch(*setting) for setting in [(128, 2, 4, 2), (128, 1, 8, 2), (128, 2, 8, 2)]]
DECODE_ATTENTIONS = [attention_decode.DecodeLaunch(*setting) for setting in [(256, 96, 8), (96, 96, 8), (512, 96, 4)]]
# by the blocks of whole searches, of a part, and by the scores of a thread
DECODE_SEARCHES = [
    choice_search.ChoiceLaunch(*setting)
    for setting in [
        (4096, 1024, 16),
        (4096, 1024, 32),
        (4096, 1024, 8),
        (4096, 512, 16),
        (4096, 2048, 16),
        (2048, 512, 16),
        (1024, 512, 16),
    ]
]


def check(layer: Layer) -> dict[str, float]:
    """Overlap of the choice with float64's, and the error of the attention over torch's own in the same dtype."""
    rows = slice(max(0, layer.q.shape[1] // 2 - 3), layer.q.shape[1] // 2 + 10)
    first = layer.first + rows.start
    q = layer.q[:, rows].double()
    exact = choice_room.block_topk_reference(
        q, layer.k1.double(), layer.k2.double(), first, layer.num_tokens, GEOMETRY, SCALE
    )
    overlap = overlap_of(layer.choose(rows), exact)
    few = (layer.q[:, rows], layer.k, layer.v, exact, first, GEOMETRY.block_size, SCALE)
    wide = attention_room.block_attention_reference(q, *(x.double() for x in (layer.k, layer.v)), *few[3:])
    errors = [
        float((found.double() - wide).norm() / wide.norm())
        for found in (
            attention.block_attention_triton(few[0], layer.cached, *few[3:]),
            attention_room.block_attention_reference(*few),
        )
    ]
    assert overlap > 0.999, f"overlap of picked blocks {overlap:.5f}"
    assert errors[0] < 2 * errors[1] + 1e-4, f"attention errs {errors}"
    return {"choice_overlap": overlap, "attention_error": errors[0], "torch_error": errors[1]}


def dense(layer: Layer, backend: SDPBackend) -> torch.Tensor:
    q, k, v = (x.transpose(1, 2) for x in (layer.q, layer.k, layer.v))
    from torch.nn.attention.bias import causal_lower_right

    with sdpa_kernel(backend):
        if backend == SDPBackend.CUDNN_ATTENTION:  # knows no mask for rows at the end of longer keys: all keys are seen
            return scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return scaled_dot_product_attention(
            q, k, v, attn_mask=causal_lower_right(q.shape[2], k.shape[2]), enable_gqa=True
        )


def search(layer: Layer, picks: torch.Tensor, timer: ColdTimer, deadline: float) -> dict[str, dict[str, float]]:
    """Times of every candidate setting; those that fail say so."""
    found: dict[str, dict[str, float]] = {}
    position = torch.tensor([layer.num_tokens - 1], device="cuda")
    q = layer.q[:, -1:].contiguous()
    last = layer.choose(slice(layer.q.shape[1] - 1, None))

    def choose_one() -> torch.Tensor:
        return choice_decode.block_topk_decode(q, layer.k1, layer.k2, position, GEOMETRY, SCALE)

    def attend_one() -> torch.Tensor:
        return attention_decode.block_attention_decode(q, layer.cached, last, position, GEOMETRY.block_size, SCALE)

    codes = layer.in_8_bits()

    def attend_codes() -> torch.Tensor:
        return attention.block_attention_triton(layer.q, codes, picks, layer.first, GEOMETRY.block_size, SCALE)

    for name, room, launches, call in (
        ("choice", choice, CHOICES, layer.choose),
        ("attention", attention, ATTENTIONS, lambda: layer.attend(picks)),
        ("attention of int8", attention, ATTENTIONS[:2], attend_codes),
        ("decode choice", choice_decode, DECODE_CHOICES, choose_one),
        ("decode attention", attention_decode, DECODE_ATTENTIONS, attend_one),
    ):
        found[name] = {}
        committed = dict(room.LAUNCH)
        for launch in launches:
            if time.monotonic() > deadline:
                break
            room.LAUNCH.update(dict.fromkeys(committed, launch))
            try:
                timing = timer.time_graph([call], repeats=20) if "decode" in name else timer.time(call, runs=5)
                found[name][str(dataclasses.astuple(launch))] = timing.median_us
            except Exception as error:
                print(f"{name} {launch}: {type(error).__name__} {str(error)[:100]}", flush=True)
        room.LAUNCH.update(committed)
        for us, setting in sorted((us, setting) for setting, us in found[name].items()):
            print(f"  {name} {setting}: {us:,.1f} us", flush=True)
    return found


def compile_share(share: int, num_shares: int) -> None:
    """Compile every num_shares-th candidate into the cache on disk, by running it on a short sequence."""
    layer = draw(32_768, 64, is_alike=False, seed=0)
    picks = layer.choose()
    position = torch.tensor([layer.num_tokens - 1], device="cuda")
    q = layer.q[:, -1:].contiguous()
    calls = {
        choice: layer.choose,
        attention: lambda: layer.attend(picks),
        choice_decode: lambda: choice_decode.block_topk_decode(q, layer.k1, layer.k2, position, GEOMETRY, SCALE),
        attention_decode: lambda: attention_decode.block_attention_decode(
            q, layer.cached, picks[:, -1:], position, GEOMETRY.block_size, SCALE
        ),
    }
    lists = ((choice, CHOICES), (attention, ATTENTIONS), (choice_decode, DECODE_CHOICES))
    jobs = [(room, launch) for room, launches in (*lists, (attention_decode, DECODE_ATTENTIONS)) for launch in launches]
    for room, launch in jobs[share::num_shares]:
        room.LAUNCH.update(dict.fromkeys(room.LAUNCH, launch))
        try:
            calls[room]()
        except Exception as error:
            print(f"{launch}: {type(error).__name__} {str(error)[:100]}", flush=True)
    torch.cuda.synchronize()


def compile_all(num_shares: int = 11) -> None:
    """All candidates, side by side."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=compile_share, args=(share, num_shares)) for share in range(num_shares)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()


@dataclasses.dataclass
class Step:
    """The last rows of a layer as a step takes them: their position is known to the device alone."""

    layer: Layer
    num_rows: int

    def __post_init__(self) -> None:
        self.first = self.layer.num_tokens - self.num_rows
        self.position = torch.tensor([self.first], device="cuda")
        self.q = self.layer.q[:, -self.num_rows :].contiguous()

    def choose(self, room: Layer, record: PickRecord | None = None) -> torch.Tensor:
        return choice_decode.block_topk_decode(self.q, room.k1, room.k2, self.position, GEOMETRY, SCALE, record=record)

    def attend(self, cached: KeyValues, blocks: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        return attention_decode.block_attention_decode(
            self.q, cached, blocks, self.position, GEOMETRY.block_size, SCALE, gate
        )

    def exact_picks(self) -> torch.Tensor:
        """By float64."""
        k1, k2 = self.layer.k1.double(), self.layer.k2.double()
        num_tokens = self.layer.num_tokens
        return choice_room.block_topk_reference(self.q.double(), k1, k2, self.first, num_tokens, GEOMETRY, SCALE)

    def new_record(self) -> PickRecord:
        shape = (1, self.num_rows, GROUPS, GEOMETRY.budget)
        return PickRecord(
            torch.empty(shape, dtype=torch.int64, device="cuda"), torch.empty(shape, dtype=torch.float32, device="cuda")
        )


def rooms_of(layer: Layer, capacity: int) -> list[Layer]:
    """Copies that together do not fit the cache, with room for so many tokens."""
    bytes_read = layer.k1.nbytes + layer.k2.nbytes + 12 * 2**20
    copies = [layer] + [
        dataclasses.replace(layer, **{name: getattr(layer, name).clone() for name in ("k", "v", "k1", "k2")})
        for _ in range(min(7, 3 * 2**26 // bytes_read))
    ]
    return [one.with_room(capacity) for one in copies] if capacity > layer.num_tokens else copies


def decode(layer: Layer, capacity: int, num_rows: int, timer: ColdTimer) -> dict[str, object]:
    """Microseconds of choice and attention of the last rows, in a graph over copies that do not fit the cache."""
    copies = rooms_of(layer, capacity)
    step = Step(layer, num_rows)
    gate = layer.q[0, :num_rows].flatten(1).contiguous()
    exact = step.exact_picks()
    overlap = overlap_of(step.choose(copies[0]), exact)
    assert overlap > 0.99, f"decode picks overlap {overlap}"
    row: dict[str, object] = {"overlap": overlap, "launches": num_launches(lambda: step.choose(copies[0]))}
    codes = layer.in_8_bits()
    for name, cached in (("error", layer.cached), ("int8_error", codes)):
        wide = cached.first(layer.num_tokens).widened(torch.float64)
        plain = attention_room.block_attention_reference(
            step.q.double(), wide.keys.double(), wide.values.double(), exact, step.first, GEOMETRY.block_size, SCALE
        )
        row[name] = error = float((step.attend(cached, exact).double() - plain).norm() / plain.norm())
        assert error < 5e-3, f"decode attention: {name} {error}"
    record = step.new_record()
    calls = {
        "choice_us": [lambda one=one: step.choose(one) for one in copies],
        "weighed_choice_us": [lambda one=one: step.choose(one, record) for one in copies],
        "attention_us": [lambda one=one: step.attend(one.cached, exact) for one in copies],
        "int8_attention_us": [lambda: step.attend(codes, exact)],
        "both_us": [lambda one=one: step.attend(one.cached, step.choose(one), gate) for one in copies],
    }
    return row | {name: timer.time_graph(each, repeats=4).median_us for name, each in calls.items()}


def search_choice(layer: Layer, capacity: int, timer: ColdTimer, deadline: float) -> dict[str, float]:
    """Microseconds of one row's choice, with weights, by every candidate for the search; all pick the same."""
    copies, step = rooms_of(layer, capacity), Step(layer, 1)
    record = step.new_record()
    expected = step.choose(copies[0]).clone()
    found: dict[str, float] = {}
    committed, launched = dict(choice_search.LAUNCH), set()
    for launch in DECODE_SEARCHES:
        num_blocks = capacity // GEOMETRY.block_size - GEOMETRY.local_blocks
        room = launch.room(num_blocks)
        key = (room, launch.thread_scores, room > launch.whole_blocks and launch.part_blocks)
        if key in launched or time.monotonic() > deadline:
            continue
        launched.add(key)
        choice_search.LAUNCH.update(dict.fromkeys(committed, launch))
        try:
            assert torch.equal(step.choose(copies[0], record), expected), f"{launch} picks others"
            calls = [lambda one=one: step.choose(one, record) for one in copies]
            found[str(dataclasses.astuple(launch))] = timer.time_graph(calls, repeats=4).median_us
        finally:
            choice_search.LAUNCH.update(committed)
    return found


def num_launches(call: Callable[[], object]) -> int:
    """Kernels that a call launches."""
    run = triton.JITFunction.run
    with mock.patch.object(triton.JITFunction, "run", autospec=True, side_effect=run) as counted:
        call()
    return counted.call_count


def append_times(layer: Layer, timer: ColdTimer) -> dict[str, float]:
    """Microseconds to append a chunk and a token to a cache of 16 and of 8 bits."""
    times = {}
    capacity = layer.q.shape[1] + 256
    for name, dtype in (("bf16", torch.bfloat16), ("int8", torch.int8)):
        codes = [torch.zeros(GROUPS, capacity, DIM, dtype=dtype, device="cuda") for _ in range(2)]
        pooled = [torch.zeros(GROUPS, capacity // 16, DIM, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
        scales = [torch.zeros(GROUPS, capacity, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
        recent = torch.zeros(RECENT_TOKENS, GROUPS, DIM, dtype=torch.bfloat16, device="cuda")
        rows = CacheRows(
            *codes, *(scales if name == "int8" else (None, None)), *pooled, recent if name == "int8" else None
        )
        for num_tokens in (1, 16, layer.q.shape[1]):
            k, v = layer.k[0, :num_tokens], layer.v[0, :num_tokens]
            position = torch.tensor([127], device="cuda")  # a token there ends a window of either kind
            times[f"{name}_{num_tokens}_us"] = timer.time_graph(
                [lambda rows=rows, k=k, v=v, at=position: append_tokens(rows, k, v, at, GEOMETRY)], repeats=8
            ).median_us
    return times


def unfused(layer: Layer) -> torch.Tensor:
    """The choice of a plain torch pipeline with a score matrix: bf16 products, fp32 softmax, 1,024 rows at a time."""
    picks = []
    k1, k2 = (x[0].transpose(0, 1).repeat_interleave(HEADS // GROUPS, 0) for x in (layer.k1, layer.k2))
    for start in range(0, layer.q.shape[1], 1024):
        q = layer.q[0, start : start + 1024].transpose(0, 1)  # [H, T, D]
        own = (layer.first + start + torch.arange(q.shape[1], device="cuda")) // GEOMETRY.block_size
        coarse = ((q @ k2.transpose(1, 2)).float() * SCALE).logsumexp(-1, keepdim=True)
        scores = ((q @ k1.transpose(1, 2)).float() * SCALE - coarse).exp().unflatten(0, (GROUPS, -1)).sum(1)
        pooled = torch.nn.functional.max_pool1d(scores, 5, 4, padding=1)
        block = torch.arange(pooled.shape[-1], device="cuda")
        is_forced = (block < 1) | ((block >= own[:, None] - 32) & (block <= own[:, None]))
        pooled = pooled.masked_fill(is_forced, math.inf).masked_fill(block > own[:, None], -math.inf)
        picks.append(pooled.topk(GEOMETRY.budget).indices.transpose(0, 1))
    return torch.cat(picks)[None]


def measure(
    num_tokens: int, is_alike: bool, arguments: argparse.Namespace, timer: ColdTimer, deadline: float
) -> dict[str, object]:
    """Prefill of one layer at one length: checks, then times, memory and peers."""
    layer = draw(num_tokens, min(arguments.queries, num_tokens // 2), is_alike, arguments.seed)
    row: dict[str, object] = {**check(layer)}
    if arguments.search and is_alike and num_tokens == max(arguments.tokens):
        row["search"] = search(layer, layer.choose(), timer, deadline)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    picks = layer.choose()
    row["choice_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    _, counts = attention.merge_blocks(picks, entry_of_card(attention.LAUNCH, 90).rows)
    row["blocks_per_union"] = float(counts.float().mean())
    row["choice_us"] = timer.time(layer.choose).median_us
    row["attention_us"] = attention_us = timer.time(lambda: layer.attend(picks)).median_us
    row["both_us"] = timer.time(lambda: layer.attend(layer.choose())).median_us
    flops = 4 * layer.q.shape[1] * HEADS * DIM * GEOMETRY.budget * GEOMETRY.block_size
    row["attention_tflops"] = flops / attention_us / 1e6
    row["merge_us"] = timer.time(lambda: attention.merge_blocks(picks, 4)).median_us
    codes = layer.in_8_bits()
    row["int8_attention_us"] = timer.time(
        lambda: attention.block_attention_triton(layer.q, codes, picks, layer.first, GEOMETRY.block_size, SCALE)
    ).median_us
    if is_alike:
        row["append"] = append_times(layer, timer)
        peers = {"dense_cudnn": SDPBackend.CUDNN_ATTENTION, "dense_flash": SDPBackend.FLASH_ATTENTION}
        calls = {name: lambda backend=backend: dense(layer, backend) for name, backend in peers.items()}
        for name, call in {**calls, "unfused_choice": lambda: unfused(layer)}.items():
            try:
                row[f"{name}_us"] = timer.time(call, runs=3).median_us
            except RuntimeError as error:
                print(f"{name}: {str(error)[:120]}", flush=True)
    return row


def decodes(
    arguments: argparse.Namespace, timer: ColdTimer, deadline: float
) -> Iterator[tuple[dict[str, object], Callable[[], dict[str, object]]]]:
    """What is to be measured of steps: name and call."""
    for sizes in arguments.decode_tokens:
        num_tokens, _, room = sizes.partition(":")
        num_tokens, capacity = int(num_tokens), int(room or num_tokens)

        def measured(num_tokens: int = num_tokens, capacity: int = capacity) -> dict[str, object]:
            layer = draw(num_tokens, 64, is_alike=False, seed=arguments.seed)
            row: dict[str, object] = {"decode": {n: decode(layer, capacity, n, timer) for n in (1, 4, 16)}}
            if arguments.search_choice:
                row["search_choice"] = search_choice(layer, capacity, timer, deadline)
            return row

        yield {"num_tokens": num_tokens, "capacity": capacity}, measured


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tokens", type=int, nargs="*", default=[32768, 131072, 262144], help="keys of a prefill")
    parser.add_argument("--decode-tokens", nargs="*", default=DECODE_TOKENS, help="keys of a step, or KEYS:ROOM")
    parser.add_argument("--queries", type=int, default=8192, help="rows of a prefill")
    parser.add_argument("--search", action="store_true", help="also time other launches, at the most keys")
    parser.add_argument("--search-choice", action="store_true", help="also time other searches of a step's scores")
    parser.add_argument(
        "--seconds", type=float, default=300, help="time for everything; what does not fit is left out and said"
    )
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    deadline = time.monotonic() + arguments.seconds
    if arguments.search:
        compile_all()
        print(f"compiled, {deadline - time.monotonic():.0f} s left", flush=True)
    timer = ColdTimer()
    results: list[dict[str, object]] = []

    def take(about: dict[str, object], measured: Callable[[], dict[str, object]]) -> None:
        """Keep a result, or why there is none, on disk at once: what comes after it is measured all the same."""
        if time.monotonic() > deadline:
            print(f"no time for {about}", flush=True)
            return
        try:
            results.append(about | measured())
        except Exception as error:  # whatever went wrong is the result
            traceback.print_exc()
            results.append(about | {"failed": f"{type(error).__name__}: {error}"[:300]})
            torch.cuda.empty_cache()
        print({name: value for name, value in results[-1].items() if name != "search"}, flush=True)
        if arguments.out:
            save(arguments.out, arguments.seed, results)

    for about, measured in decodes(arguments, timer, deadline):
        take(about, measured)
    for num_tokens, is_alike in itertools.product(arguments.tokens, (True, False)):
        take(
            {"num_tokens": num_tokens, "alike": is_alike},
            functools.partial(measure, num_tokens, is_alike, arguments, timer, deadline),
        )
    sys.exit(any("failed" in result for result in results))


def save(out: Path, seed: int, results: list[dict[str, object]]) -> None:
    """All results so far, as JSON."""
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    document = {"device": torch.cuda.get_device_name(), "versions": versions, "seed": seed, "results": results}
    out.write_text(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
