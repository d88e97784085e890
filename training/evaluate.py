"""The held-out evaluation: 200 questions, each the first one about an archive of 4K, 8K or 16K tokens, greedy, exact
match.

In: the model, the held-out packages of the corpus (`python training/data.py` fetches them), a seed of its own,
words that training never saw. Out: a table with 95 % Wilson intervals, a file embedded-v0-*.json in benchmarks/results.
For: the model card and the README. Run: `python -m training.evaluate` (or `python training/evaluate.py`); `--limit 20`
takes fewer archives; `--way training` scores with the training forward, which is quick on a GPU: teacher forcing gives
exactly the answers that greedy decoding gets right. `--zeroed` silences the sparse layers. `--model builtin:bf16` asks
the unquantized form, which the training forward always has.
"""

import argparse
import hashlib
import json
import math
import random
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch

from training.archive import KIND_WEIGHTS, ArchiveMaker, Document, Sample, Turn
from training.corpus import Corpus
from training.invent import word_list
from training.model import EmbeddedModel, Shape
from training.score import score
from training.tokenizer import BUILTIN
from training.train import restore

SEED = "evaluation-1"
LENGTHS = {4096: 67, 8192: 67, 16384: 66}
QUESTIONS_PER_ARCHIVE = 5
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
SEEN_IN_TRAINING = "rich"  # pip, a training package, carries a copy of it
OTHER_KINDS = {"missing": 2.6, "twin": 0.7}


@dataclass
class Case:
    """An archive and the questions asked about it, each on its own."""

    length: int
    documents: list[Document]
    turns: list[Turn]


@dataclass
class Outcome:
    """One question with what came out."""

    length: int
    kind: str
    question: str
    answer: str
    is_right: bool
    given: str = ""


def unique_paths(documents: list[Document]) -> list[Document]:
    """The documents without a second one of the same path."""
    return list({document.path: document for document in documents}.values())


def cases() -> tuple[ArchiveMaker, list[Case]]:
    """The evaluation set, always the same one for the same corpus."""
    heldout = Corpus.load("heldout")
    del heldout.packages[SEEN_IN_TRAINING]
    corpus = Corpus(heldout.packages, heldout.tokenizer)
    lines = [line for name in corpus.names for file in corpus.packages[name] for line in file.lines]
    maker = ArchiveMaker(corpus, word_list(lines, corpus.tokenizer, True), random.Random(SEED))
    found = []
    for length, count in LENGTHS.items():
        asked = 0
        while asked < count:
            documents = unique_paths(maker.archive(length - 160, 8))
            facts = maker.candidates(documents)
            weights = {k: w for k, w in {**KIND_WEIGHTS, **OTHER_KINDS}.items() if k == "missing" or facts.get(k)}
            if len(maker.prompt(documents)[0]) > length - 120:
                continue
            turns: list[Turn] = []
            while len(turns) < min(QUESTIONS_PER_ARCHIVE, count - asked):
                kind = maker.rng.choices(list(weights), list(weights.values()))[0]
                turn = maker.missing(documents, facts) if kind == "missing" else maker.turn(documents, facts, kind)
                if len(maker.encode(turn.answer)) <= 40 and turn.answer not in [t.answer for t in turns]:
                    turns.append(turn)
            asked += len(turns)
            found.append(Case(length, documents, turns))
    return maker, found


def with_training_forward(maker: ArchiveMaker, chosen: list[Case], is_zeroed: bool) -> list[Outcome]:
    """Scores by teacher forcing with the training forward, in fp32."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = EmbeddedModel(Shape())
    restore(model, BUILTIN)
    model.to(device).eval()
    outcomes = []
    for case in chosen:
        ids, line_at, path_at = maker.prompt(case.documents)
        for turn in case.turns:
            sample: Sample = maker.conversation(case.documents, ids, line_at, path_at, [turn], case.length)
            right = score(model, [sample], device, is_zeroed, torch.float32)["all"][0] == 1
            outcomes.append(Outcome(case.length, turn.kind, turn.question, turn.answer, right))
    return outcomes


def source_of(document: Document) -> object:
    """The document as the runtime's reader would give it."""
    from salalocal.prompt.sources import Document as Source

    data = "".join(document.lines).encode()
    return Source(document.path, data.decode(), hashlib.sha256(data).hexdigest(), len(data))


