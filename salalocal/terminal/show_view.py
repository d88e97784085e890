"""All about one model as lines and as plain data; for `show`."""

import textwrap
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from salalocal.model.config import LIGHTNING, SPARSE
from salalocal.session.showing import ModelReport
from salalocal.terminal.eval_view import divergence_lines
from salalocal.terminal.model_views import context_text, model_json
from salalocal.terminal.tables import GIB, size

_LABEL = 12
_KINDS = 7


def show_lines(report: ModelReport, width: int) -> Iterator[str]:
    """Shape, tensors by scheme, licence, what quantizing cost, and what fits here."""
    entry, config = report.entry, report.config
    sparse, lightning = config.mixer_types.count(SPARSE), config.mixer_types.count(LIGHTNING)
    yield _row("model", entry.name)
    yield _row("folder", str(entry.folder.path))
    if report.commit is not None:
        yield _row("commit", report.commit)
    yield _row("parameters", f"{config.num_parameters / 1e6:,.1f} M")
    yield _row("layers", f"{sparse} sparse, {lightning} lightning")
    yield _row("width", f"{config.hidden_size:,}, vocabulary {config.vocab_size:,}")
    if config.max_position_embeddings is not None:
        yield _row("made for", f"{config.max_position_embeddings:,} tokens")
    yield _row("licence", report.licence or "not stated in the folder")
    yield ""
    for total in report.schemes:
        yield f"{total.num_tensors:>5}  {size(total.num_bytes):>9}  {total.scheme}"
        yield from textwrap.wrap(
            ", ".join(total.kinds), max(width, 2 * _KINDS), initial_indent=" " * _KINDS, subsequent_indent=" " * _KINDS
        )
    quality = (report.card or {}).get("quality")
    if isinstance(quality, dict):
        yield ""
        yield "against its original:"
        yield from divergence_lines(quality)
    yield ""
    yield f"on {report.device}, {report.free_bytes / GIB:.1f} GiB free:"
    for plan in report.plans:
        verdict = "fits" if plan.total_bytes <= report.free_bytes else "too large"
        yield f"{plan.num_tokens:>9,} tokens {plan.total_bytes / GIB:>7.2f} GiB  {verdict}"
    yield f"longest context that fits: {context_text(report.longest_tokens)}"


def show_json(report: ModelReport) -> dict[str, Any]:
    """The same as plain data."""
    return {
        **model_json(report.entry),
        "longest_context_tokens": report.longest_tokens,
        "commit": report.commit,
        "licence": report.licence,
        "layers": list(report.config.mixer_types),
        "max_position_embeddings": report.config.max_position_embeddings,
        "schemes": [asdict(total) for total in report.schemes],
        "card": report.card,
        "device": report.device,
        "free_bytes": report.free_bytes,
        "plans": [{**asdict(plan), "total_bytes": plan.total_bytes} for plan in report.plans],
    }


def _row(label: str, value: str) -> str:
    return f"{label:<{_LABEL}} {value}"
