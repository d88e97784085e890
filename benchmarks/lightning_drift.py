"""What keeping a lightning state in bf16 would do: outputs of many decode steps against float64, head by head.

    PYTHONPATH=. python3 benchmarks/lightning_drift.py --tokens 262144 --out drift.json

Keys and values are normal with a mean of their own, as in models: a slow head then sums up hundreds of terms that point
the same way, which is the hardest case for few mantissa bits. States: fp32 as shipped, bf16 rounded after every token,
and bf16 rounded after every chunk of 64 only (what a prefill that stores bf16 states would do).
"""

import argparse
import json
import time
from pathlib import Path

import torch
from torch import Tensor

from salalocal.kernels.lightning import lightning_slopes

HEADS, DIM, BLOCK, CHUNK = 32, 128, 256, 64
CHOSEN = [0, 8, 15, 23, 27, 31]  # from the fastest to the slowest decay
FORMS = ("fp32", "bf16 a token", "bf16 a chunk")


class Drift:
    """The states side by side, and the squared errors of the outputs so far. Shapes: states [heads, K, V]."""

    def __init__(self, device: torch.device) -> None:
        slopes = lightning_slopes(HEADS, torch.float64)[CHOSEN].to(device)
        self.decays = torch.exp(-slopes)[:, None, None]
        self.exact = torch.zeros(len(CHOSEN), DIM, DIM, device=device, dtype=torch.float64)
        self.states = [torch.zeros_like(self.exact, dtype=torch.float32) for _ in FORMS]
        self.errors = torch.zeros(len(FORMS), len(CHOSEN), device=device, dtype=torch.float64)
        self.norms = torch.zeros(len(CHOSEN), device=device, dtype=torch.float64)
        self.inputs = torch.zeros(3, BLOCK, len(CHOSEN), DIM, device=device)

    def run_block(self) -> None:
        """BLOCK tokens, all in place, so that a CUDA graph can hold them."""
        narrow_decays = self.decays.float()
        for token in range(BLOCK):
            q, k, v = self.inputs[:, token]
            added = k[:, :, None] * v[:, None, :]
            self.exact.mul_(self.decays).add_(added)
            exact = torch.bmm(q[:, None].double(), self.exact)
            self.norms += exact.square().sum((1, 2))
            for form, state in enumerate(self.states):
                state.mul_(narrow_decays).add_(added)
                if form == 1 or (form == 2 and token % CHUNK == CHUNK - 1):
                    state.copy_(state.bfloat16())
                self.errors[form] += (torch.bmm(q[:, None], state).double() - exact).square().sum((1, 2))

    def relative(self) -> Tensor:
        """Relative error of the outputs since the last call. Shapes: [forms, heads]."""
        found = (self.errors / self.norms).sqrt()
        self.errors.zero_()
        self.norms.zero_()
        return found


def measure(tokens: int, device: torch.device, seconds: float) -> dict[str, dict[str, list[float]]]:
    """Relative errors over the stretch that ends at each power of two, and over the last stretch."""
    torch.backends.cuda.matmul.allow_tf32 = False
    drift = Drift(device)
    generator = torch.Generator(device).manual_seed(0)
    mean = 0.3 * torch.randn(3, 1, len(CHOSEN), DIM, device=device, generator=generator)
    graph = torch.cuda.CUDAGraph() if device.type == "cuda" else None
    if graph is not None:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            drift.run_block()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            drift.run_block()
        for tensor in (drift.exact, *drift.states, drift.errors, drift.norms):
            tensor.zero_()
    found = {}
    began_s = time.monotonic()
    for done in range(BLOCK, tokens + 1, BLOCK):
        drift.inputs.normal_(generator=generator).add_(mean)
        drift.inputs.copy_(drift.inputs.bfloat16())
        graph.replay() if graph is not None else drift.run_block()
        is_late = time.monotonic() - began_s > seconds
        if done & (done - 1) == 0 or done + BLOCK > tokens or is_late:
            errors = drift.relative().tolist()
            found[str(done)] = dict(zip(FORMS, errors, strict=True))
            print(f"{done} tokens:", *(f"{name} {[f'{x:.1e}' for x in row]}" for name, row in found[str(done)].items()))
        if is_late:
            print("time is up")
            break
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1 << 18, help="decode steps")
    parser.add_argument("--seconds", type=float, default=60, help="stops then, and tells what it has")
    parser.add_argument("--out", default="")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with torch.inference_mode():
        found = measure(arguments.tokens, device, arguments.seconds)
    if arguments.out:
        Path(arguments.out).write_text(json.dumps({"heads": CHOSEN, "relative_error": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
