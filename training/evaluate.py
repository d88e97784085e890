"""The held-out evaluation: cells of 200 questions about archives of a given length, greedy, exact match.

In: a model, the held-out packages of the corpus (`python training/data.py` fetches them), words that training never
saw. Out: shares with 95 % Wilson intervals by length and kind, one record file. For: the model card and the README.

    python training/evaluate.py --ctx 4k,16k,64k,256k --work FOLDER --record benchmarks/results/NAME.json
    python training/evaluate.py --ctx 4k --questions 20 --work FOLDER                  # a small one
    python training/evaluate.py --ctx 16k --sparse silent --work FOLDER                # what the sparse layers carry
    python training/evaluate.py --ctx 4k,16k --kinds where --sparse dense --work FOLDER

An archive holds files of the held-out packages with invented lines in them. It is read once; every question about it is
the first of its conversation: the state behind the documents is forked for each. One question in five asks for a name
that is not there. The wordings are those that training uses; names, values and files are not. A run that was stopped
goes on when the same command is given again.
"""

import argparse
import hashlib
import json
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import count
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.emulation import emulated
from salalocal.evals.asking import Case, Question, Subject
from salalocal.evals.haystack import ask_about, made_document
from salalocal.evals.questionnaire import Place, Questionnaire, Report, Watch, answer_all
from salalocal.evals.scoring import Mark, Share
from salalocal.evals.study import StudyProgress
from salalocal.prompt.pack import PromptPack
from salalocal.session.plan import short_tokens
from salalocal.settings import Settings, parse_tokens
from training.archive import KIND_WEIGHTS, ArchiveMaker, Document, unique_paths
from training.corpus import Corpus
from training.invent import word_list
from training.transcript import MAX_ANSWER_TOKENS, Turn

Way = Literal["picked", "dense", "silent"]

SEED = "evaluation-2"
MISSING = "missing"
WEIGHTS = {**KIND_WEIGHTS, "twin": 0.7}
MISSING_SHARE = 0.2
SEEN_IN_TRAINING = "rich"  # pip, a training package, carries a copy of it
ROOM_TOKENS = 160  # for a question, its frame and the answer
ANSWER_TOKENS = 64  # right answers are shorter
PART_TOKENS = 12_288  # a longer archive is made of parts, each of one package
PLANTS_PER_PART = 8
MIN_PART_TOKENS = 400
MAX_DRAWS = 200
WAYS: tuple[Way, ...] = ("picked", "dense", "silent")


def questions_per_archive(length: int) -> int:
    """How many questions are asked about one archive: a long one costs much to read and has much to ask about."""
    return 5 if length < 12_000 else 10 if length < 48_000 else 25 if length < 200_000 else 50


@dataclass(frozen=True, eq=False)
class Archive:
    """Files of about `length` tokens as a prompt, and questions about them, each to be asked on its own."""

    length: int
    documents: list[Document]
    turns: list[Turn]

    @cached_property
    def pack(self) -> PromptPack:
        """The files as the runtime's reader would give them."""
        return PromptPack(tuple(made_document(d.path, "".join(d.lines)) for d in self.documents))

    @property
    def digest(self) -> str:
        """A hash of every file, question and answer."""
        said = repr([(turn.question, turn.answer) for turn in self.turns])
        return hashlib.sha256((self.pack.digest + said).encode()).hexdigest()


def heldout_corpus() -> Corpus:
    """The packages that training never saw."""
    heldout = Corpus.load("heldout")
    heldout.packages.pop(SEEN_IN_TRAINING, None)
    return Corpus(heldout.packages, heldout.tokenizer)


def heldout_words(corpus: Corpus) -> list[str]:
    """Words for invented names that training never saw."""
    lines = (line for name in corpus.names for file in corpus.packages[name] for line in file.lines)
    return word_list(lines, corpus.tokenizer, True)


