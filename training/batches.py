"""Batches of samples, made by worker processes while the device computes.

In: a corpus, words, a length. Out: `Batch` tensors. For: training/train.py.
"""

import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from training.archive import ANSWER, KIND_WEIGHTS, ArchiveMaker, Sample
from training.corpus import Corpus
from training.invent import piece_list
from training.model import Hints
from training.needles import TASK_WEIGHTS, NeedleMaker
from training.rounds import RoundMaker
from training.score import answer_spans
from training.selection import SupervisedRows

KINDS = (*KIND_WEIGHTS, *TASK_WEIGHTS, "absent", "missing", "twin", "chat", "all-keys", "repeat")
KINDS += ("trace-all", "trace-end", "trace-next")
ROUNDS_SHARE = 0.06


@dataclass
class Batch:
    """Inputs and targets [B, T], target marks [B, T], state cuts [B], the rows of the auxiliary losses, and which kind
    of question an answer's target belongs to [B, T], as its number in KINDS.
    """

    ids: Tensor
    targets: Tensor
    marks: Tensor
    cut: Tensor
    hints: Hints
    kinds: Tensor

    def to(self, device: torch.device) -> "Batch":
        def move(t: Tensor) -> Tensor:
            return t.to(device, non_blocking=True)

        def rows(r: SupervisedRows) -> SupervisedRows:
            return SupervisedRows(move(r.index).long(), move(r.is_real), move(r.source).long())

        hints = Hints(rows(self.hints.copies), rows(self.hints.hops), rows(self.hints.headers))
        ids, targets = move(self.ids).long(), move(self.targets).long()
        return Batch(ids, targets, move(self.marks), move(self.cut), hints, move(self.kinds).long())


def rows_of(picked: list[np.ndarray], sources: list[np.ndarray], max_rows: int) -> SupervisedRows:
    """Pads the picked rows of every sample to `max_rows`."""
    index = torch.zeros(len(picked), max_rows, dtype=torch.int32)
    is_real = torch.zeros(len(picked), max_rows, dtype=torch.bool)
    source = torch.full((len(picked), max_rows), -1, dtype=torch.int32)
    for number, (rows, looked_at) in enumerate(zip(picked, sources, strict=True)):
        index[number, : len(rows)] = torch.from_numpy(rows.astype(np.int32))
        is_real[number, : len(rows)] = True
        source[number, : len(rows)] = torch.from_numpy(looked_at[rows])
    return SupervisedRows(index, is_real, source)


def collate(samples: list[Sample], cut_share: float, max_rows: int, rng: random.Random) -> Batch:
    """Stacks samples; of each, `max_rows` answer rows and half as many document rows get auxiliary losses at most."""
    ids = torch.from_numpy(np.stack([s.ids for s in samples]))
    marks = torch.from_numpy(np.stack([s.marks for s in samples]))[:, 1:]
    length = ids.shape[1] - 1
    cut = torch.tensor([s.boundary if rng.random() < cut_share else length for s in samples])
    answers, inside, over = [], [], []
    for sample in samples:
        rows = np.flatnonzero(sample.marks[1:] == ANSWER)
        answers.append(np.sort(np.array(rng.sample(rows.tolist(), min(len(rows), max_rows)), dtype=np.int64)))
        rows = np.flatnonzero(sample.headers[:length] >= 0)
        inside.append(np.sort(np.array(rng.sample(rows.tolist(), min(len(rows), max_rows // 2)), dtype=np.int64)))
        linked = np.flatnonzero((sample.hops[1:] >= 0) & (sample.marks[1:] != ANSWER))[:max_rows]
        over.append(np.sort(np.concatenate([linked, answers[-1]])[:max_rows]))
    copies = rows_of(answers, [s.sources[1:] for s in samples], max_rows)
    hops = rows_of(over, [s.hops[1:] for s in samples], max_rows)
    headers = rows_of(inside, [s.headers for s in samples], max_rows // 2)
    kinds = torch.from_numpy(np.stack([kinds_of(s) for s in samples]))[:, 1:]
    return Batch(ids[:, :-1], ids[:, 1:], marks, cut, Hints(copies, hops, headers), kinds)


def kinds_of(sample: Sample) -> np.ndarray:
    """Of each id the number of the kind of question whose answer it belongs to."""
    kinds = np.zeros(len(sample.ids), np.int16)
    for turn, (first, stop) in zip(sample.turns, answer_spans(sample), strict=True):
        kinds[first:stop] = KINDS.index(turn.kind)
    return kinds


class Stream(IterableDataset):
    """An endless stream of batches; every worker has a generator of its own."""

    def __init__(
        self,
        corpus: Corpus,
        words: list[str],
        length: int,
        size: int,
        cut_share: float,
        seed: int,
        needle_share: float = 0.0,
    ):
        self.corpus, self.words, self.seed = corpus, words, seed
        self.length, self.size, self.cut_share, self.needle_share = length, size, cut_share, needle_share

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        rng = random.Random(f"{self.seed}-{self.length}-{worker.id if worker else 0}")
        maker = ArchiveMaker(self.corpus, self.words, rng, piece_list(self.corpus.tokenizer))
        draw = maker_for(maker, self.needle_share)
        max_rows = min(256, 32 + self.length // 8)
        while True:
            samples = [draw(self.length) for _ in range(self.size)]
            yield collate(samples, self.cut_share, max_rows, rng)


def maker_for(archives: ArchiveMaker, share: float) -> Callable[[int], Sample]:
    """Draws samples of a length: `share` of them with planted lines, the others as the archive maker makes them.

    Samples without a question are drawn again.
    """
    needles, rounds, rng = NeedleMaker(archives), RoundMaker(archives), random.Random(archives.rng.random())

    def draw(length: int) -> Sample:
        draw = rng.random()
        if draw >= share:
            return archives.sample(length)
        return rounds.sample(length) if draw < ROUNDS_SHARE * share else needles.sample(length)

    def sample(length: int) -> Sample:
        found = draw(length)
        while not found.turns:
            found = draw(length)
        return found

    return sample


def loader(stream: Stream, num_workers: int) -> Iterator[Batch]:
    """Batches of a stream, prefetched."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if num_workers == 0:
        return iter(stream)
    return iter(DataLoader(stream, batch_size=None, num_workers=num_workers, prefetch_factor=4))
