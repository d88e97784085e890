"""Trains the embedded model in phases: short and dense first, long with block selection last.

In: the corpus and the tokenizer; `--resume FOLDER` goes on from saved weights. Out: under --out: weights-K.pt (four
parts, fp32), log.jsonl, and after the phases of the first version the scores of a small held-out check. For:
training/export.py. Run (one H100, about ten minutes a stage):
`python -m training.train --stage 1 --out training/runs/one`. Stage 3 is for one CPU thread: `--workers 0 --every 6`.
"""

import argparse
import copy
import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from salalocal.checkpoint.checkpoint import Checkpoint
from salalocal.checkpoint.folder import ModelFolder
from salalocal.checkpoint.names import CONFIG_FILE
from training.archive import ANSWER, TEXT, ArchiveMaker
from training.batches import KINDS, Batch, Stream, loader
from training.corpus import Corpus
from training.invent import word_list
from training.model import EmbeddedModel, Shape
from training.optimizer import Optimizer
from training.score import score, shares
from training.variants import ORIGINAL

SEED = 20261123
NUM_PARTS = 4
CHECKS = {512: 24, 2048: 24, 8192: 12, 16384: 8}


@dataclass(frozen=True)
class Phase:
    """One length and mixture; `rate` is the learning-rate factor at its start and end, `seconds` its share of the wall
    clock. `needle_share` of the samples have planted lines; the loss of plain text takes every `text_every`-th id.
    With `average` above 0, what is saved is the moving average of the weights with that decay a step.
    """

    length: int
    batch: int
    seconds: float
    cut_share: float
    rate: tuple[float, float]
    text_weight: float = 0.3
    pointer_weight: float = 0.2
    selection_weight: float = 0.1
    needle_share: float = 0.0
    text_every: int = 1
    average: float = 0.0


MIXED = {"text_weight": 0.2, "selection_weight": 0.15, "needle_share": 0.55, "text_every": 4, "average": 0.98}
STAGES = {
    "0": [
        Phase(512, 96, 75, 0.7, (1.0, 1.0)),
        Phase(2048, 24, 25, 0.6, (1.0, 1.0)),
        Phase(8192, 6, 15, 0.3, (0.5, 0.5)),
        Phase(16384, 3, 10, 0.3, (0.5, 0.5)),
    ],
    "1": [
        Phase(512, 96, 90, 0.7, (1.0, 1.0)),
        Phase(2048, 24, 130, 0.6, (1.0, 1.0), selection_weight=0.15),
        Phase(8192, 6, 200, 0.4, (0.8, 0.5), selection_weight=0.2),
    ],
    "2": [
        Phase(2048, 24, 150, 0.5, (0.6, 0.5), selection_weight=0.15),
        Phase(8192, 6, 165, 0.3, (0.45, 0.25), selection_weight=0.2),
        Phase(16384, 3, 140, 0.2, (0.25, 0.01), text_weight=0.2, pointer_weight=0.1, selection_weight=0.2),
    ],
    # From version 0 on one CPU thread: 65 minutes.
    "3": [
        Phase(512, 8, 1500, 0.5, (0.2, 0.14), **MIXED),
        Phase(2048, 2, 1500, 0.4, (0.14, 0.06), **MIXED),
        Phase(5120, 1, 900, 0.3, (0.06, 0.005), **MIXED),
    ],
    # The same on a GPU: 25 minutes of one H100.
    "4": [
        Phase(512, 96, 300, 0.6, (0.5, 0.4), **MIXED),
        Phase(2048, 24, 420, 0.5, (0.4, 0.3), **MIXED),
        Phase(8192, 6, 450, 0.3, (0.3, 0.12), **MIXED),
        Phase(16384, 3, 330, 0.2, (0.12, 0.005), **MIXED),
    ],
}


