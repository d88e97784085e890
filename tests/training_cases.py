"""A small corpus and a maker of samples over it, for the tests of training."""

import dataclasses
import random
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from training.archive import ArchiveMaker
from training.corpus import LINE, Corpus, SourceFile
from training.invent import piece_list, word_list
from training.model import LIGHTNING, SPARSE, EmbeddedModel, Shape
from training.tokenizer import BUILTIN
from training.trainer import Trainer

SMALL_SHAPE = dataclasses.replace(Shape(), intermediate_size=64, mixer_types=(LIGHTNING, SPARSE, SPARSE, SPARSE))
EXAMPLE = Path(__file__).parents[1] / "examples" / "beacon"


def small_corpus() -> Corpus:
    """The example archive as a corpus of one package."""
    tokenizer = Tokenizer.from_file(str(BUILTIN / "tokenizer.json"))
    files = []
    for path in sorted(p for p in EXAMPLE.rglob("*") if p.is_file() and "__pycache__" not in p.parts):
        lines = LINE.findall(path.read_text().lstrip("\n"))
        encoded = [tokenizer.encode(line, add_special_tokens=False).ids for line in lines]
        starts = np.cumsum([0, *map(len, encoded)])
        ids = np.array([number for line in encoded for number in line], np.uint16)
        files.append(SourceFile(path.relative_to(EXAMPLE).as_posix(), lines, ids, starts))
    return Corpus({"beacon": files}, tokenizer)


def words_of(corpus: Corpus, is_heldout: bool) -> list[str]:
    """The words of a corpus that training may use, or the others."""
    lines = (line for files in corpus.packages.values() for file in files for line in file.lines)
    return word_list(lines, corpus.tokenizer, is_heldout)


def small_maker(seed: int) -> ArchiveMaker:
    """A maker of samples over the small corpus."""
    corpus = small_corpus()
    return ArchiveMaker(corpus, words_of(corpus, False), random.Random(seed), piece_list(corpus.tokenizer))


def trainer_in(folder: Path, seed: int) -> Trainer:
    """A trainer of a small new model, which has all the time in the world."""
    torch.manual_seed(seed)
    folder.mkdir(exist_ok=True)
    return Trainer(EmbeddedModel(SMALL_SHAPE), torch.device("cpu"), folder, 1e6)
