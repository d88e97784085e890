"""The packed corpus as token ids by line.

In: training/data/corpus.jsonl.gz and the tokenizer. Out: `Corpus`: packages of `SourceFile`s whose lines have text and
ids. For: training/archive.py.
"""

import gzip
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from training.facts import Fact, facts_of

HERE = Path(__file__).parent
CORPUS = HERE / "data" / "corpus.jsonl.gz"
TOKENIZER = HERE.parent / "salalocal" / "builtin" / "tokenizer.json"
LINE = re.compile(r"[^\n]*\n+|[^\n]+\Z")


@dataclass
class SourceFile:
    """One file: `lines` keep their trailing newlines; line i has the ids `ids[starts[i]:starts[i + 1]]`."""

    path: str
    lines: list[str]
    ids: np.ndarray
    starts: np.ndarray
    _facts: list[Fact] | None = field(default=None, repr=False)

    @property
    def facts(self) -> list[Fact]:
        """What can be asked about this file, found once."""
        if self._facts is None:
            self._facts = facts_of(self.path, self.lines)
        return self._facts


class Corpus:
    """Files of one split, grouped by package."""

    def __init__(self, packages: dict[str, list[SourceFile]], tokenizer: Tokenizer):
        self.packages = {name: files for name, files in packages.items() if len(files) >= 8}
        self.names = sorted(self.packages)
        weights = np.array([sum(len(f.ids) for f in self.packages[n]) for n in self.names], dtype=np.float64)
        self.weights = np.sqrt(weights) / np.sqrt(weights).sum()
        self.tokenizer = tokenizer
        self.num_tokens = int(weights.sum())

    @classmethod
    def load(cls, split: str, limit_bytes: int | None = None, every: int = 1) -> "Corpus":
        """Reads and encodes one split ("train" or "heldout"), of it the files whose number divides by `every`;
        `limit_bytes` keeps tests and dry runs short.
        """
        tokenizer = Tokenizer.from_file(str(TOKENIZER))
        records, used = [], 0
        with gzip.open(CORPUS, "rt") as rows:
            for number, row in enumerate(rows):
                if number % every:
                    continue
                record = json.loads(row)
                if record["split"] != split:
                    continue
                record["text"] = record["text"].lstrip("\n")
                records.append(record)
                used += len(record["text"])
                if limit_bytes is not None and used > limit_bytes:
                    break
        newline = newline_table(tokenizer)
        packages: dict[str, list[SourceFile]] = {}
        encoded = tokenizer.encode_batch_fast([r["text"] for r in records], add_special_tokens=False)
        for record, encoding in zip(records, encoded, strict=True):
            ids = np.array(encoding.ids, dtype=np.uint16)
            lines = LINE.findall(record["text"])
            is_newline = newline[ids]
            ends = np.flatnonzero(is_newline[:-1] & ~is_newline[1:]) + 1
            starts = np.concatenate([[0], ends, [len(ids)]])
            if len(starts) - 1 == len(lines):
                packages.setdefault(record["package"], []).append(SourceFile(record["path"], lines, ids, starts))
        return cls(packages, tokenizer)


def newline_table(tokenizer: Tokenizer) -> np.ndarray:
    """For each id: does its piece consist of newlines?"""
    table = np.zeros(65536, dtype=bool)
    for piece, number in tokenizer.get_vocab().items():
        table[number] = set(piece) == {"Ċ"}
    return table
