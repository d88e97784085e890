"""Small quantized folders for tests: plain rounding to nearest, written as GPTQ, with the dense weights they mean."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from salalocal.checkpoint.writer import write_checkpoint
from salalocal.model.config import SalaConfig
from salalocal.quant.int4 import IntScheme, IntWeight, to_gptq

Choice = Callable[[str], IntScheme | None]
GROUPS_OF_16 = IntScheme(4, 16)


def rounded(weight: Tensor, scheme: IntScheme, scale_dtype: torch.dtype = torch.bfloat16) -> IntWeight:
    """Rounds to nearest with one scale per group."""
    num_in = weight.shape[1]
    groups = torch.arange(num_in) // scheme.group_size
    top = 2 ** (scheme.bits - 1)
    scales = torch.stack(
        [weight[:, groups == group].abs().amax(dim=1) for group in range(scheme.num_groups(num_in))], dim=1
    )
    scales = (scales / (top - 1)).clamp(min=1e-6).to(scale_dtype)
    codes = (weight / scales.float()[:, groups]).round().clamp(-top, top - 1) + top
    return IntWeight(codes.to(torch.uint8), scales, scheme.bits, scheme.group_size)


def random_weight(
    num_out: int,
    num_in: int,
    scheme: IntScheme,
    seed: int,
    act_order: bool = False,
    scale_dtype: torch.dtype = torch.bfloat16,
) -> IntWeight:
    """Every code may occur; with act-order the features of a group are spread over the row."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**scheme.bits, (num_out, num_in), generator=generator, dtype=torch.uint8)
    scales = (torch.rand(num_out, scheme.num_groups(num_in), generator=generator) + 0.5).to(scale_dtype)
    groups = torch.arange(num_in, dtype=torch.int32) // scheme.group_size
    index = groups[torch.randperm(num_in, generator=generator)] if act_order else None
    return IntWeight(codes, scales, scheme.bits, scheme.group_size, index)


def unpacked_by_hand(words: Tensor, bits: int) -> np.ndarray:
    """Codes along the last axis, by arithmetic on whole numbers: not a line of this comes from the package."""
    whole = words.numpy().astype(np.int64) % 2**32
    codes = [whole // 2 ** (bits * place) % 2**bits for place in range(32 // bits)]
    return np.stack(codes, axis=-1).reshape(*whole.shape[:-1], -1)


def gptq_by_hand(tensors: dict[str, Tensor], zero_offset: int) -> np.ndarray:
    """W [out, in] of GPTQ tensors: scales[g, o] * (q[i, o] - (zero[g, o] + zero_offset)), in float64."""
    bits = tensors["qweight"].shape[0] * 32 // tensors["g_idx"].numel()
    codes = unpacked_by_hand(tensors["qweight"].t(), bits)
    zeros = unpacked_by_hand(tensors["qzeros"], bits) + zero_offset
    groups = tensors["g_idx"].numpy()
    scales = tensors["scales"].double().numpy()
    weight: np.ndarray = (scales[groups] * (codes.T - zeros[groups])).T
    return weight


def gptq_record(scheme: IntScheme, **more: Any) -> dict[str, Any]:
    """A quantization_config as GPTQModel writes it."""
    return {
        "quant_method": "gptq", "bits": scheme.bits, "group_size": scheme.group_size, "sym": True, "desc_act": False,
        "lm_head": False, "checkpoint_format": "gptq", "pack_dtype": "int32", **more,
    }  # fmt: skip


def projections(name: str) -> IntScheme | None:
    """Quantize q, k, v, o and the MLP but neither gates nor embeddings, as public GPTQ files of this model do."""
    module = name.split(".")[-2]
    return GROUPS_OF_16 if module.endswith("_proj") and module != "z_proj" else None


def quantized_tensors(tensors: dict[str, Tensor], choice: Choice) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of a GPTQ folder, and the dense ones with the same meaning."""
    stored: dict[str, Tensor] = {}
    dense: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        scheme = choice(name) if tensor.ndim == 2 else None
        if scheme is None:
            stored[name] = dense[name] = tensor
            continue
        weight = rounded(tensor.float(), scheme)
        stored.update({f"{name.removesuffix('.weight')}.{leaf}": part for leaf, part in to_gptq(weight).items()})
        dense[name] = weight.dequantize()
    return stored, dense


def written_quantized(folder: Path, config: SalaConfig, stored: dict[str, Tensor], record: dict[str, Any]) -> Path:
    """A model folder with this record."""
    write_checkpoint(folder, {**config.to_hf(), "quantization_config": record}, stored.items())
    return folder


def quantized_copy(
    source: Path,
    folder: Path,
    tensors: dict[str, Tensor],
    choice: Choice = projections,
    scheme: IntScheme = GROUPS_OF_16,
) -> Path:
    """A quantized copy of a model folder with its tokenizer; `scheme` is what its record says."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.suffix in (".json", ".jinja") and not path.name.startswith("model.safetensors"):
            (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((source / "config.json").read_text())
    stored, _ = quantized_tensors(tensors, choice)
    write_checkpoint(folder, {**config, "quantization_config": gptq_record(scheme)}, stored.items())
    return folder
