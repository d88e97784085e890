"""How long a 4-bit model takes from a start of Python to its first token: every step of it, cold and warm.

    PYTHONPATH=. python3 benchmarks/load.py --out load.json                                   # the 9B shape on a card
    PYTHONPATH=. python3 benchmarks/load.py --scale small --device cpu --out /tmp/load.json   # seconds, anywhere
    PYTHONPATH=. python3 benchmarks/load.py --layers 2 --device cpu --out /tmp/load.json      # wide, but not deep
    PYTHONPATH=. python3 benchmarks/load.py --model FOLDER --out load.json                    # a model that is here

Without --model a GPTQ folder of random words is written first, which leaves it in the page cache; it is deleted at the
end. Its tokenizer is the built-in model's, whose tokens are the first of the table, as are the ids that end an answer.
Every run is a process of its own, which starts with the import of torch. On a card the first one takes Triton's cache
of compiled kernels as it is, and fills it; the next ones are what a user meets from the second start on; the last one,
with an empty cache, is what a user meets once, and has what time is left. Units: seconds. The exit code is 1 if a start
failed or was not done in time.
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
BUILTIN = ROOT / "salalocal" / "builtin"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")
STOPS_FILE = "generation_config.json"
SMALL_TABLE = 9000  # rows, more than there are tokens, as in the large shape
GROUP_SIZE = {"released": 128, "small": 32}
LAYER_BITS, HEAD_BITS = 4, 8
RESULT = "RESULT "
FILLING, COMPILED, EMPTY = "kernels as they were", "kernels compiled", "no kernel compiled"


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
    from salalocal.checkpoint.checkpoint import Checkpoint
    from salalocal.checkpoint.hub import find_model
    from salalocal.engine.sampling_params import SamplingParams
    from salalocal.session.runtime import LoadOptions, open_runtime
    from salalocal.session.tokens import TextCodec

    step("import salalocal")
    device = torch.device(device_name)
    if device.type == "cuda":
        torch.zeros(1, device=device)
        step("first use of the card")
    place = find_model(folder)
    Checkpoint.open(place)  # headers alone; loading does it once more, in milliseconds
    codec = TextCodec.from_folder(place.path)
    words = codec.tokenizer.encode(Path(__file__).read_text())
    ids = (words * (num_tokens // len(words) + 1))[:num_tokens]
    step("open")
    runtime = open_runtime(place, folder.name, LoadOptions(device=device_name, num_tokens=num_tokens + 64), codec)
    if device.type == "cuda":
        torch.cuda.synchronize()
    step("load")
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


def config_of(scale: str, num_layers: int | None = None) -> Any:
    """The shape, with the ids that end an answer of the tokenizer that will lie beside it."""
    from benchmarks.synthetic_checkpoint import released_config, small_config

    if scale == "small":
        config = replace(small_config(num_layers or 4), vocab_size=SMALL_TABLE)
    else:
        config = released_config(num_layers)
    stops = json.loads((BUILTIN / STOPS_FILE).read_text())["eos_token_id"]
    return replace(config, eos_token_ids=tuple(stops if isinstance(stops, list) else [stops]))


def copy_tokenizer(folder: Path) -> None:
    """The built-in model's, which stands for any."""
    for name in (*TOKENIZER_FILES, STOPS_FILE):
        shutil.copy(BUILTIN / name, folder / name)


def random_folder(folder: Path, scale: str, device_name: str, num_layers: int | None = None) -> None:
    """A GPTQ folder of the shape with random words, as the quantizer writes them."""
    import torch

    from salalocal.checkpoint.writer import write_checkpoint
    from salalocal.quant.int4 import GPTQ_VERSIONS

    config = config_of(scale, num_layers)
    group_size = GROUP_SIZE[scale]
    record = {
        "quant_method": "gptq", "bits": LAYER_BITS, "group_size": group_size, "sym": True, "desc_act": False,
        "checkpoint_format": GPTQ_VERSIONS[0], "dynamic": {"+:lm_head": {"bits": HEAD_BITS}},
    }  # fmt: skip
    tensors = random_tensors(config, group_size, torch.device(device_name))
    write_checkpoint(folder, config.to_hf() | {"quantization_config": record}, tensors)
    copy_tokenizer(folder)


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


def start(folder: Path, arguments: argparse.Namespace, kernels: Path | None, limit_s: float) -> dict[str, Any]:
    """One start in a process of its own, with a cache of kernels of its own or the usual one; what went wrong is a
    result too."""
    command = [sys.executable, __file__, "--model", str(folder), "--device", arguments.device, "--child"]
    command += ["--tokens", str(arguments.tokens), "--out", os.devnull]
    began_s = time.monotonic()
    try:
        done = subprocess.run(
            command,
            env=os.environ | ({} if kernels is None else {"TRITON_CACHE_DIR": str(kernels)}),
            capture_output=True,
            text=True,
            timeout=max(0.1, limit_s),
        )
    except subprocess.TimeoutExpired:
        return {"error": f"not done within the {limit_s:.0f} s that were left"}
    found = [line.removeprefix(RESULT) for line in done.stdout.splitlines() if line.startswith(RESULT)]
    if done.returncode or not found:
        return {"error": done.stderr.strip()[-400:] or f"exit code {done.returncode}"}
    return {"process": time.monotonic() - began_s, **json.loads(found[0])}


def measure_all(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    """All runs, and the median of those that found compiled kernels."""
    until_s = time.monotonic() + arguments.seconds
    folder = arguments.model
    if folder is None:
        folder = work / "model"
        random_folder(folder, arguments.scale, arguments.device, arguments.layers)
    num_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    print(f"{folder}: {num_bytes / 1e9:.2f} GB, {until_s - time.monotonic():.0f} s left", flush=True)
    is_card = arguments.device.startswith("cuda")
    runs: list[dict[str, Any]] = []
    for kernels in [FILLING] * is_card + [COMPILED] * arguments.runs + [EMPTY] * is_card:
        limit_s = until_s - time.monotonic()
        found = start(folder, arguments, work / "kernels" if kernels == EMPTY else None, limit_s)
        runs.append({"kernels": kernels, **found})
        shown = {name: round(value, 2) if isinstance(value, float) else value for name, value in found.items()}
        print(f"{kernels}: {shown}", flush=True)
    warm = [run for run in runs if run["kernels"] == COMPILED and "error" not in run]
    steps = [name for name in warm[0] if name != "kernels"] if warm else []
    median = {name: statistics.median(run[name] for run in warm) for name in steps} or None
    about = {"model_bytes": num_bytes, "device": arguments.device, "tokens": arguments.tokens, "scale": arguments.scale}
    return about | {"runs": runs, "median_of_warm": median}


def main() -> None:
    """Parse the flags, run, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a model folder; none: one of random words")
    parser.add_argument("--scale", choices=sorted(GROUP_SIZE), default="released")
    parser.add_argument("--layers", type=int, help="only so many layers of it")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens", type=int, default=1024, help="read before the first token")
    parser.add_argument("--runs", type=int, default=2, help="with compiled kernels")
    parser.add_argument(
        "--seconds", type=float, default=100, help="time for everything; what does not fit is left out and said"
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
    sys.exit(1 if not found["runs"] or any("error" in run for run in found["runs"]) else 0)


if __name__ == "__main__":
    main()
