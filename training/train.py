"""Trains the embedded model in phases: short and dense first, long with block selection last.

In: the corpus and the tokenizer; `--resume FOLDER` starts from saved weights. Out: under --out: weights-K.pt (four
parts, fp32), log.jsonl, state.pt to go on from, and the scores of small held-out checks. For: training/export.py. Run
(one H100, about ten minutes a stage): `python -m training.train --stage 1 --out training/runs/one`. Stage 3 is for one
CPU thread: `--workers 0 --every 6`.

A run can be cut into several commands: `--seconds` ends one in time, with everything saved, and the same command goes
on from there with the batches that would have come next. The learning rate follows the share of the whole run that is
done; `--finish` spreads what is left of it over the seconds of its command, so that the last one ends with the rate at
its end.
"""

import argparse
import random
import time
from pathlib import Path

import torch

from training.archive import ArchiveMaker
from training.batches import Stream, loader
from training.corpus import Corpus
from training.invent import word_list
from training.model import EmbeddedModel, Shape
from training.score import score, shares, text_loss
from training.stages import STAGES
from training.trainer import Place, Trainer, has_state, restore

SEED = 20261123
CHECKS = {512: 24, 2048: 24, 8192: 12, 16384: 8}
CLOSING_S = 12.0  # to save, and to check at the end


def check(trainer: Trainer, maker: ArchiveMaker, lengths: list[int], is_small: bool) -> None:
    """Scores held-out samples of several turns, and without the sparse layers, and measures the loss of their text."""
    for length in lengths:
        maker.rng.seed(f"check-{length}")
        samples = [maker.sample(length) for _ in range(CHECKS.get(length, 8) // (3 if is_small else 1))]
        samples = [sample for sample in samples if sample.turns]
        model = trainer.model if trainer.average is None else trainer.average
        text = round(text_loss(model, samples, trainer.device), 4)
        trainer.note(check=length, text=text, scores=shares(score(model, samples, trainer.device)))
        zeroed = score(model, samples[: max(1, len(samples) // 4)], trainer.device, is_zeroed=True)
        trainer.note(check=length, without_sparse_layers=shares({"all": zeroed["all"]}))


def run(trainer: Trainer, corpus: Corpus, maker: ArchiveMaker, words: list[str], arguments: argparse.Namespace) -> None:
    """The phases that are left."""
    phases = STAGES[arguments.stage]
    seconds = [phase.seconds for phase in phases]
    for number, phase in list(enumerate(phases))[trainer.place.phase :]:
        begins, ends = (sum(seconds[:last]) / sum(seconds) for last in (number, number + 1))
        if trainer.place.phase < number:
            trainer.place = Place(number, 0, begins)
        stream = Stream(corpus, words, phase, f"{SEED}/{arguments.stage}/{number}", trainer.place.batch)
        trainer.run(phase, (begins, ends), loader(stream, arguments.workers))
        if trainer.is_late():
            trainer.note(stopped=trainer.place.done, phase=number)
            return
        check(trainer, maker, sorted({part.length for part in phase.parts}), len(phase.parts) > 1)
    trainer.note(finished=True)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=sorted(STAGES), required=True)
    parser.add_argument("--out", type=Path, required=True, help="a run that was stopped there goes on")
    parser.add_argument("--resume", type=Path, help="weights to start from")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--total-seconds", type=float, help="of training, over all commands; else what the stage says")
    parser.add_argument("--seconds", type=float, help="this command ends within so many")
    parser.add_argument("--finish", action="store_true", help="what is left is done within --seconds")
    parser.add_argument("--limit-mb", type=float, help="use so much of the corpus")
    parser.add_argument("--every", type=int, default=1, help="use one file in so many: less memory, quicker start")
    arguments = parser.parse_args()
    if arguments.finish and arguments.seconds is None:
        parser.error("--finish needs --seconds")
    return arguments


def main() -> None:
    """Parses the command line and runs one stage, or as much of it as there is time for."""
    start = time.time()
    arguments = parse_arguments()
    arguments.out.mkdir(parents=True, exist_ok=True)
    limit = None if arguments.limit_mb is None else int(arguments.limit_mb * 1e6)
    corpus, heldout = (Corpus.load(split, limit, arguments.every) for split in ("train", "heldout"))
    lines = [line for n in corpus.names for file in corpus.packages[n] for line in file.lines[:80]]
    words, new_words = (word_list(lines, corpus.tokenizer, is_heldout) for is_heldout in (False, True))
    print(f"{corpus.num_tokens / 1e6:.1f}M training tokens read in {time.time() - start:.0f} s", flush=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(SEED)
    torch.backends.cuda.matmul.allow_tf32 = True
    model = EmbeddedModel(Shape()).to(device)
    if arguments.resume and not has_state(arguments.out):
        restore(model, arguments.resume)
    if arguments.compile:
        torch._dynamo.config.recompile_limit = 64
        model.compile_blocks()
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters on {device}", flush=True)
    total = arguments.total_seconds or sum(phase.seconds for phase in STAGES[arguments.stage])
    deadline = None if arguments.seconds is None else start + arguments.seconds - CLOSING_S
    trainer = Trainer(model, device, arguments.out, total, deadline)
    maker = ArchiveMaker(heldout, new_words, random.Random())
    if has_state(arguments.out):
        trainer.load_state()
        trainer.note(resumed=str(arguments.out), done=trainer.place.done)
    else:
        trainer.note(begins_from=str(arguments.resume))
        check(trainer, maker, [2048], True)
    if arguments.finish:
        trainer.is_spread = True
    run(trainer, corpus, maker, words, arguments)


if __name__ == "__main__":
    main()