def with_runtime(chosen: list[Case], model: str) -> list[Outcome]:
    """Asks the shipped runtime through its public interface."""
    import salalocal
    from salalocal.prompt.pack import PromptPack
    from salalocal.prompt.sources import Reading
    from salalocal.session.events import TextDelta

    runtime = salalocal.load(model)
    outcomes: list[Outcome] = []
    for number, case in enumerate(chosen):
        print(f"archive {number + 1} of {len(chosen)}, {case.length} tokens", file=sys.stderr, flush=True)
        sources = tuple(source_of(document) for document in case.documents)
        session = runtime.session(pack=PromptPack.build(Reading(sources, (), ()), order="given"))
        for turn in case.turns:
            given = "".join(e.text for e in session.ask(turn.question) if isinstance(e, TextDelta))
            session.undo()
            outcomes.append(Outcome(case.length, turn.kind, turn.question, turn.answer, given == turn.answer, given))
    return outcomes


def wilson(right: int, asked: int) -> tuple[float, float]:
    """95 % Wilson interval of a share."""
    z, share = 1.96, right / asked
    middle = share + z * z / (2 * asked)
    reach = z * math.sqrt(share * (1 - share) / asked + z * z / (4 * asked * asked))
    return (middle - reach) / (1 + z * z / asked), (middle + reach) / (1 + z * z / asked)


def table(outcomes: list[Outcome]) -> dict[str, dict[str, float]]:
    """Shares by length, by kind and over all."""
    groups: dict[str, list[bool]] = defaultdict(list)
    for outcome in outcomes:
        for name in ("all", f"length {outcome.length}", f"kind {outcome.kind}"):
            groups[name].append(outcome.is_right)
    rows = {}
    for name, marks in sorted(groups.items()):
        low, high = wilson(sum(marks), len(marks))
        rows[name] = {"right": sum(marks), "asked": len(marks), "share": round(sum(marks) / len(marks), 3)}
        rows[name] |= {"low": round(low, 3), "high": round(high, 3)}
        row = rows[name]
        print(
            f"{name:14} {row['right']:3}/{row['asked']:3}  {row['share']:.1%}  ({row['low']:.1%} to {row['high']:.1%})"
        )
    return rows


def main() -> None:
    """Parses the command line, asks, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--way", choices=["runtime", "training"], default="runtime")
    parser.add_argument("--model", default="builtin")
    parser.add_argument("--limit", type=int, help="archives to take, spread over the lengths")
    parser.add_argument("--zeroed", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    start = time.time()
    maker, chosen = cases()
    if arguments.limit:
        chosen = chosen[:: max(1, len(chosen) // arguments.limit)][: arguments.limit]
    if arguments.way == "training":
        outcomes = with_training_forward(maker, chosen, arguments.zeroed)
    else:
        outcomes = with_runtime(chosen, arguments.model)
    rows = table(outcomes)
    tokens = int(np.sum([len(maker.prompt(case.documents)[0]) for case in chosen]))
    way = arguments.way if arguments.way == "training" else Path(arguments.model).name.replace(":", "-")
    name = f"embedded-v0-{way}{'-zeroed' if arguments.zeroed else ''}{'-part' if arguments.limit else ''}.json"
    report = {
        "seed": SEED,
        "way": arguments.way,
        "model": arguments.model,
        "archives": len(chosen),
        "archive_tokens": tokens,
        "table": rows,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    wrong = [vars(outcome) for outcome in outcomes if not outcome.is_right]
    (arguments.out / name).write_text(json.dumps({**report, "wrong": wrong}, indent=1) + "\n")
    print(f"{len(outcomes)} questions in {time.time() - start:.0f} s; {arguments.out / name}")


if __name__ == "__main__":
    main()
