"""Batches of samples, made by worker processes while the device computes.

In: a corpus, words, a phase. Out: `Batch` tensors. For: training/train.py.
"""

import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from training.addresses import AddressRows
from training.aimed import AimedMaker
from training.archive import KIND_WEIGHTS, ArchiveMaker
from training.corpus import Corpus
from training.invent import piece_list
from training.model import Hints
from training.needles import TASK_WEIGHTS, NeedleMaker
from training.rounds import RoundMaker
from training.score import answer_spans
from training.selection import SupervisedRows
from training.stages import Phase
from training.transcript import ANSWER, TEXT, Sample

KINDS = (*KIND_WEIGHTS, *TASK_WEIGHTS, "absent", "missing", "twin", "chat", "all-keys", "repeat")
KINDS += ("trace-all", "trace-end", "trace-next")
ROUNDS_SHARE = 0.06


@dataclass
class Batch:
    """Inputs and targets [B, T], target marks [B, T], state cuts [B], the rows of the auxiliary losses, which kind of
    question an answer's target belongs to [B, T], as its number in KINDS, and which of all targets have a loss [N].
    """

    ids: Tensor
    targets: Tensor
    marks: Tensor
    cut: Tensor
    hints: Hints
    kinds: Tensor
    rows: Tensor

    def to(self, device: torch.device) -> "Batch":
        def move(t: Tensor) -> Tensor:
            return (t.pin_memory() if device.type == "cuda" else t).to(device, non_blocking=True)

        def rows(r: SupervisedRows) -> SupervisedRows:
            return SupervisedRows(move(r.index).long(), move(r.is_real), move(r.source).long())

        def addresses(r: AddressRows) -> AddressRows:
            return AddressRows(move(r.index).long(), move(r.number).long())

        given = self.hints
        watched = (rows(given.copies), rows(given.hops), rows(given.headers))
        hints = Hints(*watched, addresses(given.bodies), addresses(given.asked))
        ids, targets = move(self.ids).long(), move(self.targets).long()
        kinds, chosen = move(self.kinds).long(), move(self.rows).long()
        return Batch(ids, targets, move(self.marks), move(self.cut), hints, kinds, chosen)


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


def addresses_of(picked: list[np.ndarray], samples: list[Sample], max_rows: int) -> AddressRows:
    """Pads the picked rows of every sample to `max_rows`, with the numbers that they have to know."""
    rows = rows_of(picked, [s.addresses for s in samples], max_rows)
    return AddressRows(rows.index, rows.source)


def some(rows: np.ndarray, count: int, rng: random.Random) -> np.ndarray:
    """So many of the rows at most, in their order."""
    return np.sort(np.array(rng.sample(rows.tolist(), min(len(rows), count)), dtype=np.int64))


def collate(samples: list[Sample], cut_share: float, max_rows: int, rng: random.Random, text_every: int = 1) -> Batch:
    """Stacks samples; of each, `max_rows` answer rows and half as many document rows get auxiliary losses at most."""
    ids = torch.from_numpy(np.stack([s.ids for s in samples]))
    marks = torch.from_numpy(np.stack([s.marks for s in samples]))[:, 1:]
    length = ids.shape[1] - 1
    cut = torch.tensor([s.boundary if rng.random() < cut_share else length for s in samples])
    answers, inside, over, asked = [], [], [], []
    for sample in samples:
        answers.append(some(np.flatnonzero(sample.marks[1:] == ANSWER), max_rows, rng))
        inside.append(some(np.flatnonzero(sample.headers[:length] >= 0), max_rows // 2, rng))
        linked = np.flatnonzero((sample.hops[1:] >= 0) & (sample.marks[1:] != ANSWER))[:max_rows]
        over.append(np.sort(np.concatenate([linked, answers[-1]])[:max_rows]))
        known = np.flatnonzero((sample.addresses[:length] >= 0) & (sample.headers[:length] < 0))
        behind = known[known >= sample.boundary]
        asked.append(
            np.concatenate([some(part, max_rows // 2, rng) for part in (known[: -len(behind) or None], behind)])
        )
    copies = rows_of(answers, [s.sources[1:] for s in samples], max_rows)
    hops = rows_of(over, [s.hops[1:] for s in samples], max_rows)
    headers = rows_of(inside, [s.headers for s in samples], max_rows // 2)
    bodies = addresses_of(inside, samples, max_rows // 2)
    hints = Hints(copies, hops, headers, bodies, addresses_of(asked, samples, max_rows))
    kinds = torch.from_numpy(np.stack([kinds_of(s) for s in samples]))[:, 1:]
    flat = marks.flatten()
    rows = ((flat == ANSWER) | ((flat == TEXT) & (torch.arange(len(flat)) % text_every == 0))).nonzero()[:, 0]
    return Batch(ids[:, :-1], ids[:, 1:], marks, cut, hints, kinds, rows)


def kinds_of(sample: Sample) -> np.ndarray:
    """Of each id the number of the kind of question whose answer it belongs to."""
    kinds = np.zeros(len(sample.ids), np.int16)
    for turn, (first, stop) in zip(sample.turns, answer_spans(sample), strict=True):
        kinds[first:stop] = KINDS.index(turn.kind)
    return kinds


class Stream(IterableDataset):
    """An endless stream of the batches of a phase, from the batch `first` on.

    Every batch has a seed of its own, so its samples depend neither on the number of workers nor on where a run was
    interrupted.
    """

    def __init__(self, corpus: Corpus, words: list[str], phase: Phase, seed: str, first: int = 0):
        self.corpus, self.words, self.phase = corpus, words, phase
        self.seed, self.first = seed, first

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        offset, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        maker = ArchiveMaker(self.corpus, self.words, random.Random(), piece_list(self.corpus.tokenizer))
        draw = maker_for(maker, self.phase.needle_share, self.phase.aimed_share)
        for number in count(self.first + offset, stride):
            maker.rng.seed(f"{self.seed}/{number}")
            yield self.batch(draw, maker.rng)

    def batch(self, draw: Callable[[int], Sample], rng: random.Random) -> Batch:
        """One batch of one of the phase's lengths."""
        part = rng.choices(self.phase.parts, [part.share for part in self.phase.parts])[0]
        samples = [draw(part.length) for _ in range(part.batch)]
        max_rows = min(256, 32 + part.length // 8)
        return collate(samples, self.phase.cut_share, max_rows, rng, self.phase.text_every)


def maker_for(archives: ArchiveMaker, needle_share: float, aimed_share: float = 0.0) -> Callable[[int], Sample]:
    """Draws samples of a length: so many with planted lines, so many aimed at the main job, the others as the archive
    maker makes them. Samples without a question are drawn again.
    """
    needles, rounds, aimed = NeedleMaker(archives), RoundMaker(archives), AimedMaker(archives)
    rng = archives.rng

    def draw(length: int) -> Sample:
        draw = rng.random()
        if draw < ROUNDS_SHARE * needle_share:
            return rounds.sample(length)
        if draw < needle_share:
            return needles.sample(length)
        return (aimed if draw < needle_share + aimed_share else archives).sample(length)

    def sample(length: int) -> Sample:
        found = draw(length)
        while not found.turns:
            found = draw(length)
        return found

    return sample


def loader(stream: Stream, num_workers: int) -> Iterator[Batch]:
    """Batches of a stream in their order, prefetched."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if num_workers == 0:
        return iter(stream)
    return iter(DataLoader(stream, batch_size=None, num_workers=num_workers, prefetch_factor=3))
