"""Products of packed weights with 1 to 16 rows on a GPU: launches searched, checked and timed, alone and in a chain.

    PYTHONPATH=. python3 benchmarks/int4_gemv.py --out out.json [--seconds 420] [--only search,chain,vocabulary]
    PYTHONPATH=. DISABLE_MMA_V3=1 python3 benchmarks/int4_gemv.py --out out.json --only search   # RTX instructions
    PYTHONPATH=.:tests python3 benchmarks/int4_gemv.py --out out.json --dry                      # no GPU: this script

A case is one CUDA graph over copies of the weights that are together larger than the L2 cache; times are medians of
replays, in microseconds a call, with the spread over replays. A launch that is wrong is not timed. Times include what a
dependent launch hides, since the step of a model hides it too; `alone_us` is without it.
"""

import argparse
import math
import multiprocessing
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

DRY = "--dry" in sys.argv
if DRY:
    os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

if DRY:
    import interp_compat  # noqa: F401

from benchmarks.budget_report import Report  # noqa: E402
from benchmarks.int4_gemv_cases import LAYERS, SPARSE_LAYERS, VOCABULARY, Layer, candidates, chosen_cases  # noqa: E402
from salalocal.kernels import backend  # noqa: E402
from salalocal.kernels.backend import tl, triton  # noqa: E402
from salalocal.kernels.int4.activations_by_group import (  # noqa: E402
    GroupedActivations,
    RawActivations,
    float_activations,
    quantize_groups_reference,
    rms_norm_quantize_groups,
)
from salalocal.kernels.int4.gemv import (  # noqa: E402
    PLAIN,
    SWIGLU,
    Epilogue,
    Scratch,
    int4_gemv_definition,
    int4_gemv_triton,
)
from salalocal.kernels.int4.gemv.gated import gated_groups_triton  # noqa: E402
from salalocal.kernels.int4.gemv.launch import Launch, StreamLaunch, WordLaunch  # noqa: E402
from salalocal.kernels.int4.gemv.operation import launch_of  # noqa: E402
from salalocal.kernels.int4.vocabulary import likeliest_tokens_triton  # noqa: E402
from salalocal.kernels.sampling import greedy_tokens, new_sampling_tensors  # noqa: E402
from salalocal.kernels.top_k import top_k_reference, top_k_triton  # noqa: E402

DEVICE = torch.device("cpu" if DRY else "cuda")
L2_BYTES = 1 << 16 if DRY else 256 << 20
LARGEST_ERROR = 4e-3  # one rounding to bf16 is 1.7e-3; a norm that sums in another order moves a few codes


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """Packed weights without act-order."""

    words: Tensor
    scales: Tensor
    bits: int
    group_size: int
    group_index: Tensor | None = None


HIDDEN, NUM_LAYERS = (128, 2) if DRY else (4096, 32)
SECONDS_AFTER_SEARCH = 0 if DRY else 35
ALONE = ("gate_up", "down", "qkv")  # also timed without dependent launches, at M = 1


