"""What the lightning kernels are compared with: the torch reference, and fla where it is installed; for `lightning`.

    PYTHONPATH=.:.peers python3 benchmarks/lightning_peers.py [--warm]

fla compiles and times some hundred settings at its first call; --warm only does that, ahead of time.
"""

import argparse

import torch

from benchmarks.lightning_cases import DEVICE, HEADS, SCALE, draw, note, timed_us
from salalocal.kernels.lightning import lightning_reference, lightning_slopes

TOKENS = 8192


def measure(*, is_warming: bool) -> None:
    """Print nanoseconds a token of every peer."""
    q, k, v, state = draw(TOKENS)
    slopes = lightning_slopes(HEADS).to(DEVICE)
    if not is_warming:
        us, _ = timed_us([lambda: lightning_reference(q, k, v, slopes, SCALE, state)])
        note("torch reference, fp32", ns=us * 1e3 / TOKENS)
    try:
        from fla.ops.simple_gla import chunk_simple_gla
    except ImportError as error:
        note("fla", missing=str(error)[:100])
        return
    q, k, v = (x.contiguous() for x in (q, k, v))
    given = {"g_gamma": -slopes, "scale": SCALE, "output_final_state": True}
    us, _ = timed_us([lambda: chunk_simple_gla(q, k, v, initial_state=state, **given)])
    note("fla chunk_simple_gla", ns=us * 1e3 / TOKENS)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--warm", action="store_true")
    with torch.inference_mode():
        measure(is_warming=parser.parse_args().warm)


if __name__ == "__main__":
    main()
