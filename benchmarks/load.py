"""How long a 4-bit model takes from a start of Python to its first token: every step of it, cold and warm.

    PYTHONPATH=. python3 benchmarks/load.py --seconds 150 --out load.json                     # the 9B shape on a card
    PYTHONPATH=. python3 benchmarks/load.py --scale small --device cpu --out /tmp/load.json   # seconds, anywhere
    PYTHONPATH=. python3 benchmarks/load.py --model FOLDER --out load.json                    # a model that is here

Without --model a GPTQ folder of random words is written first, which leaves it in the page cache; it is deleted at the
end. Every run is a process of its own, which starts with the import of torch. The first one has an empty cache of
compiled kernels, the others find it filled: that is what a user meets from the second start on. Units: seconds.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

STARTED_S = time.perf_counter()
ROOT = Path(__file__).parents[1]
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")
TOKENIZER_SIZE = 8192  # of the built-in model's, which stands for any
GROUP_SIZE = {"released": 128, "small": 32}
LAYER_BITS, HEAD_BITS = 4, 8
RESULT = "RESULT "


def measure(folder: Path, device_name: str, num_tokens: int) -> dict[str, float]:
    """The steps of a start, in this process; `num_tokens` are read before the first token is drawn."""
    steps: dict[str, float] = {}
    last_s = STARTED_S

    def step(name: str) -> None:
        nonlocal last_s
        now_s = time.perf_counter()
        steps[name], last_s = now_s - last_s, now_s

    import torch

    step("import torch")
    from salalocal.engine.sampling_params import SamplingParams
    from salalocal.session.runtime import load

    step("import salalocal")
    device = torch.device(device_name)
    if device.type == "cuda":
        torch.zeros(1, device=device)
        step("first use of the card")
    runtime = load(folder, device=device_name)
    if device.type == "cuda":
        torch.cuda.synchronize()
    step("load")
    ids = torch.randint(3, runtime.config.vocab_size, (num_tokens,), generator=torch.Generator().manual_seed(0))
    state = runtime.engine.new_state(num_tokens + 64)
    logits = runtime.engine.prefill(ids, state)
    if logits is None:
        raise RuntimeError("the prefill was cancelled")
    answer = runtime.engine.generate(state, logits, SamplingParams(max_tokens=8, is_loop_guarded=False))
    next(answer)
    step("first token")
    list(answer)
    step("seven more tokens")
    steps["all, to the first token"] = sum(steps.values()) - steps["seven more tokens"]
    return steps


def random_folder(folder: Path, scale: str, device_name: str) -> None:
    """A GPTQ folder of the shape with random words, as the quantizer writes them."""
    import torch

    from benchmarks.synthetic_checkpoint import released_config, small_config
    from salalocal.checkpoint.writer import write_checkpoint
    from salalocal.quant.int4 import GPTQ_VERSIONS

    config = replace(small_config(4), vocab_size=TOKENIZER_SIZE) if scale == "small" else released_config()
    group_size = GROUP_SIZE[scale]
    record = {
        "quant_method": "gptq", "bits": LAYER_BITS, "group_size": group_size, "sym": True, "desc_act": False,
        "checkpoint_format": GPTQ_VERSIONS[0], "dynamic": {"+:lm_head": {"bits": HEAD_BITS}},
    }  # fmt: skip
    tensors = random_tensors(config, group_size, torch.device(device_name))
    write_checkpoint(folder, config.to_hf() | {"quantization_config": record}, tensors)
    for name in TOKENIZER_FILES:
        shutil.copy(ROOT / "salalocal" / "builtin" / name, folder / name)


def random_tensors(config: Any, group_size: int, device: Any) -> Iterator[tuple[str, Any]]:
    """Every tensor of such a folder, one at a time, on the host."""
    import torch

    from salalocal.checkpoint.names import EMBEDDING, HEAD, expected_tensors
    from salalocal.kernels.packing import pack_codes

    for name, shape in expected_tensors(config).items():
        if len(shape) == 1:
            yield name, torch.ones(shape, dtype=torch.bfloat16)
            continue
        num_out, num_in = shape
        if name == EMBEDDING:
            yield name, (0.1 * torch.randn(shape, device=device)).bfloat16().cpu()
            continue
        module, bits = name.removesuffix(".weight"), HEAD_BITS if name == HEAD else LAYER_BITS
        words = torch.randint(-(2**31), 2**31 - 1, (num_in * bits // 32, num_out), dtype=torch.int32, device=device)
        zeros = torch.full((num_in // group_size, num_out), 2 ** (bits - 1) - 1, dtype=torch.uint8)
        spread = ((4**bits - 1) / 12) ** 0.5  # of codes that are all equally likely: rows get unit length
        scales = torch.full((num_in // group_size, num_out), 1 / (spread * num_in**0.5), dtype=torch.bfloat16)
        yield f"{module}.qweight", words.cpu()
        yield f"{module}.qzeros", pack_codes(zeros, bits)
        yield f"{module}.scales", scales
        yield f"{module}.g_idx", torch.arange(num_in, dtype=torch.int32) // group_size


def start(folder: Path, arguments: argparse.Namespace, kernels: Path, limit_s: float) -> dict[str, Any]:
    """One start in a process of its own; what went wrong is a result too."""
    command = [sys.executable, __file__, "--model", str(folder), "--device", arguments.device, "--child"]
    command += ["--tokens", str(arguments.tokens), "--out", os.devnull]
    began_s = time.monotonic()
    try:
        done = subprocess.run(
            command,
            env=os.environ | {"TRITON_CACHE_DIR": str(kernels)},
            capture_output=True,
            text=True,
            timeout=limit_s,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"not done within {limit_s:.0f} s"}
    found = [line.removeprefix(RESULT) for line in done.stdout.splitlines() if line.startswith(RESULT)]
    if done.returncode or not found:
        return {"error": done.stderr[-400:] or f"exit code {done.returncode}"}
    return {"process": time.monotonic() - began_s, **json.loads(found[0])}


def measure_all(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    """All runs, and the median of those that found compiled kernels."""
    until_s = time.monotonic() + arguments.seconds
    folder = arguments.model
    if folder is None:
        folder = work / "model"
        random_folder(folder, arguments.scale, arguments.device)
    num_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    print(f"{folder}: {num_bytes / 1e9:.2f} GB, {until_s - time.monotonic():.0f} s left", flush=True)
    runs: list[dict[str, Any]] = []
    for number in range(arguments.runs + 1):
        limit_s = until_s - time.monotonic()
        if limit_s < 5:
            print(f"no time for run {number}", flush=True)
            break
        runs.append(start(folder, arguments, work / "kernels", limit_s))
        shown = {name: round(value, 2) if isinstance(value, float) else value for name, value in runs[-1].items()}
        print("kernels not compiled yet:" if number == 0 else "kernels compiled:", shown, flush=True)
    warm = [run for run in runs[1:] if "error" not in run]
    median = {name: statistics.median(run[name] for run in warm) for name in warm[0]} if warm else None
    about = {"model_bytes": num_bytes, "device": arguments.device, "tokens": arguments.tokens, "scale": arguments.scale}
    return about | {"runs": runs, "median_of_warm": median}


def main() -> None:
    """Parse the flags, run, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a model folder; none: one of random words")
    parser.add_argument("--scale", choices=sorted(GROUP_SIZE), default="released")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens", type=int, default=1024, help="read before the first token")
    parser.add_argument("--runs", type=int, default=3, help="with compiled kernels, after one without")
    parser.add_argument(
        "--seconds", type=float, default=150, help="time for everything; what does not fit is left out and said"
    )
    parser.add_argument("--work", type=Path, help="where the folder is written; it must hold 6 GB")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(RESULT + json.dumps(measure(arguments.model, arguments.device, arguments.tokens)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.work) as work:
        found = measure_all(arguments, Path(work))
    arguments.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
