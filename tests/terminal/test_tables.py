"""Trees, tables and JSON documents."""

import json
import re

import pytest

from salalocal.chat.questions import Answer
from salalocal.engine.budget import CacheFormat, PlanOptions, WeightFormat
from salalocal.model.config import SalaConfig
from salalocal.prompt.sources import Skip
from salalocal.session.attribution import Source
from salalocal.session.events import Finish, Usage
from salalocal.session.plan import PlanRequest, make_plan
from salalocal.session.tokens import DocumentTokens, TokenReport
from salalocal.terminal.tables import (
    answers_json,
    plan_json,
    plan_lines,
    plan_refusal,
    size,
    token_lines,
    tokens_json,
)

REPORT = TokenReport(
    documents=(
        DocumentTokens("README.md", 1200, 5000),
        DocumentTokens("src/a.py", 30, 100, ("decoded as cp1251",)),
        DocumentTokens("docs/x.md", 7, 20),
        DocumentTokens("src/deep/b\x1b.py", 5, 20),
        DocumentTokens("src", 1, 1),
    ),
    other_tokens=9,
    skips=(Skip("blob.bin", "binary"),),
    notes=("a note",),
    context_limit=5000,
)


def test_a_tree_with_sums() -> None:
    assert list(token_lines(REPORT)) == [
        "1,200  README.md",
        "   35  src/",
        "   30    a.py  (decoded as cp1251)",
        "    5    deep/",
        '    5      "b\\x1b.py"',
        "    7  docs/",
        "    7    x.md",
        "    1  src",
        "    9  (prompt frame and conversation)",
        "1,252  in all, 5 files",
        "5,000  is what the context holds",
        "a note",
        "skipped blob.bin: binary",
    ]


def test_json_says_the_same() -> None:
    document = json.loads(json.dumps(tokens_json(REPORT, "tiny")))
    assert document["total_tokens"] == 1252 == document["document_tokens"] + document["other_tokens"]
    assert document["files"][1] == {"path": "src/a.py", "tokens": 30, "bytes": 100, "notes": ["decoded as cp1251"]}
    assert document["skips"] == [{"path": "blob.bin", "reason": "binary"}] and document["model"] == "tiny"


def test_answers() -> None:
    sources = (Source("a.py", 3, 5, 0.25),)
    answer = Answer("what?", "it", Finish("stop", Usage(10, 4, 2, 0, 1.0, 1.0, 7)), sources)
    one = answers_json([answer], is_list=False)
    assert one["sources"] == [{"path": "a.py", "first_line": 3, "last_line": 5, "share": 0.25}]
    assert (one["answer"], one["reason"], one["usage"]["new_tokens"]) == ("it", "stop", 6)
    assert answers_json([answer, answer], is_list=True) == {"answers": [one, one]}


def report(ctx: int | None, gib: int) -> object:
    return make_plan(SalaConfig.released(), PlanRequest("m", ctx, gib * 2**30, PlanOptions()))


def test_a_plan_fits_a_narrow_terminal_and_marks_what_was_asked() -> None:
    lines = list(plan_lines(report(100_000, 19)))  # type: ignore[arg-type]
    assert all(len(line) <= 60 for line in lines if "GiB of memory" not in line)
    assert next(line for line in lines if "*" in line).strip().startswith("100000*")
    assert any(line.endswith("fits") for line in lines) and any(line.endswith("too large") for line in lines)
    assert any(line.startswith("longest context that fits: ") for line in lines)


def test_a_plan_with_host_memory_keeps_its_columns() -> None:
    options = PlanOptions(WeightFormat.INT4, CacheFormat.BF16, is_kv_on_host=True)
    wanted = PlanRequest("m", 2**20, 8 * 2**30, options, host_bytes=4 * 2**30)
    lines = list(plan_lines(make_plan(SalaConfig.released(), wanted)))
    first = lines.index("") + 1
    head, *rows = lines[first : lines.index("", first)]
    verdict_at, host_at = head.index("GiB"), head.index("on host")
    assert {row[verdict_at : verdict_at + 9].strip() for row in rows} == {"fits", "too large"}
    for row in rows:
        assert len(row) == len(head) <= 80 and float(row[host_at:]) > 0 and row[verdict_at + 9 : host_at].strip() == ""
        for word in list(re.finditer(r"\S+", head))[1:6]:
            assert row[word.end() - 1 : word.end() + 1] in [f"{digit} " for digit in range(10)]


def test_a_refusal_has_the_figures() -> None:
    assert plan_refusal(report(2**20, 16)) == (  # type: ignore[arg-type]
        "a context of 1,048,576 tokens does not fit in 16.00 GiB: m needs 26.41 GiB for 1m"
    )
    assert "no context of any length fits in 4.00 GiB" in plan_refusal(report(None, 4))  # type: ignore[arg-type]
    lines = list(plan_lines(report(None, 4)))  # type: ignore[arg-type]
    assert "no context fits: the weights alone are too large" in lines


def test_a_refusal_names_the_memory_that_is_short() -> None:
    options = PlanOptions(WeightFormat.INT4, CacheFormat.INT8, is_kv_on_host=True)
    wanted = PlanRequest("m", 2**21, 8 * 2**30, options, host_bytes=4 * 2**30)
    assert plan_refusal(make_plan(SalaConfig.released(), wanted)) == (
        "a context of 2,097,152 tokens does not fit in 4.00 GiB of host memory that may be locked: m needs 8.69 GiB "
        "for 2m"
    )


def test_a_plan_as_json() -> None:
    document = json.loads(json.dumps(plan_json(report(2**20, 24))))  # type: ignore[arg-type]
    assert document["fits"] is False and document["alternatives"] and document["ctx"] == 2**20
    assert all(plan["total_bytes"] > plan["weight_bytes"] for plan in document["plans"])


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (1024, "1.0 KiB"), (300 * 2**20, "300 MiB"), (int(1.25 * 2**30), "1.2 GiB")],
)
def test_sizes(num_bytes: int, text: str) -> None:
    assert size(num_bytes) == text