def files(maker: ArchiveMaker, length: int) -> list[Document]:
    """Files whose prompt takes nearly `length` tokens, with room for a question and its answer."""
    room = length - ROOM_TOKENS
    documents: list[Document] = []
    for _ in range(MAX_DRAWS):
        left = room - len(maker.prompt(documents)[0])
        if left < MIN_PART_TOKENS and documents:
            break
        more = maker.archive(max(MIN_PART_TOKENS, min(left, PART_TOKENS) - 40), PLANTS_PER_PART)
        documents = unique_paths([*documents, *more])
        while documents and len(maker.prompt(documents)[0]) > room:
            documents.pop()
    return documents


def ask_for(maker: ArchiveMaker, documents: list[Document], num_questions: int, kinds: Sequence[str]) -> list[Turn]:
    """Questions about an archive, no two of them alike; fewer than asked for if it has too little to say."""
    facts = maker.candidates(documents)
    weights = {kind: WEIGHTS[kind] for kind in kinds if kind != MISSING and facts.get(kind)}
    num_missing = round(MISSING_SHARE * num_questions) if MISSING in kinds else 0
    turns: dict[tuple[str, str], Turn] = {}
    asked: set[str] = set()
    for _ in range(MAX_DRAWS * num_questions):
        if len(turns) == num_questions:
            break
        if len(turns) < num_missing:
            turn = maker.missing(documents, facts)
        elif weights:
            turn = maker.turn(documents, facts, maker.rng.choices(list(weights), list(weights.values()))[0])
        else:
            break
        if len(maker.encode(turn.answer)) <= MAX_ANSWER_TOKENS and turn.question not in asked:
            asked.add(turn.question)
            turns.setdefault((turn.kind, turn.answer), turn)
    found = list(turns.values())
    maker.rng.shuffle(found)
    return found


def archives(
    corpus: Corpus, words: list[str], length: int, num_questions: int, kinds: Sequence[str]
) -> Iterator[Archive]:
    """The archives of one cell; each has a seed of its own, so a larger cell holds the archives of a smaller one."""
    left = num_questions
    for number in count():
        maker = ArchiveMaker(corpus, words, random.Random(f"{SEED}/{length}/{number}"))
        documents = files(maker, length)
        turns = ask_for(maker, documents, questions_per_archive(length), kinds)[:left]
        if turns:
            yield Archive(length, documents, turns)
        left -= len(turns)
        if not left:
            return
        if number > num_questions * MAX_DRAWS:
            raise ValueError(f"the corpus has too little to ask for {', '.join(kinds)}")


def mark(answer: str, expected: str) -> Mark:
    """Right if the answer is the expected text, letter by letter."""
    return Mark(float(answer == expected), answer == expected)


def cases(given: Sequence[Archive]) -> Iterator[Case]:
    """The questions of some archives, archive by archive."""
    for number, archive in enumerate(given):
        for index, turn in enumerate(archive.turns):
            yield Case(
                key=f"{archive.length}/{number}/{index}",
                label=f"{short_tokens(archive.length)}, archive {number + 1} of {len(given)}",
                labels={"length": archive.length, "kind": turn.kind, "question": turn.question},
                cost_tokens=archive.length if index == 0 else ROOM_TOKENS,
                make=partial(question, archive, turn),
            )


def question(archive: Archive, turn: Turn) -> Question:
    """A turn as the first question about its archive."""
    asked = ask_about(archive.pack, turn.question)
    return Question(asked, (turn.answer,), partial(mark, expected=turn.answer))


def shares(report: Report) -> dict[str, dict[str, Any]]:
    """Shares by length: of all questions, of those whose answer is there, of those about a missing name, by kind."""
    found: dict[str, dict[str, Any]] = {}
    for length in dict.fromkeys(record["length"] for record in report.records):
        chosen = [record for record in report.records if record["length"] == length]
        groups = {"all": chosen}
        groups["there"] = [record for record in chosen if record["kind"] != MISSING]
        for kind in sorted({record["kind"] for record in chosen}):
            groups[kind] = [record for record in chosen if record["kind"] == kind]
        found[short_tokens(length)] = {
            name: Share.of(Mark(record["score"], record["right"]) for record in group).to_json()
            for name, group in groups.items()
            if group
        }
    return found


