"""What the quantization study tries: a linear map's weights and what is known of its inputs come in, the weights that a
`Variant` leaves of them go out, in float32; for `quantization_study`.

What pays stands in `salalocal.quant` and is called from here. What did not pay is written here, so that it can be
measured again: rotations, activation-aware scales, weighted scale search, refits and sweeps.

    y = W x = (W A)(B x),   A B = 1

A rotation has A = R, B = R^T with R of Hadamard blocks; activation-aware scales (Lin et al., arXiv 2306.00978) have
A = diag(s), B = diag(1 / s). Rounding then happens to W A, on inputs B x.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from salalocal.kernels.column_walk import MAX_COLUMNS, column_walk
from salalocal.quant.codebook import CODEBOOKS, CodebookScheme, round_to_codebook
from salalocal.quant.gptq import DEFAULT_DAMPING, Feedback, make_feedback, round_with_feedback
from salalocal.quant.int4 import IntScheme, IntWeight
from salalocal.quant.rounding import round_to_nearest

QKV, OUT, GATE_UP, DOWN = "self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"
ALL_INPUTS = (QKV, OUT, GATE_UP, DOWN)
SENSITIVE = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")

_POWERS = (0.0, 0.25, 0.5, 0.75)
_INT8_GROUP = 128
_MOST_CLIPPED = 0.5


@dataclass(frozen=True)
class Variant:
    """One way to quantize a model. Inputs are named after the map that `calibration.INPUT_OF` points to.

    `order`: "block" measures all inputs of a block before any of its maps is rounded, "stages" measures each behind
    the rounded ones. `drift`: the original inputs are those of the original "model", or of this "block" with its
    original weights behind the quantized prefix, or not used. `scale_search` is weighted by nothing, by the "moments"
    or by the "feedback". `activations`: int8 per "token", or per "group" of 128 features of a token.
    """

    name: str
    method: str = "gptq"
    bits: int = 4
    group_size: int = 128
    sensitive_bits: int = 4
    order: str = "stages"
    drift: str | None = None
    damping: float = DEFAULT_DAMPING
    scale_search: str | None = None
    num_sweeps: int = 0
    num_refits: int = 0
    rotated: tuple[str, ...] = ()
    is_activation_aware: bool = False
    activations: str | None = None
    activation_inputs: tuple[str, ...] = ALL_INPUTS
    rotated_activations: tuple[str, ...] = ()
    counts_flips: bool = False

    @property
    def needs_inputs(self) -> bool:
        """Whether it is calibrated."""
        return self.method == "gptq" or self.is_activation_aware

    @property
    def is_plain(self) -> bool:
        """Whether the code of the product does the rounding."""
        return self.scale_search == "feedback" and not (self.num_sweeps or self.num_refits)


class InputMoments(NamedTuple):
    """What is known of the inputs x of some maps. Shapes: float64 [in, in]; cross is the mean of o x^T, see `gptq`."""

    moments: Tensor
    cross: Tensor | None = None


class Basis(NamedTuple):
    """A and B of the formula above. Shapes: float64 [in, in] each."""

    into: Tensor
    back: Tensor


def hadamard_basis(size: int) -> Basis:
    """A rotation of Hadamard blocks, the largest power of two that divides `size`."""
    block_size = size & -size
    block = torch.ones(1, 1, dtype=torch.float64)
    while len(block) < block_size:
        block = torch.cat([torch.cat([block, block], 1), torch.cat([block, -block], 1)])
    rotation = torch.block_diag(*[block / math.sqrt(block_size)] * (size // block_size))
    return Basis(rotation, rotation.t())


def activation_aware_basis(weights: list[Tensor], moments: Tensor, scheme: IntScheme) -> Basis:
    """Scales s = rms(x)^power for maps that share inputs, with the power that leaves the least output error."""
    sizes = moments.diagonal().sqrt().clamp_min(1e-9)
    found, least = torch.ones_like(sizes), math.inf
    for power in _POWERS:
        scales = sizes**power
        scales = scales / (scales.max() * scales.min()).sqrt()
        lost = 0.0
        for weight in weights:
            rounded = round_to_nearest(weight * scales.float(), scheme, torch.bfloat16).dequantize() / scales.float()
            lost += output_error(weight, rounded, moments)
        if lost < least:
            found, least = scales, lost
    return Basis(found.diag(), (1 / found).diag())


def quantize_maps(
    variant: Variant, name: str, weights: dict[str, Tensor], known: InputMoments, is_sparse: bool
) -> dict[str, Tensor]:
    """The weights that are left of maps that share the inputs `name`, of a sparse layer or not.

    Shapes: [out, in] float32 each, by the name of the map in its block.
    """
    basis = None
    if variant.is_activation_aware:
        scheme = IntScheme(variant.bits, variant.group_size)
        basis = activation_aware_basis(list(weights.values()), known.moments, scheme)
    elif name in variant.rotated:
        basis = hadamard_basis(len(known.moments))
    if basis is not None:
        known = InputMoments(*(basis.back @ x @ basis.back.t() for x in known if x is not None))
    feedback = make_feedback(known.moments, variant.damping, known.cross) if variant.method == "gptq" else None
    left = {}
    for leaf, weight in weights.items():
        changed = weight if basis is None else (weight.double() @ basis.into).float()
        rounded = _round(variant, changed, known.moments, feedback, bits_of(variant, leaf, is_sparse))
        left[leaf] = rounded if basis is None else (rounded.double() @ basis.back).float()
    return left


def bits_of(variant: Variant, leaf: str, is_sparse: bool) -> int:
    """The bits of a map by its name in the block; q, k and v of the sparse layers choose blocks."""
    return variant.sensitive_bits if is_sparse and leaf in SENSITIVE else variant.bits


def round_alone(variant: Variant, weight: Tensor, bits: int) -> Tensor:
    """The weights that are left by a method that knows nothing of inputs."""
    if variant.method == "none":
        return weight
    if variant.method in CODEBOOKS:
        return round_to_codebook(weight, CodebookScheme(variant.method), torch.bfloat16).dequantize()
    return round_to_nearest(weight, IntScheme(bits, variant.group_size), torch.bfloat16).dequantize()


def output_error(weight: Tensor, rounded: Tensor, moments: Tensor) -> float:
    """Mean square of what the outputs lose, over all rows together."""
    difference = (weight - rounded).double()
    return float(((difference @ moments) * difference).sum())


def simulate_int8(x: Tensor, group_size: int | None) -> Tensor:
    """Symmetric int8 with one scale a token, or one a group of its features. Shapes: [..., in]."""
    parts = x if group_size is None else x.unflatten(-1, (-1, min(group_size, x.shape[-1])))
    scales = parts.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 127
    return (torch.round(parts / scales) * scales).reshape(x.shape)


class SimulatedLinear(nn.Module):
    """y = W x with x in int8 and back, in another basis if asked for. Shapes: weight [out, in]."""

    def __init__(self, in_features: int, out_features: int, group_size: int | None, is_rotated: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device="meta"))
        self._group_size = group_size
        self._rotation = hadamard_basis(in_features).into.float() if is_rotated else None

    def forward(self, x: Tensor) -> Tensor:
        if self._rotation is None:
            return functional.linear(simulate_int8(x, self._group_size), self.weight)
        turned = simulate_int8(x @ self._rotation, self._group_size)
        return functional.linear(turned @ self._rotation.t(), self.weight)


def int8_group_size(variant: Variant) -> int | None:
    """The features that share a scale, None for all of a token."""
    return _INT8_GROUP if variant.activations == "group" else None


def _round(variant: Variant, weight: Tensor, moments: Tensor, feedback: Feedback | None, bits: int) -> Tensor:
    if feedback is None:
        return round_alone(variant, weight, bits)
    scheme = IntScheme(bits, variant.group_size)
    if variant.is_plain:
        return round_with_feedback(weight, feedback, scheme, torch.bfloat16).dequantize()
    target = weight if feedback.drift is None else weight + weight @ feedback.drift
    damped = moments.clone()
    damped.diagonal().add_(variant.damping * float(moments.diagonal().mean()))
    scales = _search_scales(target, scheme, _importance(variant, damped, feedback))
    codes = _walk(target, scales, feedback, scheme)
    for _ in range(variant.num_refits):
        scales = _refit(target, codes, scales, damped, scheme)
        codes = _sweep(target, codes, scales, damped, scheme, feedback.order)
    for _ in range(variant.num_sweeps):
        codes = _sweep(target, codes, scales, damped, scheme, feedback.order)
    return IntWeight(codes, scales, bits, scheme.group_size).dequantize()


def _importance(variant: Variant, moments: Tensor, feedback: Feedback) -> Tensor:
    """What an error of a weight costs: alone (moments), or after the later columns have made up for it (feedback)."""
    if variant.scale_search == "moments":
        return moments.diagonal().float()
    importance = torch.ones(len(moments))
    if variant.scale_search == "feedback":
        importance[feedback.order] = feedback.factor.diagonal() ** -2
    return importance


def _search_scales(weight: Tensor, scheme: IntScheme, importance: Tensor) -> Tensor:
    groups = weight.unflatten(1, (-1, min(scheme.group_size, weight.shape[1])))
    cost = importance.view(1, *groups.shape[1:])
    zero = 2 ** (scheme.bits - 1)
    widest = (groups.abs().amax(2) / (zero - 1)).clamp_min(1e-30)
    best, least = widest.bfloat16(), torch.full_like(widest, math.inf)
    for step in range(51):
        scales = (widest * (1 - (1 - _MOST_CLIPPED) * step / 50)).bfloat16()
        wide = scales.float()[..., None]
        lost = ((torch.round(groups / wide).clamp_(-zero, zero - 1) * wide - groups).square() * cost).sum(2)
        is_better = lost < least
        best, least = torch.where(is_better, scales, best), torch.where(is_better, lost, least)
    return best


def _walk(target: Tensor, scales: Tensor, feedback: Feedback, scheme: IntScheme) -> Tensor:
    of_column, rest = scales.float()[:, feedback.order // scheme.group_size], target[:, feedback.order]
    codes = torch.empty_like(rest, dtype=torch.uint8)
    for start in range(0, rest.shape[1], MAX_COLUMNS):
        part = slice(start, start + MAX_COLUMNS)
        factor = feedback.factor[part]
        walked, errors = column_walk(rest[:, part], factor[:, part], of_column[:, part], scheme.bits)
        codes[:, part] = walked
        rest[:, start + MAX_COLUMNS :] -= errors @ factor[:, start + MAX_COLUMNS :]
    return codes[:, torch.argsort(feedback.order)]


def _refit(target: Tensor, codes: Tensor, scales: Tensor, moments: Tensor, scheme: IntScheme) -> Tensor:
    """The scales of least output error for these codes: G unknowns a row."""
    num_out, num_in = target.shape
    centred = (codes.double() - 2 ** (scheme.bits - 1)).view(num_out, -1, scheme.group_size)
    spread = torch.diag_embed(torch.ones(centred.shape[1], dtype=torch.float64))[None, :, :, None] * centred[:, None]
    spread = spread.view(num_out, -1, num_in)  # a row for every group, zeros outside of it
    weighted = spread @ moments
    matrix, right = weighted @ spread.transpose(1, 2), (weighted @ target.double()[..., None])[..., 0]
    matrix += 1e-6 * matrix.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(matrix.shape[1])
    found, before = torch.linalg.solve(matrix, right).float(), scales.float()
    return torch.where((found > 0.5 * before) & (found < 2 * before), found, before).bfloat16()


def _sweep(target: Tensor, codes: Tensor, scales: Tensor, moments: Tensor, scheme: IntScheme, order: Tensor) -> Tensor:
    """Every code once more, the best one given all others. Source: Behdin et al., arXiv 2309.01885."""
    zero, wide = 2 ** (scheme.bits - 1), moments.float()
    of_column = scales.float().repeat_interleave(scheme.group_size, 1)
    rounded = (codes.float() - zero) * of_column
    gradient = (target - rounded) @ wide
    for column in order.tolist():
        scale = of_column[:, column]
        wanted = (rounded[:, column] + gradient[:, column] / wide[column, column]) / scale
        change = torch.round(wanted).clamp_(-zero, zero - 1) * scale - rounded[:, column]
        gradient.addr_(change, wide[column], alpha=-1.0)
        rounded[:, column] += change
    return (torch.round(rounded / of_column) + zero).to(torch.uint8)
