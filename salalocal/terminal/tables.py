"""Tables and JSON documents: token reports, memory plans and answers go in, lines or plain data come out; for cli."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from salalocal.engine.budget import MemoryPlan
from salalocal.prompt.visible import visible_name
from salalocal.session.plan import PlanReport, short_tokens
from salalocal.session.tokens import DocumentTokens, TokenReport

if TYPE_CHECKING:
    from salalocal.chat.questions import Answer

GIB = 2**30


def size(num_bytes: int) -> str:
    """Bytes for people: `812 KiB`, `1.2 GiB`."""
    amount = float(num_bytes)
    for unit in ("bytes", "KiB", "MiB", "GiB", "TiB"):
        if amount < 1024 or unit == "TiB":
            break
        amount /= 1024
    return f"{amount:.0f} {unit}" if amount >= 99.5 or unit == "bytes" else f"{amount:.1f} {unit}"


def token_lines(report: TokenReport) -> Iterator[str]:
    """The documents as a tree with their tokens, the sum, and what was skipped and why."""
    rows = [*_tree(report.documents), (report.other_tokens, "(prompt frame and conversation)")]
    rows.append((report.total_tokens, f"in all, {report.num_files}"))
    width = max(len(f"{tokens:,}") for tokens, _ in rows)
    for tokens, name in rows:
        yield f"{tokens:>{width},}  {name}"
    if report.context_limit is not None:
        yield f"{report.context_limit:>{width},}  is what the context holds"
    yield from report.notes
    for skip in report.skips:
        yield f"skipped {_name(skip.path)}: {skip.reason}"


def largest_lines(report: TokenReport, count: int) -> Iterator[str]:
    """The documents with the most tokens, and the sum."""
    shown = report.largest(count)
    width = len(f"{report.total_tokens:,}")
    for document in shown:
        yield f"{document.tokens:>{width},}  {_name(document.path)}"
    left = len(report.documents) - len(shown)
    if left:
        rest = report.document_tokens - sum(document.tokens for document in shown)
        yield f"{rest:>{width},}  {left:,} smaller files"
    yield f"{report.total_tokens:,}  in all"


def _tree(documents: Sequence[DocumentTokens]) -> Iterator[tuple[int, str]]:
    """Folders with their sums, then what they hold, indented; documents keep their order of first appearance."""
    root: dict[str, Any] = {}
    for number, document in enumerate(documents):
        *folders, name = document.path.split("/")
        node = root
        for folder in folders:
            node = node.setdefault(f"{folder}/", {})
        node[f"{name}\0{number}"] = document
    yield from _tree_rows(root, "")


def _tree_rows(node: dict[str, Any], indent: str) -> Iterator[tuple[int, str]]:
    for key, value in node.items():
        if isinstance(value, DocumentTokens):
            notes = f"  ({'; '.join(value.notes)})" if value.notes else ""
            yield value.tokens, f"{indent}{_name(key.partition(chr(0))[0])}{notes}"
        else:
            yield _sum_tokens(value), f"{indent}{_name(key)}"
            yield from _tree_rows(value, indent + "  ")


def _sum_tokens(node: dict[str, Any]) -> int:
    return sum(value.tokens if isinstance(value, DocumentTokens) else _sum_tokens(value) for value in node.values())


def _name(name: str) -> str:
    """A name as it is if it is plain, else quoted with its unseen characters spelled out."""
    shown = visible_name(name)
    return shown if shown == name and name == name.strip() and "  " not in name else f'"{shown}"'


def tokens_json(report: TokenReport, model: str) -> dict[str, Any]:
    """The token report as plain data."""
    return {
        "model": model,
        "total_tokens": report.total_tokens,
        "document_tokens": report.document_tokens,
        "other_tokens": report.other_tokens,
        "files": files_json(report),
        "skips": [asdict(skip) for skip in report.skips],
        "notes": list(report.notes),
    }


def files_json(report: TokenReport) -> list[dict[str, Any]]:
    """The documents of a report as plain data."""
    return [
        {"path": document.path, "tokens": document.tokens, "bytes": document.num_bytes, "notes": list(document.notes)}
        for document in report.documents
    ]


def answers_json(answers: Sequence["Answer"], is_list: bool) -> dict[str, Any]:
    """Answers as plain data: the one answer at the top, or a list of them."""
    return {"answers": [_answer_json(answer) for answer in answers]} if is_list else _answer_json(answers[0])


def _answer_json(answer: "Answer") -> dict[str, Any]:
    usage = {**asdict(answer.finish.usage), "new_tokens": answer.finish.usage.new_tokens}
    sources = [asdict(source) for source in answer.sources]
    answered = {"question": answer.question, "answer": answer.text, "reason": answer.finish.reason}
    return {**answered, "usage": usage, "sources": sources}


def plan_lines(report: PlanReport) -> Iterator[str]:
    """The memory table: one line per context length, GiB by part, and whether it fits."""
    request = report.request
    is_on_host = request.options.is_kv_on_host
    yield (
        f"{request.model}: weights {request.options.weights.value}, cache {request.options.cache.value}"
        f"{' in host memory' if is_on_host else ''}, {request.memory_bytes / GIB:.2f} GiB of memory"
    )
    yield ""
    yield (
        f"{'context':>9} {'weights':>8} {'cache':>7} {'states':>7} {'work':>6} {'total':>7}  "
        f"{'GiB        on host' if is_on_host else 'GiB'}"
    )
    for plan in report.plans:
        verdict = "fits" if request.holds(plan) else "too large"
        mark = "*" if plan.num_tokens == request.ctx else " "
        last = f"{verdict:<9}  {plan.host_bytes / GIB:>7.2f}" if is_on_host else verdict
        yield f"{short_tokens(plan.num_tokens):>8}{mark} {_plan_figures(plan)}  {last}"
    yield ""
    if request.ctx is not None:
        yield f"* asked: {request.ctx:,} tokens"
    yield from _plan_verdict(report)


def _plan_figures(plan: MemoryPlan) -> str:
    work = plan.total_bytes - plan.weight_bytes - plan.state_bytes
    states = plan.state_bytes - plan.cache_bytes
    parts = ((plan.weight_bytes, 8), (plan.cache_bytes, 7), (states, 7), (work, 6), (plan.total_bytes, 7))
    return " ".join(f"{part / GIB:>{width}.2f}" for part, width in parts)


def _plan_verdict(report: PlanReport) -> Iterator[str]:
    if report.longest_tokens:
        yield f"longest context that fits: {report.longest_tokens:,} tokens"
    else:
        yield "no context fits: the weights alone are too large"
    if report.max_tokens is not None:
        yield f"the model was made for contexts of up to {report.max_tokens:,} tokens"


def plan_refusal(report: PlanReport) -> str:
    """One line that says why the asked context does not fit."""
    request = report.request
    what = f"a context of {request.ctx:,} tokens" if request.ctx else "no context of any length"
    tokens = request.ctx or 1
    plan = next((plan for plan in report.plans if plan.num_tokens >= tokens), None)
    needed, memory = (plan.total_bytes if plan else 0), f"{request.memory_bytes / GIB:.2f} GiB"
    if plan is not None and request.host_bytes is not None and needed <= request.memory_bytes:
        needed, memory = plan.host_bytes, f"{request.host_bytes / GIB:.2f} GiB of host memory that may be locked"
    verb = "does not fit" if request.ctx else "fits"
    return (
        f"{what} {verb} in {memory}: {request.model} needs {needed / GIB:.2f} GiB"
        f"{' for ' + short_tokens(tokens) if request.ctx else ' at least'}"
    )


def plan_json(report: PlanReport) -> dict[str, Any]:
    """The memory plan as plain data."""
    request = report.request
    return {
        "model": request.model,
        "weights": request.options.weights.value,
        "kv_cache": request.options.cache.value,
        "kv_place": "host" if request.options.is_kv_on_host else "card",
        "memory_bytes": request.memory_bytes,
        "ctx": request.ctx,
        "fits": report.fits,
        "longest_context_tokens": report.longest_tokens,
        "max_position_embeddings": report.max_tokens,
        "plans": [
            {**asdict(plan), "total_bytes": plan.total_bytes, "fits": request.holds(plan)} for plan in report.plans
        ],
        "alternatives": list(report.alternatives),
    }
