"""The log of a run as a narrow table, to see at a glance whether to go on.

In: a folder of training/train.py, or its log.jsonl. Out: lines of at most 200 characters. For: reading a run while it
is under way. Run: `python -m training.curve training/runs/v2`.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

COLUMNS = {
    "step": "step",
    "done": "done",
    "length": "length",
    "rate": "rate",
    "ktok_s": "ktok/s",
    "wait": "wait",
    "peak_gb": "GB",
    "answer": "answer",
    "text": "text",
    "header": "header",
    "hop": "hop",
    "copy": "copy",
    "knows_own": "own",
    "knows_asked": "asked",
    "=where": "=where",
    "=twin": "=twin",
    "=value": "=value",
    "=missing": "=missing",
}


def lines(rows: list[dict[str, Any]], num_rows: int) -> Iterator[str]:
    """Some rows of the curve, evenly spread, with everything that is not one in between."""
    curve = [row for row in rows if "rate" in row]
    every = max(1, len(curve) // num_rows)
    chosen = {id(row) for row in [*curve[::-1][::every]]}
    yield " ".join(f"{title:>8}" for title in COLUMNS.values())
    for row in rows:
        if "rate" not in row:
            yield " ".join(f"{name}: {value}" for name, value in row.items())
        elif id(row) in chosen:
            yield " ".join(f"{row.get(name, ''):>8}" for name in COLUMNS)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log", type=Path)
    parser.add_argument("--rows", type=int, default=24)
    arguments = parser.parse_args()
    path = arguments.log / "log.jsonl" if arguments.log.is_dir() else arguments.log
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    print("\n".join(lines(rows, arguments.rows)))


if __name__ == "__main__":
    main()
