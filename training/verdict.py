"""Whether new weights are better than old ones: the cells of `training/evaluate.py` by teacher forcing, and perplexity.

In: folders that training can restore, the old weights first. Out: right answers by length and kind, paired differences
with their standard errors, perplexity of the shipped evaluation text, and what follows from them. For: deciding what
ships, on the machine that trained, in a minute or two. Run:

    python -m training.verdict salalocal/builtin training/runs/v2 --ctx 4k,8k,16k --questions 200 --out verdict.json

The archives and questions are those of `training/evaluate.py`, letter by letter; an answer is right if every id of it
is the likeliest one, which is what greedy decoding gives, up to rounding: the products are those of the training
forward in fp32, the runtime's are those of its weight format.

The rule, made before the run: new weights ship if (1) of all questions together more are right, by more than the
standard error of the paired difference, (2) no length has fewer right by more than that length's standard error, (3) 80
% of the names that are not there are denied, and (4) perplexity rises by less than 2 %.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer as Pieces

from salalocal.prompt.template import ChatTemplate
from salalocal.prompt.tokenizer import Tokenizer
from salalocal.session.plan import short_tokens
from salalocal.session.texts import DEFAULT_SEQUENCE_TOKENS, EVALUATION, EVALUATION_TOKENS, cut_sequences, shipped_text
from salalocal.session.tokens import TextCodec
from salalocal.settings import parse_tokens
from training.archive import ArchiveMaker
from training.evaluate import MISSING, WEIGHTS, Archive, archives, heldout_corpus, heldout_words
from training.model import CHUNK, EmbeddedModel, Shape
from training.score import score
from training.tokenizer import BUILTIN
from training.trainer import restore
from training.transcript import PAD, Prompt, Sample, Transcript

MISSING_WANTED = 0.8
MAX_PERPLEXITY_RISE = 0.02

Rights = dict[str, list[bool]]


@dataclass(frozen=True)
class Difference:
    """How many more of the same questions are right, and the standard error of that number."""

    gained: int
    lost: int
    asked: int

    @property
    def more(self) -> int:
        return self.gained - self.lost

    @property
    def error(self) -> float:
        return math.sqrt(self.gained + self.lost - self.more**2 / self.asked)

    @classmethod
    def of(cls, old: Sequence[bool], new: Sequence[bool]) -> "Difference":
        pairs = list(zip(old, new, strict=True))
        return cls(sum(n and not o for o, n in pairs), sum(o and not n for o, n in pairs), len(pairs))


def asked_alone(archive: Archive, pieces: Pieces, prompt: Prompt) -> Iterator[tuple[str, Sample]]:
    """Every question of an archive as the first one of its conversation, with its kind."""
    for turn in archive.turns:
        transcript = Transcript(prompt, pieces, archive.length)
        transcript.add(turn)
        if not transcript.turns:
            raise ValueError(f"no room for {turn.question!r} in {archive.length} tokens")
        yield turn.kind, transcript.sample()


@torch.no_grad()
def perplexity(model: EmbeddedModel, device: torch.device) -> float:
    """Of the shipped evaluation text, cut as `salalocal eval` cuts it."""
    tokenizer = Tokenizer.from_folder(BUILTIN)
    codec = TextCodec(tokenizer, ChatTemplate.from_folder(BUILTIN, tokenizer))
    total, num_ids = 0.0, 0
    for sequence in cut_sequences(shipped_text(EVALUATION, codec), DEFAULT_SEQUENCE_TOKENS, EVALUATION_TOKENS):
        ids = torch.tensor(sequence, device=device)
        padded = F.pad(ids, (0, -len(ids) % CHUNK), value=PAD)
        hidden, _ = model(padded[None])
        for rows in torch.arange(len(ids) - 1, device=device).split(4096):
            total += float(F.cross_entropy(model.logits(hidden[0, rows]).float(), ids[rows + 1], reduction="sum"))
        num_ids += len(ids) - 1
    return math.exp(total / num_ids)


def answers(model: EmbeddedModel, cell: Sequence[tuple[str, Sample]], device: torch.device) -> list[bool]:
    """Which questions of a cell are answered right."""
    return [score(model, [sample], device, dtype=torch.float32)["all"][0] == 1 for _, sample in cell]


def decide(kinds: dict[str, list[str]], old: Rights, new: Rights, ratio: float) -> dict[str, Any]:
    """The rule of this module over the cells of each length."""
    together = Difference.of(*([right for length in kinds for right in rights[length]] for rights in (old, new)))
    cells = {length: Difference.of(old[length], new[length]) for length in kinds}
    asked = ((kind, right) for length, of in kinds.items() for kind, right in zip(of, new[length], strict=True))
    denied = [right for kind, right in asked if kind == MISSING]
    met = {
        "more_right": together.more > together.error,
        "no_length_worse": all(cell.more >= -cell.error for cell in cells.values()),
        "missing_names_denied": bool(denied) and float(np.mean(denied)) >= MISSING_WANTED,
        "perplexity_kept": ratio - 1.0 < MAX_PERPLEXITY_RISE,
    }
    return {
        "more_right": together.more,
        "standard_error": round(together.error, 2),
        "by_length": {length: [cell.more, round(cell.error, 2)] for length, cell in cells.items()},
        "met": met,
        "ships": all(met.values()),
    }


def table(kinds: dict[str, list[str]], given: dict[str, Rights]) -> Iterator[str]:
    """Right answers by length and kind, a column for each model."""
    for length, of in kinds.items():
        for kind in ("all", "there", *sorted(set(of))):
            chosen = [i for i, k in enumerate(of) if kind in ("all", k) or (kind == "there" and k != MISSING)]
            columns = [f"{sum(rights[length][i] for i in chosen):4} of {len(chosen):3}" for rights in given.values()]
            yield f"{length:>5} {kind:10} " + "   ".join(columns)


def main() -> None:
    """Parses the command line, asks every model, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--ctx", default="4k,8k,16k")
    parser.add_argument("--questions", type=int, default=200, help="questions for each length")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    start = time.time()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    corpus = heldout_corpus()
    words = heldout_words(corpus)
    maker = ArchiveMaker(corpus, words, random.Random())
    cells: dict[str, list[tuple[str, Sample]]] = {}
    for length in (parse_tokens(text) for text in arguments.ctx.split(",")):
        cell = cells.setdefault(short_tokens(length), [])
        for archive in archives(corpus, words, length, arguments.questions, [*WEIGHTS, MISSING]):
            prompt = Prompt(list(archive.documents), *maker.prompt(archive.documents))
            cell.extend(asked_alone(archive, corpus.tokenizer, prompt))
    print(f"{time.time() - start:.0f} s: questions made", flush=True)
    kinds = {length: [kind for kind, _ in cell] for length, cell in cells.items()}
    given: dict[str, Rights] = {}
    texts: dict[str, float] = {}
    record: dict[str, Any] = {"device": str(device), "perplexity": texts, "kinds": kinds, "right": given}
    for path in arguments.models:
        model = EmbeddedModel(Shape())
        restore(model, path)
        model = model.to(device).eval()
        texts[str(path)] = perplexity(model, device)
        given[str(path)] = {length: answers(model, cell, device) for length, cell in cells.items()}
        print(f"{time.time() - start:.0f} s: {path}, perplexity {texts[str(path)]:.3f}", flush=True)
        if arguments.out:  # as far as it goes, should the time be up before the next one
            arguments.out.write_text(json.dumps(record) + "\n")
    print("\n".join(table(kinds, given)))
    old, *others = given
    for new in others:
        record[f"verdict {new}"] = decide(kinds, given[old], given[new], texts[new] / texts[old])
        print(f"{new}: {json.dumps(record[f'verdict {new}'])}")
    if arguments.out:
        arguments.out.write_text(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
