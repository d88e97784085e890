"""A model folder of random weights that behave like trained ones: for runs at full size where the real ones are not.

    python benchmarks/synthetic_checkpoint.py OUT                      # the released 9B shape, 18.95 GB of bf16
    python benchmarks/synthetic_checkpoint.py OUT --layers 2           # the same with its first layers alone
    python benchmarks/synthetic_checkpoint.py OUT --scale small        # a few megabytes, for tests

Matrices are Student-t with six degrees of freedom, a spread per layer and matrix, and one input channel in a thousand
8 to 20 times as large; norm weights are log-normal around one. Widths follow muP, so that activations stay of order one
through all layers and logits are neither flat nor one-hot. There is no tokenizer: draw ids below `vocab_size`.

Drawn on the GPU where there is one. Every tensor has a seed of its own, so the same seed gives the same bytes on the
same kind of device, whatever the number of layers. Tensors are streamed: less than 1 GiB is held at a time.
"""

import argparse
import hashlib
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from salalocal.checkpoint.names import EMBEDDING, HEAD, Shape, expected_tensors
from salalocal.checkpoint.writer import write_checkpoint
from salalocal.device import pick_device
from salalocal.model.config import LIGHTNING, SPARSE, LightningConfig, SalaConfig

DEGREES_OF_FREEDOM = 6  # even
OUTLIER_SHARE = 1e-3
OUTLIER_FACTORS = (8.0, 20.0)
LOGIT_STD = 2.0
EMBEDDING_STD = 0.1  # as the released model was initialised; times scale_emb it is of order one
SHARD_BYTES = 192 * 2**20

_PIECE_WEIGHTS = 2**22


def released_config(num_layers: int | None = None) -> SalaConfig:
    """The released shape, or that of its first layers; the residual scale is that of as many layers."""
    config = SalaConfig.released()
    if num_layers is None:
        return config
    return replace(config, num_hidden_layers=num_layers, mixer_types=config.mixer_types[:num_layers])


def small_config(num_layers: int = 2) -> SalaConfig:
    """Both kinds of layers at a size for tests; sparse from 256 tokens on."""
    config = SalaConfig.released()
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return replace(
        config,
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        dim_model_base=8,
        num_hidden_layers=num_layers,
        mixer_types=tuple((SPARSE, LIGHTNING)[layer % 2] for layer in range(num_layers)),
        eos_token_ids=(2,),
        sparse=replace(config.sparse, **heads, head_dim=32, window_size=64, topk=3, dense_len=256),
        lightning=LightningConfig(num_heads=4, num_key_value_heads=4, head_dim=32),
    )


def random_tensor(config: SalaConfig, name: str, shape: Shape, seed: int, device: torch.device) -> Tensor:
    """One tensor by its name. Shapes: bf16 of `shape`, on the device."""
    generator = torch.Generator(device).manual_seed(_seed_of(name, seed))
    if len(shape) == 1:
        return torch.randn(shape, generator=generator, device=device).mul_(0.2).exp_().bfloat16()
    num_out, num_in = shape
    weight = torch.empty(shape, dtype=torch.bfloat16, device=device)
    channels = torch.ones(num_in, device=device)
    if name not in (EMBEDDING, HEAD):
        num_outliers = max(1, round(OUTLIER_SHARE * num_in))
        least, most = OUTLIER_FACTORS
        factors = torch.rand(num_outliers, generator=generator, device=device) * (most - least) + least
        channels[torch.randperm(num_in, generator=generator, device=device)[:num_outliers]] *= factors
    channels *= _std(config, name, num_in, generator) / float(channels.square().mean().sqrt())
    step = max(1, _PIECE_WEIGHTS // num_in)
    for start in range(0, num_out, step):
        rows = weight[start : start + step]
        rows.copy_(_student(rows.shape, generator) * channels)
    return weight


def random_tensors(config: SalaConfig, seed: int, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """All tensors of a checkpoint on the host, one at a time."""
    for name, shape in expected_tensors(config).items():
        yield name, random_tensor(config, name, shape, seed, device).cpu()


def write_synthetic(folder: Path, config: SalaConfig, seed: int, device: torch.device) -> None:
    """Write the folder; what stands there of an older model is replaced."""
    write_checkpoint(folder, config.to_hf(), random_tensors(config, seed, device), SHARD_BYTES)


def _seed_of(name: str, seed: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7], "little")


def _std(config: SalaConfig, name: str, num_in: int, generator: torch.Generator) -> float:
    """The spread of a matrix: keeps inputs of order one so, up to a factor of its own for each matrix of a layer."""
    if name == EMBEDDING:
        return EMBEDDING_STD
    if name == HEAD:
        return LOGIT_STD * config.logit_divisor / math.sqrt(num_in)
    gain = torch.rand((), generator=generator, device=generator.device).mul(0.8).add(0.6)
    return float(gain) / math.sqrt(num_in)


def _student(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Student-t with variance one: a normal over the root of a chi-square, which is a sum of exponentials."""
    device, half = generator.device, DEGREES_OF_FREEDOM // 2
    normal = torch.randn(shape, generator=generator, device=device)
    exponentials = torch.rand(half, *shape, generator=generator, device=device).clamp_(min=1e-7).log_().sum(0)
    return normal.div_(exponentials.div_(-half).sqrt_()).mul_(math.sqrt(1 - 2 / DEGREES_OF_FREEDOM))


def main() -> None:
    """Parse the flags, write the folder, say how long it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--scale", choices=("released", "small"), default="released")
    parser.add_argument("--layers", type=int, help="only so many layers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    config = small_config(arguments.layers or 2) if arguments.scale == "small" else released_config(arguments.layers)
    device = pick_device(arguments.device)
    started_s = time.monotonic()
    write_synthetic(arguments.out, config, arguments.seed, device)
    num_bytes = sum(path.stat().st_size for path in arguments.out.glob("*.safetensors"))
    print(f"{arguments.out}: {num_bytes / 1e9:.2f} GB in {time.monotonic() - started_s:.0f} s on {device}")


if __name__ == "__main__":
    main()
