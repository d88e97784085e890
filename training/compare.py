"""Scores several trained models on the same fresh held-out samples, by kind of question.

In: folders that training/train.py can restore (saved weights, an export, salalocal/builtin). Out: a table, right/asked
by kind and model, and the same as JSON. For: choosing which weights are shipped, and training/LOG.md. Run:

    python -m training.compare salalocal/builtin training/runs/v1 --length 2048 --samples 24 --out scores.json

Files and words are those that training never uses; of each length, half of the samples are archives and half have
planted lines. Scores are by teacher forcing, in fp32, as in training/score.py.
"""

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path

import torch

from training.archive import ArchiveMaker
from training.corpus import Corpus
from training.invent import word_list
from training.model import EmbeddedModel, Shape
from training.needles import NeedleMaker
from training.rounds import RoundMaker
from training.score import Counts, score
from training.trainer import restore
from training.transcript import Sample

SEEN_IN_TRAINING = "rich"  # pip, a training package, carries a copy of it
ROUNDS_EVERY = 8


def heldout_makers(seed: str) -> ArchiveMaker:
    """An archive maker over the held-out packages, with held-out words only."""
    loaded = Corpus.load("heldout")
    packages = {name: files for name, files in loaded.packages.items() if name != SEEN_IN_TRAINING}
    corpus = Corpus(packages, loaded.tokenizer)
    lines = [line for name in corpus.names for file in corpus.packages[name] for line in file.lines]
    return ArchiveMaker(corpus, word_list(lines, corpus.tokenizer, True), random.Random(seed))


def samples_of(archives: ArchiveMaker, length: int, count: int) -> list[Sample]:
    """Half archives, half planted lines, of which every eighth is a conversation of equal requests."""
    needles, rounds = NeedleMaker(archives), RoundMaker(archives)
    found: list[Sample] = []
    while len(found) < count:
        number = len(found)
        if number % 2 == 0:
            sample = archives.sample(length)
        else:
            sample = rounds.sample(length) if number // 2 % ROUNDS_EVERY == 3 else needles.sample(length)
        if sample.turns:
            found.append(sample)
    return found


def table(scores: Sequence[tuple[str, Counts]]) -> str:
    """Kinds in rows, models in columns."""
    kinds = [*sorted({kind for _, counts in scores for kind in counts} - {"all"}), "all"]
    rows = ["| kind | " + " | ".join(name for name, _ in scores) + " |", "| --- " * (len(scores) + 1) + "|"]
    for kind in kinds:
        cells = [f"{right}/{asked}" for right, asked in (counts.get(kind, (0, 0)) for _, counts in scores)]
        rows.append(f"| {kind} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def main() -> None:
    """Parses the command line, scores and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--length", type=int, required=True)
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--seed", default="compare-1")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    samples = samples_of(heldout_makers(arguments.seed), arguments.length, arguments.samples)
    scores = []
    for path in arguments.models:
        model = EmbeddedModel(Shape())
        restore(model, path)
        scores.append((path.name, score(model.to(device).eval(), samples, device, dtype=torch.float32)))
    print(table(scores))
    if arguments.out:
        record = {"length": arguments.length, "samples": arguments.samples, "seed": arguments.seed}
        arguments.out.write_text(json.dumps({**record, "scores": dict(scores)}, indent=1) + "\n")


if __name__ == "__main__":
    main()