def losses_of(model: EmbeddedModel, batch: Batch, phase: Phase) -> tuple[Tensor, dict[str, Tensor]]:
    """Total loss of a batch and its parts; the loss of each kind of answer, with how many ids it had, under "=KIND"."""
    hidden, extra = model(batch.ids, batch.cut, batch.hints)
    marks = batch.marks.flatten()
    place = torch.arange(len(marks), device=marks.device)
    rows = ((marks == ANSWER) | ((marks == TEXT) & (place % phase.text_every == 0))).nonzero()[:, 0]
    each = F.cross_entropy(
        model.logits(hidden.flatten(0, 1)[rows]).float(), batch.targets.flatten()[rows], reduction="none"
    )
    is_answer = (marks[rows] == ANSWER).float()
    text = (each * (1.0 - is_answer)).sum() / (1.0 - is_answer).sum().clamp(min=1.0)
    answer = (each * is_answer).sum() / is_answer.sum().clamp(min=1.0)
    total = answer + phase.text_weight * text
    total = total + phase.selection_weight * extra[:, 0].sum() + phase.pointer_weight * extra[:, 1].sum()
    parts = {"answer": answer, "text": text}
    for order, name in enumerate(("header", "hop", "copy")):
        parts |= {f"select_{name}": extra[order, 0], f"{name}": extra[order, 2]}
    parts = {name: torch.stack([value.detach(), torch.ones_like(value)]) for name, value in parts.items()}
    kinds = batch.kinds.flatten()[rows]
    sums = torch.zeros(2, len(KINDS), device=each.device)
    sums[0].index_add_(0, kinds, each.detach() * is_answer)
    sums[1].index_add_(0, kinds, is_answer)
    return total, parts | {f"={name}": sums[:, number] for number, name in enumerate(KINDS)}


def save(model: EmbeddedModel, folder: Path) -> None:
    """The weights in parts of similar size, written beside and renamed."""
    parts: list[dict[str, Tensor]] = [{} for _ in range(NUM_PARTS)]
    sizes = [0] * NUM_PARTS
    for name, tensor in sorted(model.state_dict().items(), key=lambda item: -item[1].numel()):
        smallest = sizes.index(min(sizes))
        parts[smallest][name] = tensor
        sizes[smallest] += tensor.numel()
    for number, part in enumerate(parts):
        target = folder / f"weights-{number}.pt"
        torch.save(part, target.with_suffix(".tmp"))
        target.with_suffix(".tmp").replace(target)


def restore(model: EmbeddedModel, folder: Path) -> None:
    """Loads what `save` wrote, or an exported folder, of which the form in bf16 if it has several."""
    state: dict[str, Tensor] = {}
    if (folder / CONFIG_FILE).exists():
        variants = ModelFolder(folder).variants
        checkpoint = Checkpoint.open(ModelFolder(folder, ORIGINAL if ORIGINAL in variants else None))
        state.update((name, checkpoint.tensor(name)) for name in checkpoint.tensor_names)
    for part in sorted(folder.glob("weights-*.pt")):
        state.update(torch.load(part, map_location="cpu", weights_only=True))
    model.load_state_dict(state)


