"""How fast a model reads and writes: wall time of a whole prefill, and of tokens drawn after it.

    python benchmarks/prefill.py --ctx 16384                          # the built-in model on this machine
    python benchmarks/prefill.py --model builtin:bf16                 # its unquantized form, or any other model
    python benchmarks/prefill.py --ctx 16384 --profile                # where the time goes
    python benchmarks/prefill.py --shape released --device cuda       # random weights of the 9B shape, bf16

Prints one JSON line per run. The text is this repository's own source, repeated; random weights read random tokens.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch

from salalocal.checkpoint.checkpoint import Checkpoint
from salalocal.checkpoint.hub import find_model
from salalocal.engine.engine import Engine, EngineConfig
from salalocal.engine.load import load_model
from salalocal.engine.sampling_params import SamplingParams
from salalocal.model.config import SalaConfig
from salalocal.model.sala import SalaModel
from salalocal.prompt.tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]


def stored(name: str, device: torch.device, ctx: int) -> tuple[SalaModel, list[int]]:
    """A model on this machine, and text for it."""
    folder = find_model(name)
    text = "\n".join(path.read_text() for path in sorted((ROOT / "salalocal").rglob("*.py")))
    ids = Tokenizer.from_folder(folder.path).encode(text)
    return load_model(Checkpoint.open(folder), device), (ids * (ctx // len(ids) + 1))[:ctx]


def released(device: torch.device, ctx: int) -> tuple[SalaModel, list[int]]:
    """Random weights of the released shape, and random tokens."""
    config = SalaConfig.released()
    with torch.inference_mode():
        model = SalaModel(config, device=device, dtype=torch.bfloat16).eval()
        model.init_weights(0.02, torch.Generator(device).manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    return model, torch.randint(3, config.vocab_size, (ctx,), generator=generator).tolist()


def measure(engine: Engine, ids: list[int], num_drawn: int) -> dict[str, float]:
    """One cold read of `ids`, then `num_drawn` tokens. Units: seconds and tokens/s."""
    state = engine.new_state(len(ids) + num_drawn)
    started_s = time.perf_counter()
    logits = engine.prefill(ids, state)
    read_s = time.perf_counter() - started_s
    if logits is None:
        raise RuntimeError("the prefill was cancelled")
    started_s = time.perf_counter()
    drawn = list(engine.generate(state, logits, SamplingParams(max_tokens=num_drawn, is_loop_guarded=False)))
    write_s = time.perf_counter() - started_s
    return {"read_s": read_s, "read_tokens_per_s": len(ids) / read_s, "write_tokens_per_s": len(drawn) / write_s}


def main() -> None:
    """Parse the flags and print one line per run, then the median."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ctx", type=int, default=16_384)
    parser.add_argument("--gen", type=int, default=32)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--chunk-size", type=int, default=512)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", default="builtin")
    parser.add_argument("--shape", choices=("stored", "released"), default="stored", help="released: random weights")
    parser.add_argument("--profile", action="store_true", help="also print the costliest operations of one read")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if arguments.shape == "released":
        model, ids = released(device, arguments.ctx)
    else:
        model, ids = stored(arguments.model, device, arguments.ctx)
    engine = Engine(model, EngineConfig(arguments.chunk_size))
    machine = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    )
    about = {
        "model": arguments.model if arguments.shape == "stored" else arguments.shape,
        "ctx": arguments.ctx,
        "chunk_size": arguments.chunk_size,
        "device": machine,
    }
    about |= {"threads": torch.get_num_threads(), "torch": torch.__version__, "dtype": str(model.dtype)}
    measure(engine, ids[:1_024], 2)  # warm up
    runs = [measure(engine, ids, arguments.gen) for _ in range(arguments.runs)]
    for run in runs:
        print(json.dumps(about | {name: round(value, 2) for name, value in run.items()}))
    median = {name: round(statistics.median(run[name] for run in runs), 2) for name in runs[0]}
    print(json.dumps({"median_of": len(runs), **about, **median}))
    if arguments.profile:
        with torch.profiler.profile() as profile:
            measure(engine, ids, 1)
        print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=20))


if __name__ == "__main__":
    main()
