"""What the lightning kernels are compared with: the torch reference, and fla where it is installed; for
`lightning_prefill`.

    PYTHONPATH=.:.peers python3 benchmarks/lightning_peers.py [--out FILE]
    PYTHONPATH=.:.peers python3 benchmarks/lightning_peers.py --share 3/12

fla tries some sixty settings at its first call, which takes minutes if one compiles after the other. --share I/N only
compiles every N-th of them: N processes fill Triton's cache, and the one that measures then finds all of them there.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.lightning_cases import DEVICE, HEADS, SCALE, draw, note, relative_error, results, timed_us
from salalocal.kernels.lightning import lightning_reference, lightning_slopes

TOKENS = 8192
MAX_ERROR = 0.02  # several roundings to bf16 within; a peer that computes something else is not timed
TRIAL_MS = (5, 20)  # before, and while a setting is timed: a few dozen runs of a kernel of 0.1 ms


def limit_tuning(index: int = 0, count: int = 1) -> None:
    """Let Triton's autotuner try every count-th setting from `index` on alone, each for a shorter time than it would.

    To be called before the kernels are imported.
    """
    from triton.runtime.autotuner import Autotuner
    from triton.testing import do_bench

    begin = Autotuner.__init__

    def begin_with_share(self: Any, fn: Any, arg_names: Any, configs: Any, *rest: Any, **named: Any) -> None:
        begin(self, fn, arg_names, configs[index::count] or configs[:1], *rest, **named)
        before_ms, while_ms = TRIAL_MS
        self._do_bench = lambda call, quantiles: do_bench(call, warmup=before_ms, rep=while_ms, quantiles=quantiles)

    Autotuner.__init__ = begin_with_share


def call_fla() -> Any:
    """One call, ready to be made. Raises: ImportError."""
    from fla.ops.simple_gla import chunk_simple_gla

    q, k, v, state = draw(TOKENS)
    q, k, v = (x.contiguous() for x in (q, k, v))
    slopes = lightning_slopes(HEADS).to(DEVICE)
    given = {"g_gamma": -slopes, "scale": SCALE, "output_final_state": True}
    return lambda: chunk_simple_gla(q, k, v, initial_state=state, **given)


def measure() -> None:
    """Print nanoseconds a token of every peer."""
    q, k, v, state = draw(TOKENS)
    slopes = lightning_slopes(HEADS).to(DEVICE)
    us, _ = timed_us([lambda: lightning_reference(q, k, v, slopes, SCALE, state)])
    note("torch reference, fp32", ns=us * 1e3 / TOKENS)
    try:
        call = call_fla()
    except ImportError as error:
        note("fla", missing=str(error)[:100])
        return
    expected, after = lightning_reference(q, k, v, slopes, SCALE, state)
    found, found_after = call()
    errors = {"error": relative_error(found, expected), "state_error": relative_error(found_after, after)}
    if not max(errors.values()) < MAX_ERROR:
        note("wrong: fla chunk_simple_gla", **errors)
        return
    us, spread = timed_us([call])
    note("fla chunk_simple_gla", ns=us * 1e3 / TOKENS, spread_ns=spread * 1e3 / TOKENS, **errors)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--share", help="INDEX/COUNT: only compile these")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    arguments = parser.parse_args()
    index, count = map(int, (arguments.share or "0/1").split("/"))
    limit_tuning(index, count)
    with torch.inference_mode():
        if arguments.share:
            call_fla()()
            torch.cuda.synchronize()
            return
        try:
            measure()
        finally:  # what was measured before something went wrong
            if arguments.out:
                arguments.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
