"""The variants of the quantization study, and the table that its figures make; for `quantization_study`."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from benchmarks.study_variants import ALL_INPUTS, DOWN, GATE_UP, OUT, QKV, Variant

_BF16 = Variant("bf16", "none")
_BLOCKWISE = Variant("GPTQ, block by block", order="block")
_STAGED = Variant("GPTQ, in stages")
_BEST = Variant("GPTQ, in stages, drift of the model", drift="model", counts_flips=True)


def _of(base: Variant, name: str, **changes: Any) -> Variant:
    return replace(base, name=name, counts_flips=False, **changes)


VARIANTS = (
    _BF16,
    Variant("RTN", "rtn"),
    Variant("NF4", "nf4"),
    Variant("FP4", "fp4"),
    _BLOCKWISE,
    _STAGED,
    _BEST,
    # Which part of the new form pays.
    _of(_BLOCKWISE, "GPTQ, block by block, drift of the model", drift="model"),
    _of(_STAGED, "GPTQ, in stages, drift of the block", drift="block"),
    # Size against quality.
    *(_of(_BEST, f"best, groups of {size}", group_size=size) for size in (64, 32)),
    _of(_BEST, "best, q/k/v of sparse layers in 8 bits", sensitive_bits=8),
    _of(_BEST, "best, groups of 64, q/k/v of sparse layers in 8 bits", group_size=64, sensitive_bits=8),
    _of(_BEST, "best, groups of 32, q/k/v of sparse layers in 8 bits", group_size=32, sensitive_bits=8),
    _of(_BEST, "best, 8 bits", bits=8, sensitive_bits=8),
    *(Variant(f"RTN, groups of {size}", "rtn", group_size=size) for size in (64, 32)),
    # Other ideas, each on top of the best.
    *(_of(_BEST, f"best, damping {damping}", damping=damping) for damping in (0.001, 0.05)),
    _of(_BEST, "best, scale search weighted by moments", scale_search="moments"),
    _of(_BEST, "best, scale search weighted by feedback", scale_search="feedback"),
    _of(_BEST, "best, weighted by feedback, two refits and sweeps", scale_search="feedback", num_refits=2),
    _of(_BEST, "best, four sweeps", num_sweeps=4),
    # Rotation and activation-aware scales at 4 bits.
    _of(_BEST, "best, o_proj and down_proj rotated", rotated=(OUT, DOWN)),
    _of(_BEST, "best, all rotated", rotated=ALL_INPUTS),
    _of(_BEST, "best, activation-aware", is_activation_aware=True),
    Variant("RTN, activation-aware", "rtn", is_activation_aware=True),
    # int8 activations, first with original weights: which inputs, and what helps.
    *(
        _of(_BF16, f"bf16, int8 inputs of {name} by token", activations="token", activation_inputs=inputs)
        for name, inputs in (("q/k/v", (QKV,)), ("o_proj", (OUT,)), ("gate/up", (GATE_UP,)), ("down_proj", (DOWN,)))
    ),
    _of(_BF16, "bf16, int8 by token", activations="token"),
    _of(_BF16, "bf16, int8 by group", activations="group"),
    _of(_BF16, "bf16, int8 by token, o_proj, down_proj rotated", activations="token", rotated_activations=(OUT, DOWN)),
    _of(_BF16, "bf16, int8 by token, all rotated", activations="token", rotated_activations=ALL_INPUTS),
    _of(_BEST, "best, int8 by token", activations="token"),
    _of(_BEST, "best, int8 by group", activations="group"),
    _of(_BEST, "best, int8 by token, o_proj, down_proj rotated", activations="token", rotated_activations=(OUT, DOWN)),
)


def as_table(record: Mapping[str, Any]) -> str:
    """All that has been measured, in Markdown."""
    rows = record["variants"]
    lines = ["| variant | bits | perplexity | change | KL mean | KL p99 | top-1 |", "|---|---|---|---|---|---|---|"]
    for variant in VARIANTS:
        if variant.name in rows:
            lines.append(_line(variant.name, rows[variant.name]))
    for name, row in rows.items():
        if "flips_near_ties" in row:
            lines += ["", _flips_line(name, row)]
    for title, errors in record.get("matrices", {}).items():
        lines += ["", f"{title}: relative output error", "", "| method | error |", "|---|---|"]
        lines += [f"| {name} | {error:.4f} |" for name, error in errors.items()]
    return "\n".join(lines)


def _line(name: str, row: Mapping[str, Any]) -> str:
    change = row["perplexity_quantized"] / row["perplexity_original"] - 1
    return (
        f"| {name} | {row['bits_per_weight']:.3f} | {row['perplexity_quantized']:.3f} | {change:+.2%} | "
        f"{row['kl_mean_nats']:.4f} | {row['kl_p99_nats']:.3f} | {row['top1_agreement']:.2%} |"
    )


def _flips_line(name: str, row: Mapping[str, Any]) -> str:
    return (
        f"{name}: {row['flips_near_ties']:.1%} of the flips are near ties (the original's two likeliest within "
        f"{row['near_tie_nats']} nats; {row['near_ties']:.1%} of all tokens are), median margin at a flip "
        f"{row['median_margin_of_flips_nats']:.3f} nats; top-1 agreement elsewhere "
        f"{row['top1_agreement_without_near_ties']:.2%}"
    )