class Trainer:
    """Runs phases on one device and writes the log."""

    def __init__(self, model: EmbeddedModel, device: torch.device, out: Path):
        self.model, self.device, self.out = model, device, out
        self.optimizer = Optimizer(model)
        self.average: EmbeddedModel | None = None
        self.log = (out / "log.jsonl").open("a")
        self.start = time.time()
        self.steps = 0

    def note(self, **values: object) -> None:
        row = {"s": round(time.time() - self.start, 1), "step": self.steps, **values}
        self.log.write(json.dumps(row) + "\n")
        self.log.flush()
        print(json.dumps(row), flush=True)

    def run(self, phase: Phase, batches: Iterator[Batch]) -> None:
        """One phase, ended by the clock; its time starts after the first step (compilation)."""
        begun, seen, sums = None, 0, {}
        noted = saved = time.time()
        waited = 0.0
        while begun is None or time.time() - begun < phase.seconds:
            share = 0.0 if begun is None else (time.time() - begun) / phase.seconds
            warm = min(1.0, (self.steps + 1) / 100)
            factor = warm * (phase.rate[0] + (phase.rate[1] - phase.rate[0]) * share)
            asked = time.time()
            batch = next(batches).to(self.device)
            waited += time.time() - asked
            for name, value in self.step(phase, batch, factor).items():
                sums[name] = sums.get(name, 0.0) + value
            seen += batch.ids.numel()
            if begun is None or (self.steps % 20 == 0 and time.time() - noted > 8):
                means = {name: round(float(a / b), 4) for name, (a, b) in sums.items() if b > 0}
                elapsed = time.time() - noted
                speed = round(seen / elapsed / 1000, 2)
                self.note(
                    length=phase.length, rate=round(factor, 4), ktok_s=speed, wait=round(waited / elapsed, 2), **means
                )
                sums, seen, waited, noted = {}, 0, 0.0, time.time()
            if begun is None:
                begun = time.time()
            if time.time() - saved > 100:
                save(self.model if self.average is None else self.average, self.out)
                saved = time.time()
        save(self.model if self.average is None else self.average, self.out)

    def step(self, phase: Phase, batch: Batch, factor: float) -> dict[str, Tensor]:
        """One step at a learning-rate factor; what `losses_of` found."""
        with torch.autocast(self.device.type, torch.bfloat16):
            total, parts = losses_of(self.model, batch, phase)
        total.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0, foreach=True)
        self.optimizer.step(factor)
        self.model.zero_grad(set_to_none=True)
        self.steps += 1
        if phase.average:
            if self.average is None:
                self.average = copy.deepcopy(self.model)
            decay = min(phase.average, self.steps / (self.steps + 10))
            with torch.no_grad():
                pairs = zip(self.average.parameters(), self.model.parameters(), strict=True)
                for kept, new in pairs:
                    kept.lerp_(new, 1.0 - decay)
        return parts


def check(trainer: Trainer, heldout: Corpus, words: list[str], length: int, count: int) -> None:
    """Scores held-out samples of several turns, with and without the sparse layers."""
    maker = ArchiveMaker(heldout, words, random.Random(f"check-{length}"))
    samples = [maker.sample(length) for _ in range(count)]
    trainer.note(check=length, scores=shares(score(trainer.model, samples, trainer.device)))
    zeroed = score(trainer.model, samples[: max(1, count // 2)], trainer.device, is_zeroed=True)
    trainer.note(check=length, without_sparse_layers=shares({"all": zeroed["all"]}))


def main() -> None:
    """Parses the command line and runs one stage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stage", choices=sorted(STAGES), required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--resume", type=Path)
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--scale-seconds", type=float, default=1.0)
    parser.add_argument("--limit-mb", type=float)
    parser.add_argument("--every", type=int, default=1, help="use one file in so many: less memory, quicker start")
    parser.add_argument("--first-phase", type=int, default=0, help="go on from there, with --resume of what was saved")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    start = time.time()
    limit = None if arguments.limit_mb is None else int(arguments.limit_mb * 1e6)
    corpus, heldout = (Corpus.load(split, limit, arguments.every) for split in ("train", "heldout"))
    lines = [line for n in corpus.names for file in corpus.packages[n] for line in file.lines[:80]]
    words, new_words = (word_list(lines, corpus.tokenizer, is_heldout) for is_heldout in (False, True))
    print(f"{corpus.num_tokens / 1e6:.1f}M training tokens read in {time.time() - start:.0f} s", flush=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(SEED)
    torch.backends.cuda.matmul.allow_tf32 = True
    model = EmbeddedModel(Shape()).to(device)
    if arguments.resume:
        restore(model, arguments.resume)
    if arguments.compile:
        torch._dynamo.config.recompile_limit = 64
        model.compile_blocks()
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters on {device}", flush=True)
    trainer = Trainer(model, device, arguments.out)
    if arguments.resume:
        trainer.note(resumed=str(arguments.resume))
    for number, phase in list(enumerate(STAGES[arguments.stage]))[arguments.first_phase :]:
        scaled = Phase(**{**phase.__dict__, "seconds": phase.seconds * arguments.scale_seconds})
        seed = SEED + 1000 * int(arguments.stage) + number
        stream = Stream(corpus, words, phase.length, phase.batch, phase.cut_share, seed, phase.needle_share)
        trainer.run(scaled, loader(stream, arguments.workers))
        if phase.needle_share == 0.0:
            check(trainer, heldout, new_words, phase.length, CHECKS[phase.length])


if __name__ == "__main__":
    main()