def random_weight(N: int, K: int, bits: int, seed: int) -> PackedWeight:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    words = torch.randint(-(2**31), 2**31, (N, K * bits // 32), generator=generator, device=DEVICE).to(torch.int32)
    scales = (torch.rand(N, K // 128, generator=generator, device=DEVICE) + 0.5) * (0.02 / 2 ** (bits - 2))
    return PackedWeight(words, scales.bfloat16(), bits, 128)


def random_rows(M: int, K: int, seed: int) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(M, K, generator=generator, device=DEVICE).bfloat16()


def activations(x: Tensor, math_kind: str, layer: Layer) -> GroupedActivations | RawActivations:
    if math_kind == "raw":
        return RawActivations(x, None if layer.kind == "residual" else (torch.ones_like(x[0]), 1e-6))
    return float_activations(x) if math_kind == "float" else quantize_groups_reference(x)


def epilogue_of(layer: Layer, num_tokens: int) -> Epilogue:
    if layer.kind == "swiglu":
        return SWIGLU
    if layer.kind == "residual":
        return Epilogue("residual", 1.4 / math.sqrt(32), random_rows(num_tokens, layer.N, 77))
    return PLAIN


def relative_error(value: Tensor, exact: Tensor) -> float:
    return float((value.double() - exact).norm() / exact.norm())


def poison(num_tokens: int, layer: Layer) -> None:
    """Leave NaN where the allocator will put the next output."""
    num_out = layer.N // 2 if layer.kind == "swiglu" else layer.N
    torch.full((num_tokens, num_out), math.nan, dtype=torch.bfloat16, device=DEVICE)


def graph_times(calls: list[Callable[[], Any]], budget_s: float = 0.05) -> tuple[float, float]:
    """Median and spread of one call, in microseconds, all of them back to back in one CUDA graph."""
    if DRY:
        start = time.perf_counter()
        calls[0]()
        return (time.perf_counter() - start) * 1e6, 0.0
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.synchronize()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for call in calls:
        call()
    end.record()
    torch.cuda.synchronize()
    once = max(begin.elapsed_time(end) * 1e-3, 5e-6)
    repeats = max(1, min(32, int(2e-3 / once)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            for call in calls:
                call()
    for _ in range(2):
        graph.replay()
    times = []
    for _ in range(max(5, min(40, int(budget_s / (once * repeats))))):
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / (repeats * len(calls)))
    return statistics.median(times), max(times) - min(times)


@triton.jit
def _read_kernel(source_ptr, out_ptr, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    base = tl.program_id(0).to(tl.int64) * (BLOCK * STEPS)
    folded = tl.zeros([BLOCK], tl.int32)
    for step in tl.static_range(STEPS):
        folded ^= tl.load(source_ptr + base + step * BLOCK + tl.arange(0, BLOCK))
    tl.store(out_ptr + tl.program_id(0), tl.xor_sum(folded))


def measure_ceilings(report: Report) -> None:
    num_words = 1 << (14 if DRY else 28)
    source = torch.randint(-(2**31), 2**31 - 1, (num_words,), dtype=torch.int32, device=DEVICE)
    target, folded = torch.empty_like(source), torch.empty(num_words // 16384, dtype=torch.int32, device=DEVICE)
    copy_us, _ = graph_times([lambda: target.copy_(source)], 0.1)
    launch = _read_kernel[(num_words // 16384,)]
    read_us, _ = graph_times([lambda: launch(source, folded, BLOCK=4096, STEPS=4, num_warps=8)], 0.1)
    report.meta |= {"copy_gb_s": num_words * 8e-3 / copy_us, "read_gb_s": num_words * 4e-3 / read_us}
    print(f"copy {report.meta['copy_gb_s']:.0f} GB/s, read {report.meta['read_gb_s']:.0f} GB/s", flush=True)


def warm(share: tuple[int, int, str]) -> int:
    """Compile a share of all candidates into Triton's cache, on small matrices of the same width."""
    index, count, names = share
    jobs = [(layer, kind, tokens, launch) for layer, kind, tokens in chosen_cases(names)
            for launch in candidates(layer, kind, tokens)]  # fmt: skip
    seen: set[Any] = set()
    done = 0
    for layer, kind, tokens, launch in jobs:
        bucket = tokens if isinstance(launch, WordLaunch) else max(tokens, 8)
        identity = (layer.K, layer.kind, kind, bucket, launch)
        if identity in seen:
            continue
        seen.add(identity)
        if len(seen) % count != index:
            continue
        small = Layer(layer.name, 256, layer.K, layer.kind)
        x = activations(random_rows(tokens, layer.K, 1), kind, layer)
        try:
            int4_gemv_triton(x, random_weight(256, layer.K, 4, 1), epilogue_of(small, tokens), launch=launch)
            done += 1
        except Exception as error:  # told again, and for good, where the case is measured
            print(f"warm {layer.name} {kind} {tokens} {launch}: {type(error).__name__} {str(error)[:120]}", flush=True)
    torch.cuda.synchronize()
    return done


def warm_all(report: Report, names: str) -> None:
    start, count = time.time(), min(12, (os.cpu_count() or 2))
    with multiprocessing.get_context("spawn").Pool(count) as pool:
        compiling = pool.map_async(warm, [(index, count, names) for index in range(count)], chunksize=1)
        try:
            done = str(sum(compiling.get(timeout=report.left() / 2)))
        except multiprocessing.TimeoutError:
            done = "not all"  # what is left compiles where it is measured
    report.meta["compile_s"] = time.time() - start
    print(f"compiled {done} launches in {report.meta['compile_s']:.0f} s", flush=True)


def copies_of(layer: Layer, bits: int = 4) -> list[PackedWeight]:
    size = layer.N * layer.K * bits // 8
    count = max(2, math.ceil(L2_BYTES / size))
    return [random_weight(layer.N, layer.K, bits, seed) for seed in range(count)]


def weight_bytes(layer: Layer, bits: int = 4) -> int:
    return layer.N * layer.K * bits // 8 + layer.N * layer.K // 128 * 2


def rate(report: Report, layer: Layer, us: float, bits: int = 4) -> dict[str, float]:
    gb_s = weight_bytes(layer, bits) / us * 1e-3
    return {"gb_s": gb_s, "of_read": gb_s / report.meta["read_gb_s"]}


def search(report: Report, names: str) -> dict[str, dict[tuple[int, int], Launch]]:
    """The fastest launch of every case; returned are those of one token, by what the activations are, by shape."""
    best: dict[tuple[str, int, str], tuple[float, Launch]] = {}
    scratch = Scratch.make(DEVICE)
    weights = {layer.name: copies_of(layer) for layer in LAYERS}
    for layer, math_kind, num_tokens in chosen_cases(names):
        if report.left() < SECONDS_AFTER_SEARCH:
            report.add("search", layer=layer.name, left_out=f"{math_kind} M={num_tokens}: no time left")
            continue
        times = search_case(report, layer, weights[layer.name], math_kind, num_tokens, scratch)
        for us, _, launch in times[:1]:
            best[math_kind, num_tokens, layer.name] = (us, launch)
        report.save()
    print_launches(best)
    shapes = {layer.name: (layer.N, layer.K) for layer in LAYERS}
    return {wanted: {shapes[name]: launch for (kind, tokens, name), (_, launch) in best.items()
                     if (kind, tokens) == (wanted, 1)} for wanted in ("int8", "raw")}  # fmt: skip


def search_case(
    report: Report, layer: Layer, weights: list[PackedWeight], math_kind: str, num_tokens: int, scratch: Scratch
) -> list[tuple[float, float, Launch]]:
    """Every candidate, the wrong ones left out, fastest first."""
    epilogue = epilogue_of(layer, num_tokens)
    x = activations(random_rows(num_tokens, layer.K, int(time.time())), math_kind, layer)
    exact = int4_gemv_definition(x, weights[0], epilogue)
    times = []
    for launch in candidates(layer, math_kind, num_tokens):
        poison(num_tokens, layer)
        try:
            errors = [relative_error(int4_gemv_triton(x, weights[0], epilogue, scratch=scratch, launch=launch), exact)
                      for _ in range(2)]  # fmt: skip
            if not max(errors) < LARGEST_ERROR:
                report.add("wrong", layer=layer.name, M=num_tokens, launch=str(launch), error=max(errors))
                continue
            run = [lambda w=w, launch=launch: int4_gemv_triton(x, w, epilogue, scratch=scratch, launch=launch)
                   for w in weights]  # fmt: skip
            times.append((*graph_times(run, 0.02), launch))
        except Exception as error:
            report.add("failed", layer=layer.name, M=num_tokens, launch=str(launch), error=str(error)[:100])
    times.sort(key=lambda one: one[0])
    if times:
        us, _, launch = times[0]
        run = [lambda w=w: int4_gemv_triton(x, w, epilogue, scratch=scratch, launch=launch) for w in weights]
        us, spread = graph_times(run, 0.1)
        report.add("gemv", layer=layer.name, math=math_kind, M=num_tokens, us=us, **rate(report, layer, us),
                   spread_us=spread, launch=str(launch))  # fmt: skip
        if num_tokens == 1 and math_kind != "float" and layer.name in ALONE:
            us = without_dependent_launch(run)
            report.add("gemv alone", layer=layer.name, M=1, us=us, **rate(report, layer, us))
        for us, _, launch in times:
            report.rows.append({"section": "try", "layer": layer.name, "math": math_kind, "M": num_tokens, "us": us,
                                "launch": {"form": type(launch).__name__, **asdict(launch)}})  # fmt: skip
    return times


def without_dependent_launch(run: list[Callable[[], Any]]) -> float:
    known = backend.PDL_CAPABILITY
    backend.PDL_CAPABILITY = 1000
    us, _ = graph_times(run, 0.05)
    backend.PDL_CAPABILITY = known
    return us


def print_launches(best: dict[tuple[str, int, str], tuple[float, Launch]]) -> None:
    """The table of the fastest, to paste into kernels/int4/gemv/launch.py."""
    shapes = {layer.name: (layer.N, layer.K) for layer in LAYERS}
    print("LAUNCH:")
    for kind, tokens in dict.fromkeys((kind, tokens) for kind, tokens, _ in best):
        print(f'("{kind}", 4, {tokens}): {{')
        for (one, many, name), (us, launch) in best.items():
            if (one, many) == (kind, tokens):
                print(f"    {shapes[name]}: {launch},  # {name}: {us:.1f} us")
        print("},", flush=True)


VOCABULARY_LAUNCHES = [(4, 256, 2), (8, 512, 4)]


def vocabulary(report: Report) -> None:
    """The output matrix in 8 bits: logits, the best of them, the best 64."""
    weights = [random_weight(VOCABULARY.N, VOCABULARY.K, 8, seed) for seed in range(2)]
    x = quantize_groups_reference(random_rows(1, VOCABULARY.K, 3), is_split=False)
    exact = int4_gemv_definition(x, weights[0], Epilogue(factor=1 / 16))
    for one in VOCABULARY_LAUNCHES if not DRY else [(4, 32, 1)]:
        launch = WordLaunch(*one)
        for kind, dtype in (("best", torch.int64), ("plain", torch.float32)):
            epilogue = Epilogue(kind, 1 / 16)
            y = int4_gemv_triton(x, weights[0], epilogue, dtype, launch=launch)
            if kind == "best":  # of logits as they are stored
                rounded = int4_gemv_triton(x, weights[0], Epilogue("plain", 1 / 16), torch.bfloat16, launch=launch)
                right = 0x7FFFFFFF - int(y.max() & 0xFFFFFFFF) == int(rounded.float().argmax())
            else:
                right = relative_error(y, exact) < 1e-5
            if not right:
                report.add("wrong", layer="lm_head", kind=kind, launch=str(launch))
                continue
            run = [lambda w=w, e=epilogue, d=dtype, launch=launch: int4_gemv_triton(x, w, e, d, launch=launch)
                   for w in weights]  # fmt: skip
            us, spread = graph_times(run, 0.03)
            report.add("vocabulary", kind=kind, us=us, **rate(report, VOCABULARY, us, 8), spread_us=spread,
                       launch=str(launch))  # fmt: skip
    flag, sampling = torch.zeros(1, dtype=torch.int32, device=DEVICE), new_sampling_tensors(DEVICE, 1)

    def by_logits(weight: PackedWeight) -> Tensor:
        return greedy_tokens(int4_gemv_triton(x, weight, PLAIN, torch.bfloat16).float(), sampling)

    assert torch.equal(likeliest_tokens_triton(x, weights[0], flag), by_logits(weights[0])) and not bool(flag)
    us, spread = graph_times([lambda w=w: likeliest_tokens_triton(x, w, flag) for w in weights], 0.05)
    report.add("vocabulary", kind="best, with the last choice", us=us, spread_us=spread)
    us, spread = graph_times([lambda w=w: by_logits(w) for w in weights], 0.05)
    report.add("vocabulary", kind="best, by way of logits", us=us, spread_us=spread)
    logits = exact.float()
    for one, other in zip(top_k_triton(logits, 64), top_k_reference(logits, 64), strict=True):
        assert torch.equal(one, other)
    us, spread = graph_times([lambda: top_k_triton(logits, 64)], 0.05)
    report.add("vocabulary", kind="64 largest of the logits", us=us, spread_us=spread)


def chain(report: Report, launches: dict[str, dict[tuple[int, int], Launch]]) -> None:
    """All linear maps of one token in one graph: bare, and with every norm, quantization and epilogue around them."""
    by_name = {layer.name: layer for layer in LAYERS}
    layers = []
    for index in range(NUM_LAYERS):
        first = by_name["qkv_gate" if index in SPARSE_LAYERS else "qkvz"]
        parts = [first, by_name["o"], by_name["gate_up"], by_name["down"]]
        layers.append([random_weight(part.N, part.K, 4, 10 * index + i) for i, part in enumerate(parts)])
    total = sum(w.words.nbytes + w.scales.nbytes for parts in layers for w in parts)
    head = random_weight(VOCABULARY.N, VOCABULARY.K, 8, 9)
    norm = torch.ones(HIDDEN, device=DEVICE, dtype=torch.bfloat16)
    flag = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    start = random_rows(1, HIDDEN, 4)
    ready = {parts.words.shape[1] * 8: quantize_groups_reference(random_rows(1, parts.words.shape[1] * 8, 6))
             for parts in layers[0]}  # fmt: skip

    def gemv(x: Any, weight: PackedWeight, epilogue: Epilogue = PLAIN, kind: str = "int8") -> Tensor:
        shape = (weight.words.shape[0], weight.words.shape[1] * 8)
        return int4_gemv_triton(x, weight, epilogue, launch=launches[kind].get(shape))

    def bare() -> None:
        for first, o, gate_up, down in layers:
            gemv(ready[HIDDEN], first)
            gemv(ready[HIDDEN], o, Epilogue("residual", 0.25, start))
            gemv(ready[HIDDEN], gate_up, SWIGLU)
            gemv(ready[down.words.shape[1] * 8], down, Epilogue("residual", 0.25, start))

    def fused(
        raw: tuple[str, ...] = (), with_head: bool = False, depth: int = NUM_LAYERS, is_gated: bool = False
    ) -> Tensor:
        """`raw`: the maps whose product norms and quantizes for itself; before the others a kernel does. `is_gated`:
        gate_up quantizes for down."""
        hidden, factor = start, 1.4 / math.sqrt(32)

        def step(name: str, x: Tensor, weight: PackedWeight, epilogue: Epilogue = PLAIN) -> Tensor:
            rows = RawActivations(x, (norm, 1e-6) if name in ("first", "gate_up") else None)
            return gemv(rows, weight, epilogue, "raw") if name in raw else gemv(rows.grouped(True), weight, epilogue)

        for first, o, gate_up, down in layers[:depth]:
            mixed = step("first", hidden, first)[:, :HIDDEN].contiguous()
            hidden = step("o", mixed, o, Epilogue("residual", factor, hidden))
            join = Epilogue("residual", factor, hidden)
            if is_gated:
                rows = RawActivations(hidden, (norm, 1e-6))
                launch = launches["raw"].get((gate_up.words.shape[0], HIDDEN)) or launch_of(rows, gate_up)
                if isinstance(launch, StreamLaunch):
                    launch = replace(launch, quantizes=True)
                hidden = gemv(gated_groups_triton(rows, gate_up, launch=launch), down, join)
            else:
                hidden = step("down", step("gate_up", hidden, gate_up, SWIGLU), down, join)
        if with_head:
            likeliest_tokens_triton(rms_norm_quantize_groups(hidden, norm, 1e-6, is_split=False), head, flag)
        return hidden

    every = ("first", "o", "gate_up", "down")
    usual = ("first", "o", "gate_up")
    runs: list[tuple[str, Callable[[], Any], int]] = [
        ("bare", bare, total),
        ("quantized by kernels", fused, total),
        ("as a step", lambda: fused(usual), total),
        ("as a step, gate_up quantizing for down", lambda: fused(usual, is_gated=True), total),
    ]
    if launches["raw"]:
        runs += [
            (f"quantized by the products {' '.join(raw)}", lambda raw=raw: fused(raw), total)
            for raw in (every, ("gate_up",), ("first", "gate_up"), ("first", "o", "gate_up"), ("gate_up", "down"))
        ]
        runs += [("quantized by the products, with lm_head", lambda: fused(every, True), total + head.words.nbytes)]
    for name, run, size in runs:
        us, spread = graph_times([run], 0.15)
        report.add("chain", name=name, ms=us * 1e-3, spread_us=spread, gb_s=size / us * 1e-3,
                   of_read=size / us * 1e-3 / report.meta["read_gb_s"])  # fmt: skip
    report.add("chain", name="bare alone", ms=without_dependent_launch([bare]) * 1e-3)
    # Two ways of summing a norm move a few codes, which random layers spread: one layer is checked, the rest is told.
    for depth in (1, NUM_LAYERS):
        exact = fused(depth=depth).float()
        for is_gated in (False, True):
            other = fused(usual if is_gated else every, depth=depth, is_gated=is_gated).float()
            difference = float((other - exact).norm() / exact.norm())
            report.add("chain check", layers=depth, is_gated=is_gated, difference=difference)
            is_close = depth > 1 or difference < 2e-2
            assert bool(other.isfinite().all()) and is_close, f"the chain differs by {difference}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--seconds", type=float, default=420, help="time for everything; what does not fit is left out and said"
    )
    parser.add_argument("--only", default="search,chain,vocabulary", help="sections, by commas: %(default)s")
    parser.add_argument("--cases", default="", help="of the search, such as 'o int8 16,gate_up int8'")
    parser.add_argument("--dry", action="store_true", help="tiny shapes in the interpreter: checks this script")
    arguments = parser.parse_args()
    report = Report(arguments.out, arguments.seconds, DEVICE)
    wanted = arguments.only.split(",")
    failed: list[str] = []
    launches: dict[str, dict[tuple[int, int], Launch]] = {"int8": {}, "raw": {}}
    with torch.no_grad():
        measure_ceilings(report)
        if "search" in wanted:
            if not DRY:
                warm_all(report, arguments.cases)
            launches = search(report, arguments.cases)
        for name, section in (("chain", lambda: chain(report, launches)), ("vocabulary", lambda: vocabulary(report))):
            if name not in wanted or report.left() < 15:
                continue
            try:
                section()
            except Exception:  # the other sections are measured; the exit status tells
                traceback.print_exc()
                failed.append(name)
            report.save()
    report.save()
    print(f"{arguments.seconds - report.left():.0f} s in all; failed: {failed}", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