def lines(found: dict[str, dict[str, Any]]) -> Iterator[str]:
    """The shares as a table for people."""
    for length, groups in found.items():
        for name, share in groups.items():
            right, percent = f"{share['right']:3}/{share['asked']:3}", f"{100 * share['share']:5.1f} %"
            yield f"{length:>5} {name:10} {right} {percent} ({100 * share['low']:.1f} to {100 * share['high']:.1f} %)"


def measure(settings: Settings, given: Sequence[Archive], way: Way, folder: Path, watch: Watch) -> Report:
    """Ask a model every question that is not answered yet. Raises: as `answer_all`."""
    decided = {
        "seed": SEED,
        "sparse": way,
        "archives": len(given),
        "archives_sha256": hashlib.sha256("".join(archive.digest for archive in given).encode()).hexdigest(),
    }
    longest = max(archive.length for archive in given)
    asked = Questionnaire("extractive", ("length", "kind"), decided, list(cases(given)), longest)
    with emulated(None if way == "picked" else way):
        return answer_all(Subject.find(settings, watch.tell), asked, Place(folder), watch)


def record_of(report: Report, found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What is committed: what was measured, the shares, every wrong answer."""
    wrong = [
        {name: record[name] for name in ("key", "kind", "question", "expected", "answer", "context_tokens")}
        for record in report.records
        if not record["right"]
    ]
    read = sum(record["context_tokens"] - record["cached_tokens"] for record in report.records)
    seconds = {name: round(sum(record[name] for record in report.records)) for name in ("read_s", "answer_s")}
    return {**report.identity, "shares": found, "tokens_read": read, **seconds, "wrong": wrong}


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin")
    parser.add_argument("--device")
    parser.add_argument("--ctx", default="4k,8k,16k")
    parser.add_argument("--questions", type=int, default=200, help="questions for each length")
    parser.add_argument("--kinds", default=",".join([*WEIGHTS, MISSING]), help="what is asked for")
    parser.add_argument("--sparse", choices=WAYS, default=WAYS[0], help="what the sparse layers read")
    parser.add_argument("--work", type=Path, required=True, help="folder of the answers, to go on from")
    parser.add_argument("--record", type=Path, help="JSON file for the shares and the wrong answers")
    return parser.parse_args()


def main() -> None:
    """Makes the archives, asks, prints and writes."""
    arguments = parse_arguments()
    started_s = time.monotonic()
    told_s = started_s

    def tell(line: str) -> None:
        print(f"{time.monotonic() - started_s:7.1f} s  {line}", file=sys.stderr, flush=True)

    def progress(event: StudyProgress) -> None:
        nonlocal told_s
        if time.monotonic() - told_s >= 30:
            told_s = time.monotonic()
            tell(f"{event.num_done} of {event.num_tasks}, {event.num_right} right, now {event.label}")

    corpus = heldout_corpus()
    words, kinds = heldout_words(corpus), arguments.kinds.split(",")
    given: list[Archive] = []
    for length in sorted(parse_tokens(text) for text in arguments.ctx.split(",")):
        given += archives(corpus, words, length, arguments.questions, kinds)
        tell(f"{len(given)} archives made, the last of them of {short_tokens(length)}")
    settings = Settings(arguments.model, arguments.device, max_tokens=ANSWER_TOKENS)
    report = measure(settings, given, arguments.sparse, arguments.work, Watch(progress, tell))
    found = shares(report)
    print("\n".join(lines(found)))
    if arguments.record:
        arguments.record.write_text(json.dumps(record_of(report, found), indent=1) + "\n")
        print(arguments.record)


if __name__ == "__main__":
    main()
